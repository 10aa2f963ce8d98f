"""Decoding speed of the default model, everything that can be compared in interleaved runs; the last line is JSON.

    python benchmarks/decoding.py --data-dir DIR --limit 10 --output result.jsonl --seconds 100
    python benchmarks/decoding.py ... --arms "generate,none auto,prompt-lookup+m2r2 auto,economize lookup,llama.cpp"

Arms: ``model.generate`` (bf16) with its prompt lookup and its early exit; our plain loop and drafters on dense bf16
weights, on the weights as they are stored by default ("auto": in 4 bits, exactly the same values) and on int8 and int4
ones; and, where they are installed, economize and flashspec (their prompt lookup, which needs no training) and
llama.cpp on the model's own GGUF file (``engines.py``). What is not there or fails is named with its reason.

Every arm answers the first turn of every prompt, greedily, in an order that rotates; what was measured is added to the
output file, which a later call completes (``--seconds``) and sums up as a whole. Beside each arm: milliseconds per
token (median over prompts, whole calls), speed against model.generate and against plain decoding with the same weights
(medians of ratios, each prompt within one process), for ours without the prompt's prefill, too; outputs equal to plain
decoding's; and the roofline: bytes of the model's layers and head that were read per token (passes counted; what
drafters read of their own is not), and the fraction reached of the measured read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from runtime import read_bandwidth

from specdec import SpecDecoder
from specdec.api.text import encode
from specdec.bench.environment import environment
from specdec.bench.prompts import load_prompts, spread
from specdec.models import catalogue, loading
from specdec.models.blocks import densify

Arm = Callable[[list[int], int], list[int]]  # prompt and number of new tokens -> new tokens
WARM_UP = 12  # tokens
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


def economize_lookup(load: Callable[[], Any], folder: Path) -> Arm:
    import economize
    from economize.techniques.lookup import LookupConfig

    model = economize.apply(load(), LookupConfig())
    eos = model.generation_config.eos_token_id  # its generate() trips over transformers' renamed cache argument
    return lambda ids, count: model.decode(torch.tensor(ids), count, stop=eos).tokens.tolist()


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


def llama_cpp(folder: Path, peer: Path | None) -> Arm:
    engine = engines.llama_cpp(peer)
    path, threads = str(folder / catalogue.GGUF), torch.get_num_threads()
    engine.ask("load", path=path, threads=threads, context=engines.CONTEXT)
    return lambda ids, count: engine.ask("generate", ids=ids, count=count, stop=True)["tokens"]


PEERS: dict[str, Callable[[Callable[[], Any], Path], Arm]] = {
    "economize lookup": economize_lookup,
    "flashspec lookup": flashspec_lookup,
}
LLAMA = "llama.cpp"
HF: dict[str, dict[str, Any]] = {
    "generate": {},
    "generate lookup": {"prompt_lookup_num_tokens": 10},
    "generate early exit": {"assistant_early_exit": 10},
}
ARMS = (*HF, *(f"{name} {kind}" for kind in ("dense", "auto", "int8", "int4") for name in OURS), *PEERS, LLAMA)
USUAL = "generate,generate lookup,none dense,m2r2 dense,none auto,m2r2 auto,prompt-lookup+m2r2 auto"


class Reads:
    """Bytes of the model's layers and head that are read, counted as its modules run."""

    def __init__(self, model: Any) -> None:
        self.bytes = 0
        for module in (*model.model.layers, model.lm_head):
            size = sum(p.nbytes for p in module.parameters())
            module.register_forward_hook(lambda *_, size=size: self.add(size))

    def add(self, size: int) -> None:
        self.bytes += size


class Bench:
    """The arms, made at first use: an arm that fails is a finding, and named with its reason."""

    def __init__(self, peer: Path | None) -> None:
        self.peer = peer
        self.folder, self.name = catalogue.prepared(catalogue.DEFAULT_MODEL), catalogue.DEFAULT_MODEL
        self.decoders: dict[str, SpecDecoder] = {}
        self.reads: dict[str, Reads] = {}
        self.prefill: dict[str, float] = {}  # seconds, of the last call of ours
        self.model: Any = None

    def make(self, arm: str) -> Arm:
        if arm in HF:
            if self.model is None:
                self.model = loading.load(self.name)[0]
                densify(self.model)
                self.reads |= dict.fromkeys(HF, Reads(self.model))
            return generate(self.model, **HF[arm])
        if arm in PEERS:
            return PEERS[arm](lambda: self._counted(arm), self.folder)
        if arm == LLAMA:
            return llama_cpp(self.folder, self.peer)
        drafter, _, kind = arm.rpartition(" ")
        if kind not in self.decoders:  # a model of its own: "int4" rounds it
            self.decoders[kind] = SpecDecoder.from_pretrained(self.name, drafter="none", weights=kind, device="cpu")
        return self._ours(arm, self.decoders[kind].with_drafter(drafter))

    def _counted(self, arm: str) -> Any:
        model = loading.load(self.name)[0]
        densify(model)
        self.reads[arm] = Reads(model)
        return model

    def _ours(self, arm: str, decoder: SpecDecoder) -> Arm:
        target: Any = decoder.target
        reads = self.reads[arm] = Reads.__new__(Reads)
        reads.bytes = 0

        def run(ids: list[int], count: int) -> list[int]:
            out = decoder.generate(ids, max_new_tokens=count)
            reads.add(target.bytes_read * (1 + out.metrics.num_spec_steps))  # the prefill is one pass, too
            self.prefill[arm] = out.metrics.prefill_seconds
            return out.token_ids

        return run


