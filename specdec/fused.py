"""The fused runtime: a direct decode loop for Llama-like families, much faster than the reference runtime.

Query, key and value weights are one product, and so are gate and up; rotary tables and masks are made once per call;
grouped query heads become rows of their key head; linear maps have the storage that ``kernels`` found fastest. The
Hugging Face model stays usable: its parameters are views of the fused weights. Checked against the model's own forward
on load. Knows nothing about drafting, and no families but those in ``FAMILIES``.

Measured on two Sapphire Rapids cores (default model, bf16, us per layer at 1 and 5 rows, 200 tokens of context):
attention with folded heads and an additive mask 18 and 31, ``enable_gqa`` with a boolean mask 18 and 47, explicit
products and softmax 80 and 98; rotary by one ``roll`` and ``addcmul`` over queries and keys together 8 and 10, as
Hugging Face writes it 41 and 38; norms through ``torch.rms_norm`` 11 and 12, written out 24 and 25 (equal to the bit).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec import kernels
from specdec.adapters import Adapters
from specdec.cache import KVCache, Mask
from specdec.errors import SpecDecError, did_you_mean
from specdec.kernels import Linear
from specdec.target import ReferenceTarget, Target, refuse_unsupported

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3")
RUNTIMES = ("auto", "fused", "reference")

Norm = Callable[[Tensor], Tensor]


def make_target(model: PreTrainedModel, runtime: str = "auto") -> tuple[Target, str]:
    """The target of ``model`` in the runtime asked for, and a one-line note ("" if there is nothing to say).

    "auto": fused where it knows the model, else the reference runtime, the note saying why. Raises SpecDecError if
    the model is unsupported, or unknown to the runtime that was named.
    """
    if runtime not in RUNTIMES:
        raise SpecDecError(
            f"unknown runtime '{runtime}'{did_you_mean(runtime, RUNTIMES)}; runtimes: {', '.join(RUNTIMES)}"
        )
    if runtime == "reference":
        return ReferenceTarget(model), ""
    try:
        return FusedTarget(model), ""
    except SpecDecError as error:
        if runtime == "fused":
            raise
        return ReferenceTarget(model), f"reference runtime: {error}"


class _Layer(NamedTuple):
    """One decoder layer as callables. Norms that a family does not have are None."""

    norm_in: Norm | None
    norm_q: Norm | None
    norm_k: Norm | None
    norm_attention: Norm | None  # on attention's result, before it joins the residual
    norm_mlp_in: Norm | None
    norm_mlp: Norm | None  # on the MLP's result, likewise
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


_MAPS = ("qkv", "out", "gate_up", "down")
Weights = dict[str, tuple[Tensor, Tensor | None]]  # weight and bias of the maps of a layer, by their names in _Layer


@dataclass
class _Adapted:
    """Layers made for one set of adapters, as long as ``version``, which grows with every training step, holds."""

    parameters: list[nn.Parameter]
    version: int = 0
    layers: dict[Any, _Layer] = field(default_factory=dict)


class FusedTarget(Target):
    """The fused runtime. Base weights are frozen in it: gradients reach ``x`` and the adapters only.

    ``spread``: the difference from the model's own logits in the self-check, relative to the largest logit.
    Raises SpecDecError for models it does not know or does not reproduce; the reference runtime may still take them.
    """

    runtime = "fused"

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model)
        super().__init__(model)
        kind, config = model.config.model_type, model.config
        if kind not in FAMILIES:
            raise SpecDecError(f"model type '{kind}' is unknown to the fused runtime (it knows {', '.join(FAMILIES)})")
        decoder: Any = model.model
        rope = getattr(decoder.rotary_emb, "rope_type", "default")
        if not isinstance(rope, str) or "dynamic" in rope or rope == "longrope":
            raise SpecDecError(f"the fused runtime has no tables for rotary embeddings of type '{rope}'")
        attention = decoder.layers[0].self_attn
        self.head_dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.groups = self.heads // self.kv_heads
        self.per_head_norm = kind == "qwen3"
        mlp = decoder.layers[0].mlp
        act = mlp.activation_fn if kind == "phi3" else mlp.act_fn
        self.act: Callable[[Tensor], Tensor] = F.silu if "SiLU" in type(act).__name__ else act
        self.packed_from = kernels.packed_from(self.dtype, self.device)
        self._weights = [_fuse_layer(layer) for layer in decoder.layers]
        self._norms = [_layer_norms(layer, kind) for layer in decoder.layers]
        self._parts = _adapter_parts(decoder.layers[0])
        self._dense = self._stack(kernels.dense)
        self._packed: list[_Layer] = []
        self._adapted: WeakKeyDictionary[Adapters, _Adapted] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, tuple[Linear, Linear]] = WeakKeyDictionary()
        self.final_norm = _norm(decoder.norm, kind)
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        self.rotary = decoder.rotary_emb
        self.tables = torch.empty(0)
        if self.packed_from <= self.context:
            self._packed = self._stack(kernels.packed)
        self._self_check()

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)

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
        batch, t, width = x.shape
        grad = torch.is_grad_enabled() and (
            x.requires_grad or (adapters is not None and any(p.requires_grad for p in adapters.parameters()))
        )
        stack = self._packed if batch * t >= self.packed_from and not grad else self._dense
        if adapters is not None:
            whole = None if adapted == t else adapted
            stack = self._with_adapters(stack, lo, hi, adapters, batch, whole, grad)
        cos, sin = self._rotary(positions, mask)
        spin = cos.shape[-1]  # rotated part of each head
        windows = self.windows
        masks = {w: self._additive(mask, w) for w in set(windows[lo:hi])}
        d, heads, kv_heads, groups = self.head_dim, self.heads, self.kv_heads, self.groups
        nq, nk = heads * d, kv_heads * d
        act, scale, append, attend = self.act, self.scale, cache.append, F.scaled_dot_product_attention
        y = x.reshape(batch * t, width)  # (B T, D)
        for index in range(lo, hi):
            if taps is not None and index in taps:
                taps[index] = y.view(batch, t, width)
            norm_in, norm_q, norm_k, norm_attention, norm_mlp_in, norm_mlp, qkv, out, gate_up, down = stack[index]
            h = qkv(y if norm_in is None else norm_in(y))  # (B T, (H + 2 Hkv) d)
            v = h[:, nq + nk :].view(batch, t, kv_heads, d)
            if norm_q is None or norm_k is None:
                qk = h[:, : nq + nk].view(batch, t, heads + kv_heads, d)
            else:
                q, k = h[:, :nq], h[:, nq : nq + nk]
                if self.per_head_norm:
                    q, k = q.reshape(batch, t, heads, d), k.reshape(batch, t, kv_heads, d)
                qk = torch.cat((norm_q(q).view(batch, t, heads, d), norm_k(k).view(batch, t, kv_heads, d)), 2)
            if spin == d:
                qk = torch.addcmul(qk * cos, qk.roll(d // 2, -1).to(sin.dtype), sin).to(y.dtype)
            else:
                head = qk[..., :spin]
                head = torch.addcmul(head * cos, head.roll(spin // 2, -1).to(sin.dtype), sin).to(y.dtype)
                qk = torch.cat((head, qk[..., spin:]), -1)
            keys, values = append(index, qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2))  # (B, Hkv, S, d)
            # The query heads that share a key head become rows of it: (B, Hkv, T G, d).
            q = qk[:, :, :heads].view(batch, t, kv_heads, groups, d).transpose(1, 2).reshape(batch, kv_heads, -1, d)
            a = attend(q, keys, values, attn_mask=masks[windows[index]], scale=scale)
            a = out(a.view(batch, kv_heads, t, groups, d).transpose(1, 2).reshape(batch * t, nq))
            y = y + (a if norm_attention is None else norm_attention(a))
            gate, up = gate_up(y if norm_mlp_in is None else norm_mlp_in(y)).chunk(2, -1)
            a = down(act(gate) * up)
            y = y + (a if norm_mlp is None else norm_mlp(a))
        y = y.view(batch, t, width)
        if taps is not None and hi in taps:
            taps[hi] = y
        return y

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        module = self.model.get_output_embeddings() if head is None else head
        rows = x.shape[0] * x.shape[1]
        plain, fast = self._head(module)
        linear = plain if rows < self.packed_from or (torch.is_grad_enabled() and x.requires_grad) else fast
        return linear(self.final_norm(x.reshape(rows, -1))).view(*x.shape[:2], -1)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        weights = self._weights[layer]
        return {path: (weights[slot][0].shape[1], stop - start) for path, (slot, start, stop) in self._parts.items()}

    # -- what is prepared once --------------------------------------------------------------------------------------

    def _stack(self, make: Callable[..., Linear]) -> list[_Layer]:
        pairs = zip(self._norms, self._weights, strict=True)
        return [_Layer(*norms, *(make(*w[slot]) for slot in _MAPS)) for norms, w in pairs]

    def _head(self, module: Any) -> tuple[Linear, Linear]:
        found = self._heads.get(module)
        if found is None:
            bias = getattr(module, "bias", None)
            weight, bias = module.weight.detach(), None if bias is None else bias.detach()
            plain = kernels.dense(weight, bias)
            packs = self.packed_from <= self.context
            found = (plain, kernels.packed(weight, bias, kernels.HEAD_HINT) if packs else plain)
            self._heads[module] = found
        return found

    def _rotary(self, positions: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, T, 1, d] of ``positions`` [B, T]: with x rolled by half a head,
        ``x cos + roll(x) sin`` is Hugging Face's ``x cos + rotate_half(x) sin``."""
        shared = positions is mask.query  # consecutive calls on one mask share what is derived from it
        if shared and "cos" in mask.memo:
            return mask.memo["cos"], mask.memo["sin"]  # type: ignore[return-value]
        count = int(positions.max()) + 1
        if count > self.tables.shape[0]:
            every = torch.arange(max(count, min(2 * count, self.context), 512), device=self.device)[None]
            probe = torch.empty(0, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                cos, sin = (t[0] for t in self.rotary(probe, every))  # (P, d)
            half = sin.shape[-1] // 2
            self.tables = torch.stack((cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)), 1)  # (P, 2, d)
        cos, sin = self.tables[positions].unsqueeze(3).unbind(2)  # (B, T, 1, d)
        if shared:
            mask.memo["cos"], mask.memo["sin"] = cos, sin
        return cos, sin

    def _additive(self, mask: Mask, window: int | None) -> Tensor | None:
        """The mask as a term on scores [B, 1, T G, S] (SDPA converts boolean ones anew in every layer)."""
        key = ("additive", window)
        if key not in mask.memo:
            visible = mask.bool_mask(window)
            if visible is not None:
                # Finite, so that a query that sees nothing (padding) stays finite, too.
                term = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
                term.masked_fill_(~visible, torch.finfo(self.dtype).min / 2)
                visible = term.repeat_interleave(self.groups, 2) if self.groups > 1 else term
            mask.memo[key] = visible
        return mask.memo[key]

    def _with_adapters(
        self, stack: list[_Layer], lo: int, hi: int, adapters: Adapters, batch: int, adapted: int | None, grad: bool
    ) -> list[_Layer]:
        """``stack`` with the adapters of layers [lo, hi): merged where they act on all tokens, else beside the maps."""
        stack, packs = list(stack), stack is self._packed
        made = self._adapted.get(adapters)
        if made is None:
            made = self._adapted[adapters] = _Adapted([*adapters.parameters()])
        version = sum(0 if p.is_inference() else p._version for p in made.parameters)
        if made.version != version:
            made.version, made.layers = version, {}
        for index in range(lo, hi):
            if index not in adapters.paths:
                continue
            key = (index, packs, None if adapted is None else (batch, adapted))
            layer = None if grad else made.layers.get(key)
            if layer is None:
                layer = self._adapt(stack[index], index, adapters, packs, batch, adapted, grad)
                if not grad:
                    made.layers[key] = layer
            stack[index] = layer
        return stack

    def _adapt(
        self, layer: _Layer, index: int, adapters: Adapters, packs: bool, batch: int, adapted: int | None, grad: bool
    ) -> _Layer:
        by_slot: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        for path, (down, up) in adapters.factors(index).items():
            slot, start, _ = self._parts[path]
            by_slot.setdefault(slot, []).append((down, up, start))
        maps = {}
        for slot, parts in by_slot.items():
            weight, bias = self._weights[index][slot]
            if grad:
                maps[slot] = kernels.LowRank(parts, weight.shape[0], self.dtype).beside(
                    getattr(layer, slot), batch, adapted
                )
                continue
            parts = [(down.detach(), up.detach(), start) for down, up, start in parts]
            low = kernels.LowRank(parts, weight.shape[0], self.dtype)
            if adapted is None:
                maps[slot] = (kernels.packed if packs else kernels.dense)(low.merged(weight), bias)
            else:
                maps[slot] = low.beside(getattr(layer, slot), batch, adapted)
        return layer._replace(**maps)

    @torch.inference_mode()
    def _self_check(self) -> None:
        """Compare a prompt pass and one-token passes, each in two pieces, with the model's own forward.

        The median position counts: in 16 bits, single positions of correct runtimes may lie far apart.
        """
        kind, (prompt, n) = self.model.config.model_type, (8, 11)
        # Spread over the vocabulary: the first tokens are often special ones, on which models are ill-conditioned.
        ids = (torch.arange(1, n + 1, device=self.device)[None] * 7919) % self.vocab_size
        positions = torch.arange(n, device=self.device)[None]
        try:
            own = self.model(input_ids=ids, use_cache=False).logits.float()
            cache, half, ours = self.new_cache(), self.num_layers // 2, []
            for a, b in ((0, prompt), *((i, i + 1) for i in range(prompt, n))):
                part = positions[:, a:b]
                x, mask = self.embed(ids[:, a:b], part), cache.mask(0, part)
                x = self.layers(x, 0, half, part, mask, cache)
                ours.append(self.readout(self.layers(x, half, self.num_layers, part, mask, cache)))
                cache.keep([list(range(b - a))])
        except (TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise SpecDecError(f"model type '{kind}' does not run in the fused runtime ({error})") from error
        apart = (own - torch.cat(ours, 1).float()).abs().amax(-1)[0] / own.abs().max().clamp_min(1e-6)  # (T,)
        self.spread = max(apart[:prompt].median().item(), apart[prompt:].median().item())
        if not self.spread < (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise SpecDecError(
                f"the fused runtime gives other logits than this '{kind}' model (relative difference {self.spread:.1e})"
            )


def _norm(module: Any, kind: str) -> Norm:
    weight, eps, shape = module.weight.detach(), float(module.variance_epsilon), [module.weight.shape[0]]
    if kind == "olmo2":  # scales before it rounds to the model's dtype
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    return lambda x: torch.rms_norm(x, shape, None, eps) * weight


def _layer_norms(layer: Any, kind: str) -> tuple[Any, ...]:
    """The norms of a decoder layer, in ``_Layer``'s order."""
    attention = layer.self_attn
    inner = [_norm(getattr(attention, n), kind) if hasattr(attention, n) else None for n in ("q_norm", "k_norm")]
    last = _norm(layer.post_attention_layernorm, kind)
    if kind == "olmo2":
        return None, *inner, last, None, _norm(layer.post_feedforward_layernorm, kind)
    return _norm(layer.input_layernorm, kind), *inner, None, last, None


def _modules(layer: Any) -> dict[str, list[tuple[str, nn.Linear]]]:
    """``{slot: [(module path, module), ...]}`` of a decoder layer, in the order of the fused rows."""
    fused = hasattr(layer.self_attn, "qkv_proj")
    names = {
        "qkv": ["self_attn.qkv_proj"] if fused else [f"self_attn.{n}_proj" for n in "qkv"],
        "out": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_up_proj"] if fused else ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    found = {slot: [(path, layer.get_submodule(path)) for path in paths] for slot, paths in names.items()}
    for path, module in (pair for pairs in found.values() for pair in pairs):
        if type(module) is not nn.Linear:
            raise SpecDecError(f"the fused runtime takes plain linear layers; '{path}' is a {type(module).__name__}")
    return found


def _fuse_layer(layer: Any) -> Weights:
    return {slot: kernels.fuse([module for _, module in pairs]) for slot, pairs in _modules(layer).items()}


def _adapter_parts(layer: Any) -> dict[str, tuple[str, int, int]]:
    """``{module path: (slot, first row, end row)}``: where the outputs of a module lie in its fused map."""
    parts = {}
    for slot, pairs in _modules(layer).items():
        start = 0
        for path, module in pairs:
            parts[path] = (slot, start, start + module.out_features)
            start += module.out_features
    return parts
