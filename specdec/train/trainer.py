"""``train``: from prompts to a drafter folder. Every part of a run resumes where a killed run stopped.

The base model answers the prompts that have no answers, its states are computed once, and closed-form regression and
gradient training follow (``specdec.train.run``). The base model is frozen, and only answer positions count.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from rich.console import Console

from specdec.api.decoder import SpecDecoder
from specdec.api.prompts import encode
from specdec.base import inputs, machine
from specdec.base.errors import SpecDecError, errors_as
from specdec.base.files import write_atomically
from specdec.base.terminal import stderr, tell
from specdec.bench.prompts import evenly_spaced
from specdec.models import drafter_folder, loading
from specdec.models.native_model import empty_model
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.generation_config import eos_token_ids
from specdec.train import data, states
from specdec.train.answers import answer_prompts, known_answers
from specdec.train.method import RunContext, lookup
from specdec.train.output import ANSWERS, CHECKPOINT, DTYPE, STATES, TESTS, lock_of, open_output, writing
from specdec.train.progress import RunProgress, describe, expected_seconds
from specdec.train.run import TrainingRun
from specdec.train.settings import TrainSettings

PATIENCE = timedelta(days=2)  # the first process may answer prompts and compute states for long


def train(
    settings: TrainSettings, resume: bool = False, console: Console | None = None, preset: str = "(none)"
) -> dict[str, Any]:
    """Train a drafter, write the best one to ``settings.output`` and return its figures on held-out answers.

    The figures are those of the method's ``TrainingMethod.evaluate``. The call returns when the training has ended.
    resume: whether to continue an interrupted run in this folder. Finished work stays on the disk.
    console: shows progress; None: standard error. preset: name of the settings' preset, for the output.
    Raises SpecDecError for unusable settings, prompts, models and folders, for a full disk and for a loss that becomes
    NaN; KeyboardInterrupt at Ctrl-C.
    """
    console, lock, device = console or stderr(), lock_of(settings), loading.find_device(settings.device)
    processes = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    first = processes.is_main_process
    device = device if processes.num_processes == 1 else processes.device
    console.quiet |= not first
    if settings.rows < processes.num_processes:
        raise SpecDecError(
            f"{processes.num_processes} processes cannot share batches of {settings.rows} rows; raise 'rows'"
        )
    try:
        with RunProgress(console) as progress:
            with processes.main_process_first():  # the others read what the first one computes
                write = lock if first else None
                run = _prepare(settings, resume or not first, progress, processes, device, write, preset)
            return run.train(resume)
    finally:
        lock.release()
        processes.destroy_process_group()


def _prepare(
    settings: TrainSettings,
    resume: bool,
    progress: RunProgress,
    processes: PartialState,
    device: torch.device,
    lock: FileLock | None,
    preset: str,
) -> TrainingRun:
    """Do all of a run that comes before gradient training, and return the run, ready to train.

    That is: check the settings, load the model, answer the prompts, choose the draft vocabulary and compute the states.
    resume: whether to continue an earlier run in the output folder. progress: shows each part.
    processes: the processes that train together. device: where this one loads the model.
    lock: that of the output folder, which this process acquires; None: this process does not write.
    preset: where the settings come from, for the line that says how long the run takes.
    Raises SpecDecError as ``train`` does.
    """
    # Checks that need no model come first.
    items = data.read(settings.prompts)
    tests, held = (data.read(some) if some else [] for some in (settings.evaluation, settings.holdout))
    tests = evenly_spaced(tests, settings.eval_answers)
    output = open_output(settings, resume, lock)
    keep_freed_memory()
    dtype = "bfloat16" if settings.dtype == "auto" else settings.dtype
    model, tokenizer = loading.load(settings.model, dtype=dtype, device=device, adapter=settings.adapter)
    decoder = SpecDecoder(model, tokenizer, drafter="none")  # as users run it, so its states are theirs
    target = open_target(model, settings, output, resume)
    if settings.init:
        _note_other_base(settings.init, target, progress.console)
    method = lookup(settings.method)(settings, target)
    wanted = method.teacher_states()
    states.check_layers(target, wanted)
    data.check_token_ids(items, target.vocab_size)
    data.check_token_ids(tests, target.vocab_size, "evaluate on")
    reading = partial(encode, tokenizer), partial(tokenizer.decode, skip_special_tokens=True)
    data.check_holdout(items, [*tests, *held], *reading)
    known, tried = (known_answers(output / name, decoder, some) for name, some in ((ANSWERS, items), (TESTS, tests)))
    if not progress.console.quiet and not (resume and (output / CHECKPOINT).exists()):
        seconds = expected_seconds(settings, [*known, *tried], decoder.target, target)
        tell(progress.console, describe(seconds, settings, preset))
        progress.plan(seconds)
    tried = answer_prompts(output / TESTS, decoder, tried, settings, progress)
    known = answer_prompts(output / ANSWERS, decoder, known, settings, progress)
    train, held_out = (data.usable(some, target.context) for some in (known, tried))
    if not tests:
        train, held_out = data.split(train, settings.eval_fraction)
    if not train or not held_out:
        raise SpecDecError("all answers to train on, or to evaluate on, are empty or too long; give more prompts")
    random.Random(settings.seed).shuffle(train)
    held_out = evenly_spaced(held_out, settings.eval_answers)
    vocab = None
    if settings.init:  # its vocabulary was chosen on more answers
        vocab = drafter_folder.read_vocabulary(Path(settings.init), target.vocab_size)
    elif settings.draft_vocab:
        ends = sorted(eos_token_ids(model, tokenizer))
        chosen = data.draft_vocabulary(train, settings.draft_vocab, ends, target.vocab_size)
        vocab = torch.tensor(chosen, dtype=torch.int32)
    vocab = None if vocab is None else vocab.to(target.device)
    method.prepare(RunContext(output, train, decoder.target, progress))
    parts = {"train": train, "eval": held_out}
    records = [
        states.compute_states(output / STATES / name, decoder.target, part, wanted, progress, name)
        for name, part in parts.items()
    ]
    kinds = [answer.kind for answer in held_out]
    return TrainingRun(method, vocab, records[0], records[1], kinds, output, progress, processes)


def _note_other_base(init: str, target: Target, console: Console) -> None:
    """Print a note to ``console`` if the drafter in the folder ``init`` was trained for another model than ``target``.

    That is no error: training may start from its weights.
    """
    config = drafter_folder.read_config(Path(init))
    try:
        drafter_folder.check_base(config, target, init)
    except SpecDecError:
        other = config.get("base", {}).get("name", "another model")
        tell(console, f"'{init}' was trained for {other}, not for this model; it is only where training starts")


def open_target(model: Any, settings: TrainSettings, output: Path, resume: bool = False) -> Target:
    """Return the runtime to train in, for ``model`` or for a float32 copy of it.

    The copy is loaded if the setting ``dtype`` is "auto", the model is on a CPU that multiplies float32 matrices faster
    than bfloat16 ones, and the memory suffices. The choice is kept in ``output`` for all processes of the run.
    model: the base model, already loaded. settings: name the model and the dtype to train in.
    output: the output folder. resume: whether to take the choice that is there.
    """
    if settings.dtype == "auto" and model.device.type == "cpu":
        kept = output / DTYPE
        if not (resume and kept.exists()):
            choice = {"dtype": "float32" if float32_is_faster() and _float32_fits(model) else "bfloat16"}
            with writing("the dtype", output):
                write_atomically(kept, (json.dumps(choice) + "\n").encode())
        with errors_as(f"'{kept}' is broken; delete it", ValueError, KeyError, TypeError):
            dtype = inputs.parse_json(kept.read_bytes())["dtype"]
        if dtype == "float32":
            model, _ = loading.load(settings.model, dtype="float32", device="cpu", adapter=settings.adapter)
    return training_target(model)


def _float32_fits(model: Any) -> bool:
    """Return whether the memory suffices for a float32 copy of ``model`` beside it."""
    need = 4 * sum(parameter.numel() for parameter in empty_model(model.config, torch.float32).parameters())
    free = machine.available_memory()
    return free is None or free > 3 * need  # the copy's matrices are stacked


def float32_is_faster() -> bool:
    """Measure whether this CPU multiplies float32 matrices faster than bfloat16 ones: the least of three times each."""
    seconds = dict[torch.dtype, float]()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(512, 1024, dtype=dtype)
        seconds[dtype] = math.inf
        for _ in range(3):
            start = time.perf_counter()
            x @ x.T
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return seconds[torch.float32] < seconds[torch.bfloat16]


def training_target(model: Any) -> Target:
    """Return a runtime for ``model`` that computes gradients. Raises SpecDecError for unsupported models."""
    try:
        return TorchTarget(model, packs=False)
    except SpecDecError:
        return TransformersTarget(model)


def keep_freed_memory() -> None:
    """Make glibc reuse large blocks of memory instead of returning them to the system, in the whole process.

    Fresh pages would cost more than the arithmetic on them. No effect without glibc.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its maximum
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
            mallopt(-2, 256 << 20)  # M_TOP_PAD
