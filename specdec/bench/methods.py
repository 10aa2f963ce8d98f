"""The methods of a benchmark: our decoder with a drafter, or ``model.generate`` in one of its modes, timed alike.

Tokens are raw ids on both sides, cut after the end-of-sequence token; nothing is re-tokenised. Knows no prompt sets and
no statistics.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from specdec.api.decoder import SpecDecoder
from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.bench.cell import Cell
from specdec.engine.metrics import RequestMetrics
from specdec.models import loading
from specdec.speculation.sampling import Sampler, SamplingParams

WARM_UP, CONTEXT = 8, 64  # new tokens and prompt tokens of the request that warms a method up
SAMPLING = ("temperature", "top_p", "top_k")
LOOKUP = 10  # tokens that model.generate's prompt lookup drafts where our depth is automatic


@dataclass
class Reply:
    """One request: a batch of prompts answered once.

    tokens: new ids per row. seconds: the whole call. first_seconds: until the first token; first_tokens came with it
    (assisted generation hands over whole steps). metrics: per row, of our own loop. reasons: why each row ended.
    peak_memory_mb: None where the system does not report it.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: float
    first_tokens: int
    metrics: list[RequestMetrics] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    peak_memory_mb: float | None = None

    @property
    def count(self) -> int:
        return sum(map(len, self.tokens))


class Method(Protocol):
    """seeded: sampled tokens depend on the seed alone, as those of plain decoding do."""

    lossless: bool
    seeded: ClassVar[bool]

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        """Answer ``prompts`` with at most ``count`` new tokens each."""

    def sampler(self, prompts: list[list[int]], count: int, seed: int) -> Sampler:
        """What chooses the tokens of such a reply."""


class OwnMethod:
    """Our loop with one drafter and one acceptance rule."""

    seeded: ClassVar[bool] = True

    def __init__(self, decoder: SpecDecoder, cell: Cell) -> None:
        self.decoder, self.cell = decoder, cell
        self.lossless = decoder.verifier.lossless

    def sampler(self, prompts: list[list[int]], count: int, seed: int) -> Sampler:
        cell = self.cell
        params = SamplingParams(cell.temperature, cell.top_k, cell.top_p, seed=seed)
        return self.decoder.sampler(prompts, [count] * len(prompts), params)

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        cell = self.cell
        start = time.perf_counter()
        settings = {name: getattr(cell, name) for name in ("num_speculative_tokens", *SAMPLING)}
        with self.decoder.open(prompts, max_new_tokens=count, seed=seed, **settings) as generation:
            steps = generation.steps()
            next(steps)
            first = time.perf_counter() - start
            for _ in steps:
                pass
            outputs = generation.outputs()
        seconds = time.perf_counter() - start
        return Reply(
            [out.token_ids for out in outputs],
            seconds,
            first,
            len(prompts),
            [out.metrics for out in outputs],
            [out.finish_reason for out in outputs],
        )


class HFMethod:
    """``model.generate``: plain, with prompt lookup, an early exit (option: exit_layer), or a draft model."""

    lossless = True
    seeded: ClassVar[bool] = False

    def sampler(self, prompts: list[list[int]], count: int, seed: int) -> Sampler:
        return self.base.sampler(prompts, [count] * len(prompts), SamplingParams())  # greedy replies are compared

    def __init__(self, base: SpecDecoder, name: str, given: dict[str, Any], cell: Cell) -> None:
        self.base, self.model, self.eos, self.name = base, base.model, base.eos_ids(), name
        kind, _, source = name.partition("=")
        options.check(kind, given, ("exit_layer",) if kind == "hf-early-exit" else ())
        if kind != "hf" and cell.batch_size > 1:
            raise SpecDecError(f"'{name}' decodes one prompt at a time; leave it out or use --batch-size 1")
        depth = cell.num_speculative_tokens
        self.extra: dict[str, Any] = {}
        if kind == "hf-lookup":
            self.extra["prompt_lookup_num_tokens"] = LOOKUP if depth == "auto" else depth
        elif kind == "hf-early-exit":
            layers = base.target.num_layers
            exit_layer = given.get("exit_layer", max(layers // 3, 1))
            self.extra["assistant_early_exit"] = options.whole("exit_layer", exit_layer, 1, layers - 1)
        elif kind == "hf-draft-model":
            if not source:
                raise SpecDecError("'hf-draft-model' needs a model; give hf-draft-model=MODEL")
            self.extra["assistant_model"] = loading.load(source, dtype=base.target.dtype, device=base.target.device)[0]
        self.drafts = kind in ("hf-early-exit", "hf-draft-model")
        self.depth = depth
        self.sampling: dict[str, Any] = {"do_sample": False}
        if cell.temperature > 0:
            self.sampling = {"do_sample": True, **{name: getattr(cell, name) for name in SAMPLING}}

    def reply(self, prompts: list[list[int]], count: int, seed: int) -> Reply:
        width, device = max(map(len, prompts)), self.model.device
        pad = next(iter(self.eos), 0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
        clock = _Clock()
        torch.manual_seed(seed)
        start = time.perf_counter()
        with self._draft_depth():
            out = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                pad_token_id=pad,
                streamer=clock,
                **self.sampling,
                **self.extra,
            )
        tokens = [self._cut(row) for row in out[:, width:].tolist()]
        return Reply(tokens, time.perf_counter() - start, clock.first - start, clock.tokens)

    @contextmanager
    def _draft_depth(self) -> Iterator[None]:
        """Assisted generation drafts as deep as our drafters; it reads that from the assistant's own configuration."""
        config = getattr(self.extra.get("assistant_model", self.model), "generation_config", None)
        given: dict[str, Any] = {}
        if self.drafts and self.depth != "auto":
            given = {"num_assistant_tokens": self.depth, "num_assistant_tokens_schedule": "constant"}
            given["assistant_confidence_threshold"] = 0.0
        before = {name: getattr(config, name, None) for name in given}
        try:
            for name, value in given.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    def _cut(self, row: list[int]) -> list[int]:
        """Without the padding behind the end-of-sequence token of a row that ended early."""
        end = next((i for i, token in enumerate(row) if token in self.eos), len(row))
        return row[: end + 1]


class _Clock(BaseStreamer):
    """Notes when the first new tokens arrive, and how many; ``generate`` hands over the prompt before that."""

    def __init__(self) -> None:
        self.calls, self.first, self.tokens = 0, 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first, self.tokens = time.perf_counter(), value.numel()

    def end(self) -> None:
        pass


class PeakMemory:
    """Peak memory while the block runs, in ``mb``: of the CUDA device's allocator, or resident in this process."""

    mb: float | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        self.known = True
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: restart the high-water mark
            except OSError:
                self.known = False
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif self.known:
            lines = Path("/proc/self/status").read_text("utf-8").splitlines()
            self.mb = next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), None)
