"""Compare one request with and without a drafter: the speed-up, and whether the outputs are equal."""

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
    """The outputs with a drafter and with plain decoding.

    difference: the first difference, explained by replayed logits; None if the outputs are equal or the rule is lossy.
    agreement: with a lossy rule, the share of our tokens that the full model would choose in their place.
    """

    ours: GenerationOutput
    plain: GenerationOutput
    difference: Difference | None
    agreement: float | None

    @property
    def speedup(self) -> float | None:
        """Our tokens per second over plain decoding's; None if either has no token after its first."""
        ours, plain = self.ours.metrics.tokens_per_second, self.plain.metrics.tokens_per_second
        return ours / plain if ours > 0 and plain > 0 else None

    @property
    def identical(self) -> bool:
        return self.ours.token_ids == self.plain.token_ids

    @property
    def fault(self) -> bool:
        """Whether there is a difference that neither rounding nor the acceptance rule explains."""
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
    """Compare the outputs for ``prompt``. sampler: a copy of the one that chose their tokens."""
    if not decoder.verifier.lossless:
        chosen = margins(decoder.target, prompt, ours.token_ids, sampler) <= 0
        return Comparison(ours, plain, None, chosen.float().mean().item())
    difference = first_difference(decoder.target, prompt, ours.token_ids, plain.token_ids, sampler)
    return Comparison(ours, plain, difference, None)
