"""The native runtime: decoder layers as one call into compiled kernels, on a CPU and in bfloat16.

Builds the kernels' arguments for a pass (pointers to keys, values and masks) and calls them. The weights are those of
``packing.PackedModel``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base import cores, memory
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Chunk, RowMask
from specdec.kvcache.recurrent import KernelStates
from specdec.models import families, identity
from specdec.models.gguf.blocks import BlockLinear, densify
from specdec.models.native_model import AnyModel
from specdec.runtimes import decoder_layer
from specdec.runtimes.checks import check_logits, refuse_unsupported
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.draft_path import DeviceTree, DraftPath, DraftRoots, Nodes, TreeLimits
from specdec.runtimes.native import library, linear, mixer, pages
from specdec.runtimes.native.drafting import TreeDrafter
from specdec.runtimes.native.library import INT, POINTER, Call, Model, SequenceArgs, done, pointer
from specdec.runtimes.native.linear import Packed
from specdec.runtimes.native.packed_file import ModelFile, using
from specdec.runtimes.native.packing import ROUNDED, PackedModel, mapped
from specdec.runtimes.target import TOKEN_RATIO, Pass, Target, TokenCosts

FAMILIES = tuple(families.FAMILIES)
ATTENTION_COST = 2.0  # of multiplying by a key or value, in multiplications by a weight


class NativeTarget(Target):
    """The native runtime: runs layers by compiled kernels on a CPU, in bfloat16, without gradients.

    The result of a token has the same bits whatever else is in its pass. With quantized weights, which are multiplied
    with activations in 8 bits, it also has the same bits in every instruction set. Weights that only drafts use (layers
    with merged adapters, reduced heads) are quantized to 8 bits, large ones to 4. Adapters must not change after their
    first pass.

    lib: the loaded library of kernels (``library.load``).
    packed: the model's weights as the kernels read them.
    final_norm, eps, embedding, experts: the attributes of ``packed`` with these names.
    int8_cache: whether keys and values are stored in 8 bits.
    rotary: the model's rotary embedding module.
    window_sizes: the distinct attention windows of the layers, in tokens; None: no limit.
    """

    runtime = "native"
    ragged = True

    def __init__(
        self,
        model: AnyModel,
        weights: str = "auto",
        kv_cache: str = "auto",
        expert_cache: float | None = None,
        expert_prefetch: bool = False,
        kept: ModelFile | None = None,
        like: NativeTarget | None = None,
    ) -> None:
        """Pack the weights of ``model``, and compare the logits of a short pass with those of the model's own forward.

        weights: "auto": as loaded; "dense": dequantized; "int8", "int4": layers are quantized.
        kv_cache: "auto": keys and values in bfloat16; "int8": in 8 bits.
        expert_cache: how many of a mixture's experts stay in memory, as a share (float) or in bytes (int); None: all,
            or as many as fit.
        expert_prefetch: whether experts are read ahead by forecasts.
        kept: the file of the model's packed weights, to read or to write; None: they are only packed in memory.
        like: a target of the same family with the same output head. Its packed head serves both, and its logit
            difference is taken without another comparison. None: there is none.

        Raises SpecDecError for a model or a machine that is not supported.
        """
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
        decoder: Any = model.model
        recurrent = [decoder_layer.recurrent(layer) for layer in decoder.layers]
        if all(recurrent):
            raise SpecDecError(
                "the native runtime takes models that have attention; all layers of this one are recurrent"
            )
        linear.unpack_here(model)
        decoder_layer.check_rotary(decoder.rotary_emb)
        self._states = mixer.state_shape(families.mixer_of(config))
        self.recurrent_layers = frozenset(n for n, other in enumerate(recurrent) if other)
        rounding = ROUNDED.get(weights)
        self.packed = PackedModel(model, self.lock, self.own_head, kept, rounding, expert_cache, expert_prefetch)
        self.experts = self.packed.experts
        self.embedding = self.packed.embedding
        self.final_norm = self.packed.final_norm
        self.eps = self.packed.eps
        self.int8_cache = False
        self.rotary = decoder.rotary_emb
        self._positions = 0  # number of positions in the rotary tables
        if self.packed.rounded:
            self.activations = "8 bits"
        self.window_sizes = sorted(set(self.windows), key=str)
        self._spans = (INT * len(self.window_sizes))(*(window or 0 for window in self.window_sizes))
        self._window = (INT * self.num_layers)(*(self.window_sizes.index(w) for w in self.windows))  # index in _spans
        self._windowed, self._longest_window = self._sliding()
        self._no_taps = (POINTER * (self.num_layers + 1))()
        self.weight_format = self.packed.weight_format + (", rounded" if rounding else "")
        if like is not None:
            self.packed.share_heads(like.packed)
        self.head(None)
        if kept is not None:
            kept.write()
        whole = kept is not None and kept.complete and not self.packed.expert_maps
        checked = kept.notes.get(self.lib.level) if kept is not None and whole else None
        if isinstance(checked, float) and checked >= 0:  # by the process that packed
            self.logit_difference = checked
        elif like is not None:
            self.logit_difference = like.logit_difference
        else:
            with memory.releasing((*decoder.layers, decoder.embed_tokens, self.own_head), mapped):
                self.logit_difference = check_logits(self)
            if kept is not None:
                kept.notes[self.lib.level] = self.logit_difference
        if kv_cache == "int8":  # after the self-check: it is lossy
            self.int8_cache = True
            self.kv_cache = "8 bits (lossy)"
        self.packed.release(*mapped(model))  # reading a part of a large page may have loaded its neighbors again
        memory.trim_heap()

    @property
    def kernels(self) -> str:
        return library.version()

    def new_cache(self, batch: int = 1) -> KVCache:
        recurrent = sorted(self.recurrent_layers)
        kinds = self.int8_cache, [*self.packed.buffers.values()], recurrent, self._states
        sliding, widths = (self._longest_window, self._windowed), [count * size for count, size in self.packed.buffers]
        return KVCache(self.num_layers, batch, "cpu", *kinds, self.context, *sliding, widths)

    def _sliding(self) -> tuple[list[int], int]:
        """Find the layers whose keys and values can be dropped when they are behind the attention window.

        No layer with full attention may read them: some layers read another layer's keys and values.

        Returns the numbers of these layers, and the longest of their windows in tokens (0 if there are none).
        """
        seeing = dict[int, list[int | None]]()
        for source, window in zip(self.packed.sources, self.windows, strict=True):
            seeing.setdefault(source, []).append(window)
        layers = [n for own in self.packed.buffers.values() for n in own]
        found = [n for n in layers if all(_slides(window, self.context) for window in seeing[n])]
        return found, max((window or 0 for n in found for window in seeing[n]), default=0)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.embedding(ids)

    def layers(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> Tensor:
        y = x.to(torch.bfloat16, memory_format=torch.contiguous_format, copy=not ctx.in_place)
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
        self, cache: KVCache, roots: DraftRoots, path: DraftPath, limits: TreeLimits
    ) -> list[Nodes] | DeviceTree:
        size = limits.levels, limits.width, len(roots.tokens)
        if (self, size) not in path.made:
            path.made[self, size] = [] if TreeDrafter.supports(self, path, *size) else None
        idle = path.made[self, size]  # drafters that no thread is using; None: not supported
        if idle is None:
            return super().draft_rows(cache, roots, path, limits)
        try:
            drafter = idle.pop()
        except IndexError:
            drafter = TreeDrafter(self, path, *size)
        if drafter.tokens is not path.tokens:
            drafter.follow(self, path)
        found = drafter(self, cache, roots, limits)
        if self.experts is not None:
            self.experts.end_pass()
        idle.append(drafter)
        return found

    def readout(self, x: Tensor, head: nn.Linear | None = None) -> Tensor:
        once = self.packed.family.round_after_weight
        return self.head(head)(x.flatten(0, 1), self.final_norm, self.eps, once).view(*x.shape[:2], -1)

    def preparing(self, head: nn.Linear) -> Generator[None]:
        yield from self.packed.prepare_head(head)

    def greedy_tokens(self, x: Tensor, *also: Tensor) -> list[list[list[int]]]:
        (batch, t, _), once = x.shape, self.packed.family.round_after_weight
        found = self.head(None).largest(x, self.final_norm, self.eps, once)
        rows = [found] if batch == 1 else [found[start : start + t] for start in range(0, batch * t, t)]
        return [*(tensor.tolist() for tensor in also), rows]

    def settle(self) -> bool:
        return pages.settle()

    @property
    def bytes_read(self) -> int:
        """Return the bytes of weights that a pass of one token reads, in all layers and the output head."""
        return self.packed.bytes_of_layers + self.head(None).nbytes

    @property
    def token_costs(self) -> TokenCosts:
        sources, buffers = self.packed.sources, self.packed.buffers.items()
        keys = sum(count * size * len(layers) for (count, size), layers in buffers)
        queries = sum(size * len([n for n in sources if n in layers]) for (_, size), layers in buffers)
        attend = ATTENTION_COST * TOKEN_RATIO["cpu"] * 2 * queries * int(self.model.config.num_attention_heads)
        read = (2 - self.int8_cache) * 2 * keys / self.bytes_read
        return TokenCosts(TOKEN_RATIO["cpu"] * self.packed.weights_per_byte, read, attend / self.bytes_read)

    def beside(self, model: AnyModel) -> NativeTarget:
        return NativeTarget(model, like=self)

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        with self.lock:
            modules = decoder_layer.modules(self.model.model.layers[layer])  # type: ignore[union-attr, index]
        return {path: (module.in_features, module.out_features) for each in modules.values() for path, module in each}

    # -- calls ------------------------------------------------------------------------------------------------------

    def _call(self, x: Tensor, lo: int, hi: int, ctx: Pass) -> tuple[Model, Call, list[Any]]:
        """Return the kernels' arguments to run layers [lo, hi) on hidden states.

        x: input of layer ``lo``, bf16 [B, T, D], which the kernels replace by the output.
        ctx: positions, mask, KV cache and options of the pass.

        Returns the ctypes structures of the model and of the call, and objects that these point to, which the caller
        keeps alive until the kernels have run. The KV cache counts the tokens of the pass as run from then on.
        """
        cache, mask, taps = ctx.cache, ctx.mask, ctx.taps or {}
        assert isinstance(mask, RowMask)
        model = self.packed.merged(ctx.adapters, lo, hi)
        call, positions = self._new_call(lo, hi), ctx.positions.contiguous()
        end = int(positions.max()) + 1  # beyond the slots where a cache begins within the text
        sequences, *alive = self.place(call, cache, lo, hi, mask.counts, mask.whole, end)
        alive += [sequences, positions, mask]
        call.x, call.positions = x.data_ptr(), positions.data_ptr()
        if self.packed.embeds:
            alive.append(ctx.known_ids().int().contiguous())
            call.ids = alive[-1].data_ptr()
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
        """Return the kernels' arguments to run layers [lo, hi) with ``adapters`` on one token of each sequence.

        Returns two ctypes structures: of the model, whose layers have the adapters merged, and of the call, without the
        fields that ``place`` sets and the addresses of inputs and positions.
        """
        return self.packed.merged(adapters, lo, hi), self._new_call(lo, hi)

    def place(
        self, call: Call, cache: KVCache, lo: int, hi: int, counts: Sequence[int], whole: bool = False, end: int = 0
    ) -> tuple[Any, ...]:
        """Reserve slots of a KV cache for the tokens of a pass, and set the fields of ``call`` that describe them.

        A slot holds the keys and values of one token. The cache counts the slots as filled, and the kernels fill them;
        ``KVCache.trim`` or ``commit`` follows.

        call: ctypes structure with the arguments of the pass; its fields ``count``, ``tokens``, ``cache``,
            ``sequences`` and ``rotary`` are set.
        cache: the KV cache; its memory grows if it has too few slots.
        lo, hi: the layers [lo, hi) of the pass.
        counts: for each sequence of the cache, number of its tokens in the pass (of a draft: that it may have).
        whole: whether the caller commits all tokens of the pass, so that recurrent layers need not prepare a roll-back.
        end: number of positions that rotary tables must have; 0: positions are those of the slots.

        Returns objects that ``call`` points to; the caller keeps them alive until the kernels have run. The first is
        the array of the sequences' structures (``library.SequenceArgs``), whose field ``trees`` the caller may set.
        """
        ahead, rows = cache.lengths[lo] - cache.committed, cache.entries
        drafted = ahead + max(counts)
        ends = [cache.lengths[n] - cache.committed for n in {*self.packed.sources[lo:hi]} if n < lo]
        filled = min([drafted, *(end for end in ends if end < drafted)])
        cache.claim(lo, hi, counts, list(self.packed.buffers), torch.bfloat16)
        sequences = (SequenceArgs * len(rows))()
        for sequence, row, count in zip(sequences, rows, counts, strict=True):
            sequence.tokens = count
            sequence.start = row.count + ahead
            sequence.committed = row.count
            sequence.filled = row.count + filled
            for buffer, name in enumerate(cache.names):
                sequence.capacity[buffer], sequence.keys[buffer], sequence.values[buffer] = row.pointers[name]
            if isinstance(row.states, KernelStates):
                held = row.states.arguments(ahead, count, whole)
                sequence.held, sequence.slots, sequence.states, sequence.ahead, sequence.inputs, sequence.pending = held
        rotary = self._rotary_tables(max(cache.lengths[lo], end))
        call.count = len(rows)
        call.tokens = sum(counts)
        call.cache = cache.int8
        call.sequences = ctypes.addressof(sequences)
        call.rotary = ctypes.addressof(rotary[1])
        return sequences, rotary, cache.data, cache.states

    def _new_call(self, lo: int, hi: int) -> Call:
        """Return the ctypes structure of a call through layers [lo, hi), without the fields for KV cache and input."""
        return Call(
            lo=lo,
            hi=hi,
            threads=cores.threads(),
            windows=len(self.window_sizes),
            spans=ctypes.addressof(self._spans),
            window=ctypes.addressof(self._window),
            taps=ctypes.addressof(self._no_taps),
        )

    def head(self, head: nn.Linear | None) -> Packed:
        return self.packed.head(head)

    def reduced_head(self, token_ids: Tensor, lasting: bool = False) -> nn.Linear:
        full = self.own_head
        if not lasting or not isinstance(full, BlockLinear):
            return super().reduced_head(token_ids)
        rows = token_ids if full.blocks.rows is None else full.blocks.rows[token_ids.long()]
        bias = None if full.bias is None else full.bias.detach()[token_ids.long()]
        head = BlockLinear(replace(full.blocks, rows=rows.int().contiguous()), bias, full.dtype)  # read at first use
        head.unpack = full.unpack
        return head.requires_grad_(False)

    def _rotary_tables(self, count: int) -> tuple[list[Tensor], Any]:
        """Return the rotary tables for at least ``count`` positions, and a C array of their addresses.

        There is a table for each of ``packed.rotations``, float32 [positions, 2 (cosines, sines), half the rotated
        size], padded to one width. They are cached, and made again for more positions.
        """
        if count > self._positions:
            with self.lock:
                if count > self._positions:
                    every = max(count, min(2 * count, self.context), 512)
                    made = [each.tables(self.rotary, every, self.dtype) for each in self.packed.rotations]
                    widest = max((table.shape[2] for table in made), default=0)
                    tables = [F.pad(table, (0, widest - table.shape[2])).contiguous() for table in made]
                    pointers = (POINTER * len(tables))(*(table.data_ptr() for table in tables))
                    self._tables = tables, pointers
                    self._positions = every  # last: other threads read it without the lock
        return self._tables


def _slides(window: int | None, context: int) -> bool:
    """Return whether layers with this attention window cease to see the first tokens of a text as it grows.

    window: the window in tokens; None: no limit. context: maximum number of positions of a text.
    False also for chunked attention, and on systems other than Linux, where parts of a buffer cannot be released.
    """
    sliding = window is not None and not isinstance(window, Chunk) and window < context
    return sliding and sys.platform.startswith("linux")


def native_target(
    model: AnyModel,
    weights: str,
    kv_cache: str,
    expert_cache: float | None,
    expert_prefetch: bool,
    keep: bool,
) -> NativeTarget:
    """Make the native runtime of ``model``, and check it against the model's own forward.

    Raises SpecDecError if the model, the settings or this machine is not supported.

    weights: "auto": as loaded; "dense": dequantized; "int8", "int4": layers are quantized.
    kv_cache: "auto": keys and values in bfloat16; "int8": in 8 bits.
    expert_cache: how many of a mixture's experts stay in memory, as a share (float) or in bytes (int); None: all, or as
        many as fit.
    expert_prefetch: whether experts are read ahead by forecasts.
    keep: whether packed weights are read from a file in the model's cache entry, or written to it, if the model has
        one.
    """

    def make(file: ModelFile | None) -> NativeTarget:
        return NativeTarget(model, weights, kv_cache, expert_cache, expert_prefetch, kept=file)

    keep = keep and weights == "auto" and expert_cache is None and library.runs()
    origin = getattr(model, "origin", None) if keep else None
    return using(None if origin is None else ModelFile(origin), make)
