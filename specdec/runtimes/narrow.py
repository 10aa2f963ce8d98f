"""MLPs with a selection of their neurons, for drafts: nearly the same result from a fraction of the weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from specdec.models.families import FAMILIES, Family
from specdec.models.gguf.blocks import DEQUANTIZE_CHUNK, BlockLinear, weight_rows


class GatedMLP(NamedTuple):
    """The linear layers of an MLP ``down(act(gate(x)) * up(x))``.

    ins: gate and up, or one linear layer for both, by path in the decoder layer.
    out: path of ``down``.
    down: the last linear layer.
    size: number of neurons, I.
    """

    ins: dict[str, nn.Module]
    out: str
    down: nn.Module
    size: int

    def rows(self, kept: Tensor) -> Tensor:
        """Return the rows of each layer in ``ins`` that compute the neurons ``kept``, int64 [I']."""
        return kept if len(self.ins) == 2 else torch.cat((kept, kept + self.size))

    def shapes(self, count: int) -> dict[str, tuple[int, int]]:
        """Return ``{path: (in_features, out_features)}`` of the linear layers of an MLP with ``count`` neurons."""
        wide: Any = next(iter(self.ins.values()))
        d = int(wide.in_features)
        return dict.fromkeys(self.ins, (d, 2 * count // len(self.ins))) | {self.out: (count, d)}

    def weight(self, path: str, kept: Tensor) -> Tensor:
        """Return the weight [out, in] of the linear layer ``path`` with only the neurons ``kept``, int64 [I']."""
        if path in self.ins:
            return weight_rows(self.ins[path], self.rows(kept))
        down: Any = self.down
        found: Tensor = down.weight.detach()[:, kept].contiguous()
        return found

    def bias(self, path: str, kept: Tensor) -> Tensor | None:
        """Return the bias of the linear layer ``path`` with only the neurons ``kept``; None: there is none."""
        module: Any = self.ins.get(path, self.down)
        if module.bias is None or path not in self.ins:
            return None if module.bias is None else module.bias.detach()
        found: Tensor = module.bias.detach()[self.rows(kept)]
        return found


def gated_mlp(block: nn.Module) -> GatedMLP | None:
    """Return the linear layers of a decoder layer's MLP; None if it is a mixture of experts or of another form."""
    mlp: Any = getattr(block, "mlp", None)
    names = ["gate_up_proj"] if hasattr(mlp, "gate_up_proj") else ["gate_proj", "up_proj"]
    maps: list[Any] = [getattr(mlp, name, None) for name in (*names, "down_proj")]
    if hasattr(mlp, "experts") or not all(type(each) in (nn.Linear, BlockLinear) for each in maps):
        return None
    *ins, down = maps
    paths = (f"mlp.{name}" for name in names)
    return GatedMLP(dict(zip(paths, ins, strict=True)), "mlp.down_proj", down, int(down.in_features))


def narrow_maps(block: nn.Module, kept: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return weight and bias of a decoder layer's MLP with only the neurons ``kept``, int64 [I'], by module path.

    {} if ``kept`` is None or the MLP has another form: all neurons run.
    """
    mlp = gated_mlp(block)
    if kept is None or mlp is None:
        return {}
    return {path: (mlp.weight(path, kept), mlp.bias(path, kept)) for path in (*mlp.ins, mlp.out)}


def strengths(block: nn.Module, model_type: str, h: Tensor) -> Tensor:
    """Return how much each neuron of a decoder layer's MLP adds to the residual, float32 [I].

    For neuron i, it is the sum of |down[:, i] a_i|^2 over the rows of ``h``, where a_i is the neuron's activation.
    h: inputs of the layer [n, D]. The MLP runs on them without attention, which changes the order of neurons little.
    model_type: the model's type, which gives the name of the norm before the MLP.
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
