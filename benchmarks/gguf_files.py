"""Measure every native build that this CPU runs on GGUF files, beside llama.cpp; the last line is JSON.

    pip install llama-cpp-python                    # or: export LLAMA_CPP=FOLDER, see engine_llama_cpp.py
    python benchmarks/gguf_files.py smollm2-135m-instruct MODEL.gguf --threads 2 --json result.json

A build is an instruction set ($SPECDEC_NATIVE). Each engine is a process of its own (``peers``) and idles while another
engine runs; the order rotates from round to round. A round is plain greedy decoding after a short prompt, a prompt of
512 tokens, passes over 1, 2, 4, 8 and 16 tokens (the minimum of five each), and a plain read of as many bytes as a pass
reads, with as many threads. The table has medians over the rounds, their ranges, and for each build the median of the
ratios within rounds to llama.cpp: above 1 specdec is faster. The AVX2 build is compared with llama.cpp's own AVX2
backend if its folder has one (npm's @node-llama-cpp/linux-x64 does). Files are loaded with an empty cache folder first
and again afterwards.

Bytes per token are those of the tensors that a pass reads: all but the embedding, if the output has a matrix of its
own. Memory is the peak resident size of the process; mapped pages of the file count.
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
from specdec.models import catalogue, prepare
from specdec.runtimes.native import library

ROWS, CONTEXT = (1, 2, 4, 8, 16), 2048
PREFILL, PROMPT = 512, 64  # tokens
BACKENDS = {"avx2": "haswell"}  # of llama.cpp, by the build that it is compared with; else the best for this CPU
LLAMA = "llama.cpp"
Rounds = dict[str, list[dict[str, float]]]  # figures of each round, by engine


@dataclass(frozen=True)
class Shape:
    """Sizes of a GGUF file.

    vocabulary: number of tokens of the vocabulary.
    bytes_read: number of bytes of the tensors that a forward pass reads.
    """

    vocabulary: int
    bytes_read: int


def read_shape(file: Path) -> Shape:
    """Return the vocabulary size and the bytes that a forward pass reads, from the header of the GGUF file ``file``."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    embedding = tensors["token_embd.weight"]
    unread = int(embedding.n_bytes) if "output.weight" in tensors else 0
    return Shape(int(embedding.shape[1]), sum(int(tensor.n_bytes) for tensor in tensors.values()) - unread)


