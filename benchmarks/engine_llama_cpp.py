"""llama.cpp through llama-cpp-python, as ``peers`` runs it."""

from __future__ import annotations

import time
from itertools import product
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding
from peers import Put

CACHED, REPEATS = 128, 5  # tokens in the cache, and timings, of a pass: as specdec times its own
DEPTH = {"lookup": 10, "draft-model": 4}  # tokens drafted a step where our depth is automatic


class DraftModel(LlamaDraftModel):  # type: ignore[misc]
    """Greedy drafts of a second model, whose cache keeps the common beginning."""

    def __init__(self, model: Llama, depth: int) -> None:
        self.model, self.depth = model, depth

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        drafts = self.model.generate(input_ids.tolist(), temp=0.0, repeat_penalty=1.0)
        return np.array([token for _, token in zip(range(self.depth), drafts, strict=False)], dtype=np.intc)


class LlamaCpp:
    """Greedy decoding of a GGUF file: plain, with the package's prompt lookup, or with a draft model."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        how: dict[str, Any] = {"n_ctx": context, "n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": 0}
        settings: dict[str, Any] = {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "threads": threads,
            "context": context,
        }
        draft: LlamaDraftModel | None = None
        if mode:
            settings["drafted"] = drafted = depth or DEPTH[mode]
            if mode == "lookup":
                draft = LlamaPromptLookupDecoding(num_pred_tokens=drafted)
            else:
                draft = DraftModel(Llama(source, verbose=False, **how), drafted)
        self.model = Llama(path, verbose=False, draft_model=draft, **how)
        return settings

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        self.model.n_tokens = 0  # nothing of the last request is kept
        self.model.reset()
        for token in self.model.generate(ids, temp=0.0, repeat_penalty=1.0):
            if not put([token]):
                break

    def passes(self, sizes: list[int]) -> dict[str, float]:
        self.model.reset()
        self.model.eval(list(range(1, CACHED + 1)))
        context, batch, best = self.model._ctx, self.model._batch, dict[str, float]()
        for repeat, size in product(range(REPEATS + 1), sizes):
            batch.set_batch(list(range(1000, 1000 + size)), n_past=CACHED, logits_all=True)
            start = time.perf_counter()
            context.decode(batch)
            llama_cpp.llama_synchronize(context.ctx)
            seconds = time.perf_counter() - start
            if repeat:  # the first ones warm up
                best[str(size)] = min(best.get(str(size), seconds), seconds)
            context.kv_cache_seq_rm(-1, CACHED, -1)
        return best
