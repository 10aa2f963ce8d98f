"""Timing passes and drafts, for training and benchmarks. An engine learns its costs from real steps instead.

The least of several timings counts: other work on the machine makes a pass longer, never shorter.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch

from specdec.engine.depth.policy import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Drafter, Verifier

SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 32)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
DRAFTED = 4  # depth of the timed drafts
REPEATS, SECONDS = 3, 1.0  # minimum number of timings of each, and minimum time for all


@dataclass(frozen=True)
class Timings:
    """Seconds of scoring and drafting.

    score[n]: a pass over n tokens (embedding, layers, readout).
    drafts: for each exit, the first drafted token and each further one.
    """

    score: dict[int, float]
    drafts: tuple[tuple[float, float], ...]

    def scoring(self, tokens: float) -> float:
        """Seconds of a pass over ``tokens``: linear between sizes in ``score``, and from half the largest on."""
        sizes = sorted(self.score)
        at = min(max(bisect.bisect_left(sizes, tokens), 1), len(sizes) - 1)
        below, above = sizes[at - 1], sizes[at]
        if tokens > above:
            below = sizes[bisect.bisect_right(sizes, above / 2) - 1]
        low, high = self.score[below], self.score[above]
        return low + (tokens - below) / (above - below) * max(high - low, 0.0)

    def drafting(self, depth: float, exit: int = -1) -> float:
        """Seconds of drafting ``depth`` tokens deep."""
        first, further = self.drafts[exit]
        return max(first + (depth - 1) * further, 1e-9) if depth else 0.0


def measure(target: Target, drafters: Sequence[Drafter], verifier: Verifier) -> list[Timings]:
    """Time scoring, and drafting with each of ``drafters``, in turns: all see the same machine."""
    exits = [range(drafter.num_exits) if drafter.num_exits > 1 else [None] for drafter in drafters]
    score, draft = defaultdict[int, list[float]](list), defaultdict[tuple[int, int | None, int], list[float]](list)
    start = time.perf_counter()
    while len(score[1]) < REPEATS or time.perf_counter() - start < SECONDS:
        for n, seconds in time_scoring(target, 1).items():
            score[n].append(seconds)
        for number, drafter in enumerate(drafters):
            for exit, depth in product(exits[number], (1, DRAFTED)):
                draft[number, exit, depth].append(time_drafting(target, drafter, verifier, depth, exit))
    least = [min(score[n]) for n in SIZES]
    # Fewer tokens take no longer: where they seem to, the machine was busy.
    scoring = {n: min(least[at:]) for at, n in enumerate(SIZES)}
    found = []
    for number in range(len(drafters)):
        drafts = []
        for exit in exits[number]:
            one, each = min(draft[number, exit, 1]), min(draft[number, exit, DRAFTED])
            further = (DRAFTED * each - one) / (DRAFTED - 1)
            # A further token costs no more than the first. A drafter that drafts nothing by itself (0) has one price.
            drafts.append((one, further) if 0 <= further <= one else (each, each))
        found.append(Timings(scoring, tuple(drafts)))
    return found


@torch.inference_mode()
def time_scoring(target: Target, repeats: int = 5, sizes: Sequence[int] | None = None) -> dict[int, float]:
    """The least seconds of passes of each of ``sizes`` (None: ``SIZES``), interleaved, after one that warms up.

    With experts in slow memory, the median: each pass has other tokens, and those of a lucky one are there already.
    """
    sizes = SIZES if sizes is None else sizes
    cache, context = target.new_cache(), min(CONTEXT, target.context - max(sizes))
    _pass(target, cache, 0, context)
    cache.commit([list(range(context))])
    seconds = defaultdict[int, list[float]](list)
    order = [*sizes, *reversed(sizes)]  # a pass takes longer behind a much larger one
    for turn, n in enumerate(order * (repeats // 2 + 1)):
        start = time.perf_counter()
        _pass(target, cache, context, n, turn * max(sizes))
        seconds[n].append(time.perf_counter() - start)
        cache.trim(n)
    typical = min if target.experts is None else statistics.median
    return {n: typical(s[1:]) for n, s in seconds.items()}


def _pass(target: Target, cache: KVCache, start: int, count: int, first: int = 0) -> None:
    """Run ``count`` tokens, ``first`` and so on, from position ``start`` on, and choose one after each."""
    positions = torch.arange(start, start + count, device=target.device)[None]
    x = target.embed((positions + first) % target.vocab_size, positions)
    target.greedy_tokens(target.layers(x, 0, target.num_layers, Pass(positions, cache.register(0, positions), cache)))


def _engine(target: Target, drafter: Drafter, verifier: Verifier, depth: FixedDepth) -> Engine:
    engine = Engine(target, drafter, verifier, depth)
    engine.batch.state.measuring = True
    return engine


def time_drafting(target: Target, drafter: Drafter, verifier: Verifier, depth: int, exit: int | None) -> float:
    """The least seconds per drafted token in the steps of a short generation; 0 if nothing is drafted."""
    prompt = [(7 * i) % target.vocab_size for i in range(min(CONTEXT, target.context // 2))]
    request = Request(prompt, min(8 * depth, target.context - len(prompt)), learn=False)
    engine = _engine(target, drafter, verifier, FixedDepth(depth, exit))
    engine.submit(request)
    spent = [engine.timer.seconds.get("draft", 0.0) for _ in engine.steps()]  # after the prefill, and after each step
    steps = list(zip(pairwise(spent), request.metrics.per_step_drafted, strict=True))
    return min([(after - before) / n for (before, after), n in steps[1:] if n], default=0.0)  # the first warms up
