"""Sums up the requests of a method: the FIGURES that ``specdec.bench.cell`` describes. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from specdec.bench import stats
from specdec.bench.methods import Reply
from specdec.bench.prompts import Conversation
from specdec.bench.quality import Quality
from specdec.engine.metrics import RequestMetrics


@dataclass
class Request:
    """One batch of prompts answered once by one method. ``equality``: per row "equal", "near-tie", "fault", "differs"
    (a lossy rule) or None (sampling)."""

    method: str
    repetition: int
    group: int
    turn: int
    conversations: list[Conversation]
    prompts: list[list[int]]
    reply: Reply
    equality: list[str | None] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int, int]:
        return self.repetition, self.group, self.turn

    def as_dict(self) -> dict[str, Any]:
        reply = self.reply
        rows = []
        for b, conversation in enumerate(self.conversations):
            row: dict[str, Any] = {
                "id": conversation.id,
                "category": conversation.category,
                "prompt_tokens": len(self.prompts[b]),
                "token_ids": reply.tokens[b],
                "equality": self.equality[b],
            }
            if reply.metrics:
                row |= {"finish_reason": reply.reasons[b], "metrics": reply.metrics[b].as_dict()}
            rows.append(row)
        return {
            "method": self.method,
            "repetition": self.repetition,
            "turn": self.turn,
            "seconds": reply.seconds,
            "first_token_seconds": reply.first_seconds,
            "first_tokens": reply.first_tokens,
            "peak_memory_mb": reply.peak_memory_mb,
            "rows": rows,
        }


def figures(name: str, mine: list[Request], baselines: dict[str, list[Request]], lossless: bool) -> dict[str, Any]:
    """Sum up the requests of one method; ``baselines``: requests of other methods for the same prompts, by label."""
    by_place = {label: {r.place: r for r in requests} for label, requests in baselines.items()}
    replies, groups = [r.reply for r in mine], [r.group for r in mine]
    later = [(r.count - r.first_tokens, r.seconds - r.first_seconds) for r in replies]
    decoded = [i for i, (count, _) in enumerate(later) if count > 0]
    decode_groups = [groups[i] for i in decoded]
    rows = [m for reply in replies for m in reply.metrics]
    together = _together(rows)
    drafted = sum(m.num_draft_tokens for m in rows)
    equality = [one for r in mine for one in r.equality if one is not None]
    memory = [r.peak_memory_mb for r in replies if r.peak_memory_mb is not None]
    prefills = [reply.metrics[0].prefill_seconds * 1e3 for reply in replies if reply.metrics]
    return {
        "name": name,
        "requests": len(mine),
        "tokens": sum(r.count for r in replies),
        "lossless": lossless,
        "tokens_per_second": stats.median([r.count / r.seconds for r in replies], groups),
        "decode_tokens_per_second": stats.median([later[i][0] / later[i][1] for i in decoded], decode_groups),
        "prefill_ms": stats.median(prefills, groups) if rows else None,
        "first_token_ms": stats.median([r.first_seconds * 1e3 for r in replies], groups),
        "decode_ms_per_token": stats.median([later[i][1] * 1e3 / later[i][0] for i in decoded], decode_groups),
        "speedup": {label: _speedup(mine, base) for label, base in by_place.items()},
        "decode_speedup": {label: _speedup(mine, base, after_first=True) for label, base in by_place.items()},
        "mean_acceptance_length": _acceptance(mine),
        "acceptance_rate": together.num_accepted_draft_tokens / drafted if drafted else None,
        "acceptance_per_position": together.acceptance_per_position,
        "acceptance_histogram": together.acceptance_histogram,
        "mean_layers_per_token": _layers(mine),
        "ledger_ms_per_step": _ledger(replies),
        "peak_memory_mb": max(memory, default=None),
        "equal_to_plain": {
            "equal": equality.count("equal"),
            "near_ties": equality.count("near-tie") if lossless else None,
            "faults": equality.count("fault") if lossless else None,
            "of": len(equality),
        }
        if equality
        else None,
        "quality": _quality(mine),
        "categories": _categories(mine, by_place),
    }


def _categories(mine: list[Request], by_place: dict[str, dict[Any, Request]]) -> dict[str, Any]:
    """Figures by the category of each request (of its first conversation, where they are mixed)."""
    out = {}
    for category in dict.fromkeys(r.conversations[0].category for r in mine):
        part = [r for r in mine if r.conversations[0].category == category]
        out[category] = {
            "requests": len(part),
            "tokens": sum(r.reply.count for r in part),
            "tokens_per_second": stats.median([r.reply.count / r.reply.seconds for r in part], [r.group for r in part]),
            "speedup": {label: _speedup(part, base) for label, base in by_place.items()},
            "mean_acceptance_length": _acceptance(part),
        }
    return out


def _speedup(mine: list[Request], base: dict[Any, Request], after_first: bool = False) -> stats.Estimate | None:
    """Seconds per token of the baseline over ours, for each request that both did."""
    pairs = []
    for request in mine:
        other = base.get(request.place)
        times = [_pace(r.reply, after_first) for r in (other, request) if r is not None]
        if len(times) == 2 and times[0] and times[1]:
            pairs.append((times[0] / times[1], request.group))
    return stats.median([ratio for ratio, _ in pairs], [group for _, group in pairs])


def _pace(reply: Reply, after_first: bool) -> float:
    """Seconds per token; 0 where there is none."""
    count = reply.count - reply.first_tokens * after_first
    seconds = reply.seconds - reply.first_seconds * after_first
    return seconds / count if count > 0 else 0.0


def _together(rows: list[RequestMetrics]) -> RequestMetrics:
    """The steps of several requests as those of one."""
    return RequestMetrics(
        per_step_drafted=[n for m in rows for n in m.per_step_drafted],
        per_step_accepted=[n for m in rows for n in m.per_step_accepted],
    )


def _acceptance(requests: list[Request]) -> stats.Estimate | None:
    rows = [(m, r.group) for r in requests for m in r.reply.metrics]
    tokens = [m.num_accepted_draft_tokens + m.num_spec_steps for m, _ in rows]
    return stats.ratio(tokens, [m.num_spec_steps for m, _ in rows], [group for _, group in rows])


def _layers(requests: list[Request]) -> stats.Estimate | None:
    rows = [(m, r.group) for r in requests for m in r.reply.metrics]
    tokens = [m.num_new_tokens for m, _ in rows]
    layers = [m.mean_layers_per_token * m.num_new_tokens for m, _ in rows]
    return stats.ratio(layers, tokens, [group for _, group in rows])


def _ledger(replies: list[Reply]) -> dict[str, float]:
    """Milliseconds per step by phase. The rows of a batch share their steps: the longest row saw all of them."""
    longest = [max(r.metrics, key=lambda m: m.decode_seconds) for r in replies if r.metrics]
    steps = sum(m.num_spec_steps for m in longest)
    phases = dict.fromkeys(phase for m in longest for phase in m.ledger if phase != "prefill")
    return {p: 1e3 * sum(m.ledger.get(p, 0.0) for m in longest) / steps for p in phases} if steps else {}


def _quality(requests: list[Request]) -> dict[str, Any] | None:
    rows = [(q, r.group) for r in requests for q in r.qualities]
    if not rows:
        return None
    tokens, groups = [q.tokens for q, _ in rows], [group for _, group in rows]
    return {
        "agreement": stats.ratio([q.agreed for q, _ in rows], tokens, groups),
        "nll": stats.ratio([q.nll for q, _ in rows], tokens, groups),
        "rouge_l": stats.ratio([q.rouge_l for q, _ in rows], [1] * len(rows), groups),
    }
