"""OpenVINO GenAI's ``LLMPipeline`` on the CPU, as ``peers`` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino
import openvino_genai
from peers import Put

DEPTH, NGRAM = 5, 3  # of prompt lookup: tokens drafted a step where our depth is automatic, longest n-gram


class Streamer(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Hands tokens on as they come."""

    def __init__(self, put: Put) -> None:
        super().__init__()
        self.put = put

    def write(self, token: int | Sequence[int]) -> Any:
        more = self.put([token] if isinstance(token, int) else list(token))
        return openvino_genai.StreamingStatus.RUNNING if more else openvino_genai.StreamingStatus.STOP

    def end(self) -> None:
        pass


class OpenVINO:
    """Greedy decoding of a GGUF file or of an exported folder: plain, or with prompt lookup."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        how: dict[str, Any] = {"prompt_lookup": True} if mode else {}
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=threads, **how)
        settings = {"version": f"openvino-genai {openvino_genai.__version__}", "threads": threads}
        self.drafting = {"num_assistant_tokens": depth or DEPTH, "max_ngram_size": NGRAM} if mode else {}
        return settings | self.drafting

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.ignore_eos = count, False, True
        for name, value in self.drafting.items():
            setattr(settings, name, value)
        self.pipeline.generate(openvino.Tensor(np.array([ids], dtype=np.int64)), settings, Streamer(put))

    def passes(self, sizes: list[int]) -> dict[str, float]:
        return {}

    def logits(self, ids: list[int], count: int) -> Any:
        raise NotImplementedError("its pipeline gives no logits")
