"""Tuned settings: the drafter that ``specdec tune drafter`` found for a model on this machine.

The data folder has a small JSON file per model, dtype, device, runtime, weights and machine. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from specdec.base.errors import SpecDecError, errors_as
from specdec.base.files import data_dir, make_data_folder, write_atomically
from specdec.base.options import Depth
from specdec.base.settings import Number, checked_class


@checked_class
@dataclass(frozen=True)
class Tuned:
    """The fastest setting. speedup: over plain decoding, on ``prompts`` (the name of a set and their number)."""

    drafter: str
    num_speculative_tokens: Depth
    speedup: Number
    prompts: str


DEFAULTS = {"runtime": "auto", "weights": "auto"}


def tuned_path(
    model: str, dtype: str, device: str, runtime: str, weights: str, adapter: str | os.PathLike[str] | None = None
) -> Path:
    """The file of the setting for a model that is loaded with these options on this machine."""
    options = [_whole(model), dtype, device, runtime, weights, platform.node(), platform.machine()]
    options += [] if adapter is None else [_whole(os.fspath(adapter))]
    return data_dir() / "tuned" / f"{hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]}.json"


def _whole(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).exists() else name


def save_tuned(path: Path, tuned: Tuned) -> None:
    """Save ``tuned``. Raises SpecDecError if the data folder cannot be written."""
    with errors_as(f"cannot write the setting to '{path}'"):
        make_data_folder(path.parent.name)
        write_atomically(path, (json.dumps(asdict(tuned)) + "\n").encode())


def load_tuned(path: Path) -> Tuned | None:
    """The setting in a file; None if it is missing or broken."""
    try:
        return Tuned(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError, SpecDecError):
        return None
