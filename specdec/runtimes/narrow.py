"""MLPs with a selection of their neurons, for drafts: nearly the same result from a fraction of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specdec.models.families import FAMILIES, Family
from specdec.models.gguf.blocks import DEQUANTIZE_CHUNK, BlockLinear, weight_rows


class GatedMLP(NamedTuple):
    """The linear layers of the MLP ``down(act(gate(x)) * up(x))`` of a decoder layer, which has I neurons.

    Paths are module paths relative to the decoder layer, such as "mlp.up_proj".

    ins: ``{path: module}`` of gate and up, in this order, or of one linear layer that computes both.
    out: path of ``down``.
    down: the module of ``down``.
    size: number of neurons, I.
    """

    ins: dict[str, nn.Module]
    out: str
    down: nn.Module
    size: int

    def rows(self, kept: Tensor) -> Tensor:
        """Return which rows of the weight of each layer in ``ins`` compute the neurons ``kept``, int64 [I'] or [2 I'].

        kept: indices of I' neurons, int64 [I']. A layer for gate and up together has two rows for each neuron.
        """
        return kept if len(self.ins) == 2 else torch.cat((kept, kept + self.size))

    def shapes(self, count: int) -> dict[str, tuple[int, int]]:
        """Return ``{path: (in_features, out_features)}`` of this MLP's linear layers with only ``count`` neurons."""
        wide: Any = next(iter(self.ins.values()))
        d = int(wide.in_features)
        return dict.fromkeys(self.ins, (d, 2 * count // len(self.ins))) | {self.out: (count, d)}

    def weight(self, path: str, kept: Tensor) -> Tensor:
        """Return the weight [out, in] of one linear layer of this MLP with only the neurons ``kept``.

        path: module path of the linear layer, one of the keys of ``ins`` or ``out``.
        kept: indices of the neurons to keep, int64 [I'].
        """
        if path in self.ins:
            return weight_rows(self.ins[path], self.rows(kept))
        down: Any = self.down
        found: Tensor = down.weight.detach()[:, kept].contiguous()
        return found

    def bias(self, path: str, kept: Tensor) -> Tensor | None:
        """Return the bias [out] of one linear layer of this MLP with only the neurons ``kept``; None: it has no bias.

        The bias of ``down`` stays whole, since all of its outputs stay.

        path: module path of the linear layer, one of the keys of ``ins`` or ``out``.
        kept: indices of the neurons to keep, int64 [I'].
        """
        module: Any = self.ins.get(path, self.down)
        if module.bias is None or path not in self.ins:
            return None if module.bias is None else module.bias.detach()
        found: Tensor = module.bias.detach()[self.rows(kept)]
        return found


def gated_mlp(block: nn.Module) -> GatedMLP | None:
    """Return the linear layers of a decoder layer's gated MLP; None: it is a mixture of experts, or has another form.

    block: the module of the decoder layer.
    """
    mlp: Any = getattr(block, "mlp", None)
    names = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
    maps: list[Any] = [getattr(mlp, name, None) for name in (*names, "down_proj")]
    if hasattr(mlp, "experts") or not all(type(each) in (nn.Linear, BlockLinear) for each in maps):
        return None
    *ins, down = maps
    paths = (f"mlp.{name}" for name in names)
    return GatedMLP(dict(zip(paths, ins, strict=True)), "mlp.down_proj", down, int(down.in_features))


def narrow_maps(block: nn.Module, kept: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return weight and bias of each linear layer of a decoder layer's MLP with only some neurons, by module path.

    block: the module of the decoder layer.
    kept: indices of the neurons, int64 [I']; None: all, and the result is {}.

    Returns ``{path: (weight [out, in], bias [out] or None)}``; {} also for an MLP that is not of the form of
    ``GatedMLP``.
    """
    mlp = gated_mlp(block)
    if kept is None or mlp is None:
        return {}
    return {path: (mlp.weight(path, kept), mlp.bias(path, kept)) for path in (*mlp.ins, mlp.out)}


def strengths(block: nn.Module, model_type: str, h: Tensor) -> Tensor:
    """Return how much each neuron of a decoder layer's MLP adds to the residual stream on sample inputs, float32 [I].

    For neuron i, it is the sum over the n inputs of |down[:, i]|^2 a_i^2, where a_i is input i of ``down``. The norm
    before the MLP and the MLP run on the layer's inputs without attention, which changes the order of the neurons
    little.

    block: the module of the decoder layer, which must have a gated MLP (``gated_mlp``).
    model_type: ``config.model_type`` of transformers, such as "llama", which gives the name of the norm before the MLP.
    h: inputs of the decoder layer for n sample tokens, [n, D].
    """
    mlp = gated_mlp(block)
    assert mlp is not None
    down: Any = mlp.down
    sizes = torch.zeros(())  # |down[:, i]|^2
    for rows in torch.arange(down.out_features).split(
        max(1, DEQUANTIZE_CHUNK // mlp.size)
    ):  # the whole matrix may be large
        sizes = sizes + weight_rows(down, rows).float().square().sum(0)
    name, found = FAMILIES.get(model_type, Family()).norms[2], list[Tensor]()
    x = getattr(block, name)(h) if name else h
    hook = down.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        block.mlp(x[None])  # type: ignore[operator]
    finally:
        hook.remove()
    return found[0].flatten(0, -2).float().square().sum(0) * sizes
