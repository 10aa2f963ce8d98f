"""Expert loading compared: methods at one byte budget, interleaved prompt by prompt; tables, a plot, JSON.

    specdec pack-experts MODEL DIR --fit answers.jsonl.gz
    python benchmarks/experts.py --model MODEL --folder DIR --answers answers.jsonl.gz --json out.json
    python benchmarks/experts.py ... --json out.json --ratios "" --sizes 0.25,0.375,0.5,0.75 --plot out.png

Slow memory is emulated (a declared bandwidth, one transfer at a time); its speed is the ratio of loading what a token
needs of a layer (k experts) to computing that layer; computing is timed with all experts resident, for each prompt
anew, as machines slow down and recover. Every method must give the same tokens, and an offline replay of its demands
and prefetches must arrive at the store's own counters, or the script fails. ``in time`` is the share of demanded
experts that were ready when demanded. Speeds are compared prompt by prompt, methods taking turns in order, and given as
medians. Prefetching is on throughout, but for the method ``controlled``: m2r2 with the controller that users get.
Results are added to those in the JSON file, so that several short runs make one table and one plot.

One thread computes and one loads, so that two cores do both at once, as an accelerator and its copy engine would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from expert_study import MACHINES, OLMOE, EmulatedTier, Oracle, Shuffled, StudyStore, replay, seconds_per_token
from rich.console import Console
from rich.table import Table

from specdec import SpecDecoder
from specdec.models import loading
from specdec.runtimes.experts import predict
from specdec.runtimes.experts.cache import Counters
from specdec.runtimes.experts.control import Controller
from specdec.runtimes.experts.offload import ExpertOptions, Offload
from specdec.train.data import Answer, read

HELD_OUT = 32  # every so many rows are prompts: those that neither moefy.py nor pack-experts --fit learns from
FAST = 1e12  # bytes/s
MAIN = ("on-demand", "lru", "previous-token", "residual", "m2r2", "oracle", "shuffled")


Figures = dict[str, Any]  # of a method


def faster(one: Figures, other: Figures) -> float:
    """How many times as fast ``one`` was as ``other``: the median over the prompts, of which each ran both in turn."""
    return statistics.median(theirs / own for own, theirs in zip(one["ms"], other["ms"], strict=True))


class Method:
    """One way to hold the experts: a store, a predictor and a controller, put under the model for one request."""

    controller: Controller

    def __init__(self, name: str, owner: Offload, share: float, predictor: Any) -> None:
        self.name, self.predictor = name, predictor
        self.demand = owner.top_k * owner.index.stride  # bytes that a token needs of a layer
        tier = EmulatedTier(owner.folder, owner.index, FAST)
        self.tier, self.runs = tier, list[dict[str, Any]]()
        size = 1.0 if name == "resident" else share
        self.store = StudyStore(owner.index, tier, size, owner.top_k, caching=name != "on-demand")

    def run(self, decoder: SpecDecoder, prompt: list[int], tokens: int, bandwidth: float) -> list[int]:
        owner = decoder.target.experts
        assert owner is not None
        self.tier.bandwidth = bandwidth
        owner.store, owner.predictor, owner.controller = self.store, self.predictor, self.controller
        out = decoder.generate(prompt, max_new_tokens=tokens, ignore_eos=True)
        m = out.metrics
        self.runs.append(m.experts | {"ms_per_token": 1e3 * m.decode_seconds / (m.num_new_tokens - 1)})
        return out.token_ids

    def figures(self) -> Figures:
        """Means over the prompts, the median of ms_per_token, and ms, each prompt's."""
        found: Figures = {name: statistics.mean(run[name] for run in self.runs) for name in self.runs[0]}
        ms = [run["ms_per_token"] for run in self.runs]
        return found | {"ms": ms, "ms_per_token": statistics.median(ms)}

    def check(self) -> None:
        """The engine's counters against a replay of all it was asked for."""
        if not self.store.caching:
            return
        while not self.store.idle:  # what was predicted last is still being loaded
            time.sleep(0.001)
        same, own = replay(self.store.trace, len(self.store.caches[0].slots)), self.store.counters
        ours = (own.demanded, own.hits, own.prefetched, own.evictions, own.unused)
        assert (same.demanded, same.hits, same.prefetched, same.evictions, same.unused) == ours, self.name


