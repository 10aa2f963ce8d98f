"""The compiled kernels: finds and loads them, and defines the structures of their arguments, explained in native.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base import machine
from specdec.base.errors import SettingError, SpecDecError

LIBRARY = Path(__file__).with_name("_native.so")  # setup.py builds it
log = logging.getLogger(__name__)
BF16, Q8, Q4, Q5, K4, K5, K6, MX = range(8)  # as in native.h
BUFFERS, WIDEST_HEAD = 2, 512
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
LEVEL = "SPECDEC_NATIVE"  # environment variable: the best instruction set that may be used
ARM = platform.machine() in ("aarch64", "arm64")
LEVELS = ("", "neon", "i8mm") if ARM else ("", "avx2", "avxvnni", "avx512", "amx")  # as specdec_open counts
SUFFIXES = {"amx": "avx512"}  # of the kernels' names, where they are not the instruction set's
KERNELS: dict[str, tuple[Any, ...]] = {  # compiled for every instruction set: type of the result, of the arguments
    "layers": (INT, POINTER, POINTER),
    "linear": (INT, POINTER, POINTER, FLOAT, INT, POINTER, INT, INT, POINTER, POINTER, INT, INT),
    "draft_tree": (INT, POINTER),
    "block_tiles": (LONG, INT, INT, INT, POINTER),
    "pack_blocks": (INT, POINTER, INT, POINTER, INT),
    "read_rows": (None, POINTER, POINTER, LONG, POINTER, INT),
    "pack": (None, POINTER, INT, INT, POINTER, INT),
    "pack_rounded": (INT, POINTER, INT, INT, POINTER, POINTER, INT),
    "checksum": (ctypes.c_uint64, POINTER, LONG, LONG, INT),
}


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Return ``_fields_`` entries (name, type) of a ctypes structure for fields that all have one type.

    kind: the ctypes type.
    names: names of the fields, with spaces between them.
    """
    return [(name, kind) for name in names.split()]


class LinearPart(ctypes.Structure):
    """Some outputs (rows of the weight) of a linear layer, stored in one format of tiles (``LinearPart`` in native.h).

    A tile has the weights of 16 outputs and 32 inputs.

    kind: number of the weight format: 0 to 7 for BF16, Q8, Q4, Q5, K4, K5, K6 and MX.
    end: number of output tiles (rows / 16) of this part and of those before it.
    tiles: address of the tiles.
    """

    _fields_ = (*_fields(INT, "kind end"), ("tiles", POINTER))


class Linear(ctypes.Structure):
    """A linear layer y = scale (W x + bias), then cap tanh(y / cap) unless ``cap`` is 0 (``Linear`` in native.h).

    rounded: whether inputs are rounded to 8 bits. out, inp: numbers of outputs and inputs, multiples of 16 and 32.
    count: number of ``parts``. scale, cap: floats.
    parts: address of an array of ``LinearPart``, which have the outputs in order, one part after the other.
    bias: address of float32 [out]; None: no bias.
    proxy: address of 4-bit tiles by which the largest output is found; None: there are none.
    error_bounds: address of float32 [out], the largest error of each entry of W x by ``proxy`` for an x of Euclidean
        length 1; the error is proportional to the length.
    """

    _fields_ = (
        *_fields(INT, "rounded out inp count"),
        *_fields(FLOAT, "scale cap"),
        *_fields(POINTER, "parts bias proxy error_bounds"),
    )


class Table(ctypes.Structure):
    """A table whose rows are read by index, such as token embeddings (``Table`` in native.h).

    type: ggml's number of the block format, or -1 for bf16. columns: length of a row. stride: bytes of a row.
    data: address of the rows. order: address of int32, the row of ``data`` that each index means; None: the same.
    scale: factor of the values.
    """

    _fields_ = (*_fields(INT, "type columns"), ("stride", LONG), *_fields(POINTER, "data order"), ("scale", FLOAT))


