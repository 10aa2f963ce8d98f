"""The PyTorch runtime: runs a model's layers over stacked weights, on any device, with adapters and gradients.

Query, key and value weights are one matrix, and so are the MLP's gate and up weights. The model stays usable: its
parameters become views of the stacked weights. This module knows nothing about drafting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.base.errors import MemoryFullError, SpecDecError, one_line
from specdec.models import families
from specdec.models.gguf.blocks import densify
from specdec.models.native_model import NativeModel
from specdec.runtimes import decoder_layer
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.native.linear import rounded_for_drafts, unpack_here
from specdec.runtimes.target import Pass, Target, WholeMemory
from specdec.runtimes.torch import linear
from specdec.runtimes.torch.attention import Attention
from specdec.runtimes.torch.linear import Linear
from specdec.runtimes.torch.model import Layer, LowRank, Network

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def explain_memory(call: Callable[..., T]) -> Callable[..., T]:
    """Decorate a target's method so that it raises MemoryFullError, with advice, if the device's memory is full."""

    @functools.wraps(call)
    def explained(self: Target, *given: Any, **named: Any) -> T:
        try:
            return call(self, *given, **named)
        except torch.OutOfMemoryError as error:
            what = "the memory of this device is full; lower --kv-memory or --max-rows, or take a smaller model"
            raise MemoryFullError(f"{self.device}: {what} ({one_line(error)})") from error

    return explained


class TorchTarget(Target):
    """The target model in the PyTorch runtime. Its weights are frozen: gradients reach only inputs and adapters.

    Query, key and value weights become one matrix, and so do gate and up weights; the model's parameters become views
    of these, and stay usable. GGUF weights are dequantized in the model.

    Raises SpecDecError if the model's family is unknown, and if its logits differ from those of the model's own forward
    pass.

    packs: whether to store a second copy of the weights in oneDNN's layout, where a CPU supports it. That is the
        fastest layout, and has no gradients.
    """

    runtime = "torch"

    def __init__(self, model: NativeModel | PreTrainedModel, packs: bool = True) -> None:
        refuse_unsupported(model)
        kind = model.config.model_type
        if kind not in families.FAMILIES:
            known = ", ".join(families.FAMILIES)
            raise SpecDecError(f"model type '{kind}' is unknown to the torch runtime (it knows {known})")
        families.check_fields(model.config)
        decoder_layer.check_rotary(model.model.rotary_emb)
        unpack_here(model)
        densify(model)
        super().__init__(model)
        self.blocks = list(model.model.layers)  # type: ignore[union-attr, arg-type]
        self.recurrent_layers = frozenset(n for n, each in enumerate(self.blocks) if decoder_layer.recurrent(each))
        self.make = linear.packed if packs and linear.packable(self.dtype, self.device) else linear.dense
        self.network = Network(model, self.windows, lambda modules: self.make(*linear.fuse(modules)))  # type: ignore[arg-type]
        self._adapted: WeakKeyDictionary[Adapters, dict[int, Layer]] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, Linear] = WeakKeyDictionary()
        attention = [layer.mixer for layer in self.network.layers if isinstance(layer.mixer, Attention)]
        self.keys = (max(own.kv_heads for own in attention), max(own.size for own in attention)) if attention else None
        self.logit_difference = check_logits(self)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.network.embed(ids)

    @explain_memory
    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        return self.network.run(x, lo, self.select_layers(lo, hi, ctx.adapters), ctx)

    @explain_memory
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        return self.network.readout(x, self.head_map(head))

    def head_map(self, head: nn.Linear | None) -> Linear:
        """Return an output head as a function from normalized states [..., D] to logits [..., V']; cached.

        head: the output head; None: the model's own.
        """
        module = self.own_head if head is None else head
        if module not in self._heads:
            bias = getattr(module, "bias", None)
            make = linear.dense if isinstance(module, WholeMemory) else self.make
            self._heads[module] = make(module.weight.detach(), None if bias is None else bias.detach())
        return self._heads[module]

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        pairs = (pair for each in decoder_layer.modules(self.blocks[layer]).values() for pair in each)
        return {path: (module.in_features, module.out_features) for path, module in pairs}

    def beside(self, model: NativeModel | PreTrainedModel) -> TorchTarget:
        return TorchTarget(model)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def select_layers(self, lo: int, hi: int, adapters: Adapters | None) -> Sequence[Layer]:
        """Return the layers [lo, hi) as functions, changed by ``adapters``.

        adapters: low-rank (LoRA) terms and removed MLP neurons of these layers; later changes of the low-rank weights
            take effect in the returned layers. None: the layers of the model as they are.
        """
        if adapters is None:
            return self.network.layers[lo:hi]
        made = self._adapted.setdefault(adapters, {})
        for index in range(lo, hi):
            if index not in made:
                made[index] = self._adapt(index, adapters)
        return [made[index] for index in range(lo, hi)]

    def round_adapted(self, adapters: Adapters) -> None:
        for index in self._adapted.setdefault(adapters, {}) or sorted({*adapters.paths, *adapters.neurons}):
            self._adapted[adapters][index] = self._adapt(index, adapters, rounds=True)

    def _adapt(self, index: int, adapters: Adapters, rounds: bool = False) -> Layer:
        """Return layer ``index`` as ``adapters`` change it: without removed MLP neurons, with low-rank (LoRA) terms.

        The weights of an MLP with fewer neurons are copied; all others are shared with the model's layer, unless
        ``rounds``: changed weights get the error of rounding them for drafts, with the low-rank terms as they are now.
        """
        base, slots = self.network.layers[index], decoder_layer.modules(self.blocks[index])
        maps, factors, kept = dict(base.maps), adapters.factors(index), adapters.kept(index)
        sizes = {path: module.out_features for pairs in slots.values() for path, module in pairs}
        whole = {slot: linear.fuse([module for _, module in pairs]) for slot, pairs in slots.items()}
        narrow = dict[str, tuple[Tensor, Tensor | None]]()
        if kept is not None:
            (weight, bias), (down, down_bias) = whole["gate_up"], whole["down"]
            rows = torch.cat((kept, kept + len(weight) // 2))  # of gate, of up
            narrow["gate_up"] = weight[rows], None if bias is None else bias[rows]
            narrow["down"] = down[:, kept].contiguous(), down_bias
            sizes |= {path: 2 * len(kept) // len(slots["gate_up"]) for path, _ in slots["gate_up"]}
        low = {
            slot: [(sizes[path], factors.get(path)) for path, _ in pairs]
            for slot, pairs in slots.items()
            if any(path in factors for path, _ in pairs)
        }
        changed = narrow | {slot: whole[slot] for slot in low if slot not in narrow} if rounds else narrow
        for slot, (weight, bias) in changed.items():
            maps[slot] = self.make(_rounded(weight, low.get(slot, ())) if rounds else weight, bias)
        return replace(base, maps=maps, low=low, base=base)


def _rounded(weight: Tensor, low: Sequence[LowRank]) -> Tensor:
    """Return ``weight`` [out, in] plus the error of rounding it for drafts after low-rank terms are merged into it.

    low: the terms of its outputs in order, as in ``Layer.low``.
    """
    parts = [weight.new_zeros(n, weight.shape[1]) if f is None else f[1].float() @ f[0].float() for n, f in low]
    merged = weight.float() + torch.cat(parts) if parts else weight.float()
    made = rounded_for_drafts(merged.bfloat16())
    return (weight.float() + made.float() - merged).to(weight.dtype)
