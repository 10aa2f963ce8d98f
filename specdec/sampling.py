"""From logits to the distribution a token is drawn from, and the draw itself.

Greedy decoding is a one-hot distribution, so acceptance needs no second path. The transforms are Hugging Face's own
logits processors, in ``generate``'s order. Knows nothing about drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import kernels
from specdec.errors import SpecDecError


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    temperature: 0 = greedy (the most likely token). top_k: 0 = off. top_p, min_p: nucleus and relative cut-off.
    repetition_penalty: 1 = off. seed: of the generator that drafts and accepts.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", ">= 0 (0 = greedy)"),
            (self.top_k >= 0, "top_k", ">= 0 (0 = off)"),
            (0 < self.top_p <= 1, "top_p", "in (0, 1] (1 = off)"),
            (0 <= self.min_p <= 1, "min_p", "in [0, 1] (0 = off)"),
            (self.repetition_penalty > 0, "repetition_penalty", "> 0 (1 = off)"),
        )
        for good, name, need in checks:
            if not good:
                raise SpecDecError(f"{name} must be {need}; got {getattr(self, name)}")


class Sampler:
    """Applies ``params`` and extra HF ``processors`` alike to drafted, corrected and bonus positions."""

    def __init__(self, params: SamplingParams, processors: Sequence[LogitsProcessor] = (), rows: int = 1) -> None:
        self.params = params
        self.greedy = params.temperature == 0
        self.prefix_processors: list[LogitsProcessor] = []
        if params.repetition_penalty != 1:
            self.prefix_processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        self.prefix_processors += processors
        self.warpers: list[LogitsProcessor] = []
        if not self.greedy:
            if params.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                self.warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self.warpers.append(TopPLogitsWarper(params.top_p))
            if params.min_p:
                self.warpers.append(MinPLogitsWarper(params.min_p))
        # One generator per row, so that a row's draws do not depend on what else is in the batch.
        self.generators = [torch.Generator().manual_seed(params.seed + b) for b in range(rows)]

    @property
    def plain_greedy(self) -> bool:
        """True if the choice is the argmax of the raw logits."""
        return self.greedy and not self.prefix_processors

    def distribution(self, logits: Tensor, prefixes: Callable[[], Sequence[Sequence[Sequence[int]]]]) -> Tensor:
        """Logits [B, T, V] -> probabilities [B, T, V], float32.

        ``prefixes()[b][t]`` are the tokens before position (b, t), asked for only when a processor looks at them.
        """
        if self.greedy and not self.prefix_processors:
            return one_hot(kernels.argmax(logits), logits.shape[-1])
        scores = logits.float().reshape(-1, logits.shape[-1])  # (B * T, V)
        if self.prefix_processors:
            scores = scores.clone()
            flat = [prefix for row in prefixes() for prefix in row]
            for i, prefix in enumerate(flat):
                ids, row = torch.tensor([list(prefix)], device=scores.device), scores[i : i + 1]
                for processor in self.prefix_processors:
                    row = processor(ids, row)
                scores[i] = row[0]
        if self.greedy:
            return one_hot(scores.argmax(-1), scores.shape[-1]).view(logits.shape)
        nothing = torch.empty(scores.shape[0], 0, dtype=torch.long, device=scores.device)
        for warper in self.warpers:
            scores = warper(nothing, scores)
        return scores.softmax(-1).view(logits.shape)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only ``rows`` of the batch."""
        self.generators = [self.generators[i] for i in rows]


def one_hot(index: Tensor, size: int) -> Tensor:
    """Point masses at ``index`` [...] over ``size`` outcomes -> float32 [..., size]."""
    return torch.zeros(*index.shape, size, device=index.device).scatter_(-1, index[..., None], 1.0)


def draw(p: Tensor | npt.NDArray[np.float32], generators: Sequence[torch.Generator]) -> list[int]:
    """Draw from each row of ``p`` [B, V] (need not sum to one) by inverse CDF. Point masses use no random number."""
    rows = p.float().cpu().numpy() if isinstance(p, Tensor) else p
    drawn: list[int] = rows.argmax(-1).tolist()
    for b, (row, generator) in enumerate(zip(rows, generators, strict=True)):
        if row[drawn[b]] < 1:
            cdf = row.cumsum(dtype=np.float64)
            u = torch.rand((), generator=generator, dtype=torch.float64).item() * cdf[-1]
            # On the right: outcomes of probability zero are skipped. Rounding may make u the whole sum.
            index = int(cdf.searchsorted(u, "right"))
            drawn[b] = index if index < len(row) else int(row.nonzero()[0][-1])
    return drawn
