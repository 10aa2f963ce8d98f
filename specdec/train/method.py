"""What a drafter's training consists of, apart from the trainer: the contract of methods, and their names.

``specdec train NAME`` works for every name in ``METHODS``. The trainer owns what all methods share: answers, teacher
states, batches, optimiser, checkpoints, metrics, evaluation, the drafter folder. A method says what is specific: adding
one is a file with a ``TrainingMethod`` and its settings, a line here and a preset ``configs/train/NAME.yaml``. Networks
live beside their drafters (``specdec.drafters``) and are used alike for drafting and training.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:  # the command line imports this module for the names alone
    from rich.console import Console
    from torch import Tensor, nn

    from specdec.api.decoder import SpecDecoder
    from specdec.base.terminal import Progress
    from specdec.runtimes.target import Target
    from specdec.train.batches import TrainingBatch
    from specdec.train.data import TrainingAnswer
    from specdec.train.settings import TrainSettings
    from specdec.train.states import Wanted

METHODS: dict[str, str] = {
    "arla": "specdec.train.arla:ArlaMethod",
    "deed": "specdec.train.exits:DeedMethod",
    "eagle3": "specdec.train.eagle3:Eagle3Method",
    "early-exit": "specdec.train.exits:EarlyExitMethod",
    "m2r2": "specdec.train.m2r2:M2R2Method",
    "medusa": "specdec.train.medusa:MedusaMethod",
    "mixture-of-depths": "specdec.train.exits:MixtureOfDepthsMethod",
}
Network = TypeVar("Network", bound="nn.Module")


def lookup(name: str) -> type[TrainingMethod[Any]]:
    """Import and return the method registered as ``name``."""
    module, _, attribute = METHODS[name].partition(":")
    found: type[TrainingMethod[Any]] = getattr(importlib.import_module(module), attribute)
    return found


@dataclass(frozen=True)
class Work:
    """What a run has before training: its folder, its answers, the draft vocabulary, and a decoder of the model as it
    was loaded, in the runtime that will serve the drafter."""

    output: Path
    train: Sequence[TrainingAnswer]
    held_out: Sequence[TrainingAnswer]
    vocab: Tensor | None
    decoder: SpecDecoder
    console: Console
    progress: Progress


class TrainingMethod(ABC, Generic[Network]):
    """How one kind of drafter is trained on a frozen target. One object serves one run.

    The trainer calls, in this order: the constructor, ``prepare``, ``wanted``, ``build`` (once: float32 masters; a copy
    in the target's dtype is what runs), ``fit`` and ``size`` (unless it resumes), then ``loss`` per update and
    ``evaluate`` at intervals (without gradients), and ``config`` and ``tensors`` whenever a drafter is exported.
    ``network`` below is the running copy; after each update it follows the masters.

    name: the method's in ``METHODS``. settings_class: ``TrainSettings`` with the method's own settings and defaults.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TrainSettings]]

    def __init__(self, settings: Any, target: Target) -> None:
        """Raise SpecDecError for settings that do not fit the model."""
        self.settings, self.target = settings, target

    def prepare(self, work: Work) -> None:
        """Decide what takes answers to decide, such as layers by a search. What is found must be kept in ``output``."""

    @abstractmethod
    def wanted(self) -> Wanted:
        """The teacher states that batches must hold."""

    @abstractmethod
    def build(self, vocab: Tensor | None) -> Network:
        """The masters, float32. ``vocab``: int32 [V'], the draft vocabulary, or None for the full one.

        Parameters with ``requires_grad`` are trained; torch's seed has been set.
        """

    def stored(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a trained drafter to begin from, by the names of the masters' parameters."""
        from specdec.models import drafter_folder  # heavy

        return drafter_folder.read_tensors(folder)

    def size(self, name: str, parameter: Tensor) -> float:
        """How large the elements of a parameter of the masters are; ``relative_rate`` is a share of that.

        Here what keeps the scale of a matrix's inputs, whatever their number; of a vector the same. Called when the
        parameters have their first values.
        """
        return parameter.shape[-1] ** -0.5

    def fit(self, network: Network, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
        """Set parameters of ``network`` in closed form, before any gradient. ``batches()`` starts over at each call."""

    @abstractmethod
    def loss(self, network: Network, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, a *mean over the valid positions* of ``batch`` (so that shares of several processes add up).

        Beside it, figures for progress and metrics; ``agree`` (share of positions where the draft is the base's choice)
        is one of them.
        """

    @abstractmethod
    def evaluate(self, network: Network, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Figures on held-out answers, for metrics and config.json. ``score`` picks the best: larger is better.

        ``chain`` (optional): P(the first i drafts are all accepted), i = 1, 2, ...; from it follows the predicted
        speedup. ``nodes`` (optional): tokens scored beside the root for a draft of depth i; without it i. ``top1``
        (optional): agreement per draft step, which is plotted.
        """

    @staticmethod
    @abstractmethod
    def describe(figures: dict[str, Any]) -> str:
        """What ``evaluate`` found, as half a line for people."""

    @abstractmethod
    def config(self, network: Network) -> dict[str, Any]:
        """The drafter's entries of ``config.json``, its name ``drafter`` among them."""

    def tensors(self, masters: Network) -> dict[str, Tensor]:
        """What ``model.safetensors`` holds; floating-point tensors are stored as the setting ``storage`` says."""
        return masters.state_dict()


def agreement_name(number: int, exit: int | None = None) -> str:
    """What metrics call the agreement of draft step ``number`` (from 0): agree, agree2, ...; before the end @LAYER."""
    step = "agree" if number == 0 else f"agree{number + 1}"
    return step if exit is None else f"{step}@{exit}"
