"""Measure the time from a command to its first token: medians over starts of whole processes, with files cached.

    python benchmarks/start.py smollm2-135m-instruct MODEL.gguf --rounds 5
    python benchmarks/start.py MODEL.gguf --llama-cpp llama-cli --json result.json

Methods take turns, round by round. For each model: ``specdec generate "Hi" --max-new-tokens 1`` with the default
drafter and without a drafter, the server until ``/health`` answers 200, and llama.cpp's command line if it is given;
for a file also its first start, with an empty cache folder. Once for all models: the import of ``SpecDecoder``,
``--help`` and an error about a path. One start of each comes before the rounds, is not counted, and may write caches.
Memory is the largest resident size of the process; mapped pages count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

SPECDEC = (sys.executable, "-m", "specdec")
GENERATE = (*SPECDEC, "generate", "Hi", "--max-new-tokens", "1", "--quiet", "--model")
LIMIT = 600.0  # seconds that a start may take


def run(command: Sequence[str], code: int = 0, **environment: str) -> tuple[float, float]:
    """Run a command; return (its seconds, its peak memory in MB). Ends the program if its exit code is not ``code``.

    environment: variables in addition to those of this process.
    """
    start = time.perf_counter()
    null = subprocess.DEVNULL
    child = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, env=os.environ | environment)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != code:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}, not {code}")
    return seconds, megabytes(usage)


def first(model: str) -> tuple[float, float]:
    """Generate one token with an empty cache folder; return (seconds, peak memory in MB).

    model: a GGUF file, for which the cache folder is then prepared anew.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run((*GENERATE, model), SPECDEC_CACHE=folder)


def megabytes(usage: resource.struct_rusage) -> float:
    """Return the peak memory of a process in MB. usage: the resources that the system reports for it."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def serve(model: str) -> tuple[float, float]:
    """Start a server of ``model`` and end it; return (seconds until it was ready, its peak memory in MB)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    start = time.perf_counter()
    command = (*SPECDEC, "serve", "--model", model, "--port", port, "--quiet")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ready(port):
        if child.poll() is not None or time.perf_counter() - start > LIMIT:
            raise SystemExit(f"the server of {model} did not start")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    child.terminate()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return seconds, megabytes(usage)


def ready(port: str) -> bool:
    """Return whether ``/health`` of the server at ``port`` of this machine answers with status 200."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return int(answer.status) == 200
    except (URLError, OSError):  # also 503
        return False


def methods(models: Sequence[str], llama: str | None) -> dict[str, Callable[[], tuple[float, float]]]:
    """Return what is measured: {name: function that runs it once and returns (seconds, peak memory in MB)}.

    models: names or GGUF files. llama: llama.cpp's program; None: it is not measured.
    """
    found: dict[str, Callable[[], tuple[float, float]]] = {
        "import SpecDecoder": lambda: run((sys.executable, "-c", "from specdec import SpecDecoder")),
        "import torch": lambda: run((sys.executable, "-c", "import torch")),
        "--help": lambda: run((*SPECDEC, "--help")),
        "error about a path": lambda: run((*GENERATE, "./no-such-file.gguf"), 2),
    }
    for model in models:
        name = Path(model).stem
        found |= {
            f"{name}": lambda model=model: run((*GENERATE, model)),  # type: ignore[misc]
            f"{name}, --drafter none": lambda model=model: run((*GENERATE, model, "--drafter", "none")),  # type: ignore[misc]
            f"{name}, serve": lambda model=model: serve(model),  # type: ignore[misc]
        }
        if Path(model).is_file():
            found[f"{name}, first time"] = lambda model=model: first(model)  # type: ignore[misc]
        if llama is not None and Path(model).is_file():
            command = (llama, "-m", model, "-p", "Hi", "-n", "1", "--no-display-prompt", "-no-cnv")
            found[f"{name}, llama.cpp"] = lambda command=command: run(command)  # type: ignore[misc]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or GGUF files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-cpp", help="llama.cpp's command line; default: llama-cli, if it is there")
    parser.add_argument("--only", help="methods whose names contain this")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    every = methods(args.models, args.llama_cpp or shutil.which("llama-cli"))
    chosen = {name: method for name, method in every.items() if args.only is None or args.only in name}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for number in range(args.rounds + 1):
        for name, method in chosen.items():
            figures = method()
            if number:
                found[name].append(figures)
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    print(f"{'':44} {'median':>8} {'least':>8} {'most':>8} {'memory':>9}")
    for name, rows in found.items():
        seconds, memory = zip(*rows, strict=True)
        median, peak = statistics.median(seconds), max(memory)
        print(f"{name:44} {median:7.2f}s {min(seconds):7.2f}s {max(seconds):7.2f}s {peak:6.0f} MB")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
