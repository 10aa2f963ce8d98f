"""The native runtime: decoder layers as one call into compiled kernels.

Builds the kernels' inputs (packed weights, pointers, masks) and calls them. Raises SpecDecError for machines and models
that it does not support. Weights of a GGUF file keep their codes and scales.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specdec.base import cores, memory
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import RowMask
from specdec.kvcache.recurrent import KernelStates
from specdec.models import families, identity
from specdec.models.gguf.blocks import (
    BlockExperts,
    BlockLinear,
    Blocks,
    ExpertBlocks,
    bits,
    densify,
    expert,
    matrix,
    named_weights,
    quantize,
    quantize_experts,
)
from specdec.models.native_model import NativeModel
from specdec.models.tensor_file import PLAIN
from specdec.runtimes import decoder_layer
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DraftPath, DraftRoots, Masks, Nodes, TreeLimits
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.native import library, linear, mixer
from specdec.runtimes.native.drafting import TreeDrafter
from specdec.runtimes.native.experts import MappedExperts
from specdec.runtimes.native.forecasts import Forecasts
from specdec.runtimes.native.library import (
    INT,
    POINTER,
    Call,
    Layer,
    Linear,
    Model,
    SequenceArgs,
    done,
    pointer,
)
from specdec.runtimes.native.linear import Memory, Packed, RowTable
from specdec.runtimes.native.mixer import ordered
from specdec.runtimes.native.packed_file import DRAFTS, MOST_DRAFTS, ModelFile, PackedFile, drop_old, using
from specdec.runtimes.target import TOKEN_RATIO, GrowingLinear, Pass, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
FAMILIES = tuple(families.FAMILIES)
ROUNDED = {"int8": "Q8_0", "int4": "Q4_1"}  # formats that the layers' weights are quantised to
EXPERT_SHARE = 0.8  # share of the free memory that a mixture's experts may take
# A head of more than this share of the layers' bytes is screened (``Packed.screen``), and of more than so many bytes: a
# smaller one may be in a cache, from where all of it comes as fast.
SCREENED_SHARE, SCREENED_BYTES = 0.1, 64 << 20
BITS = 16, 8, 4, 5, 4, 5, 6, 4  # bits of a weight, by kind of tiles: BF16, Q8, Q4, Q5, K4, K5, K6, MX


class NativeTarget(Target):
    """The native runtime, without gradients.

    A token's result is the same bits whatever else is in its pass; of quantised weights, which are multiplied with
    activations in 8 bits, also in every instruction set. Weights that only drafts use (those with merged adapters,
    reduced heads) are quantised to 8 bits, large ones to 4. Adapters must not change after their first pass. Raises
    SpecDecError for what it does not support.

    weights, kv_cache: as in ``make_target``.
    expert_cache: the share (float) or bytes (int) of a mixture's experts that is in memory; None: all of them, if there
    is room.
    expert_prefetch: whether experts are read ahead by forecasts.
    kept: the file that has the model's packed weights, or gets them (``native_target``).
    """

    runtime = "native"
    ragged = True
    experts: MappedExperts | None

    def __init__(
        self,
        model: NativeModel | PreTrainedModel,
        weights: str = "auto",
        kv_cache: str = "auto",
        expert_cache: float | None = None,
        expert_prefetch: bool = False,
        kept: ModelFile | None = None,
    ) -> None:
        refuse_unsupported(model)
        self.lib = library.load()
        kind, config = model.config.model_type, model.config
        if kind not in FAMILIES:
            raise SpecDecError(f"model type '{kind}' is unknown to the native runtime (it knows {', '.join(FAMILIES)})")
        if model.dtype != torch.bfloat16 or model.device.type != "cpu":
            raise SpecDecError(f"the native runtime computes in bfloat16 on a CPU, not {model.dtype} on {model.device}")
        families.check_fields(config)
        if weights == "dense":
            densify(model)
        super().__init__(model, identity.sample if kept is None else kept.sample)
        self.kept = kept
        decoder: Any = model.model
        recurrent = [decoder_layer.recurrent(layer) for layer in decoder.layers]
        if all(recurrent):
            raise SpecDecError(
                "the native runtime takes models that have attention; all layers of this one are recurrent"
            )
        attention = decoder.layers[recurrent.index(False)].self_attn
        linear.unpack_here(model)
        decoder_layer.check_rotary(decoder.rotary_emb)
        self.family, self.numbers = families.FAMILIES[kind], families.numbers_of(config)
        self.head_dim = int(attention.head_dim)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        if self.head_dim % 32 or self.head_dim > 256 or self.heads % self.kv_heads:
            raise SpecDecError(
                f"the native runtime takes heads of 32, 64, ... 256, equally many for each key head; this '{kind}' "
                f"model has {self.heads} heads of {self.head_dim} and {self.kv_heads} key heads"
            )
        sizes_of_mixer = families.mixer_of(config)
        self._states = mixer.state_shape(sizes_of_mixer)
        self._attention = [n for n, other in enumerate(recurrent) if not other]
        self.recurrent_layers = frozenset(range(self.num_layers)) - {*self._attention}
        if weights in ROUNDED:
            for layer in decoder.layers:
                _round(layer, ROUNDED[weights], paged=expert_cache is not None)
        self.int8_cache = False
        self._orders = [mixer.row_orders(layer) for layer in decoder.layers]
        self.mixture = families.mixture_of(config)
        self._layers = (Layer * self.num_layers)()
        self._alive: list[Any] = []  # objects that the structures point to
        self._experts: list[Packed] = []
        if expert_cache is not None and not self.mixture.experts:
            raise SpecDecError(f"model type '{kind}' has no experts; leave out the expert cache")
        if expert_cache is None:
            expert_cache = _room_for_experts(model)
        self.experts = None if expert_cache is None else MappedExperts(expert_cache)
        rotations = families.rotations(config)
        self.rotations = list(dict.fromkeys(each for pair in rotations if pair is not None for each in pair))
        for n, (layer, struct, pair) in enumerate(zip(decoder.layers, self._layers, rotations, strict=True)):
            struct.place = recurrent[:n].count(recurrent[n])
            self._pack_layer(n, layer, ROUNDED.get(weights))
            struct.rotary_q, struct.rotary_k = (-1, -1) if pair is None else map(self.rotations.index, pair)
        if self.experts is not None:
            self.experts.begin(self.mixture.taken)
            if expert_prefetch:
                self.experts.forecasts = Forecasts(self._routers(decoder.layers), self.mixture.taken)
            self._alive.append(self.experts)
        demand = None if self.experts is None else ctypes.cast(self.experts.call, POINTER)
        self.inner = max(*(layer.down.inp for layer in self._layers), *(item.inp for item in self._experts), 0)
        self.rotary, self._positions = decoder.rotary_emb, 0  # how many of them the tables have
        rotated = 2 * max((table.shape[2] for table in self._rotary_tables(8)[0]), default=0)
        if rotated < self.head_dim and any(each.beta for each in self.rotations):
            raise SpecDecError(
                "the native runtime scales queries by position only if whole heads rotate; here a part of each rotates"
            )
        self.final_norm, self.eps = self._norm(decoder.norm), float(config.rms_norm_eps)
        scale = float(attention.scaling)
        packed = [*self._experts, *(item for item in self._alive if isinstance(item, Packed))]
        kinds = set().union(*(item.kinds for item in packed))
        rounded = any(item.rounded for item in packed)
        if rounded:
            self.activations = "8 bits"
        sizes = self.hidden_size, self.heads, self.kv_heads, self.head_dim, self.inner, rotated
        act = families.ACTIVATIONS.index(families.activation(config))
        flags = (
            rounded,
            *self.mixture,
            self.family.rounds_once,
            act,
            self.family.norm_over_heads,
            len(self.rotations),
        )
        numbers = self.eps, scale, self.numbers.scores_cap, *self.numbers[-2:], demand
        self._sizes = (*sizes, *flags, self.family.gated, *sizes_of_mixer, *numbers)
        self._model = Model(*self._sizes, ctypes.addressof(self._layers))
        self.window_sizes = sorted(set(self.windows), key=str)
        self._spans = (INT * len(self.window_sizes))(*(window or 0 for window in self.window_sizes))
        self._window = (INT * self.num_layers)(*(self.window_sizes.index(w) for w in self.windows))
        self.embedding = RowTable(matrix(decoder.embed_tokens), self.numbers.embeddings)
        self._heads: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()
        self._readout: Packed | None = None  # the model's own
        self._no_taps = (POINTER * (self.num_layers + 1))()
        # With adapters merged: the model, its layers, and the maps of those that differ.
        self._changed: WeakKeyDictionary[Adapters, tuple[Model, Any, dict[int, Any]]] = WeakKeyDictionary()
        self.weight_format = " and ".join(str(width) for width in sorted({BITS[kind] for kind in kinds})) + " bits"
        if weights in ROUNDED:
            self.weight_format += ", rounded"
        self.head(None)
        if kept is not None:
            kept.write()
        checked = kept.notes.get(self.lib.level) if kept is not None and kept.complete and not self._experts else None
        if isinstance(checked, float) and checked >= 0:  # by the process that packed
            self.logit_difference = checked
        else:
            with memory.releasing((*decoder.layers, decoder.embed_tokens, self.own_head), _mapped):
                self.logit_difference = check_logits(self)
            if kept is not None:
                kept.notes[self.lib.level] = self.logit_difference
        if kv_cache == "int8":  # after the self-check: it is lossy
            self.int8_cache, self.kv_cache = True, "8 bits (lossy)"
        self._release(*_mapped(model))  # parts of large pages may be back with their neighbours
        memory.trim_heap()

    @property
    def kernels(self) -> str:
        return library.version()

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        return KVCache(self.num_layers, batch, "cpu", self.int8_cache, self._attention, recurrent, self._states)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding(ids)

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        y = x.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=True)
        taps = {} if ctx.taps is None else ctx.taps
        for layer in taps:
            if lo <= layer < hi:
                taps[layer] = torch.empty_like(y)
        if lo < hi:
            model, call, _alive = self._call(y, lo, hi, ctx)
            done(self.lib.specdec_layers(ctypes.byref(model), ctypes.byref(call)))
            if self.experts is not None:
                self.experts.end_pass()
        if hi in taps and lo <= hi:
            taps[hi] = y
        return y

    def draft_rows(
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits, masks: Masks | None = None
    ) -> list[Nodes] | None:
        size = limits.levels, limits.width, len(roots.tokens)
        if (self, size) not in path.made:
            path.made[self, size] = [] if TreeDrafter.supports(self, path, *size) else None
        idle = path.made[self, size]  # drafters that no thread is using; None: not supported
        if idle is None:
            return None
        try:
            drafter = idle.pop()
        except IndexError:
            drafter = TreeDrafter(self, path, *size)
        if drafter.tokens is not path.tokens:
            drafter.follow(self, path)
        found = drafter(self, cache, roots, limits, masks)
        if self.experts is not None:
            self.experts.end_pass()
        idle.append(drafter)
        return found

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        packed = self.head(head)
        return packed(x.reshape(-1, x.shape[-1]), self.final_norm, self.eps, self.family.rounds_once).view(
            *x.shape[:2], -1
        )

    def preparing(self, head: nn.Linear) -> Generator[None]:
        if head in self._heads:
            return
        packed = yield from linear.packing(head.weight, head.bias, self.numbers.logits, self.numbers.logits_cap)
        with self.lock:
            self._heads.setdefault(head, packed)

    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        (batch, t, _), found = x.shape, self.head(None).largest(x, self.final_norm, self.eps, self.family.rounds_once)
        rows = [found] if batch == 1 else [found[start : start + t] for start in range(0, batch * t, t)]
        return [*(tensor.tolist() for tensor in also), rows]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a pass over one token reads: those of all layers and of the output head."""
        return self.bytes_of_layers + self.head(None).nbytes

    @property
    def token_ratio(self) -> float:
        maps = [item for item in self._alive if isinstance(item, Packed)]
        weights, size = sum(item.inp * item.width for item in maps), sum(item.nbytes for item in maps)
        return TOKEN_RATIO["cpu"] * weights / max(size, 1)

    @property
    def bytes_of_layers(self) -> int:
        """Bytes of weights that a pass of one token through the layers reads."""
        whole = sum(item.nbytes for item in self._alive if isinstance(item, Packed))
        experts, taken, _ = self.mixture
        return whole + sum(item.nbytes for item in self._experts) * taken // max(experts, 1)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        with self.lock:
            modules = decoder_layer.modules(self.model.model.layers[layer])  # type: ignore[union-attr, index]
        return {path: (module.in_features, module.out_features) for each in modules.values() for path, module in each}

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> tuple[Model, Call, list[Any]]:
        """The kernels' arguments for layers [lo, hi) on ``x``, and the objects that they point to."""
        cache, mask, taps = ctx.cache, ctx.mask, ctx.taps or {}
        assert isinstance(mask, RowMask)
        model = self._model if ctx.adapters is None else self._merged(ctx.adapters, lo, hi)
        call, positions = self._new_call(lo, hi), ctx.positions.contiguous()
        sequences, *alive = self.place(call, cache, lo, hi, mask.counts, mask.whole)
        alive += [sequences, positions, mask]
        call.x, call.positions = x.data_ptr(), positions.data_ptr()
        call.routed = pointer(ctx.routed)
        if not mask.chains:
            for row, sequence in enumerate(sequences):
                if mask.trees[row] is not None:
                    trees = (POINTER * len(self.window_sizes))(
                        *(pointer(mask.tree(row, window)) for window in self.window_sizes)
                    )
                    sequence.trees = ctypes.addressof(trees)
                    alive.append(trees)
        if any(lo <= layer < hi for layer in taps):
            tapped = (POINTER * (self.num_layers + 1))()
            for layer in taps:
                if lo <= layer < hi:
                    tapped[layer] = taps[layer].data_ptr()
            alive.append(tapped)
            call.taps = ctypes.addressof(tapped)
        return model, call, alive

    def draft_call(self, lo: int, hi: int, adapters: Adapters) -> tuple[Model, Call]:
        """As in ``Kernels``."""
        return self._merged(adapters, lo, hi), self._new_call(lo, hi)

    def place(
        self, call: Call, cache: KVCache, lo: int, hi: int, counts: Sequence[int], whole: bool = False
    ) -> tuple[Any, ...]:
        """As in ``Kernels``; the first object is the array of sequences. whole: as in ``RowMask``."""
        ahead, rows = cache.lengths[lo] - cache.committed, cache.entries
        cache.claim(lo, hi, counts, self.kv_heads, self.head_dim, torch.bfloat16)
        sequences = (SequenceArgs * len(rows))()
        for sequence, row, count in zip(sequences, rows, counts, strict=True):
            sequence.tokens, sequence.start, sequence.committed = count, row.count + ahead, row.count
            sequence.capacity, sequence.keys, sequence.values = row.pointers
            if isinstance(row.states, KernelStates):
                held = row.states.arguments(ahead, count, whole)
                sequence.held, sequence.slots, sequence.states, sequence.ahead, sequence.inputs, sequence.pending = held
        rotary = self._rotary_tables(cache.lengths[lo])  # no position is beyond its slot
        call.count, call.tokens, call.cache = len(rows), sum(counts), cache.int8
        call.sequences, call.rotary = ctypes.addressof(sequences), ctypes.addressof(rotary[1])
        return sequences, rotary, cache.data, cache.states

    def _new_call(self, lo: int, hi: int) -> Call:
        """A call with the fields that depend neither on a cache nor on states."""
        call = Call(0, 0, lo, hi, cores.threads(), len(self.window_sizes))
        call.spans, call.window = ctypes.addressof(self._spans), ctypes.addressof(self._window)
        call.taps = ctypes.addressof(self._no_taps)
        return call

    def head(self, head: nn.Linear | None) -> Packed:
        """The output head, or ``head``, packed at first use."""
        if head is None and self._readout is not None:
            return self._readout
        module: Any = self.own_head if head is None else head
        with self.lock:
            packed = self._heads.get(module)
            if packed is None:
                packed = self._pack_head(module) if head is None else self._pack_draft_head(head)
                self._heads[module] = packed
            if head is None:
                self._readout = packed
        return packed

    def reduced_head(self, token_ids: Tensor, lasting: bool = False) -> nn.Linear:
        full = self.own_head
        if not lasting or not isinstance(full, BlockLinear):
            return super().reduced_head(token_ids)
        rows = token_ids if full.blocks.rows is None else full.blocks.rows[token_ids.long()]
        bias = None if full.bias is None else full.bias.detach()[token_ids.long()]
        head = BlockLinear(replace(full.blocks, rows=rows.int().contiguous()), bias, full.dtype)  # read at first use
        head.unpack = full.unpack
        return head.requires_grad_(False)

    # -- what is prepared once --------------------------------------------------------------------------------------

    def _pack_head(self, module: Any) -> Packed:
        """The model's own output head, packed."""
        weight, numbers = matrix(module), (self.numbers.logits, self.numbers.logits_cap)
        packed = Packed([weight], module.bias, False, *numbers, kept=self.kept)
        if isinstance(weight, Blocks) and packed.nbytes > max(SCREENED_SHARE * self.bytes_of_layers, SCREENED_BYTES):
            packed.screen(weight, self.kept)
        self._release(weight)
        return packed

    def _pack_draft_head(self, module: Any) -> Packed:
        """A head for drafts, packed. One in blocks is wanted by later processes, too."""
        weight, name = matrix(module), None
        if isinstance(weight, Blocks) and self.kept is not None:
            name = self.kept.name(weight)

        def pack(file: PackedFile | None) -> Packed:
            made = None
            if isinstance(module, GrowingLinear):
                module.memory.packed = module.memory.packed or linear.GrowingTiles(*module.memory.values.shape)
                made = module.memory.packed.extend(weight)
            elif file is not None:
                made = linear.draft_tiles(weight.shape, lambda: weight, "head", file)
            numbers = self.numbers.logits, self.numbers.logits_cap
            packed = Packed([weight], module.bias, draft_only=True, scale=numbers[0], cap=numbers[1], made=made)
            release(weight)
            return packed

        return self._keeping(name, weight.shape.numel(), pack)

    def _keeping(self, name: str | None, weights: int, pack: Callable[[PackedFile | None], T]) -> T:
        """``pack`` with a file for so many ``weights`` for drafts. name: of what they depend on; None: not kept."""
        if self.kept is None or name is None:
            return pack(None)
        digest = hashlib.sha256(f"{metadata.version('specdec-m2r2')} {name}".encode()).hexdigest()
        made = using(self.kept.of_drafts(digest, 2 * weights), pack)
        drop_old(self.kept.path.parent, DRAFTS, MOST_DRAFTS)
        return made

    def _pack_layer(self, index: int, layer: Any, rounding: str | None) -> None:
        struct, orders = self._layers[index], self._orders[index]
        for slot, pairs in mixer.slots(layer).items():
            rates = slot == "rates"  # few, and needed exactly: in 16 bits
            whole = [module.weight.detach() if rates else matrix(module) for _, module in pairs]
            weights = [ordered(weight, orders.get(path)) for (path, _), weight in zip(pairs, whole, strict=True)]
            biases = [module.bias for _, module in pairs]
            bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
            if any(weight.shape[0] % (16 if rates else 32) for weight in weights):
                raise SpecDecError(
                    f"the native runtime takes multiples of 32 outputs; '{pairs[0][0]}' does not have them"
                )
            packed = Packed(weights, bias, scale=self._scale(slot), kept=self.kept)
            self._release(*(matrix(module) for _, module in pairs))
            self._alive.append(packed)
            setattr(struct, slot, packed.struct)
        if decoder_layer.has_experts(layer):
            self._pack_experts(index, layer.mlp, rounding)
        if decoder_layer.recurrent(layer):
            struct.tiled = not isinstance(mixer.columns(matrix(layer.linear_attn.out_proj)), slice)
            for name, values in mixer.parameters(layer.linear_attn, self.model.config.rms_norm_eps).items():
                self._alive.append(values)
                setattr(struct, name, values.data_ptr())
        attention = getattr(layer, "self_attn", None)
        places = zip(("in", "attended", "mlp", "out"), self.family.norms, strict=True)
        norms = {place: getattr(layer, name) for place, name in places if name}
        norms |= {n: getattr(attention, f"{n}_norm") for n in "qk" if hasattr(attention, f"{n}_norm")}
        for name, module in norms.items():
            weight = self._norm(module)
            self._alive.append(weight)
            setattr(struct, f"norm_{name}", weight.data_ptr())
        if attention is not None and hasattr(attention, "sinks"):
            self._alive.append(attention.sinks.detach().float())
            struct.sinks = self._alive[-1].data_ptr()

    def _pack_experts(self, index: int, mlp: Any, rounding: str | None) -> None:
        """The router and the experts of a layer. rounding: the format that those in numbers are quantised to."""
        struct = self._layers[index]
        module = decoder_layer.router(mlp)
        weight = module.weight.detach()
        if hasattr(mlp, "shared_expert_gate"):
            weight = torch.cat((weight, mlp.shared_expert_gate.weight.detach()))
        router = Packed([weight], getattr(module, "bias", None))
        struct.router = router.struct
        self._alive.append(router)
        gates, sums = list[Packed](), list[Packed]()

        def matrices(number: int) -> tuple[Any, ...]:
            gate_up, down, *biases = expert(mlp.experts, number)
            if rounding is not None and isinstance(down, Tensor):
                gate_up, down = [quantize(each, rounding) for each in gate_up], quantize(down, rounding)
            return gate_up, down, *biases

        def pack(number: int, place: Memory | None = None) -> None:
            gate_up, down, *biases = matrices(number)
            gates.append(Packed(gate_up, biases[0], memory=place))
            sums.append(Packed([down], biases[1], scale=self.numbers.results, memory=place))
            release(*gate_up, down)

        if self.experts is not None:
            gate_up, down, *_ = matrices(0)
            weights = sum(math.prod(each.shape) for each in (*gate_up, down)) * self.mixture.experts
            self.experts.add(index, self.mixture.experts, weights, pack)
        else:
            for number in range(self.mixture.experts):
                pack(number)
        for each in gates, sums:
            if len({item.rounded for item in each}) > 1:
                raise SpecDecError("the native runtime takes a layer's experts all in 16 bits or none; these are mixed")
        made = [(Linear * len(each))(*(item.struct for item in each)) for each in (gates, sums)]
        struct.gates, struct.sums = map(ctypes.addressof, made)
        self._experts += gates + sums
        self._alive.append(made)

    def _routers(self, layers: Any) -> dict[int, Tensor]:
        """The routers [E, D] of layers with experts, as they act on the residual at unit RMS."""
        norm = dict(zip(("in", "attended", "mlp", "out"), self.family.norms, strict=True))["mlp"]
        routers = {
            n: decoder_layer.router(layer.mlp) for n, layer in enumerate(layers) if decoder_layer.has_experts(layer)
        }
        return {n: each.weight.detach().float() * self._norm(getattr(layers[n], norm)) for n, each in routers.items()}

    def _norm(self, module: Any) -> Tensor:
        """The factors of a norm [features] (float32)."""
        weight: Tensor = module.weight.detach().float()
        return 1 + weight if self.family.around_zero else weight

    def _scale(self, slot: str) -> float:
        """The factor of what the maps of a slot return."""
        return self.numbers.results if slot in ("out", "down") else 1.0

    def _merged(self, adapters: Adapters, lo: int, hi: int) -> Model:
        """The model with ``adapters`` merged into layers [lo, hi) and quantised, for drafts. Each is made once."""
        if not any(adapters.changes(layer) for layer in range(lo, hi)):
            return self._model
        with self.lock:
            if adapters not in self._changed:
                own = (Layer * self.num_layers)(*self._layers)
                self._changed[adapters] = Model(*self._sizes, ctypes.addressof(own)), own, {}
            model, layers, packed = self._changed[adapters]
            if missing := [layer for layer in range(lo, hi) if layer not in packed]:

                def merge(file: PackedFile | None) -> dict[int, Any]:
                    return {layer: self._merge(layer, adapters, file) for layer in missing}

                weights = sum(math.prod(shape) for layer in missing for shape in self.linears(layer).values())
                name = f"{missing} {adapters.digest()}" if adapters.lasting else None
                for layer, (struct, maps) in self._keeping(name, weights, merge).items():
                    layers[layer], packed[layer] = struct, maps
        return model

    def _merge(self, layer: int, adapters: Adapters, file: PackedFile | None) -> tuple[Layer, list[Packed]]:
        struct = Layer.from_buffer_copy(self._layers[layer])
        factors, block, alive = adapters.factors(layer), self.block(layer), list[Packed]()
        neurons, orders = adapters.kept(layer), self._orders[layer]
        mlp = None if neurons is None else gated_mlp(block)
        narrow = {} if mlp is None or neurons is None else mlp.shapes(len(neurons))

        def merged(pairs: Sequence[tuple[str, nn.Linear]]) -> Tensor:
            """The weight of a slot, as it is packed."""
            parts = list[Tensor]()
            for path, module in pairs:
                given = mlp.weight(path, neurons) if path in narrow else module.weight.detach()  # type: ignore
                weight = given.float()
                if path in factors:
                    down, up = (factor.detach().float() for factor in factors[path])
                    weight = weight + up @ down
                weight = weight[:, mixer.columns(matrix(block.get_submodule(path)))]
                parts.append(ordered(weight.bfloat16(), orders.get(path)))
                release(matrix(module))
            memory.trim_heap()  # freed memory would add to the peak of the next slot
            return torch.cat(parts)

        for slot, pairs in mixer.slots(block).items():
            changes = any(path in factors for path, _ in pairs) or pairs[0][0] in narrow
            if not changes and all(isinstance(module, BlockLinear) for _, module in pairs):
                continue  # it is read in its own bits
            biases = [mlp.bias(path, neurons) if path in narrow else module.bias for path, module in pairs]  # type: ignore
            bias = None if biases[0] is None else torch.cat([each.detach() for each in biases])  # type: ignore[union-attr]
            sizes = [narrow.get(path) or (module.in_features, module.out_features) for path, module in pairs]
            outs = [len(orders.get(path, range(out))) for (path, _), (_, out) in zip(pairs, sizes, strict=True)]
            shape, weight = (sum(outs), sizes[0][0]), functools.partial(merged, pairs)
            of_file = file is not None and all(self._is_kept(module) for _, module in pairs)
            made = linear.draft_tiles(shape, weight, f"{layer} {slot}", file) if file and of_file else None
            whole = weight() if made is None else torch.empty(*shape, device="meta")
            alive.append(Packed([whole], bias, draft_only=True, scale=self._scale(slot), made=made))
            setattr(struct, slot, alive[-1].struct)
        return struct, alive

    def _release(self, *matrices: Tensor | Blocks) -> None:
        """Release what packing has read of a mapped file."""
        if self.kept is None or not self.kept.complete:  # else the packed file had all of it
            release(*matrices)

    def _is_kept(self, module: nn.Module) -> bool:
        """Whether a map's weight is that of the model's file."""
        return self.kept is not None and self.kept.name(matrix(module)) is not None

    def _rotary_tables(self, count: int) -> tuple[list[Tensor], Any]:
        """The tables of all ``rotations`` for at least ``count`` positions, and pointers to them."""
        if count > self._positions:
            with self.lock:
                if count > self._positions:
                    every = max(count, min(2 * count, self.context), 512)
                    tables = [each.tables(self.rotary, every, self.dtype) for each in self.rotations]
                    pointers = (POINTER * len(tables))(*(table.data_ptr() for table in tables))
                    self._tables, self._positions = (tables, pointers), every
        return self._tables


