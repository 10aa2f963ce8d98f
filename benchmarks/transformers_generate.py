"""``model.generate`` plain, with transformers' own speculation, and with ``SpecGenerate``; the last line is JSON.

    python benchmarks/transformers_generate.py --prompts FILE --limit 10 --drafters prompt-lookup,prompt-lookup+m2r2
    python benchmarks/transformers_generate.py ... --model ORG/NAME --assistant ORG/SMALLER

One model in memory serves all methods, with the same weights. Every method answers the first turn of every prompt,
greedily, in an order that rotates. Printed are the median milliseconds per token, the median over prompts of the speed
relative to plain ``generate``, with its smallest and largest, tokens per pass of the model (prefill included), and
outputs equal to those of plain ``generate``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec.api.text import encode
from specdec.bench.environment import environment
from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.integrations.transformers import SpecGenerate
from specdec.models import catalogue, loading
from specdec.models.gguf.blocks import densify

PLAIN, WARM_UP = "generate", 12
Method = Callable[[list[int], int], tuple[list[int], int]]  # prompt, new tokens -> new tokens, passes of the model


class Passes:
    """Counts the calls of a model."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        model.register_forward_pre_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1


def generate(model: Any, passes: Passes, **options: Any) -> Method:
    def run(ids: list[int], count: int) -> tuple[list[int], int]:
        given, passes.count = torch.tensor([ids], device=model.device), 0
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, **options
        )
        spec = options.get("custom_generate")
        steps = passes.count if spec is None else 1 + spec.metrics[0].num_spec_steps
        return out[0, len(ids) :].tolist(), steps

    return run


def methods(args: argparse.Namespace, model: Any) -> dict[str, Method]:
    """All that were asked for, by name."""
    passes = Passes(model)
    found = {
        PLAIN: generate(model, passes),
        "prompt_lookup_num_tokens": generate(model, passes, prompt_lookup_num_tokens=args.lookup_tokens),
    }
    if args.assistant:
        assistant = loading.load(args.assistant, dtype=args.dtype, device=args.device)[0]
        densify(assistant)
        found["assistant_model"] = generate(model, passes, assistant_model=assistant)
    for drafter in args.drafters.split(","):
        found[f"SpecGenerate {drafter}"] = generate(model, passes, custom_generate=SpecGenerate(drafter))
    return found


def measure(args: argparse.Namespace) -> list[dict[str, dict[str, Any]]]:
    """For each prompt, what each method took."""
    model, tokenizer = loading.load(args.model, dtype=args.dtype, device=args.device)
    densify(model)
    model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    found = methods(args, model)
    conversations = evenly_spaced(load_prompts(args.prompts, args.data_dir).conversations, args.limit)
    prompts = [encode(tokenizer, conversation.turns[0]) for conversation in conversations]
    for run in found.values():
        run(prompts[0][-64:], WARM_UP)
    rows = []
    for number, ids in enumerate(track(prompts, "decoding", console=Console(stderr=True))):
        order, row = list(found), dict[str, dict[str, Any]]()
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            start = time.perf_counter()
            tokens, passes = found[name](ids, args.max_new_tokens)
            row[name] = {"seconds": time.perf_counter() - start, "tokens": tokens, "passes": passes}
        rows.append(row)
    return rows


def summary(rows: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One entry for each method."""
    lines = []
    for name in rows[0]:
        runs = [(row[name], row[PLAIN]) for row in rows]
        each = [run["seconds"] / len(run["tokens"]) for run, _ in runs]
        ratios = [plain["seconds"] / len(plain["tokens"]) / own for own, (_, plain) in zip(each, runs, strict=True)]
        lines.append(
            {
                "method": name,
                "ms_per_token": round(1e3 * statistics.median(each), 2),
                "speedup": round(statistics.median(ratios), 3),
                "slowest": round(min(ratios), 3),
                "fastest": round(max(ratios), 3),
                "tokens_per_pass": round(sum(len(r["tokens"]) for r, _ in runs) / sum(r["passes"] for r, _ in runs), 3),
                "equal": sum(run["tokens"] == plain["tokens"] for run, plain in runs),
            }
        )
    return sorted(lines, key=lambda line: line["method"] != PLAIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalogue.DEFAULT_MODEL)
    parser.add_argument("--assistant", help="a smaller model of the same tokenizer")
    parser.add_argument("--drafters", default="prompt-lookup,prompt-lookup+m2r2", help="comma-separated")
    parser.add_argument("--lookup-tokens", type=int, default=10, help="of transformers' prompt lookup")
    parser.add_argument("--prompts", default="mt-bench", help="as 'specdec bench --prompts'")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = measure(args)
    lines = summary(rows)
    table = Table(*(key.replace("_", " ") for key in lines[0]))
    for line in lines:
        table.add_row(*map(str, line.values()))
    Console(width=120).print(table)
    print(json.dumps({"model": args.model, "prompts": len(rows), "methods": lines, "environment": environment()}))


if __name__ == "__main__":
    main()
