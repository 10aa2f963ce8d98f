"""Run llama.cpp on the CPU as an engine of ``peers``: its shared library, called through ctypes.

The library is in the folder $LLAMA_CPP, such as the unpacked npm package @node-llama-cpp/linux-x64, or else belongs to
an installed llama-cpp-python. If the folder has a backend for each kind of CPU, $LLAMA_CPP_CPU names the one to use,
such as "haswell" (AVX2 alone). Structures declare the fields that are equal in all versions; the field ``room`` covers
the others.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from peers import Put

CACHED, REPEATS = 128, 5  # tokens in the cache, and timings, of a pass: as specdec times its own
DEPTH = {"draft-model": 4, "ngram-cache": 16, "ngram-simple": 48}  # drafted a step unless it is given
SIMPLE, CACHED_NGRAMS = 12, (1, 4)  # tokens that ngram-simple and ngram-cache look for
PART = 512  # most tokens of a pass
POINTER, INT, COUNT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32


class ModelParams(ctypes.Structure):
    """llama.cpp's ``llama_model_params``: memory of sufficient size, which is only passed on."""

    _fields_ = (("room", ctypes.c_uint64 * 64),)


class ContextParams(ctypes.Structure):
    """llama.cpp's ``llama_context_params``: a context's sizes in tokens, and memory for further fields.

    context: size of the KV cache. batch: largest number of tokens of a call. part: largest number of tokens that are
        computed together. sequences: number of sequences.
    """

    _fields_ = (*((name, COUNT) for name in ("context", "batch", "part", "sequences")), ("room", COUNT * 124))


class LlamaBatch(ctypes.Structure):
    """llama.cpp's ``llama_batch``: the tokens of one forward pass.

    count: number of tokens. The others are C arrays with an entry for each token.
    token: its id. pos: its position. sequences, sequence: number and list of the sequences that it belongs to. output:
        whether its logits are wanted. embd: not used.
    """

    _fields_ = (
        ("count", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", POINTER),
        ("pos", ctypes.POINTER(INT)),
        ("sequences", ctypes.POINTER(INT)),
        ("sequence", ctypes.POINTER(ctypes.POINTER(INT))),
        ("output", ctypes.POINTER(ctypes.c_int8)),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {  # what it returns, what it takes
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_model_load_from_file": (POINTER, ctypes.c_char_p, ModelParams),
    "llama_model_get_vocab": (POINTER, POINTER),
    "llama_vocab_n_tokens": (INT, POINTER),
    "llama_init_from_model": (POINTER, POINTER, ContextParams),
    "llama_set_n_threads": (None, POINTER, INT, INT),
    "llama_batch_init": (LlamaBatch, INT, INT, INT),
    "llama_decode": (INT, POINTER, LlamaBatch),
    "llama_synchronize": (None, POINTER),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), POINTER, INT),
    "llama_get_memory": (POINTER, POINTER),
    "llama_memory_seq_rm": (ctypes.c_bool, POINTER, INT, INT, INT),
}

COMMON: dict[str, tuple[Any, ...]] = {  # of libllama-common, whose names are those of C++
    "common_ngram_simple_draft": (None, POINTER, POINTER, POINTER, INT),
    "common_ngram_cache_update": (None, POINTER, INT, INT, POINTER, INT, ctypes.c_bool),
    "common_ngram_cache_draft": (None, POINTER, POINTER, INT, INT, INT, POINTER, POINTER, POINTER),
}


class Vector(ctypes.Structure):
    """A C++ ``std::vector<int32_t>`` as libstdc++ stores it.

    begin: address of the first element. end: address after the last one. room: address after the vector's memory.
    """

    _fields_ = (("begin", POINTER), ("end", POINTER), ("room", POINTER))

    @classmethod
    def of(cls, ids: Sequence[int], room: int = 0) -> Vector:
        """Return a vector with the elements ``ids``. room: number of elements that can be added without new memory."""
        array = (INT * (len(ids) + room))(*ids)
        at = ctypes.addressof(array)
        made = cls(at, at + 4 * len(ids), at + 4 * len(array))
        made.array = array  # its memory
        return made

    def ids(self) -> list[int]:
        """Return the elements of the vector as a list."""
        count = ((self.end or 0) - (self.begin or 0)) // 4
        return list((INT * count).from_address(self.begin)) if count else []


def empty_map() -> Any:
    """Return the memory of an empty C++ ``std::unordered_map``, as libstdc++ stores it.

    It has one bucket, no element and a load factor of 1.
    """
    made = (ctypes.c_uint64 * 7)()
    made[0], made[1] = ctypes.addressof(made) + 48, 1
    ctypes.c_float.from_buffer(made, 32).value = 1.0
    return made


