"""Training of M2R2: projections in closed form, then gradient training of projections and adapters.

A preset's layer numbers are scaled from the depth ``layers_of`` to the depth of the model. The loss is distillation on
the drafter's own states, over several drafted tokens.
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
from specdec.drafters.m2r2.network import M2R2, current_name, narrow_mlp
from specdec.drafters.m2r2.path import M2R2Path
from specdec.models import drafter_folder
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch
from specdec.train.evaluate import evaluate
from specdec.train.method import RunContext, TrainingMethod, agreement_name
from specdec.train.neurons import choose_neurons
from specdec.train.settings import Positive, Share, TrainSettings
from specdec.train.states import NO_PATH, StateSelection
from specdec.train.student import Teacher, draft_steps, fit_projections, shift_right

STEPS = 4  # drafted tokens per step in evaluation


class M2R2Settings(TrainSettings):
    """Settings of ``specdec train m2r2``, in addition to ``TrainSettings``: the draft path and the loss.

    The draft path is the sequence of layers and projections that a draft runs through. With ``init`` it is that of the
    given drafter. A projection is a linear map that estimates the input of a later layer, or the final state.

    replaces: as in ``TrainSettings``.
    exit_layer: number of first layers that a draft runs.
    segments: later ranges of layers [lo, hi) that a draft runs, each after a projection.
    final_projection: whether a projection to the final state follows.
    neurons: number of neurons of the segments' MLPs that drafts run, the strongest ones; 0: all, or as in ``init``.
    exits: layer indices, rising: before each, a token may leave ahead of the end of the path.
    layers_of: number of layers of the model that all these layers refer to, for scaling; None: this model.
    rank: rank of the adapters, low-rank changes of the layers.
    adapt: names of the linear layers with adapters, such as "q_proj"; (): all in the segments.
    draft_steps: number of tokens of the drafts that the drafter learns from.
    focus: weight in the loss of a drafted token after a wrong one; after right ones it is 1.
    variation: share of the loss that is the total variation (the probability of rejection); the rest is KL.
    """

    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **TrainSettings.replaces,
        "segments": {"layers_of": None},  # given layers refer to this model
        "exit_layer": {"segments": (), "layers_of": None},
    }

    exit_layer: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    final_projection: bool = False
    neurons: int = Field(0, ge=0)
    exits: tuple[int, ...] = ()
    layers_of: int | None = None
    rank: Positive = 64
    adapt: tuple[str, ...] = ()
    draft_steps: Positive = 2
    focus: float = 1.0
    variation: Share = 0.0

    @model_validator(mode="after")
    def _one_path(self) -> M2R2Settings:
        if not (self.segments or self.exit_layer or self.init):
            raise ValueError("give 'segments' or 'exit_layer'")
        return self


class M2R2Method(TrainingMethod[M2R2]):
    """Trains M2R2 with the KL divergence from the base model, summed over drafted tokens and averaged over exits.

    The draft path is the sequence of layers and projections that a draft runs through. A projection is a linear map
    that estimates the input of a later layer, or the final state; a segment is a range of layers [lo, hi) behind a
    projection; an exit is a layer after which a token may leave.
    """

    name = "m2r2"
    settings_class = M2R2Settings

    def __init__(self, settings: M2R2Settings, target: Target) -> None:
        super().__init__(settings, target)
        # Drafts of a model in float32, and those on other devices, read weights as they are.
        self.refreshes = target.device.type == "cpu" and settings.dtype != "float32"
        if settings.init:
            self.path = M2R2Path.from_json(drafter_folder.read_config(Path(settings.init)).get("path", {}))
            if settings.neurons not in (0, self.path.neurons):
                raise SpecDecError(
                    f"'{settings.init}' runs {self.path.neurons or 'all'} neurons; leave out the setting 'neurons'"
                )
            self.path.check(target.num_layers)
        else:
            self.path = path_of(settings, target)
        for layer in self.path.narrow_layers:
            narrow_mlp(target, layer, self.path.neurons)  # before the model answers anything
        self.neurons: dict[int, Tensor] = {}

    def prepare(self, context: RunContext) -> None:
        if self.settings.init:
            tensors = self.read_parameters(Path(self.settings.init))
            self.neurons = {layer: tensors[f"adapters.{layer}/neurons"] for layer in self.path.narrow_layers}
        elif self.path.neurons:
            self.neurons = choose_neurons(self.path, self.target, context)

    def read_parameters(self, folder: Path) -> dict[str, Tensor]:
        return {current_name(name): tensor for name, tensor in super().read_parameters(folder).items()}

    def teacher_states(self) -> StateSelection:
        return path_states(self.path, self.target.num_layers)

    def build(self, vocab: Tensor | None) -> M2R2:
        self.teacher = Teacher(
            self.target, vocab, self.settings.sharpen, self.settings.variation, rounds=self.refreshes
        )
        network = M2R2(self.path, self.target, vocab)
        for layer, indices in self.neurons.items():
            network.adapters.get_buffer(f"{layer}/neurons").copy_(indices)
        return network

    def refresh(self, network: M2R2) -> None:
        network.round(self.target)

    def parameter_scale(self, name: str, parameter: Tensor) -> float:
        """Return the typical size of the elements of the parameter ``name``; for a projection, its root mean square.

        An adapter adds up @ down to the weight of a linear layer. For its ``up``, the result is the scale at which this
        product is as large as the weight; for its ``down``, that of the base class.
        """
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
                away, figures[agreement_name(s, exit)], right_here = teacher.compare(final, valid, weight)
                loss = loss + away / len(exits)
            right = right_here & reached  # of the last exit
        return loss, figures

    def evaluate(self, network: M2R2, batches: Iterable[TrainingBatch]) -> dict[str, Any]:
        """Return figures of drafts of ``STEPS`` tokens that all leave at the last exit.

        They have the keys "top1", "overlap", "chain", "score" and "positions" of ``specdec.train.evaluate.evaluate``.
        """

        def drafts(batch: TrainingBatch) -> Iterator[tuple[Tensor, Tensor]]:
            for exits, valid in draft_steps(network, self.target, batch, STEPS):
                yield exits[-1][0], valid

        return evaluate(Teacher(self.target, network.draft_vocab, rounds=self.refreshes), batches, drafts, STEPS)

    def config(self, network: M2R2) -> dict[str, Any]:
        return {"drafter": "m2r2", "path": self.path.to_json()}


def path_of(settings: M2R2Settings, target: Target) -> M2R2Path:
    """Return the draft path that ``settings`` describe for ``target``, scaled to its depth.

    The linear layers in the segments have adapters; without segments, those in the early layers, except key and value
    projections, because early layers use the base model's keys and values. Scaled segments leave out recurrent layers.
    Raises SpecDecError for invalid paths and if there would be nothing to train.
    """
    adapters: dict[int, list[str]] = {}
    early, scale = not settings.segments, target.num_layers / (settings.layers_of or target.num_layers)
    exit_layer = round(settings.exit_layer * scale) or min(settings.exit_layer, 1)
    most = target.num_layers - 1 if settings.layers_of else math.inf  # where a scaled segment may begin
    ends = [(int(min(round(lo * scale), most)), round(hi * scale)) for lo, hi in settings.segments]
    segments = tuple((lo, max(hi, lo + 1)) for lo, hi in ends)
    stops = dict(zip((hi for _, hi in settings.segments), (hi for _, hi in segments), strict=True))
    if settings.layers_of and target.recurrent_layers:
        segments = tuple(dict.fromkeys(each for lo, hi in segments for each in _without_states(target, lo, hi)))
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


def _without_states(target: Target, lo: int, hi: int) -> list[tuple[int, int]]:
    """Return the longest ranges of layers (first, end) of ``target`` within [lo, hi) that are not recurrent.

    All returned ranges have the same length. If all layers there are recurrent, it is the nearest layer that is not.
    Raises SpecDecError if the model has none.
    """
    found = [layer for layer in range(target.num_layers) if layer not in target.recurrent_layers]
    if not found:
        raise SpecDecError(f"all layers of this model are recurrent, {NO_PATH}")
    nearest = min(found, key=lambda layer: abs(2 * layer + 1 - lo - hi))
    chosen = [layer for layer in found if lo <= layer < hi] or [nearest]
    begins = [layer for layer in chosen if layer - 1 not in chosen]
    ends = [layer + 1 for layer in chosen if layer + 1 not in chosen]
    ranges = list(zip(begins, ends, strict=True))
    longest = max(end - begin for begin, end in ranges)
    return [(begin, end) for begin, end in ranges if end - begin == longest]


def path_states(path: M2R2Path, num_layers: int) -> StateSelection:
    """Return which layers' keys, values and inputs of the base model training on ``path`` reads.

    num_layers: the base model's depth; the input of "layer" ``num_layers`` is the final state.
    """
    kv = [layer for lo, hi in path.segments for layer in range(lo, hi)]
    hidden = {*(lo for lo, _ in path.segments), num_layers}
    if path.adapts_early:
        kv += range(path.exit_layer)
        hidden |= {lo for lo, _ in path.shared if lo}
    else:
        hidden |= {hi for _, hi in path.shared}
    return StateSelection(tuple(sorted(kv)), tuple(sorted(hidden)))
