"""A model's weights as the native kernels read them: structures of ``native.h``, and the tiles that these point to.

    PackedModel.struct: Model      sizes and factors of the model, and a pointer to its layers
      Layer [N]                    of each layer:
        qkv, out, gate_up, down    linear layers, those that read the same input joined in one field (``mixer.slots``)
        router, gates, sums        of a mixture of experts: the router, and the two linear layers of each expert
        norms, rotary_q, ...       pointers to other parameters, and indices of rotary tables
    PackedModel.embedding          the table of token embeddings
    PackedModel.head(...)          output heads, packed at their first use
    PackedModel.merged(...)        a copy of ``struct`` in which some layers have merged adapters, for drafts

A linear layer (``Packed``) is tiles of 16 outputs and 32 inputs. GGUF blocks keep their codes and scales.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import gguf
import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.errors import SpecDecError
from specdec.models import families
from specdec.models.gguf import blocks
from specdec.models.gguf.blocks import BlockExperts, BlockLinear, Blocks, ExpertBlocks, matrix, named_weights
from specdec.models.native_model import AnyModel
from specdec.models.tensor_file import PLAIN
from specdec.runtimes import decoder_layer
from specdec.runtimes.decoder_layer import Adapters
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.native import linear, mixer
from specdec.runtimes.native.experts import MappedExperts
from specdec.runtimes.native.forecasts import Forecasts
from specdec.runtimes.native.library import BUFFERS, POINTER, WIDEST_HEAD, Heads, Layer, Linear, Model
from specdec.runtimes.native.linear import Allocate, Packed, RowTable
from specdec.runtimes.native.mixer import ordered
from specdec.runtimes.native.packed_file import DRAFTS, MOST_DRAFTS, ModelFile, PackedFile, drop_old, using
from specdec.runtimes.target import GrowingLinear

T = TypeVar("T")
ROUNDED = {"int8": "Q8_0", "int4": "Q4_1"}  # formats that the layers' weights are quantized to, by ``weights``
EXPERT_SHARE = 0.8  # share of the free memory that a mixture's experts may take
# The argmax of a head with more than this share of the layers' bytes, and with more than this many bytes, is found by
# bounds (``Packed.bound_argmax``). A smaller head may be in the CPU's cache, from where reading is fast.
BOUNDED_SHARE, BOUNDED_BYTES = 0.1, 64 << 20
BITS = 16, 8, 4, 5, 4, 5, 6, 4  # bits of a weight, by kind of tiles: BF16, Q8, Q4, Q5, K4, K5, K6, MX


class PackedModel:
    """A model's weights as the native kernels read them. ``NativeTarget`` owns one.

    struct: the ctypes structure ``library.Model``, with the model's sizes and a pointer to the layers' structures.
    config, decoder, own_head: the model's config, its decoder module, and the module of its output head.
    lock: the model's lock, held while weights are packed after construction.
    kept: the file of the model's packed weights; None: there is none.
    family: properties of the model type (``families.Family``).
    numbers: factors and caps of the model, such as those of logits (``families.Numbers``).
    mixture: number of experts of a layer, and of those that a token uses (``families.Mixture``).
    embedding: the table of token embeddings, [V, D].
    final_norm: factors of the final norm, float32 [D].
    eps: epsilon of all RMS norms.
    rotations: the distinct rotary tables that layers use; a layer's structure has their indices.
    buffers: for each buffer of the KV cache, the numbers of the layers whose keys and values it has. The key is (number
        of key heads, size of a head), which the layers of a buffer have in common.
    sources: for each layer, the number of the layer whose keys and values it reads, usually its own.
    embeds: whether layers have token embeddings of their own, and so read token ids.
    experts: the expert cache; None: all experts are in memory.
    expert_maps: the packed linear layers of all experts of all layers.
    kinds: the tile formats of all layers' weights, numbers such as ``library.BF16``.
    rounded: whether some linear layers quantize activations to 8 bits.
    _orders: for each layer, the row orders of its weights (``mixer.row_orders``).
    _layers: C array of the layers' structures, ``library.Layer`` [N].
    _alive: objects whose memory the structures point to, which must live as long.
    _heads: the packed output heads by module.
    _own_head: the model's own packed output head; None: it is not packed yet.
    _changed: by adapters, the structures of the model and of its layers with the adapters merged, and by layer number
        the linear layers that differ.
    """

    def __init__(
        self,
        model: AnyModel,
        lock: Any,
        own_head: nn.Module,
        kept: ModelFile | None = None,
        rounding: str | None = None,
        expert_cache: float | None = None,
        expert_prefetch: bool = False,
    ) -> None:
        """Pack all weights of ``model`` but the output head, which is packed at its first use.

        lock: lock to hold while weights are packed later.
        own_head: module of the model's output head.
        kept: file to read the tiles from, or to add them to; None: there is none.
        rounding: GGUF block format that the layers are quantized to, such as "Q8_0", also in ``model``; None: they
            stay in their format.
        expert_cache: how many experts stay in memory, as a share (float) or in bytes (int); None: all, or as many as
            fit.
        expert_prefetch: whether experts are read ahead by forecasts.

        Raises SpecDecError for a model that the kernels do not support.
        """
        self.config = model.config
        self.decoder: Any = model.model
        self.lock = lock
        self.own_head = own_head
        self.kept = kept
        self.family = families.FAMILIES[self.config.model_type]
        self.numbers = families.numbers_of(self.config)
        self.mixture = families.mixture_of(self.config)
        self.eps = float(self.config.rms_norm_eps)
        if expert_cache is not None and not self.mixture.experts:
            raise SpecDecError(f"model type '{self.config.model_type}' has no experts; leave out the expert cache")
        layers = self.decoder.layers
        if rounding is not None:
            for layer in layers:
                _round(layer, rounding, paged=expert_cache is not None)
        if expert_cache is None:
            expert_cache = _room_for_experts(model)
        self.experts = None if expert_cache is None else MappedExperts(expert_cache)
        self.expert_maps: list[Packed] = []
        self._orders = [mixer.row_orders(layer) for layer in layers]
        self._layers = (Layer * len(layers))()
        self._alive: list[Any] = []
        self.embedding = RowTable(matrix(self.decoder.embed_tokens), self.numbers.embeddings)
        self.embeds = bool(families.embedded_per_layer(self.config))
        self.sources = families.key_sources(self.config)
        self.buffers = key_buffers(model, self.sources)
        self._pack_layers(rounding)
        if self.experts is not None:
            self.experts.begin(self.mixture.top_k)
            if expert_prefetch:
                self.experts.forecasts = Forecasts(self._routers(layers), self.mixture.top_k)
            self._alive.append(self.experts)
        packed = [*self.expert_maps, *self._maps()]
        self.kinds = set().union(*(item.kinds for item in packed))
        self.rounded = any(item.rounded for item in packed)
        self.struct = self._model()
        self.final_norm = self._norm(self.decoder.norm)
        self._heads: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()
        self._own_head: Packed | None = None
        self._changed: WeakKeyDictionary[Adapters, tuple[Model, Any, dict[int, Any]]] = WeakKeyDictionary()

    # -- the layers ---------------------------------------------------------------------------------------------------

    def _pack_layers(self, rounding: str | None) -> None:
        """Pack the weights of all decoder layers, and fill the layers' structures (``_layers``); set ``rotations``.

        rounding: GGUF block format that experts are quantized to if they are not in blocks yet; None: they stay.
        """
        recurrent = [decoder_layer.recurrent(layer) for layer in self.decoder.layers]
        places = {n: (buffer, place) for buffer, own in enumerate(self.buffers.values()) for place, n in enumerate(own)}
        rotations = families.rotations(self.config)
        self.rotations = list(dict.fromkeys(each for pair in rotations if pair is not None for each in pair))
        for n, (layer, struct, pair) in enumerate(zip(self.decoder.layers, self._layers, rotations, strict=True)):
            struct.reads, struct.scale = self.sources[n] != n, 1.0
            struct.buffer, struct.place = places.get(self.sources[n]) or (0, recurrent[:n].count(True))
            struct.rotary_q, struct.rotary_k = (-1, -1) if pair is None else map(self.rotations.index, pair)
            struct.rotated = 0 if pair is None else self._rotated(pair[0])
            self._pack_slots(n, layer)
            if self.family.scales_layers:
                struct.scale = float(layer.layer_scalar)
            if self.embeds:
                self._pack_embedded(n, layer)
            if decoder_layer.has_experts(layer):
                self._pack_experts(n, layer.mlp, rounding)
            if recurrent[n]:
                struct.tiled = not isinstance(mixer.columns(matrix(layer.linear_attn.out_proj)), slice)
                for name, values in mixer.parameters(layer.linear_attn, self.config.rms_norm_eps).items():
                    self._point(struct, name, values)
            self._pack_norms(struct, layer)

    def _pack_slots(self, index: int, layer: Any) -> None:
        """Pack the linear layers of a layer except its experts; those that read the same input become one.

        Each result goes to the field of the layer's structure with the name of its slot (``mixer.slots``).

        index: number of the layer. layer: its module.
        Raises SpecDecError for linear layers whose number of outputs the kernels do not support.
        """
        orders = self._orders[index]
        for slot, pairs in mixer.slots(layer).items():
            rates = slot == "rates"  # few weights, which stay exact: in 16 bits
            whole = [module.weight.detach() if rates else matrix(module) for _, module in pairs]
            weights = [ordered(weight, orders.get(path)) for (path, _), weight in zip(pairs, whole, strict=True)]
            biases = [module.bias for _, module in pairs]
            bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
            if any(weight.shape[0] % (16 if rates else 32) for weight in weights):
                raise SpecDecError(
                    f"the native runtime takes multiples of 32 outputs; '{pairs[0][0]}' does not have them"
                )
            packed = Packed(weights, bias, scale=self._scale(slot), kept=self.kept)
            self.release(*(matrix(module) for _, module in pairs))
            self._alive.append(packed)
            setattr(self._layers[index], slot, packed.struct)

    def _pack_embedded(self, index: int, layer: Any) -> None:
        """Pack the parameters by which a layer adds a token embedding of its own to the residual (Gemma 4).

        The results go to the fields ``embedded...``, ``norm_embedded`` and ``norm_added`` of the layer's structure.

        index: number of the layer. layer: its module.
        Raises SpecDecError for an embedding whose size or format the kernels do not support.
        """
        struct, decoder = self._layers[index], self.decoder
        table, image = (matrix(each) for each in (decoder.embed_tokens_per_layer, decoder.per_layer_model_projection))
        size, count = table.shape[1] // len(self._layers), len(self._layers)
        whole = RowTable(table, float(decoder.embed_tokens_per_layer.embed_scale.to(torch.bfloat16)))
        if size % 32 or size > self.config.hidden_size or whole.struct.stride % count or _splits(table, size):
            raise SpecDecError(
                f"the native runtime takes no embeddings of {size} numbers for each layer in this format"
            )
        struct.embedded = whole.struct
        struct.embedded.columns = size
        struct.embedded.data = whole.alive[0].data_ptr() + index * whole.struct.stride // count
        part = slice(index * size, (index + 1) * size)
        rows = replace(image, data=image.data[part]) if isinstance(image, Blocks) else image[part]
        maps = {
            "in": (rows, self.config.hidden_size**-0.5),
            "gate": (matrix(layer.per_layer_input_gate), 1.0),
            "out": (matrix(layer.per_layer_projection), 1.0),
        }
        for name, (weight, scale) in maps.items():
            packed = Packed([weight], scale=scale, kept=self.kept)
            self.release(weight)
            setattr(struct, f"embedded_{name}", packed.struct)
            self._alive.append(packed)
        norms = {"embedded": decoder.per_layer_projection_norm, "added": layer.post_per_layer_input_norm}
        for name, module in norms.items():
            self._alive.append(self._norm(module))
            setattr(struct, f"norm_{name}", self._alive[-1].data_ptr())
        self._alive.append(whole)

    def _rotated(self, rotation: Any) -> int:
        """Return how many values of each attention head rotary embeddings rotate; the others stay.

        rotation: the kind of rotary embedding of a layer, a ``families.Rotation``, which makes tables of cosines and
            sines.
        """
        return 2 * int(rotation.tables(self.decoder.rotary_emb, 8, torch.bfloat16).shape[2])

    def _pack_experts(self, index: int, mlp: Any, rounding: str | None) -> None:
        """Pack the router and all experts of a layer, into memory or into the file of the expert cache.

        The router is the linear layer that chooses a token's experts. The results go to the fields ``router``,
        ``gates`` and ``sums`` of the layer's structure, and to ``expert_maps``.

        index: number of the layer. mlp: its module of the mixture of experts.
        rounding: GGUF block format that experts are quantized to if they are not in blocks yet; None: they stay.
        Raises SpecDecError if only some of the experts are in 16 bits.
        """
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
            gate_up, down, *biases = blocks.expert(mlp.experts, number)
            if rounding is not None and isinstance(down, Tensor):
                gate_up, down = [blocks.quantize(each, rounding) for each in gate_up], blocks.quantize(down, rounding)
            return gate_up, down, *biases

        def pack(number: int, allocate: Allocate | None = None) -> None:
            gate_up, down, *biases = matrices(number)
            gates.append(Packed(gate_up, biases[0], allocate=allocate))
            sums.append(Packed([down], biases[1], scale=self.numbers.results, allocate=allocate))
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
        self.expert_maps += gates + sums
        self._alive.append(made)

    def _pack_norms(self, struct: Layer, layer: Any) -> None:
        """Let the structure of a layer point to the layer's norms and attention sinks, in float32.

        struct: the structure to fill. layer: the module of the decoder layer.
        """
        attention = getattr(layer, "self_attn", None)
        fields = zip(("in", "attended", "mlp", "out"), self.family.norms, strict=True)
        norms = {field: getattr(layer, name) for field, name in fields if name}
        norms |= {n: getattr(attention, f"{n}_norm") for n in "qk" if hasattr(attention, f"{n}_norm")}
        for name, module in norms.items():
            self._point(struct, f"norm_{name}", self._norm(module))
        if attention is not None and hasattr(attention, "sinks"):
            self._point(struct, "sinks", attention.sinks.detach().float())

    def _point(self, struct: Layer, field: str, values: Tensor) -> None:
        """Let a pointer in a layer's structure point to the tensor ``values``, which this object keeps alive.

        struct: the structure. field: name of the pointer in it.
        """
        self._alive.append(values)
        setattr(struct, field, values.data_ptr())

    def _routers(self, layers: Any) -> dict[int, Tensor]:
        """Return the router weights [E, D] by layer number, multiplied by the factors of the norm before the router.

        So they apply to residuals that are divided by their RMS. layers: the modules of all decoder layers.
        """
        norm = dict(zip(("in", "attended", "mlp", "out"), self.family.norms, strict=True))["mlp"]
        routers = {
            n: decoder_layer.router(layer.mlp) for n, layer in enumerate(layers) if decoder_layer.has_experts(layer)
        }
        return {n: each.weight.detach().float() * self._norm(getattr(layers[n], norm)) for n, each in routers.items()}

    def _norm(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.detach().float()
        return 1 + weight if self.family.around_zero else weight

    def _scale(self, slot: str) -> float:
        """Return the factor by which the compiled kernels multiply the outputs of linear layers.

        slot: which linear layers of a decoder layer: "qkv", "out", "gate_up", "down" or "rates". The factor is 1 but
            for "out" and "down", whose outputs are added to the residual.
        """
        return self.numbers.results if slot in ("out", "down") else 1.0

    def _maps(self) -> list[Packed]:
        return [item for item in self._alive if isinstance(item, Packed)]

    def _model(self) -> Model:
        """Return the ctypes structure of the model: its sizes and settings, and pointers to what is packed.

        It is called once, after the layers are packed, from whose structures it reads sizes.

        Raises SpecDecError if the model scales queries by position and rotates only a part of each head.
        """
        config, recurrent = self.config, families.mixer_of(self.config)
        attention: Any = next(each.self_attn for each in self.decoder.layers if not decoder_layer.recurrent(each))
        rotated = max((layer.rotated for layer in self._layers), default=0)
        inner = max(families.embedded_per_layer(config), *(layer.down.inp for layer in self._layers))
        if rotated < int(attention.head_dim) and any(each.beta for each in self.rotations):
            raise SpecDecError(
                "the native runtime scales queries by position only if whole heads rotate; here a part of each rotates"
            )
        return Model(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            buffers=(Heads * BUFFERS)(*(Heads(*each) for each in self.buffers)),
            inner=max(inner, *(item.inp for item in self.expert_maps), 0),
            rotated=rotated,
            rounded=self.rounded,
            experts=self.mixture.experts,
            top_k=self.mixture.top_k,
            normalize_top_k=self.mixture.normalize_top_k,
            round_after_weight=self.family.round_after_weight,
            activation=families.ACTIVATIONS.index(families.activation(config)),
            across=self.family.norm_over_heads,
            tables=len(self.rotations),
            gated=self.family.gated,
            normed_values=self.family.norm_values,
            recurrent=recurrent.layers,
            key_heads=recurrent.key_heads,
            value_heads=recurrent.value_heads,
            key_dim=recurrent.key_dim,
            value_dim=recurrent.value_dim,
            taps=recurrent.taps,
            eps=self.eps,
            scale=float(attention.scaling),
            cap=self.numbers.scores_cap,
            limit=self.numbers.limit,
            alpha=self.numbers.alpha,
            demand=None if self.experts is None else ctypes.cast(self.experts.call, POINTER),
            embedding=ctypes.addressof(self.embedding.struct),
            layers=ctypes.addressof(self._layers),
        )

    # -- what the layers are ------------------------------------------------------------------------------------------

    @property
    def bytes_of_layers(self) -> int:
        """Return the bytes of weights that a pass of one token through all layers reads, without the output head."""
        experts, taken, _ = self.mixture
        own = sum(item.nbytes for item in self._maps())
        return own + sum(item.nbytes for item in self.expert_maps) * taken // max(experts, 1)

    @property
    def weights_per_byte(self) -> float:
        """Return how many weights of the layers are in a byte on average, without experts and output heads."""
        maps = self._maps()
        return sum(item.inp * item.width for item in maps) / max(sum(item.nbytes for item in maps), 1)

    @property
    def weight_format(self) -> str:
        """Return the bits of a weight in the layers as text for reports, such as "4 and 6 bits"."""
        return " and ".join(str(width) for width in sorted({BITS[kind] for kind in self.kinds})) + " bits"

    # -- output heads -------------------------------------------------------------------------------------------------

    def head(self, head: nn.Linear | None) -> Packed:
        """Return an output head in the kernels' format, packed at its first use.

        head: the module of the head; None: the model's own. Other heads are for drafts, and are quantized to 8 or 4
            bits.
        """
        if head is None and self._own_head is not None:
            return self._own_head
        module: Any = self.own_head if head is None else head
        with self.lock:
            packed = self._heads.get(module)
            if packed is None:
                packed = self._pack_head(module) if head is None else self._pack_draft_head(head)
                self._heads[module] = packed
            if head is None:
                self._own_head = packed
        return packed

    def share_heads(self, other: PackedModel) -> None:
        """Use the packed output heads of another model from now on, and share the heads that either packs later.

        It is called before this model packs a head.

        other: a model of the same family with the same output head module, so that this head is packed only once.
        """
        self._heads = other._heads

    def prepare_head(self, head: nn.Linear) -> Generator[None]:
        """Pack an output head for drafts, unless it is packed: a generator that yields after every 20 ms or so of work.

        When the generator ends, ``head`` finds the packed head.

        head: the module of the head, with a bf16 weight [outputs, D].
        """
        if head in self._heads:
            return
        packed = yield from linear.packing(head.weight, head.bias, self.numbers.logits, self.numbers.logits_cap)
        with self.lock:
            self._heads.setdefault(head, packed)

    def _pack_head(self, module: Any) -> Packed:
        weight, numbers = matrix(module), (self.numbers.logits, self.numbers.logits_cap)
        packed = Packed([weight], module.bias, False, *numbers, kept=self.kept)
        if isinstance(weight, Blocks) and packed.nbytes > max(BOUNDED_SHARE * self.bytes_of_layers, BOUNDED_BYTES):
            packed.bound_argmax(weight, self.kept)
        self.release(weight)
        return packed

    def _pack_draft_head(self, module: Any) -> Packed:
        """Pack an output head for drafts. If it is in GGUF blocks, a file keeps the tiles for later processes.

        module: the module of the head. If it is a ``GrowingLinear``, only its new rows are packed.
        """
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
        """Call ``pack``, which makes packed weights that only drafts use, with a file to keep them; return its result.

        name: text that identifies the result, from which the file's name is made; None: no file is used.
        weights: number of the weights to store. If the disk has less than 2 bytes free for each, a note is printed,
            and the result is not kept.
        pack: function that reads packed weights from the open file that it gets, or makes them and adds them to it. It
            gets None if there is no file. It is called at once, and again if the file turns out to be damaged.
        """
        if self.kept is None or name is None:
            return pack(None)
        digest = hashlib.sha256(f"{metadata.version('specdec-m2r2')} {name}".encode()).hexdigest()
        made = using(self.kept.of_drafts(digest, 2 * weights), pack)
        drop_old(self.kept.path.parent, DRAFTS, MOST_DRAFTS)
        return made

    # -- layers with merged adapters ----------------------------------------------------------------------------------

    def merged(self, adapters: Adapters | None, lo: int, hi: int) -> Model:
        """Return a ctypes structure of the model with adapters merged into layers [lo, hi), for drafts. Cached.

        The weights of these layers are then quantized to 8 bits, large ones to 4, except GGUF blocks that do not
        change. All layers that were merged for the same adapters before are in the structure, too.

        adapters: the adapters; None, or without changes of these layers: ``struct`` itself is returned.
        """
        if adapters is None or not any(adapters.changes(layer) for layer in range(lo, hi)):
            return self.struct
        with self.lock:
            if adapters not in self._changed:
                own = (Layer * len(self._layers))(*self._layers)
                copy = Model.from_buffer_copy(self.struct)
                copy.layers = ctypes.addressof(own)
                self._changed[adapters] = copy, own, {}
            model, layers, packed = self._changed[adapters]
            if missing := [layer for layer in range(lo, hi) if layer not in packed]:

                def merge(file: PackedFile | None) -> dict[int, Any]:
                    return {layer: self._merge(layer, adapters, file) for layer in missing}

                modules = [
                    each for layer in missing for each in decoder_layer.modules(self.decoder.layers[layer]).values()
                ]
                weights = sum(module.in_features * module.out_features for each in modules for _, module in each)
                name = f"{missing} {adapters.digest()}" if adapters.lasting else None
                for layer, (struct, maps) in self._keeping(name, weights, merge).items():
                    layers[layer], packed[layer] = struct, maps
        return model

    def _merge(self, layer: int, adapters: Adapters, file: PackedFile | None) -> tuple[Layer, list[Packed]]:
        """Return (structure, packed): a layer's ctypes structure with adapters merged in, and the linear layers made.

        The structure points to the packed linear layers, so the caller keeps them. Other weights are those of the
        layer's own structure.

        layer: number of the layer.
        adapters: the adapters to merge. If they keep only some neurons of the MLP, the others are left out.
        file: file to read the tiles from, or to add them to; None: there is none.
        """
        struct = Layer.from_buffer_copy(self._layers[layer])
        factors, block, alive = adapters.factors(layer), self.decoder.layers[layer], list[Packed]()
        neurons, orders = adapters.kept(layer), self._orders[layer]
        mlp = None if neurons is None else gated_mlp(block)
        narrow = {} if mlp is None or neurons is None else mlp.shapes(len(neurons))

        def merged(pairs: Sequence[tuple[str, nn.Linear]]) -> Tensor:
            """Return the weights of linear layers that read the same input as one matrix, bf16 [sum of outputs, in].

            The adapters of ``_merge`` are added, MLP neurons that they do not keep (``Adapters.kept``) are left out,
            and rows and columns are in the order in which the kernels read them (``mixer.row_orders``,
            ``mixer.columns``).

            pairs: (module path in the decoder layer, module) of each linear layer.
            """
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

    def release(self, *matrices: Tensor | Blocks) -> None:
        """Release the pages of matrices that are mapped from the model's file, after packing has read them.

        No effect if the packed weights came from a file, because the matrices were then not read.
        """
        if self.kept is None or not self.kept.complete:  # else packing has not read it
            release(*matrices)

    def _is_kept(self, module: nn.Module) -> bool:
        """Return whether the weight of ``module`` lies in the model's file, so that a file can keep its tiles."""
        return self.kept is not None and self.kept.name(matrix(module)) is not None


