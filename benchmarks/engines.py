"""Engines that are measured beside each other, each in a process of its own that idles while another runs.

A child reads a command from each line of standard input and answers with a line, both JSON:

    load      path, threads, context, draft     -> seconds, and what the engine reports of itself
                                                   (draft: a draft model's file, for llama.mjs alone)
    generate  ids, count, stop                  -> tokens (greedy), prefill and decode seconds
    passes    rows                              -> seconds of a pass over so many tokens; {} where no call does that

llama.cpp comes from node-llama-cpp (``llama.mjs``) or llama-cpp-python. Separate processes also keep apart engines that
configure the CPU's tile registers, each for itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from memory import resident

HERE = Path(__file__).parent
CONTEXT = 2048


class EngineError(Exception):
    """An engine could not do what it was asked for."""


class Engine:
    """A child process that runs an engine."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self._answer()  # it is ready
        self.libraries = resident("VmRSS", self.process.pid)  # MB

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries may print, too
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise EngineError(answer["error"])
                return answer
        raise EngineError(f"the process ended with code {self.process.wait()}")

    @property
    def peak(self) -> float:
        """Peak resident size in MB."""
        return resident("VmHWM", self.process.pid)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def specdec(**environment: str) -> Engine:
    return Engine([sys.executable, __file__, "specdec"], **environment)


def llama_cpp(folder: Path | None) -> Engine:
    """llama.cpp from node-llama-cpp in ``folder``, else from llama-cpp-python. Raises EngineError if neither is there.

    The folder is one in which ``npm install --ignore-scripts node-llama-cpp`` has run.
    """
    if folder is not None:
        node = shutil.which("node")
        if node is None or not (folder / "node_modules" / "node-llama-cpp").is_dir():
            raise EngineError(f"needs Node.js, and node-llama-cpp in '{folder}' (npm install --ignore-scripts)")
        return Engine([node, str(HERE / "llama.mjs"), str(folder.absolute())])
    if importlib.util.find_spec("llama_cpp") is None:
        raise EngineError("not installed; name a folder with node-llama-cpp by --peer, or install llama-cpp-python")
    return Engine([sys.executable, __file__, "llama-cpp-python"])


# -- the child ----------------------------------------------------------------------------------------------------


class Server(Protocol):
    def load(self, path: str, threads: int, context: int) -> dict[str, Any]: ...
    def generate(self, ids: list[int], count: int, stop: bool) -> dict[str, Any]: ...
    def passes(self, rows: list[int]) -> dict[str, Any]: ...


class Specdec:
    def __init__(self) -> None:
        import torch
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # the libraries' own lazy parts

        from specdec import SpecDecoder

        self.torch, self.kind = torch, SpecDecoder

    def load(self, path: str, threads: int, context: int) -> dict[str, Any]:
        self.torch.set_num_threads(threads)
        self.decoder = self.kind.from_pretrained(path, drafter="none", device="cpu")
        target: Any = self.decoder.target
        return {"runtime": target.runtime, "storage": target.storage, "bytes_read": getattr(target, "bytes_read", None)}

    def generate(self, ids: list[int], count: int, stop: bool) -> dict[str, Any]:
        out = self.decoder.generate(ids, max_new_tokens=count, ignore_eos=not stop)
        spent = out.metrics
        return {"tokens": out.token_ids, "prefill": spent.prefill_seconds, "decode": spent.decode_seconds}

    def passes(self, rows: list[int]) -> dict[str, Any]:
        from specdec.engine import costs

        seconds = costs.time_scoring(self.decoder.target)
        return {str(count): seconds[count] for count in rows}


class LlamaCppPython:
    def __init__(self) -> None:
        from llama_cpp import Llama

        self.kind = Llama

    def load(self, path: str, threads: int, context: int) -> dict[str, Any]:
        self.llm = self.kind(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
        return {"runtime": "llama-cpp-python"}

    def generate(self, ids: list[int], count: int, stop: bool) -> dict[str, Any]:
        self.llm.reset()
        tokens, start = list[int](), time.perf_counter()
        first = start
        for token in self.llm.generate(ids, temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(token)
            if len(tokens) == count or (stop and token == self.llm.token_eos()):
                break
        return {"tokens": tokens, "prefill": first - start, "decode": time.perf_counter() - first}

    def passes(self, rows: list[int]) -> dict[str, Any]:
        return {}


SERVERS: dict[str, type[Server]] = {"specdec": Specdec, "llama-cpp-python": LlamaCppPython}


def serve(name: str) -> None:
    server = SERVERS[name]()
    print("{}", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        try:
            answer = getattr(server, command.pop("do"))(**command)
            answer["seconds"] = time.perf_counter() - start
        except Exception as error:  # whatever an engine raises is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