def readable(size: int) -> torch.Tensor:
    """Return a float tensor [2, n] of about ``size`` bytes in large memory pages, in which packed weights lie, too."""
    data = torch.empty(size // 8, 2)
    library.load().specdec_large_pages(data.data_ptr(), data.nbytes)
    return data.fill_(1.0).view(2, -1)


def read_seconds(data: torch.Tensor) -> float:
    """Return the seconds that all threads need to read ``data`` [2, n] once, measured as the product of its two halves.

    It is the best of three measurements.
    """
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.dot(data[0], data[1])
        best = min(best, time.perf_counter() - start)
    return best


def gguf_of(model: str) -> Path:
    """Return the GGUF file of the embedded model ``model``, or ``model`` as a path.

    Ends the program if it is neither an embedded model nor a file.
    """
    if model in catalogue.EMBEDDED:
        return prepare.prepare_embedded(model) / prepare.GGUF
    if not Path(model).is_file():
        sys.exit(f"'{model}' is neither an embedded model nor a file; give a .gguf file")
    return Path(model).absolute()


def builds() -> list[str]:
    """Return the names of the instruction sets for which this CPU has native kernels, the best one first."""
    best = library.LEVELS.index(library.load().level)
    return list(library.LEVELS[best:0:-1])


def rival(build: str) -> str:
    """Return the name of the llama.cpp engine that is compared with specdec's native build for an instruction set.

    build: name of the instruction set, such as "avx2".
    """
    return f"{LLAMA} {build}" if build in BACKENDS else LLAMA


def engines(args: argparse.Namespace, cache: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Return the engines to measure: {name: ("module:Class", environment variables of its process)}.

    args: the options of the command line. cache: specdec's cache folder.
    """
    own = {"SPECDEC_CACHE": str(cache), "OMP_NUM_THREADS": str(args.threads)}
    out = {build: ("engine_specdec:Specdec", own | {library.LEVEL: build}) for build in args.builds}
    for build in () if args.alone else args.builds:
        backend = {"LLAMA_CPP_CPU": BACKENDS[build]} if build in BACKENDS else {}
        out[rival(build)] = (peers.PEERS[LLAMA].engine, backend)
    return out


def synthetic(count: int, vocabulary: int) -> list[int]:
    """Return ``count`` token ids as a prompt, from the first three quarters of a vocabulary.

    vocabulary: number of its tokens; the special ones are at its end.
    """
    return [(7919 * n) % (vocabulary * 3 // 4) for n in range(1, count + 1)]


def one_round(engine: peers.Process, vocabulary: int, tokens: int) -> dict[str, float]:
    """Measure an engine once; return its figures by name.

    They are the ms per decoded token ("ms"), the tokens/s of a prompt ("prefill"), and for N = 1, 2, 4, 8, 16 the ms of
    a pass over N tokens ("rows_N") and its ratio to a pass over one ("times_N").
    vocabulary: number of tokens of the vocabulary. tokens: number of tokens to decode.
    """
    decoded = engine.ask("generate", ids=synthetic(PROMPT, vocabulary), count=tokens, eos=[])
    prompt = engine.ask("generate", ids=synthetic(PREFILL, vocabulary), count=1, eos=[])
    first, last, further = decoded["arrivals"][0], decoded["arrivals"][-1], len(decoded["tokens"]) - decoded["first"]
    figures = {"ms": 1e3 * (last - first) / further, "prefill": PREFILL / prompt["arrivals"][0]}
    passes = engine.ask("passes", sizes=list(ROWS))
    figures |= {f"rows_{count}": 1e3 * passes[str(count)] for count in ROWS}
    return figures | {f"times_{count}": passes[str(count)] / passes["1"] for count in ROWS[1:]}


def measure(model: str, args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Measure all engines on one GGUF file; return the figures as JSON values.

    model: the file, or an embedded model. args: the options of the command line. cache: specdec's cache folder.
    """
    file = gguf_of(model)
    shape, loads, running = read_shape(file), dict[str, dict[str, float]](), dict[str, peers.Process]()
    missing, loading = list[str](), {"path": str(file), "threads": args.threads, "context": CONTEXT}
    loading |= {"mode": args.weights or "", "source": "", "depth": None}
    about: dict[str, Any] = {}
    data = readable(shape.bytes_read)
    try:
        for name, (engine, variables) in engines(args, cache).items():
            llama = name.startswith(LLAMA)
            try:
                if llama and (why := peers.PEERS[LLAMA].missing):
                    raise SpecDecError(f"it {why}")
                for when in ("first_load", "load"):
                    if name in running:
                        running[name].close()
                    running[name] = peers.Process(engine, **variables)
                    start = time.perf_counter()
                    about[name] = running[name].ask("load", **loading | ({"mode": ""} if llama else {}))
                    loads.setdefault(name, {})[when] = time.perf_counter() - start
            except SpecDecError as error:
                if not llama:
                    raise
                running.pop(name, None)
                missing.append(f"{name} did not run: {error}")
        rounds: Rounds = {name: [] for name in running}
        for number in range(args.rounds + 1):
            reading, turn = read_seconds(data), number % len(running)
            for name in [*list(running)[turn:], *list(running)[:turn]]:
                figures = one_round(running[name], shape.vocabulary, args.tokens if number else 8)
                if number:  # the first one warms up
                    rounds[name].append(figures | {"share": 1e3 * reading / figures["ms"], "read_ms": 1e3 * reading})
        peaks = {name: {"peak": e.resident(), "libraries": e.libraries} for name, e in running.items()}
    finally:
        for process in running.values():
            process.close()
    held = {name: about[name] for name in args.builds}
    result = {"file": Path(model).name, "threads": args.threads, "bytes_read": shape.bytes_read, "missing": missing}
    return result | {"builds": held, "rounds": rounds, "loads": loads, "memory": peaks}


def with_range(values: list[float], digits: int = 1) -> str:
    """Return the median of ``values`` and their range as text, such as "1.2 (1.0-1.5)". digits: after the point."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table_of(result: dict[str, Any]) -> Table:
    """Return a table of the figures that ``measure`` returned for one GGUF file."""
    rounds, names, held = result["rounds"], list(result["rounds"]), result["builds"]
    pairs = [(build, rival(build)) for build in held if rival(build) in rounds]
    reading = with_range([figures["read_ms"] for figures in rounds[names[0]]])
    title = f"{result['file']}: {next(iter(held.values()))['storage']}; {result['threads']} threads; a plain read of "
    table = Table(title=f"{title}{result['bytes_read'] / 1e6:.0f} MB takes {reading} ms")
    for column in ("", *names, *(f"{ours} over {theirs}" for ours, theirs in pairs)):
        table.add_column(column, justify="right" if column else "left")

    def row(label: str, key: str, digits: int = 1, ratio: int = 0) -> None:
        """Add the figure ``key`` of each engine to the table. label: its first cell. digits: digits after the point.

        ratio: whether specdec is compared with llama.cpp: 1 if less is faster, -1 if more is faster, 0 for no
        comparison.
        """
        cells = [with_range([figures[key] for figures in rounds[name]], digits) for name in names]
        for ours, theirs in pairs if ratio else ():
            both = zip(rounds[ours], rounds[theirs], strict=True)
            cells.append(with_range([(b[key] / a[key]) ** ratio for a, b in both], 2))
        table.add_row(label, *cells)

    row("decoding, ms per token", "ms", ratio=1)
    for count in ROWS:
        row(f"pass over {count}, ms", f"rows_{count}", ratio=1)
    for count in ROWS[1:]:
        row(f"pass over {count} / over 1", f"times_{count}", 2)
    row(f"prefill of {PREFILL}, tokens/s", "prefill", ratio=-1)
    row("plain read / decoding", "share", 2)
    for label, key in (("first load, s", "first_load"), ("later load, s", "load")):
        table.add_row(label, *(f"{result['loads'][name][key]:.1f}" for name in names))
    for label, key in (("peak resident, MB", "peak"), ("of that, libraries", "libraries")):
        table.add_row(label, *(f"{result['memory'][name][key]:.0f}" for name in names))
    read = [held.get(name, {}).get("bytes_read") or result["bytes_read"] for name in names]
    table.add_row("read per token, MB", *(f"{size / 1e6:.0f}" for size in read))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files or names of embedded models")
    parser.add_argument("--builds", type=lambda text: text.split(","), help="some of the builds, with commas between")
    parser.add_argument("--weights", help="of specdec, as its option of this name takes them")
    parser.add_argument("--alone", action="store_true", help="measure no other engine")
    parser.add_argument("--threads", type=int, default=cores.cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each round")
    parser.add_argument("--cache", type=Path, help="keep the cache folder here; the first load is that of a new folder")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    if args.rounds < 1 or args.tokens < 2:
        parser.error("--rounds takes at least 1, --tokens at least 2")
    known = builds()
    args.builds = args.builds or known
    if unknown := [build for build in args.builds if build not in known]:
        parser.error(f"--builds: this CPU runs {', '.join(known)}, not {', '.join(unknown)}")
    torch.set_num_threads(args.threads)
    console, results = Console(width=160), []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            result = measure(model, args, args.cache or Path(folder))
            console.print(table_of(result))
            for line in result["missing"]:
                console.print(line, markup=False)
            results.append(result)
    text = json.dumps({"results": results, "environment": environment()})
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
