"""The methods of a benchmark, timed alike: our decoder with a drafter, or ``model.generate``.

Tokens are raw ids on both sides, cut after the end-of-sequence token; nothing is re-tokenised. Knows no prompt sets and
no statistics.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from transformers.generation.streamers import BaseStreamer

from specdec.api.decoder import SpecDecoder
from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.bench.cell import Cell, check_other
from specdec.engine.metrics import RequestMetrics
from specdec.models import loading
from specdec.models.gguf.blocks import densify, temporarily_dense

WARM_UP, CONTEXT = 8, 64  # new tokens and prompt tokens of the request that warms a method up
SAMPLING = ("temperature", "top_p", "top_k")
PASSES = (1, 2, 4, 8, 16)  # tokens of the passes that are timed before anything else
LOOKUP = 10  # tokens that model.generate's prompt lookup drafts where our depth is automatic


@dataclass
class Reply:
    """One request: a batch of prompts answered once.

    tokens: new ids per row. seconds: the whole call. arrivals: seconds until tokens came, a whole step at once;
    first_tokens came first. metrics: per row, of our own loop. reasons: why each row ended. peak_memory_mb: None where
    the system does not report it.
    """

    tokens: list[list[int]]
    seconds: float
    arrivals: list[float]
    first_tokens: int
    metrics: list[RequestMetrics] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    peak_memory_mb: float | None = None

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def first_seconds(self) -> float:
        """Until the first token."""
        return self.arrivals[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between arrivals."""
        return [after - before for before, after in pairwise(self.arrivals)]

    def pace(self, after_first: bool = False) -> float | None:
        """Seconds per token; None where there is none."""
        count = self.count - self.first_tokens * after_first
        return (self.seconds - self.first_seconds * after_first) / count if count > 0 else None


class Method:
    """What all methods have.

    seeded: sampled tokens depend on the seed alone. same_arithmetic: greedy tokens are those of plain decoding.
    engine: version and settings of another engine. pass_seconds: of its passes, by number of tokens.
    """

    lossless: bool = True
    seeded: ClassVar[bool] = False
    same_arithmetic: ClassVar[bool] = True
    engine: dict[str, Any] | None = None
    pass_seconds: Mapping[str, float] = MappingProxyType({})

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        """Answer ``prompts`` with at most ``count`` new tokens each."""
        raise NotImplementedError


class OwnMethod(Method):
    """Our loop with one drafter and one acceptance rule."""

    seeded = True

    def __init__(self, decoder: SpecDecoder, cell: Cell) -> None:
        self.decoder = decoder
        self.settings = {name: getattr(cell, name) for name in ("num_speculative_tokens", *SAMPLING)}
        self.lossless = decoder.verifier.lossless

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        start = time.perf_counter()
        with self.decoder.open(prompts, max_new_tokens=count, seed=seed, **self.settings) as generation:
            arrivals = [time.perf_counter() - start for _ in generation.steps()]
            outputs = generation.outputs()
        seconds = time.perf_counter() - start
        return Reply(
            [out.token_ids for out in outputs],
            seconds,
            arrivals,
            len(prompts),
            [out.metrics for out in outputs],
            [out.finish_reason for out in outputs],
        )


class HFMethod(Method):
    """``model.generate``: plain, with prompt lookup, an early exit (option: exit_layer), or a draft model."""

    def __init__(self, base: SpecDecoder, cell: Cell) -> None:
        given = cell.drafter_options
        kind, source = check_other(cell.drafter, given)
        if kind != "hf":
            one_at_a_time(cell)
        self.model = assistant = copy.copy(base.model)
        self.model.generation_config = copy.copy(base.model.generation_config)  # which assisted generation changes
        self.eos = base.eos_ids()
        depth = cell.num_speculative_tokens
        self.settings: dict[str, Any] = {"do_sample": False}
        if cell.temperature > 0:
            self.settings = {"do_sample": True, **{name: getattr(cell, name) for name in SAMPLING}}
        if kind == "hf-lookup":
            self.settings["prompt_lookup_num_tokens"] = LOOKUP if depth == "auto" else depth
        elif kind == "hf-early-exit":
            layers = base.target.num_layers
            exit_layer = given.get("exit_layer", max(layers // 3, 1))
            self.settings["assistant_early_exit"] = options.check_int("exit_layer", exit_layer, 1, layers - 1)
        elif kind == "hf-assistant":
            assistant = loading.load(source, dtype=base.target.dtype, device=base.target.device)[0]
            densify(assistant)
            self.settings["assistant_model"] = assistant
        if kind in ("hf-early-exit", "hf-assistant") and depth != "auto":
            config = assistant.generation_config  # how deep it drafts: as our drafters
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = depth, "constant"
            config.assistant_confidence_threshold = 0.0

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        width, device = max(map(len, prompts)), self.model.device
        pad = next(iter(self.eos), 0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        clock = _Clock()
        torch.manual_seed(seed)
        with temporarily_dense(self.model):
            start = time.perf_counter()
            out = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                pad_token_id=pad,
                streamer=clock,
                **self.settings,
            )
            tokens = [self._cut(row) for row in out[:, width:].tolist()]
            seconds = time.perf_counter() - start
        return Reply(tokens, seconds, [at - start for at in clock.arrivals], clock.tokens)

    def _cut(self, row: list[int]) -> list[int]:
        """Without the padding behind the end-of-sequence token of a row that ended early."""
        end = next((i for i, token in enumerate(row) if token in self.eos), len(row))
        return row[: end + 1]


class _Clock(BaseStreamer):
    """Notes when new tokens arrive, and how many come first; ``generate`` hands over the prompt before that."""

    def __init__(self) -> None:
        self.calls, self.arrivals, self.tokens = 0, list[float](), 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls > 1:
            self.arrivals.append(time.perf_counter())
        if self.calls == 2:
            self.tokens = value.numel()

    def end(self) -> None:
        pass


def one_at_a_time(cell: Cell) -> None:
    """Raise SpecDecError for a batch."""
    if cell.batch_size > 1:
        raise SpecDecError(f"'{cell.drafter}' decodes one prompt at a time; leave it out or use --batch-size 1")


class PeakMemory:
    """Peak memory while the block runs, in ``mb``: of the CUDA device's allocator, or resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb: float | None = None

    def __enter__(self) -> PeakMemory:
        self.known = self.device.type == "cuda"
        if self.known:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # Linux: restart the high-water mark
                self.known = Path("/proc/self/clear_refs").write_text("5") > 0
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif self.known and (found := re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text("utf-8"))):
            self.mb = int(found[1]) * 1024 / 1e6
