"""The fused runtime: a direct decode loop for Llama-like families, much faster than the reference runtime.

Query, key and value weights are one product, and so are gate and up. Rotary tables and masks are made once per call.
Grouped query heads become rows of their key head. Linear maps have one of the layouts of ``linear_maps``. The Hugging
Face model stays usable: its parameters are views of the fused weights. Checked against the model's own forward on load.
Knows nothing about drafting, and no families but those in ``FAMILIES``.

Between large products every small operation costs several times what it costs alone, as streaming weights evict its
code from the cache. So there are few: the residual is a pair (y, -y), whose mean is zero, so that PyTorch's one-kernel
``layer_norm`` *is* the RMS norm; rotary is three operations in place over queries and keys together; masks are additive
terms (SDPA converts boolean ones in every layer). The tokens of a long causal pass attend in spans, which share one
narrow mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import Mask
from specdec.models import families
from specdec.models.gguf.blocks import densify
from specdec.models.native_model import NativeModel, as_transformers
from specdec.runtimes import decoder_layer, linear_maps
from specdec.runtimes.by_parts import ByParts
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters, Norm
from specdec.runtimes.linear_maps import Linear
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.native import linear
from specdec.runtimes.target import Pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAKERS = {"packed": linear_maps.packed, "dense": linear_maps.dense, "through": linear_maps.through}  # by layout
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma")

SPAN = 64  # tokens of a causal pass that attend at once: masks grow with this, not with the pass

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, queries, new keys and values -> attention's result


class _Layer(NamedTuple):
    """One decoder layer as callables. Norms that a family does not have are None."""

    norm_in: Norm | None  # reads the pair (y, -y), as does norm_mlp_in
    norm_q: Norm | None
    norm_k: Norm | None
    norm_attention: Norm | None  # on attention's result, before it joins the residual
    norm_mlp_in: Norm | None
    norm_mlp: Norm | None  # on the MLP's result, likewise
    qkv: Linear
    out: Linear
    gated: Linear  # act(gate) * up
    down: Linear


@dataclass
class _Adapted:
    """Cached layers with one set of adapters. version: of its parameters; it grows with every training step."""

    parameters: list[nn.Parameter]
    version: int = 0
    layers: dict[Any, _Layer] = field(default_factory=dict)


class FusedTarget(ByParts):
    """The fused runtime. Base weights are frozen: gradients reach ``x`` and the adapters only.

    Raises SpecDecError for models that it does not know or does not reproduce; the reference runtime may support them.

    packs: whether to store weights a second time, in the layout that is fastest without training.
    """

    runtime = "fused"

    def __init__(self, model: NativeModel | PreTrainedModel, packs: bool = True) -> None:
        model = as_transformers(model)
        refuse_unsupported(model)
        kind, config = model.config.model_type, model.config
        if kind not in FAMILIES:
            raise SpecDecError(f"model type '{kind}' is unknown to the fused runtime (it knows {', '.join(FAMILIES)})")
        linear.unpack_here(model)
        densify(model)
        super().__init__(model)
        decoder: Any = model.model
        decoder_layer.check_rotary(decoder.rotary_emb)
        attention = decoder.layers[0].self_attn
        self.head_dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.groups = self.heads // self.kv_heads
        self.per_head_norm = not families.FAMILIES[kind].norm_over_heads
        mlp = decoder.layers[0].mlp
        act = mlp.activation_fn if kind == "phi3" else mlp.act_fn
        self.act: Callable[[Tensor], Tensor] = F.silu if "SiLU" in type(act).__name__ else act
        maps = [decoder_layer.modules(layer) for layer in decoder.layers]
        fused = ({slot: linear_maps.fuse([m for _, m in pairs]) for slot, pairs in each.items()} for each in maps)
        self._weights: list[decoder_layer.Weights] = list(fused)
        self._norms = [decoder_layer.layer_norms(layer, kind) for layer in decoder.layers]
        self._parts = [decoder_layer.adapter_parts(each, {}) for each in maps]
        self.layout = "packed" if packs and linear_maps.packable(self.dtype, self.device) else "dense"
        self._stacks = {name: self._stack(MAKERS[name]) for name in (self.layout, "dense")}
        self._stacks["through"] = list(self._stacks["dense"])  # replaced layer by layer: ``_pack_through``
        self._through: set[int] = set()  # layers of that stack that are ready
        self._adapted: WeakKeyDictionary[Adapters, _Adapted] = WeakKeyDictionary()
        self._narrow: WeakKeyDictionary[Adapters, dict[tuple[int, str], Any]] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, dict[str, Linear]] = WeakKeyDictionary()
        self.final_norm = decoder_layer.norm(decoder.norm, families.FAMILIES[kind])
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        scale = getattr(decoder.embed_tokens, "embed_scale", None)  # Gemma's
        self.embed_scale: Tensor | None = None if scale is None else scale.to(self.dtype)
        self.rotary = decoder.rotary_emb
        self.tables = torch.empty(0)
        self.sign = torch.tensor([[1.0], [-1.0]], dtype=self.dtype, device=self.device)  # (2, 1)
        # Sums over keys run in vectors of 16 on a CPU: with a rounded number of keys, a token's attention is the same
        # bits however many tokens are scored with it.
        self.key_multiple = 16 if self.device.type == "cpu" else 1
        self.logit_difference = check_logits(self)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        return x if self.embed_scale is None else x * self.embed_scale

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        adapters, cache = ctx.adapters, ctx.cache
        grad = torch.is_grad_enabled() and (
            x.requires_grad or (adapters is not None and any(p.requires_grad for p in adapters.parameters()))
        )
        stack, multiple = self._select_layers(x, lo, hi, ctx, grad), 1 if grad else self.key_multiple
        rotary, mask, windows = self._rotary(ctx.positions, ctx.mask), ctx.mask, self.windows
        if mask.causal and x.shape[1] > SPAN:

            def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return self._attend_in_spans(q, *cache.append(index, k, v), windows[index], mask)

        else:
            terms = {w: self._additive(mask, w, multiple) for w in set(windows[lo:hi])}

            def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                keys, values = cache.append(index, k, v, multiple)
                return F.scaled_dot_product_attention(q, keys, values, terms[windows[index]], scale=self.scale)

        return self._run(x, lo, hi, stack, rotary, attend, ctx.taps)

    def fill(self, x: Tensor, lo: int, ctx: Pass) -> None:
        (batch, t, width), stack = x.shape, self._select_layers(x, lo, self.num_layers, ctx, grad=False)
        y, rotary = x.reshape(batch * t, width), self._rotary(ctx.positions, ctx.mask)
        pair = torch.stack((y, -y), 1)  # (rows, 2, D)
        for index in range(lo, self.num_layers):
            _, k, v = self._project_qkv(stack[index], pair, *rotary)
            ctx.cache.append(index, k, v)

    def _select_layers(self, x: Tensor, lo: int, hi: int, ctx: Pass, grad: bool) -> list[_Layer]:
        """The layers in the layout for ``x`` [B, T, D], with the adapters applied."""
        batch, t, _ = x.shape
        form = "dense" if grad else self.layout
        if grad and linear_maps.packable(self.dtype, self.device):
            form = "through"
            self._pack_through(lo, hi)
        if ctx.adapters is None:
            return self._stacks[form]
        adapted = None if ctx.adapted == t else ctx.adapted
        return self._with_adapters(form, lo, hi, ctx.adapters, batch, adapted, grad)

    def _run(
        self,
        x: Tensor,
        lo: int,
        hi: int,
        stack: list[_Layer],
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        taps: dict[int, Tensor] | None,
    ) -> Tensor:
        """``layers`` after all preparation: tensors in, tensors out, no values read."""
        (batch, t, width), (cos, sin) = x.shape, rotary
        y = x.reshape(batch * t, width)
        pair = torch.stack((y, -y), 1)  # (rows, 2, D)
        for index in range(lo, hi):
            if taps is not None and index in taps:
                taps[index] = pair[:, 0].view(batch, t, width)
            layer = stack[index]
            q, k, v = self._project_qkv(layer, pair, cos, sin)
            pair = self._add_results(layer, pair, self._merge_heads(attend(index, q, k, v)))
        y = pair[:, 0].view(batch, t, width)
        if taps is not None and hi in taps:
            taps[hi] = y
        return y

    def _project_qkv(self, layer: _Layer, pair: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (B, Hkv, T G, d) of a layer's attention, and its new keys and values (B, Hkv, T, d). Query heads
        that share a key head are rows of it."""
        norm_q, norm_k = layer.norm_q, layer.norm_k
        (batch, t, *_), d, heads, kv_heads, groups = cos.shape, self.head_dim, self.heads, self.kv_heads, self.groups
        h = layer.qkv(pair.select(1, 0) if layer.norm_in is None else layer.norm_in(pair)).view(batch, t, -1, d)
        qk, v = h.narrow(2, 0, heads + kv_heads), h.narrow(2, heads + kv_heads, kv_heads)
        if norm_q is not None and norm_k is not None:
            qk = self._norm_heads(qk, norm_q, norm_k)
        _rotate(qk, cos, sin)
        q = qk.narrow(2, 0, heads)
        if t == 1:
            q = q.view(batch, kv_heads, groups, d)
        else:
            q = q.view(batch, t, kv_heads, groups, d).transpose(1, 2).reshape(batch, kv_heads, t * groups, d)
        return q, qk.narrow(2, heads, kv_heads).transpose(1, 2), v.transpose(1, 2)

    def _merge_heads(self, a: Tensor) -> Tensor:
        """Attention's result (B, Hkv, T G, d) with heads side by side: (rows, H d)."""
        (batch, kv_heads, rows, d), groups = a.shape, self.groups
        t = rows // groups
        if t > 1:
            a = a.view(batch, kv_heads, t, groups, d).transpose(1, 2)
        return a.reshape(batch * t, kv_heads * groups * d)

    def _add_results(self, layer: _Layer, pair: Tensor, a: Tensor) -> Tensor:
        """The residual (rows, 2, D) plus attention's result ``a`` (rows, H d) and the MLP's."""
        _, _, _, norm_attention, norm_mlp_in, norm_mlp, _, out, gated, down = layer
        sign, a = self.sign, out(a)
        pair = torch.addcmul(pair, (a if norm_attention is None else norm_attention(a)).unsqueeze(1), sign)
        a = down(gated(pair.select(1, 0) if norm_mlp_in is None else norm_mlp_in(pair)))
        return torch.addcmul(pair, (a if norm_mlp is None else norm_mlp(a)).unsqueeze(1), sign)

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        module = self.own_head if head is None else head
        form = "dense" if torch.is_grad_enabled() and x.requires_grad else self.layout
        y = self._head(module, form)(self.final_norm(x.reshape(-1, x.shape[-1])))
        return y.view(*x.shape[:2], -1)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        weights = self._weights[layer]
        parts = self._parts[layer].items()
        return {path: (weights[slot][0].shape[1], stop - start) for path, (slot, start, stop) in parts}

    # -- what is prepared once --------------------------------------------------------------------------------------

    def _stack(self, make: Callable[..., Linear]) -> list[_Layer]:
        return [self._layer(index, make) for index in range(self.num_layers)]

    def _layer(self, index: int, make: Callable[..., Linear]) -> _Layer:
        w = self._weights[index]
        maps: Any = make(*w["qkv"]), make(*w["out"]), self._gated(make, *w["gate_up"]), make(*w["down"])
        return _Layer(*self._norms[index], *maps)

    def _pack_through(self, lo: int, hi: int) -> None:
        """Make the layers [lo, hi) ready for gradients; only those are stored a second time."""
        for index in set(range(lo, hi)) - self._through:
            self._stacks["through"][index] = self._layer(index, linear_maps.through)
            self._through.add(index)

    def _gated(self, make: Callable[..., Linear], weight: Tensor, bias: Tensor | None) -> Linear:
        if make is linear_maps.packed and self.act is F.silu:
            return linear_maps.packed_silu_gated(weight, bias)
        return linear_maps.Gated(make(weight, bias), self.act)

    def _head(self, module: Any, form: str) -> Linear:
        made = self._heads.setdefault(module, {})
        if form not in made:
            weight, bias = module.weight.detach(), getattr(module, "bias", None)
            bias = None if bias is None else bias.detach()
            hint = (linear_maps.HEAD_HINT,) if form == "packed" else ()
            made[form] = MAKERS[form](weight, bias, *hint)
        return made[form]

    def _norm_heads(self, qk: Tensor, norm_q: Norm, norm_k: Norm) -> Tensor:
        """Queries and keys [B, T, H + Hkv, d] after their norms: per head (Qwen3), or over all heads (OLMo 2)."""
        parts = qk.split((self.heads, self.kv_heads), 2)
        if not self.per_head_norm:
            parts = tuple(part.flatten(2) for part in parts)
        q, k = norm_q(parts[0]), norm_k(parts[1])
        return torch.cat((q.view(*qk.shape[:2], -1, qk.shape[3]), k.view(*qk.shape[:2], -1, qk.shape[3])), 2)

    def _rotary(self, positions: Tensor, mask: Mask, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines [B, T, 1, 2, d / 2] of ``positions`` [B, T] (all < ``count``), for ``_rotate``."""
        shared = positions is mask.query  # consecutive calls with one mask share its factors
        if shared and "cos" in mask.memo:
            return mask.memo["cos"], mask.memo["sin"]  # type: ignore[return-value]
        count = int(positions.max()) + 1 if count is None else count
        tables = self.tables
        if count > tables.shape[0]:
            every = torch.arange(max(count, min(2 * count, self.context), 512), device=self.device)[None]
            probe = torch.empty(0, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                cos, sin = (table[0].unflatten(1, (2, -1)) for table in self.rotary(probe, every))  # (P, 2, d / 2)
            # Another thread may store shorter tables: these are long enough for this call.
            tables = self.tables = torch.stack((cos, sin * sin.new_tensor([[-1.0], [1.0]])), 1)
        cos, sin = tables[positions].unsqueeze(3).unbind(2)
        if shared:
            mask.memo["cos"], mask.memo["sin"] = cos, sin
        return cos, sin

    def _additive(self, mask: Mask, window: int | None, multiple: int) -> Tensor | None:
        """The mask as a term on scores [B, 1, T G, S rounded up]: SDPA converts boolean masks in every layer."""
        key = ("additive", window, multiple)
        if key not in mask.memo:
            visible, (batch, t), length = mask.bool_mask(window), mask.query.shape, mask.keys.shape[1]
            padding, term = -length % multiple, None
            if visible is not None or padding:
                # Finite, so that a query that sees nothing (padding) stays finite.
                hidden = torch.finfo(self.dtype).min / 2
                term = torch.zeros(batch, 1, t, length + padding, dtype=self.dtype, device=self.device)
                term[..., length:] = hidden
                if visible is not None:
                    term[..., :length].masked_fill_(~visible, hidden)
                term = term.repeat_interleave(self.groups, 2) if self.groups > 1 else term
            mask.memo[key] = term
        return mask.memo[key]

    def _attend_in_spans(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, mask: Mask) -> Tensor:
        """Attention of a causal pass: queries (B, Hkv, T G, d), ``SPAN`` tokens at a time, over the keys up to theirs.

        ``keys`` and ``values`` (B, Hkv, S, d) are all there are; T is the last of them.
        """
        groups, length, out = self.groups, keys.shape[2], []
        band = self._band(mask, window, length)
        t = q.shape[2] // groups
        for start in range(0, t, SPAN):
            stop = min(start + SPAN, t)
            end = length - t + stop
            begin = 0 if window is None else max(length - t + start - window + 1, 0)
            term = band[(SPAN - stop + start) * groups :, band.shape[1] - end + begin :]
            part = q[:, :, start * groups : stop * groups]
            span = keys[:, :, begin:end], values[:, :, begin:end]
            out.append(F.scaled_dot_product_attention(part, *span, term, scale=self.scale))
        return torch.cat(out, 2)

    def _band(self, mask: Mask, window: int | None, length: int) -> Tensor:
        """The mask of ``SPAN`` tokens that end at the last of ``length`` keys, as a term on scores [SPAN G, keys].

        Shorter and earlier spans use its last rows and columns.
        """
        key = ("band", window)
        if key not in mask.memo:
            width = length if window is None else min(length, window + SPAN - 1)
            rows, columns = (torch.arange(n - 1, -1, -1, device=self.device) for n in (SPAN, width))
            distance = columns - rows[:, None]  # from a key to a query that comes after it
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            term = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            term.masked_fill_(hidden, torch.finfo(self.dtype).min / 2)
            mask.memo[key] = term.repeat_interleave(self.groups, 0)
        return mask.memo[key]  # type: ignore[return-value]

    def _with_adapters(
        self, form: str, lo: int, hi: int, adapters: Adapters, batch: int, adapted: int | None, grad: bool
    ) -> list[_Layer]:
        """All layers, with the adapters of [lo, hi): merged if they act on all tokens, else beside the maps."""
        stack = list(self._stacks[form])
        made = self._adapted.get(adapters)
        if made is None:
            made = self._adapted[adapters] = _Adapted([*adapters.parameters()])
        version = sum(0 if p.is_inference() else p._version for p in made.parameters)
        if made.version != version:
            made.version, made.layers = version, {}
        for index in range(lo, hi):
            if not adapters.changes(index):
                continue
            key = (index, form, None if adapted is None else (batch, adapted))
            layer = None if grad else made.layers.get(key)
            if layer is None:
                layer = self._adapt(stack[index], index, adapters, form, batch, adapted, grad)
                if not grad:
                    made.layers[key] = layer
            stack[index] = layer
        return stack

    def _adapt(
        self, layer: _Layer, index: int, adapters: Adapters, form: str, batch: int, adapted: int | None, grad: bool
    ) -> _Layer:
        parts, weights, make, maps = self._parts[index], self._weights[index], MAKERS[form], dict[str, Any]()
        if index in adapters.neurons:
            layer, weights, parts = self._narrowed(layer, index, adapters, form)
        by_slot: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        for path, (down, up) in adapters.factors(index).items():
            slot, start, _ = parts[path]
            by_slot.setdefault(slot, []).append((down, up, start) if grad else (down.detach(), up.detach(), start))
        for slot, terms in by_slot.items():
            weight, bias = weights[slot]
            low = linear_maps.LowRank(terms, weight.shape[0], self.dtype)
            if adapted is None and not grad:
                weight = low.merged(weight)
                made = self._gated(make, weight, bias) if slot == "gate_up" else make(weight, bias)
            elif slot == "gate_up":  # the terms come before the activation
                inner = layer.gated.gate_up if isinstance(layer.gated, linear_maps.Gated) else make(weight, bias)
                made = linear_maps.Gated(low.add_to(inner, batch, adapted), self.act)
            else:
                made = low.add_to(getattr(layer, slot), batch, adapted)
            maps["gated" if slot == "gate_up" else slot] = made
        return layer._replace(**maps)

    def _narrowed(
        self, layer: _Layer, index: int, adapters: Adapters, form: str
    ) -> tuple[_Layer, decoder_layer.Weights, dict[str, tuple[str, int, int]]]:
        """A layer with the neurons that ``adapters`` keep, its weights, and the rows of each module. Made once."""
        made = self._narrow.setdefault(adapters, {})
        if (index, form) not in made:
            mlp, kept = gated_mlp(self.block(index)), adapters.kept(index)
            assert mlp is not None and kept is not None
            (weight, bias), (down, down_bias) = (self._weights[index][slot] for slot in ("gate_up", "down"))
            rows = torch.cat((kept, kept + mlp.size))  # of gate, of up
            gate_up = weight[rows], None if bias is None else bias[rows]
            narrow = down[:, kept].contiguous(), down_bias
            weights = self._weights[index] | {"gate_up": gate_up, "down": narrow}
            start, parts = 0, dict(self._parts[index])
            for path, (_, out) in mlp.shapes(len(kept)).items():
                slot, start = ("down", 0) if path == mlp.out else ("gate_up", start)
                parts[path], start = (slot, start, start + out), start + out
            gated = self._gated(MAKERS[form], *gate_up)
            made[index, form] = layer._replace(gated=gated, down=MAKERS[form](*narrow)), weights, parts
        return made[index, form]


def _rotate(qk: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the first elements of each head of ``qk`` [B, T, heads, d] in place, as Hugging Face's ``rotate_half``."""
    half = cos.shape[4]
    batch, t, heads, d = qk.shape
    halves = (qk if 2 * half == d else qk.narrow(3, 0, 2 * half)).view(batch, t, heads, 2, half)
    if cos.dtype == qk.dtype:
        swapped = halves.flip(3)
        halves.mul_(cos).addcmul_(swapped, sin)
    else:  # OLMo 2 rotates in float32
        wide = halves.to(cos.dtype)
        halves.copy_(torch.addcmul(wide * cos, wide.flip(3), sin))