class Layer(ctypes.Structure):
    """The weights and settings of one decoder layer, for the kernels (``Layer`` in native.h, with more details).

    Linear layers are ``Linear`` structures, ``embedded`` is a ``Table``. Other weights are addresses of float32 arrays;
    None: the layer has none.

    qkv, out, gate_up, down: the linear layers before and after attention (or the recurrent mixer), and of the MLP.
    router: linear layer of a mixture of experts that chooses experts. gates, sums: addresses of arrays with a
        ``Linear`` for each expert, like ``gate_up`` and ``down``; ``gate_up`` and ``down`` are then the shared expert.
    rates: write strengths and decay rates of a recurrent layer.
    norm_in, norm_mlp: norms of the inputs of attention and MLP. norm_attended, norm_out: norms of their results.
    norm_q, norm_k: norms of queries and keys. sinks: attention sinks, [heads].
    convolution, decay, decay_bias, norm_mixed: parameters of a recurrent layer (``mixer.parameters``).
    embedded_in, embedded_gate, embedded_out, embedded, norm_embedded, norm_added: the layer's own embedding of each
        token, which is added to its output (Gemma 4); linear layers without outputs: there is none.
    scale: factor of the layer's output.
    rotary_q, rotary_k: indices of the rotary tables of queries and keys; -1: no rotation. rotated: rotated dimensions.
    place: index of the layer in its buffer of the KV cache, or among the recurrent layers. tiled: whether ``out`` takes
        the first value head of every key head, then the second one, and so on.
    buffer: number of the KV cache's buffer. reads: whether the keys and values are those of another layer.
    """

    _fields_ = (
        *_fields(Linear, "qkv out gate_up down router rates"),
        *_fields(POINTER, "gates sums"),
        *_fields(POINTER, "norm_in norm_mlp norm_attended norm_out norm_q norm_k"),
        *_fields(POINTER, "sinks convolution decay decay_bias norm_mixed"),
        *_fields(Linear, "embedded_in embedded_gate embedded_out"),
        ("embedded", Table),
        *_fields(POINTER, "norm_embedded norm_added"),
        ("scale", FLOAT),
        *_fields(INT, "rotary_q rotary_k rotated place tiled buffer reads"),
    )


class Heads(ctypes.Structure):
    """The key heads of the layers in one buffer of the KV cache (``Heads`` in native.h).

    count: number of heads; 0: there is no such buffer. size: number of values of a head.
    """

    _fields_ = _fields(INT, "count size")


class Model(ctypes.Structure):
    """The sizes and settings of a model, and its layers, for the kernels (``Model`` in native.h, with more details).

    hidden, heads: hidden size, number of query heads. inner: largest number of inputs of a ``down``, of experts too.
    rotated: rotated dimensions of a head, at most, which is the width of rotary tables.
    buffers: the key heads of each buffer of the KV cache. rounded: whether activations are quantized to 8 bits.
    experts, top_k, normalize_top_k: the fields of ``families.Mixture``.
    round_after_weight: whether norms round only after their weights. activation: index in ``families.ACTIVATIONS``.
    across: whether one norm covers all heads of the queries, or of the keys. tables: number of rotary tables.
    gated: whether each query head is followed by a gate. normed_values: whether values have a norm over each head.
    recurrent: number of recurrent layers. key_heads, value_heads, key_dim, value_dim, taps: fields of
        ``families.Mixer``.
    eps: of all norms. scale, cap: factor and soft cap of attention scores; a cap of 0 is none.
    limit, alpha: constants of the activation "clamped".
    demand: address of the function that loads experts (``MappedExperts``); None: all are in memory.
    embedding: address of the ``Table`` of token embeddings. layers: address of the array of ``Layer``.
    """

    _fields_ = (
        *_fields(INT, "hidden heads inner rotated"),
        ("buffers", Heads * BUFFERS),
        ("rounded", INT),
        *_fields(INT, "experts top_k normalize_top_k"),
        *_fields(INT, "round_after_weight activation across tables gated normed_values"),
        *_fields(INT, "recurrent key_heads value_heads key_dim value_dim taps"),
        *_fields(FLOAT, "eps scale cap limit alpha"),
        *_fields(POINTER, "demand embedding layers"),
    )


class SequenceArgs(ctypes.Structure):
    """One sequence of a pass: its tokens, and its keys, values and recurrent states (``Sequence`` in native.h).

    tokens: number of its tokens in the pass. start: first cache slot that they get.
    committed: number of committed tokens. filled: number of slots that layers see which read another layer's keys.
    capacity: number of slots in each buffer. keys, values: addresses of the buffers.
    trees: address of the tree masks, by kind of attention window; None: a chain.
    held: number of uncommitted tokens before the pass. slots: capacity of ``inputs`` in tokens.
    states, ahead: addresses of the recurrent states before the pass, and of those after it, to be written (None: not).
    inputs: address of the stored inputs of recurrent layers. pending: address of int32, pending tokens of each layer.
    """

    _fields_ = (
        *_fields(INT, "tokens start committed filled"),
        ("capacity", INT * BUFFERS),
        *_fields(POINTER * BUFFERS, "keys values"),
        ("trees", POINTER),
        *_fields(INT, "held slots"),
        *_fields(POINTER, "states ahead inputs pending"),
    )


