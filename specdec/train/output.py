"""The output folder of a training run: checks before it is used, its files, and the checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from specdec.base import files, inputs
from specdec.base.errors import SpecDecError, errors_as
from specdec.models import drafter_folder, source
from specdec.train.card import CARD
from specdec.train.settings import TrainSettings, from_mapping

RECIPE, METRICS, CHECKPOINT = "train.yaml", "metrics.jsonl", "checkpoint.pt"
ANSWERS, TESTS, STATES, LOCK = "answers.jsonl", "evaluation.jsonl", "states", ".lock"
DTYPE = "dtype.json"  # {"dtype": the one that "auto" stands for}
LENGTHS = ("minutes", "steps")  # the settings for the length of a run
# Files that a run writes, replaces and deletes. A folder that holds them without a recipe is refused.
WRITTEN = (drafter_folder.CONFIG, drafter_folder.WEIGHTS, CARD, METRICS, CHECKPOINT, ANSWERS, TESTS, STATES, DTYPE)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn a write error in the ``with`` block, such as a full disk, into a SpecDecError.

    what: names what is written, for the message. folder: where it is written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecDecError(
            f"cannot write {what} to '{folder}': {reason}; free some space and continue with --resume"
        ) from None


def lock_of(settings: TrainSettings) -> FileLock:
    """Return the lock of the output folder of ``settings``, which the process that writes there acquires.

    It is a lock on a file in the folder, and not acquired yet.
    """
    return FileLock(Path(settings.output) / LOCK, timeout=0, thread_local=False)


def open_output(settings: TrainSettings, resume: bool, lock: FileLock | None = None) -> Path:
    """Create the output folder of ``settings``, write its recipe (the settings, ``train.yaml``) and return its path.

    resume: whether the folder may hold a run with the same settings, which is then continued.
    lock: acquired before anything is written; None: this process does not write.
    Raises SpecDecError if the folder holds another run or other files, if another process trains in it, or if it cannot
    be written.
    """
    if not settings.output:
        raise SpecDecError("no output folder; give --output DIR")
    output, own = Path(settings.output), recorded(settings)
    recipe = output / RECIPE
    try:
        if not recipe.exists():
            if there := [name for name in WRITTEN if (output / name).exists()]:
                raise SpecDecError(f"'{output}' holds a '{there[0]}' that no training run wrote; give another --output")
        elif any(path not in (recipe, output / LOCK, output / DTYPE) for path in output.iterdir()):
            _check_same_run(output, own, resume)
        output.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire()
        text = yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        files.write_atomically(recipe, text.encode())
    except Timeout:
        raise SpecDecError(
            f"another process trains in '{output}'; wait for its end, or end it and continue with --resume"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SpecDecError(f"cannot use '{output}' as output folder: {error}") from None
    return output


def _check_same_run(output: Path, own: TrainSettings, resume: bool) -> None:
    """Raise SpecDecError unless the folder ``output`` holds a run with the settings ``own`` and ``resume`` is set.

    own: the settings of this run as ``recorded`` returns them. The device may differ, and minutes or steps may be more.
    """
    recipe = inputs.read_yaml(output / RECIPE)
    if recipe["method"] != own.method:
        raise SpecDecError(f"'{output}' holds a run of 'specdec train {recipe['method']}'; use another --output")
    earlier = from_mapping(type(own), recipe, f"'{output / RECIPE}'")
    if not resume:
        raise SpecDecError(
            f"'{output}' holds a training run; pass --resume to continue it, also with a longer --minutes or "
            "--steps, or give another --output"
        )
    before, now = earlier.model_dump(exclude={"device"}), own.model_dump()  # a run may continue on another device
    if any(before[unit] and now[unit] and now[unit] > before[unit] for unit in LENGTHS):  # a longer run
        before = {key: value for key, value in before.items() if key not in LENGTHS}
    if differs := [f"{key} {value!r} -> {now[key]!r}" for key, value in before.items() if value != now[key]]:
        raise SpecDecError(f"cannot resume '{output}' with other settings: {', '.join(differs)}")


def recorded(settings: TrainSettings) -> TrainSettings:
    """Return a copy of ``settings`` with names instead of local paths, because drafter folders are published.

    These are the model, adapter, files of prompts and drafters; ``output`` becomes "".
    """
    names: dict[str, Any] = {"model": source.public_name(settings.model), "output": ""}
    for key in ("prompts", "holdout", "evaluation"):
        names[key] = tuple(Path(path).name for path in getattr(settings, key))
    if settings.adapter:
        names["adapter"] = source.public_name(settings.adapter)
    for key in ("init", "drafter"):
        if value := getattr(settings, key, ""):
            names[key] = Path(value).resolve().name
    return settings.model_copy(update=names)


def write_checkpoint(output: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in ``output`` atomically. state: tensors and plain values, nested in dicts.

    Raises SpecDecError if the disk is full.
    """
    data = io.BytesIO()
    torch.save(state, data)
    with writing("a checkpoint", output):
        files.write_atomically(output / CHECKPOINT, data.getvalue())


@torch.no_grad()
def read_checkpoint(output: Path, masters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Read the checkpoint in ``output``: restore ``masters`` and ``optimizer``, and return the whole saved state.

    masters: parameters by name, overwritten in place.
    Returns the dict that ``write_checkpoint`` was given, with tensors on the CPU.
    Raises SpecDecError for a damaged file and for the file of another run.
    """
    path, kinds = output / CHECKPOINT, (UnpicklingError, EOFError, KeyError, ValueError, TypeError, RuntimeError)
    with errors_as(f"'{path}' is not a checkpoint of this run; delete it to start anew", *kinds):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        for name, parameter in masters.items():
            parameter.copy_(state["masters"][name])
        optimizer.load_state_dict(state["optimizer"])
    return state
