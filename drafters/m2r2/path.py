"""The draft path of an M2R2: which layers a drafted token runs, in which order, and where it may leave."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from specdec.base.errors import SpecDecError
from specdec.base.settings import explain

INVALID = "the drafter's config.json has no valid M2R2 path"
REQUIRED = {"exit_layer", "segments", "final_projection", "rank", "adapters"}  # entries of all versions


@dataclass(frozen=True)
class M2R2Path:
    """The layers that drafts run, and the exits on the way. N is the model's number of layers.

    h is the hidden state of the model's own pass, p that of a draft (the accelerated residual), which stands in for h.

    exit_layer: E, the number of first layers that p runs. h runs layers [0, E), too, and scoring resumes at E; 0: p
        begins with a projection.
    segments: later ranges of layers [lo, hi), in order; a projection makes the input of each.
    final_projection: whether a projection estimates the final state at each exit; if not, the output head reads p.
    rank: rank of the adapters.
    adapters: by layer index, the module paths of the linear layers in it that have a low-rank adapter.
    exits: layer indices, rising: before each, a token may leave ahead of the end of the path. Possible are 1 .. E, and
        the ends ``hi`` of segments but the last. If later tokens go on from an exit below E, p starts again from h.
    neurons: number of neurons of each segment's MLPs that drafts run; 0: all.
    """

    exit_layer: int
    segments: tuple[tuple[int, int], ...] = ()
    final_projection: bool = False
    rank: int = 32
    adapters: dict[int, list[str]] = field(default_factory=dict)
    exits: tuple[int, ...] = ()
    neurons: int = 0

    @property
    def adapts_early(self) -> bool:
        """Whether layers below the exit layer have adapters, so that p differs from h there."""
        return any(layer < self.exit_layer for layer in self.adapters)

    @property
    def end(self) -> int:
        """The index of the model layer before which the path ends: ``hi`` of the last segment, or E without segments.

        The path may skip layers before it: ``num_layers_run`` is the number of layers that a token runs.
        """
        return self.segments[-1][1] if self.segments else self.exit_layer

    @property
    def narrow_layers(self) -> list[int]:
        """The indices of the layers whose MLPs run with only ``neurons`` neurons while drafting: those of the segments.

        [] if ``neurons`` is 0.
        """
        return [layer for lo, hi in self.segments for layer in range(lo, hi) if self.neurons]

    @property
    def shared(self) -> list[tuple[int, int]]:
        """The ranges of layers [lo, hi) into which the exits below E cut [0, E), in order; [] if E is 0.

        The model's own hidden state h runs these layers, too, and p starts each range from it.
        """
        stops = sorted({*(layer for layer in self.exits if layer < self.exit_layer), self.exit_layer})
        return list(zip([0, *stops], stops, strict=False)) if self.exit_layer else []

    @property
    def stages(self) -> list[tuple[int, int]]:
        """All ranges of layers [lo, hi) in order: ``shared``, then the segments."""
        return [*self.shared, *self.segments]

    @property
    def stages_to_exit(self) -> list[int]:
        """For each exit in order, the end of the path as the last one, the number of ``stages`` that lead to it."""
        ends = [hi for _, hi in self.stages]
        return [ends.index(layer) + 1 for layer in (*self.exits, self.end)]

    def num_layers_run(self, exit: int = -1) -> int:
        """Return the number of layers that a token runs if it leaves at exit number ``exit``; -1: the last exit."""
        return sum(hi - lo for lo, hi in self.stages[: self.stages_to_exit[exit]])

    def num_residuals(self, exit: int = -1) -> int:
        """Return the number of hidden states that the router (``Router``) of an exit reads.

        These are, up to the exit: p after each of the layers [0, E), or only after each range in ``shared`` if none of
        these layers has adapters; the input of each segment, and p after each layer of it; and, if there are final
        projections, their estimate of the final state.

        exit: number of the exit, from 0, in the order of the path; -1: the last exit.
        """
        run, early = self.stages[: self.stages_to_exit[exit]], len(self.shared)
        seen = sum(hi - lo if self.adapts_early else 1 for lo, hi in run[:early])
        return seen + sum(hi - lo + 1 for lo, hi in run[early:]) + self.final_projection

    def check(self, num_layers: int) -> None:
        """Raise SpecDecError unless the path fits a model of N = ``num_layers`` layers.

        With exit layer E and segments [lo, hi) it must hold that 0 <= E <= lo < hi <= lo < hi <= ... <= N, and E < N.
        The path must have a layer to run (E > 0 or a segment), a ``rank`` of at least 1, and no negative ``neurons``.
        ``exits`` must rise, and each must be a layer in 1 .. E or the end hi of a segment, but not the end of the path.
        Adapters are not checked.
        """
        edge = self.exit_layer
        good = 0 <= edge < num_layers and (edge > 0 or len(self.segments) > 0) and self.rank > 0
        good = good and self.neurons >= 0
        for lo, hi in self.segments:
            good, edge = good and edge <= lo < hi <= num_layers, hi
        if not good:
            raise SpecDecError(
                f"an M2R2 path with exit layer {self.exit_layer} and segments {[list(s) for s in self.segments]} "
                f"does not fit a model of {num_layers} layers: need 0 <= exit <= lo < hi <= ... <= {num_layers}"
            )
        stops = {*range(1, self.exit_layer + 1), *(hi for _, hi in self.segments)} - {self.end}
        if not set(self.exits) <= stops or list(self.exits) != sorted(set(self.exits)):
            raise SpecDecError(
                f"exits of an M2R2 path must be rising layers before its end, up to the exit layer {self.exit_layer} "
                f"or at the end of a segment; got {list(self.exits)} on a path that ends at {self.end}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the path as the entry ``path`` of a drafter's config.json: its fields by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> M2R2Path:
        """Return the path in the entry ``path`` of a config.json. Raises SpecDecError if the entry is no valid path.

        Entries of earlier versions, which call a projection a leap, are read, too. data: the entry, untrusted.
        """
        if isinstance(data, dict):
            data = {"final_projection" if name == "final_leap" else name: each for name, each in data.items()}
            if missing := REQUIRED - data.keys():
                raise SpecDecError(f"{INVALID}: {min(missing)} is missing")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            _, place, message = explain(error.errors(), data)
            what = " ".join([".".join(map(str, place)), message]).strip()
            raise SpecDecError(f"{INVALID}: {what}") from None
