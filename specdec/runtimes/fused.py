"""The fused runtime: a direct decode loop for Llama-like families, much faster than the reference runtime.

Query, key and value weights are one product, and so are gate and up. Rotary factors and masks are made once per call.
Grouped query heads become rows of their key head. Linear maps have one of the layouts of ``linear_maps``. The Hugging
Face model stays usable: its parameters are views of the fused weights. Checked against the model's own forward on load.
Knows nothing about drafting, and no families but those in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.errors import SpecDecError
from specdec.kvcache.mask import Mask
from specdec.models import families
from specdec.models.gguf.blocks import densify
from specdec.models.native_model import NativeModel, as_transformers
from specdec.runtimes import decoder_layer, linear_maps
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters, Norm
from specdec.runtimes.linear_maps import Linear
from specdec.runtimes.native import linear
from specdec.runtimes.target import Pass, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma")

LowRank = tuple[int, tuple[Tensor, Tensor] | None]  # number of outputs; down [r, in] and up [out, r], or there are none
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, queries, new keys and values -> attention's result


@dataclass(eq=False)
class _Layer:
    """One decoder layer as callables.

    norms: of the input, queries, keys, attention's result, the MLP's input and its result; None where there is none.
    maps: the linear maps "qkv", "out", "gate_up" and "down".
    low: low-rank terms of the parts of a map, one behind the other.
    """

    norms: tuple[Norm | None, ...]
    maps: dict[str, Linear]
    low: dict[str, list[LowRank]] = field(default_factory=dict)


class FusedTarget(Target):
    """The fused runtime. Base weights are frozen: gradients reach ``x`` and the adapters only.

    Raises SpecDecError for models that it does not know or does not reproduce; the reference runtime may support them.

    packs: whether to store weights a second time, in the layout that is fastest without gradients, and has none.
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
        attention, mlp = decoder.layers[0].self_attn, decoder.layers[0].mlp
        self.head_dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.groups = self.heads // self.kv_heads
        self.per_head_norm = not families.FAMILIES[kind].norm_over_heads
        self.act: Callable[[Tensor], Tensor] = mlp.activation_fn if kind == "phi3" else mlp.act_fn
        self.make = linear_maps.dense
        if packs and linear_maps.packable(self.dtype, self.device):
            self.make = linear_maps.packed
        maps = [decoder_layer.modules(layer) for layer in decoder.layers]
        fused = ({slot: linear_maps.fuse([m for _, m in pairs]) for slot, pairs in each.items()} for each in maps)
        self._weights: list[decoder_layer.Weights] = list(fused)
        self._parts = [decoder_layer.adapter_parts(each) for each in maps]
        norms = (decoder_layer.layer_norms(layer, kind) for layer in decoder.layers)
        self._layers = [
            _Layer(own, {slot: self.make(*pair) for slot, pair in weights.items()})
            for own, weights in zip(norms, self._weights, strict=True)
        ]
        self._adapted: WeakKeyDictionary[Adapters, dict[int, _Layer]] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, Linear] = WeakKeyDictionary()
        self.final_norm = decoder_layer.norm(decoder.norm, families.FAMILIES[kind])
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        scale = getattr(decoder.embed_tokens, "embed_scale", None)  # Gemma's
        self.embed_scale: Tensor | None = None if scale is None else scale.to(self.dtype)
        self.rotary = decoder.rotary_emb
        # Sums over keys run in vectors of 16 on a CPU: with a rounded number of keys, a token's attention is the same
        # bits however many tokens are scored with it.
        self.key_multiple = 16 if self.device.type == "cpu" else 1
        self.logit_difference = check_logits(self)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = F.embedding(ids, self.embedding)
        return x if self.embed_scale is None else x * self.embed_scale

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        cache, mask, windows = ctx.cache, ctx.mask, self.windows
        terms = {w: self._additive(mask, w, self.key_multiple) for w in set(windows[lo:hi])}

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.append(index, k, v, self.key_multiple)
            return F.scaled_dot_product_attention(q, keys, values, terms[windows[index]], scale=self.scale)

        layers = self._select_layers(lo, hi, ctx.adapters)
        return self._run(x, lo, layers, self._rotary(ctx), attend, ctx.taps)

    def _run(
        self,
        x: Tensor,
        lo: int,
        layers: list[_Layer],
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        taps: dict[int, Tensor] | None,
    ) -> Tensor:
        """``layers`` after all preparation: tensors in, tensors out, no values read."""
        for index, layer in enumerate(layers, start=lo):
            if taps is not None and index in taps:
                taps[index] = x
            _, _, _, norm_attention, norm_mlp_in, norm_mlp = layer.norms
            q, k, v = self._project_qkv(layer, x, rotary)
            out = _product(layer, "out", self._merge_heads(attend(index, q, k, v)))
            x = x + (out if norm_attention is None else norm_attention(out))
            gate, up = _product(layer, "gate_up", x if norm_mlp_in is None else norm_mlp_in(x)).chunk(2, -1)
            out = _product(layer, "down", self.act(gate) * up)
            x = x + (out if norm_mlp is None else norm_mlp(out))
        if taps is not None and lo + len(layers) in taps:
            taps[lo + len(layers)] = x
        return x

    def _project_qkv(self, layer: _Layer, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The queries (B, Hkv, T G, d) of a layer's attention, and its new keys and values (B, Hkv, T, d). Query heads
        that share a key head are rows of it."""
        norm_in, norm_q, norm_k, *_ = layer.norms
        (batch, t, _), d, heads, kv_heads = x.shape, self.head_dim, self.heads, self.kv_heads
        h = _product(layer, "qkv", x if norm_in is None else norm_in(x)).view(batch, t, -1, d)
        q, k, v = h.split((heads, kv_heads, kv_heads), 2)
        if norm_q is not None and norm_k is not None:
            q, k = self._norm_heads(q, norm_q), self._norm_heads(k, norm_k)
        q, k = _rotated(torch.cat((q, k), 2), *rotary).split((heads, kv_heads), 2)
        q = q.reshape(batch, t, kv_heads, self.groups, d).transpose(1, 2).reshape(batch, kv_heads, -1, d)
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def _norm_heads(self, x: Tensor, norm: Norm) -> Tensor:
        """Queries or keys [B, T, H, d] after their norm: per head (Qwen3), or over all heads (OLMo 2)."""
        return norm(x) if self.per_head_norm else norm(x.flatten(2)).view(x.shape)

    def _merge_heads(self, a: Tensor) -> Tensor:
        """Attention's result (B, Hkv, T G, d) with heads side by side: (B, T, H d)."""
        return a.unflatten(2, (-1, self.groups)).transpose(1, 2).flatten(2)

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        module = self.own_head if head is None else head
        if module not in self._heads:
            bias = getattr(module, "bias", None)
            self._heads[module] = self.make(module.weight.detach(), None if bias is None else bias.detach())
        return self._heads[module](self.final_norm(x))

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        weights = self._weights[layer]
        parts = self._parts[layer].items()
        return {path: (weights[slot][0].shape[1], stop - start) for path, (slot, start, stop) in parts}

    def _rotary(self, ctx: Pass) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, T, 1, d'] of the positions. Consecutive calls with one mask share them."""
        memo = ctx.mask.memo if ctx.positions is ctx.mask.query else {}
        if "cos" not in memo:
            probe = torch.empty(0, dtype=self.dtype, device=self.device)
            memo["cos"], memo["sin"] = (each.unsqueeze(2) for each in self.rotary(probe, ctx.positions))
        return memo["cos"], memo["sin"]  # type: ignore[return-value]

    def _additive(self, mask: Mask, window: int | None, multiple: int) -> Tensor | None:
        """The mask as a term on scores [B, 1, T G, S rounded up]: SDPA converts boolean masks in every layer."""
        key = ("additive", window, multiple)
        if key not in mask.memo:
            visible, (batch, t), length = mask.bool_mask(window), mask.query.shape, mask.length
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

    # -- adapters -----------------------------------------------------------------------------------------------------

    def _select_layers(self, lo: int, hi: int, adapters: Adapters | None) -> list[_Layer]:
        """The layers [lo, hi), with ``adapters`` if there are any. These are read in every pass, as they then are."""
        if adapters is None:
            return self._layers[lo:hi]
        made = self._adapted.setdefault(adapters, {})
        for index in range(lo, hi):
            if index not in made:
                made[index] = self._adapt(index, adapters)
        return [made[index] for index in range(lo, hi)]

    def _adapt(self, index: int, adapters: Adapters) -> _Layer:
        """A layer with the neurons that ``adapters`` keep, and their low-rank terms."""
        maps, parts, factors = dict(self._layers[index].maps), dict(self._parts[index]), adapters.factors(index)
        if (kept := adapters.kept(index)) is not None:
            (weight, bias), (down, down_bias) = (self._weights[index][slot] for slot in ("gate_up", "down"))
            rows, count = torch.cat((kept, kept + len(weight) // 2)), len(kept)  # of gate, of up
            maps["gate_up"] = self.make(weight[rows], None if bias is None else bias[rows])
            maps["down"] = self.make(down[:, kept].contiguous(), down_bias)
            gate_up = [path for path, (slot, *_) in parts.items() if slot == "gate_up"]
            size = 2 * count // len(gate_up)
            parts |= {path: ("gate_up", size * n, size * (n + 1)) for n, path in enumerate(gate_up)}
        low = {
            slot: [(end - start, factors.get(path)) for path, (owner, start, end) in parts.items() if owner == slot]
            for slot in {parts[path][0] for path in factors}
        }
        return replace(self._layers[index], maps=maps, low=low)


def _product(layer: _Layer, slot: str, x: Tensor) -> Tensor:
    """A linear map of x [B, T, in], with its low-rank terms."""
    y, low = layer.maps[slot](x), layer.low.get(slot)
    return y if low is None else y + torch.cat([_low_rank(x, *each) for each in low], -1)


def _low_rank(x: Tensor, outs: int, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    if factors is None:
        return x.new_zeros(*x.shape[:-1], outs)
    down, up = factors
    return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, T, heads, d] with the first elements of each head rotated, as Hugging Face's ``rotate_half``."""
    size = cos.shape[3]
    part = x[..., :size]
    first, second = part.chunk(2, -1)
    made = (part * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)  # OLMo 2 rotates in float32
    return made if size == x.shape[3] else torch.cat((made, x[..., size:]), -1)
