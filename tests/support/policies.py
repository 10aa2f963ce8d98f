"""Depth policies with a scripted choice, so that drafts do not depend on timings."""

import itertools
import random
from collections.abc import Sequence

from specdec.engine.depth import DepthChoice, FixedDepth, History
from specdec.engine.depth.calibration import RAW_PROBABILITIES
from specdec.engine.depth.policy import NEVER
from specdec.speculation.drafter import Drafter
from specdec.speculation.trees import Prices

CHEAP, DEAR = 0.01, 2.0  # of a level: a learned drafter is worth it, or is not


def alternating(drafter: Drafter, seed: int = 0, deepest: int = 5) -> FixedDepth:
    """Return a policy that takes turns in plain steps and drafts from every source that a policy may choose.

    A source is an exit of the drafter, or None. Some turns have prices with cheap or dear levels. Each row drafts to a
    random depth, which changes in every step: at most ``deepest``, and no deeper than the row may.
    """
    sources = list(itertools.product((None, *range(len(drafter.traits.level_shares))), (None, CHEAP, DEAR)))
    rng, traits = random.Random(seed), drafter.traits

    def script(caps: Sequence[int]) -> DepthChoice:
        if not turns:
            turns.extend(rng.sample(sources, len(sources)))
            turns.insert(rng.randrange(len(sources)), None)
        turn, depths = turns.pop(), [rng.randint(0, deepest) for _ in caps]
        if turn is None or not any(caps):
            return DepthChoice([0] * len(caps))
        exit, level = turn
        depths[rng.randrange(len(caps))] = rng.randint(1, deepest)
        depths = [min(depth, cap) for depth, cap in zip(depths, caps, strict=True)]
        nodes, rates = [0.02 * count for count in range(25)], [[0.8] * min(deepest, cap) for cap in caps]
        tables = [[RAW_PROBABILITIES if cap else NEVER] * len(traits.sources) for cap in caps]
        tables = tables if traits.has_probabilities else ()
        return DepthChoice(depths, exit, None if level is None else Prices(nodes, level, rates=rates, tables=tables))

    turns = list[tuple[int | None, float | None] | None]()
    return _Scripted(script, deepest)


class _Scripted(FixedDepth):
    def __init__(self, script, deepest: int) -> None:  # type: ignore[no-untyped-def]
        super().__init__(deepest)
        self.script = script

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        choice: DepthChoice = self.script(caps)
        return choice
