"""Automatic depth against plain decoding: every drafter on every prompt set, plain before and after each answer.

    python benchmarks/never_slower.py --prompts mt_bench.jsonl koala.jsonl --drafters m2r2,deed,lookahead --limit 8

A prompt's ratio is the drafter's decode speed over the mean of plain decoding just before and just after it, so a slow
change of the machine cancels out. The table has medians over the prompts, the mean acceptance length and the shares of
drafted depths; the last line is JSON. Exits with 1 where a median is below ``--least``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec import SpecDecoder
from specdec.engine.metrics import RequestMetrics
from specdec.models.catalogue import DEFAULT_MODEL

DRAFTERS = "m2r2,m2r2-paper,deed,early-exit,layer-skip,skip-decode,mixture-of-depths,medusa,lookahead,prompt-lookup"


def read_prompts(path: Path, limit: int) -> list[str]:
    """The first turn of ``limit`` prompts, evenly spread over the file."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    rows = rows[:: max(len(rows) // limit, 1)][:limit]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]


def answer(decoder: SpecDecoder, prompt: str, tokens: int) -> RequestMetrics:
    messages = [{"role": "user", "content": prompt}]
    return decoder.generate(messages, max_new_tokens=tokens).metrics


def speed(metrics: RequestMetrics) -> float:
    return (metrics.num_new_tokens - 1) / max(metrics.decode_seconds, 1e-9)


def compare(plain: SpecDecoder, drafted: SpecDecoder, prompts: list[str], tokens: int) -> dict[str, Any]:
    """Figures of one drafter on one prompt set."""
    ratios, depths = list[float](), Counter[int]()
    new, steps = 0, 0
    for prompt in prompts:
        before, own, after = (answer(decoder, prompt, tokens) for decoder in (plain, drafted, plain))
        if own.num_new_tokens < 2:
            continue
        ratios.append(2 * speed(own) / (speed(before) + speed(after)))
        depths.update(own.per_step_drafted)
        new, steps = new + own.num_new_tokens - 1, steps + len(own.per_step_drafted)
    if not ratios:
        sys.exit("every answer ended with its first token")
    shares = {depth: round(count / steps, 3) for depth, count in sorted(depths.items())}
    return {
        "median": round(statistics.median(ratios), 4),
        "least": round(min(ratios), 4),
        "mean_acceptance_length": round(new / steps, 3),
        "depths": shares,
        "prompts": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--drafters", default=DRAFTERS, help="names or folders, separated by commas")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files with 'turns' or 'prompt'")
    parser.add_argument("--limit", type=int, default=10, help="prompts of each file")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of an answer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--least", type=float, default=0.97, help="the lowest median that is accepted")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = SpecDecoder.from_pretrained(args.model, "none")
    found: dict[str, dict[str, Any]] = {}
    table = Table("drafter", "prompts", "x plain (median)", "least", "mean acceptance length", "depths")
    for name in args.drafters.split(","):
        drafted = plain.with_drafter(name)
        answer(drafted, "Count to twenty.", 8)  # measures the costs
        for path in args.prompts:
            figures = compare(plain, drafted, read_prompts(path, args.limit), args.tokens)
            found.setdefault(name, {})[path.stem] = figures
            cells = (f"{figures[key]:.3f}" for key in ("median", "least", "mean_acceptance_length"))
            table.add_row(name, path.stem, *cells, " ".join(f"{k}:{s:.0%}" for k, s in figures["depths"].items()))
    Console(width=140).print(table)
    print(json.dumps(found))
    if any(figures["median"] < args.least for sets in found.values() for figures in sets.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
