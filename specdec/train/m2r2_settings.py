"""Settings of training M2R2, and the teacher states that its path needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from specdec.drafters.m2r2_path import M2R2Path
from specdec.train.settings import Positive, TrainSettings
from specdec.train.states import Wanted


class M2R2Settings(TrainSettings):
    """The path of the accelerated residual, and what it learns from. With ``init`` that drafter's path counts."""

    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **TrainSettings.replaces,
        "search": {"begin": 0, "segments": [], "exit_layer": 0, "exits": []},
        "segments": {"begin": 0, "layers_of": None},  # layers that are given are those of the model at hand
        "exit_layer": {"begin": 0, "layers_of": None},
    }

    # A segment's end is chosen by measured cost and closed-form acceptance: of that which begins at layer ``begin``, or
    # (``search``) its beginning, too. Or give the path:
    begin: int = Field(0, ge=0)
    search: bool = False
    exit_layer: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    final_projection: bool = False
    exits: tuple[int, ...] = ()  # layers behind which a token may leave before the end of the path
    layers_of: int | None = None  # depth of the model these layers were chosen on: scaled to others; None: as they are
    rank: Positive = 64
    adapt: tuple[str, ...] = ()  # linear maps with adapters; empty: all of the segments' layers
    draft_steps: Positive = 2  # of its own drafts the student learns from
    focus: float = 1.0  # weight of a later step where the drafter's earlier steps were already wrong
    align: float = 0.0  # weight of 1 - cos(p[k], h[R k]), summed over the layers k of the path

    search_tokens: Positive = 12_000  # answer tokens that the search fits projections on

    @model_validator(mode="after")
    def _one_path(self) -> M2R2Settings:
        if (self.search or self.begin) and (self.segments or self.exit_layer or self.exits):
            one = "search" if self.search else "begin"
            raise ValueError(f"'{one}' excludes 'segments', 'exit_layer' and 'exits'; leave it out to give a path")
        if not (self.search or self.begin or self.segments or self.exit_layer or self.init):
            raise ValueError("give 'begin', 'segments' or 'exit_layer', or set search=true")
        return self


def wanted_states(path: M2R2Path, num_layers: int) -> Wanted:
    """The teacher states that training a path needs."""
    kv = [layer for lo, hi in path.segments for layer in range(lo, hi)]
    hidden = {*(lo for lo, _ in path.segments), num_layers}
    if path.adapts_early:
        kv += range(path.exit_layer)
        hidden |= {lo for lo, _ in path.shared if lo}
    else:
        hidden |= {hi for _, hi in path.shared}
    return Wanted(tuple(sorted(kv)), tuple(sorted(hidden)))
