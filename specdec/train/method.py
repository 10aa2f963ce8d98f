"""The interface of training methods, and their names.

``specdec train NAME`` works for every name in ``METHODS``. The trainer owns what all methods share: answers, the base
model's stored states, batches, optimizer, checkpoints, metrics, evaluation and the drafter folder. A new method is a
file with a ``TrainingMethod`` and its settings, a line in ``METHODS`` and a preset ``configs/train/NAME.yaml``.
Networks are defined in ``specdec.drafters``, because drafting and training share them.
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
PRESETS = {"m2r2-paper": "m2r2"}  # commands for a preset of a method
Network = TypeVar("Network", bound="nn.Module")


def lookup(name: str) -> type[TrainingMethod[Any]]:
    """Import and return the class of the method ``name``. Raises KeyError for a name that is not in ``METHODS``."""
    module, _, attribute = METHODS[name].partition(":")
    method: type[TrainingMethod[Any]] = getattr(importlib.import_module(module), attribute)
    return method


@dataclass(frozen=True)
class RunContext:
    """What the trainer hands to ``TrainingMethod.prepare``.

    output: the output folder of the run.
    answers: the answers to train on: token ids of a prompt and of the base model's own answer to it.
    teacher: the base model as users run it, without gradients; ``TrainingMethod.target`` is the one to train with.
    progress: the progress bars, to which the method adds a task for work that takes long.
    """

    output: Path
    answers: Sequence[TrainingAnswer]
    teacher: Target
    progress: Progress


class TrainingMethod(ABC, Generic[Network]):
    """Base class of training methods: how one kind of drafter is trained for a frozen base model, in one run.

    The trainer calls the constructor, ``prepare``, ``teacher_states`` and ``build``; ``fit`` and ``parameter_scale``
    unless the run resumes; ``loss`` per update; ``evaluate`` at intervals, without gradients; ``config`` at each
    export. ``build`` makes the float32 master weights; the argument ``network`` of the other methods is their running
    copy in the dtype of the base model.

    name: the key in ``METHODS``.
    settings_class: subclass of ``TrainSettings`` with the method's own settings.
    refreshes: whether the network derives something from its parameters that ``refresh`` updates.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TrainSettings]]
    refreshes = False

    def __init__(self, settings: Any, target: Target) -> None:
        """Keep ``settings`` and the base model ``target``, which a run trains for.

        settings: an instance of ``settings_class``. Subclasses refuse settings with SpecDecError.
        """
        self.settings, self.target = settings, target

    def prepare(self, context: RunContext) -> None:
        """Compute what depends on the answers, such as a choice of neurons, and store it in ``context.output``.

        A resumed run calls this again and must get the same result. The default does nothing.
        """

    @abstractmethod
    def teacher_states(self) -> StateSelection:
        """Return which of the base model's layers each ``TrainingBatch`` must have keys and values of, and inputs of.

        Layer N (the number of layers) stands for the last layer's output, before the final norm.
        """

    @abstractmethod
    def build(self, vocab: Tensor | None) -> Network:
        """Return a new network in float32, initialized with torch's random generator, which the trainer has seeded.

        Parameters with ``requires_grad`` are trained.
        vocab: the draft vocabulary, token ids int32 [V']; None: the full vocabulary.
        """

    def read_parameters(self, folder: Path) -> dict[str, Tensor]:
        """Return the tensors of the trained drafter in ``folder``, by parameter name, as values to start from."""
        from specdec.models import drafter_folder  # heavy

        return drafter_folder.read_tensors(folder)

    def parameter_scale(self, name: str, parameter: Tensor) -> float:
        """Return the typical size of the elements of the parameter ``name``, after initialization.

        Its learning rate is ``relative_rate`` times this scale. The default, 1 / sqrt(last dimension), is the scale at
        which a matrix preserves the scale of its inputs.
        """
        return parameter.shape[-1] ** -0.5

    def fit(self, network: Network, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
        """Set parameters of ``network`` by closed-form regression, before the first update. The default does nothing.

        batches: a function; each call returns a new iterator over the same batches, some ``fit_tokens`` positions.
        """

    def refresh(self, network: Network) -> None:
        """Update what ``network`` derives from its parameters, if ``refreshes``.

        The trainer calls it before the first update and each evaluation, and then every 16 updates.
        """

    @abstractmethod
    def loss(self, network: Network, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss (a scalar with gradients) and figures to log, by name.

        The loss is a *mean over the valid positions* of ``batch`` (``batch.valid``), so that processes can average it.
        The figure ``agree`` must be there: the share of positions where the draft is the base model's choice.
        network: the running copy of what ``build`` made.
        """

    @abstractmethod
    def evaluate(self, network: Network, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Return figures on held-out answers (JSON values) for the metrics and config.json of the drafter.

        network: the running copy of what ``build`` made. batches: the held-out answers; can be iterated once.
        The figure ``score`` must be there. It selects the best drafter; larger is better.
        """

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        """Return one line of text for people about the figures that ``evaluate`` returned.

        By default these have the keys ``score``, ``top1`` and ``overlap`` of ``train.evaluate.evaluate``.
        """
        agreement = ", ".join(f"{x:.3f}" for x in figures["top1"])
        return (
            f"mean acceptance length {figures['score']:.2f} with {len(figures['top1'])} drafts "
            f"(agreement {agreement}; 1 - TV {figures['overlap'][0]:.3f})"
        )

    @abstractmethod
    def config(self, network: Network) -> dict[str, Any]:
        """Return what the drafter's ``config.json`` says of ``network``: {entry: JSON value}.

        The entry ``drafter`` is the drafter's name in the registry, such as "medusa". A run adds the entries
        ``version``, ``base`` and ``training``.
        """


def agreement_name(number: int, exit: int | None = None) -> str:
    """Return the metric's name for drafted token ``number`` (from 0): ``agree``, ``agree2``, ...

    exit: the layer of an early exit, which gives ``agree@LAYER``; None: the last exit.
    """
    step = "agree" if number == 0 else f"agree{number + 1}"
    return step if exit is None else f"{step}@{exit}"
