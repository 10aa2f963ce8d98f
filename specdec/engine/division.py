"""Which rows draft how deep: the tokens of a step go where they are likeliest to be accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Division(NamedTuple):
    """The depth of each row's draft, the tokens that the step is expected to yield, and its seconds."""

    depths: list[int]
    tokens: float
    seconds: float


def divide(chances: Sequence[Sequence[float]], seconds: Callable[[int, int], float]) -> Division:
    """The division with the most expected tokens per second.

    chances[b][i]: the probability that row b's draft is accepted up to its token i; it falls with i. seconds: of a
    step, by the tokens that it scores (the rows' roots among them) and the depth of its deepest draft.
    The likeliest token comes first, and so a row's tokens come in their order.
    """
    count = len(chances)
    order = sorted((-chance, i, b) for b, row in enumerate(chances) for i, chance in enumerate(row))
    taken, best, tokens, deepest = 0, seconds(count, 0), float(count), 0
    speed, expected = count / best, float(count)
    for n, (negative, i, _) in enumerate(order, start=1):
        expected -= negative
        deepest = max(deepest, i + 1)
        took = seconds(count + n, deepest)
        if expected / took > speed:
            taken, best, tokens, speed = n, took, expected, expected / took
    depths = [0] * count
    for _, _, b in order[:taken]:
        depths[b] += 1
    return Division(depths, tokens, best)
