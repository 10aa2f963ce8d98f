"""Training of ARLA: routers that predict, at each exit of a trained M2R2 drafter, whether its draft is right.

A draft is right if it is the base model's most likely token. The drafter is frozen and drafts its own training data.
The output is the drafter with its routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2.network import M2R2, load_network
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.m2r2 import path_states
from specdec.train.method import TrainingMethod, agreement_name
from specdec.train.settings import Positive, TrainSettings
from specdec.train.states import StateSelection
from specdec.train.student import Teacher, draft_steps

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)  # router probabilities that the evaluation tries


class ArlaSettings(TrainSettings):
    """Settings of ``specdec train arla``, in addition to ``TrainSettings``.

    drafter: the trained M2R2 drafter: a folder, or the name of a drafter shipped for the model.
    width: size of the small vectors to which a router projects the hidden states that it reads.
    draft_steps: number of tokens of the drafts that the routers learn from.
    """

    drafter: str = "m2r2"
    width: Positive = 16
    draft_steps: Positive = 3


class ArlaMethod(TrainingMethod[M2R2]):
    """Trains routers with the binary cross-entropy of "the draft's best token is the base model's best token".

    A router is a small network at an exit of the drafter: it predicts the probability that the draft made there is
    right.
    """

    name = "arla"
    settings_class = ArlaSettings

    def __init__(self, settings: ArlaSettings, target: Target) -> None:
        super().__init__(settings, target)
        folder = Path(settings.drafter)
        if not folder.is_dir() and folder.name == settings.drafter:
            folder = drafter_folder.find_shipped(settings.drafter, target) or folder
        self.trained, self.drafter = drafter_folder.read_config(folder), load_network(target, folder)

    def teacher_states(self) -> StateSelection:
        return path_states(self.drafter.path, self.target.num_layers)

    def build(self, vocab: Tensor | None) -> M2R2:
        own = self.drafter.draft_vocab
        self.teacher = Teacher(self.target, None if own is None else own.to(self.target.device))
        network = M2R2(self.drafter.path, self.target, own, self.settings.width)
        frozen = {name: tensor for name, tensor in self.drafter.state_dict().items() if not name.startswith("routers.")}
        network.load_state_dict(frozen, strict=False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("routers."))
        return network

    def _steps(self, network: M2R2, batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (log-odds of the router, draft is right, entry counts), each [B, T], per draft step and exit.

        The log-odds, float32, are those of the draft from this exit being right, as the router predicts it; the others
        are bool. Entry t is of the token after position t; those of padding, and too early in a window for the draft
        step, do not count. The exits of the first draft step come first, in order.

        network: the drafter with its routers. Only the log-odds have gradients.
        """
        assert network.routers is not None
        teacher = self.teacher
        teacher.begin(batch)
        known = teacher.known(batch)
        for exits, valid in draft_steps(network, self.target, batch, self.settings.draft_steps, watched=True):
            for router, (final, passed) in zip(network.routers, exits, strict=True):
                with torch.no_grad():
                    logits = teacher.logits(final)
                    hit = teacher.hits(logits) & known
                yield router([p.detach() for p in passed], logits), hit, valid

    def loss(self, network: M2R2, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        loss, figures = torch.zeros((), device=self.target.device), dict[str, float]()
        exits, last = len(network.path.stages_to_exit), len(network.path.exits)
        for number, (odds, hit, valid) in enumerate(self._steps(network, batch)):
            loss = loss + F.binary_cross_entropy_with_logits(odds, hit.float(), weight=valid.float(), reduction="sum")
            step, exit = divmod(number, exits)
            name = agreement_name(step, None if exit == last else network.path.exits[exit])
            figures[name] = float(((odds > 0) == hit)[valid].float().mean())
        return loss / (batch.valid.sum() * self.settings.draft_steps * exits), figures

    def evaluate(self, network: M2R2, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Return the figures of the routers of ``network``, pooled over all draft steps and exits, by these keys.

        levels: the thresholds ``THRESHOLDS`` on the probability that a router predicts for a draft to be right.
        leave: for each threshold, the share of drafted tokens at or above it.
        right: for each threshold, the share of these tokens that are the base model's choice; 1 if there are none.
        entropy: cross-entropy in nats. score: its negative. positions: number of predictions.
        Raises SpecDecError if the batches hold no position.
        """
        steps = (step for batch in batches for step in self._steps(network, batch))
        odds, right = torch.cat([torch.stack((o[v], h[v].float())).cpu() for o, h, v in steps], 1)  # (positions,) each
        if not len(odds):
            raise SpecDecError("the held-out answers are too short to evaluate the router on; give more")
        entropy = float(F.binary_cross_entropy_with_logits(odds, right))
        leave = [odds.sigmoid() >= level for level in THRESHOLDS]
        return {
            "levels": list(THRESHOLDS),
            "leave": [round(float(on.float().mean()), 4) for on in leave],
            "right": [round(float(right[on].mean()) if bool(on.any()) else 1.0, 4) for on in leave],
            "entropy": round(entropy, 4),
            "score": round(-entropy, 4),
            "positions": len(odds),
        }

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        at = ", ".join(
            f"{level:g}: {share:.0%} leave, {right:.0%} right"
            for level, share, right in zip(figures["levels"], figures["leave"], figures["right"], strict=True)
        )
        return f"cross-entropy {figures['entropy']:.3f}; at threshold {at}"

    def config(self, network: M2R2) -> dict[str, Any]:
        base = {key: self.trained[key] for key in ("drafter", "path")}
        return {**base, "router": self.settings.width, "before_router": self.trained.get("training")}
