"""The default engine on GGUF files, beside llama.cpp on the same files; the last line is JSON.

    pip install llama-cpp-python
    python benchmarks/gguf_files.py smollm2-135m-instruct MODEL.gguf --threads 2 --json result.json

Each engine is a process of its own (``peers``) and idles while the other runs; who begins alternates
from round to round. A round is plain greedy decoding after a short prompt, a prompt of 512 tokens, and passes over 1,
2, 4, 8 and 16 tokens (the least of five each). The table has medians over the rounds, their ranges, and the median of
the ratios within rounds: above 1 specdec is faster. Files are loaded with an empty cache folder first and again
afterwards.

Bytes per token are those of the tensors that a pass reads: all but the embedding, where the output has a matrix of its
own. Memory is the peak resident size of the process; mapped pages of the file count. ``--json`` keeps what was
measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from gguf import GGUFReader
from rich.console import Console
from rich.table import Table

from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.bench.environment import environment
from specdec.models import catalogue

ROWS, CONTEXT = (1, 2, 4, 8, 16), 2048
PREFILL, PROMPT = 512, 64  # tokens
Rounds = dict[str, list[dict[str, float]]]  # figures of each round, by engine


@dataclass(frozen=True)
class Shape:
    """vocabulary: tokens. bytes_read: of the matrices that a pass reads."""

    vocabulary: int
    bytes_read: int


def read_shape(file: Path) -> Shape:
    """The shape of a GGUF file, from its header."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    embedding = tensors["token_embd.weight"]
    unread = int(embedding.n_bytes) if "output.weight" in tensors else 0
    return Shape(int(embedding.shape[1]), sum(int(tensor.n_bytes) for tensor in tensors.values()) - unread)


