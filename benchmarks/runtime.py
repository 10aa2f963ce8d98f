"""One decode step of the target by row count, runtime against runtime, interleaved; the last line is JSON.

    python benchmarks/runtime.py --model FOLDER --dtype bfloat16 --threads 2 --rows 1,2,4,5,8,16 --contexts 200,2000

Arms: ``hf`` (the model's own forward with its DynamicCache), ``reference``, ``fused``, ``int4`` (fused, 4-bit weights;
bfloat16 only). A step is embedding, all layers and the head for T new tokens after the context, as a scoring pass of
T - 1 drafted tokens runs it; the new entries are dropped again afterwards, outside the timing. Printed: median ms, the
best in brackets, and the fraction of the roofline: weights (int4: 5 bits each in the layers, 16 in the head) and cached
entries read once at the measured read bandwidth.

    python benchmarks/runtime.py --model smollm2-135m-instruct --decode --contexts 200,1000,2000,4000

What a round of decoding takes by the length of the context, in the native runtime: whole rounds, the compiled layers
(whose attention grows with the context), and all that is beside them, which should not.
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
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache

from specdec import SpecDecoder
from specdec.api.text import encode
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Pass, Target

Step = tuple[Callable[[], Any], Callable[[], None]]  # what is timed, and what undoes it


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes per second of reading memory once with all threads: the best of several sums."""
    data = torch.ones(megabytes * 2**20 // 4)
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def hf_step(model: Any, prompt: torch.Tensor, rows: int) -> Step:
    cache, n = DynamicCache(config=model.config), prompt.shape[1]
    model(prompt, cache=cache, use_cache=True, logits_to_keep=1)
    ids = prompt[:, :rows]
    positions = torch.arange(n, n + rows)[None]
    return lambda: model(ids, position_ids=positions, cache=cache, use_cache=True), lambda: cache.crop(-rows)


def own_step(target: Target, prompt: torch.Tensor, rows: int) -> Step:
    cache, count, n = target.new_cache(), target.num_layers, prompt.shape[1]
    for start in range(0, n, 512):
        part = prompt[:, start : start + 512]
        positions = torch.arange(start, start + part.shape[1])[None]
        target.layers(target.embed(part, positions), 0, count, Pass(positions, cache.mask(0, positions), cache))
        cache.commit([list(range(part.shape[1]))])
    ids, positions = prompt[:, :rows], torch.arange(n, n + rows)[None]

    def step() -> torch.Tensor:
        x = target.layers(target.embed(ids, positions), 0, count, Pass(positions, cache.mask(0, positions), cache))
        return target.readout(x)

    return step, lambda: cache.trim(rows)


def bytes_read(model: Any, context: int, bits: float) -> float:
    """Layer weights at ``bits`` each, the head (a separate embedding is hardly read), cached keys and values."""
    config, size = model.config, next(model.parameters()).element_size()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    entries = 2 * config.num_hidden_layers * context * config.num_key_value_heads * head_dim
    return layers * bits / 8 + size * (model.get_output_embeddings().weight.numel() + entries)


class Timed:
    """The compiled kernels, with a clock around the layers."""

    def __init__(self, library: Any) -> None:
        self.library, self.seconds = library, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def specdec_layers(self, *args: Any) -> Any:
        start = time.perf_counter()
        code = self.library.specdec_layers(*args)
        self.seconds += time.perf_counter() - start
        return code


def decode(args: argparse.Namespace, console: Console, rounds: int = 32) -> dict[str, Any]:
    """Milliseconds of a round at each context: {"drafter_context": [whole, beside the layers]}."""
    plain = SpecDecoder.from_pretrained(args.model, drafter="none", runtime="native")
    target: Any = plain.target
    target.lib = clock = Timed(target.lib)
    text = " ".join(path.read_text("utf-8") for path in sorted(Path(__file__).parents[1].glob("specdec/*.py")))
    ids, contexts = encode(plain.tokenizer, text, chat=False), [int(c) for c in args.contexts.split(",")]
    arms = {"none": plain, "prompt-lookup": plain.with_drafter("prompt-lookup")}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(args.repeats):
        for context in contexts:
            for name, decoder in arms.items():
                options: dict[str, Any] = {"num_speculative_tokens": 4} if name != "none" else {}
                with decoder.open([ids[:context]], max_new_tokens=rounds, ignore_eos=True, **options) as generation:
                    steps = generation.steps()
                    next(steps)  # the prefill
                    start, layers = time.perf_counter(), clock.seconds
                    for _ in steps:
                        now, inside = time.perf_counter(), clock.seconds
                        times.setdefault((name, context), []).append((now - start, inside - layers))
                        start, layers = time.perf_counter(), clock.seconds
    table = Table(title="ms a round, by context; all that grows but attention is in the last column")
    for column in ("drafter", "context", "round", "layers", "beside them"):
        table.add_column(column, justify="left" if column == "drafter" else "right")
    result: dict[str, Any] = {}
    for (name, context), seconds in sorted(times.items()):
        whole = 1e3 * statistics.median(total for total, _ in seconds)
        beside = 1e3 * statistics.median(total - inside for total, inside in seconds)
        table.add_row(name, str(context), f"{whole:.2f}", f"{whole - beside:.2f}", f"{beside:.3f}")
        result[f"{name}_{context}"] = [round(whole, 3), round(beside, 3)]
    console.print(table)
    return result


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face model folder (--decode: any model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", default="1,2,4,5,8,16")
    parser.add_argument("--contexts", default="200,2000")
    parser.add_argument("--arms", default="hf,reference,fused", help="any of hf, reference, fused, int4")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--decode", action="store_true", help="rounds of decoding by context instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.decode:
        print(json.dumps(decode(args, Console())))
        return

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()

    model = load()
    make = {
        "hf": lambda: (hf_step, model),
        "reference": lambda: (own_step, ReferenceTarget(model)),
        "fused": lambda: (own_step, FusedTarget(model)),
        "int4": lambda: (own_step, FusedTarget(load(), "int4")),  # rounds its model in place
    }
    arms: dict[str, Any] = {name: make[name]() for name in args.arms.split(",")}
    bandwidth, row_counts = read_bandwidth(), [int(r) for r in args.rows.split(",")]
    result: dict[str, Any] = {"dtype": args.dtype, "threads": args.threads, "gb_per_s": round(bandwidth / 1e9, 1)}
    console = Console()
    for context in (int(c) for c in args.contexts.split(",")):
        prompt = torch.randint(3, model.config.vocab_size, (1, context))
        wide = 8 * next(model.parameters()).element_size()
        limits = {name: bytes_read(model, context, 5 if name == "int4" else wide) / bandwidth for name in arms}
        bounds = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in limits.items())
        table = Table(title=f"{args.dtype}, {args.threads} threads, context {context}; memory limits in ms: {bounds}")
        for column in ("rows", *(f"{name} ms" for name in arms)):
            table.add_column(column, justify="right")
        for rows in row_counts:
            steps = {name: make_step(subject, prompt, rows) for name, (make_step, subject) in arms.items()}
            times: dict[str, list[float]] = {name: [] for name in steps}
            for repeat in range(args.repeats + 1):
                for name, (step, undo) in steps.items():
                    start = time.perf_counter()
                    step()
                    if repeat:  # the first round warms up
                        times[name].append(time.perf_counter() - start)
                    undo()
            cells = []
            for name, seconds in times.items():
                median, best = statistics.median(seconds), min(seconds)
                cells.append(f"{median * 1e3:.1f} ({best * 1e3:.1f}) {limits[name] / median:4.0%}")
                result[f"{name}_{context}_{rows}"] = round(median * 1e3, 2)
                result[f"{name}_{context}_{rows}_best"] = round(best * 1e3, 2)
            table.add_row(str(rows), *cells)
        console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
