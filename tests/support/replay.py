"""Recordings of calls of the native kernels, with the memory that they read, which the program ``replay.c`` repeats."""

import ctypes
import functools
import hashlib
import struct
from collections.abc import Callable, Iterator
from ctypes import sizeof
from pathlib import Path
from typing import Any

from specdec.models import families
from specdec.runtimes.draft_path import KNOTS
from specdec.runtimes.native import library, mixer
from specdec.runtimes.native.library import (
    Call,
    Layer,
    Linear,
    LinearPart,
    Model,
    SequenceArgs,
    Stage,
    Table,
    TreeDraft,
)

LINE, BEHIND = 64, 1 << 16  # kernels may read what lies behind the last key
SLOTS = "qkv", "out", "gate_up", "down", "rates", "embedded_in", "embedded_gate", "embedded_out"
WORDS = 97  # rows of the tables that layers read
MIXER = "recurrent", "key_heads", "value_heads", "key_dim", "value_dim", "taps"
ARGUMENTS = 64  # where a record has them


class Recording:
    """Wraps the native kernels and records every call: a memory image with pointers into itself.

    Sizes are those of native.h.
    title: names the next calls, for messages. names: the kernels that were called.
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.title, self.names = kernels, "", set[str]()
        self.memory, self.pointers, self.known = bytearray(LINE), list[int](), dict[bytes, int]()
        self.last, self.changed = 0, dict[int, int]()  # changed: places, by address
        self.written = list[tuple[int, Callable[[], bytes], int]]()  # by this call: place, content, bytes of a number

    def __getattr__(self, name: str) -> Any:
        record, kernel = getattr(type(self), name.replace("specdec", "call"), None), getattr(self.kernels, name)
        return functools.partial(self._record, kernel, name, record) if record else kernel

    def _record(self, kernel: Any, name: str, record: Any, *given: Any) -> Any:
        at, self.written, self.changed = self.add(bytes(ARGUMENTS + 88)), [], {}
        self.names.add(name.removeprefix("specdec_"))
        whole = [int(each or 0) if isinstance(each, int | None) else 0 for each in given if not isinstance(each, float)]
        struct.pack_into(f"<{len(whole)}q", self.memory, at + ARGUMENTS, *whole)
        record(self, at + ARGUMENTS, *given)
        result = kernel(*given)
        written = self.add(bytes(32 * len(self.written)))
        for i, (place, content, width) in enumerate(self.written):
            expected = content()
            self.point(written + 32 * i, place)
            self.point(written + 32 * i + 8, self.add(expected, True))
            struct.pack_into("<2Q", self.memory, written + 32 * i + 16, len(expected), width)
        [number] = [each for each in given if isinstance(each, float)] or [0.0]
        struct.pack_into("<QQqd", self.memory, at + 32, len(self.written), result is not None, result or 0, number)
        names = (self.add(text.encode() + b"\0", True) for text in (name, self.title))
        for i, place in enumerate((*names, written)):
            self.point(at + 8 + 8 * i, place)
        self.last = self.point(self.last, at)
        return result

    def save(self, path: Path) -> None:
        """Write the file that ``replay.c`` reads: the sizes, the memory image, and the offsets of all pointers in it.

        The image's first pointer points to the first call.
        """
        self.memory += bytes(BEHIND + -(len(self.memory) + BEHIND) % 4096)
        places = struct.pack(f"<{len(self.pointers)}Q", *self.pointers)
        path.write_bytes(struct.pack("<2Q", len(self.memory), len(self.pointers)) + self.memory + places)

    # -- memory -----------------------------------------------------------------------------------------------------

    def add(self, data: bytes, again: bool = False) -> int:
        """Copy ``data`` into the image and return its offset. again: reuse an equal copy that does not change."""
        name = hashlib.sha256(data).digest() if again else b""
        if name in self.known:
            return self.known[name]
        place = len(self.memory)
        self.memory += data + bytes(-len(data) % LINE)
        if again:
            self.known[name] = place
        return place

    def point(self, at: int, place: int) -> int:
        """Make the pointer at offset ``at`` of the image point to offset ``place``, and return ``place``."""
        struct.pack_into("<Q", self.memory, at, place)
        self.pointers.append(at)
        return place

    def read(self, at: int, address: int | None, size: int) -> None:
        """Make the pointer at offset ``at`` point to a copy of the ``size`` bytes at ``address`` that the kernel reads.

        NULL (None) stays NULL.
        """
        if address:
            self.point(at, self.add(ctypes.string_at(address, size), True))

    def write(self, at: int, address: int | None, size: int, width: int) -> None:
        """Do as ``read`` for memory that the kernel also writes. width: bytes of one number, for comparing results."""
        if address:
            self.change(at, functools.partial(ctypes.string_at, address, size), width, address)

    def change(self, at: int, content: Callable[[], bytes], width: int, address: int) -> None:
        """Make the pointer at ``at`` point to memory that the kernel writes.

        All pointers of a call to the same ``address`` share it. content: returns the memory's bytes.
        width: bytes of one number.
        """
        if address in self.changed:
            self.point(at, self.changed[address])
            return
        self.changed[address] = self.point(at, self.add(content()))
        self.written.append((self.changed[address], content, width))

    def structs(self, at: int, address: int | None, kind: Any, count: int = 1) -> Iterator[tuple[int, Any]]:
        """Copy ``count`` structures of type ``kind`` and yield (offset of the copy, structure) for each.

        The pointer at offset ``at`` points to the first copy. NULL yields nothing.
        """
        if address:
            place = self.point(at, self.add(ctypes.string_at(address, count * sizeof(kind))))
            for i, each in enumerate((kind * count).from_address(address)):
                yield place + i * sizeof(kind), each

    def addresses(self, at: int, address: int | None, count: int) -> Iterator[tuple[int, int]]:
        """Copy an array of ``count`` pointers and yield (offset of the copy, address) for each. NULL yields nothing."""
        yield from self.structs(at, address, ctypes.c_uint64, count)

    # -- structures -------------------------------------------------------------------------------------------------

    def map_(self, at: int, each: Linear) -> None:
        first = 0
        for place, part in self.structs(at + Linear.parts.offset, each.parts, LinearPart, each.count):
            size = self.kernels.specdec_tiles_bytes(part.kind, part.end - first, each.inp // 32)
            self.read(place + LinearPart.tiles.offset, part.tiles, size)
            first = part.end
        self.read(at + Linear.bias.offset, each.bias, 4 * each.out)
        size = self.kernels.specdec_tiles_bytes(library.Q4, each.out // 16, each.inp // 32)
        self.read(at + Linear.proxy.offset, each.proxy, size)
        self.read(at + Linear.error_bounds.offset, each.error_bounds, 4 * each.out)

    def maps(self, at: int, address: int | None, count: int = 1) -> None:
        for place, each in self.structs(at, address, Linear, count):
            self.map_(place, each)

    def table(self, at: int, address: int, rows: int) -> None:
        """Record a ``Table`` of which the kernel reads ``rows`` rows."""
        for place, each in self.structs(at, address, Table):
            self.read(place + Table.order.offset, each.order, 4 * rows)
            if each.order:
                rows = max((library.INT * rows).from_address(each.order)) + 1
            self.read(place + Table.data.offset, each.data, rows * each.stride)

    def layer(self, at: int, each: Layer, model: Model) -> None:
        for name in (*SLOTS, "router") if each.gates else SLOTS:
            self.map_(at + getattr(Layer, name).offset, getattr(each, name))
        for name in ("gates", "sums"):
            self.maps(at + getattr(Layer, name).offset, getattr(each, name), model.experts)
        kind = model.buffers[each.buffer]
        heads = {"norm_q": model.heads, "norm_k": kind.count} if model.across else {"norm_q": 1, "norm_k": 1}
        for name in ("norm_in", "norm_mlp", "norm_attended", "norm_out", "norm_q", "norm_k"):
            count = heads[name] * kind.size if name in heads else model.hidden
            self.read(at + getattr(Layer, name).offset, getattr(each, name), 4 * count)
        self.read(at + Layer.sinks.offset, each.sinks, 4 * model.heads)
        if size := each.embedded_gate.out:
            table, last = each.embedded, (WORDS - 1) * each.embedded.stride
            self.read(at + Layer.embedded.offset + Table.data.offset, table.data, last + 2 * table.columns)
            self.read(at + Layer.norm_embedded.offset, each.norm_embedded, 4 * size)
            self.read(at + Layer.norm_added.offset, each.norm_added, 4 * model.hidden)
        channels, heads_ = 2 * model.key_heads * model.key_dim + model.value_heads * model.value_dim, model.value_heads
        counts = {"convolution": model.taps * channels, "decay": heads_, "decay_bias": heads_}
        for name, count in (counts | {"norm_mixed": model.value_dim}).items():
            self.read(at + getattr(Layer, name).offset, getattr(each, name), 4 * count)

    def call(self, at: int, call: Call, model: Model, layers: int, levels: int = 0) -> None:
        """Record a ``Call`` of ``layers`` layers of the model.

        levels: of a draft that begins with one token per sequence.
        """
        positions = (library.LONG * (call.count if levels else call.tokens)).from_address(call.positions)
        self.read(at + Call.positions.offset, call.positions, sizeof(positions))
        if not levels and call.ids:
            self.read(at + Call.ids.offset, call.ids, 4 * call.tokens)
        self.read(at + Call.spans.offset, call.spans, 4 * call.windows)
        self.read(at + Call.window.offset, call.window, 4 * call.hi)
        for place, address in self.addresses(at + Call.rotary.offset, call.rotary, model.tables):
            self.read(place, address, 4 * model.rotated * (max(positions) + levels + 1))
        states = 2 * call.tokens * model.hidden
        self.write(at + Call.x.offset, None if levels else call.x, states, 2)
        for place, address in self.addresses(at + Call.taps.offset, call.taps, call.hi + 1):
            self.write(place, address, states, 2)
        self.write(at + Call.routed.offset, call.routed, 4 * call.tokens * call.hi * model.experts, 4)
        every = (Layer * layers).from_address(model.layers)
        owners = [each for each in every if not each.convolution and not each.reads]
        for own, each in self.structs(at + Call.sequences.offset, call.sequences, SequenceArgs, call.count):
            for buffer, kind in enumerate(model.buffers):
                if not kind.count:
                    continue
                row, capacity = kind.size + kind.size // 16 if call.cache else 2 * kind.size, each.capacity[buffer]
                used = min(-(-(each.start + each.tokens) // 16) * 16, capacity)  # slots: they are read in blocks
                struct.pack_into("<i", self.memory, own + SequenceArgs.capacity.offset + 4 * buffer, used)
                kept = sum(layer.buffer == buffer for layer in owners)
                for name in ("keys", "values"):
                    first, offset = getattr(each, name)[buffer], own + getattr(SequenceArgs, name).offset + 8 * buffer
                    heads = [first + head * capacity * row for head in range(kept * kind.count)]
                    self.change(offset, functools.partial(_rows, heads, used * row), 1, first)
            if model.recurrent:
                sizes = families.Mixer(*(getattr(model, name) for name in MIXER))
                shape = mixer.state_shape(sizes)
                inputs = 2 * shape.layers * each.slots * shape.width
                buffers = {"states": (shape.layers * shape.state_bytes, 4), "inputs": (inputs, 2)}
                buffers |= {"ahead": buffers["states"], "pending": (4 * shape.layers, 4)}
                for name, (size, width) in buffers.items():
                    self.write(own + getattr(SequenceArgs, name).offset, getattr(each, name), size, width)
            for place, address in self.addresses(own + SequenceArgs.trees.offset, each.trees, call.windows):
                self.read(place, address, each.tokens * (each.start + each.tokens - each.committed))

    def layers(self, at: int, model: Model, call: Call) -> None:
        for number, (place, layer) in enumerate(self.structs(at + Model.layers.offset, model.layers, Layer, call.hi)):
            if number >= call.lo:
                self.layer(place, layer, model)
            if number == call.lo and layer.embedded_gate.out:
                self.table(at + Model.embedding.offset, model.embedding, WORDS)

    # -- kernels ----------------------------------------------------------------------------------------------------

    def call_layers(self, at: int, model: Any, call: Any) -> None:
        own = [self.point(at + 8 * i, self.add(bytes(each._obj))) for i, each in enumerate((model, call))]
        self.layers(own[0], model._obj, call._obj)
        self.call(own[1], call._obj, model._obj, call._obj.hi)

    def call_linear(self, at: int, *given: Any) -> None:
        map_, weight, _, _, sources, parts, rows, out, best, width, _ = given
        each = map_._obj
        self.map_(self.point(at, self.add(bytes(each))), each)
        self.read(at + 8, weight, 4 * each.inp // parts)
        for place, address in self.addresses(at + 24, ctypes.addressof(sources), parts):
            self.read(place, address, 2 * rows * each.inp // parts)
        self.write(at + 48, out, 2 * rows * width, 2)
        self.write(at + 56, best, 8 * rows, 8)

    def call_read_rows(self, at: int, table: Any, index: int | None, count: int, to: int, threads: int) -> None:
        numbers = (library.LONG * count).from_address(index) if index else range(count)
        self.table(at, ctypes.addressof(table._obj), max(numbers) + 1)
        self.read(at + 8, index, 8 * count)
        self.write(at + 24, to, 2 * count * table._obj.columns, 2)

    def call_pack_blocks(self, at: int, table: Any, out: int, tiles: int, threads: int) -> None:
        own, kind = table._obj, library.INT()
        size = self.kernels.specdec_block_tiles(own.type, out, own.columns, ctypes.byref(kind))
        self.table(at, ctypes.addressof(own), out)
        self.write(at + 16, tiles, size, 1)

    def call_pack_rounded(self, at: int, table: Any, out: int, kind: int, tiles: int, gaps: Any, threads: int) -> None:
        own = table._obj
        self.table(at, ctypes.addressof(own), out)
        self.write(at + 24, tiles, self.kernels.specdec_tiles_bytes(kind, -(-out // 16), own.columns // 32), 1)
        self.write(at + 32, gaps, 64 * -(-out // 16), 4)

    def call_draft_tree(self, at: int, draft: Any) -> None:
        each = draft._obj
        own, outputs = self.point(at, self.add(bytes(each))), sum(each.outputs)
        assert not each.mask
        calls = [stage.call for stage in (Stage * each.stages).from_address(each.stage) if stage.call]
        layers = max(Call.from_address(call).hi for call in calls)
        for place, stage in self.structs(own + TreeDraft.stage.offset, each.stage, Stage, each.stages):
            self.maps(place + Stage.projection.offset, stage.projection)
            if stage.call:
                model, call = Model.from_address(stage.model), Call.from_address(stage.call)
                self.read(place + Stage.carried.offset, stage.carried, 2 * each.sequences * model.hidden)
                for there, _ in self.structs(place + Stage.model.offset, stage.model, Model):
                    self.layers(there, model, call)
                for there, _ in self.structs(place + Stage.call.offset, stage.call, Call):
                    self.call(there, call, model, layers, each.levels)
        hidden = Table.from_address(each.embedding).columns
        tokens = (library.LONG * outputs).from_address(each.tokens) if each.tokens else range(outputs)
        roots = (library.INT * each.sequences).from_address(each.roots)
        given = [*self.structs(own + TreeDraft.given.offset, each.given, library.Given, each.sequences)]
        others = [token for _, tree in given for token in (library.INT * tree.count).from_address(tree.tokens)]
        self.table(own + TreeDraft.embedding.offset, each.embedding, max(*tokens, *roots, *others) + 1)
        for i, head in enumerate(each.head):
            self.maps(own + TreeDraft.head.offset + 8 * i, head)
        self.read(own + TreeDraft.roots.offset, each.roots, 4 * each.sequences)
        self.read(own + TreeDraft.final.offset, each.final, 2 * each.sequences * hidden)
        self.read(own + TreeDraft.tokens.offset, each.tokens, 8 * outputs)
        self.read(own + TreeDraft.norm.offset, each.norm, 4 * hidden)
        self.read(own + TreeDraft.forbidden.offset, each.forbidden, each.sequences * each.outputs[1])
        self.read(own + TreeDraft.sampled.offset, each.sampled, each.sequences * ctypes.sizeof(library.Sampled))
        self.read(own + TreeDraft.rates.offset, each.rates, 4 * each.levels)
        self.read(own + TreeDraft.tables.offset, each.tables, 4 * 3 * len(KNOTS) * each.sequences)
        for place, tree in given:
            for name in ("tokens", "parents", "p"):
                self.read(place + getattr(library.Given, name).offset, getattr(tree, name), 4 * tree.count)
        for name in ("scores", "raw", "ids", "parents"):
            size = 4 * (each.levels * each.width * max(each.width, each.sequences) + len(others))
            self.write(own + getattr(TreeDraft, name).offset, getattr(each, name), size, 4)


def _rows(heads: list[int], size: int) -> bytes:
    return b"".join(ctypes.string_at(head, size) for head in heads)
