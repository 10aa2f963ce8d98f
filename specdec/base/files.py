"""Where files are kept: the cache folder and the data folder. Atomic writing, and the package's YAML files.

Imports nothing heavy.
"""

from __future__ import annotations

import errno
import functools
import importlib.resources
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from specdec.base.errors import SpecDecError, SpecDecWarning, did_you_mean, one_line

# What the two folders hold: every file or folder directly in them.
CACHE = {
    "models": "embedded models, and descriptions and packed weights of GGUF files",
    "downloads": "files that you put there by hand",
    "prompts": "downloaded prompt sets",
    "costs": "what is known about the costs and the acceptance of drafts, by machine, model and drafter",
    "ngram": "the corpus of the package in the tokens of each model",
    "specdec-work": "work in progress",
}
DATA = {
    "learned": "what drafters learned from your texts",
    "ngram": "texts of earlier versions",
    "tuned": "results of `specdec tune drafter`",
    "chat_history": "what you typed in `specdec chat`",
}
# Data that earlier versions kept in the cache folder.
FORMER = ("learned/*.safetensors", "ngram/own-*.ids", "tuned/*.json", "chat_history")


def cache_dir() -> Path:
    """The folder of what can be made again: ``$SPECDEC_CACHE``, else the platform's. It may not exist."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    from platformdirs import user_cache_path

    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    former = (shared if shared.is_absolute() else Path.home() / ".cache") / "specdec"
    found = user_cache_path("specdec", appauthor=False)
    return former if former.is_dir() and not found.is_dir() else found  # they differ on macOS and Windows


def data_dir() -> Path:
    """The folder of what cannot be made again: ``$SPECDEC_DATA``, else ``$SPECDEC_CACHE/data``, else the platform's.

    It may not exist. What an earlier version kept in the cache folder is moved to it, but not from a user's own cache
    folder to one that ``$SPECDEC_DATA`` names, perhaps for one run: a warning then says where it is.
    """
    named, one = os.environ.get("SPECDEC_DATA"), bool(os.environ.get("SPECDEC_CACHE"))
    if named:
        folder = Path(named).expanduser().absolute()
    elif one:
        folder = cache_dir() / "data"
    else:
        from platformdirs import user_data_path

        folder = user_data_path("specdec", appauthor=False)
    _move_former(cache_dir(), folder, not named or one)
    return folder


def make_data_folder(name: str = "") -> Path:
    """A folder of the data folder, made now if it is missing; others than its owner cannot enter the data folder."""
    folder = data_dir()
    folder.mkdir(0o700, parents=True, exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@functools.lru_cache  # once in a process
def _move_former(cache: Path, data: Path, move: bool) -> None:
    """Move what an earlier version kept in the cache folder to the data folder, unless it is there already."""
    found = [path.relative_to(cache) for pattern in FORMER for path in cache.glob(pattern)]
    if not (found := [path for path in found if not (data / path).exists()]):
        return
    if not move:
        names = " and ".join(sorted({path.parts[0] for path in found}))
        warnings.warn(
            f"{names} of an earlier version in '{cache}' are not used: move them to '{data}', which SPECDEC_DATA names",
            SpecDecWarning,
            stacklevel=3,
        )
        return
    from filelock import FileLock  # imports asyncio, which is slow

    try:
        data.mkdir(0o700, parents=True, exist_ok=True)
        with FileLock(data / ".moving.lock"):
            for path in found:
                if not (data / path).exists() and (cache / path).exists():  # else another process has moved it
                    (data / path).parent.mkdir(exist_ok=True)
                    _move(cache / path, data / path)
    except (OSError, NotImplementedError) as error:  # the last one: the file system has no locks
        message = f"cannot move what an earlier version kept in '{cache}' to '{data}': {one_line(error)}; move it there"
        warnings.warn(message, SpecDecWarning, stacklevel=3)


def _move(source: Path, place: Path) -> None:
    """Rename a file, or copy it to another disk; ``place`` is complete or missing at any time."""
    try:
        source.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        os.close(handle)
        try:
            shutil.copy2(source, temporary)
            os.replace(temporary, place)
        finally:
            Path(temporary).unlink(missing_ok=True)
        source.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it, and rename it to ``path``."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def shipped_configs(kind: str) -> dict[str, Path]:
    """The package's YAML files of a kind, "sweeps" or "train", by name."""
    folder = Path(str(importlib.resources.files("specdec.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(kind: str, name: str, what: str) -> Path:
    """The file ``name``, or the package's file of that name. Raises SpecDecError, which names ``what``, for neither."""
    known = shipped_configs(kind)
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise SpecDecError(f"no {what} '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}, or a YAML file")
    return known[name]
