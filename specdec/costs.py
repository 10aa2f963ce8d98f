"""What drafting and scoring cost on this machine: measured once per machine, model, runtime and drafter, and kept.

The figures lie in the cache folder under a name made of all they depend on, and are measured again when any of it
changes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import artifacts, embedded
from specdec.cache import KVCache
from specdec.depth import FixedDepth
from specdec.draft import Drafter, Verifier
from specdec.loop import Loop
from specdec.sampling import Sampler, SamplingParams
from specdec.target import Target

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
REPEATS = 5
DRAFTED = 4  # depth of the timed drafts


@dataclass(frozen=True)
class Costs:
    """Seconds: ``score[n]`` of a pass over n tokens (embedding, layers, readout), ``draft`` per drafted token."""

    score: dict[int, float]
    draft: float


def costs(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """The figures for ``drafter`` on ``target``, from the cache folder or by measuring (a few seconds, once)."""
    machine = f"{platform.processor()} {platform.machine()} {platform.node()} {torch.get_num_threads()}"
    if target.device.type == "cuda":
        machine += torch.cuda.get_device_name(target.device)
    what = f"{machine} {torch.__version__} {target.runtime} {target.dtype} {target.fingerprint}"
    what += f" {drafter.name} {getattr(drafter, 'path', '')}"
    path = embedded.cache_dir() / "costs" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
    try:
        kept = json.loads(path.read_text("utf-8"))
        found = Costs({int(n): float(s) for n, s in kept["score"].items()}, float(kept["draft"]))
        if set(found.score) == set(ROWS) and min(found.score.values()) > 0 and found.draft >= 0:
            return found
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass  # not measured yet, or not readable: measure
    fresh = Costs(time_scoring(target), time_drafting(target, drafter, verifier))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.replace(path, json.dumps({"score": fresh.score, "draft": fresh.draft, "of": what}).encode())
    except OSError:
        pass  # a cache folder that cannot be written costs these seconds again, nothing else
    return fresh


@torch.inference_mode()
def time_scoring(target: Target) -> dict[int, float]:
    """Time passes of each size in ``ROWS``, interleaved; medians in seconds."""
    cache = target.new_cache()
    context = min(CONTEXT, target.context - max(ROWS))
    ids = torch.arange(context + max(ROWS), device=target.device)[None] % target.vocab_size
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    _pass(target, ids[:, :context], positions[:, :context], cache)
    cache.keep([list(range(context))])
    seconds: dict[int, list[float]] = {n: [] for n in ROWS}
    for repeat in range(REPEATS + 1):
        for n in ROWS:
            start = time.perf_counter()
            _pass(target, ids[:, context : context + n], positions[:, context : context + n], cache)
            if target.device.type == "cuda":
                torch.cuda.synchronize(target.device)
            if repeat:  # the first pass of each size warms up
                seconds[n].append(time.perf_counter() - start)
            cache.trim(n)
    return {n: statistics.median(s) for n, s in seconds.items()}


def time_drafting(target: Target, drafter: Drafter, verifier: Verifier) -> float:
    """Seconds per token that ``drafter`` drafts, over a short generation; 0 if it drafts nothing there."""
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
    return statistics.median(steps) if steps else 0.0


def _pass(target: Target, ids: Tensor, positions: Tensor, cache: KVCache) -> None:
    x = target.embed(ids, positions)
    x = target.layers(x, 0, target.num_layers, positions, cache.mask(0, positions), cache)
    target.readout(x).argmax(-1)
