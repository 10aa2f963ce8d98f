"""The parts of a decoder layer: its linear layers by the input they read, its kind, and low-rank adapters."""

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

    ``up`` starts at zero, so untrained adapters change nothing. A runtime may merge them into weights that it
    quantizes.

    rank: inner size r of the low-rank factors.
    paths: by layer number, module paths of the linear layers that are changed, such as "mlp.down_proj".
    neurons: by layer number, the number of MLP neurons that run; in a layer that is missing here, all neurons run.
    lasting: whether the values are final, as in a trained drafter, so that a runtime may store what it derives from
        them on disk. The owner sets it; False at first.
    """

    lasting = False

    def __init__(
        self, shapes: Mapping[int, Mapping[str, tuple[int, int]]], rank: int, neurons: Mapping[int, int] | None = None
    ) -> None:
        """Make untrained adapters. Until values are loaded, the first neurons of an MLP run.

        shapes: ``{layer: {module path: (in_features, out_features)}}`` of the linear layers to change.
        rank: inner size of the low-rank factors.
        neurons: ``{layer: number of MLP neurons that run}``; None: all neurons of all layers.
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
        """Return a layer's low-rank factors, ``{module path: (down [rank, in_features], up [out_features, rank])}``.

        They are the parameters themselves. The module paths are relative to the layer. The result is {} if the adapters
        change no linear layer of it.
        """
        return {
            path: (getattr(self, self._key(layer, path) + "/down"), getattr(self, self._key(layer, path) + "/up"))
            for path in self.paths.get(layer, ())
        }

    def kept(self, layer: int) -> Tensor | None:
        """Return the ascending indices of the MLP neurons of a layer that run, int64 [count]; None: all neurons run."""
        return getattr(self, f"{layer}/neurons").long() if layer in self.neurons else None

    def digest(self) -> str:
        """Return a SHA-256 of the names, shapes, dtypes and values of all tensors of the adapters, as 64 hex digits."""
        found = hashlib.sha256()
        for name, values in self.state_dict().items():
            found.update(f"{name} {tuple(values.shape)} {values.dtype} ".encode())
            found.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def changes(self, layer: int) -> bool:
        """Return whether the adapters change decoder layer ``layer``: its linear layers, or the neurons of its MLP."""
        return layer in self.paths or layer in self.neurons


def check_rotary(rotary: Any) -> None:
    """Raise SpecDecError if the cosines and sines of a rotary embedding depend on more than the token's position.

    rotary: the rotary embedding module of a model. Types "dynamic" and "longrope" also depend on the length of the
        text.
    """
    kinds = getattr(rotary, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if not isinstance(kind, str) or "dynamic" in kind or kind == "longrope":
            raise SpecDecError(f"rotary embeddings of type '{kind}' are not supported here")


def recurrent(layer: Any) -> bool:
    """Return whether a decoder layer module has a gated delta rule (attribute ``linear_attn``) instead of attention."""
    return hasattr(layer, "linear_attn")


def has_experts(layer: Any) -> bool:
    """Return whether the MLP of a decoder layer module is a mixture of experts."""
    return hasattr(layer.mlp, "experts")


def router(mlp: Any) -> Any:
    """Return the router of a mixture of experts: the module that chooses the experts of each token.

    mlp: the MLP module of a decoder layer for which ``has_experts`` is True.

    The router's forward returns, for T tokens, a tuple of the logits [T, E] of all E experts, and the weights [T, k]
    and the indices [T, k] of the k experts that each token uses.
    """
    return mlp.router if hasattr(mlp, "router") else mlp.gate


def modules(layer: Any) -> dict[str, list[tuple[str, nn.Linear]]]:
    """Return the linear layers of a decoder layer by the input they read, ``{slot: [(module path, module), ...]}``.

    A slot is such a group, which a runtime can run as one linear layer with the outputs joined in this order. The slots
    are "qkv" (all inputs of attention or of the recurrent mixer), "out" (its output projection), "gate_up" and "down"
    (of the MLP). Layers with a mixture of experts have no "gate_up" and "down".

    Raises SpecDecError for modules other than ``nn.Linear`` and ``BlockLinear`` (a linear layer with GGUF weights).
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
