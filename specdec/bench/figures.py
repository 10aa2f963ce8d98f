"""Summary statistics of a method's requests, and the quality of lossy methods: the FIGURES of ``specdec.bench.cell``.

Intervals are percentiles of a cluster bootstrap (Efron 1979; Davison and Hinkley 1997, 3.8). It resamples
conversations with all their turns and repetitions, because results within a conversation are correlated.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.base.errors import SpecDecError, how_to_install
from specdec.bench.methods import Method, Reply
from specdec.bench.prompts import Conversation
from specdec.engine.metrics import RequestMetrics
from specdec.runtimes.target import Target
from specdec.verify.replay import replay

RESAMPLES = 1000
TAIL = 2.5  # percent on each side

Estimate = dict[str, float | None]  # {"value", "low", "high"}; low and high are None for a single cluster


@dataclass
class BenchRequest:
    """One batch of prompts that one method answered once.

    method: the method's name. repetition, group, turn: number of the repetition, of the batch of conversations in the
    prompt set, and of the turn in the conversations, from 0.
    conversations, prompts (token ids): one per row. reply: the answers and their timing.
    cells: keys of the cells whose method or baseline this method is.
    equality: how each row compares with plain decoding: "equal", "near-tie", "fault", "differs" (by a lossy
    verifier or by other arithmetic), or None (not comparable).
    qualities: one per row if a lossy verifier takes part, else empty.
    """

    method: str
    repetition: int
    group: int
    turn: int
    conversations: list[Conversation]
    prompts: list[list[int]]
    reply: Reply
    cells: list[str] = field(default_factory=list)
    equality: list[str | None] = field(default_factory=list)
    qualities: list[Quality] = field(default_factory=list)

    @property
    def turn_key(self) -> tuple[int, int, int]:
        """(repetition, group, turn), equal for the requests of all methods for the same prompts."""
        return self.repetition, self.group, self.turn

    @property
    def category(self) -> str:
        """The category of the request in the figures; "": its conversations have none, or several."""
        found = {conversation.category for conversation in self.conversations}
        return found.pop() if len(found) == 1 else ""

    def as_dict(self) -> dict[str, Any]:
        """Return the request, its answers and their metrics as JSON values: a line of ``results.jsonl``.

        Keys: method, cells (as above), repetition, turn, seconds, first_token_seconds, first_tokens (their number),
        arrivals (seconds),
        peak_memory_mb, and rows: for each {"id" and "category" of the conversation, "prompt_tokens" (their number),
        "token_ids" (of the answer), "equality"}, and from specdec's own methods "finish_reason" and "metrics".
        """
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
            "cells": self.cells,
            "repetition": self.repetition,
            "turn": self.turn,
            "seconds": reply.seconds,
            "first_token_seconds": reply.first_seconds,
            "first_tokens": reply.first_tokens,
            "arrivals": [round(at, 6) for at in reply.arrivals],
            "peak_memory_mb": reply.peak_memory_mb,
            "rows": rows,
        }


def summarize(
    name: str, mine: list[BenchRequest], baselines: dict[str, list[BenchRequest]], method: Method, alike: bool
) -> dict[str, Any]:
    """Return the figures of the method ``name`` as JSON values. ``specdec.bench.cell`` describes each.

    mine: the requests that the method has answered. baselines: label -> requests of that baseline for the same prompts.
    method: what decoded; says whether it is lossless. alike: whether its tokens must be those of plain decoding, but
        for near-ties.
    """
    by_turn = {label: {r.turn_key: r for r in requests} for label, requests in baselines.items()}
    replies = [r.reply for r in mine]
    steps = RequestMetrics(
        per_step_drafted=[n for reply in replies for m in reply.metrics for n in m.per_step_drafted],
        per_step_accepted=[n for reply in replies for m in reply.metrics for n in m.per_step_accepted],
    )
    equality = [one for r in mine for one in r.equality if one is not None]
    categories = list(dict.fromkeys(r.category for r in mine))
    return {
        "name": name,
        "lossless": method.lossless,
        "engine": method.engine,
        **_summary(mine, by_turn),
        "prefill_ms": _median(mine, lambda reply: reply.metrics[0].prefill_seconds if reply.metrics else None, 1e3),
        "first_token_ms": _median(mine, lambda reply: reply.first_seconds, 1e3),
        "decode_ms_per_token": _median(mine, lambda reply: reply.seconds_per_token(after_first=True), 1e3),
        "latency_ms": {
            "token": _milliseconds([reply.seconds_per_token() for reply in replies]),
            "first_token": _milliseconds([reply.first_seconds for reply in replies]),
            "step": _milliseconds([gap for reply in replies for gap in reply.intervals]),
        },
        "acceptance_rate": sum(steps.per_step_accepted) / depths if (depths := sum(steps.per_step_drafted)) else None,
        "acceptance_per_position": steps.acceptance_per_position,
        "drafts_per_position": steps.drafts_per_position,
        "acceptance_histogram": steps.acceptance_histogram,
        "mean_layers_per_token": _pooled(
            mine, lambda m: m.mean_layers_per_token * m.num_new_tokens, lambda m: m.num_new_tokens
        ),
        "phase_ms_per_step": _phase_ms_per_step(replies),
        "peak_memory_mb": max((r.peak_memory_mb for r in replies if r.peak_memory_mb is not None), default=None),
        "equal_to_plain": {
            "equal": equality.count("equal"),
            "near_ties": equality.count("near-tie") if alike else None,
            "faults": equality.count("fault") if alike else None,
            "of": len(equality),
        }
        if equality
        else None,
        "quality": _quality(mine),
        "categories": {name: _summary([r for r in mine if r.category == name], by_turn) for name in categories},
    }


def _summary(mine: list[BenchRequest], baselines: dict[str, dict[Any, BenchRequest]]) -> dict[str, Any]:
    """Return the figures that are also given per category, a part of what ``summarize`` returns.

    The keys are requests, tokens, tokens_per_second, speedup, worst and mean_acceptance_length.

    mine: the method's requests, all or those of a category.
    baselines: label -> {``turn_key`` of a request: that baseline's request}.
    """
    return {
        "requests": len(mine),
        "tokens": sum(r.reply.count for r in mine),
        "tokens_per_second": _median(mine, lambda reply: _rate(reply.seconds_per_token())),
        "speedup": {label: _speedup(mine, base) for label, base in baselines.items()},
        "worst": {label: _worst(mine, base) for label, base in baselines.items()},
        "mean_acceptance_length": _pooled(
            mine, lambda m: m.num_accepted_draft_tokens + m.num_spec_steps, lambda m: m.num_spec_steps
        ),
    }


def _median(mine: list[BenchRequest], figure: Callable[[Reply], float | None], scale: float = 1) -> Estimate | None:
    """Return the median of ``figure``, times ``scale``, over the requests ``mine`` that have a value; None: none has.

    figure: returns the value of a reply, or None if it has none.
    """
    found = [(value * scale, r.group) for r in mine if (value := figure(r.reply)) is not None]
    return median([value for value, _ in found], [group for _, group in found])


def _milliseconds(seconds: Sequence[float | None]) -> dict[str, float] | None:
    """Return {"p50", "p99"} in milliseconds of values in seconds, without the None among them; None without values."""
    found = [1e3 * value for value in seconds if value is not None]
    return dict(zip(("p50", "p99"), map(float, np.percentile(found, (50, 99))), strict=True)) if found else None


def _rate(seconds_per_token: float | None) -> float | None:
    return 1 / seconds_per_token if seconds_per_token else None


def _ratios(mine: list[BenchRequest], base: dict[Any, BenchRequest]) -> list[tuple[float, BenchRequest]]:
    """Return (speedup, request) for each of the requests ``mine``, if it and the baseline's request have tokens.

    The speedup is the baseline's seconds per token over the method's, in whole calls.
    base: the baseline's requests by their ``turn_key`` (repetition, group, turn), which pairs them with those of
    ``mine``.
    """
    ratios = []
    for request in mine:
        other = base.get(request.turn_key)
        theirs = other.reply.seconds_per_token() if other else None
        if theirs and (ours := request.reply.seconds_per_token()):
            ratios.append((theirs / ours, request))
    return ratios


def _speedup(mine: list[BenchRequest], base: dict[Any, BenchRequest]) -> Estimate | None:
    found = _ratios(mine, base)
    return median([speedup for speedup, _ in found], [request.group for _, request in found])


def _worst(mine: list[BenchRequest], base: dict[Any, BenchRequest]) -> float | None:
    """Return the smallest speedup of a prompt, each the median over its repetitions; None without requests.

    mine: the method's requests. base: the baseline's requests by their ``turn_key`` (repetition, group, turn).
    """
    by_prompt = defaultdict[tuple[int, int], list[float]](list)
    for speedup, request in _ratios(mine, base):
        by_prompt[request.group, request.turn].append(speedup)
    return min(map(statistics.median, by_prompt.values()), default=None)


def _pooled(
    mine: list[BenchRequest], above: Callable[[RequestMetrics], float], below: Callable[[RequestMetrics], float]
) -> Estimate | None:
    """Return the estimate of sum(``above``) / sum(``below``) over the metrics of all rows; None without metrics.

    mine: the method's requests; those of external methods have no metrics. above, below: return the numerator and the
    denominator for the metrics of a row.
    """
    rows = [(m, r.group) for r in mine for m in r.reply.metrics]
    return ratio([above(m) for m, _ in rows], [below(m) for m, _ in rows], [group for _, group in rows])


def _phase_ms_per_step(replies: list[Reply]) -> dict[str, float]:
    """Return {phase: milliseconds per step}, from the longest row of each batch, which took part in all its steps.

    The phases are those of a step ("draft", "score", ...); the prefill is left out. {} if there were no steps.
    """
    longest = [max(r.metrics, key=lambda m: m.decode_seconds) for r in replies if r.metrics]
    steps = sum(m.num_spec_steps for m in longest)
    phases = dict.fromkeys(phase for m in longest for phase in m.phases if phase != "prefill")
    return {p: 1e3 * sum(m.phases.get(p, 0.0) for m in longest) / steps for p in phases} if steps else {}


def _quality(requests: list[BenchRequest]) -> dict[str, Any] | None:
    rows = [(q, r.group) for r in requests for q in r.qualities]
    if not rows:
        return None
    tokens, groups = [q.tokens for q, _ in rows], [group for _, group in rows]
    return {
        "agreement": ratio([q.agreed for q, _ in rows], tokens, groups),
        "nll": ratio([q.nll for q, _ in rows], tokens, groups),
        "rouge_l": ratio([q.rouge_l for q, _ in rows], [1] * len(rows), groups),
    }


# --- estimates -------------------------------------------------------------------------------------------------------


def median(values: Sequence[float], clusters: Sequence[int]) -> Estimate | None:
    """Return the median of ``values`` with its bootstrap interval; None without values.

    clusters: a number for the cluster (conversations) of each value; values of one cluster are resampled together.
    """
    if not values:
        return None
    order = np.argsort(values, kind="stable")
    ordered, index = np.asarray(values, float)[order], np.unique(clusters, return_inverse=True)[1][order]
    weights = _counts(int(index.max()) + 1)[:, index].cumsum(1)  # (resamples, values)
    half = weights[:, -1:] / 2
    below, above = (weights < half).sum(1), (weights <= half).sum(1)
    draws = (ordered[below] + ordered[np.minimum(above, len(ordered) - 1)]) / 2
    return _estimate(float(np.median(ordered)), draws, int(index.max()) + 1)


def ratio(above: Sequence[float], below: Sequence[float], clusters: Sequence[int]) -> Estimate | None:
    """Return the pooled ratio sum(above) / sum(below) with its bootstrap interval; None if sum(below) is 0.

    above, below: numerator and denominator of each observation, such as accepted and drafted tokens.
    clusters: a number for the cluster (conversations) of each; observations of one cluster are resampled together.
    """
    if not sum(below):
        return None
    index = np.unique(clusters, return_inverse=True)[1]
    sums = [np.bincount(index, np.asarray(part, float)) for part in (above, below)]
    counts = _counts(len(sums[0]))
    top, bottom = (counts @ part for part in sums)
    draws = top[bottom > 0] / bottom[bottom > 0]
    return _estimate(float(sum(above) / sum(below)), draws, len(sums[0]))


def _counts(clusters: int) -> Any:
    """Return how often each bootstrap resample draws each cluster, the same in every call.

    The result is a NumPy array of int64, [RESAMPLES, clusters].
    """
    return np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), RESAMPLES)


def _estimate(value: float, draws: Any, clusters: int) -> Estimate:
    if clusters < 2:
        return {"value": value, "low": None, "high": None}
    low, high = np.percentile(draws, (TAIL, 100 - TAIL))
    return {"value": value, "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Quality:
    """The quality of one answer under the full model, which scores every token and uses no lossy verifier.

    tokens: number of tokens of the answer.
    agreed: number of tokens that are the full model's most likely token.
    nll: sum of -log p(token) in nats, at temperature 1.
    rouge_l: F1 of ROUGE-L (Lin 2004) against the full model's own answer, 0 to 1.
    """

    tokens: int
    agreed: int
    nll: float
    rouge_l: float


def require_rouge_score() -> None:
    """Raise SpecDecError if rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise SpecDecError(f"quality figures of a lossy rule need rouge-score; {how_to_install('bench')}")


def quality(target: Target, tokenizer: Any, prompt: list[int], tokens: list[int], plain: list[int]) -> Quality:
    """Measure the quality of the answer ``tokens`` (token ids) to ``prompt`` (token ids) under the full model.

    target: the full model. plain: the token ids that plain decoding answers, for ROUGE-L.
    """
    from rouge_score.rouge_scorer import RougeScorer

    logits = replay(target, prompt, tokens)  # (n, V)
    chosen = logits.new_tensor(tokens).long()[:, None]
    nll = -logits.log_softmax(-1).gather(1, chosen).sum()
    agreed = logits.gather(1, chosen)[:, 0] >= logits.amax(-1)
    ours, theirs = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens, plain))
    rouge = 1.0 if ours == theirs else RougeScorer(["rougeL"]).score(theirs, ours)["rougeL"].fmeasure
    return Quality(len(tokens), int(agreed.sum()), float(nll), float(rouge))
