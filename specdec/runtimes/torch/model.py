"""A forward pass with a cache for all families that ``families.py`` describes: what their layers compute, in PyTorch.

The PyTorch runtime runs it over stacked weights. The native kernels are checked against it over a model's own modules.
Tests compare it with transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import memory
from specdec.kvcache.cache import KVCache
from specdec.kvcache.recurrent import States
from specdec.models import families
from specdec.models.families import Rotation
from specdec.models.gguf.blocks import Blocks, named_weights, weight_rows
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
    """One decoder layer as functions.

    norms: the norms of the mixer's input and output, then of the MLP's input and output; None: there is no such norm.
    maps: the linear layers, by the names "qkv", "out", "gate_up" and "down".
    rotation: the rotary positions of queries and of keys; None: there are none.
    low: by linear layer, the low-rank terms of its outputs, in order.
    base: the same layer without low-rank terms.
    """

    norms: tuple[Norm | None, ...]
    mixer: Attention | DeltaRule
    maps: dict[str, Linear]
    act: Linear
    experts: Experts | None
    rotation: tuple[Rotation, Rotation] | None
    window: int | None
    low: dict[str, list[LowRank]] = field(default_factory=dict)
    base: Layer | None = None

    def map(self, slot: str, x: Tensor) -> Tensor:
        """Apply the linear layer ``slot``, with its low-rank terms, to ``x`` [B, T, in]."""
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
        """Run the mixer of a recurrent layer on ``x`` [B, T, D]; return its output and the new states.

        adapted: whether to apply the low-rank terms. plain: number of first tokens to which they do not apply.
        paths, kept: as in ``DeltaRule``.
        """
        assert isinstance(self.mixer, DeltaRule)
        base = self.base or self
        layer = self if adapted else base
        mapped = layer.map("qkv", x[:, plain:])
        if plain:
            mapped = torch.cat((base.map("qkv", x[:, :plain]), mapped), 1)
        out, after = self.mixer(mapped, states, paths, kept)
        return layer.map("out", out), after


class Network:
    """The layers of a model of a known family as functions of PyTorch tensors.

    windows: attention window of each layer in tokens; None: no limit.
    make: makes one function of several linear layers with the same input.
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
        each = zip(decoder.layers, self.rotations, windows, strict=True)
        self.layers = [self._layer(config, *parts, make) for parts in each]

    def _layer(self, config: Any, own: Any, rotation: Any, window: int | None, make: Maker) -> Layer:
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
        attention = mixer or Attention(own.self_attn, family, self.numbers.scores_cap)
        return Layer(norms, attention, maps, act, experts, rotation, window)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of token ids [B, T]."""
        x = weight_rows(self.embedding, ids.flatten()).view(*ids.shape, -1)
        return x if self.scale is None else x * self.scale

    def run(self, x: Tensor, lo: int, layers: Sequence[Layer], ctx: Pass) -> Tensor:
        """Run ``layers``, the first of which is layer ``lo``, on ``x`` [B, T, D]."""
        cache, taps, end = ctx.cache, ctx.taps, lo + len(layers)
        start = cache.lengths[lo] if layers else None
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
                term = additive(ctx.mask, layer.window, layer.mixer.groups, q.dtype)
                k, v = cache.append(index, k, v, MULTIPLE)
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
        if taps is not None and end in taps:
            taps[end] = x
        if start is not None:  # recurrent layers count their tokens, too
            cache.lengths[lo:end] = [start + x.shape[1]] * (end - lo)
        return x

    def _add(self, x: Tensor, h: Tensor, norm: Norm | None) -> Tensor:
        """Return ``x`` plus the output ``h`` of a mixer or MLP, [B, T, D] each. norm: norm of ``h``; None: none."""
        h = h if norm is None else norm(h)
        return x + (h if self.numbers.results == 1 else h * self.numbers.results)

    def readout(self, x: Tensor, head: Linear) -> Tensor:
        """Return logits [B, T, V] of final states ``x`` [B, T, D]: final norm, output head, logit cap."""
        logits, cap = head(self.final_norm(x)), self.numbers.logits_cap
        logits = logits if self.numbers.logits == 1 else logits * self.numbers.logits
        return cap * torch.tanh(logits / cap) if cap else logits

    def tables_of(self, ctx: Pass) -> Tables:
        """Return the rotary tables for the positions of a pass. Consecutive calls with the same mask share them."""
        memo: dict[Any, Any] = ctx.mask.memo if ctx.positions is ctx.mask.query else {}
        if "rotary" not in memo:
            memo["rotary"] = {each: self.table(each, ctx.mask.length)[ctx.positions].unbind(-1) for each in self.used}
        return memo["rotary"]  # type: ignore[no-any-return]

    def table(self, rotation: Rotation, count: int) -> Tensor:
        """Return cosines and signed sines for ``count`` positions or more, [positions, 1, rotated elements, 2].

        A table stays where it is: captured passes read it.
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
    """Return logits [T, V] of token ids [T], computed by the model's own modules, one layer at a time.

    Releases the memory of mapped weights after each layer. windows: as in ``Network``. choose: as in ``Pass``.
    """
    network, count = Network(model, windows, side_by_side), len(model.model.layers)
    cache = KVCache(count, recurrent=[n for n, layer in enumerate(model.model.layers) if recurrent(layer)])
    positions, x = torch.arange(len(ids))[None], network.embed(ids[None])
    ctx = Pass(positions, cache.register(0, positions), cache, choose=choose)
    for n, layer in enumerate(model.model.layers):
        x = network.run(x, n, network.layers[n : n + 1], ctx)
        _release(layer)
    logits = network.readout(x, model.lm_head)[0]
    _release(model.lm_head, model.model.embed_tokens)
    return logits


def _release(*modules: nn.Module) -> None:
    """Let the system drop the memory pages of weights that are mapped from files."""
    for module in modules:
        for _, each in named_weights(module):
            memory.release(*(each.memory if isinstance(each, Blocks) else (each.data,)))
