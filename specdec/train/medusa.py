"""Training of Medusa heads: distillation from the base model's stored final states, without running layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.drafters.medusa import Medusa
from specdec.runtimes.target import Target
from specdec.runtimes.torch.linear import rms_unit
from specdec.train.batches import TrainingBatch
from specdec.train.evaluate import evaluate
from specdec.train.method import TrainingMethod, agreement_name
from specdec.train.settings import Positive, PositiveFloat, TrainSettings
from specdec.train.states import StateSelection
from specdec.train.student import Teacher


class MedusaSettings(TrainSettings):
    """Settings of ``specdec train medusa``, in addition to ``TrainSettings``.

    heads: number of heads; head k = 1, 2, .. drafts the k-th token after the root, the last verified token.
    blocks: number of residual blocks of each head.
    rooted: whether the first block also reads the root's embedding.
    fade: weight of a head's loss as a multiple of that of the head before it, > 0 (lambda in Medusa's paper, arXiv
        2401.10774).
    """

    heads: Positive = 4
    blocks: Positive = 1
    rooted: bool = True
    fade: PositiveFloat = 0.8


class MedusaMethod(TrainingMethod[Medusa]):
    """Trains Medusa heads: head k drafts the k-th token after the last verified one, all from the same final state.

    The loss is the KL divergence from the base model's distribution at the drafted position, summed over the heads
    with the weights 1, ``fade``, ``fade`` squared, ..
    """

    name = "medusa"
    settings_class = MedusaSettings

    def __init__(self, settings: MedusaSettings, target: Target) -> None:
        super().__init__(settings, target)
        if settings.heads >= settings.window:
            raise SpecDecError(f"setting 'window' must exceed the {settings.heads} heads; got {settings.window}")

    def teacher_states(self) -> StateSelection:
        return StateSelection((), (self.target.num_layers,))

    def build(self, vocab: Tensor | None) -> Medusa:
        settings = self.settings
        self.teacher = Teacher(self.target, vocab, settings.sharpen)
        return Medusa(self.target.hidden_size, settings.heads, settings.blocks, settings.rooted, vocab)

    def loss(self, network: Medusa, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        self.teacher.begin(batch)
        loss, figures = torch.zeros((), device=self.target.device), dict[str, float]()
        for k, (final, valid) in enumerate(self._drafts(network, batch)):
            away, figures[agreement_name(k)], _ = self.teacher.compare(final, valid)
            loss = loss + self.settings.fade**k * away
        return loss, figures

    def _drafts(self, network: Medusa, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each head k = 1, 2, ... its estimate of the final state [B, T, D] and valid positions, bool [B, T].

        Entry t is the draft of the token after t. Head k computes it from the final state at t - k and, if ``rooted``,
        the token at t - k + 1. Entry t is valid if position t is no padding, and t - k + 1 is in the window.
        network: the heads. batch: has the final states, which the heads read.
        """
        root = rms_unit(self.target.embed(batch.ids, batch.positions)) if self.settings.rooted else None
        final = batch.before[self.target.num_layers]
        y = network(rms_unit(final), root)  # (B, T, K, D): with the root at t
        count = y.shape[1]
        for late in range(y.shape[2]):
            rooted = F.pad(batch.valid, (late, 0))[:, :count]
            yield F.pad(y[:, :, late], (0, 0, late, 0))[:, :count], batch.valid & rooted

    def evaluate(self, network: Medusa, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        drafts = partial(self._drafts, network)
        return evaluate(Teacher(self.target, network.draft_vocab), batches, drafts, network.heads)

    def config(self, network: Medusa) -> dict[str, Any]:
        settings = self.settings
        return {"drafter": "medusa", "heads": settings.heads, "layers": settings.blocks, "rooted": settings.rooted}