def make(owner: Offload, share: float, names: list[str], args: argparse.Namespace, oracle: Oracle) -> list[Method]:
    rows, experts = len(owner.layers), owner.index.num_experts
    fitted = lambda: predict.read_predictor(args.folder, owner.fingerprint, experts, owner.index.hidden)  # noqa: E731
    made = {
        "previous-token": lambda: predict.PreviousToken(rows, experts),
        "residual": lambda: predict.residual(owner.layers),
        "m2r2": fitted,
        "controlled": fitted,
        "oracle": lambda: oracle,
        "shuffled": lambda: Shuffled(fitted(), rows, experts),
    }
    return [Method(name, owner, share, made.get(name, lambda: None)()) for name in names]


def compare(
    decoder: SpecDecoder,
    resident: Method,
    methods: list[Method],
    prompts: list[list[int]],
    tokens: int,
    ratio: float = 0.0,
) -> None:
    """Run all methods over all prompts; ratio: of loading what a layer demands to computing it."""
    for method in (resident, *methods):
        method.runs.clear()
        method.controller = Controller(adaptive=method.name == "controlled")
    for number, prompt in enumerate(prompts):
        first = resident.run(decoder, prompt, tokens, FAST)
        layer = resident.runs[-1]["ms_per_token"] / 1e3 / len(resident.store.caches)
        bandwidth = resident.demand / (ratio * layer) if ratio else FAST
        at = number % len(methods)
        for method in (*methods[at:], *methods[:at]):  # each takes every place
            assert method.run(decoder, prompt, tokens, bandwidth) == first, f"{method.name} changed the tokens"
    for method in methods:
        method.check()


