"""The target model as embed / layers [lo, hi) / readout over our cache, and the model-agnostic reference runtime.

``ReferenceTarget`` drives any decoder-only Hugging Face model through its own ``forward``: for the time of a call its
decoder layers are wrapped in gates that skip, inject or record hidden states, so position embeddings, rotary tables,
final norms and logit caps stay the model's own. Knows nothing about drafting or text.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from specdec import cores, growth, hub, kernels, stored
from specdec.adapters import Adapters
from specdec.cache import KVCache, Mask
from specdec.errors import SpecDecError
from specdec.growth import Bounds, Candidates, DraftPath, Seed
from specdec.transfer import download

if TYPE_CHECKING:
    from specdec.experts.offload import Offload

Part = Literal["attention", "mlp"]
PARTS: dict[str, tuple[str, ...]] = {  # what decoder layers call them
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "block_sparse_moe", "feed_forward", "fc1", "fc2"),
}


_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_finding = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """The reentrant lock of a model, held by whoever changes it, be it for a call, or needs it unchanged."""
    with _finding:
        return _locks.setdefault(model, threading.RLock())


class Target(ABC):
    """A causal language model with N layers, run in pieces.

    Several threads may use it at once, each with caches of its own: what belongs to a generation is in its cache, and
    what is made once for all of them is made under ``lock``, which is the model's.

    Attributes: ``model`` (the unmodified HF model), ``num_layers`` N, ``hidden_size`` D, ``vocab_size`` V,
    ``fingerprint`` (of the weights as loaded), ``context`` (most positions), ``windows`` (attention window per layer,
    None = full), ``device``, ``dtype``.
    """

    runtime: str  # "reference", "fused", ...
    storage = "as loaded"  # what the layers' weights are held in
    spread: float  # difference from the model's own logits in the self-check at load, relative to the largest logit
    tokenizer: Any = None  # the model's, where known: drafters with a model of their own compare it
    experts: Offload | None = None  # where experts are loaded from slow memory, what loads them
    _by_parts: ReferenceTarget | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.lock = model, lock_of(model)
        with self.lock:
            self.own_head: Any = model.get_output_embeddings()
            self.fingerprint = hub.fingerprint(model)
        cores.fit()
        config = model.config.get_text_config()
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocab_size = int(self.own_head.weight.shape[0])
        self.context = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.windows = _windows(config)
        self.device, self.dtype = model.device, model.dtype

    def new_cache(self, batch: int = 1) -> KVCache:
        return KVCache(self.num_layers, batch, self.device)

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids and positions [B, T] -> the input of layer 0 [B, T, D]."""

    @abstractmethod
    def layers(
        self,
        x: Tensor,
        lo: int,
        hi: int,
        positions: Tensor,
        mask: Mask,
        cache: KVCache,
        taps: dict[int, Tensor] | None = None,
        adapters: Adapters | None = None,
        adapted: int | None = None,
    ) -> Tensor:
        """Run layers [lo, hi) on ``x`` [B, T, D], appending their keys and values to ``cache``; return [B, T, D].

        positions: int64 [B, T]. mask: from ``cache.mask(lo, positions, ...)``.
        taps: for each key l with lo <= l <= hi, filled with the input of layer l (l = hi: the result).
        adapters: applied to the last ``adapted`` tokens of the block (None: to all of them).
        """

    def sublayer(self, x: Tensor, layer: int, part: Part, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        """Run the attention or the MLP of one layer alone, residual included: [B, T, D] -> [B, T, D].

        Arguments as in ``layers``; "mlp" leaves the cache as it is. This goes through the model's own modules, which
        works for any runtime but costs what the reference runtime does. Raises SpecDecError if the model's layers have
        no such part.
        """
        return self._own_modules().sublayer(x, layer, part, positions, mask, cache)

    def fill(self, x: Tensor, lo: int, positions: Tensor, mask: Mask, cache: KVCache) -> None:
        """Append to layers [lo, N) the keys and values that each makes of ``x`` [B, T, D], and run nothing else.

        State propagation: ``x`` stands for the input of all of them. Through the model's own modules, as ``sublayer``.
        """
        self._own_modules().fill(x, lo, positions, mask, cache)

    def _own_modules(self) -> ReferenceTarget:
        with self.lock:
            if self._by_parts is None:
                self._by_parts = ReferenceTarget(self.model)
            return self._by_parts

    @abstractmethod
    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        """Final states [B, T, D] -> logits [B, T, V]: final norm, output head (or ``head``), the model's logit cap."""

    def choose(self, x: Tensor, *beside: Tensor) -> list[list[list[int]]]:
        """Final states [B, T, D] -> the token with the largest logit, the first of equals, as a list [B][T].

        -1 where the logits are not finite. Before it come the lists of ``beside``, int64 [B, n] each: the device is
        read once.
        """
        logits = self.readout(x)
        best = kernels.argmax(logits)
        finite = logits.gather(-1, best[..., None])[..., 0].isfinite()
        return download(*beside, best.masked_fill(~finite, -1))

    def grow(self, cache: KVCache, seed: Seed, path: DraftPath, bounds: Bounds) -> Candidates:
        """Draft a tree along ``path`` from ``seed``, for the one row of ``cache``, which is left as it was."""
        return growth.grow(self, cache, seed, path, bounds)

    @abstractmethod
    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """``{module path: (in, out)}`` of the linear maps of a layer that adapters can sit beside."""

    def reduced_head(self, token_ids: Tensor) -> nn.Linear:
        """The output head restricted to ``token_ids`` [V'], for ``readout(x, head)`` -> [B, T, V']."""
        full = self.own_head
        index, bias = token_ids.to(full.weight.device), getattr(full, "bias", None)
        return _Given(full.weight.detach()[index], None if bias is None else bias.detach()[index])


class _Given(nn.Linear):
    """A linear map of given values: drawing values first would cost more than the map itself."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


def _windows(config: Any) -> list[int | None]:
    """Attention window of each layer. Raises SpecDecError for layer kinds whose state cannot be rolled back."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window, "attention": None}
    for kind in kinds:
        if kind not in known:
            raise SpecDecError(
                f"model type '{config.model_type}' has '{kind}' layers, whose state cannot be rolled back after a "
                "rejected draft; use a model with full or sliding-window attention"
            )
    return [known[kind] for kind in kinds]


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


class _Pass:
    """One call of the model: which layers run, on what, seen through which mask, and what is recorded."""

    def __init__(self, x: Tensor | None, lo: int, hi: int, mask: Mask | None, taps: dict[int, Tensor] | None) -> None:
        self.x, self.lo, self.hi, self.mask = x, lo, hi, mask
        self.taps = {} if taps is None else taps
        self.result: Tensor | None = None


class _Gate(nn.Module):
    """Stands in for decoder layer ``index`` during one call."""

    def __init__(self, owner: ReferenceTarget, index: int, call: _Pass) -> None:
        super().__init__()
        self.__dict__["inner"] = owner.blocks[index]  # not registered: the model keeps its own module tree
        self.__dict__["owner"], self.__dict__["call"], self.index = owner, call, index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["inner"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        call: _Pass = self.__dict__["call"]
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
        with self.lock, stored.idle(model):
            self.decoder, self.attr = find_layers(model, self.num_layers)
            self.blocks = list(getattr(self.decoder, self.attr))
            self.head_owner, self.head_attr = _owner_of(model, self.own_head)
            parameters = list(inspect.signature(self.blocks[0].forward).parameters)
            # GPT-2 passes the mask by position, the others by name.
            self.mask_index = parameters.index("attention_mask") - 1 if "attention_mask" in parameters else None
            self._self_check()

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        call = _Pass(None, 0, 0, None, None)
        with self._gates(call):
            self.base(input_ids=ids, position_ids=positions, attention_mask=self._any_mask(ids), use_cache=False)
        assert call.result is not None
        return call.result

    def layers(
        self,
        x: Tensor,
        lo: int,
        hi: int,
        positions: Tensor,
        mask: Mask,
        cache: KVCache,
        taps: dict[int, Tensor] | None = None,
        adapters: Adapters | None = None,
        adapted: int | None = None,
    ) -> Tensor:
        if taps is not None and lo in taps:
            taps[lo] = x
        if lo >= hi:
            return x
        call = _Pass(x, lo, hi, mask, taps)
        with self.lock, self._adapt(adapters, lo, hi, adapted, x.shape[0]):
            self._run(call, positions, _Bridge(cache))
        assert call.result is not None
        return call.result

    def fill(self, x: Tensor, lo: int, positions: Tensor, mask: Mask, cache: KVCache) -> None:
        self._run(_Pass(x, lo, self.num_layers, mask, None), positions, _Bridge(cache, only_fill=True))

    def sublayer(self, x: Tensor, layer: int, part: Part, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        with self.lock:
            return self._sublayer(x, layer, part, positions, mask, cache)

    def _sublayer(self, x: Tensor, layer: int, part: Part, positions: Tensor, mask: Mask, cache: KVCache) -> Tensor:
        other = "mlp" if part == "attention" else "attention"
        block = self.blocks[layer]
        modules = {name: module for name, module in block.named_children() if name in PARTS[other]}
        if not modules:
            kind = self.model.config.model_type
            raise SpecDecError(f"the layers of a '{kind}' model have no known {other} to leave out; skip whole layers")
        try:
            for name in modules:
                setattr(block, name, _Nothing(pair=other == "attention"))
            return self.layers(x, layer, layer + 1, positions, mask, cache)
        finally:
            for name, module in modules.items():
                setattr(block, name, module)

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        with self._gates(_Pass(x, 0, 0, None, None)):
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

    def _run(self, call: _Pass, positions: Tensor, bridge: _Bridge) -> None:
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
    def _gates(self, call: _Pass) -> Iterator[None]:
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
        return torch.ones(ids.shape[0], 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)

    def with_mask(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Mask | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put ``mask``, as ``layer`` needs it, among the arguments of that layer."""
        assert mask is not None
        key = ("hf", self.windows[layer])
        if key not in mask.memo:
            visible = mask.bool_mask(self.windows[layer])
            if visible is None:
                shape = (mask.query.shape[0], 1, mask.query.shape[1], mask.keys.shape[1])
                visible = torch.ones(shape, dtype=torch.bool, device=self.device)
            if self.attention == "eager":
                low = torch.finfo(self.dtype).min
                visible = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, low)
            mask.memo[key] = visible
        if self.mask_index is not None and len(args) > self.mask_index:
            return (*args[: self.mask_index], mask.memo[key], *args[self.mask_index + 1 :]), kwargs
        return args, kwargs | {"attention_mask": mask.memo[key]}

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Compare a pass in pieces with the model's own forward on a few tokens; refuse the model if they differ."""
        ids = torch.arange(1, 9, device=self.device)[None] % self.vocab_size
        positions = torch.arange(8, device=self.device)[None]
        own = self.model(input_ids=ids, use_cache=False).logits.float()
        try:
            cache = self.new_cache()
            half, x = self.num_layers // 2, self.embed(ids, positions)
            mask = cache.mask(0, positions)
            x = self.layers(x, 0, half, positions, mask, cache)
            ours = self.readout(self.layers(x, half, self.num_layers, positions, mask, cache)).float()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise SpecDecError(
                f"model type '{self.model.config.model_type}' cannot be run layer by layer ({error}); "
                "it is not supported"
            ) from error
        if not bool(own.isfinite().all()):
            raise hub.not_finite(self.model)
        spread = (own - ours).abs().max().item() / max(own.abs().max().item(), 1e-6)
        if not spread < (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise SpecDecError(
                f"model type '{self.model.config.model_type}' gives different logits when run layer by layer "
                f"(relative difference {spread:.1e}); it is not supported"
            )
        self.spread = spread


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise SpecDecError, with the reason, for a model whose decoding state cannot be rolled back or tree-masked."""
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise SpecDecError(f"model type '{kind}' is an encoder-decoder; specdec needs a decoder-only causal model")
    if getattr(model, "_is_stateful", False):
        raise SpecDecError(
            f"model type '{kind}' carries a recurrent state that cannot be rolled back after a rejected draft; "
            "use an attention-only model"
        )
    if model.get_output_embeddings() is None:
        raise SpecDecError(f"model type '{kind}' has no language-model head; load it as a causal language model")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise SpecDecError(
            f"attention implementation '{model.config._attn_implementation}' takes no tree masks; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )


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
