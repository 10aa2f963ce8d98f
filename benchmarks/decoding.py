"""Decoding speed of a GGUF model, everything that can be compared in interleaved runs; the last line is JSON.

    python benchmarks/decoding.py --data-dir DIR --limit 10 --output result.jsonl --seconds 100
    python benchmarks/decoding.py ... --arms "generate,none auto,prompt-lookup+m2r2 auto,economize lookup,llama.cpp"
    python benchmarks/decoding.py ... --model 1.5B.gguf --draft 0.5B.gguf --arms "none auto,m2r2 auto,m2r2@4 auto"

Arms: ``model.generate`` (bf16) with its prompt lookup and its early exit; our plain loop (``none``) and any drafter,
as ``DRAFTER KIND`` or, at a fixed depth K, ``DRAFTER@K KIND``, on dense bf16 weights, on the weights as they are stored
by default ("auto": in the file's own bits, exactly the same values) and on int8 and int4 ones; and, where they are
installed, economize and flashspec (their prompt lookup, which needs no training) and llama.cpp on the same file
(``engines.py``), alone and with a draft model ("llama.cpp draft", "draft-model auto": that of ``--draft``). What is not
there or fails is named with its reason.

Every arm answers the first turn of every prompt, greedily, in an order that rotates; what was measured is added to the
output file, which a later call completes (``--seconds``) and sums up as a whole. Beside each arm: milliseconds per
token (median over prompts, whole calls), speed against model.generate, llama.cpp and plain decoding with the same
weights (medians of ratios, each prompt within one process; 95 % intervals are in the JSON), for ours without the
prompt's prefill, too; tokens a step, pooled over steps and as the mean over prompts; outputs equal to plain decoding's;
and the roofline: bytes of the model's layers and head that were read per token (passes counted; what drafters read of
their own is not), and the fraction reached of the measured read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import engines
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from runtime import read_bandwidth

from specdec import SpecDecoder
from specdec.api.text import encode
from specdec.bench import stats
from specdec.bench.environment import environment
from specdec.bench.prompts import load_prompts, spread
from specdec.engine.metrics import RequestMetrics
from specdec.models import catalogue, loading
from specdec.models.blocks import densify

Arm = Callable[[list[int], int], list[int]]  # prompt and number of new tokens -> new tokens
WARM_UP = 12  # tokens
KINDS = ("dense", "auto", "int8", "int4")


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


def llama_cpp(path: Path, peer: Path | None, draft: Path | None = None) -> Arm:
    engine = engines.llama_cpp(peer)
    given = {"path": str(path), "threads": torch.get_num_threads(), "context": engines.CONTEXT}
    engine.ask("load", **given, **({} if draft is None else {"draft": str(draft)}))
    return lambda ids, count: engine.ask("generate", ids=ids, count=count, stop=True)["tokens"]


PEERS: dict[str, Callable[[Callable[[], Any], Path], Arm]] = {
    "economize lookup": economize_lookup,
    "flashspec lookup": flashspec_lookup,
}
LLAMA, LLAMA_DRAFT = "llama.cpp", "llama.cpp draft"
HF: dict[str, dict[str, Any]] = {
    "generate": {},
    "generate lookup": {"prompt_lookup_num_tokens": 10},
    "generate early exit": {"assistant_early_exit": 10},
}
OTHERS = (*HF, *PEERS, LLAMA, LLAMA_DRAFT)
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

    def __init__(self, name: str, peer: Path | None, draft: Path | None) -> None:
        self.name, self.peer, self.draft = name, peer, draft
        self.decoders: dict[str, SpecDecoder] = {}
        self.reads: dict[str, Reads] = {}
        self.last: dict[str, RequestMetrics] = {}  # of the last call of each arm of ours
        self.model: Any = None

    def make(self, arm: str) -> Arm:
        if arm in HF:
            if self.model is None:
                self.model = loading.load(self.name)[0]
                densify(self.model)
                self.reads |= dict.fromkeys(HF, Reads(self.model))
            return generate(self.model, **HF[arm])
        if arm in PEERS:
            return PEERS[arm](lambda: self._counted(arm), catalogue.prepared(self.name))
        if arm in (LLAMA, LLAMA_DRAFT):
            file = Path(self.name) if Path(self.name).is_file() else catalogue.prepared(self.name) / catalogue.GGUF
            return llama_cpp(file, self.peer, self.draft if arm == LLAMA_DRAFT else None)
        method, _, kind = arm.rpartition(" ")
        drafter, _, depth = method.partition("@")
        if drafter.endswith("draft-model") and self.draft is not None:
            drafter = f"{drafter}={self.draft}"
        if kind not in self.decoders:  # a model of its own: "int4" rounds it
            self.decoders[kind] = SpecDecoder.from_pretrained(self.name, drafter="none", weights=kind, device="cpu")
        return self._ours(arm, self.decoders[kind].with_drafter(drafter), int(depth) if depth else "auto")

    def _counted(self, arm: str) -> Any:
        model = loading.load(self.name)[0]
        densify(model)
        self.reads[arm] = Reads(model)
        return model

    def _ours(self, arm: str, decoder: SpecDecoder, depth: int | Literal["auto"]) -> Arm:
        target: Any = decoder.target
        reads = self.reads[arm] = Reads.__new__(Reads)
        reads.bytes = 0

        def run(ids: list[int], count: int) -> list[int]:
            out = decoder.generate(ids, max_new_tokens=count, num_speculative_tokens=depth)
            reads.add(target.bytes_read * (1 + out.metrics.num_spec_steps))  # the prefill is one pass, too
            self.last[arm] = out.metrics
            return out.token_ids

        return run


def measure(args: argparse.Namespace, console: Console) -> dict[str, str]:
    """Run what is not in ``args.output`` yet, prompt by prompt, until the time is up; return why arms did not run."""
    begin, bench = time.perf_counter(), Bench(args.model, args.peer, args.draft)
    conversations = spread(load_prompts(args.prompts, args.data_dir).conversations, args.limit)
    tokenizer = loading.load(args.model)[1]
    prompts = [encode(tokenizer, c.turns[0]) for c in conversations]
    names = [name.strip() for name in args.arms.split(",")]
    if unknown := [name for name in names if name not in OTHERS and name.rpartition(" ")[2] not in KINDS]:
        sys.exit(f"unknown arms: {', '.join(unknown)}; there are: {', '.join(OTHERS)}, and 'DRAFTER KIND'")
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
            runs[name] = {"seconds": seconds, "tokens": out, "read": reads.bytes - before if reads else None}
            if name in bench.last:
                last = bench.last[name]
                runs[name] |= {"prefill": last.prefill_seconds, "spent": last.ledger}
                runs[name] |= {"steps": last.num_spec_steps, "accepted": last.num_accepted_draft_tokens}
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

    def ratios(name: str, base: str, without: str = "") -> stats.Estimate | None:
        both = [(n, row["runs"]) for n, row in enumerate(rows) if name in row["runs"] and base in row["runs"]]
        values = [per_token(r[base], without) / per_token(r[name], without) for _, r in both]
        return stats.median(values, [n for n, _ in both])

    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["runs"]):
        runs = [(row["runs"][name], row) for row in rows if name in row["runs"]]
        ours = name not in OTHERS
        kind = name.rpartition(" ")[2] if ours else "auto"
        plain = [(run, row["runs"][f"none {kind}"]) for run, row in runs if f"none {kind}" in row["runs"]]
        line: dict[str, Any] = {
            "arm": name,
            "prompts": len(runs),
            "ms_per_token": 1e3 * statistics.median(per_token(run) for run, _ in runs),
            "x_generate": ratios(name, "generate"),
            "x_llama": ratios(name, LLAMA),
            "x_llama_draft": ratios(name, LLAMA_DRAFT),
            "x_plain": ratios(name, f"none {kind}"),
            "x_plain_decoding": ratios(name, f"none {kind}", "prefill") if ours else None,
            "equal": f"{sum(a['tokens'] == b['tokens'] for a, b in plain)}/{len(plain)}",
        }
        stepped = [run for run, _ in runs if run.get("steps")]
        if stepped:
            steps = sum(run["steps"] for run in stepped)
            line["tokens_a_step"] = 1 + sum(run["accepted"] for run in stepped) / steps
            line["tokens_a_step_mean"] = 1 + statistics.fmean(run["accepted"] / run["steps"] for run in stepped)
            line["spent"] = {
                phase: sum(run["spent"][phase] for run in stepped) / steps for phase in stepped[0]["spent"]
            }  # seconds a step
        counted = [(run, row) for run, row in runs if run["read"]]
        if counted:
            line["mb_per_token"] = statistics.median(r["read"] / len(r["tokens"]) for r, _ in counted) / 1e6
            line["roofline"] = statistics.median(r["read"] / row["bandwidth"] / r["seconds"] for r, row in counted)
        lines.append(line)
    return lines


COLUMNS = {  # of the table: key of a line, and its format
    "prompts": ("prompts", "d"),
    "ms/token": ("ms_per_token", ".2f"),
    "x generate": ("x_generate", ".2f"),
    "x llama.cpp": ("x_llama", ".2f"),
    "with draft": ("x_llama_draft", ".2f"),
    "x plain": ("x_plain", ".2f"),
    "decoding": ("x_plain_decoding", ".2f"),
    "tokens/step": ("tokens_a_step", ".2f"),
    "mean": ("tokens_a_step_mean", ".2f"),
    "equal": ("equal", "s"),
    "MB/token": ("mb_per_token", ".1f"),
    "of roofline": ("roofline", ".0%"),
}


def shown(value: Any, form: str) -> str:
    if isinstance(value, dict):
        value = value["value"]
    return "" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=catalogue.DEFAULT_MODEL, help="a name, or a GGUF file")
    parser.add_argument("--draft", type=Path, help="the draft model's GGUF file, for draft-model and llama.cpp draft")
    parser.add_argument("--prompts", default="mt-bench")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--arms", default=USUAL, help=f"with commas between: {', '.join(OTHERS)}, DRAFTER[@K] KIND")
    parser.add_argument("--peer", type=Path, help="a folder with node-llama-cpp, for llama.cpp")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no prompt that would end later")
    parser.add_argument("--output", type=Path, required=True, help="what is measured is added to this file")
    args = parser.parse_args()
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    missing = measure(args, console)
    rows = rows_of(args)
    if not rows:
        sys.exit("nothing was measured: give it more --seconds")
    lines = summary(rows)
    gigabytes = statistics.median(row["bandwidth"] for row in rows) / 1e9
    table = Table(title=f"first turns of {args.prompts}; {gigabytes:.1f} GB/s read, {rows[0]['threads']} threads")
    used = {title: known for title, known in COLUMNS.items() if any(line.get(known[0]) for line in lines)}
    for column in ("arm", *used):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for line in lines:
        table.add_row(line["arm"], *(shown(line.get(key), form) for key, form in used.values()))
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
