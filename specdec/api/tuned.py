"""Tuned settings: what ``specdec tune drafter`` found for a model on this machine, kept for ``specdec generate``.

One small JSON file per model, dtype, device, runtime, weights and machine, in the cache folder. Imports nothing heavy.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from specdec.base.errors import SpecDecError
from specdec.base.files import cache_dir, write_atomically
from specdec.base.options import Depth


@dataclass(frozen=True)
class Tuned:
    """The fastest setting. speedup: over plain decoding, on ``prompts`` (name of the set, and how many of it)."""

    drafter: str
    num_speculative_tokens: Depth
    speedup: float
    prompts: str


DEFAULTS = {"runtime": "auto", "weights": "auto"}


def tuned_path(model: str, dtype: str, device: str, runtime: str, weights: str) -> Path:
    """The file of the setting for a model, loaded so, on this machine."""
    local = Path(model)
    name = str(local.resolve()) if local.exists() else model
    what = json.dumps([name, dtype, device, runtime, weights, platform.node(), platform.machine()])
    return cache_dir() / "tuned" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"


def save_tuned(path: Path, tuned: Tuned) -> None:
    """Keep ``tuned``. Raises SpecDecError if the cache folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asdict(tuned)) + "\n").encode())
    except OSError as error:
        raise SpecDecError(f"cannot keep the setting in '{path}': {error.strerror or error}") from None


def load_tuned(path: Path) -> Tuned | None:
    """The setting in a file; None if there is none that can be read."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        depth = kept["num_speculative_tokens"]
        good = depth == "auto" or (type(depth) is int and depth >= 1)
        return Tuned(str(kept["drafter"]), depth, float(kept["speedup"]), str(kept["prompts"])) if good else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
