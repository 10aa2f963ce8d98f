"""A trained M2R2 goes on learning: ``specdec train`` runs on the latest texts while nothing is decoded.

It runs in a process of its own, with the lowest priority, one thread and so much processor time a day, on a copy of the
drafter. It stands still while a request is decoded. The copy serves if it accepts more on every eighth of these texts,
from which it does not learn. Texts are in a private temporary folder as long as it runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from specdec.base.errors import SpecDecError, SpecDecWarning, one_line
from specdec.base.memory import free_memory
from specdec.models import drafter_folder
from specdec.models.gguf.blocks import named_weights
from specdec.runtimes.target import Target

from .m2r2_network import M2R2, load_network

QUIET = 120.0  # seconds without a request after which training begins, or goes on
DAY = 24 * 3600.0  # seconds between two runs
LEAST, MOST = 4000, 40_000  # tokens of a run
SHARE = 0.5  # of a run's time is for gradients; the rest is for the states of texts, and for evaluations
HELD_OUT = 0.125  # share of texts
SPARE = 1 << 30  # bytes that a run needs beside the model
CHILD = """
import ctypes, os, resource, sys
os.nice(19)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # it ends with the thread that began it
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv.pop(1)),) * 2)
from specdec.cli import main
main()
"""


class Run:
    """A training process with its folder; both end with this object, or with the Python process.

    answers: prompts and responses.
    """

    def __init__(self, command: list[str], answers: Sequence[tuple[list[int], list[int]]]) -> None:
        folder = tempfile.TemporaryDirectory(prefix="specdec-", ignore_cleanup_errors=True)
        self.folder = Path(folder.name)
        lines = (json.dumps({"prompt_ids": prompt, "response_ids": response}) for prompt, response in answers)
        (self.folder / "answers.jsonl").write_text("\n".join(lines))
        one = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder.name, env=one, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.stopped = False
        self.close = weakref.finalize(self, _end, self.process, folder)

    def pause(self, pause: bool = True) -> None:
        if self.stopped != pause and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP if pause else signal.SIGCONT)
            self.stopped = pause

    def failure(self) -> str:
        """The last line that it wrote, if it failed by itself."""
        if self.process.returncode in (0, -signal.SIGXCPU, -signal.SIGKILL):  # no time is left
            return ""
        lines = (self.folder / "log").read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it wrote nothing")


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    folder.cleanup()


class Refiner:
    """Has the network that serves, and trains copies of it.

    folder: the drafter's folder. minutes: processor time a day.
    version: changes with the network.
    """

    head = None

    def __init__(self, target: Target, folder: Path, minutes: int) -> None:
        if not hasattr(signal, "SIGSTOP") or target.device.type != "cpu":
            raise SpecDecError("a drafter is refined on a CPU under Linux or macOS only; leave out the option 'refine'")
        self.target, self.folder, self.minutes = target, folder, minutes
        self.network, self.version = load_network(target, folder), 1
        self.network.freeze(target)
        self.texts, self.new = deque[tuple[list[int], list[int]]](), 0
        self.run: Run | None = None
        self.used = self.began = -DAY
        self.on = True
        self._loading: threading.Thread | None = None
        self._found: M2R2 | None = None
        self._own: tempfile.TemporaryDirectory[str] | None = None  # has ``folder``, once a copy serves

    def busy(self) -> None:
        """A request is decoded."""
        self.used = time.monotonic()
        if self.run is not None:
            self.run.pause()

    def add(self, ids: Sequence[int], start: int) -> None:
        """Learn from a text, later. start: number of prompt tokens."""
        if len(ids) > start + 1 >= 2:
            self.texts.append(([*ids[:start]], [*ids[start:]]))
            self.new += len(ids)
            while sum(len(part) for text in self.texts for part in text) > MOST:
                self.texts.popleft()

    def work(self) -> bool:
        """Begin, continue or end a run; True if another network serves."""
        if self._loading is not None and not self._loading.is_alive():
            found, self._loading, self._found = self._found, None, None
            self._end_run()
            if found is not None:
                self.network, self.version = found, self.version + 1
                return True
        now = time.monotonic()
        if self.run is None:
            due = self.on and self.new >= LEAST and now - self.began >= DAY
            if due and now - self.used >= QUIET and free_memory(torch.device("cpu")) > SPARE + self._bytes():
                self.began, self.new = now, 0
                try:
                    self.run = Run(self._command(), self.texts)
                except OSError as error:
                    self._stop(one_line(error))
        elif self.run.process.poll() is not None:
            self._loading = self._loading or self._load(self.run)
        elif now - self.used >= QUIET:
            self.run.pause(False)
        return False

    def save(self) -> None:
        """What a run has not finished is lost."""
        self._end_run()

    def _command(self) -> list[str]:
        """The training of a copy."""
        init = str(self.folder.absolute())
        settings = {
            "init": init,
            "eval_fraction": HELD_OUT,
            "eval_minutes": max(SHARE * self.minutes / 3, 3),
            "warmup": 3,
        }
        made = [arg for key, value in settings.items() for arg in ("--set", f"{key}={value}")]
        model = str(self.target.model.config._name_or_path)
        files = ["--prompts", "answers.jsonl", "--output", "out"]
        limit, minutes = str(60 * self.minutes), str(SHARE * self.minutes)
        where = ["--model", os.path.abspath(model) if os.path.exists(model) else model, "--device", "cpu"]
        return [sys.executable, "-c", CHILD, limit, "train", "m2r2", *where, *files, "--minutes", minutes, *made]

    def _bytes(self) -> int:
        """What the model takes in a run: in 16 bits, and in 32."""
        target = self.target
        blocks = [target.block(layer) for layer in range(target.num_layers)]
        own = sum(math.prod(weight.shape) for block in blocks for _, weight in named_weights(block))
        return 6 * (own + target.vocab_size * target.hidden_size)

    def _load(self, run: Run) -> threading.Thread:
        """Read what a run has made, if that accepts more, in a thread: the next step need not wait for it."""

        def load() -> None:
            try:
                made = run.folder / "out"
                if why := run.failure():
                    raise SpecDecError(why)
                if not (made / drafter_folder.CONFIG).exists():
                    return
                trained: Any = drafter_folder.read_config(made, "m2r2").get("training", {})
                if trained.get("updates"):  # else the one it began from accepts more
                    network = load_network(self.target, made)
                    network.draft_vocab = self.network.draft_vocab  # an equal one, whose head is there
                    network.freeze(self.target)
                    self._own = tempfile.TemporaryDirectory(prefix="specdec-", ignore_cleanup_errors=True)
                    for name in (drafter_folder.CONFIG, drafter_folder.WEIGHTS):
                        shutil.copy(made / name, self._own.name)
                    self.folder, self._found = Path(self._own.name), network
            except Exception as error:
                self._stop(one_line(error))

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        return thread

    def _stop(self, why: str) -> None:
        self.on = False
        warnings.warn(f"the drafter is not trained further: {why}", SpecDecWarning, stacklevel=2)

    def _end_run(self) -> None:
        if self.run is not None:
            self.run.close()
            self.run = None