class Ngrams:
    """llama.cpp's own drafting by n-grams, which its server calls ``--spec-type`` ngram-cache and ngram-simple.

    depth: largest number of drafted tokens in a step. Raises ValueError if the library lacks a function.
    """

    def __init__(self, depth: int) -> None:
        (path,) = sorted((folder() or Path()).glob("libllama-common.*so"))
        lib, data = ctypes.CDLL(str(path)), path.read_bytes()
        self.depth, self.call = depth, dict[str, Any]()
        for name, (result, *arguments) in COMMON.items():
            mangled = re.search(rb"\0(_Z%d%s\w+)\0" % (len(name), name.encode()), data)
            if mangled is None:
                raise ValueError(f"{path.name} has no {name}; take another version of llama.cpp")
            function = lib[mangled[1].decode()]
            function.restype, function.argtypes = result, arguments
            self.call[name.removeprefix("common_ngram_")] = function
        self.begin()

    def begin(self) -> None:
        """Start a new request: forget the n-grams of the request before."""
        self.maps, self.entered = [empty_map() for _ in range(3)], 0  # context, dynamic, static

    def cache(self, ids: list[int]) -> list[int]:
        """Draft the tokens that most often followed the last tokens of the text ``ids``; return their ids.

        This is llama.cpp's method ngram-cache.
        """
        new = Vector.of(ids[max(self.entered - CACHED_NGRAMS[1], 0) :])
        at = [ctypes.addressof(each) for each in self.maps]
        self.call["cache_update"](at[0], *CACHED_NGRAMS, ctypes.byref(new), len(ids) - self.entered, False)
        self.entered = len(ids)
        text, draft = Vector.of(ids), Vector.of(ids[-1:], self.depth)
        self.call["cache_draft"](ctypes.byref(text), ctypes.byref(draft), self.depth, *CACHED_NGRAMS, *at)
        return draft.ids()[1:]

    def simple(self, ids: list[int]) -> list[int]:
        """Draft the tokens after the latest earlier occurrence of the text's last tokens; return their ids.

        ids: the text. This is llama.cpp's method ngram-simple.
        """
        found, config = Vector(), (ctypes.c_uint16 * 8)(SIMPLE, self.depth)
        text = Vector.of(ids[:-1])
        self.call["simple_draft"](ctypes.byref(found), config, ctypes.byref(text), ids[-1])
        return found.ids()


def folder() -> Path | None:
    """Return the folder of llama.cpp's library: $LLAMA_CPP or that of llama-cpp-python; None: there is neither."""
    if given := os.environ.get("LLAMA_CPP"):
        return Path(given)
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("lib")


def library() -> Any:
    """Load llama.cpp's shared library with the CPU backend that $LLAMA_CPP_CPU names, or with all backends; return it.

    Raises ValueError if the library or the backend is missing.
    """
    place, wanted = folder(), os.environ.get("LLAMA_CPP_CPU")
    if place is None or not (found := sorted(place.glob("libllama.*so"))):
        raise ValueError(f"no libllama in {place}; set LLAMA_CPP to a folder with it")
    lib = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    ggml = ctypes.CDLL(str(sorted(place.glob("libggml.*so"))[0]))
    ggml.ggml_backend_load.restype = POINTER
    if wanted:
        if not ggml.ggml_backend_load(str(place / f"libggml-cpu-{wanted}.so").encode()):
            raise ValueError(f"no backend '{wanted}' for this CPU in {place}")
    else:
        ggml.ggml_backend_load_all_from_path(str(place).encode())
    return lib


