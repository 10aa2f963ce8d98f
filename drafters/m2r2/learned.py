"""What a self-taught drafter keeps between processes: one safetensors file for each model and path, in the data folder.

A file holds sums over states, a count of each token and the projections that serve, no text. Its name is made of the
fingerprint of the model's weights. One process at a time writes it, and notices if it is deleted meanwhile.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock, Timeout
from pydantic import Field, NonNegativeInt, TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.base import files
from specdec.base.errors import SpecDecError, one_line
from specdec.base.terminal import say

VERSION = 3
MOST_BYTES = 4 << 30  # of all files; the oldest go first
PRIOR = 4000  # tokens that what a base model learned counts as for a fine-tune, at most
PATIENCE = 10.0  # seconds that a process waits for another one to change a file


class UnusableError(SpecDecError):
    """Raised for a file of learned sums that is damaged, and so may be overwritten."""


@dataclass
class Progress:
    """How much a drafter that teaches itself has learned from texts; stored in the metadata of its file.

    Some texts are a hold-out set, on which fits are compared. A fit is a solution of the regression that sets the
    parameters of one of the network's two projections.

    model: the latest name of the model; the absolute path of a local model.
    path: the draft path as text (``str(M2R2Path)``); a file of another path is not used.
    tokens: number of tokens learned from.
    texts: number of texts, including the hold-out set.
    fitted: ``tokens`` at the last fit of the second projection.
    based: ``tokens`` at the last fit of the first projection.
    fits: number of fitted networks that have been used to draft.
    since: the first day, YYYY-MM-DD.
    agreement: for each of these networks, ``tokens``, and the share of the hold-out tokens that it drafts correctly.
    version: the version of the file's format.
    adapter: the name of the adapter that is merged into the model; "": there is none.
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
    adapter: str = ""


READ = TypeAdapter(Progress)
Stamp = tuple[tuple[int, int] | None, ...]


def folder() -> Path:
    """Return the path of the folder with the learned files of all models; it need not exist."""
    return files.data_dir() / "learned"


def first_use() -> None:
    """Print to stderr what a drafter that learns keeps and in which folder, unless this folder exists already."""
    if not os.path.exists(folder()):
        say(
            "while the machine is idle, a drafter learns from the texts that the model reads and writes; it keeps sums "
            f"over states and counts of tokens, but no text, in {folder()}; --no-learn (learn=False) turns this off"
        )


def whole_name(model: str) -> str:
    """Return the absolute path of ``model`` if that is a file or folder; other names, such as hub ids, unchanged."""
    return str(Path(model).resolve()) if model and os.path.exists(model) else model


