"""Decoding speed on real prompts, arm against arm, interleaved prompt by prompt; the last line is JSON.

    python benchmarks/speed.py --prompts mt_bench.jsonl --limit 20 --arms hf,none,prompt-lookup,m2r2

Arms: ``hf`` (model.generate), ``hf-lookup`` (its prompt lookup; 10 tokens where our depth is auto), or a drafter. Every
arm decodes the first turn of each prompt greedily to its natural end or the limit; the order rotates with the prompt.
Times are whole calls, prefill included, per new token; ratios are taken prompt by prompt, and their median is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from specdec import SpecDecoder
from specdec.text import encode
from specdec.verify import NEAR_TIE, margins


def hf_arm(decoder: SpecDecoder, **extra: Any) -> Any:
    def run(ids: list[int], count: int) -> tuple[list[int], float]:
        out = decoder.model.generate(
            torch.tensor([ids], device=decoder.model.device),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        return out[0, len(ids) :].tolist(), 0.0

    return run


def own_arm(decoder: SpecDecoder, depth: int | str) -> Any:
    def run(ids: list[int], count: int) -> tuple[list[int], float]:
        out = decoder.generate(ids, max_new_tokens=count, num_speculative_tokens=depth)
        return out.token_ids, out.metrics.mean_acceptance_length

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=Path, required=True, help='JSONL with {"turns": [...]} or {"prompt": ...}')
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", default="auto", help="auto, or a number")
    parser.add_argument("--arms", default="hf,none,prompt-lookup,m2r2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--weights", default="dense")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    args = parser.parse_args()

    depth = args.num_speculative_tokens if args.num_speculative_tokens == "auto" else int(args.num_speculative_tokens)
    rows = [json.loads(line) for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
    rows = rows[:: max(len(rows) // args.limit, 1)][: args.limit]  # spread over the file's categories
    base = SpecDecoder.from_pretrained(
        args.model, "none", dtype=args.dtype, device=args.device, runtime=args.runtime, weights=args.weights
    )
    arms: dict[str, Any] = {}
    for name in args.arms.split(","):
        if name == "hf":
            arms[name] = hf_arm(base)
        elif name == "hf-lookup":
            arms[name] = hf_arm(base, prompt_lookup_num_tokens=10 if depth == "auto" else depth)
        else:
            arms[name] = own_arm(base.with_drafter(name), depth)
    prompts = [encode(base.tokenizer, row["turns"][0] if "turns" in row else row["prompt"]) for row in rows]
    for run in arms.values():
        run(prompts[0], 16)

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    lengths: dict[str, list[float]] = {name: [] for name in arms}
    outputs: dict[str, list[list[int]]] = {name: [] for name in arms}
    order = list(arms)
    console = Console(stderr=True)
    for i, ids in enumerate(track(prompts, "prompts", console=console, disable=not sys.stderr.isatty())):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            start = time.perf_counter()
            tokens, length = arms[name](ids, args.max_new_tokens)
            seconds[name].append((time.perf_counter() - start) / len(tokens))
            lengths[name].append(length)
            outputs[name].append(tokens)

    first = order[0]
    plain = "none" if "none" in arms else first
    report = {}
    table = Table(title=f"{args.model}, {base.target.runtime} runtime, {base.target.dtype}, {args.device}")
    for column in ("arm", "ms/token", f"x {first}", f"x {plain}", "tokens/round", "equal outputs", "near-ties only"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name in arms:
        per_token = [1e3 * s for s in seconds[name]]
        to_first = [a / b for a, b in zip(seconds[first], seconds[name], strict=True)]
        to_plain = [a / b for a, b in zip(seconds[plain], seconds[name], strict=True)]
        same = sum(a == b for a, b in zip(outputs[name], outputs[plain], strict=True))
        worst = max(
            float(margins(base.target, ids, out).max()) for ids, out in zip(prompts, outputs[name], strict=True)
        )
        report[name] = {
            "ms_per_token": statistics.median(per_token),
            f"speedup_over_{first}": statistics.median(to_first),
            f"speedup_over_{plain}": statistics.median(to_plain),
            "mean_acceptance_length": statistics.mean(lengths[name]),
            "outputs_equal_to_plain": same,
            "largest_replay_margin": worst,
        }
        table.add_row(
            name,
            f"{statistics.median(per_token):.2f}",
            f"{statistics.median(to_first):.2f}",
            f"{statistics.median(to_plain):.2f}",
            f"{statistics.mean(lengths[name]):.2f}" if lengths[name][0] else "",
            f"{same}/{len(prompts)}",
            f"yes ({worst:.2g})" if worst <= NEAR_TIE[base.target.dtype] else f"NO ({worst:.2g})",
        )
    Console().print(table)
    line = json.dumps({"settings": vars(args) | {"prompts": args.prompts.name, "output": None}, "arms": report})
    if args.output:
        args.output.write_text(line + "\n", "utf-8")
    print(line)


if __name__ == "__main__":
    main()
