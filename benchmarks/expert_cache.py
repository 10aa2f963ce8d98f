"""A random mixture of 0.8 billion weights in Q4_K whose experts are on the disk: what a cache and forecasts save.

    python benchmarks/expert_cache.py --threads 2

8 of 64 experts a token, 8 layers. A share of the experts is in memory (least recently used); the rest is read from the
disk past the system's memory. "known" reads what a pass over several tokens will take before the pass, all layers at
once, as a forecast that is never wrong could at best. Times are medians of passes over other tokens each, the ways in
turn; "in memory" are the same passes with all experts there.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from typing import Any

import families
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from specdec.runtimes.native.experts import _WILL_NEED, CHUNK, MappedExperts
from specdec.runtimes.native.target import NativeTarget

PASSES, SHARES, MANY = 24, (0.125, 0.25, 0.5), (1, 4, 8)
SIZES = families.MIXED | {"intermediate_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 8}


def experts_of(target: NativeTarget) -> MappedExperts:
    assert target.experts is not None
    return target.experts


class Chosen:
    """Notes which experts each layer of a target takes."""

    def __init__(self, target: NativeTarget) -> None:
        self.layers = dict[int, list[int]]()
        own = experts_of(target)

        def note(layer: int, count: int, groups: Any) -> None:
            self.layers[layer] = groups[: 3 * count : 3]
            own._demand(layer, count, groups)

        self.call = type(own.call)(note)
        target._model.demand = ctypes.cast(self.call, ctypes.c_void_p)


def read_ahead(experts: MappedExperts, chosen: dict[int, list[int]]) -> None:
    for number, wanted in chosen.items():
        layer = experts.layers[number]
        for expert in wanted:
            if expert not in layer.there:
                layer.advise(expert, _WILL_NEED, CHUNK)


def measure(share: float, tokens: int, whole: NativeTarget, few: NativeTarget) -> list[str]:
    chosen, experts = Chosen(whole), experts_of(few)
    caches = {target: families.primed(target) for target in (whole, few)}
    times: dict[str, list[float]] = {"in memory": [], "cache": [], "known": []}
    misses, reads = list[int](), list[int]()
    experts.slots = round(64 * share)
    for number in range(-4, 2 * PASSES):
        at = number * tokens
        memory = families.pass_ms(whole, tokens, caches[whole], at)
        known, before = number % 2 == 1, experts.counters.since(type(experts.counters)())
        begin = families.time.perf_counter()
        if known:
            read_ahead(experts, chosen.layers)
        ahead = 1e3 * (families.time.perf_counter() - begin)
        spent = ahead + families.pass_ms(few, tokens, caches[few], at)
        figures = experts.counters.since(before)
        if number >= 0:
            times["in memory"].append(memory)
            times["known" if known else "cache"].append(spent)
            misses.append(figures.misses)
            reads.append(figures.demanded)
    found = {name: statistics.median(each) for name, each in times.items()}
    missed = sum(misses) / len(misses)
    megabytes = missed * experts.shape[2] / 1e6
    return [
        f"{share:.1%}",
        str(tokens),
        f"{1 - sum(misses) / sum(reads):.0%}",
        f"{megabytes:.0f}",
        *(f"{found[name]:.1f}" for name in ("in memory", "cache", "known")),
        f"{found['cache'] / found['known']:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model: Any = families.model_of("qwen3_moe", AutoConfig.for_model("qwen3_moe", **SIZES, **families.SPECIAL))
    whole, few = NativeTarget(model, expert_cache=1.0), NativeTarget(model, expert_cache=SHARES[0])
    table = Table("cache", "tokens", "hits", "MB a pass", "in memory, ms", "cache, ms", "known, ms", "times")
    for share in SHARES:
        for tokens in MANY:
            table.add_row(*measure(share, tokens, whole, few))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
