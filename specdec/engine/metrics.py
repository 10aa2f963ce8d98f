"""Figures of one request, in vLLM's names, and the time that an engine's phases take. Knows nothing about models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.base.devices import record_event

MANY_ROWS = 3  # that decode together, from which on drafts may not pay for their number


@dataclass
class RequestMetrics:
    """The figures of one request. Seconds are wall time; the rows of a batch share their steps' time.

    per_step_drafted, per_step_accepted: draft depth and number of accepted drafted tokens, per step after the prefill.
    phases: seconds by phase: prefill, draft, score, accept, commit, detokenise (text and stop strings) and overhead
        (choosing depths, bookkeeping). They sum up to the wall time but for what the caller does between steps. Until
        the request ends, these are the engine's seconds for all requests.
    num_layers: N, the model's number of layers.
    exit_layers: number of layers run, for each token that was accepted without scoring.
    experts: figures of reading experts from the disk while decoding, of all rows, by name, such as "hit_rate" and
        "bytes_per_token" (``MappedExperts.figures``); {}: all experts are in memory.
    queue_seconds: time from the submission until the request began.
    first_token_seconds: time from the submission to the first token; 0.0 before there is one.
    last_token_seconds: time from the submission to the last token so far.
    accepted_by_source: number of accepted drafted tokens by what proposed them: "ngram", the name of another drafter,
        or "constraint".
    draft_saved_seconds: estimated time that drafting has saved; 0 where the depth is fixed.
    drafting_off: why nothing is drafted, if the drafter has failed; else None.
    rows: sum of the numbers of rows of its steps.
    num_cached_tokens: number of prompt tokens whose keys and values were cached.
    saved_seconds: estimated time that the cached tokens would have taken.
    """

    num_prompt_tokens: int = 0  # tokens of the prompt
    num_new_tokens: int = 0  # generated tokens, the end token included
    per_step_drafted: list[int] = field(default_factory=list)
    per_step_accepted: list[int] = field(default_factory=list)
    num_draft_tokens: int = 0  # drafted tokens that were scored, all branches of trees included
    num_layers: int = 0
    exit_layers: list[int] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    last_token_seconds: float = 0.0
    num_cached_tokens: int = 0
    saved_seconds: float = 0.0
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    draft_saved_seconds: float = 0.0
    drafting_off: str | None = None
    rows: int = 0

    @property
    def num_drafted_steps(self) -> int:
        """Number of steps that scored drafted tokens."""
        return sum(drafted > 0 for drafted in self.per_step_drafted)

    @property
    def draft_note(self) -> str | None:
        """The reason, a short English phrase, why drafting did not make decoding faster; None: it did.

        None also before the first step after the prefill.
        """
        steps = self.num_spec_steps
        if self.drafting_off is not None:
            return self.drafting_off
        if not steps or (2 * self.num_drafted_steps >= steps and self.draft_saved_seconds >= 0):
            return None
        if self.rows >= MANY_ROWS * steps:
            return "the batch is too large for drafts to pay"
        often = 2 * self.num_accepted_draft_tokens >= steps
        return "drafts cost what they saved" if often else "drafts were rarely right"

    @property
    def prefill_seconds(self) -> float:
        """The seconds of running the prompt."""
        return self.phases.get("prefill", 0.0)

    @property
    def decode_seconds(self) -> float:
        """The seconds of all phases but the prefill."""
        return sum(self.phases.values()) - self.prefill_seconds

    @property
    def num_spec_steps(self) -> int:
        """The number of steps after the prefill."""
        return len(self.per_step_accepted)

    @property
    def num_accepted_draft_tokens(self) -> int:
        """The number of drafted tokens that were accepted."""
        return sum(self.per_step_accepted)

    @property
    def mean_acceptance_length(self) -> float:
        """Average number of tokens per step after the prefill: 1 (the bonus token) + accepted / steps; 1 before any."""
        return 1 + self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        """The share of drafted tokens that were accepted, all branches of trees counted; 0 when nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_histogram(self) -> list[int]:
        """For n = 0, 1, .., the number of steps that accepted n drafted tokens."""
        counts = Counter(self.per_step_accepted)
        return [counts[n] for n in range(max(counts, default=-1) + 1)]

    @property
    def drafts_per_position(self) -> list[int]:
        """For i = 0, 1, .., the number of steps that drafted deeper than i."""
        return [sum(d > i for d in self.per_step_drafted) for i in range(max(self.per_step_drafted, default=0))]

    @property
    def acceptance_per_position(self) -> list[float]:
        """For i = 0, 1, .., the share of steps that accepted token i among the steps that drafted deeper than i."""
        accepted = [sum(a > i for a in self.per_step_accepted) for i in range(max(self.per_step_drafted, default=0))]
        return [some / count for some, count in zip(accepted, self.drafts_per_position, strict=True)]

    @property
    def mean_layers_per_token(self) -> float:
        """Average number of layers that a token ran before it was accepted."""
        full = self.num_new_tokens - len(self.exit_layers)
        return (sum(self.exit_layers) + full * self.num_layers) / max(self.num_new_tokens, 1)

    @property
    def exit_shares(self) -> dict[int, float]:
        """{number of layers: share of the new tokens that ran so many}, fewest first; all N layers: the full model."""
        counts = Counter(self.exit_layers)
        counts[self.num_layers] += self.num_new_tokens - len(self.exit_layers)
        return {layers: counts[layers] / max(self.num_new_tokens, 1) for layers in sorted(counts)}

    @property
    def tokens_per_second(self) -> float:
        """Number of new tokens after the first one (which the prefill yields) per second of decoding."""
        return (self.num_new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def step(self, drafted: int, nodes: int, accepted: int, rows: int = 1) -> None:
        """Count a step after the prefill.

        drafted: depth of the row's draft. nodes: number of its scored nodes. accepted: number of its accepted tokens.
        rows: number of rows that shared the step.
        """
        self.rows += rows
        self.per_step_drafted.append(drafted)
        self.per_step_accepted.append(accepted)
        self.num_draft_tokens += nodes

    def add_sources(self, names: Sequence[str]) -> None:
        """Count accepted tokens in ``accepted_by_source``. names: for each token, the name of what proposed it."""
        for name in names:
            self.accepted_by_source[name] = self.accepted_by_source.get(name, 0) + 1

    def as_dict(self) -> dict[str, Any]:
        """Return fields and properties of this object by name, for JSON. Lists and mappings are not copied.

        Left out are num_layers, exit_layers, queue_seconds, first_token_seconds, last_token_seconds,
        num_cached_tokens, saved_seconds, drafting_off, rows and drafts_per_position.
        """
        names = (
            "num_prompt_tokens num_new_tokens prefill_seconds decode_seconds tokens_per_second mean_acceptance_length "
            "draft_acceptance_rate num_spec_steps num_draft_tokens num_accepted_draft_tokens acceptance_histogram "
            "acceptance_per_position per_step_drafted per_step_accepted mean_layers_per_token exit_shares phases "
            "experts num_drafted_steps accepted_by_source draft_saved_seconds draft_note"
        )
        return {name: getattr(self, name) for name in names.split()}


class PhaseTimer:
    """Measures wall seconds by phase: ``mark(phase)`` adds the time since the previous mark to a phase.

    An asynchronous device may run behind the host, which then sees only the time of launching. So drafting is also
    timed on the device, and this time is moved from the phase that waits for the device.

    device: the device to time drafting on; None: only the host is timed.
    seconds: seconds by phase, over all steps.
    step: seconds by phase, since ``restart``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = None if device is None or device.type == "cpu" else device
        self.seconds = dict[str, float]()
        self.step = dict[str, float]()
        self._last = time.perf_counter()
        self._begin: torch.cuda.Event | None = None
        self._behind: tuple[str, float, torch.cuda.Event, torch.cuda.Event] | None = None

    def restart(self) -> None:
        """Begin a step: restart the clock and clear ``step``. The time since the last mark belongs to no phase."""
        self._last = time.perf_counter()
        self.step = {}
        self._behind = None

    def begin(self) -> None:
        """Begin to time the present phase on the device, too; the next ``mark`` ends it. No effect without a device."""
        self._begin = record_event(self.device)

    def mark(self, phase: str) -> None:
        """Add the time since the previous mark to ``phase``."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        if self._behind is not None:  # this phase has waited for the device
            name, launching, start, end = self._behind
            late = min(max(start.elapsed_time(end) / 1e3 - launching, 0.0), spent)
            self._book(name, late)
            spent, self._behind = spent - late, None
        if self._begin is not None and (end_stamp := record_event(self.device)) is not None:
            self._behind = phase, spent, self._begin, end_stamp
        self._begin = None
        self._book(phase, spent)

    def _book(self, phase: str, spent: float) -> None:
        """Add ``spent`` seconds to ``phase``, in ``seconds`` and in ``step``."""
        for seconds in (self.seconds, self.step):
            seconds[phase] = seconds.get(phase, 0.0) + spent
