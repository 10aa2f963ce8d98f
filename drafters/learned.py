"""What a self-taught drafter keeps between processes: one safetensors file for a model and a path, in the cache folder.

It holds sums over states, a count of each token and the fit that serves, no text. One process at a time writes it.
Damaged files and those of other versions are not read: learning starts anew.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from pydantic import Field, NonNegativeInt, TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.base import files
from specdec.base.errors import SpecDecError, one_line
from specdec.base.terminal import say

VERSION = 3
MOST_BYTES = 4 << 30  # of all files; the oldest go first
PRIOR = 4000  # tokens that what a base model learned counts as for a fine-tune, at most


@dataclass
class Progress:
    """How far a drafter has come.

    model: its name. path: the draft path.
    tokens: number of tokens learned from. texts: number of texts, those held out included.
    fitted, based: tokens at the last fit of the second projection, and of the first one.
    fits: number of fits that have served.
    since: the first day.
    agreement: for each fit that served, the tokens learned from and the share of the model's tokens on held-out texts.
    """

    model: str = ""
    path: str = ""
    tokens: NonNegativeInt = 0
    texts: NonNegativeInt = 0
    fitted: NonNegativeInt = 0
    based: NonNegativeInt = 0
    fits: NonNegativeInt = 0
    since: str = field(default_factory=lambda: datetime.date.today().isoformat())
    agreement: list[tuple[NonNegativeInt, Annotated[float, Field(ge=0, le=1)]]] = field(default_factory=list)
    version: int = VERSION


READ = TypeAdapter(Progress)


def folder() -> Path:
    return files.data_dir() / "learned"


def first_use() -> None:
    """Say what is kept, unless something was kept before."""
    if not os.path.exists(folder()):
        say(
            "a drafter learns from the texts written here, while the machine is idle; it keeps sums over states and "
            f"counts of tokens, no text, in {folder()}; --no-learn (learn=False) turns this off"
        )


class Store:
    """The file for the weights of one model and one path.

    writes: whether this process may write it (``claim``).
    """

    def __init__(self, fingerprint: str, path: str) -> None:
        name = hashlib.sha256(f"{fingerprint} {path}".encode()).hexdigest()[:24]
        self.path = folder() / f"{name}.safetensors"
        self.lock, self.writes = FileLock(f"{self.path}.lock"), False

    def claim(self) -> bool:
        """Become the one that writes, unless another process is; False otherwise, and if there can be no file."""
        try:
            files.make_data_folder(self.path.parent.name)
            self.lock.acquire(timeout=0)
            self.writes = True
            for left in self.path.parent.glob(f".{self.path.name}.*"):  # by a process that was killed
                left.unlink()
        except (Timeout, OSError, NotImplementedError):  # the last one: the file system has no locks
            pass
        return self.writes

    def release(self) -> None:
        """Let others write."""
        self.lock.release()
        self.writes = False

    def progress(self) -> Progress | None:
        """What the file says of itself; None if there is none. Raises SpecDecError for one that cannot be used."""
        return read_progress(self.path)

    def stamp(self) -> tuple[int, int] | None:
        """Differs between two states of the file."""
        with suppress(OSError):
            found = self.path.stat()
            return found.st_ino, found.st_mtime_ns
        return None

    def tensors(self, like: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Its tensors of these names. Raises SpecDecError unless each is there, is shaped so, and is finite."""
        try:
            with safe_open(self.path, framework="pt") as file:
                for name, each in like.items():
                    if tuple(file.get_slice(name).get_shape()) != each.shape:
                        raise ValueError(f"'{name}' has another shape")
                    tensor = file.get_tensor(name)
                    if not bool(tensor.isfinite().all()):
                        raise ValueError(f"'{name}' is not finite")
                    yield name, tensor
        except Exception as error:  # safetensors has errors of its own
            raise SpecDecError(f"'{self.path}' cannot be used ({one_line(error)})") from None

    def save(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        """Write the file at once or not at all. Raises an error of the system or of safetensors."""
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, {"progress": json.dumps(asdict(progress))})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        _bound(self.path)


def read_progress(path: Path) -> Progress | None:
    """As ``Store.progress``."""
    if not os.path.exists(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = READ.validate_json((file.metadata() or {}).get("progress", ""))
    except Exception as error:
        raise SpecDecError(f"'{path}' cannot be used ({type(error).__name__})") from None
    if found.version != VERSION:
        raise SpecDecError(f"'{path}' was written by another version of specdec")
    return found


def begin_from(store: Store, other: Path, model: str) -> None:
    """Let ``store``, which is empty, begin with what ``other`` has, for a model that is a fine-tune of that one.

    Its sums then count as at most ``PRIOR`` tokens. Raises SpecDecError if ``other`` cannot be used, or nothing can be
    written.
    """
    progress = read_progress(other)
    assert progress is not None
    tokens = min(progress.tokens, PRIOR)
    tensors = load_file(other)
    for name, tensor in tensors.items():
        if name.startswith("sums."):
            tensor *= tokens / max(progress.tokens, 1)
    own = Progress(model, progress.path, tokens, fitted=tokens, based=tokens, fits=progress.fits)
    if not store.claim():
        raise SpecDecError(f"'{store.path}' cannot be written, or another process learns for '{model}'")
    try:
        store.save(own, tensors)
    except Exception as error:
        raise SpecDecError(f"'{store.path}' cannot be written: {error}") from None
    finally:
        store.release()


def all_progress() -> list[tuple[Path, Progress | None]]:
    """The files of all models, and what they say of themselves (None: they cannot be used)."""
    found = list[tuple[Path, Progress | None]]()
    for path in sorted(folder().glob("*.safetensors")):
        progress = None
        with suppress(SpecDecError):
            progress = read_progress(path)
        found.append((path, progress))
    return found


def _bound(newest: Path) -> None:
    """Delete the oldest files until the others fit ``MOST_BYTES``."""
    with suppress(OSError):
        others = sorted(newest.parent.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
        total = 0
        for path in others:
            total += path.stat().st_size
            if total > MOST_BYTES and path != newest:
                path.unlink()
