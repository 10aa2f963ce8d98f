"""What drafting and scoring cost on this machine: measured once per machine, model, runtime and drafter, and kept.

The figures lie in the cache folder under a name made of all they depend on, and are measured again when any of it
changes. Whatever else the machine does meanwhile only makes a pass longer: the least of several timings counts, and
what requests then find otherwise is mended.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from specdec import measured
from specdec.cache import KVCache
from specdec.depth import AutoDepth, FixedDepth
from specdec.draft import Drafter, Verifier
from specdec.loop import Loop
from specdec.sampling import Sampler, SamplingParams
from specdec.target import Target

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
REPEATS, PATIENCE = 3, 4.0  # fewest rounds of timings; seconds after which there is no other
DRAFTED = 4  # depth of the timed drafts
WRONG = 1.25  # kept figures that are further from what rounds take are mended
ACCEPTANCE = 0.1  # kept acceptance that differs by more is written anew


@dataclass(frozen=True)
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``drafts`` of drafting.

    drafts: the first drafted token and each further one, for each exit that tokens may go to at most. accepted: for
    each exit, how often the drafted token of each position stood in requests up to now, and how many times that was
    seen (``AutoDepth.known``).
    """

    score: dict[int, float]
    drafts: tuple[tuple[float, float], ...]
    accepted: tuple[tuple[tuple[float, float], ...], ...] = ()


def costs(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """The figures for ``drafter`` on ``target``, from the cache folder or by measuring (a few seconds, once)."""
    what, kept = _what(target, drafter), measured.read(_what(target, drafter))
    try:
        score = {int(n): float(s) for n, s in kept["score"].items()}
        found = Costs(score, _pairs(kept["drafts"]), tuple(map(_pairs, kept["accepted"])))
        good = all(0 <= share <= 1 and seen > 0 for known in found.accepted for share, seen in known)
        whole = set(found.score) == set(ROWS) and len(found.drafts) == drafter.num_exits
        if whole and good and min(found.score.values()) > 0 and min(map(min, found.drafts)) >= 0:
            return found
    except (ValueError, KeyError, AttributeError, TypeError):
        pass  # not measured yet, or no such figures: measure
    fresh = measure(target, drafter, verifier)
    measured.keep(what, asdict(fresh))
    return fresh


def mend(target: Target, drafter: Drafter, kept: Costs, policy: AutoDepth) -> Costs:
    """``kept``, or, where rounds went otherwise than it says, what ``policy`` found instead; that is then kept.

    Times are only mended downwards as a whole (a machine that is slower now is a busy one, and slows everything), but
    the price of drafting beside that of scoring both ways.
    """
    faster = policy.drift if policy.drift * WRONG < 1 else 1.0
    score = {n: faster * s for n, s in policy.score.items()}
    scales = [faster * known.scale / policy.drift for known in policy.exits]
    drafts = tuple((a * known.first, a * known.further) for a, known in zip(scales, policy.exits, strict=True))
    figures = [*itertools.chain(*drafts), min(score.values())]
    wrong = any(map(_apart, figures, [*itertools.chain(*kept.drafts), min(kept.score.values())]))
    known = tuple(map(_pairs, policy.known()))
    if not wrong and not _news(known, kept.accepted):
        return kept
    mended = Costs(score, drafts, known) if wrong else Costs(kept.score, kept.drafts, known)
    measured.keep(_what(target, drafter), asdict(mended))
    return mended


def _pairs(given: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(a), float(b)) for a, b in given)


def _news(now: Any, kept: Any) -> bool:
    """Whether acceptance differs from what was kept, or rests on more observations than that did."""
    for fresh, old in itertools.zip_longest(now, kept, fillvalue=()):
        for (share, seen), (before, times) in itertools.zip_longest(fresh, old, fillvalue=(0.0, 0.0)):
            if abs(share - before) > ACCEPTANCE or min(seen, AutoDepth.ENOUGH) > WRONG * times:
                return True
    return False


def _apart(a: float, b: float) -> bool:
    return max(a, b) > WRONG * min(a, b)


