"""The trained modules of drafters that exit early: heads at exits, and routers of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.runtimes.torch.linear import rms_unit


class ExitHeads(nn.Module):
    """A small trained module at each exit, which estimates the final state from the hidden state there.

    The final state is the last layer's output, before the final norm; the model's own norm and output head read the
    estimate, which is map(u) + up(silu(down(u))) with u = h / rms(h). Untrained, map is the identity and up is zero.

    exits: for each exit, the number of layers that run before it, rising.
    width: number of outputs of each ``down``. target (argument): the model, whose sizes the parameters get.
    draft_vocab: the tokens that are drafted, int32 [V']; None: all.
    """

    def __init__(self, exits: Sequence[int], width: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.exits, self.width, d = check_exits(exits, target.num_layers), width, target.hidden_size
        self.map = nn.ModuleList(nn.Linear(d, d) for _ in self.exits)
        self.down = nn.ModuleList(nn.Linear(d, width) for _ in self.exits)
        self.up = nn.ModuleList(nn.Linear(width, d, bias=False) for _ in self.exits)
        for parameter in (*self.map.parameters(), *self.up.parameters()):
            nn.init.zeros_(parameter)
        for straight in self.map:
            nn.init.eye_(straight.get_parameter("weight"))
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def forward(self, index: int, h: Tensor) -> Tensor:
        """Return the estimate of the final state, [B, T, D], from the hidden state ``h`` [B, T, D] at an exit.

        index: number of the exit, from 0: its index in ``exits``.
        """
        unit = rms_unit(h)
        out: Tensor = self.map[index](unit) + self.up[index](F.silu(self.down[index](unit)))
        return out

    def config(self) -> dict[str, Any]:
        """Return the entries "exits" and "width" of a drafter folder's config.json, which ``from_config`` reads."""
        return {"exits": list(self.exits), "width": self.width}

    @classmethod
    def from_config(cls, config: dict[str, Any], target: Target, draft_vocab: Tensor | None) -> ExitHeads:
        """Return untrained heads of the sizes in a folder's ``config``. Raises SpecDecError if they do not fit.

        config: has the entries "exits" and "width", as ``config`` returns them. target: the model.
        draft_vocab: token ids that are drafted, int32 [V']; None: all.
        """
        width = drafter_folder.check_inner_size("width", config.get("width"), target.hidden_size)
        return cls(config.get("exits", ()), width, target, draft_vocab)


def check_exits(exits: Any, num_layers: int) -> tuple[int, ...]:
    """Return ``exits`` as a tuple. Raises SpecDecError unless it lists rising layers in 1 .. ``num_layers`` - 1.

    exits: a value that may come from a file, of any type.
    """
    layers = options.check_ints("exits", exits, 1)
    if not layers or max(layers) >= num_layers or list(layers) != sorted(set(layers)):
        raise SpecDecError(f"exits must be rising layers in 1 .. {num_layers - 1}; got {list(layers)}")
    return layers


class Routers(nn.Module):
    """A router for each layer from index ``first`` on: a drafted token runs the layer if its output is positive.

    A router is a linear layer with one output. It reads the layer's input, divided by its root mean square. A token
    that skips a layer keeps its hidden state. Untrained, every layer is run.

    first: number of layers that are always run, 1 <= first < N for a model of N layers; raises SpecDecError otherwise.
    weight, bias: parameters of the routers of layers first .. N - 1, [N - first, D] and [N - first].
    target (argument): the model, whose sizes the parameters get.
    draft_vocab: the tokens that are drafted, int32 [V']; None: all.
    """

    def __init__(self, first: int, target: Target, draft_vocab: Tensor | None = None) -> None:
        super().__init__()
        self.first = options.check_int("first", first, 1, target.num_layers - 1)
        count = target.num_layers - first
        self.weight = nn.Parameter(torch.zeros(count, target.hidden_size))
        self.bias = nn.Parameter(torch.ones(count))  # untrained, every layer is run
        self.register_buffer("draft_vocab", draft_vocab)
        self.draft_vocab: Tensor | None

    def score(self, layer: int, x: Tensor) -> Tensor:
        """Return the output of the router of layer ``layer``, [B, T, 1], for ``x`` [B, T, D], the input of the layer.

        layer: index of the layer, first .. N - 1.
        """
        return F.linear(rms_unit(x), self.weight[layer - self.first, None], self.bias[layer - self.first, None])

    @classmethod
    def from_config(cls, config: dict[str, Any], target: Target, draft_vocab: Tensor | None) -> Routers:
        """Return untrained routers of the sizes in a folder's ``config``. Raises SpecDecError if they do not fit.

        config: has the entry "first", the number of layers that are always run. target: the model.
        draft_vocab: token ids that are drafted, int32 [V']; None: all.
        """
        return cls(config.get("first", 0), target, draft_vocab)