def native_target(
    model: NativeModel | PreTrainedModel,
    weights: str,
    kv_cache: str,
    expert_cache: float | None,
    expert_prefetch: bool,
    keep: bool,
) -> NativeTarget:
    """The target of a model. keep: read its packed weights beside its cache entry, or write them, if it has one."""

    def make(file: ModelFile | None) -> NativeTarget:
        return NativeTarget(model, weights, kv_cache, expert_cache, expert_prefetch, kept=file)

    keep = keep and weights == "auto" and expert_cache is None and library.runs()
    origin = getattr(model, "origin", None) if keep else None
    return using(None if origin is None else ModelFile(origin), make)


def _round(layer: nn.Module, kind: str, paged: bool) -> None:
    """Quantise the linear maps of a decoder layer to ``kind``, except those in as few or fewer bits.

    paged: whether experts stay on the disk: those in a file are then quantised one by one as they are packed.
    """
    for path, module in (pair for pairs in mixer.slots(layer).values() for pair in pairs):
        if not isinstance(module, BlockLinear) or bits(module.blocks.kind) > bits(kind):
            made = BlockLinear(quantize(module.weight, kind), module.bias, module.weight.dtype)
            layer.set_submodule(path, made)
    mlp: Any = layer.mlp
    if not decoder_layer.has_experts(layer):
        return
    of_file = isinstance(mlp.experts, BlockExperts)
    if not of_file or (mlp.experts.down[0].kind in PLAIN and not paged):
        mlp.experts = quantize_experts(mlp.experts, kind)


def _room_for_experts(model: nn.Module) -> int | None:
    """Bytes that are free for a mixture's experts, if these need more; else None."""
    experts = others = 0
    for name, weight in named_weights(model):
        parts = weight.matrices if isinstance(weight, ExpertBlocks) else (weight,)
        size = sum(part.data.nbytes for part in parts)
        experts, others = experts + size * (".experts." in name), others + size * (".experts." not in name)
    room = memory.free_memory(torch.device("cpu")) - others
    return max(int(EXPERT_SHARE * room), 2) if experts > EXPERT_SHARE * room and experts else None


def release(*matrices: Tensor | Blocks) -> None:
    """Release the memory of matrices in mapped files."""
    memory.release(*(each.data if isinstance(each, Blocks) else each for each in matrices))


def _mapped(module: nn.Module) -> list[Tensor]:
    """The memory of the weights of ``module``."""
    weights = (weight for _, weight in named_weights(module))
    return [part for each in weights for part in (each.memory if isinstance(each, Blocks) else (each,))]
