"""Measuring the costs of steps: once per machine, model, runtime and drafter, stored in the cache folder.

The least of several timings counts: other work on the machine makes a pass longer, never shorter. Later, the times of
real steps correct the figures (``AutoDepth.costs``).
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path

import torch
from pydantic import TypeAdapter

from specdec.base import files, machine
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.policy import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Drafter, Verifier

SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 32)  # numbers of scored tokens that are timed
CONTEXT = 128  # cached tokens while timing
DRAFTED = 4  # depth of the timed drafts
REPEATS, SECONDS = 3, 1.0  # minimum number of timings of each, and minimum time for all
FORMAT, FILE = 3, TypeAdapter(Costs)


def costs(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
    """The costs of ``drafter`` on ``target``: from the cache folder, or measured and stored there."""
    with suppress(OSError, ValueError):  # no file, or not one of ``store``
        stored = FILE.validate_json(_file(target, drafter).read_bytes())
        if set(stored.score) == set(SIZES) and len(stored.drafts) == drafter.num_exits:
            warm_up(target, drafter, verifier)
            return stored
    [table] = measure(target, [drafter], verifier)
    store(target, drafter, table)
    return table


def store(target: Target, drafter: Drafter, table: Costs) -> None:
    """Write ``table`` to the cache folder. If that fails, the costs are measured again next time."""
    with suppress(OSError):
        path = _file(target, drafter)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, FILE.dump_json(table))


def measure(target: Target, drafters: Sequence[Drafter], verifier: Verifier) -> list[Costs]:
    """Time scoring, and drafting with each of ``drafters``, in turns: all see the same machine."""
    exits = [range(drafter.num_exits) if drafter.num_exits > 1 else [None] for drafter in drafters]
    score, draft = defaultdict[int, list[float]](list), defaultdict[tuple[int, int | None, int], list[float]](list)
    start = time.perf_counter()
    while len(score[1]) < REPEATS or time.perf_counter() - start < SECONDS:
        for n, seconds in time_scoring(target, 1).items():
            score[n].append(seconds)
        for number, drafter in enumerate(drafters):
            for exit, depth in product(exits[number], (1, DRAFTED)):
                draft[number, exit, depth].append(time_drafting(target, drafter, verifier, depth, exit))
    least = [min(score[n]) for n in SIZES]
    # Fewer tokens take no longer: where they seem to, the machine was busy.
    scoring = {n: min(least[at:]) for at, n in enumerate(SIZES)}
    found = []
    for number in range(len(drafters)):
        drafts = []
        for exit in exits[number]:
            one, each = min(draft[number, exit, 1]), min(draft[number, exit, DRAFTED])
            further = (DRAFTED * each - one) / (DRAFTED - 1)
            # A further token costs no more than the first. A drafter that drafts nothing alone (0) has one price.
            drafts.append((one, further) if 0 <= further <= one else (each, each))
        found.append(Costs(scoring, tuple(drafts)))
    return found


def _file(target: Target, drafter: Drafter) -> Path:
    """The file of the costs: its name is a hash of everything that they depend on."""
    device, cpu = target.device, machine.processor_name()
    units = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    parts: list[object] = [cpu, platform.node(), units, torch.__version__, torch.backends.cpu.get_cpu_capability()]
    parts += [
        FORMAT,
        target.runtime,
        target.weight_format,
        target.activations,
        target.kv_cache,
        target.dtype,
        target.fingerprint,
    ]
    parts += [drafter.name, drafter.path]
    parts += [] if target.experts is None else [target.experts.describe()]  # more tokens load more experts
    name = hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:24]
    return files.cache_dir() / "costs" / f"{name}.json"


@torch.inference_mode()
def time_scoring(target: Target, repeats: int = 5, sizes: Sequence[int] | None = None) -> dict[int, float]:
    """The least seconds of passes of each of ``sizes`` (None: ``SIZES``), interleaved, after one that warms up.

    With experts in slow memory, the median: each pass has other tokens, and those of a lucky one are there already.
    """
    sizes = SIZES if sizes is None else sizes
    cache, context = target.new_cache(), min(CONTEXT, target.context - max(sizes))
    _pass(target, cache, 0, context)
    cache.commit([list(range(context))])
    seconds = defaultdict[int, list[float]](list)
    order = [*sizes, *reversed(sizes)]  # a pass takes longer behind a much larger one
    for turn, n in enumerate(order * (repeats // 2 + 1)):
        start = time.perf_counter()
        _pass(target, cache, context, n, turn * max(sizes))
        seconds[n].append(time.perf_counter() - start)
        cache.trim(n)
    typical = min if target.experts is None else statistics.median
    return {n: typical(s[1:]) for n, s in seconds.items()}


def _pass(target: Target, cache: KVCache, start: int, count: int, first: int = 0) -> None:
    """Run ``count`` tokens, ``first`` and so on, from position ``start`` on, and choose one after each."""
    positions = torch.arange(start, start + count, device=target.device)[None]
    x = target.embed((positions + first) % target.vocab_size, positions)
    target.choose(target.layers(x, 0, target.num_layers, Pass(positions, cache.mask(0, positions), cache)))


def _engine(target: Target, drafter: Drafter, verifier: Verifier, depth: FixedDepth) -> Engine:
    engine = Engine(target, drafter, verifier, depth)
    engine.batch.state.measuring = True
    return engine


def warm_up(target: Target, drafter: Drafter, verifier: Verifier) -> None:
    """Draft once. What a runtime makes at the first draft can take seconds, which no step of a request should."""
    engine = _engine(target, drafter, verifier, FixedDepth(1))
    engine.submit(Request([0, 0], 3, learn=False))
    for _ in engine.steps():
        pass


def time_drafting(target: Target, drafter: Drafter, verifier: Verifier, depth: int, exit: int | None) -> float:
    """The least seconds per drafted token in the steps of a short generation; 0 if nothing is drafted."""
    prompt = [(7 * i) % target.vocab_size for i in range(min(CONTEXT, target.context // 2))]
    request = Request(prompt, min(8 * depth, target.context - len(prompt)), learn=False)
    engine = _engine(target, drafter, verifier, FixedDepth(depth, exit))
    engine.submit(request)
    spent = [engine.ledger.seconds.get("draft", 0.0) for _ in engine.steps()]  # after the prefill, and after each step
    steps = list(zip(pairwise(spent), request.metrics.per_step_drafted, strict=True))
    return min([(after - before) / n for (before, after), n in steps[1:] if n], default=0.0)  # the first warms up
