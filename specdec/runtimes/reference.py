"""The reference runtime: any decoder-only Hugging Face model, through its own ``forward``.

For the time of a call the model's decoder layers are wrapped in gates that skip, inject or record hidden states, so
position embeddings, rotary tables, final norms and logit caps stay the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from specdec.base.errors import SpecDecError
from specdec.models import checkpoint
from specdec.runtimes.adapters import Adapters
from specdec.runtimes.cache import KVCache, Mask
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Part, Target

PARTS: dict[str, tuple[str, ...]] = {  # what decoder layers call them
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "block_sparse_moe", "feed_forward", "fc1", "fc2"),
}


class _Filled(Exception):
    """A layer has handed over its keys and values, which was all that was wanted of it."""


class _Bridge(Cache):
    """Hands our cache to HF attention layers. only_fill: a layer ends there, by ``_Filled``."""

    def __init__(self, cache: KVCache, only_fill: bool = False) -> None:
        super().__init__(layers=[])
        self.kv, self.only_fill = cache, only_fill

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        views = self.kv.append(layer_idx, key_states, value_states)
        if self.only_fill:
            raise _Filled
        return views

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kv.lengths[layer_idx]


class _Call:
    """One call of the model: which layers run, on what, seen through which mask, and what is recorded."""

    def __init__(self, x: Tensor | None, lo: int, hi: int, mask: Mask | None, taps: dict[int, Tensor] | None) -> None:
        self.x, self.lo, self.hi, self.mask = x, lo, hi, mask
        self.taps = {} if taps is None else taps
        self.result: Tensor | None = None


class _Gate(nn.Module):
    """Stands in for decoder layer ``index`` during one call."""

    def __init__(self, owner: ReferenceTarget, index: int, call: _Call) -> None:
        super().__init__()
        self.__dict__["inner"] = owner.blocks[index]  # not registered: the model keeps its own module tree
        self.__dict__["owner"], self.__dict__["call"], self.index = owner, call, index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call: _Call = self.__dict__["call"]
        owner: ReferenceTarget = self.__dict__["owner"]
        if self.index == 0:
            if call.x is None:
                call.result = hidden
            else:
                hidden = call.x
        if call.lo <= self.index < call.hi:
            if self.index in call.taps:
                call.taps[self.index] = hidden
            args, kwargs = owner.with_mask(self.index, args, kwargs, call.mask)
            try:
                out = self.__dict__["inner"](hidden, *args, **kwargs)
            except _Filled:
                out = (hidden,) if owner.tuples else hidden
            hidden = out[0] if isinstance(out, tuple) else out
            owner.tuples = isinstance(out, tuple)
            if self.index == call.hi - 1:
                call.result = hidden
                if call.hi in call.taps:
                    call.taps[call.hi] = hidden
        return (hidden,) if owner.tuples else hidden


class _Nothing(nn.Module):
    """Stands in for a sublayer that adds nothing. pair: answers as attention does, with weights beside the result."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


