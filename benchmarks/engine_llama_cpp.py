"""llama.cpp on the CPU, as an engine of ``peers``: its shared library, called through ctypes.

The library is that of the folder $LLAMA_CPP, such as the unpacked npm package @node-llama-cpp/linux-x64, else that of
an installed llama-cpp-python. If the folder has a backend for each kind of CPU, $LLAMA_CPP_CPU names the one to use,
such as "haswell" (AVX2 alone). Structures declare the fields that are equal in all versions; ``room`` covers the
others.
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
    """llama.cpp's ``llama_model_params``, as memory that is only passed on."""

    _fields_ = (("room", ctypes.c_uint64 * 64),)


class ContextParams(ctypes.Structure):
    """llama.cpp's ``llama_context_params``: sizes in tokens of context, batch and physical batch, and sequences."""

    _fields_ = (*((name, COUNT) for name in ("context", "batch", "part", "sequences")), ("room", COUNT * 124))


class LlamaBatch(ctypes.Structure):
    """llama.cpp's ``llama_batch``: tokens of one pass, their positions and sequences, and whether logits are wanted."""

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
    """A ``std::vector<int32_t>``: addresses of its first element, of the elements' end and of the memory's end."""

    _fields_ = (("begin", POINTER), ("end", POINTER), ("room", POINTER))

    @classmethod
    def of(cls, ids: Sequence[int], room: int = 0) -> Vector:
        """Return a vector of ``ids`` with memory for ``room`` more, so that pushing them allocates nothing."""
        array = (INT * (len(ids) + room))(*ids)
        at = ctypes.addressof(array)
        made = cls(at, at + 4 * len(ids), at + 4 * len(array))
        made.array = array  # its memory
        return made

    def ids(self) -> list[int]:
        """Return the elements."""
        count = ((self.end or 0) - (self.begin or 0)) // 4
        return list((INT * count).from_address(self.begin)) if count else []


def empty_map() -> Any:
    """Return the memory of an empty ``std::unordered_map`` of libstdc++: one bucket, no element, a load factor of 1."""
    made = (ctypes.c_uint64 * 7)()
    made[0], made[1] = ctypes.addressof(made) + 48, 1
    ctypes.c_float.from_buffer(made, 32).value = 1.0
    return made


class Ngrams:
    """llama.cpp's own drafting by n-grams, as its server's ``--spec-type`` ngram-cache and ngram-simple.

    depth: largest number of drafted tokens per step.
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
        """Start a new request: forget the n-grams of the last one."""
        self.maps, self.entered = [empty_map() for _ in range(3)], 0  # context, dynamic, static

    def cache(self, ids: list[int]) -> list[int]:
        """Draft the tokens that most often followed the last tokens of the text ``ids`` (ngram-cache)."""
        new = Vector.of(ids[max(self.entered - CACHED_NGRAMS[1], 0) :])
        at = [ctypes.addressof(each) for each in self.maps]
        self.call["cache_update"](at[0], *CACHED_NGRAMS, ctypes.byref(new), len(ids) - self.entered, False)
        self.entered = len(ids)
        text, draft = Vector.of(ids), Vector.of(ids[-1:], self.depth)
        self.call["cache_draft"](ctypes.byref(text), ctypes.byref(draft), self.depth, *CACHED_NGRAMS, *at)
        return draft.ids()[1:]

    def simple(self, ids: list[int]) -> list[int]:
        """Draft what followed the latest earlier occurrence of the last tokens of the text ``ids`` (ngram-simple)."""
        found, config = Vector(), (ctypes.c_uint16 * 8)(SIMPLE, self.depth)
        text = Vector.of(ids[:-1])
        self.call["simple_draft"](ctypes.byref(found), config, ctypes.byref(text), ids[-1])
        return found.ids()


def folder() -> Path | None:
    """Return the folder of llama.cpp's shared library; None if there is none."""
    if given := os.environ.get("LLAMA_CPP"):
        return Path(given)
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).with_name("lib")


def library() -> Any:
    """Load llama.cpp with the backend $LLAMA_CPP_CPU, else with all.

    Raises ValueError if library or backend is missing.
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
    """A loaded GGUF model with a KV cache of ``context`` tokens for ``rows`` sequences.

    tokens: the token ids in the cache of sequence 0. vocabulary: number of tokens of the vocabulary.
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
        """Remove all but the first ``count`` tokens of the sequence ``row`` from the KV cache."""
        self.lib.llama_memory_seq_rm(self.memory, row, count, -1)
        del self.tokens[count:]

    def decode(self, ids: Sequence[int], outputs: int = 1, row: int = 0) -> None:
        """Run one pass over ``ids``, at most ``PART`` tokens, after the tokens in the KV cache.

        outputs: for how many of the last tokens logits are computed. row: the sequence.
        """
        self.run([(token, len(self.tokens) + i, row) for i, token in enumerate(ids)], outputs)
        self.tokens += ids

    def run(self, tokens: Sequence[tuple[int, int, int]], outputs: int) -> None:
        """Run one pass over (token, position, sequence) triples; compute logits of the last ``outputs`` ones."""
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
        """Return the logits after token ``index`` of the last pass, float32 [V], valid until the next pass."""
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.handle, index), (self.vocabulary,))

    def follow(self, ids: list[int]) -> int:
        """Run the tokens of ``ids`` that the KV cache does not begin with; return the most likely next token."""
        same = next((i for i, (a, b) in enumerate(zip(self.tokens, ids, strict=False)) if a != b), len(self.tokens))
        self.keep(min(same, len(ids) - 1))
        while new := ids[len(self.tokens) :]:
            self.decode(new[:PART])
        return int(self.logits(-1).argmax())


class LlamaCpp:
    """Greedy decoding of a GGUF file by llama.cpp (``PeerEngine``): plain, with n-grams, or with a draft model.

    rows: sequences that are decoded together. keeps: whether a request reuses the KV cache of the last one.
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
        """Draft ``depth`` tokens after ``ids`` greedily with the draft model."""
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
    """llama.cpp that reuses the KV cache of its last text, as its server does with one slot."""

    keeps = True