def measure(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """Time scoring and drafting in turns, until each figure was reached twice: on a busy machine, until it is let be.

    The least counts: whatever else runs only ever makes a pass slower.
    """
    score: dict[int, list[float]] = {n: [] for n in ROWS}
    exits: list[int | None] = [*range(drafter.num_exits)] if drafter.num_exits > 1 else [None]
    drafts: dict[tuple[int | None, int], list[float]] = {(exit, depth): [] for exit in exits for depth in (1, DRAFTED)}
    start, rounds = time.perf_counter(), 0
    while rounds < REPEATS or time.perf_counter() - start < PATIENCE:
        rounds += 1
        for n, seconds in time_scoring(target, 1).items():
            score[n].append(seconds)
        for (exit, depth), draft in drafts.items():
            draft.append(time_drafting(target, drafter, verifier, depth, exit))
        sure = 0.01 * min(score[1])  # a draft so cheap needs no better figure
        dear = [draft for draft in drafts.values() if min(draft) >= sure]
        if rounds >= REPEATS and all(map(measured.confirmed, [*score.values(), *dear])):
            break
    best = {way: min(draft) for way, draft in drafts.items()}
    return Costs({n: min(s) for n, s in score.items()}, tuple(_line(best[e, 1], best[e, DRAFTED]) for e in exits))


def _line(one: float, each: float) -> tuple[float, float]:
    """Seconds of the first drafted token and of a further one, from one alone and from each of ``DRAFTED``.

    No draft is dearer for being deeper: a drafter that finds nothing alone (0) costs alike.
    """
    further = (DRAFTED * each - one) / (DRAFTED - 1)
    return (one, further) if one > 0 and 0 <= further <= one else (each, each)


def _what(target: Target, drafter: Drafter) -> str:
    """What the figures depend on."""
    what = f"{measured.machine(target.device)} {target.runtime} {target.storage} {target.dtype} {target.fingerprint}"
    what += f" {drafter.name} {drafter.path}"
    if target.experts is not None:  # more rows need more experts: what loading them takes is part of the cost
        what += f" {target.experts.describe()}"
    return what


@torch.inference_mode()
def time_scoring(target: Target, repeats: int = 5) -> dict[int, float]:
    """Time passes of each size in ``ROWS``, interleaved, after a pass that warms up; the least of each, in seconds."""
    cache = target.new_cache()
    context = min(CONTEXT, target.context - max(ROWS))
    ids = torch.arange(context + max(ROWS), device=target.device)[None] % target.vocab_size
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    _pass(target, ids[:, :context], positions[:, :context], cache)
    cache.keep([list(range(context))])
    seconds: dict[int, list[float]] = {n: [] for n in ROWS}
    for repeat in range(repeats + 1):
        for n in ROWS:
            start = time.perf_counter()
            _pass(target, ids[:, context : context + n], positions[:, context : context + n], cache)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            if repeat:
                seconds[n].append(time.perf_counter() - start)
            cache.trim(n)
    return {n: min(s) for n, s in seconds.items()}


def time_drafting(
    target: Target, drafter: Drafter, verifier: Verifier, depth: int = DRAFTED, exit: int | None = None
) -> float:
    """Seconds per token that ``drafter`` drafts, the least of a short generation; 0 if it drafts nothing there."""
    prompt = [(7 * i) % target.vocab_size for i in range(min(CONTEXT, target.context // 2))]
    policy, sampler = FixedDepth(depth, exit), Sampler(SamplingParams())
    limit = min(8 * depth, target.context - len(prompt))
    loop = Loop(target, drafter, verifier, sampler, [prompt], [limit], lambda row, token: None, policy)
    steps, before = [], 0.0
    for number, _ in enumerate(loop.rounds()):
        spent = loop.ledger.seconds.get("draft", 0.0)
        if number > 1 and loop.metrics[0].per_step_drafted[-1]:
            steps.append((spent - before) / loop.metrics[0].per_step_drafted[-1])
        before = spent
    return min(steps, default=0.0)


def _pass(target: Target, ids: Tensor, positions: Tensor, cache: KVCache) -> None:
    x = target.embed(ids, positions)
    x = target.layers(x, 0, target.num_layers, positions, cache.mask(0, positions), cache)
    target.choose(x)
