"""Tokens a step of chains and trees, and what levels, passes and the rest of a step take.

    python benchmarks/trees.py MODEL DRAFTER PROMPTS.jsonl [--weights dense] [--count 8] [--tokens 64]

Every setting decodes the first turns of the same prompts, greedily. Tokens a step depend on no clock at fixed shapes;
seconds do, and want a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from specdec import SpecDecoder
from specdec.engine.depth.measure import time_scoring
from specdec.runtimes.tree_drafting import Bounds, DraftPath, Seed

SIZES = (1, 2, 4, 8, 12, 16, 17, 20, 24)
WIDTHS, LEVELS = (1, 2, 4, 8), (2, 6)


def settings(deepest: int) -> dict[str, tuple[dict[str, Any], int | str]]:
    """By name: drafter options, and ``num_speculative_tokens``."""
    chains = {f"chain of {k}": ({}, k) for k in (4, 8)}
    trees = {f"tree of {n}": ({"nodes": n}, deepest) for n in (8, 16, 24)}
    return {**chains, **trees, "automatic": ({}, "auto")}


def decode(decoder: SpecDecoder, prompts: list[str], tokens: int, depth: int | str) -> dict[str, float]:
    """Pooled and mean tokens a step, tokens a second, and the share of each phase in the decoding time."""
    steps, accepted, made, spent, means = 0, 0, 0, defaultdict[str, float](float), list[float]()
    nodes = levels = 0
    for prompt in prompts:
        metrics = decoder.generate(prompt, max_new_tokens=tokens, num_speculative_tokens=depth).metrics
        steps, accepted = steps + metrics.num_spec_steps, accepted + metrics.num_accepted_draft_tokens
        made, nodes = made + metrics.num_new_tokens - 1, nodes + metrics.num_draft_tokens
        levels += sum(metrics.per_step_drafted)
        means.append(metrics.mean_acceptance_length)
        for phase, seconds in metrics.ledger.items():
            spent[phase] += seconds
    spent.pop("prefill", None)
    total = sum(spent.values())
    figures = {"pooled": (accepted + steps) / steps, "mean": sum(means) / len(means), "tokens/s": made / total}
    figures |= {"nodes": nodes / steps, "depth": levels / steps}
    return figures | {phase: seconds / total for phase, seconds in spent.items()}


@torch.inference_mode()
def time_levels(decoder: SpecDecoder, seconds: float) -> dict[int, float]:
    """Seconds of a further level by its width, of a drafter with a path."""
    target, drafter = decoder.target, decoder.drafter
    network, vocabulary = drafter.network, drafter.vocabulary
    path = DraftPath(network.frozen, network.path.segments, network.adapters, vocabulary.heads, vocabulary.tokens)
    cache, shape = target.new_cache(), (1, 1, target.hidden_size)
    final, *carried = torch.randn(1 + len(path.segments), *shape, dtype=target.dtype)
    seed = Seed([5], [0], final, carried)
    least, start = defaultdict[tuple[int, int], float](lambda: float("inf")), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for width in WIDTHS:
            for levels in LEVELS:
                began = time.perf_counter()
                target.grow(cache, seed, path, Bounds(levels, width))
                least[width, levels] = min(least[width, levels], time.perf_counter() - began)
    few, many = LEVELS
    return {width: (least[width, many] - least[width, few]) / (many - few) for width in WIDTHS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("drafter", help="m2r2 or medusa, or m2r2=FOLDER")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing levels and passes; 0: none")
    parser.add_argument("--only", help="a setting by name, such as 'tree of 16'")
    given = parser.parse_args()
    lines = given.prompts.read_text().splitlines()[: given.count]
    prompts = [json.loads(line)["turns"][0] for line in lines]
    base = SpecDecoder.from_pretrained(given.model, "none", weights=given.weights)
    if given.seconds:
        decoder = base.with_drafter(given.drafter)
        passes, start = dict[int, float](), time.perf_counter()
        while not passes or time.perf_counter() - start < given.seconds:
            for size, seconds in time_scoring(base.target, 1, SIZES).items():
                passes[size] = min(passes.get(size, seconds), seconds)
        print("ms of a pass over n tokens:", {n: round(1e3 * s, 2) for n, s in passes.items()})
        if hasattr(decoder.drafter, "draft_path"):
            levels = time_levels(decoder, given.seconds)
            print("ms of a draft level by width:", {width: round(1e3 * s, 2) for width, s in levels.items()})
    for name, (options, depth) in settings(12).items():
        if given.only in (None, name):
            figures = decode(base.with_drafter(given.drafter, **options), prompts, given.tokens, depth)
            print(f"{name:12}", {key: round(value, 3) for key, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