def key_buffers(model: AnyModel, sources: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Group the attention layers by their key heads; the KV cache has a buffer for each group.

    model: the model; its decoder layers give the number and size of their heads.
    sources: for each layer, the number of the layer whose keys and values it reads. Only layers that read their own are
        grouped.

    Returns the ascending layer numbers of each group, by (number of key heads, size of a head). Raises SpecDecError for
    heads that the kernels do not support, and for more than two groups.
    """
    config, found = model.config, dict[tuple[int, int], list[int]]()
    gated, decoder, heads = families.FAMILIES[config.model_type].gated, model.model, int(config.num_attention_heads)
    for n, layer in enumerate(decoder.layers):  # type: ignore[union-attr, arg-type]
        if sources[n] == n and not decoder_layer.recurrent(layer):
            own: Any = layer.self_attn
            outputs = sum(module.out_features for _, module in decoder_layer.modules(layer)["qkv"])
            size = int(own.head_dim)
            keys = (outputs - own.o_proj.in_features * (1 + gated)) // (2 * size)
            if size % 32 or size > WIDEST_HEAD or not keys or heads % keys:
                raise SpecDecError(
                    f"the native runtime takes heads of 32, 64, ... {WIDEST_HEAD}, equally many for each key head; "
                    f"this '{config.model_type}' model has {heads} heads of {size} and {keys} key heads"
                )
            found.setdefault((keys, size), []).append(n)
    if len(found) > BUFFERS:
        raise SpecDecError(
            f"the native runtime takes {BUFFERS} kinds of layers, and the heads of this model differ more"
        )
    return found


def _splits(table: Tensor | Blocks, size: int) -> bool:
    """Return whether a GGUF block would be split if the columns of a matrix were divided into parts.

    table: the matrix; a tensor has no blocks.
    size: number of columns of a part.
    """
    return isinstance(table, Blocks) and size % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[table.kind]][0] != 0


def _round(layer: nn.Module, kind: str, paged: bool) -> None:
    """Quantize the linear layers and experts of a decoder layer in place to a GGUF block format.

    layer: the module of the decoder layer.
    kind: the block format, such as "Q8_0". Linear layers in blocks that have as few bits or fewer stay as they are, and
        so do experts in blocks.
    paged: whether experts stay on disk. Unquantized experts in a GGUF file then stay, too; they are quantized one by
        one when they are packed.
    """
    for path, module in (pair for pairs in mixer.slots(layer).values() for pair in pairs):
        if not isinstance(module, BlockLinear) or blocks.bits(module.blocks.kind) > blocks.bits(kind):
            made = BlockLinear(blocks.quantize(module.weight, kind), module.bias, module.weight.dtype)
            layer.set_submodule(path, made)
    mlp: Any = layer.mlp
    if not decoder_layer.has_experts(layer):
        return
    of_file = isinstance(mlp.experts, BlockExperts)
    if not of_file or (mlp.experts.down[0].kind in PLAIN and not paged):
        mlp.experts = blocks.quantize_experts(mlp.experts, kind)


def _room_for_experts(model: nn.Module) -> int | None:
    """Return how many bytes of memory the experts of a model may take: 80% of what its other weights leave free.

    Returns None if all experts fit into that, or if the model has none.
    """
    experts = others = 0
    for name, weight in named_weights(model):
        parts = weight.matrices if isinstance(weight, ExpertBlocks) else (weight,)
        size = sum(part.data.nbytes for part in parts)
        experts, others = experts + size * (".experts." in name), others + size * (".experts." not in name)
    room = memory.free_memory(torch.device("cpu")) - others
    return max(int(EXPERT_SHARE * room), 2) if experts > EXPERT_SHARE * room and experts else None


def release(*matrices: Tensor | Blocks) -> None:
    """Drop the memory pages of matrices that are mapped from files; the system reads them again when they are used.

    The matrices stay usable. No effect on other matrices.
    """
    memory.release(*(each.data if isinstance(each, Blocks) else each for each in matrices))


def mapped(module: nn.Module) -> list[Tensor]:
    """Return the tensors that hold the weights of ``module`` and its submodules, also those of GGUF blocks."""
    weights = (weight for _, weight in named_weights(module))
    return [part for each in weights for part in (each.memory if isinstance(each, Blocks) else (each,))]
