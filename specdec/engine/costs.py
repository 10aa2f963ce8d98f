"""What steps cost on this machine: measured once per machine, model, runtime and drafter, kept in the cache folder.

The least of several timings counts: what else the machine does only ever makes a pass longer. Requests correct the
figures by what their steps take (``AutoDepth.costs``), so those of a busy hour do not last.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from specdec.base import machine
from specdec.engine.depth import Costs, FixedDepth
from specdec.engine.loop import Loop
from specdec.models import catalogue, drafter_folder
from specdec.runtimes.cache import KVCache
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter, Verifier
from specdec.speculation.sampling import Sampler, SamplingParams

ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
DRAFTED = 4  # depth of the timed drafts
REPEATS, SECONDS = 3, 1.0  # least number of timings of each, and least time for all


def costs(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """The costs of ``drafter`` on ``target``: from the cache folder, or measured and kept there."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not what ``keep`` writes
        data = json.loads(_place(target, drafter).read_text("utf-8"))
        score = {int(n): float(s) for n, s in data["score"].items()}
        drafts = tuple((float(first), float(further)) for first, further in data["drafts"])
        accepted = tuple(tuple((float(a), float(n)) for a, n in known) for known in data["accepted"])
        sound = all(0 <= share <= 1 and seen > 0 for known in accepted for share, seen in known)
        sound = sound and min(score.values()) > 0 and min(map(min, drafts)) >= 0
        if sound and set(score) == set(ROWS) and len(drafts) == drafter.num_exits:
            return Costs(score, drafts, accepted)
    fresh = measure(target, drafter, verifier)
    keep(target, drafter, fresh)
    return fresh


def keep(target: Target, drafter: Drafter, found: Costs) -> None:
    """Write ``found`` to the cache folder. Where that fails, the costs are measured again next time."""
    with suppress(OSError):
        place = _place(target, drafter)
        place.parent.mkdir(parents=True, exist_ok=True)
        drafter_folder.replace(place, json.dumps(asdict(found)).encode())


def measure(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """Time scoring and drafting in turns."""
    score, drafts = defaultdict[int, list[float]](list), defaultdict[tuple[int, int], list[float]](list)
    exits, start = range(drafter.num_exits), time.perf_counter()
    while len(score[1]) < REPEATS or time.perf_counter() - start < SECONDS:
        for n, seconds in time_scoring(target, 1).items():
            score[n].append(seconds)
        for exit in exits:
            for depth in (1, DRAFTED):
                chosen = exit if len(exits) > 1 else None
                drafts[exit, depth].append(time_drafting(target, drafter, verifier, depth, chosen))
    lines = (_line(min(drafts[exit, 1]), min(drafts[exit, DRAFTED])) for exit in exits)
    least = [min(score[n]) for n in ROWS]
    # Fewer tokens take no longer: where they seem to, the machine was busy.
    return Costs({n: min(least[at:]) for at, n in enumerate(ROWS)}, tuple(lines))


def _line(one: float, each: float) -> tuple[float, float]:
    """Seconds of the first drafted token and of a further one, from one alone and from each of ``DRAFTED``.

    A token costs no more in a deeper draft. A drafter that drafts nothing alone (0) has one price.
    """
    further = (DRAFTED * each - one) / (DRAFTED - 1)
    return (one, further) if one > 0 and 0 <= further <= one else (each, each)


def _place(target: Target, drafter: Drafter) -> Path:
    """The file whose name is made of all that costs depend on."""
    device, cpu = target.device, machine.processor_name()
    units = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    parts: list[object] = [cpu, platform.node(), units, torch.__version__, torch.backends.cpu.get_cpu_capability()]
    parts += [target.runtime, target.storage, target.dtype, target.fingerprint, drafter.name, drafter.path]
    parts += [] if target.experts is None else [target.experts.describe()]  # more tokens load more experts
    name = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:24]
    return catalogue.cache_dir() / "costs" / f"{name}.json"


@torch.inference_mode()
def time_scoring(target: Target, repeats: int = 5) -> dict[int, float]:
    """Time passes of each size in ``ROWS``, interleaved, after a pass that warms up; the least of each, in seconds."""
    cache = target.new_cache()
    context = min(CONTEXT, target.context - max(ROWS))
    ids = torch.arange(context + max(ROWS), device=target.device)[None] % target.vocab_size
    positions = torch.arange(ids.shape[1], device=target.device)[None]
    _pass(target, ids[:, :context], positions[:, :context], cache)
    cache.commit([list(range(context))])
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
    for number, _ in enumerate(loop.steps()):
        spent = loop.ledger.seconds.get("draft", 0.0)
        if number > 1 and loop.metrics[0].per_step_drafted[-1]:
            steps.append((spent - before) / loop.metrics[0].per_step_drafted[-1])
        before = spent
    return min(steps, default=0.0)


def _pass(target: Target, ids: Tensor, positions: Tensor, cache: KVCache) -> None:
    x = target.embed(ids, positions)
    x = target.layers(x, 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache))
    target.choose(x)