def show(console: Console, title: str, methods: list[Method]) -> dict[str, Figures]:
    found = {method.name: method.figures() for method in methods}
    slow, best = found.get("on-demand"), found.get("oracle")
    table = Table(title=title)
    for column in (
        "method",
        "ms/token",
        "x on demand",
        "of oracle",
        "hits",
        "in time",
        "stall ms",
        "MB/token",
        "unused",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, f in found.items():
        table.add_row(
            name,
            f"{f['ms_per_token']:.1f}",
            f"{faster(f, slow):.2f}" if slow else "",
            f"{faster(f, best):.0%}" if best else "",
            f"{f['hit_rate']:.1%}",
            f"{f['in_time_rate']:.1%}",
            f"{f['stall_ms_per_token']:.1f}",
            f"{f['bytes_per_token'] / 1e6:.2f}",
            f"{f['prefetch_unused'] / max(f['prefetched'], 1):.0%}",
        )
    console.print(table)
    return found


def project(console: Console, found: dict[str, Figures]) -> None:
    """What the transfers measured here would cost a model of OLMoE's size."""
    table = Table(title="OLMoE's size (16 x 64 experts of 12 MiB, top-8), computed from the transfers above: tokens/s")
    for column in ("method", *(machine.name for machine in MACHINES)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, f in found.items():
        if name in MAIN:
            prefetched, missed = f["prefetched"] / f["demanded"], 1 - f["hit_rate"]
            rates = [1 / seconds_per_token(OLMOE, machine, missed, prefetched) for machine in MACHINES]
            table.add_row(name, *(f"{rate:.1f}" for rate in rates))
    console.print(table)


def summary(console: Console, ratios: dict[str, dict[str, Figures]]) -> None:
    """Speed against loading on demand at every ratio measured so far, and what of m2r2's is whose."""
    order = sorted(ratios, key=float)
    table = Table(title="x on demand, by load/compute")
    for column in ("method", *order):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in next(iter(ratios.values())):
        table.add_row(name, *(f"{faster(ratios[r][name], ratios[r]['on-demand']):.2f}" for r in order))
    for what, better, worse in (("m2r2: by the cache", "lru", "on-demand"), ("m2r2: by loading ahead", "m2r2", "lru")):
        table.add_row(what, *(f"x {faster(ratios[r][better], ratios[r][worse]):.2f}" for r in order))
    for name in ("m2r2", "controlled"):
        table.add_row(f"{name} of oracle", *(f"{faster(ratios[r][name], ratios[r]['oracle']):.0%}" for r in order))
    table.add_row("m2r2 in time", *(f"{ratios[r]['m2r2']['in_time_rate']:.1%}" for r in order))
    console.print(table)


def kept(path: Path | None) -> dict[str, Any]:
    result = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    return {"ratios": {}, "sizes": {}} | result


def keep(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, default=str, indent=1) + "\n")


STYLES = ("o-", "s--", "^:", "D-", "v-.", "x:")  # distinct in grey, too


def plot(path: Path, by_size: dict[str, dict[str, Figures]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes = sorted(by_size, key=float)
    across = [100 * float(s) for s in sizes]
    for name, style in zip(MAIN[1:], STYLES, strict=True):
        label = {"lru": "LRU alone"}.get(name, f"LRU + {name}")
        width = 2.5 if name == "m2r2" else 1.2
        axes[0].plot(across, [100 * by_size[s][name]["in_time_rate"] for s in sizes], style, lw=width, label=label)
        axes[1].plot(across, [1e3 / by_size[s][name]["ms_per_token"] for s in sizes], style, lw=width, label=label)
    for axis, label in zip(axes, ("experts there in time, %", "tokens/s"), strict=True):
        axis.set(xlabel="cache, % of all experts", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of specdec pack-experts --fit")
    parser.add_argument("--answers", type=Path, required=True, help="JSON lines with prompt_ids and response_ids")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--cache", type=float, default=0.25)
    parser.add_argument("--ratios", default="0.25,0.5,1,2,4")
    parser.add_argument("--sizes", default="", help="cache sizes for the plot, such as 0.25,0.5,0.75; at ratio 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a run that is cut short has shown what it had
    model, tokenizer = loading.load(args.model)
    options = ExpertOptions(1.0, "m2r2", args.folder)
    decoder = SpecDecoder(model, tokenizer, "none", experts=options)
    owner = decoder.target.experts
    assert owner is not None
    first = owner.store
    rows = [row for row in read([args.answers]) if isinstance(row, Answer)]
    prompts = [list(row.prompt_ids[-64:]) for row in rows[::HELD_OUT]][: args.prompts]
    oracle, console = Oracle(owner.index.num_experts), Console(width=120)
    result = kept(args.json) | {"settings": vars(args)}

    resident, teacher = make(owner, 1.0, ["resident", "oracle"], args, oracle)
    for _ in range(2):  # the first fills the cache
        compare(decoder, resident, [teacher], prompts, args.tokens)
    result["layer_ms"] = layer = resident.figures()["ms_per_token"] / len(owner.layers)
    console.print(
        f"computing: {layer:.3f} ms a layer, all experts resident; a token needs {resident.demand / 1e6:.2f} MB of it"
    )
    teacher.store.close()

    methods = make(owner, args.cache, [*MAIN, "controlled"], args, oracle)
    for ratio in map(float, filter(None, args.ratios.split(","))):
        compare(decoder, resident, methods, prompts, args.tokens, ratio)
        title = f"cache {args.cache:.0%}, load/compute {ratio:g}"
        result["ratios"][f"{ratio:g}"] = found = show(console, title, [resident, *methods])
        if ratio == 1:
            result["sizes"][f"{args.cache:g}"] = found
            project(console, found)
        keep(args.json, result)
    if result["ratios"]:
        summary(console, result["ratios"])
    trace = next(method for method in methods if method.name == "lru").store.trace
    for policy in ("lru", "belady") if trace else ():
        rates = [
            replay(trace, slots, policy).hit_rate for slots in (owner.top_k, 3 * owner.top_k // 2, 2 * owner.top_k)
        ]
        result[f"replay_{policy}"] = rates
        hits = ", ".join(f"{rate:.1%}" for rate in rates)
        console.print(f"replay of the demands, prompts included, with k, 1.5 k and 2 k slots a layer, {policy}: {hits}")
    for method in methods:
        method.store.close()
    for share in map(float, filter(None, args.sizes.split(","))):
        some = make(owner, share, list(MAIN[1:]), args, oracle)
        compare(decoder, resident, some, prompts, args.tokens, 1.0)
        result["sizes"][f"{share:g}"] = show(console, f"cache {share:.0%}, load/compute 1", some)
        for method in some:
            method.store.close()
        keep(args.json, result)
    if args.plot is not None and result["sizes"]:
        plot(args.plot, result["sizes"])
    resident.store.close()
    owner.store = first
    decoder.close()
    assert asdict(first.counters.since(Counters()))["failed"] == 0


if __name__ == "__main__":
    main()
