"""Settings of M2R2 training, and the teacher states that a path needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from specdec.drafters.m2r2_path import M2R2Path
from specdec.train.settings import Positive, Share, TrainSettings
from specdec.train.states import StateSelection


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