def measure(args: argparse.Namespace, console: Console) -> dict[str, str]:
    """Run what is not in ``args.output`` yet, prompt by prompt, until the time is up; return why arms did not run."""
    begin, bench = time.perf_counter(), Bench(args.peer)
    conversations = spread(load_prompts(args.prompts, args.data_dir).conversations, args.limit)
    tokenizer = loading.load(catalogue.DEFAULT_MODEL)[1]
    prompts = [encode(tokenizer, c.turns[0]) for c in conversations]
    names = [name.strip() for name in args.arms.split(",")]
    if unknown := [name for name in names if name not in ARMS]:
        sys.exit(f"unknown arms: {', '.join(unknown)}; there are: {', '.join(ARMS)}")
    done = {row["prompt"] for row in rows_of(args) if row["arms"] == names}
    arms, missing = dict[str, Arm](), dict[str, str]()
    for name in names:
        try:
            arms[name] = bench.make(name)
            arms[name](prompts[0][-64:], WARM_UP)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {catalogue.one_line(error)}"
            arms.pop(name, None)
    bandwidth, threads, took = read_bandwidth(), torch.get_num_threads(), 0.0
    for number, ids in enumerate(track(prompts, "decoding", console=Console(stderr=True))):
        late = time.perf_counter() - begin + 1.2 * took > args.seconds
        if number in done or late:
            continue
        order, start = list(arms), time.perf_counter()
        shift, runs = number % len(order), {}
        for name in order[shift:] + order[:shift]:
            reads = bench.reads.get(name)
            before, clock = reads.bytes if reads else 0, time.perf_counter()
            out = arms[name](ids, args.max_new_tokens)
            seconds = time.perf_counter() - clock
            read, prefill = reads.bytes - before if reads else None, bench.prefill.get(name, 0.0)
            runs[name] = {"seconds": seconds, "prefill": prefill, "tokens": out, "read": read}
        took = max(took, time.perf_counter() - start)
        row = {"prompt": number, "arms": names, "threads": threads, "bandwidth": bandwidth, "runs": runs}
        with args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return missing


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per arm. Ratios are medians over prompts, each within one run of one process."""

    def per_token(run: dict[str, Any], without: str = "") -> float:
        return float(run["seconds"] - run.get(without, 0.0)) / max(len(run["tokens"]), 1)

    def ratio(name: str, base: str, without: str = "") -> float | None:
        both = [row["runs"] for row in rows if name in row["runs"] and base in row["runs"]]
        ratios = [per_token(r[base], without) / per_token(r[name], without) for r in both]
        return round(statistics.median(ratios), 3) if ratios else None

    lines = []
    for name in ARMS:
        runs = [(row["runs"][name], row) for row in rows if name in row["runs"]]
        if not runs:
            continue
        ours = name.rpartition(" ")[0] in OURS
        kind = name.rpartition(" ")[2] if ours else "auto"
        plain = [(run, row["runs"][f"none {kind}"]) for run, row in runs if f"none {kind}" in row["runs"]]
        line: dict[str, Any] = {
            "arm": name,
            "prompts": len(runs),
            "ms_per_token": round(1e3 * statistics.median(per_token(run) for run, _ in runs), 2),
            "x_generate": ratio(name, "generate"),
            "x_plain": ratio(name, f"none {kind}"),
            "x_plain_decoding": ratio(name, f"none {kind}", "prefill") if ours else None,
            "equal": f"{sum(a['tokens'] == b['tokens'] for a, b in plain)}/{len(plain)}",
        }
        counted = [(run, row) for run, row in runs if run["read"]]
        if counted:
            line["mb_per_token"] = round(statistics.median(r["read"] / len(r["tokens"]) for r, _ in counted) / 1e6, 1)
            shares = (run["read"] / row["bandwidth"] / run["seconds"] for run, row in counted)
            line["roofline_reached"] = round(statistics.median(shares), 3)
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--arms", default=USUAL, help=f"with commas between; there are: {', '.join(ARMS)}")
    parser.add_argument("--peer", type=Path, help="a folder with node-llama-cpp, for llama.cpp")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no prompt that would end later")
    parser.add_argument("--output", type=Path, required=True, help="what is measured is added to this file")
    args = parser.parse_args()
    console = Console()
    missing = measure(args, console)
    rows = rows_of(args)
    if not rows:
        sys.exit("nothing was measured: give it more --seconds")
    lines = summary(rows)
    gigabytes = statistics.median(row["bandwidth"] for row in rows) / 1e9
    table = Table(title=f"first turns of {args.prompts}; {gigabytes:.1f} GB/s read, {rows[0]['threads']} threads")
    for column in (
        "arm",
        "prompts",
        "ms/token",
        "x generate",
        "x plain",
        "decoding",
        "equal",
        "MB/token",
        "of roofline",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for line in lines:
        reached = f"{line['roofline_reached']:.0%}" if "roofline_reached" in line else ""
        cells = [line[key] for key in ("prompts", "ms_per_token", "x_generate", "x_plain", "x_plain_decoding", "equal")]
        table.add_row(line["arm"], *("" if c is None else str(c) for c in (*cells, line.get("mb_per_token"))), reached)
    console.print(table)
    for name, why in missing.items():
        console.print(f"{name} did not run: {why}", markup=False)
    print(
        json.dumps(
            {"rows": lines, "missing": missing, "gb_per_s": round(gigabytes, 1), "prompts": args.prompts}
            | {"environment": environment()}
        )
    )


if __name__ == "__main__":
    main()