class Call(ctypes.Structure):
    """A pass of several sequences through layers [lo, hi) (``Call`` in native.h).

    count, tokens: number of sequences, and of all their tokens. threads: number of threads.
    windows: number of kinds of attention windows. cache: format of the KV cache; 0: bf16, 1: 8 bits.
    near: number of last committed tokens that are seen, beside the first ones; 0: all are.
    The others are addresses. sequences: ``SequenceArgs`` [count]. spans: tokens in each kind of window, 0: all.
    x: bf16 [tokens, hidden], input and output. positions: int64 [tokens]. ids: int32 [tokens], token ids, or None.
    rotary: tables of cosines and sines. window: for each layer, its kind of window.
    taps: for each layer, where to write its input, or None. routed: where to write router logits, or None.
    """

    _fields_ = (
        *_fields(INT, "count tokens lo hi threads windows cache near"),
        *_fields(POINTER, "sequences spans x positions ids rotary window taps routed"),
    )


class Stage(ctypes.Structure):
    """One projection of a draft path, and the layers after it (``Stage`` in native.h). All fields are addresses.

    projection: a ``Linear``. carried: bf16 [sequences, hidden], the layers' input of the token before each root.
    model, call: the ``Model`` and ``Call`` with which the layers run; None: the last projection has no layers after it.
    """

    _fields_ = _fields(POINTER, "projection carried model call")


class Sampled(ctypes.Structure):
    """The sampling parameters of one sequence, as the kernels read them (``Sampled`` in native.h).

    seed, stream: the key of the sequence's noise. place: position of the first token to draft.
    sharpness: 1 / temperature; 0: decoding is greedy. top_p, min_p, top_k: the usual limits; 1, 0 and 0 are none.
    """

    _fields_ = (
        *_fields(ctypes.c_uint64, "seed stream"),
        ("place", LONG),
        *_fields(FLOAT, "sharpness top_p min_p"),
        ("top_k", INT),
    )


class Given(ctypes.Structure):
    """The tree of tokens that another source, such as n-grams, proposes for a sequence (``Given`` in native.h).

    count: number of nodes. tokens, parents: addresses of int32 [count]; a parent is 0 for the root, i + 1 for node i.
    p: address of float32 [count], the source's probability of each node after its parent.
    """

    _fields_ = (("count", INT), *_fields(POINTER, "tokens parents p"))


class TreeDraft(ctypes.Structure):
    """The arguments and results of drafting a tree, or chains with siblings, along the stages of a draft path.

    It is ``TreeDraft`` in native.h; ``TreeDrafter`` fills and reads it. A level is all draft nodes of one depth; R is
    the number of sequences. Fields are addresses if no other type is said; None: unused.

    stages, levels, width, sequences: number of stages, maximum number of levels, children of a node, R (int32).
    roots: int32 [R], last token of each sequence. stage: array of ``Stage``. embedding: ``Table`` of token embeddings.
    final: bf16 [R, hidden], final states of the token before each root.
    head: one or two ``Linear`` output heads. outputs: int32 [2], numbers of their outputs.
    tokens: int64, token id of each output; None: its index. norm: float32, weight of the final norm.
    eps, unit_eps: epsilons of the final norm and of the projections' norms (float).
    level, node: costs of a level and of a node, as in ``TreeLimits`` (float). rates: float32 [levels].
    tables: float32 [R][3][11], calibration tables. given: ``Given`` [R], trees of another source.
    scores, raw: results, float32: log-probabilities of the candidates' paths, and raw probabilities by the heads.
    ids, parents: results, int32: token ids of the candidates, and parents (i + 1: candidate i, -r: root of sequence r).
    mask: a ``MaskCall``, which sets ``allowed``: for each node of a level, the address of a bool mask of tokens.
    forbidden: bool [R, outputs of the second head], what a sequence may not draft. sampled: ``Sampled`` [R].
    """

    _fields_ = (
        *_fields(INT, "stages levels width sequences"),
        *_fields(POINTER, "roots stage embedding final"),
        *(("head", POINTER * 2), ("outputs", INT * 2)),
        *_fields(POINTER, "tokens norm"),
        *_fields(FLOAT, "eps unit_eps level node"),
        *_fields(POINTER, "rates tables given scores raw"),
        *_fields(POINTER, "ids parents mask allowed forbidden sampled"),
    )


MaskCall = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(INT))  # ``TreeDraft.mask``


def could_run(cpuinfo: Path = machine.CPUINFO) -> bool:
    """Return whether this CPU has the instructions that the kernels need, also if the kernels are not built.

    cpuinfo: the file that describes the CPU, in the format of ``/proc/cpuinfo``.
    """
    features = machine.features(cpuinfo)
    apple = ARM and sys.platform == "darwin"  # all of them have dot products
    return {"avx2", "fma", "f16c"} <= features or "asimddp" in features or apple


