"""The interface of training methods, and their names.

``specdec train NAME`` works for every name in ``METHODS``. The trainer owns what all methods share: answers, teacher
states, batches, optimiser, checkpoints, metrics, evaluation and the drafter folder. A new method is a file with a
``TrainingMethod`` and its settings, a line in ``METHODS`` and a preset ``configs/train/NAME.yaml``. Networks live in
``specdec.drafters``; drafting and training share them.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:  # the command line imports this module for the names alone
    from torch import Tensor, nn

    from specdec.base.terminal import Progress
    from specdec.runtimes.target import Target
    from specdec.train.batches import TrainingBatch
    from specdec.train.data import TrainingAnswer
    from specdec.train.settings import TrainSettings
    from specdec.train.states import StateSelection

METHODS: dict[str, str] = {
    "arla": "specdec.train.arla:ArlaMethod",
    "deed": "specdec.train.exits:DeedMethod",
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
class RunContext:
    """What a run has before training.

    answers: to train on.
    teacher: the model as loaded, in the runtime that will serve the drafter.
    """

    output: Path
    answers: Sequence[TrainingAnswer]
    teacher: Target
    progress: Progress


class TrainingMethod(ABC, Generic[Network]):
    """How one kind of drafter is trained on a frozen target. An object serves one run.

    The trainer calls the constructor, ``prepare``, ``teacher_states`` and ``build``; ``fit`` and ``parameter_scale``
    unless the run resumes; ``loss`` per update; ``evaluate`` at intervals, without gradients; ``config`` at
    each export. ``build`` makes the float32 masters; ``network`` is their running copy in the target's
    dtype.

    name: the key in ``METHODS``.
    settings_class: ``TrainSettings`` with the method's settings and defaults.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TrainSettings]]

    def __init__(self, settings: Any, target: Target) -> None:
        """Raise SpecDecError for settings that do not fit the model."""
        self.settings, self.target = settings, target

    def prepare(self, context: RunContext) -> None:
        """Decide what depends on answers, such as neurons. The decision must be stored in the output folder."""

    @abstractmethod
    def teacher_states(self) -> StateSelection:
        """The teacher states that batches contain."""

    @abstractmethod
    def build(self, vocab: Tensor | None) -> Network:
        """The float32 masters. Parameters with ``requires_grad`` are trained. torch's seed is set before.

        vocab: int32 [V'], the draft vocabulary, or None for the full one.
        """

    def read_parameters(self, folder: Path) -> dict[str, Tensor]:
        """The tensors of a trained drafter to start from, by parameter name."""
        from specdec.models import drafter_folder  # heavy

        return drafter_folder.read_tensors(folder)

    def parameter_scale(self, name: str, parameter: Tensor) -> float:
        """The scale of a parameter's elements, of which ``relative_rate`` is a share. Called after initialisation.

        The default, 1 / sqrt(last dimension), is the scale at which a matrix preserves the scale of its inputs.
        """
        return parameter.shape[-1] ** -0.5

    def fit(self, network: Network, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
        """Fit parameters in closed form, before the first update. Each call of ``batches`` starts over."""

    @abstractmethod
    def loss(self, network: Network, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, a *mean over the valid positions* of ``batch``, so that processes can average it, and figures.

        The figures are shown and logged. One is ``agree``, the share of positions where the draft is the base's choice.
        """

    @abstractmethod
    def evaluate(self, network: Network, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Figures on held-out answers, for metrics and config.json.

        score: selects the best drafter; larger is better.
        """

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        """A short text about the figures of ``evaluate``."""
        agreement = ", ".join(f"{x:.3f}" for x in figures["top1"])
        return (
            f"mean acceptance length {figures['score']:.2f} with {len(figures['top1'])} drafts "
            f"(agreement {agreement}; 1 - TV {figures['overlap'][0]:.3f})"
        )

    @abstractmethod
    def config(self, network: Network) -> dict[str, Any]:
        """The drafter's entries of ``config.json``; ``drafter`` is its name."""


def agreement_name(number: int, exit: int | None = None) -> str:
    """The metric of draft step ``number`` (from 0): agree, agree2, ...; at an earlier exit agree@LAYER."""
    step = "agree" if number == 0 else f"agree{number + 1}"
    return step if exit is None else f"{step}@{exit}"
