"""Several sequences decoded side by side, beside llama.cpp on the same GGUF file; the last line is JSON.

    export LLAMA_CPP=FOLDER  # or: pip install llama-cpp-python
    python benchmarks/batching.py MODEL.gguf --rows 1,4,8 --drafter m2r2 --json result.json

llama.cpp decodes one token of each sequence in a pass; specdec decodes plainly and with the drafter. The prompts are
first turns; all answers have the same number of tokens, and end-of-sequence tokens do not end them. What counts is the
time from when all prompts have been read. Each engine is a process of its own; the order rotates from round to round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import peers
from engine_llama_cpp import LlamaCpp
from engine_specdec import Specdec
from rich.console import Console
from rich.table import Table

from specdec.api.text import encode
from specdec.base import cores
from specdec.bench.environment import environment
from specdec.bench.prompts import evenly_spaced, load_prompts
from specdec.models.loading import read_tokenizer

CONTEXT = 1024  # tokens of a sequence
LLAMA = "llama.cpp"


class LlamaRows(LlamaCpp):
    """depth: the maximum number of sequences."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        self.rows = depth or 1
        return super().load(path, threads, context, "", source, None)

    def side_by_side(self, prompts: list[list[int]], count: int, draft: bool) -> dict[str, Any]:
        model, tokens = self.model, list[list[int]]()
        for row, ids in enumerate(prompts):
            model.keep(0, row)
            model.decode(ids, row=row)
            tokens.append([int(model.logits(-1).argmax())])
        start = time.perf_counter()
        for step in range(count - 1):
            new = [
                (made[-1], len(ids) + step, row) for row, (made, ids) in enumerate(zip(tokens, prompts, strict=True))
            ]
            model.run(new, len(new))
            for row, made in enumerate(tokens):
                made.append(int(model.logits(row).argmax()))
        return {"tokens": tokens, "rate": len(tokens) * (count - 1) / (time.perf_counter() - start)}


class SpecdecRows(Specdec):
    """source: the drafter."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        about = super().load(path, threads, context, mode, "", depth)
        self.drafted = self.decoder.with_drafter(source)
        return about

    def side_by_side(self, prompts: list[list[int]], count: int, draft: bool) -> dict[str, Any]:
        decoder = self.drafted if draft else self.decoder
        with decoder.open(prompts, max_new_tokens=count, ignore_eos=True) as generation:
            start, waiting, before = 0.0, set(range(len(prompts))), 0
            for events in generation.steps():
                if waiting:  # some prompts have not been read
                    waiting -= {row for row, _ in events}
                    before += sum(len(new) for _, new in events)
                    start = time.perf_counter()
            seconds, tokens = time.perf_counter() - start, [out.token_ids for out in generation.outputs()]
        return {"tokens": tokens, "rate": (sum(map(len, tokens)) - before) / seconds}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each number of sequences."""
    tokenizer, texts = read_tokenizer(args.model), evenly_spaced(load_prompts(args.prompts).conversations, args.limit)
    prompts = [encode(tokenizer, [{"role": "user", "content": text.turns[0]}], None, None) for text in texts]
    ours, theirs = (peers.Process(f"batching:{name}") for name in ("SpecdecRows", "LlamaRows"))
    loading = {"path": str(Path(args.model).absolute()), "threads": args.threads, "context": CONTEXT, "mode": ""}
    for process in (ours, theirs):
        process.ask("load", **loading, source=args.drafter, depth=max(args.rows))
    methods = {LLAMA: (theirs, False), "none": (ours, False), args.drafter: (ours, True)}
    found = list[dict[str, Any]]()
    for rows in args.rows:
        rates: dict[str, list[float]] = {name: [] for name in methods}
        for number in range(args.rounds + 1):
            chosen = [prompts[(number * rows + i) % len(prompts)] for i in range(rows)]
            texts_of, turn = dict[str, Any](), number % len(methods)
            for name in [*list(methods)[turn:], *list(methods)[:turn]]:
                process, draft = methods[name]
                made = process.ask("side_by_side", prompts=chosen, count=args.tokens if number else 4, draft=draft)
                texts_of[name] = made["tokens"]
                if number:  # the first round warms up
                    rates[name].append(made["rate"])
            if texts_of["none"] != texts_of[args.drafter]:
                raise ValueError("drafting changed the tokens")
        found.append({"rows": rows, "tokens_per_second": rates})
    return found


def table_of(args: argparse.Namespace, found: list[dict[str, Any]]) -> Table:
    names = (LLAMA, "none", args.drafter)
    table = Table("sequences", *(f"{name}, tokens/s" for name in names), *(f"{name} x llama.cpp" for name in names[1:]))
    for row in found:
        rates = row["tokens_per_second"]
        ratios = [[a / b for a, b in zip(rates[name], rates[LLAMA], strict=True)] for name in names[1:]]
        cells = [f"{statistics.median(rates[name]):.1f}" for name in names]
        cells += [f"{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})" for r in ratios]
        table.add_row(str(row["rows"]), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 8])
    parser.add_argument("--drafter", default="m2r2")
    parser.add_argument("--prompts", default="mt-bench", help="a file or the name of a set")
    parser.add_argument("--limit", type=int, default=16, help="different prompts")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores.cpus())
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    found = measure(args)
    Console().print(table_of(args, found))
    text = json.dumps({"results": found, "environment": environment()})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
