"""The methods of a benchmark: specdec with a drafter, or ``model.generate``, timed in the same way.

Tokens are raw ids, cut after the end-of-sequence token; nothing is tokenized again.
"""

from __future__ import annotations

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
from specdec.base import machine
from specdec.base.errors import SpecDecError
from specdec.bench.cell import Cell, check_external
from specdec.engine.metrics import RequestMetrics
from specdec.models.gguf.blocks import temporarily_dense
from specdec.models.native_model import as_transformers

WARM_UP, CONTEXT = 8, 64  # new tokens and prompt tokens of the warm-up request
SAMPLING = ("temperature", "top_p", "top_k")
PASSES = (1, 2, 4, 8, 16)  # numbers of tokens in the passes that are timed before the requests
LOOKUP = 10  # draft length of model.generate's prompt lookup if the cell's is "auto"


@dataclass
class Reply:
    """A method's answers to one request, which is a batch of prompts (rows), with their timing.

    tokens: new token ids of each row.
    seconds: duration of the whole call.
    arrivals: seconds from the start of the call until each delivery; a step delivers all its tokens at once.
    first_tokens: number of tokens in the first delivery, over all rows.
    metrics, reasons: metrics and finish reason of each row; empty for other engines than specdec.
    peak_memory_mb: peak memory during the call; None where the system does not report it.
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
        """Seconds from the start until the first token."""
        return self.arrivals[0]

    @property
    def intervals(self) -> list[float]:
        """Seconds between consecutive deliveries of tokens."""
        return [after - before for before, after in pairwise(self.arrivals)]

    def seconds_per_token(self, after_first: bool = False) -> float | None:
        """Return the call's seconds per new token; None without tokens.

        after_first: whether to leave out the first delivery and the time until it.
        """
        count = self.count - self.first_tokens * after_first
        return (self.seconds - self.first_seconds * after_first) / count if count > 0 else None


class Method:
    """Base class of the methods that a benchmark compares: an engine with its settings, which answers prompts.

    A subclass implements ``reply``.

    lossless: whether the output follows the model's own distribution.
    seeded: whether equal seeds draw the tokens of plain decoding, so that sampled output can be compared with it.
    same_arithmetic: whether tokens must equal those of plain decoding but for near-ties; not if an engine has other
        kernels or weights, or rounds other values.
    engine: version and settings of an external engine; None: specdec or transformers.
    pass_seconds: number of tokens (as text) -> seconds of a forward pass of an external engine; empty: not measured.
    """

    lossless: bool = True
    seeded: ClassVar[bool] = False
    same_arithmetic: bool = True
    engine: dict[str, Any] | None = None
    pass_seconds: Mapping[str, float] = MappingProxyType({})

    def reply(self, prompts: list[list[int]], count: int, seed: int, scope: str = "") -> Reply:
        """Answer the batch ``prompts`` (token ids) with at most ``count`` new tokens each. seed: that of sampling.

        scope: a name; texts that were answered under another name are not used for drafts.
        """
        raise NotImplementedError


class OwnMethod(Method):
    """A method of specdec, which answers with ``decoder``, its drafter and its verifier.

    cell: the cell (settings of one measurement) that gives draft length and sampling parameters.
    """

    seeded = True

    def __init__(self, decoder: SpecDecoder, cell: Cell) -> None:
        self.decoder = decoder
        self.settings = {name: getattr(cell, name) for name in ("num_speculative_tokens", *SAMPLING)}
        self.lossless = decoder.verifier.lossless

    def reply(self, prompts: list[list[int]], count: int, seed: int, scope: str = "") -> Reply:
        start = time.perf_counter()
        with self.decoder.open(prompts, max_new_tokens=count, seed=seed, scope=scope, **self.settings) as generation:
            steps = ((time.perf_counter() - start, new) for new in generation.steps())
            deliveries = [(at, sum(len(tokens) for _, tokens in new)) for at, new in steps]
            outputs = generation.outputs()
        seconds = time.perf_counter() - start
        if failed := next((why for out in outputs if (why := out.metrics.drafting_off) is not None), None):
            raise SpecDecError(failed)
        return Reply(
            [out.token_ids for out in outputs],
            seconds,
            [at for at, _ in deliveries],
            deliveries[0][1],  # not one of each row: a long prompt takes several steps
            [out.metrics for out in outputs],
            [out.finish_reason for out in outputs],
        )


class HFMethod(Method):
    """The methods ``hf`` and ``hf-lookup``: ``model.generate`` of transformers, plain or with prompt lookup.

    base: the decoder whose model and end tokens are used. cell: names the method and its options, and gives the
        sampling parameters.
    """

    def __init__(self, base: SpecDecoder, cell: Cell) -> None:
        kind, _ = check_external(cell.drafter, cell.drafter_options)
        self.model, self.eos = as_transformers(base.model), base.eos_ids()
        target = base.target
        rounded = "rounded" in target.weight_format or {target.activations, target.kv_cache} != {"as computed"}
        self.same_arithmetic = not rounded  # model.generate rounds none of these
        self.settings: dict[str, Any] = {"do_sample": False}
        if cell.temperature > 0:
            self.settings = {"do_sample": True, **{name: getattr(cell, name) for name in SAMPLING}}
        if kind == "hf-lookup":
            refuse_batches(cell)
            depth = cell.num_speculative_tokens
            self.settings["prompt_lookup_num_tokens"] = LOOKUP if depth == "auto" else depth

    def reply(self, prompts: list[list[int]], count: int, seed: int, scope: str = "") -> Reply:
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
                eos_token_id=sorted(self.eos) or None,
                streamer=clock,
                **self.settings,
            )
            tokens = [self._cut(row) for row in out[:, width:].tolist()]
            seconds = time.perf_counter() - start
        return Reply(tokens, seconds, [at - start for at in clock.arrivals], clock.tokens)

    def _cut(self, row: list[int]) -> list[int]:
        """Return the token ids of ``row`` up to and with its first end token, without the padding after it."""
        end = next((i for i, token in enumerate(row) if token in self.eos), len(row))
        return row[: end + 1]


class _Clock(BaseStreamer):
    """A streamer for ``model.generate`` that records when new tokens arrive. Its first call passes the prompt.

    arrivals: ``time.perf_counter()`` of each delivery. tokens: number of tokens in the first delivery.
    """

    def __init__(self) -> None:
        self.calls = 0  # of ``put``
        self.arrivals = list[float]()
        self.tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls > 1:
            self.arrivals.append(time.perf_counter())
        if self.calls == 2:
            self.tokens = value.numel()

    def end(self) -> None:
        pass


def refuse_batches(cell: Cell) -> None:
    """Raise SpecDecError if the cell decodes several prompts together, for methods that cannot."""
    if cell.batch_size > 1:
        raise SpecDecError(f"'{cell.drafter}' decodes one prompt at a time; leave it out or use --batch-size 1")


class PeakMemory:
    """A context manager that measures the peak memory of its ``with`` block.

    mb: the peak in MB, set when the block ends: allocated on the CUDA device ``device``, or resident in this process
    for other devices (Linux). None: the system does not report it.
    """

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
        elif self.known:
            self.mb = machine.resident("VmHWM")
