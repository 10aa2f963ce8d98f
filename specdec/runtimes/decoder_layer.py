"""The parts of a decoder layer: its linear layers by slot, and low-rank adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.models.gguf.blocks import BlockLinear


class Adapters(nn.Module):
    """Changes of a model's layers for drafts: ``y += up(down(x))`` for linear layers, and MLPs with fewer neurons.

    Runtimes may round the result. ``up`` starts at zero, so untrained adapters change nothing.

    rank: inner size r of the low-rank factors.
    paths: by layer number, module paths of the linear layers that are changed.
    neurons: by layer number, how many neurons of the MLP a pass runs; in other layers, all neurons run.
    lasting: whether the adapters are those of a trained drafter, so that a runtime may store what it derives from them.
    """

    lasting = False

    def __init__(
        self, shapes: Mapping[int, Mapping[str, tuple[int, int]]], rank: int, neurons: Mapping[int, int] | None = None
    ) -> None:
        """Make untrained adapters.

        shapes: ``{layer: {module path: (in_features, out_features)}}`` of the linear layers to change.
        rank: inner size of the low-rank factors. neurons: number of neurons that run, by layer; None: all.
        """
        super().__init__()
        self.neurons = dict(neurons or {})
        for layer, count in self.neurons.items():
            chosen = torch.arange(count, dtype=torch.int32, device="cpu")  # on "meta", PyTorch would import SymPy
            self.register_buffer(f"{layer}/neurons", chosen)
        self.rank = rank
        self.paths = {layer: list(paths) for layer, paths in shapes.items()}
        for layer, paths in shapes.items():
            for path, (n_in, n_out) in paths.items():
                key = self._key(layer, path)
                self.register_parameter(key + "/down", nn.Parameter(torch.randn(rank, n_in).mul_(n_in**-0.5)))
                self.register_parameter(key + "/up", nn.Parameter(torch.zeros(n_out, rank)))

    @staticmethod
    def _key(layer: int, path: str) -> str:
        return f"{layer}/{path.replace('.', '/')}"

    def factors(self, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``{module path: (down [r, in], up [out, r])}`` of one layer; {} if it has no adapters."""
        return {
            path: (getattr(self, self._key(layer, path) + "/down"), getattr(self, self._key(layer, path) + "/up"))
            for path in self.paths.get(layer, ())
        }

    def kept(self, layer: int) -> Tensor | None:
        """Return the indices of the neurons of a layer's MLP that a pass runs, ascending, int64 [I']; None: all."""
        return getattr(self, f"{layer}/neurons").long() if layer in self.neurons else None

    def digest(self) -> str:
        """Return a SHA-256 of all values, 64 hex digits."""
        found = hashlib.sha256()
        for name, values in self.state_dict().items():
            found.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
            found.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def changes(self, layer: int) -> bool:
        """Return whether the adapters change ``layer``."""
        return layer in self.paths or layer in self.neurons


def check_rotary(rotary: Any) -> None:
    """Raise SpecDecError for rotary embeddings whose tables depend on more than the position."""
    kinds = getattr(rotary, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
            raise SpecDecError(f"rotary embeddings of type '{kind}' are not supported here")


def recurrent(layer: Any) -> bool:
    """Return whether a decoder layer has the gated delta rule instead of attention."""
    return hasattr(layer, "linear_attn")


def has_experts(layer: Any) -> bool:
    """Return whether the MLP of a decoder layer is a mixture of experts."""
    return hasattr(layer.mlp, "experts")


def router(mlp: Any) -> Any:
    """Return the router module of a mixture of experts.

    Its outputs are the logits of all experts [T, E], and the weights and indices [T, k] of those that tokens use.
    """
    return mlp.router if hasattr(mlp, "router") else mlp.gate


def modules(layer: Any) -> dict[str, list[tuple[str, nn.Linear]]]:
    """Return the linear layers of a decoder layer, ``{slot: [(module path, module), ...]}``, outputs in packed order.

    The slots are "qkv", "out", "gate_up" and "down". A recurrent layer has its inputs in "qkv"; a mixture of experts
    has no "gate_up" and "down". Raises SpecDecError for modules other than linear layers.
    """
    if recurrent(layer):
        parts = ("qkvz", "ba") if hasattr(layer.linear_attn, "in_proj_qkvz") else ("qkv", "z", "b", "a")
        maps_in, out = [f"linear_attn.in_proj_{part}" for part in parts], "linear_attn.out_proj"
    else:
        own = layer.self_attn
        values = "v" if getattr(own, "v_proj", None) is not None else "k"  # some layers have one projection for both
        each = f"qk{values}" if hasattr(own, "k_proj") else "q"  # or read the keys and values of another layer
        maps_in = ["self_attn.qkv_proj"] if hasattr(own, "qkv_proj") else [f"self_attn.{n}_proj" for n in each]
        out = "self_attn.o_proj"
    names = {
        "qkv": maps_in,
        "out": [out],
        "gate_up": ["mlp.gate_up_proj"] if hasattr(layer.mlp, "gate_up_proj") else ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    if has_experts(layer):
        del names["gate_up"], names["down"]
    found = {slot: [(path, layer.get_submodule(path)) for path in paths] for slot, paths in names.items()}
    for path, module in (pair for pairs in found.values() for pair in pairs):
        if type(module) not in (nn.Linear, BlockLinear):
            raise SpecDecError(f"only plain linear layers are known; '{path}' is a {type(module).__name__}")
    return found
