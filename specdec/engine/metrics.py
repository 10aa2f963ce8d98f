"""Figures of one request, in vLLM's names, and the time ledger of a generation. Knows nothing about models."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.base.devices import Stamp, stamp


@dataclass
class RequestMetrics:
    """What one request took. Seconds are wall time; a batch shares its steps' time.

    per_step_drafted / per_step_accepted: draft depth and accepted drafted tokens, per step after the prefill.
    ledger: seconds by phase: prefill, draft, score, accept, commit, detokenise (text and stop strings) and overhead
        (choosing depths, bookkeeping). They sum up to the wall time but for what the caller does between steps.
    num_layers: the model's N. exit_layers: layers run for each token that was accepted without
        scoring.
    experts: while decoding (all rows together), what offloaded experts cost (``experts.offload.Meter``).
    queue_seconds: until the request was admitted. first_token_seconds: from its submission to its first token.
    num_cached_tokens: of the prompt, those that were not computed as others had them in common.
    """

    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    per_step_drafted: list[int] = field(default_factory=list)
    per_step_accepted: list[int] = field(default_factory=list)
    num_draft_tokens: int = 0
    num_layers: int = 0
    exit_layers: list[int] = field(default_factory=list)
    ledger: dict[str, float] = field(default_factory=dict)
    experts: dict[str, float] = field(default_factory=dict)
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    num_cached_tokens: int = 0

    @property
    def prefill_seconds(self) -> float:
        return self.ledger.get("prefill", 0.0)

    @property
    def decode_seconds(self) -> float:
        return sum(self.ledger.values()) - self.prefill_seconds

    @property
    def num_spec_steps(self) -> int:
        return len(self.per_step_accepted)

    @property
    def num_accepted_draft_tokens(self) -> int:
        return sum(self.per_step_accepted)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step: 1 + accepted / steps (the bonus token counts)."""
        return 1 + self.num_accepted_draft_tokens / self.num_spec_steps if self.num_spec_steps else 1.0

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 when nothing was drafted."""
        return self.num_accepted_draft_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_histogram(self) -> list[int]:
        """Entry n counts the steps that accepted n drafted tokens."""
        counts = Counter(self.per_step_accepted)
        return [counts[n] for n in range(max(counts, default=-1) + 1)]

    @property
    def acceptance_per_position(self) -> list[float]:
        """Entry i: of the steps that drafted deeper than i, the share that accepted drafted token i."""
        shares = []
        for i in range(max(self.per_step_drafted, default=0)):
            reached = [a for d, a in zip(self.per_step_drafted, self.per_step_accepted, strict=True) if d > i]
            shares.append(sum(a > i for a in reached) / len(reached))
        return shares

    @property
    def conditional_acceptance(self) -> list[float]:
        """Entry i: of the steps that drafted deeper than i and accepted all before it, the share that accepted token
        i."""
        shares = []
        for i in range(max(self.per_step_drafted, default=0)):
            steps = zip(self.per_step_drafted, self.per_step_accepted, strict=True)
            reached = [a > i for d, a in steps if d > i and a >= i]
            if not reached:
                break
            shares.append(sum(reached) / len(reached))
        return shares

    @property
    def mean_layers_per_token(self) -> float:
        """Average depth: layers a token went through before it was accepted. Early exits count as far as they went."""
        full = self.num_new_tokens - len(self.exit_layers)
        return (sum(self.exit_layers) + full * self.num_layers) / max(self.num_new_tokens, 1)

    @property
    def exit_shares(self) -> dict[int, float]:
        """The share of the new tokens that were accepted after so many layers, shallow to deep; N is the full model."""
        counts = Counter(self.exit_layers)
        counts[self.num_layers] += self.num_new_tokens - len(self.exit_layers)
        return {layers: counts[layers] / max(self.num_new_tokens, 1) for layers in sorted(counts)}

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: new tokens after the first (which the prefill yields) per decode second."""
        return (self.num_new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    def step(self, drafted: int, nodes: int, accepted: int) -> None:
        self.per_step_drafted.append(drafted)
        self.per_step_accepted.append(accepted)
        self.num_draft_tokens += nodes

    def as_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers and lists, for JSON."""
        names = (
            "num_prompt_tokens num_new_tokens prefill_seconds decode_seconds tokens_per_second mean_acceptance_length "
            "draft_acceptance_rate num_spec_steps num_draft_tokens num_accepted_draft_tokens acceptance_histogram "
            "acceptance_per_position per_step_drafted per_step_accepted mean_layers_per_token exit_shares ledger "
            "experts"
        )
        return {name: getattr(self, name) for name in names.split()}


class Ledger:
    """Wall seconds by phase: ``mark(phase)`` books the time since the previous mark.

    A device may run behind the host, which then only sees how long launching took. So drafting is also measured on the
    device's own clock, and what it took there is moved from the phase that waits for it.

    seconds: by phase, of all steps. step: by phase, since ``restart``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device, self.seconds, self.step = device, dict[str, float](), dict[str, float]()
        self._last = time.perf_counter()
        self._begin: Stamp | None = None
        self._behind: tuple[str, float, Stamp, Stamp] | None = None

    def restart(self) -> None:
        """Start the clock anew; the time since the last mark belongs to no phase."""
        self._last, self.step, self._behind = time.perf_counter(), {}, None

    def begin(self) -> None:
        """The phase that begins now is measured on the device."""
        self._begin = stamp(self.device)

    def mark(self, phase: str) -> None:
        """Book the time since the previous mark under ``phase``."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        if self._behind is not None:  # this phase has waited for the device
            name, launching, start, end = self._behind
            late = min(max(start.elapsed_time(end) / 1e3 - launching, 0.0), spent)
            self._book(name, late)
            spent, self._behind = spent - late, None
        if self._begin is not None and (end_stamp := stamp(self.device)) is not None:
            self._behind = phase, spent, self._begin, end_stamp
        self._begin = None
        self._book(phase, spent)

    def _book(self, phase: str, spent: float) -> None:
        for seconds in (self.seconds, self.step):
            seconds[phase] = seconds.get(phase, 0.0) + spent