@functools.cache
def _notice() -> None:
    if could_run():
        log.warning(
            "The native kernels are not built, so models run through PyTorch, those in bfloat16 several times slower "
            "than this CPU can. Install a C compiler and then specdec again, or a wheel that has the kernels."
        )


def _most() -> int:
    name = os.environ.get(LEVEL) or LEVELS[-1]
    if name not in LEVELS[1:]:
        raise SettingError(f"{LEVEL}='{name}' is unknown; it is {', '.join(LEVELS[1:-1])} or {LEVELS[-1]}")
    return LEVELS.index(name)


@functools.cache
def load() -> Any:
    """Load the compiled kernels and return the ``ctypes`` library. Cached.

    The library has a function ``specdec_NAME`` for each name in ``KERNELS``, which uses the best instruction set of
    this CPU. Its attribute ``level`` is the name of that instruction set, such as "avx512". The environment variable
    SPECDEC_NATIVE limits it.

    Raises SpecDecError if the kernels are not built, cannot be loaded, or do not run on this CPU; SettingError if the
    environment variable has an unknown value.
    """
    most = _most()
    if not LIBRARY.exists():
        _notice()
        raise SpecDecError("the native kernels are not built; install specdec where there is a C compiler")
    try:
        ctypes.CDLL(openmp(), mode=ctypes.RTLD_GLOBAL)
        found: Any = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise SpecDecError(f"the native kernels cannot be loaded ({error})") from None
    try:
        found.level = LEVELS[found.specdec_open(most)]
        if not found.level:
            name = machine.processor_name()
            raise SpecDecError(
                "the native runtime needs an x86 CPU with AVX2, FMA and F16C, or an Arm CPU with dot products "
                f"(asimddp); this one is {name}"
            )
        written = LinearPart, Linear, Table, Layer, Model, SequenceArgs, Call, Stage, Sampled, Given, TreeDraft
        found.specdec_sizes(sizes := (INT * len(written))())
        if sizes[:] != [ctypes.sizeof(each) for each in written]:
            raise AttributeError  # as if it had no such kernels
        found.specdec_large_pages.argtypes, found.specdec_collapse.argtypes = (POINTER, LONG), (POINTER,)
        found.specdec_tiles_bytes.argtypes, found.specdec_tiles_bytes.restype = (INT, LONG, LONG), LONG
        for name, (result, *arguments) in KERNELS.items():
            kernel = getattr(found, f"specdec_{name}_{SUFFIXES.get(found.level, found.level)}")
            kernel.restype, kernel.argtypes = result, arguments
            setattr(found, f"specdec_{name}", kernel)
    except AttributeError:  # an editable install whose sources went on without it
        raise SpecDecError("the native kernels were built from older sources; install specdec again") from None
    return found


def version() -> str:
    """Return the instruction set in use and a SHA-256 of the kernels' file, such as "avx512 3f2a..".

    Equal versions compute equal bits. Raises what ``load`` raises.
    """
    return f"{load().level} {hashlib.sha256(LIBRARY.read_bytes()).hexdigest()}"


def openmp() -> str | None:
    """Return the file name of the OpenMP library (threads of C code) that PyTorch uses.

    If it cannot be found, the result is "libgomp.so.1" on Linux, and else None.

    ``load`` makes the kernels use the same one, because the threads of two libraries would compete for the cores.
    """
    torch_itself, process = ctypes.CDLL(torch._C.__file__), ctypes.CDLL(None)
    try:
        name = "GOMP_parallel" if sys.platform == "linux" else "__kmpc_fork_call"  # gcc's, clang's
        entry, found = ctypes.cast(getattr(torch_itself, name), POINTER), _Symbol()
        if process.dladdr(entry, ctypes.byref(found)) and found.file:
            return os.fsdecode(found.file)
    except AttributeError:  # PyTorch was built without it, or the system has no dladdr
        pass
    return "libgomp.so.1" if sys.platform == "linux" else None


class _Symbol(ctypes.Structure):
    """The C structure ``Dl_info``: the file and the symbol that an address belongs to, as ``dladdr`` returns them."""

    _fields_ = (("file", ctypes.c_char_p), ("base", POINTER), ("name", ctypes.c_char_p), ("address", POINTER))


@functools.cache
def runs() -> bool:
    """Return whether the kernels are built and run on this CPU. Cached.

    Raises SettingError if the environment variable SPECDEC_NATIVE has an unknown value.
    """
    try:
        load()
    except SettingError:
        raise
    except SpecDecError:
        return False
    return True


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first element, for a C structure; None for None."""
    return None if tensor is None else tensor.data_ptr()


def done(code: int) -> None:
    """Raise MemoryError if a kernel's return value ``code`` is negative: it could not allocate memory."""
    if code < 0:
        raise MemoryError("can't allocate memory for a pass of the native runtime")