class Store:
    """The file of what was learned for one model's weights and one draft path. Of all processes, one may write it.

    fingerprint (argument): fingerprint of the model's weights, in hexadecimal.
    path (argument): the draft path, as ``str(M2R2Path)``.
    path: path of the file.
    lock: lock that the one process has which may write the file.
    writes: whether this process may write the file (``claim``).
    why_not: reason why the file cannot be written; "": it can.
    """

    def __init__(self, fingerprint: str, path: str) -> None:
        name = hashlib.sha256(f"{fingerprint} {path}".encode()).hexdigest()[:24]
        self.path = folder() / f"{name}.safetensors"
        self.lock = _lock_of(self.path)
        self.writes = False
        self.why_not = ""

    def claim(self) -> bool:
        """Become the process that writes the file; return whether this process is it. Does not wait for its writer.

        False: another process writes the file, or it cannot be written; then ``why_not`` is set.
        """
        if self.writes or self.why_not:
            return self.writes
        try:
            self.path.parent.parent.mkdir(0o700, parents=True, exist_ok=True)  # others cannot enter the data folder
            self.path.parent.mkdir(exist_ok=True)
            with _changing(self.path.parent):
                self.lock.acquire(timeout=0)
                self.writes = True
                _reset_mark(self.path).unlink(missing_ok=True)
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:  # the last one: the file system has no locks
            self.why_not = f"'{self.path.parent}' cannot be written ({one_line(error)})"
        return self.writes

    def take(self, model: str) -> None:
        """Become the process that writes the file. Raises SpecDecError if that fails, with the name ``model`` in it."""
        if not self.claim():
            other = f"another process learns for '{model}', and only one keeps what it learns"
            raise SpecDecError(self.why_not or f"{other}; end it, or start it with --no-learn, and try again")

    def release(self) -> None:
        """Stop being the process that writes the file, so that another one may."""
        self.lock.release()
        self.writes = False

    def leave(self, why: str) -> None:
        """Never write the file from now on. why: the reason, a sentence for ``why_not``."""
        self.why_not = why
        self.release()

    def stamp(self) -> Stamp:
        """Return a value that differs between two states of the file, and before and after ``forget``."""
        return tuple(map(_stamp, (self.path, _reset_mark(self.path))))

    def save(self, progress: Progress, tensors: dict[str, Tensor], since: Stamp | None = None) -> bool:
        """Replace the file atomically; return whether it was written. Raises OSError, or an error of safetensors.

        progress: what goes into its metadata. tensors: what goes into the file, by name.
        since: the last ``stamp()``; if the present one differs, the file was deleted, and is not written. None: it is
            written in any case.
        """
        temporary = _part(self.path)
        try:
            temporary.touch(0o600)
            save_file(tensors, temporary, {"progress": json.dumps(asdict(progress))})
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            with _changing(self.path.parent):
                if since is not None and since != self.stamp():
                    return False
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)
        _bound(self.path)
        return True


def read_progress(path: Path) -> Progress | None:
    """Return the progress that is stored in the file ``path``; None: there is no file.

    Raises UnusableError for a damaged file, SpecDecError if it cannot be read or was written by another version.
    """
    if not os.path.exists(path):
        return None
    with _reading(path) as file:
        text = (file.metadata() or {}).get("progress", "")
        if json.loads(text)["version"] == VERSION:
            return READ.validate_json(text)
    raise SpecDecError(f"'{path}' was written by another version of specdec; 'specdec learn reset' removes it")


