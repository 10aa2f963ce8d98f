"""How many problems a model solves when confident drafts are accepted without scoring, and what that saves.

    python benchmarks/right_answers.py MODEL --problems gsm8k.jsonl --drafters m2r2,routed=DIR --output answers.jsonl

Problems are lines of {"turns": [question], "reference": number}. The model is asked for a short answer, which is right
if its last number is the reference. Every drafter runs with the rule ``confident`` at each threshold; the first row is
plain decoding. *Same text*: answers that equal its own. Problems are answered one after another, all rows of one before
the next, so that seconds compare. The output has a line for each answer; run again, the script goes on where it ended.
Intervals are Wilson's, at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from specdec import SpecDecoder
from specdec.base import cores, inputs
from specdec.base.errors import SpecDecError
from specdec.bench.prompts import evenly_spaced

SHORTLY = " Answer in at most three short sentences of plain text. End with the number."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Z = 1.96  # of a 95 % interval


def last_number(text: str) -> float | None:
    """The last number in ``text``."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval of a share of ``right`` among ``count`` >= 1."""
    share, weight = right / count, Z**2 / count
    middle, half = share + weight / 2, Z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return (middle - half) / (1 + weight), (middle + half) / (1 + weight)


def problems(path: Path, limit: int | None, seen: Sequence[Path] = ()) -> list[tuple[str, float]]:
    """At most ``limit`` questions with their numbers, spread over the file; none that a file of ``seen`` has."""
    known = "\n".join(file.read_text("utf-8") for file in seen)
    kept = list[tuple[str, float]]()
    for _, line in inputs.lines(path):
        record = inputs.parse_json(line)
        question, number = record["turns"][0], last_number(str(record.get("reference", "")))
        if number is not None and question not in known:
            kept.append((question, number))
    return evenly_spaced(kept, limit)


def answer(decoder: SpecDecoder, question: str, wanted: float, max_new_tokens: int) -> dict[str, Any]:
    """What is recorded of an answer."""
    start = time.perf_counter()
    output = decoder.generate([{"role": "user", "content": question + SHORTLY}], max_new_tokens=max_new_tokens)
    seconds, metrics = time.perf_counter() - start, output.metrics
    return {
        "text": output.text,
        "right": last_number(output.text) == wanted,
        "tokens": metrics.num_new_tokens,
        "layers": metrics.mean_layers_per_token * metrics.num_new_tokens,
        "seconds": seconds,
    }


def run(args: argparse.Namespace, console: Console) -> None:
    """Add the missing answers to the output."""
    torch.set_num_threads(args.threads)
    given = problems(args.problems, args.limit, args.seen)
    done = {(line["row"], line["problem"]) for line in recorded(args.output)}
    plain = SpecDecoder.from_pretrained(args.model, drafter="none", device="cpu", learn=False)
    rows = {"plain": plain}
    for name, _, source in (drafter.partition("=") for drafter in args.drafters):
        for threshold in args.thresholds:
            rows[f"{name} {threshold:g}"] = SpecDecoder(
                plain.model,
                plain.tokenizer,
                source or name,
                verifier="confident",
                verifier_options={"exit_threshold": threshold},
                learn=False,
            )
    with args.output.open("a", encoding="utf-8") as file:
        for number, (question, wanted) in enumerate(given):
            for name, decoder in rows.items():
                if (name, number) not in done:
                    found = answer(decoder, question, wanted, args.max_new_tokens)
                    file.write(json.dumps({"row": name, "problem": number, **found}) + "\n")
                    file.flush()
            console.print(f"{number + 1} of {len(given)}", style="dim")


def recorded(path: Path) -> list[dict[str, Any]]:
    """The lines of an output."""
    return [inputs.parse_json(line) for _, line in inputs.lines(path)] if path.exists() else []


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """The rows over the problems that all rows have answered."""
    rows = defaultdict[str, dict[int, dict[str, Any]]](dict)
    for line in lines:
        rows[line["row"]][line["problem"]] = line
    common = sorted(set.intersection(*map(set, rows.values())))
    plain = [rows["plain"][problem] for problem in common]
    shown = Table("rule", "right", "95 %", "same text", "layers per token", "x plain", title=f"{len(common)} problems")
    speeds = {}
    for name, answers in rows.items():
        own = [answers[problem] for problem in common]
        tokens, seconds, layers = (sum(line[key] for line in own) for key in ("tokens", "seconds", "layers"))
        speeds[name] = tokens / seconds
        right = sum(line["right"] for line in own)
        low, high = wilson(right, len(own))
        same = sum(line["text"] == base["text"] for line, base in zip(own, plain, strict=True))
        figures = f"{layers / tokens:.1f}", f"{speeds[name] / speeds['plain']:.2f}"
        shown.add_row(name, str(right), f"{low:.2f}-{high:.2f}", str(same), *figures)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seen", type=Path, nargs="*", default=[], help="text files; leave out questions in them")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSONL of the answers")
    parser.add_argument("--limit", type=int, default=40, help="problems, spread over the file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--drafters", default=["m2r2"], type=lambda text: text.split(","), help="NAME or NAME=FOLDER")
    parser.add_argument("--thresholds", default=[0.6, 0.8, 0.95], type=lambda text: [float(x) for x in text.split(",")])
    parser.add_argument("--threads", type=int, default=cores.cpus())
    args = parser.parse_args()
    try:
        run(args, Console(stderr=True))
        Console().print(table(recorded(args.output)))
    except SpecDecError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
