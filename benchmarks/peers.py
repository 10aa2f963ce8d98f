"""Run other engines, each in a process of its own, which idles while another method runs.

The process reads JSON commands from its input, one per line, and answers each with a line of JSON; ``serve`` runs in
it. An engine is a class in its own module. Separate processes isolate engines that configure threads and the CPU's tile
registers.
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
    """A protocol for engines that decode a model greedily, in a process of their own that executes commands."""

    def load(self, path: str, threads: int, context: int, mode: str, source: str, depth: int | None) -> dict[str, Any]:
        """Load the model file ``path``; return what to report of the engine, such as its version and settings.

        threads: number of threads. context: size of the KV cache in tokens. mode: how the engine drafts: "" (it does
        not), "ngram-cache", "ngram-simple" or "draft-model". source: the draft model's file, else "". depth: number of
        tokens to draft in a step; None: the engine's own default.
        """
        ...

    def generate(self, ids: list[int], count: int, put: Put) -> None:
        """Decode at most ``count`` tokens greedily after the prompt ``ids``.

        put: takes new tokens; decoding ends when it returns False.
        """
        ...

    def passes(self, sizes: list[int]) -> dict[str, float]:
        """Time forward passes over several tokens; return {number of tokens, as text: seconds of a pass over them}.

        sizes: the numbers of tokens.
        """
        ...

    def logits(self, ids: list[int], count: int) -> Any:
        """Return the logits that predict each of the last ``count`` tokens of the text ``ids``, float32 [count, V]."""
        ...


@dataclass(frozen=True)
class Peer:
    """An engine that benchmarks can run, in one of its ways to draft.

    engine: "module:Class" of the engine.
    module: the Python module that the engine needs.
    package: the package to install for it.
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
        """Return why the engine cannot run here, as the end of a sentence; "": it can."""
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
    """Return ``model`` if an engine can load this file or folder; raise SpecDecError if it cannot, or it is None.

    name: the engine's name.
    """
    peer = PEERS[name]
    if model is not None and (model.suffix in peer.reads or any((model / kind).is_file() for kind in peer.reads)):
        return model
    raise SpecDecError(f"'{name}' reads a GGUF file, and the model is none; give such a --model")


class Process:
    """A child process that runs an engine and executes commands.

    engine: "module:Class" of the engine. environment: variables in addition to those of this process.
    close: a function that ends the child.
    libraries: resident memory of the child in MB before a model is loaded; None: the system does not tell.
    Raises SpecDecError if the engine does not start.
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
        """Let the child execute a command, and return its result.

        do: name of a method of ``EngineServer``: "load", "generate", "passes" or "logits". given: its arguments, as
        JSON values. Raises SpecDecError if the engine raised an error or the process has ended.
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
        """Return the peak memory of the child in MB; None: the system does not tell.

        field: "VmHWM" is the peak, "VmRSS" the present size.
        """
        return machine.resident(field, self.child.pid)


def _end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()


# --- in the process --------------------------------------------------------------------------------------------------


class EngineServer:
    """The part that runs in the child process: it executes commands with an engine, and times generation."""

    def __init__(self, engine: PeerEngine) -> None:
        self.load, self.passes = engine.load, engine.passes
        self.engine = engine

    def logits(self, ids: list[int], count: int, path: str) -> None:
        """Write the logits that predict each of the last ``count`` tokens of ``ids`` to the file ``path`` (.npy).

        They are float32 [count, V].
        """
        np.save(path, self.engine.logits(ids, count))

    def generate(self, ids: list[int], count: int, eos: list[int]) -> dict[str, Any]:
        """Decode greedily after the prompt ``ids``; return the tokens with their timing as a dict.

        Its keys: "tokens" are at most ``count`` token ids, cut after a token of ``eos``. "arrivals" are the seconds
        from the call to each delivery of tokens. "first" is the number of tokens in the first delivery. "seconds" is
        the duration of the call. Raises ValueError if the engine generates nothing.
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
    """Answer commands on standard input with an engine until the input ends. engine: "module:Class".

    What libraries print goes to stderr.
    """
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
