"""Training of M2R2: projections in closed form, then gradients for projections and adapters.

The presets' path is scaled from the depth ``layers_of`` to that of the model. The loss is distillation on the drafter's
own states, over several draft steps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2_network import M2R2, current_name
from specdec.drafters.m2r2_path import M2R2Path
from specdec.models import drafter_folder
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.evaluate import evaluate
from specdec.train.method import RunContext, TrainingMethod, agreement_name
from specdec.train.neurons import choose_neurons
from specdec.train.settings import Positive, Share, TrainSettings
from specdec.train.states import StateSelection
from specdec.train.student import Teacher, draft_steps, fit_projections, shift_right

STEPS = 4  # drafts a step in evaluation


class M2R2Settings(TrainSettings):
    """The path of the accelerated residual, and its loss. With ``init`` the path is that of the given drafter."""

    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **TrainSettings.replaces,
        "segments": {"layers_of": None},  # given layers refer to this model
        "exit_layer": {"segments": (), "layers_of": None},
    }

    exit_layer: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    final_projection: bool = False
    neurons: int = Field(0, ge=0)  # of the segments' MLPs that drafts run, those that add most; 0: all, or as ``init``
    exits: tuple[int, ...] = ()  # layers after which a token may leave before the end of the path
    layers_of: int | None = None  # depth of the model that these layers refer to; they are scaled to other depths
    rank: Positive = 64
    adapt: tuple[str, ...] = ()  # linear maps with adapters; empty: all in the segments
    draft_steps: Positive = 2  # drafts per step that the drafter learns from
    focus: float = 1.0  # weight of a step after a wrong earlier step
    variation: Share = 0.0  # of the loss that is the total variation, which is the rate of rejection; the rest is KL

    @model_validator(mode="after")
    def _one_path(self) -> M2R2Settings:
        if not (self.segments or self.exit_layer or self.init):
            raise ValueError("give 'segments' or 'exit_layer'")
        return self


class M2R2Method(TrainingMethod[M2R2]):
    """KL to the base at each draft step, averaged over exits."""

    name = "m2r2"
    settings_class = M2R2Settings

    def __init__(self, settings: M2R2Settings, target: Target) -> None:
        super().__init__(settings, target)
        if settings.init:
            self.path = M2R2Path.from_json(drafter_folder.read_config(Path(settings.init)).get("path", {}))
            if settings.neurons not in (0, self.path.neurons):
                raise SpecDecError(
                    f"'{settings.init}' runs {self.path.neurons or 'all'} neurons; leave out the setting 'neurons'"
                )
        else:
            self.path = path_of(settings, target)
        self.neurons: dict[int, Tensor] = {}

    def prepare(self, context: RunContext) -> None:
        if self.settings.init:
            kept = self.read_parameters(Path(self.settings.init))
            self.neurons = {layer: kept[f"adapters.{layer}/neurons"] for layer in self.path.narrow_layers}
        elif self.path.neurons:
            self.neurons = choose_neurons(self.path, self.target, context)

    def read_parameters(self, folder: Path) -> dict[str, Tensor]:
        return {current_name(name): tensor for name, tensor in super().read_parameters(folder).items()}

    def teacher_states(self) -> StateSelection:
        return path_states(self.path, self.target.num_layers)

    def build(self, vocab: Tensor | None) -> M2R2:
        self.teacher = Teacher(self.target, vocab, self.settings.sharpen, self.settings.variation)
        network = M2R2(self.path, self.target, vocab)
        for layer, kept in self.neurons.items():
            network.adapters.get_buffer(f"{layer}/neurons").copy_(kept)
        return network

    def parameter_scale(self, name: str, parameter: Tensor) -> float:
        """For a projection its RMS; for adapters the scale at which up @ down is as large as the adapted weight."""
        owner, _, rest = name.partition(".")
        if owner != "adapters":
            return float(parameter.detach().square().mean().sqrt().clamp_min(1e-8))
        layer, _, path = rest.partition("/")
        path, _, kind = path.rpartition("/")
        if kind == "down":
            return super().parameter_scale(name, parameter)
        path = path.replace("/", ".")
        shapes, mlp = self.target.linears(int(layer)), gated_mlp(self.target.block(int(layer)))
        if int(layer) in self.path.narrow_layers and mlp is not None:
            shapes |= mlp.shapes(self.path.neurons)
        module: Any = self.target.block(int(layer)).get_submodule(path)
        weight: Tensor = module.weight.detach()
        return float(weight.float().square().mean().sqrt()) * (shapes[path][0] / self.path.rank) ** 0.5

    def fit(self, network: M2R2, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
        fit_projections(network, self.target, batches)

    def loss(self, network: M2R2, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        settings, teacher, target = self.settings, self.teacher, self.target
        teacher.begin(batch)
        loss, figures = torch.zeros((), device=target.device), dict[str, float]()
        right = batch.valid  # where the drafter's earlier steps equal the text
        for s, (exits, valid) in enumerate(draft_steps(network, target, batch, settings.draft_steps)):
            reached = shift_right(right) if s else valid
            weight = torch.where(reached, 1.0, settings.focus)
            for exit, (final, _) in zip((*self.path.exits, None), exits, strict=True):
                logits = teacher.logits(final)
                away, figures[agreement_name(s, exit)] = teacher.compare(logits, valid, weight)
                loss = loss + away / len(exits)
            right = teacher.hits(logits, teacher.next) & reached  # of the last exit
        return loss, figures

    def evaluate(self, network: M2R2, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Figures of the last exit."""

        def drafts(batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
            for exits, valid in draft_steps(network, self.target, batch, STEPS):
                yield exits[-1][0], valid

        return evaluate(Teacher(self.target, network.draft_vocab), batches, drafts, STEPS)

    def config(self, network: M2R2) -> dict[str, Any]:
        return {"drafter": "m2r2", "path": self.path.to_json()}


def path_of(settings: M2R2Settings, target: Target) -> M2R2Path:
    """The path of the settings, with adapters in its segments, or in the early layers if it has no segments.

    Early layers use the keys and values of the slow residual, so those maps have no adapters.
    """
    adapters: dict[int, list[str]] = {}
    early, scale = not settings.segments, target.num_layers / (settings.layers_of or target.num_layers)
    exit_layer = round(settings.exit_layer * scale) or min(settings.exit_layer, 1)
    most = target.num_layers - 1 if settings.layers_of else math.inf  # where a scaled segment may begin
    ends = [(int(min(round(lo * scale), most)), round(hi * scale)) for lo, hi in settings.segments]
    segments = tuple((lo, max(hi, lo + 1)) for lo, hi in ends)
    stops = dict(zip((hi for _, hi in settings.segments), (hi for _, hi in segments), strict=True))
    exits = tuple(stops.get(layer) or round(layer * scale) for layer in settings.exits)
    path = M2R2Path(exit_layer, segments, settings.final_projection, settings.rank, {}, exits, settings.neurons)
    path.check(target.num_layers)
    for lo, hi in segments or ((0, exit_layer),):
        for layer in range(lo, hi):
            names = list(target.linears(layer))
            if settings.adapt:
                names = [n for n in names if n in settings.adapt or n.rpartition(".")[2] in settings.adapt]
            if early:
                names = [n for n in names if not any(key in n for key in ("k_proj", "v_proj", "c_attn", "key_value"))]
            adapters[layer] = names
    if not any(adapters.values()) and not settings.final_projection:
        raise SpecDecError("setting 'adapt' names no linear map of this model, so there is nothing to train")
    return dataclasses.replace(path, adapters=adapters)


def path_states(path: M2R2Path, num_layers: int) -> StateSelection:
    """The teacher states that a path needs."""
    kv = [layer for lo, hi in path.segments for layer in range(lo, hi)]
    hidden = {*(lo for lo, _ in path.segments), num_layers}
    if path.adapts_early:
        kv += range(path.exit_layer)
        hidden |= {lo for lo, _ in path.shared if lo}
    else:
        hidden |= {hi for _, hi in path.shared}
    return StateSelection(tuple(sorted(kv)), tuple(sorted(hidden)))
