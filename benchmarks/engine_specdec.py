"""Run specdec itself as an engine of ``peers``: in a process of its own, with the same commands as other engines."""

from __future__ import annotations

from typing import Any

import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # the libraries' own lazy parts
from peers import Put

from specdec import SpecDecoder
from specdec.bench.pass_times import time_scoring
from specdec.verify.replay import replay


class Specdec:
    """Plain decoding with specdec, as an engine that a benchmark runs in a process of its own.

    Its ``load`` takes a ``mode``: "float32" (computed by transformers), a value of the option ``--weights``, or "": the
    default.
    """

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        torch.set_num_threads(threads)
        how = {"dtype": mode, "runtime": "transformers"} if mode == "float32" else {"weights": mode} if mode else {}
        self.decoder = SpecDecoder.from_pretrained(path, drafter="none", device="cpu", prefix_reuse=False, **how)
        target: Any = self.decoder.target
        return {
            "runtime": target.runtime,
            "storage": target.weight_format,
            "bytes_read": getattr(target, "bytes_read", None),
        }

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        with self.decoder.open([ids], max_new_tokens=count, ignore_eos=True) as generation:
            for events in generation.steps():
                if not all(put(new) for _, new in events):
                    break

    def passes(self, sizes: list[int]) -> dict[str, float]:
        return {str(n): seconds for n, seconds in time_scoring(self.decoder.target, sizes=sizes).items()}

    def logits(self, ids: list[int], count: int) -> Any:
        return replay(self.decoder.target, ids[:-count], ids[-count:]).numpy()
