"""The forward pass, over a KV cache, of all model families that ``models/families.py`` describes, in PyTorch.

The PyTorch runtime runs it over stacked weights. The native CPU kernels are checked against it over a model's own
modules. Tests compare it with transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import memory
from specdec.kvcache.cache import KVCache
from specdec.kvcache.recurrent import States
from specdec.models import families
from specdec.models.families import Rotation
from specdec.models.gguf.blocks import BlockLinear, Blocks, named_weights, weight_rows
from specdec.models.native_model import NativeModel
from specdec.runtimes.decoder_layer import has_experts, modules, recurrent
from specdec.runtimes.target import Pass
from specdec.runtimes.torch.attention import MULTIPLE, Attention, Norm, Rotary, additive, norm_of
from specdec.runtimes.torch.capture import capturing
from specdec.runtimes.torch.delta_rule import DeltaRule
from specdec.runtimes.torch.experts import Experts
from specdec.runtimes.torch.linear import Linear, low_rank, side_by_side

POSITIONS = 512  # fewest of a rotary table, and those beyond the slots of a cache
ACTIVATIONS: dict[str, Linear] = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}

LowRank = tuple[int, tuple[Tensor, Tensor] | None]  # number of outputs; down [r, in] and up [out, r], or there are none
Choose = Callable[[int, Tensor], Tensor]
Tables = dict[Rotation, Rotary]
Maker = Callable[[Sequence[nn.Module]], Linear]


@dataclass(eq=False)
class Layer:
    """One decoder layer as functions of tensors. Its *mixer* is attention or a recurrent layer.

    norms: four norms, of the mixer's input, the mixer's output, the MLP's input and the MLP's output; None: there is no
        such norm.
    mixer: the attention or recurrent computation between the linear layers "qkv" and "out".
    maps: the layer's linear layers, by the names "qkv" (mixer input), "out" (mixer output), "gate_up" and "down" (MLP).
    act: activation of the MLP, a function of one tensor.
    experts: the mixture of experts; None: the layer has an ordinary MLP.
    rotation: descriptions of the rotary tables of queries and of keys (``families.Rotation``); None: there are none.
    window: attention window in tokens; None: no limit.
    source: index of the layer whose keys and values this layer reads; its own index if it makes them itself.
    embedded: the term that the layer computes of an embedding of its own per token, and adds to its output; None: none.
    scalar: factor of the layer's output, [1]; None: there is none.
    low: by name of a linear layer, the low-rank (LoRA) terms of its concatenated outputs in order, each as (number of
        outputs, (down [r, in], up [outputs, r]) or None for zeros).
    base: the same layer without low-rank terms; None: this layer has none.
    """

    norms: tuple[Norm | None, ...]
    mixer: Attention | DeltaRule
    maps: dict[str, Linear]
    act: Linear
    experts: Experts | None
    rotation: tuple[Rotation, Rotation] | None
    window: int | None
    source: int = 0
    embedded: PerLayer | None = None
    scalar: Tensor | None = None
    low: dict[str, list[LowRank]] = field(default_factory=dict)
    base: Layer | None = None

    def map(self, slot: str, x: Tensor) -> Tensor:
        """Apply one of the layer's linear layers, with low-rank (LoRA) terms, to ``x`` [B, T, in]; return [B, T, out].

        slot: name of the linear layer: "qkv", "out", "gate_up" or "down".
        """
        y, low = self.maps[slot](x), self.low.get(slot)
        return y if low is None else y + torch.cat([low_rank(x, *each) for each in low], -1)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.map("gate_up", x).chunk(2, -1)
        return self.map("down", self.act(gate) * up)

    def advance(
        self,
        x: Tensor,
        states: States,
        adapted: bool,
        plain: int = 0,
        paths: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """Run the mixer of a recurrent layer, with its linear layers, on T tokens; return outputs and new states.

        x: normalized input of the layer, [B, T, D]; the outputs are [B, T, D], too.
        states: the layer's recurrent states before the tokens, by key, each [B, ...]; the new states have the same
            keys.
        adapted: whether to apply the layer's low-rank (LoRA) terms.
        plain: number of first tokens, accepted before, that run again only for the states: their inputs are projected
            without low-rank terms, and their outputs are not meaningful.
        paths: whether token j is token i or an ancestor of it in a draft tree, bool [B, T, T]; None: a chain.
        kept: the tokens that the new states include, bool [B, T]; None: all.
        """
        assert isinstance(self.mixer, DeltaRule)
        base = self.base or self
        layer = self if adapted else base
        mapped = layer.map("qkv", x[:, plain:])
        if plain:
            mapped = torch.cat((base.map("qkv", x[:, :plain]), mapped), 1)
        out, after = self.mixer(mapped, states, paths, kept)
        return layer.map("out", out), after


class PerLayer(NamedTuple):
    """The term that a decoder layer adds to its output from a per-layer embedding of each token (Gemma 4).

    Each token has an embedding for each layer, besides the usual one. The term is after(out(act(gate(x)) * e)). The
    embedding e is the sum of a projection of the first layer's input and of a looked-up embedding, divided by the
    square root of 2.

    P is the size of a token's embedding for one layer.

    project: projection of the first layer's input, [B, T, D] to [B, T, P].
    scale: factor of this projection. before: norm of the scaled projection.
    part: columns of this layer among the looked-up embeddings of all N layers, [B, T, N P].
    gate: linear layer from D to P. out: linear layer from P to D. after: norm of the result.
    """

    project: Linear
    scale: float
    before: Norm
    part: slice
    gate: Linear
    out: Linear
    after: Norm

    def __call__(self, x: Tensor, first: Tensor, rows: Tensor, act: Linear) -> Tensor:
        """Return the term that the layer adds to the residual stream ``x``, [B, T, D].

        first: input of the first decoder layer for the same tokens, [B, T, D].
        rows: the tokens' looked-up embeddings for all N layers, [B, T, N P].
        act: activation of the gate, a function of one tensor (as ``Linear`` is) that keeps its shape [B, T, P].
        """
        own = (self.before(self.project(first) * self.scale) + rows[..., self.part]) * 2**-0.5
        return self.after(self.out(act(self.gate(x)) * own))


class Network:
    """The layers of a model of a known family as functions of PyTorch tensors, with embedding and readout.

    model: the model, with ``config`` and ``model.layers`` as in transformers.
    windows: attention window of each layer in tokens; None: no limit.
    make: makes one function of a list of linear layers with the same input; it concatenates their outputs.
    layers: the decoder layers as functions (``Layer``), in order.
    embeds: whether layers add embeddings of their own, so that a forward pass needs its token ids.
    tables: rotary tables by (rotation, number of positions).
    """

    def __init__(self, model: Any, windows: Sequence[int | None], make: Maker) -> None:
        config, decoder = model.config, model.model
        self.family, self.numbers = families.FAMILIES[config.model_type], families.numbers_of(config)
        self.dtype, self.device, self.rotary = model.dtype, model.device, decoder.rotary_emb
        self.embedding, self.final_norm = decoder.embed_tokens, norm_of(decoder.norm, self.family)
        is_gemma = self.family.fields >= families.GEMMA
        scale = config.hidden_size**0.5 if is_gemma else self.numbers.embeddings
        self.scale = None if scale == 1 else torch.tensor(scale, dtype=self.dtype)
        self.rotations = families.rotations(config)
        self.used = {each for pair in self.rotations if pair is not None for each in pair}
        self.tables = dict[tuple[Rotation, int], Tensor]()  # by number of positions
        self.layers = list[Layer]()
        size = families.embedded_per_layer(config)
        self.embeds, self.table_of_layers = bool(size), getattr(decoder, "embed_tokens_per_layer", None)
        each = zip(decoder.layers, self.rotations, windows, families.key_sources(config), strict=True)
        for n, (own, rotation, window, source) in enumerate(each):
            layer = self._layer(config, own, rotation, window, make, source)
            layer.embedded = self._per_layer(decoder, own, slice(n * size, (n + 1) * size), make) if size else None
            self.layers.append(layer)

    def _per_layer(self, decoder: Any, own: Any, part: slice, make: Maker) -> PerLayer:
        """Return the term that a decoder layer adds to its output from a per-layer embedding of each token (Gemma 4).

        decoder: the module with all layers. own: the module of the layer.
        part: the layer's columns among the per-layer embeddings of all layers.
        make: makes one function of a list of linear layers.
        """
        image: Any = decoder.per_layer_model_projection
        before, after = (
            norm_of(each, self.family) for each in (decoder.per_layer_projection_norm, own.post_per_layer_input_norm)
        )

        def project(x: Tensor) -> Tensor:
            whole = isinstance(image, BlockLinear)
            return F.linear(x, weight_rows(image, torch.arange(part.start, part.stop)) if whole else image.weight[part])

        gate, out = make([own.per_layer_input_gate]), make([own.per_layer_projection])
        return PerLayer(project, decoder.embed_tokens.embedding_dim**-0.5, before, part, gate, out, after)

    def _layer(self, config: Any, own: Any, rotation: Any, window: int | None, make: Maker, source: int) -> Layer:
        family, act = self.family, ACTIVATIONS.get(families.activation(config), F.silu)
        maps = {slot: make([module for _, module in pairs]) for slot, pairs in modules(own).items()}
        experts, mixer = None, DeltaRule(own.linear_attn) if recurrent(own) else None
        if has_experts(own):
            shared = None
            if family.shared:
                parts = own.mlp.shared_expert
                ins, down = make([parts.gate_proj, parts.up_proj]), make([parts.down_proj])
                shared = Layer((), None, {"gate_up": ins, "down": down}, act, None, None, None).mlp  # type: ignore[arg-type]
            experts = Experts(own.mlp, families.mixture_of(config), self.numbers, act, shared)
        norms = tuple(norm_of(getattr(own, name), family) if name else None for name in family.norms)
        read: Any = self.layers[source].mixer if source < len(self.layers) else None
        attention = mixer or Attention(own.self_attn, family, self.numbers.scores_cap, read)
        scalar = own.layer_scalar.detach() if family.scales_layers else None
        return Layer(norms, attention, maps, act, experts, rotation, window, source, scalar=scalar)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of token ids [B, T], scaled as the model family scales them."""
        x = weight_rows(self.embedding, ids.flatten()).view(*ids.shape, -1)
        return x if self.scale is None else x * self.scale

    def embed_for_layers(self, ids: Tensor) -> Tensor:
        """Return the per-layer embeddings (Gemma 4) of token ids [B, T]: P values for each of N layers, [B, T, N P].

        Only for models whose ``embeds`` is True.
        """
        table: Any = self.table_of_layers
        rows = weight_rows(table, ids.flatten()).view(*ids.shape, -1)
        return rows * table.embed_scale.to(rows.device, rows.dtype)

    def run(self, x: Tensor, lo: int, layers: Sequence[Layer], ctx: Pass) -> Tensor:
        """Run consecutive layers on ``x`` [B, T, D], append keys and values to the cache; return the output [B, T, D].

        lo: index of the first of ``layers`` in the model.
        layers: the layers, possibly with adapters.
        ctx: the context of the pass: positions, mask, KV cache, and ``ctx.taps``, whose entries for layers lo .. lo +
            len(layers) are set to these layers' inputs (the last one to the output).
        """
        cache, taps, end = ctx.cache, ctx.taps, lo + len(layers)
        start = cache.lengths[lo] if layers else None
        first = rows = x
        if self.embeds:
            first, rows = self.embed(ctx.known_ids()), self.embed_for_layers(ctx.known_ids())
        tables = self.tables_of(ctx)
        for index, layer in enumerate(layers, lo):
            if taps is not None and index in taps:
                taps[index] = x
            norm_in, norm_mixed, norm_mlp, norm_out = layer.norms
            h = x if norm_in is None else norm_in(x)
            if isinstance(layer.mixer, DeltaRule):
                h = cache.run_recurrent(index, h, ctx.mask.ancestors, layer.advance)
            else:
                rotation = None if layer.rotation is None else tuple(tables[each] for each in layer.rotation)
                q, k, v, gate = layer.mixer.project(layer.map("qkv", h), rotation)  # type: ignore[arg-type]
                filled = None
                if layer.source == index:
                    k, v = cache.append(index, k, v, MULTIPLE)
                else:
                    size = layer.mixer.size
                    k, v = cache.all_keys(layer.source, ctx.mask.length, layer.mixer.kv_heads, (size, size), MULTIPLE)
                    if cache.lengths[layer.source] < cache.lengths[index] + x.shape[1]:
                        filled = cache.uncommitted(layer.source)
                term = additive(ctx.mask, layer.window, layer.mixer.groups, q.dtype, filled=filled)
                h = layer.map("out", layer.mixer(q, k, v, term, gate))
            x = self._add(x, h, norm_mixed)
            h = x if norm_mlp is None else norm_mlp(x)
            if layer.experts is None:
                h = layer.mlp(h)
            else:
                routed = None if ctx.routed is None else ctx.routed[:, index]
                choose = None if ctx.choose is None else partial(ctx.choose, index)
                h = layer.experts(h, routed, choose, capturing())
            x = self._add(x, h, norm_out)
            if layer.embedded is not None:
                x = x + layer.embedded(x, first, rows, layer.act)
            x = x if layer.scalar is None else x * layer.scalar
        if taps is not None and end in taps:
            taps[end] = x
        if start is not None:  # recurrent layers count their tokens, too
            cache.lengths[lo:end] = [start + x.shape[1]] * (end - lo)
        return x

    def _add(self, x: Tensor, h: Tensor, norm: Norm | None) -> Tensor:
        """Return the residual ``x`` plus the scaled output ``h`` of a mixer or MLP, [B, T, D] each.

        norm: norm that is applied to ``h`` first; None: none.
        """
        h = h if norm is None else norm(h)
        return x + (h if self.numbers.results == 1 else h * self.numbers.results)

    def readout(self, x: Tensor, head: Linear) -> Tensor:
        """Return logits [B, T, V] of the last layer's outputs ``x`` [B, T, D]: final norm, output head, factor, cap.

        head: the output head, from normalized states [B, T, D] to [B, T, V].
        """
        logits, cap = head(self.final_norm(x)), self.numbers.logits_cap
        logits = logits if self.numbers.logits == 1 else logits * self.numbers.logits
        return cap * torch.tanh(logits / cap) if cap else logits

    def tables_of(self, ctx: Pass) -> Tables:
        """Return (cosines, signed sines) at the positions of a pass, by rotation, [B, T, 1, rotated size] each.

        The first half of the sines is negated. There is an entry for each rotation that a layer of the model uses.
        They are cached in the pass's mask if it is for the same positions, so that passes with one mask share them.
        """
        memo: dict[Any, Any] = ctx.mask.memo if ctx.positions is ctx.mask.query else {}
        if "rotary" not in memo:
            memo["rotary"] = {each: self.table(each, ctx.mask.length)[ctx.positions].unbind(-1) for each in self.used}
        return memo["rotary"]  # type: ignore[no-any-return]

    def table(self, rotation: Rotation, count: int) -> Tensor:
        """Return cosines and signed sines of positions 0, 1, .., [positions, 1, rotated size, 2].

        The first half of the sines is negated. A table is cached, and never freed or moved, because CUDA graphs read
        it.

        rotation: the kind of rotary embedding. count: number of positions that the table must have at least.
        """
        size = 1 << (max(2 * count, POSITIONS) - 1).bit_length()
        if (rotation, size) not in self.tables:
            cos, sin = rotation.tables(self.rotary, size, self.dtype).unbind(1)  # (positions, rotated / 2) each
            table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), -1)[:, None]
            self.tables[rotation, size] = table.to(self.device, torch.float32 if self.family.wide else self.dtype)
        return self.tables[rotation, size]


