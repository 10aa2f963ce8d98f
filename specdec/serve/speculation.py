"""What a request took, in vLLM's schema for single requests."""

from __future__ import annotations

from typing import Any

from specdec.engine.metrics import RequestMetrics
from specdec.serve.choice import Choice


def speculative_decoding(metrics: RequestMetrics, per_step: bool) -> dict[str, Any]:
    """``metrics.speculative_decoding``. per_step: with an entry for each step."""
    deepest = max(metrics.per_step_drafted, default=0)
    histogram = metrics.acceptance_histogram
    found: dict[str, Any] = {
        "num_spec_tokens": deepest,
        "num_spec_steps": metrics.num_spec_steps,
        "num_draft_tokens": metrics.num_draft_tokens,
        "num_accepted_draft_tokens": metrics.num_accepted_draft_tokens,
        "mean_acceptance_length": metrics.mean_acceptance_length,
        "draft_acceptance_rate": metrics.draft_acceptance_rate,
        "acceptance_histogram": histogram + [0] * (deepest + 1 - len(histogram)),
    }
    if per_step:
        found["per_step_drafted"] = list(metrics.per_step_drafted)
        found["per_step_accepted"] = list(metrics.per_step_accepted)
    return found


def of_response(choices: list[Choice], per_step: bool) -> dict[str, Any]:
    """``metrics`` of a response. Like vLLM's it describes one choice: of several it says nothing."""
    if len(choices) != 1:
        return {"speculative_decoding": None}
    [choice] = choices
    seconds = choice.last - choice.first
    gaps = choice.answer.count - 1
    return {
        "time_to_first_token_ms": 1e3 * (choice.first - choice.began),
        "generation_time_ms": 1e3 * seconds,
        "queue_time_ms": 1e3 * choice.handle.metrics.queue_seconds,
        "mean_itl_ms": 1e3 * seconds / gaps if gaps > 0 else None,
        "tokens_per_second": gaps / seconds if seconds > 0 else None,
        "speculative_decoding": speculative_decoding(choice.handle.metrics, per_step),
    }
