"""One request decoded twice, with a drafter and plainly: how much faster it was, and whether the output is the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.generation import GenerationOutput
from specdec.engine.replay import Difference, first_difference, margins
from specdec.speculation.sampling import Sampler


@dataclass(frozen=True)
class Comparison:
    """difference: where the outputs differ first, explained by a replay of the logits; None if they are equal, or may
    differ by a lossy acceptance rule. agreement: of such a rule, the share of our tokens that the full model would
    choose after those before them.
    """

    ours: GenerationOutput
    plain: GenerationOutput
    difference: Difference | None
    agreement: float | None

    @property
    def speedup(self) -> float | None:
        """Plain decode seconds per token over ours; None if either decoded no token after its first."""
        ours, plain = self.ours.metrics.tokens_per_second, self.plain.metrics.tokens_per_second
        return ours / plain if ours > 0 and plain > 0 else None

    @property
    def identical(self) -> bool:
        return self.ours.token_ids == self.plain.token_ids

    @property
    def fault(self) -> bool:
        """A difference that neither rounding nor the acceptance rule explains."""
        return self.difference is not None and not self.difference.near_tie

    def as_dict(self) -> dict[str, Any]:
        gap = math.inf if self.difference is None else self.difference.margin
        return {
            "speedup": self.speedup,
            "identical": self.identical,
            "fault": self.fault,
            "agreement": self.agreement,
            "first_difference": None if self.difference is None else self.difference.index,
            "logit_gap": gap if math.isfinite(gap) else None,
            "plain": self.plain.as_dict(),
        }


def compare(
    decoder: SpecDecoder, prompt: list[int], sampler: Sampler, ours: GenerationOutput, plain: GenerationOutput
) -> Comparison:
    """Compare the outputs for ``prompt``, whose tokens a sampler like ``sampler`` has chosen."""
    if not decoder.verifier.lossless:
        chosen = margins(decoder.target, prompt, ours.token_ids, sampler) <= 0
        return Comparison(ours, plain, None, chosen.float().mean().item())
    difference = first_difference(decoder.target, prompt, ours.token_ids, plain.token_ids, sampler)
    return Comparison(ours, plain, difference, None)
