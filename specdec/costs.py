"""What drafting and scoring cost on this machine: measured once per machine, model, runtime and drafter, and kept.

The figures lie in the cache folder under a name made of all they depend on, and are measured again when any of it
changes. Whatever else the machine does meanwhile only makes a pass longer: the least of several timings counts, and
what requests then find otherwise is mended.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec import artifacts, embedded, kernels
from specdec.cache import KVCache
from specdec.depth import AutoDepth, FixedDepth
from specdec.draft import Drafter, Verifier
from specdec.loop import Loop
from specdec.sampling import Sampler, SamplingParams
from specdec.target import Target

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
REPEATS, PATIENCE = 3, 4.0  # fewest rounds of timings; seconds after which there is no other
CONFIRMED = 1.1  # a figure is believed once it was reached a second time, within this factor
DRAFTED = 4  # depth of the timed drafts
WRONG = 1.25  # kept figures that are further from what rounds take are mended
ACCEPTANCE = 0.1  # kept acceptance that differs by more is written anew


@dataclass(frozen=True)
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``draft`` per drafted token.

    accepted: how often the drafted token of each position stood, in requests up to now.
    """

    score: dict[int, float]
    draft: float
    accepted: tuple[float, ...] = ()


def costs(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """The figures for ``drafter`` on ``target``, from the cache folder or by measuring (a few seconds, once)."""
    path, what = _place(target, drafter)
    try:
        kept = json.loads(path.read_text("utf-8"))
        score = {int(n): float(s) for n, s in kept["score"].items()}
        found = Costs(score, float(kept["draft"]), tuple(float(a) for a in kept.get("accepted", ())))
        good = all(0 <= a <= 1 for a in found.accepted) and found.draft >= 0
        if set(found.score) == set(ROWS) and min(found.score.values()) > 0 and good:
            return found
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass  # not measured yet, or not readable: measure
    fresh = measure(target, drafter, verifier)
    _keep(path, what, fresh)
    return fresh


def mend(target: Target, drafter: Drafter, kept: Costs, policy: AutoDepth) -> Costs:
    """``kept``, or, where rounds went otherwise than it says, what ``policy`` found instead; that is then kept.

    Times are only mended downwards as a whole (a machine that is slower now is a busy one, and slows everything), but
    the price of drafting beside that of scoring both ways.
    """
    faster = policy.drift if policy.drift * WRONG < 1 else 1.0
    score, draft = {n: faster * s for n, s in policy.score.items()}, faster * policy.draft / policy.drift
    wrong = _apart(draft, kept.draft) or _apart(min(score.values()), min(kept.score.values()))
    known = tuple(policy.known())
    same = [abs(a - b) <= ACCEPTANCE for a, b in zip(known, kept.accepted, strict=False)]
    if not wrong and len(known) <= len(kept.accepted) and all(same):
        return kept
    mended = Costs(score, draft, known) if wrong else Costs(kept.score, kept.draft, known)
    _keep(*_place(target, drafter), mended)
    return mended


def _apart(a: float, b: float) -> bool:
    return max(a, b) > WRONG * min(a, b)


def measure(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """Time scoring and drafting in turns, until each figure was reached twice: on a busy machine, until it is let be.

    The least counts: whatever else runs only ever makes a pass slower.
    """
    score: dict[int, list[float]] = {n: [] for n in ROWS}
    draft: list[float] = []
    start = time.perf_counter()
    while len(draft) < REPEATS or time.perf_counter() - start < PATIENCE:
        for n, seconds in time_scoring(target, 1).items():
            score[n].append(seconds)
        draft.append(time_drafting(target, drafter, verifier))
        sure = 0.01 * min(score[1])  # a draft so cheap needs no better figure
        if len(draft) >= REPEATS and all(map(_confirmed, score.values())) and (_confirmed(draft) or min(draft) < sure):
            break
    return Costs({n: min(s) for n, s in score.items()}, min(draft))


def _confirmed(seconds: Sequence[float]) -> bool:
    least, second = sorted(seconds)[:2]
    return second <= CONFIRMED * least


def _place(target: Target, drafter: Drafter) -> tuple[Path, str]:
    """The file of the figures, and what they depend on."""
    machine = f"{platform.processor()} {platform.machine()} {platform.node()} {torch.get_num_threads()}"
    if target.device.type == "cuda":
        machine += torch.cuda.get_device_name(target.device)
    what = f"{machine} {torch.__version__} {target.runtime} {target.storage} {target.dtype} {target.fingerprint}"
    what += f" {drafter.name} {getattr(drafter, 'path', '')}"
    if target.experts is not None:  # more rows need more experts: what loading them takes is part of the cost
        what += f" {target.experts.describe()}"
    return embedded.cache_dir() / "costs" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json", what


def _keep(path: Path, what: str, figures: Costs) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.replace(path, json.dumps(asdict(figures) | {"of": what}).encode())
    except OSError:
        pass  # a cache folder that cannot be written costs these seconds again, nothing else


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


def time_drafting(target: Target, drafter: Drafter, verifier: Verifier) -> float:
    """Seconds per token that ``drafter`` drafts, the least of a short generation; 0 if it drafts nothing there."""
    prompt = [(7 * i) % target.vocab_size for i in range(min(CONTEXT, target.context // 2))]
    policy, sampler = FixedDepth(DRAFTED), Sampler(SamplingParams())
    limit = min(8 * DRAFTED, target.context - len(prompt))
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
    kernels.argmax(target.readout(x))