def read_bandwidth(megabytes: int = 512) -> float:
    """Bytes per second of reading memory once with all threads: the best of several sums."""
    data = torch.ones(megabytes * 2**20 // 4)
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def gguf_of(model: str) -> Path:
    if model in catalogue.EMBEDDED:
        return catalogue.prepared(model) / catalogue.GGUF
    if not Path(model).is_file():
        sys.exit(f"'{model}' is neither an embedded model nor a file; give a .gguf file")
    return Path(model).absolute()


def synthetic(count: int, vocabulary: int) -> list[int]:
    """Token ids spread over the vocabulary without its end, where special tokens are."""
    return [(7919 * n) % (vocabulary * 3 // 4) for n in range(1, count + 1)]


def one_round(engine: peers.Process, vocabulary: int, tokens: int) -> dict[str, float]:
    decoded = engine.ask("generate", ids=synthetic(PROMPT, vocabulary), count=tokens, eos=[])
    prompt = engine.ask("generate", ids=synthetic(PREFILL, vocabulary), count=1, eos=[])
    first, last, further = decoded["arrivals"][0], decoded["arrivals"][-1], len(decoded["tokens"]) - decoded["first"]
    figures = {"ms": 1e3 * (last - first) / further, "prefill": PREFILL / prompt["arrivals"][0]}
    passes = engine.ask("passes", sizes=list(ROWS))
    return figures | {f"rows_{count}": 1e3 * passes[str(count)] for count in ROWS if str(count) in passes}


def measure(model: str, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The figures of one file."""
    file = gguf_of(model)
    shape, loads, running = read_shape(file), dict[str, dict[str, float]](), dict[str, peers.Process]()
    missing, loading = "", {"path": str(file), "threads": args.threads, "context": CONTEXT}
    loading |= {"mode": "", "source": "", "depth": None}
    own = {"SPECDEC_CACHE": str(cache), "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(Path(__file__).parent)}
    makers = {"specdec": lambda: peers.Process("engine_specdec:Specdec", **own)}
    about: dict[str, Any] = {}
    if not args.alone:
        makers["llama.cpp"] = lambda: peers.Process(peers.PEERS["llama.cpp"].engine)
    try:
        for name, make in makers.items():
            try:
                for when in ("first_load", "load"):
                    if name in running:
                        running[name].close()
                    running[name] = make()
                    start = time.perf_counter()
                    about[name] = running[name].ask("load", **loading)
                    loads.setdefault(name, {})[when] = time.perf_counter() - start
            except SpecDecError as error:
                if name == "specdec":
                    raise
                running.pop(name, None)
                missing = f"{name} did not run: {error}"
        rounds: Rounds = {name: [] for name in running}
        for number in range(args.rounds + 1):
            for name in list(running)[:: -1 if number % 2 else 1]:
                figures = one_round(running[name], shape.vocabulary, args.tokens if number else 8)
                if number:  # the first one warms up
                    rounds[name].append(figures)
        peaks = {name: {"peak": e.resident(), "libraries": e.libraries} for name, e in running.items()}
    finally:
        for engine in running.values():
            engine.close()
    result = {"file": Path(model).name, "threads": args.threads, "gb_per_s": read_bandwidth() / 1e9, "missing": missing}
    result["bytes_read"] = shape.bytes_read
    held = {key: about["specdec"][key] for key in ("runtime", "storage", "bytes_read")}
    return result | {"specdec": held, "rounds": rounds, "loads": loads, "memory": peaks}


def spread(values: list[float], digits: int = 1) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table_of(result: dict[str, Any]) -> Table:
    rounds, names = result["rounds"], list(result["rounds"])
    held, read = result["specdec"], result["bytes_read"]
    title = f"{result['file']}: {held['runtime']}, {held['storage']}; {result['threads']} threads"
    table = Table(title=f"{title}; memory is read at {result['gb_per_s']:.1f} GB/s")
    for column in ("", *names, "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(label: str, key: str, faster_is_more: bool = False) -> None:
        cells = [spread([figures[key] for figures in rounds[name]]) if measured(name, key) else "" for name in names]
        ratio = ""
        if len(names) == 2 and all(measured(name, key) for name in names):
            pairs = zip(*(rounds[name] for name in names), strict=True)
            ratios = [theirs[key] / ours[key] for ours, theirs in pairs]
            ratio = spread([1 / r for r in ratios] if faster_is_more else ratios, 2)
        table.add_row(label, *cells, ratio)

    def measured(name: str, key: str) -> bool:
        return all(key in figures for figures in rounds[name])

    row("decoding, ms per token", "ms")
    for count in ROWS:
        row(f"pass over {count}, ms", f"rows_{count}")
    for count in ROWS[1:]:
        key = f"rows_{count}"
        ratios = [[f[key] / f["rows_1"] for f in rounds[n]] if measured(n, key) else [] for n in names]
        table.add_row(f"pass over {count} / over 1", *(spread(r, 2) if r else "" for r in ratios), "")
    row(f"prefill of {PREFILL}, tokens/s", "prefill", faster_is_more=True)
    for label, key in (("first load, s", "first_load"), ("later load, s", "load")):
        table.add_row(label, *(f"{result['loads'][name][key]:.1f}" for name in names), "")
    for label, key in (("peak resident, MB", "peak"), ("of that, libraries", "libraries")):
        table.add_row(label, *(f"{result['memory'][name][key]:.0f}" for name in names), "")
    sizes = [read if name != "specdec" else held["bytes_read"] or read for name in names]
    table.add_row("read per token, MB", *(f"{size / 1e6:.0f}" for size in sizes), "")
    reached = [size / 1e6 / statistics.median(f["ms"] for f in rounds[n]) for n, size in zip(names, sizes, strict=True)]
    table.add_row("GB/s reached", *(f"{speed:.1f}" for speed in reached), "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files or names of embedded models")
    parser.add_argument("--alone", action="store_true", help="measure no other engine")
    parser.add_argument("--threads", type=int, default=cores.cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each round")
    parser.add_argument("--cache", type=Path, help="keep the cache folder here; the first load is that of a new folder")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 2:
        parser.error("--rounds takes at least 1, --tokens at least 2")
    console, results = Console(width=110), []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            result = measure(model, args, args.cache or Path(folder))
            console.print(table_of(result))
            if result["missing"]:
                console.print(result["missing"], markup=False)
            results.append(result)
    text = json.dumps({"results": results, "environment": environment()})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