class LlamaContext:
    """A GGUF model that llama.cpp has loaded, with a KV cache.

    lib: llama.cpp's library. path: the GGUF file. threads: number of threads. context: size of the KV cache in tokens.
    rows: number of sequences in it.
    tokens: the token ids in the cache of sequence 0. vocabulary: size of the vocabulary.
    Raises ValueError if the model cannot be loaded or memory does not suffice.
    """

    def __init__(self, lib: Any, path: str, threads: int, context: int, rows: int = 1) -> None:
        self.lib, self.tokens = lib, list[int]()
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp cannot load {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        params = lib.llama_context_default_params()
        params.context, params.batch, params.part, params.sequences = context, PART, PART, rows
        self.handle = lib.llama_init_from_model(model, params)
        if not self.handle:
            raise ValueError(f"llama.cpp has no room for {context} tokens")
        lib.llama_set_n_threads(self.handle, threads, threads)
        self.memory, self.batch = lib.llama_get_memory(self.handle), lib.llama_batch_init(PART, 0, 1)

    def keep(self, count: int, row: int = 0) -> None:
        """Remove all but the first ``count`` tokens of a sequence from the KV cache. row: number of the sequence."""
        self.lib.llama_memory_seq_rm(self.memory, row, count, -1)
        del self.tokens[count:]

    def decode(self, ids: Sequence[int], outputs: int = 1, row: int = 0) -> None:
        """Run one forward pass over ``ids``, at most 512 tokens, which follow the tokens in the KV cache.

        outputs: number of last tokens after which logits are computed. row: number of the sequence. The tokens are
        added to the cache.
        """
        self.run([(token, len(self.tokens) + i, row) for i, token in enumerate(ids)], outputs)
        self.tokens += ids

    def run(self, tokens: Sequence[tuple[int, int, int]], outputs: int) -> None:
        """Run one forward pass over ``tokens``, triples (token id, position, sequence number).

        outputs: number of last tokens after which logits are computed. Raises ValueError if llama.cpp fails.
        """
        batch, first = self.batch, len(tokens) - outputs
        batch.count = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.sequences[i], batch.sequence[i][0] = 1, row
            batch.output[i] = i >= first
        if code := self.lib.llama_decode(self.handle, batch):
            raise ValueError(f"llama_decode failed with {code} at position {tokens[0][1]}")
        self.lib.llama_synchronize(self.handle)

    def logits(self, index: int) -> Any:
        """Return the logits after the token ``index`` of the last pass, float32 [V], valid until the next pass."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.handle, index), (self.vocabulary,))

    def follow(self, ids: list[int]) -> int:
        """Return the most likely token after the text ``ids``.

        Only the tokens that the KV cache does not begin with are run; the cache then has the whole text.
        """
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, ids, strict=False)) if a != b), len(self.tokens))
        self.keep(min(same, len(ids) - 1))
        while new := ids[len(self.tokens) :]:
            self.decode(new[:PART])
        return int(self.logits(-1).argmax())


class LlamaCpp:
    """Greedy decoding of a GGUF file by llama.cpp, as an engine that a benchmark runs in a process of its own.

    It decodes plainly, or drafts with n-grams or with a draft model.

    ngrams: llama.cpp's drafting by n-grams; None: it is not used.
    rows: number of sequences that are decoded together.
    keeps: whether a request reuses the KV cache of the request before.
    """

    ngrams: Ngrams | None
    rows = 1  # sequences that are decoded side by side
    keeps = False  # the cache of the last text, for the next one to begin with

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        lib = library()
        self.model, self.ngrams = LlamaContext(lib, path, threads, context * self.rows, self.rows), None
        settings: dict[str, Any] = {"version": "llama.cpp", "threads": threads, "context": context}
        self.drafts: Callable[[list[int]], list[int]] = lambda ids: []
        if mode:
            settings["drafted"] = self.depth = depth or DEPTH[mode]
        if mode == "draft-model":
            self.second, self.drafts = LlamaContext(lib, source, threads, context), self.drafted
        if mode.startswith("ngram"):
            self.ngrams = Ngrams(self.depth)
            self.drafts = self.ngrams.cache if mode == "ngram-cache" else self.ngrams.simple
        return settings

    def drafted(self, ids: list[int]) -> list[int]:
        """Draft tokens greedily after the text ``ids`` with the draft model; return their ids.

        Their number is the draft length with which the model was loaded.
        """
        out = list[int]()
        for _ in range(self.depth):
            out.append(self.second.follow(ids + out))
        return out

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        if not self.keeps:
            self.model.keep(0)
        if self.ngrams is not None:
            self.ngrams.begin()
        ids, end = [*ids, self.model.follow(ids)], len(ids) + count
        more = put(ids[-1:])
        while more:
            drafts = self.drafts(ids)[: max(end - len(ids) - 1, 0)]
            self.model.decode([ids[-1], *drafts], len(drafts) + 1)
            made = [int(self.model.logits(i).argmax()) for i in range(len(drafts) + 1)]
            accepted = next((i for i, (a, b) in enumerate(zip(drafts, made, strict=False)) if a != b), len(drafts))
            ids += made[: accepted + 1]
            self.model.keep(len(ids) - 1)
            more = put(made[: accepted + 1])

    def passes(self, sizes: list[int]) -> dict[str, float]:
        self.model.keep(0)
        self.model.follow(list(range(1, CACHED + 1)))
        best = dict[str, float]()
        for repeat, size in product(range(REPEATS + 1), sizes):
            start = time.perf_counter()
            self.model.decode(range(1000, 1000 + size), size)
            seconds = time.perf_counter() - start
            if repeat:  # the first ones warm up
                best[str(size)] = min(best.get(str(size), seconds), seconds)
            self.model.keep(CACHED)
        return best

    def logits(self, ids: list[int], count: int) -> Any:
        self.model.keep(0)
        rows = list[Any]()
        for start in range(0, len(ids) - 1, PART):
            part = ids[start : min(start + PART, len(ids) - 1)]
            outputs = min(len(part), max(start + len(part) - (len(ids) - 1 - count), 0))
            self.model.decode(part, outputs)
            rows += [self.model.logits(len(part) - outputs + i).copy() for i in range(outputs)]
        return np.stack(rows)


class LlamaCppKeeping(LlamaCpp):
    """llama.cpp as an engine of benchmarks that reuses the KV cache of its last text, as llama.cpp's server does."""

    keeps = True