class ReferenceTarget(Target):
    """The reference runtime: exact on any decoder-only HF model, checked on load.

    A call changes the model for as long as it takes, under the model's lock: threads take turns.
    Raises SpecDecError for encoder-decoder, recurrent or otherwise unsupported models, with the reason.
    """

    runtime = "reference"

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model)
        super().__init__(model)
        self.attention = model.config._attn_implementation
        self.base, self.tuples = model.base_model, False
        with self.lock, checkpoint.idle(model):
            self.decoder, self.attr = find_layers(model, self.num_layers)
            self.blocks = list(getattr(self.decoder, self.attr))
            self.head_owner, self.head_attr = _owner_of(model, self.own_head)
            parameters = list(inspect.signature(self.blocks[0].forward).parameters)
            # GPT-2 passes the mask by position, the others by name.
            self.mask_index = parameters.index("attention_mask") - 1 if "attention_mask" in parameters else None
            self.spread = check_logits(self)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        call = _Call(None, 0, 0, None, None)
        with self._gates(call):
            self.base(input_ids=ids, position_ids=positions, attention_mask=self._any_mask(ids), use_cache=False)
        assert call.result is not None
        return call.result

    def layers(self, x: Tensor, lo: int, hi: int, given: Pass) -> Tensor:
        if given.taps is not None and lo in given.taps:
            given.taps[lo] = x
        if lo >= hi:
            return x
        call = _Call(x, lo, hi, given.mask, given.taps)
        with self.lock, self._adapt(given.adapters, lo, hi, given.adapted, x.shape[0]):
            self._run(call, given.positions, _Bridge(given.cache))
        assert call.result is not None
        return call.result

    def fill(self, x: Tensor, lo: int, given: Pass) -> None:
        self._run(
            _Call(x, lo, self.num_layers, given.mask, None), given.positions, _Bridge(given.cache, only_fill=True)
        )

    def sublayer(self, x: Tensor, layer: int, part: Part, given: Pass) -> Tensor:
        with self.lock:
            return self._sublayer(x, layer, part, given)

    def _sublayer(self, x: Tensor, layer: int, part: Part, given: Pass) -> Tensor:
        other = "mlp" if part == "attention" else "attention"
        block = self.blocks[layer]
        modules = {name: module for name, module in block.named_children() if name in PARTS[other]}
        if not modules:
            kind = self.model.config.model_type
            raise SpecDecError(f"the layers of a '{kind}' model have no known {other} to leave out; skip whole layers")
        try:
            for name in modules:
                setattr(block, name, _Nothing(pair=other == "attention"))
            return self.layers(x, layer, layer + 1, given)
        finally:
            for name, module in modules.items():
                setattr(block, name, module)

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        with self._gates(_Call(x, 0, 0, None, None)):
            own = getattr(self.head_owner, self.head_attr)
            if head is not None:
                setattr(self.head_owner, self.head_attr, head)
            try:
                out = self.model(
                    input_ids=ids,
                    position_ids=torch.zeros_like(ids),
                    attention_mask=self._any_mask(ids),
                    use_cache=False,
                )
            finally:
                setattr(self.head_owner, self.head_attr, own)
        return out.logits

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        found = {}
        with self.lock:
            modules = list(self.blocks[layer].named_modules())
        for path, module in modules:
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear):
                found[path] = (module.in_features, module.out_features)
            elif type(module).__name__ == "Conv1D" and weight is not None:
                found[path] = (weight.shape[0], weight.shape[1])
        # Experts and their router see tokens regrouped: no adapter can address "the last tokens" there.
        return {path: size for path, size in found.items() if "expert" not in path and "router" not in path}

    # -- how it is done -----------------------------------------------------------------------------------------

    def _run(self, call: _Call, positions: Tensor, bridge: _Bridge) -> None:
        """Put ``call`` through the model, its layers as gates."""
        ids = positions.new_zeros(positions.shape)
        with self._gates(call):
            self.base(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._any_mask(ids),
                cache=bridge,
                use_cache=True,
            )

    @contextmanager
    def _gates(self, call: _Call) -> Iterator[None]:
        with self.lock:
            own = getattr(self.decoder, self.attr)
            setattr(self.decoder, self.attr, nn.ModuleList([_Gate(self, i, call) for i in range(self.num_layers)]))
            try:
                yield
            finally:
                setattr(self.decoder, self.attr, own)

    @contextmanager
    def _adapt(self, adapters: Adapters | None, lo: int, hi: int, adapted: int | None, batch: int) -> Iterator[None]:
        handles = []
        for layer in range(lo, hi) if adapters is not None else ():
            assert adapters is not None
            for path, (down, up) in adapters.factors(layer).items():
                module = self.blocks[layer].get_submodule(path)
                handles.append(module.register_forward_hook(_adapter_hook(down, up, adapted, batch)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _any_mask(self, ids: Tensor) -> Tensor:
        """A 4D mask that HF forwards take as they find it; the gates put the real one in its place."""
        batch, t = ids.shape
        return torch.ones(1, dtype=torch.bool, device=ids.device).expand(batch, 1, t, t)

    def with_mask(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Mask | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put ``mask``, as ``layer`` needs it, among the arguments of that layer."""
        assert mask is not None
        window, (batch, t), length = self.windows[layer], mask.query.shape, mask.keys.shape[1]
        key = ("hf", window)
        if self.attention == "sdpa" and mask.causal and length == t > 1 and (window is None or window >= t):
            mask.memo[key] = None  # without a mask it is causal
        elif key not in mask.memo:
            visible = mask.bool_mask(window)
            if visible is None:
                visible = torch.ones(batch, 1, t, length, dtype=torch.bool, device=self.device)
            if self.attention == "eager":
                low = torch.finfo(self.dtype).min
                visible = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, low)
            mask.memo[key] = visible
        if self.mask_index is not None and len(args) > self.mask_index:
            return (*args[: self.mask_index], mask.memo[key], *args[self.mask_index + 1 :]), kwargs
        return args, kwargs | {"attention_mask": mask.memo[key]}


def _adapter_hook(down: Tensor, up: Tensor, adapted: int | None, batch: int) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # OPT flattens tokens to (B * T, D) before its MLP.
        x, y = (t.view(batch, -1, t.shape[-1]) for t in (inputs[0], output))
        count = y.shape[1] if adapted is None else adapted
        delta = (x[:, -count:] @ down.T.to(x.dtype)) @ up.T.to(x.dtype)  # (B, count, out)
        y = torch.cat((y[:, :-count], y[:, -count:] + delta), 1)
        return y.view(output.shape)

    return hook


def find_layers(model: PreTrainedModel, count: int) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the attribute's name."""
    for module in model.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise SpecDecError(f"model type '{model.config.model_type}' has no list of {count} decoder layers; not supported")


def _owner_of(model: PreTrainedModel, child: nn.Module) -> tuple[nn.Module, str]:
    for module in model.modules():
        for name, found in module.named_children():
            if found is child:
                return module, name
    raise SpecDecError(f"model type '{model.config.model_type}' hides its output head; not supported")


class ByParts(Target):
    """A runtime that runs parts of layers through the model's own modules, at the reference runtime's speed."""

    _reference: ReferenceTarget | None = None

    def sublayer(self, x: Tensor, layer: int, part: Part, given: Pass) -> Tensor:
        return self._own_modules().sublayer(x, layer, part, given)

    def fill(self, x: Tensor, lo: int, given: Pass) -> None:
        self._own_modules().fill(x, lo, given)

    def _own_modules(self) -> ReferenceTarget:
        with self.lock:
            if self._reference is None:
                self._reference = ReferenceTarget(self.model)
            return self._reference