@torch.inference_mode()
def logits_of(
    model: NativeModel,
    ids: Tensor,
    windows: Sequence[int | None],
    choose: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return logits [T, V] of token ids ``ids`` [T], running a model's own modules one layer at a time.

    Releases the memory of weights that are mapped from files after each layer.

    windows: attention window of each layer in tokens; None: no limit.
    choose: function from a layer's index and its router logits [T, E] to the experts that tokens use, int64 [T, k];
        None: the experts with the largest logits.
    """
    network, count = Network(model, windows, side_by_side), len(model.model.layers)
    cache = KVCache(count, recurrent=[n for n, layer in enumerate(model.model.layers) if recurrent(layer)])
    positions, x = torch.arange(len(ids))[None], network.embed(ids[None])
    ctx = Pass(positions, cache.register(0, positions), cache, choose=choose, ids=ids[None])
    for n, layer in enumerate(model.model.layers):
        x = network.run(x, n, network.layers[n : n + 1], ctx)
        _release(layer)
    logits = network.readout(x, model.lm_head)[0]
    _release(model.lm_head, model.model.embed_tokens)
    return logits


def _release(*modules: nn.Module) -> None:
    """Let the operating system drop the memory of the modules' weights that are mapped from files.

    The weights stay usable: the system reads them from the files again when they are used.
    """
    for module in modules:
        for _, each in named_weights(module):
            memory.release(*(each.memory if isinstance(each, Blocks) else (each.data,)))