def read_tensors(path: Path, like: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the tensors of the file ``path``, which is open until the last one.

    Raises UnusableError for a tensor that is missing, not finite or of another shape, when it is reached; SpecDecError
    for a file that cannot be read.
    like: tensors of the expected shapes, by the names to read; None: all tensors are read, of any shape.
    """
    with _reading(path) as file:
        for name in file.keys() if like is None else like:
            if like is not None and tuple(file.get_slice(name).get_shape()) != like[name].shape:
                raise ValueError(f"the shape of '{name}' is wrong")
            tensor = file.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"'{name}' is not finite")
            yield name, tensor


def as_start(base: Progress, model: str, adapter: str = "") -> tuple[Progress, float]:
    """Return the progress with which a fine-tuned model begins, and the factor by which it multiplies the base's sums.

    The factor is at most 1: the base model's tokens count as ``PRIOR`` tokens if they are more.

    base: the progress of the base model.
    model: name of the fine-tuned model; the absolute path of a local model.
    adapter: name of the adapter that is merged into the base model; "": the model's files have all its weights.
    """
    tokens = min(base.tokens, PRIOR)
    own = Progress(model, base.path, tokens, fitted=tokens, based=tokens, fits=base.fits, adapter=adapter)
    return own, tokens / max(base.tokens, 1)


def begin_from(store: Store, other: Path, model: str) -> None:
    """Let the fine-tuned model ``model`` begin with what its base model has learned: copy file ``other`` to ``store``.

    store: the file of the fine-tuned model, which is replaced. other: path of the base model's file, which must exist.
    model: name of the fine-tuned model. The copied sums count as at most ``PRIOR`` tokens.
    Raises SpecDecError if ``other`` cannot be used, or ``store`` cannot be written.
    """
    progress = read_progress(other)
    assert progress is not None
    own, factor = as_start(progress, model)
    tensors = dict(read_tensors(other))
    for name, tensor in tensors.items():
        if name.startswith("sums."):
            tensor *= factor
    store.take(model)
    try:
        store.save(own, tensors)
    except Exception as error:
        raise SpecDecError(f"'{store.path}' cannot be written: {error}") from None
    finally:
        store.release()


def all_progress() -> list[tuple[Path, Progress | None]]:
    """Return (path, progress) for each file, one for each model and draft path; progress None: it is unusable."""
    found = list[tuple[Path, Progress | None]]()
    for path in _files():
        progress = None
        with suppress(SpecDecError):
            progress = read_progress(path)
        found.append((path, progress))
    return found


def forget(stems: set[str] | None = None) -> bool:
    """Delete learned files. Return whether a running process learns for one of them; that process begins anew.

    Raises SpecDecError if a file cannot be deleted.
    stems: names of the files without suffixes; None: all files.
    """
    learning = False
    if not os.path.exists(folder()):
        return False
    try:
        with _changing(folder()):
            for path in [*_files(), *folder().glob("[!.]*.lock")]:
                if stems is None or path.name.partition(".")[0] in stems:
                    if path.suffix != ".lock":
                        path.unlink(missing_ok=True)
                        continue
                    file, mark = path.with_suffix(""), _reset_mark(path.with_suffix(""))
                    mark.unlink(missing_ok=True)
                    try:
                        with FileLock(path, timeout=0):
                            _part(file).unlink(missing_ok=True)  # left by a process that was killed
                            with suppress(OSError):  # a system may keep what is open
                                path.unlink()
                    except Timeout:
                        mark.touch()
                        learning = True
    except (OSError, NotImplementedError) as error:
        raise SpecDecError(f"cannot delete what was learned in '{folder()}': {one_line(error)}") from None
    return learning


def _files() -> list[Path]:
    """Return the paths of all learned files, sorted by name."""
    return sorted(folder().glob("*.safetensors"))


def _lock_of(path: Path) -> FileLock:
    """Return the lock of the learned file ``path``, not acquired yet; the process that writes the file has it."""
    return FileLock(f"{path}.lock", thread_local=False)


def _part(path: Path) -> Path:
    """Return the path under which the file ``path`` is written before it is renamed."""
    return path.with_name(f".{path.name}.part")


def _reset_mark(path: Path) -> Path:
    """Return the path of the reset mark of a learned file: an empty file PATH.reset beside it.

    ``forget`` writes it while a process learns for that file. The process sees a changed ``Store.stamp``, and begins
    anew. The next process that claims the file deletes the mark.

    path: the learned file, PATH.
    """
    return Path(f"{path}.reset")


@contextmanager
def _changing(folder: Path) -> Iterator[None]:
    """Hold a folder's lock in the ``with`` block, so that one process at a time claims, replaces or deletes its files.

    Waits for other processes; raises OSError after ``PATIENCE`` seconds.
    """
    try:
        with FileLock(folder / ".lock", timeout=PATIENCE):
            yield
    except Timeout as error:
        if error.lock_file != str(folder / ".lock"):
            raise
        raise OSError(f"another process holds '{error.lock_file}'") from None


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a safetensors file for the ``with`` block, as ``safetensors.safe_open`` does.

    Raises UnusableError if the file is damaged, or for any error in the block other than OSError and MemoryError; for
    these, SpecDecError.
    """
    try:
        path.open("rb").close()  # what the system says, which safetensors does not tell from damage
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, MemoryError) as error:
        raise SpecDecError(f"'{path}' cannot be read ({one_line(error)})") from None
    except Exception as error:  # safetensors has errors of its own
        raise UnusableError(f"'{path}' is damaged ({one_line(error)})") from None


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with each new version of the file ``path``: inode and time of change in ns; None: no file."""
    with suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _bound(newest: Path) -> None:
    """Delete the oldest files, but not ``newest``, until the sizes of the rest sum up to at most ``MOST_BYTES``."""
    with suppress(OSError):
        others = sorted(_files(), key=lambda path: -path.stat().st_mtime)
        total = 0
        for path in others:
            total += path.stat().st_size
            if total > MOST_BYTES and path != newest:
                path.unlink()
