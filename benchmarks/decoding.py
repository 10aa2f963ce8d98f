"""Decoding speed of the default model, everything that can be compared in one interleaved run; the last line is JSON.

    python benchmarks/decoding.py --prompts mt-bench --data-dir DIR --limit 10 --output result.json

Arms: ``model.generate`` (bf16) with its prompt lookup and its early exit; our plain loop and drafters on dense bf16
weights and on the weights as they are stored by default (in 4 bits, exactly the same values); and, where they can be
imported, economize and flashspec (their prompt lookup, which needs no training) and llama.cpp on the model's own GGUF
file (llama-cpp-python). What cannot be imported or fails is named with its reason. Every arm answers the first turn of
every prompt, greedily, in an order that rotates. Beside each: milliseconds per token (median over prompts, whole
calls), speed against model.generate and against plain decoding with the same weights (medians of ratios, prompt by
prompt), outputs equal to plain decoding's, and for the plain loops the roofline: weights read once per token at the
measured read bandwidth, and the fraction reached.
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
from runtime import read_bandwidth

from specdec import SpecDecoder, embedded, hub
from specdec.bench.environment import environment
from specdec.bench.prompts import load_prompts, spread
from specdec.text import encode

Arm = Callable[[list[int], int], list[int]]  # prompt and number of new tokens -> new tokens
WARM_UP = 24  # tokens
OURS = ("none", "m2r2", "prompt-lookup", "prompt-lookup+m2r2")


def generate(model: Any, **options: Any) -> Arm:
    def run(ids: list[int], count: int) -> list[int]:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        out = model.generate(
            given, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=2, **options
        )
        return out[0, len(ids) :].tolist()

    return run


def ours(decoder: SpecDecoder) -> Arm:
    return lambda ids, count: decoder.generate(ids, max_new_tokens=count).token_ids


def economize_lookup(load: Callable[[], Any], folder: Path) -> Arm:
    import economize
    from economize.techniques.lookup import LookupConfig

    model = economize.apply(load(), LookupConfig())
    return lambda ids, count: model.generate(torch.tensor([ids]), max_new_tokens=count)[0, len(ids) :].tolist()


def flashspec_lookup(load: Callable[[], Any], folder: Path) -> Arm:
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import NgramDrafter, TargetModel

    model = load()
    target = TargetModel(str(folder), torch.device("cpu"), torch.bfloat16, model=model)
    greedy = SamplingConfig(temperature=0.0)
    config = FlashSpecConfig(device="cpu", drafter_strategy="bandit", bandit=BanditConfig(n_arms=1), sampling=greedy)
    engine = SpeculativeEngine(config, [NgramDrafter()], target)
    eos = [model.generation_config.eos_token_id]
    return lambda ids, count: (
        engine.generate(torch.tensor([ids]), max_new_tokens=count, eos_token_ids=eos).output_ids[0].tolist()
    )


def llama_cpp(load: Callable[[], Any], folder: Path) -> Arm:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    llm = Llama(str(folder / embedded.GGUF), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(ids: list[int], count: int) -> list[int]:
        out: list[int] = []
        for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
            out.append(token)
            if len(out) == count or token == llm.token_eos():
                return out
        return out

    return run


PEERS: dict[str, Callable[[Callable[[], Any], Path], Arm]] = {
    "economize lookup": economize_lookup,
    "flashspec lookup": flashspec_lookup,
    "llama.cpp": llama_cpp,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--without", default="", help="arms to leave out, with commas between")
    parser.add_argument("--output", type=Path, default=None, help="a file for the last line")
    args = parser.parse_args()
    folder, console = embedded.prepared(embedded.DEFAULT_MODEL), Console()

    def load() -> Any:
        return hub.load(embedded.DEFAULT_MODEL)[0]

    plain = {kind: SpecDecoder.from_pretrained(drafter="none", weights=kind) for kind in ("dense", "auto")}
    model = plain["auto"].model
    arms: dict[str, Arm] = {
        "generate": generate(model),
        "generate lookup": generate(model, prompt_lookup_num_tokens=10),
        "generate early exit": generate(model, assistant_early_exit=10),
    }
    for kind, decoder in plain.items():
        for name in OURS:
            arms[f"{name} {kind}"] = ours(decoder if name == "none" else decoder.with_drafter(name))
    missing: dict[str, str] = {}
    without = [name.strip() for name in args.without.split(",")]
    for name, make in PEERS.items():
        try:
            if name not in without:
                arms[name] = make(load, folder)
        except Exception as error:  # a peer that does not run here is a finding, not a failure of ours
            missing[name] = f"{type(error).__name__}: {embedded.one_line(error)}"
    arms = {name: arm for name, arm in arms.items() if name not in without}
    tokenizer = plain["auto"].tokenizer
    conversations = spread(load_prompts(args.prompts, args.data_dir).conversations, args.limit)
    prompts = [encode(tokenizer, c.turns[0]) for c in conversations]
    for name in list(arms):
        try:
            for _ in range(2):
                arms[name](prompts[0][-64:], WARM_UP)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {embedded.one_line(error)}"
            del arms[name]
    bandwidth = read_bandwidth()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    tokens: dict[str, list[list[int]]] = {name: [] for name in arms}
    for number, ids in enumerate(track(prompts, "decoding", console=Console(stderr=True))):
        order = list(arms)
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            start = time.perf_counter()
            out = arms[name](ids, args.max_new_tokens)
            seconds[name].append((time.perf_counter() - start) / max(len(out), 1))
            tokens[name].append(out)

    def ratio(name: str, base: str) -> float | None:
        if base not in seconds:
            return None
        return round(statistics.median(b / a for a, b in zip(seconds[name], seconds[base], strict=True)), 3)

    rows: list[dict[str, Any]] = []
    for name in arms:
        kind = name.rpartition(" ")[2]
        own = f"none {kind}" if kind in plain else "none auto"
        row: dict[str, Any] = {
            "arm": name,
            "ms_per_token": round(1e3 * statistics.median(seconds[name]), 2),
            "x_generate": ratio(name, "generate"),
            "x_plain": ratio(name, own),
            "equal": sum(a == b for a, b in zip(tokens[name], tokens.get("none auto", []), strict=False)),
        }
        if name in ("none dense", "none auto"):
            read = plain[kind].target.bytes_read  # type: ignore[attr-defined]
            row |= {"mb_per_token": round(read / 1e6, 1), "roofline_ms": round(1e3 * read / bandwidth, 2)}
            row["roofline_reached"] = round(row["roofline_ms"] / row["ms_per_token"], 3)
        rows.append(row)
    table = Table(title=f"{len(prompts)} first turns of {args.prompts}; {bandwidth / 1e9:.1f} GB/s read")
    for column in ("arm", "ms/token", "x generate", "x plain", "equal", "roofline"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        limit = f"{row['roofline_ms']} ms, {row['roofline_reached']:.0%}" if "roofline_ms" in row else ""
        cells = (row["ms_per_token"], row["x_generate"], row["x_plain"], f"{row['equal']}/{len(prompts)}", limit)
        table.add_row(row["arm"], *map(str, cells))
    console.print(table)
    for name, why in missing.items():
        console.print(f"{name} did not run: {why}", markup=False)
    result = {"rows": rows, "missing": missing, "gb_per_s": round(bandwidth / 1e9, 1), "environment": environment()}
    line = json.dumps(result | {"prompts": args.prompts, "limit": args.limit})
    if args.output:
        args.output.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
