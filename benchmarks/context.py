"""Cost per token and memory by the length of the context, plain and with prompt lookup; the last line is JSON.

    python benchmarks/context.py qwen2.5-coder-1.5b-instruct --lengths 512,4096,16384,32768 --output result.jsonl

The prompt is source code of this package, cut at so many tokens: text that repeats itself somewhat. Each length and
drafter is one prefill and ``--tokens`` decoded tokens in a process of its own. Finished rows are added to the output
file, and a later call with the same file measures the missing rows; no row starts after ``--seconds``. Contexts longer
than the model's are left out.

Memory is the peak resident size beyond a process that has imported the libraries; further columns are the keys and
values of the context, and the size of their buffers. ms per step over ms per token is the mean acceptance length.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.base import cores, machine
from specdec.bench.environment import environment
from specdec.models.catalogue import DEFAULT_MODEL

COLUMNS = {
    "context": "context",
    "drafter": "drafter",
    "prefill": "prefill, tokens/s",
    "ms_per_token": "ms per token",
    "ms_per_step": "ms per step",
    "kv_mb": "keys and values, MB",
    "kv_room_mb": "their buffers, MB",
    "peak_mb": "peak, MB",
}


def one(args: argparse.Namespace, length: int, drafter: str) -> dict[str, Any]:
    """Measure a length with a drafter, in this process."""
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # the libraries' own lazy parts

    from specdec import SpecDecoder
    from specdec.api.text import encode

    torch.set_num_threads(args.threads)
    libraries = machine.resident("VmRSS") or 0.0
    decoder = SpecDecoder.from_pretrained(args.model, drafter=drafter, device="cpu", learn=False)
    room = decoder.target.context - args.tokens - 16  # for drafted tokens, too
    root = Path(__file__).parents[1]
    text = "\n".join(path.read_text("utf-8") for path in sorted(root.glob("specdec/**/*.py")))
    ids = encode(decoder.tokenizer, text[: 8 * length], chat=False)[: min(length, room)]
    figures: dict[str, Any] = {"context": length, "drafter": drafter, "runtime": decoder.target.runtime}
    if length > decoder.target.context or len(ids) < min(length, room):
        return figures | {"skipped": "longer than the model's context or than the text"}
    decoder.generate(ids[:64], max_new_tokens=8, ignore_eos=True)  # warms up and measures the costs of drafting
    with decoder.open([ids], max_new_tokens=args.tokens, ignore_eos=True) as generation:
        for _ in generation.steps():
            cache = generation.engine.batch.cache
            if cache.batch:
                slots, filled, size = cache.slots, cache.committed, cache.slots * cache.token_bytes
        spent = generation.requests[0].metrics
    decode = 1e3 * spent.decode_seconds
    return figures | {
        "tokens": len(ids),
        "prefill": round(len(ids) / spent.prefill_seconds, 1),
        "ms_per_token": round(decode / (spent.num_new_tokens - 1), 2),
        "ms_per_step": round(decode / max(spent.num_spec_steps, 1), 2),
        "kv_mb": round(size * filled / slots / 1e6, 1),
        "kv_room_mb": round(size / 1e6, 1),
        "peak_mb": round((machine.resident("VmHWM") or 0.0) - libraries, 1),
    }


def rows_of(output: Path | None) -> list[dict[str, Any]]:
    if output is None or not output.exists():
        return []
    return [json.loads(line) for line in output.read_text("utf-8").splitlines()]


def measure(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows with these settings: those in the output file, and the missing ones as far as the time reaches."""
    begin = time.perf_counter()
    rows = [row for row in rows_of(args.output) if row["settings"] == settings]
    done = {(row["context"], row["drafter"]) for row in rows}
    for length in (int(part) for part in args.lengths.split(",")):
        for drafter in args.drafters.split(","):
            if (length, drafter) in done or time.perf_counter() - begin > args.seconds:
                continue
            command = [sys.executable, __file__, args.model, "--here", "--lengths", str(length), "--drafters", drafter]
            command += ["--tokens", str(args.tokens), "--threads", str(args.threads)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"settings": settings, **json.loads(said.splitlines()[-1])})
            if args.output is not None:
                with args.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return sorted(rows, key=lambda row: row["context"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--lengths", default="512,4096,16384,32768", help="tokens of context")
    parser.add_argument("--drafters", default="none,prompt-lookup")
    parser.add_argument("--tokens", type=int, default=64, help="decoded after each context")
    parser.add_argument("--threads", type=int, default=cores.cpus())
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after so long")
    parser.add_argument("--output", type=Path, help="rows are added to this file; those in it are not measured again")
    parser.add_argument("--json", type=Path, help="also write all rows and the environment here")
    parser.add_argument("--here", action="store_true", help="measure in this process (one length, one drafter)")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(one(args, int(args.lengths), args.drafters)))
        return
    settings = {"model": Path(args.model).name, "tokens": args.tokens, "threads": args.threads}
    rows = measure(args, settings)
    table = Table(title=f"{settings['model']}: {args.threads} threads, {args.tokens} tokens decoded")
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title == "drafter" else "right")
    for row in rows:
        if "skipped" not in row:
            table.add_row(*(str(row[key]) for key in COLUMNS))
    console = Console(width=110)
    console.print(table)
    for row in rows:
        if "skipped" in row:
            console.print(f"{row['context']} tokens, {row['drafter']}: {row['skipped']}", markup=False)
    text = json.dumps({"rows": rows, "environment": environment()})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
