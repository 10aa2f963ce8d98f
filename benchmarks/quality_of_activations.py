"""Measure how far quantized runs of a GGUF file are from its weights in float32: KL divergence and equal tokens.

    python benchmarks/quality_of_activations.py MODEL.gguf --answers answers.jsonl.gz --output DIR
    python benchmarks/quality_of_activations.py MODEL.gguf --prompts mt-bench --output DIR --runs auto,dense,llama.cpp

The reference is the file's weights, dequantized, in float32 through PyTorch. Answers are lines of {"prompt_ids",
"response_ids"}; with ``--prompts`` the model itself answers the first turns greedily, in the native runtime. Every run
reads prompt and answer at once, and its logits at the position of each token of the answer are compared with the
reference's: KL(reference || run) in nats, and whether the most likely token is the same. Runs: "auto" (as ``specdec``
runs by default: activations in 8 bits) and other values of ``--weights`` (dense: activations in 16 bits), and llama.cpp
(``engine_llama_cpp``), each in a process of its own, one after the other. DIR stores answers, reference logits (4 bytes
for each position and entry of the vocabulary) and results; a later call continues from there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from rich.console import Console
from rich.table import Table

from specdec import SpecDecoder
from specdec.api.prompts import encode
from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.bench.environment import environment
from specdec.bench.prompts import evenly_spaced, load_prompts

LEAST, CONTEXT = 8, 2048  # tokens of an answer that counts; most tokens of prompt and answer
BATCH = 4  # prompts that the model answers together
Answer = dict[str, list[int]]


def answers_of(args: argparse.Namespace) -> list[Answer]:
    """Return the answers to compare on, {"prompt_ids", "response_ids"} each, with ``args.positions`` tokens in all.

    args: the options of the command line. Answers are stored in the output folder, and read from there if they exist.
    """
    kept = args.output / "answers.jsonl"
    if not kept.exists():
        lines = read(args.answers) if args.answers else made(args)
        kept.write_text("".join(json.dumps(line) + "\n" for line in chosen(lines, args.positions)))
    return [json.loads(line) for line in kept.read_text().splitlines()]


def chosen(lines: Iterator[Answer], positions: int) -> Iterator[Answer]:
    """Yield usable answers of ``lines`` until they have ``positions`` answer tokens; the last answer is cut to fit.

    Answers that are very short, or too long with their prompts, are left out.
    """
    for line in lines:
        ids = {"prompt_ids": line["prompt_ids"], "response_ids": line["response_ids"][:positions]}
        if len(ids["response_ids"]) >= min(LEAST, positions) and sum(map(len, ids.values())) <= CONTEXT:
            positions -= len(ids["response_ids"])
            yield ids
        if not positions:
            return


def read(file: Path) -> Iterator[Answer]:
    """Yield the answers in a JSONL file, which may be compressed (.gz): {"prompt_ids", "response_ids"} each."""
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
        yield from map(json.loads, lines)


def made(args: argparse.Namespace) -> Iterator[Answer]:
    """Yield the model's own greedy answers to a set of prompts: {"prompt_ids", "response_ids"} each.

    args: the options of the command line.
    """
    torch.set_num_threads(args.threads)
    decoder = SpecDecoder.from_pretrained(str(args.model), drafter="none", device="cpu")
    turns = [c.turns[0] for c in evenly_spaced(load_prompts(args.prompts).conversations, args.limit)]
    prompts = [encode(decoder.tokenizer, [{"role": "user", "content": turn}]) for turn in turns]
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        for ids, output in zip(batch, decoder.generate_batch(batch, max_new_tokens=args.max_new_tokens), strict=True):
            yield {"prompt_ids": ids, "response_ids": output.token_ids}


@contextmanager
def engine(run: str, args: argparse.Namespace) -> Iterator[peers.Process]:
    """Yield a process of its own with an engine and the loaded model, for a ``with`` block.

    run: "llama.cpp", or a value of the option ``--weights`` of specdec. args: the options of the command line. Raises
    SpecDecError if the engine is missing.
    """
    llama = run == "llama.cpp"
    if llama and (missing := peers.PEERS[run].missing):
        raise SpecDecError(f"'{run}' {missing}")
    process = peers.Process(peers.PEERS[run].engine if llama else "engine_specdec:Specdec")
    mode = "" if llama or run == "auto" else run
    try:
        how = {"threads": args.threads, "context": CONTEXT, "source": "", "depth": None}
        process.ask("load", path=str(args.model.absolute()), mode=mode, **how)
        yield process
    finally:
        process.close()


def compare(reference: Any, logits: Any) -> tuple[list[float], list[bool]]:
    """Return for each of n positions (KL(reference || logits) in nats, whether the argmax is equal), as two lists.

    reference, logits: float32 [n, V].
    """
    p, q = (torch.from_numpy(np.array(x)).double().log_softmax(-1) for x in (reference, logits))  # (n, V)
    divergence = (p.exp() * (p - q)).sum(-1)
    return [round(value, 9) for value in divergence.tolist()], (p.argmax(-1) == q.argmax(-1)).tolist()


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compute what the output folder lacks; return {run: a dict for each answer}.

    A dict has "kl", the KL divergence from the reference in nats, and "same", whether the likeliest token is equal, as
    lists with an entry for each token of the answer. args: the options of the command line. console: prints progress.
    """
    answers, rows = answers_of(args), args.output / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["run"], row["answer"]): row for row in known}
    scratch, references = args.output / "logits.npy", [args.output / f"{n}.npy" for n in range(len(answers))]

    def ask(process: peers.Process, number: int, path: Path) -> None:
        ids = answers[number]["prompt_ids"] + answers[number]["response_ids"]
        process.ask("logits", ids=ids, count=len(answers[number]["response_ids"]), path=str(path.absolute()))

    for run in ("float32", *args.runs):
        wanted = [n for n in range(len(answers)) if not references[n].exists()]
        if run != "float32":
            wanted = [n for n in range(len(answers)) if (run, n) not in done]
        if not wanted:
            continue
        with engine(run, args) as process, rows.open("a", buffering=1) as log:
            for number in wanted:
                ask(process, number, scratch)
                if run == "float32":
                    scratch.rename(references[number])
                    continue
                parts, logits = np.load(references[number], mmap_mode="r"), np.load(scratch)
                blocks = [compare(parts[i : i + 16], logits[i : i + 16]) for i in range(0, len(logits), 16)]
                kl, same = ([value for block in blocks for value in block[part]] for part in (0, 1))
                done[run, number] = row = {"run": run, "answer": number, "kl": kl, "same": same}
                log.write(json.dumps(row) + "\n")
        console.print(f"{run}: {len(wanted)} answers", style="dim")
    scratch.unlink(missing_ok=True)
    return {run: [done[run, n] for n in range(len(answers))] for run in args.runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--answers", type=Path, help='a file with lines of {"prompt_ids", "response_ids"}')
    parser.add_argument("--prompts", default="mt-bench", help="without --answers: a prompt set or a file")
    parser.add_argument("--limit", type=int, help="conversations, spread over the set")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="most tokens of an answer that is made")
    parser.add_argument("--positions", type=int, default=4000)
    parser.add_argument("--runs", default="auto,llama.cpp", type=lambda text: text.split(","))
    parser.add_argument("--threads", type=int, default=cores.cpus())
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    if args.positions < 1:
        parser.error("--positions takes at least 1")
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    try:
        found = measure(args, console)
    except SpecDecError as error:
        sys.exit(f"error: {error}")
    table, results = Table("run", "positions", "mean KL", "99 % of KL", "same likeliest token"), {}
    for run, rows in found.items():
        kl, same = (np.concatenate([row[key] for row in rows]) for key in ("kl", "same"))
        figures = {"positions": len(kl), "mean": float(kl.mean()), "p99": float(np.percentile(kl, 99))}
        results[run] = figures | {"same": float(same.mean())}
        cells = f"{kl.mean():.5f}", f"{results[run]['p99']:.4f}", f"{100 * same.mean():.2f} %"
        table.add_row(run, str(len(kl)), *cells)
    console.print(table)
    print(
        json.dumps(
            {"model": args.model.name, "runs": results, "environment": environment() | {"threads": args.threads}}
        )
    )


if __name__ == "__main__":
    main()
