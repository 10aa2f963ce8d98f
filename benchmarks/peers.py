"""Other engines, each in its own process, which idles while another method runs.

The process reads JSON commands from its input, one per line, and answers each with a line of JSON; ``serve`` runs in
it. An engine is a class in its own module. Separate processes isolate engines that configure threads and the CPU's
tile registers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from specdec.base import machine
from specdec.base.errors import SpecDecError

Put = Callable[[Sequence[int]], bool]  # takes new tokens as they come; False: no more are wanted


class PeerEngine(Protocol):
    """The interface of an engine, which runs in a process of its own and executes the commands of ``Process.ask``."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        """Load the model file ``path`` and return what to report: version and settings.

        context: size of the KV cache in tokens. mode: as in ``Peer``; source: the draft model's file in mode
        "draft-model".
        depth: tokens to draft per step; None: the engine's own default.
        """
        ...

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        """Decode at most ``count`` tokens greedily after ``ids``; pass new tokens to ``put`` until it returns False."""
        ...

    def passes(self, sizes: list[int]) -> dict[str, float]:
        """Return {number of tokens, as text: seconds of a forward pass over as many tokens} for ``sizes``."""
        ...

    def logits(self, ids: list[int], count: int) -> Any:
        """Return the logits that predict each of the last ``count`` tokens of ``ids``, float32 [count, V]."""
        ...


@dataclass(frozen=True)
class Peer:
    """An engine that benchmarks can run, in one of its modes.

    engine: "module:Class" of the ``PeerEngine``. module, package: the module that it imports, and the package to
    install.
    reads: suffixes of model files, or names of files in model folders, that the engine loads.
    mode: how the engine drafts: "" (it does not), "ngram-cache", "ngram-simple" or "draft-model".
    folder: environment variable that may name the library's folder instead of the package; "": there is none.
    """

    engine: str
    module: str
    package: str
    reads: tuple[str, ...]
    mode: str = ""
    folder: str = ""

    @property
    def missing(self) -> str:
        """Why the engine cannot run here; "" if it can."""
        if os.environ.get(self.folder) or importlib.util.find_spec(self.module):
            return ""
        where = f", or let {self.folder} name the folder of its library" if self.folder else ""
        return f"is not installed; get it with: pip install {self.package}{where}"


LLAMA_CPP = ("engine_llama_cpp:LlamaCpp", "llama_cpp", "llama-cpp-python", (".gguf",))
FOLDER = "LLAMA_CPP"
PEERS: dict[str, Peer] = {
    "llama.cpp": Peer(*LLAMA_CPP, folder=FOLDER),
    "llama.cpp-ngram-cache": Peer(*LLAMA_CPP, "ngram-cache", FOLDER),
    "llama.cpp-ngram-simple": Peer(*LLAMA_CPP, "ngram-simple", FOLDER),
    "llama.cpp-draft-model": Peer(*LLAMA_CPP, "draft-model", FOLDER),
}


def readable(name: str, model: Path | None) -> Path:
    """Return ``model`` if the peer ``name`` can load this file or folder; raise SpecDecError if it cannot."""
    peer = PEERS[name]
    if model is not None and (model.suffix in peer.reads or any((model / kind).is_file() for kind in peer.reads)):
        return model
    raise SpecDecError(f"'{name}' reads a GGUF file, and the model is none; give such a --model")


class Process:
    """A child process that runs the engine ``"module:Class"``.

    environment: variables in addition to those of this process.
    close: ends the child. libraries: resident memory in MB before a model is loaded.
    """

    def __init__(self, engine: str, **environment: str) -> None:
        self.engine = engine
        command = [sys.executable, __file__, engine]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=os.environ | environment
        )
        self.close = weakref.finalize(self, _end, self.child)
        self._answer()  # it is ready
        self.libraries = self.resident("VmRSS")  # MB, before a model is loaded

    def ask(self, do: str, **given: Any) -> Any:
        """Send the command ``do`` (a method of ``EngineServer``) with its arguments and return the result.

        Raises SpecDecError if the engine raised an error or the process has ended.
        """
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self.child.stdin.flush()
        except OSError:  # it has ended: so says the answer
            pass
        return self._answer()

    def _answer(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SpecDecError(f"the process of {self.engine} ended with code {self.child.wait()}; leave it out")
        answer = json.loads(line)
        if "error" in answer:
            raise SpecDecError(f"{self.engine.rpartition(':')[2]}: {answer['error']}")
        return answer["value"]

    def resident(self, field: str = "VmHWM") -> float | None:
        """Return the memory of the child, as ``machine.resident`` does."""
        return machine.resident(field, self.child.pid)


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()


# --- in the process --------------------------------------------------------------------------------------------------


class EngineServer:
    """The side of the child process: it executes commands with an engine and times generation."""

    def __init__(self, engine: PeerEngine) -> None:
        self.load, self.passes = engine.load, engine.passes
        self.engine = engine

    def logits(self, ids: list[int], count: int, path: str) -> None:
        """Write the result of ``PeerEngine.logits`` to the file ``path`` (.npy)."""
        np.save(path, self.engine.logits(ids, count))

    def generate(self, ids: list[int], count: int, eos: list[int]) -> dict[str, Any]:
        """Decode greedily after ``ids`` and return the tokens with their timing.

        tokens: at most ``count``, cut after a token of ``eos``. arrivals: seconds until each delivery of tokens.
        first: number of tokens in the first delivery. seconds: duration of the whole call.
        """
        tokens, arrivals, firsts, end = list[int](), list[float](), list[int](), set(eos)
        start = time.perf_counter()

        def put(new: Sequence[int]) -> bool:
            arrivals.append(time.perf_counter() - start)
            firsts.append(len(new))
            for token in new:
                tokens.append(token)
                if token in end or len(tokens) == count:
                    return False
            return True

        self.engine.generate(ids, count, put)
        if not tokens:
            raise ValueError("it generated no tokens")
        return {
            "tokens": tokens,
            "seconds": time.perf_counter() - start,
            "arrivals": arrivals,
            "first": firsts[0],
        }


def serve(engine: str) -> None:
    """Answer commands on standard input until it ends. engine: "module:Class". What libraries print goes to stderr."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark handles Ctrl-C and ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def carry_out(action: Callable[[], Any]) -> None:
        try:
            answer = {"value": action()}
        except Exception as error:  # whatever an engine raises is an answer
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)

    module, _, name = engine.partition(":")
    made = list[EngineServer]()
    carry_out(lambda: made.append(EngineServer(getattr(import_module(module), name)())))
    for line in sys.stdin:
        carry_out(partial(lambda do, **given: getattr(made[0], do)(**given), **json.loads(line)))


if __name__ == "__main__":
    serve(sys.argv[1])
