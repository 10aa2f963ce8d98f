"""Which rows draft how deep: the tokens of a step go where they are likeliest to be accepted."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple


class Division(NamedTuple):
    """The depth of each row's draft, the tokens that the step is expected to yield, and its seconds."""

    depths: list[int]
    tokens: float
    seconds: float


def divide(
    chances: Sequence[Sequence[float]],
    passes: Sequence[float],
    drafting: Sequence[float],
    least: int = 0,
    plain: int = 0,
) -> Division:
    """The division with the most expected tokens per second, of those that draft ``least`` tokens or more.

    chances: [rows][positions], the probability that a row's draft is accepted up to each of its tokens; it falls along
    a row. passes, drafting: seconds of scoring 0, 1, .. drafted tokens beside the roots, and of drafting so deep.
    plain: further rows, which do not draft. The likeliest token comes first, and so a row's tokens come in their order.
    """
    likely = [(chance, b) for level in zip(*chances, strict=True) for b, chance in enumerate(level)]
    likely.sort(key=itemgetter(0), reverse=True)  # of equal ones, earlier positions stay first
    tokens, deepest, depths = float(len(chances) + plain), 0, [0] * len(chances)
    best, taken = Division([], tokens, passes[0]), 0
    speed = 0.0 if least else tokens / passes[0]
    for n, (chance, b) in enumerate(likely, start=1):
        tokens += chance
        depths[b] += 1
        deepest = max(deepest, depths[b])
        seconds = passes[n] + drafting[deepest]
        if n >= least and tokens / seconds > speed:
            best, taken, speed = Division([], tokens, seconds), n, tokens / seconds
    for _, b in likely[taken:]:
        depths[b] -= 1
    return best._replace(depths=depths)
