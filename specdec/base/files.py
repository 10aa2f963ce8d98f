"""Where files are kept: the cache folder and the data folder. Atomic writing, and the package's YAML files.

Imports nothing heavy.
"""

from __future__ import annotations

import importlib.resources
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from specdec.base.errors import SpecDecError, did_you_mean

# What the two folders hold: every file or folder directly in them.
CACHE = {
    "models": "embedded models, and descriptions and packed weights of GGUF files and model folders",
    "downloads": "files that you put there by hand",
    "prompts": "downloaded prompt sets",
    "costs": "what is known about the costs and the acceptance of drafts, by machine, model and drafter",
    "ngram": "the corpus of the package in the tokens of each model",
    "specdec-work": "work in progress",
}
DATA = {
    "learned": "what drafters learned from your texts",
    "chat_history": "what you typed in `specdec chat`",
}


def cache_dir() -> Path:
    """The folder of what can be made again: ``$SPECDEC_CACHE``, else the platform's. It may not exist."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("specdec", appauthor=False)


def data_dir() -> Path:
    """The folder of what cannot be made again: ``$SPECDEC_DATA``, else ``$SPECDEC_CACHE/data``, else the platform's.

    It may not exist.
    """
    if named := os.environ.get("SPECDEC_DATA"):
        return Path(named).expanduser().absolute()
    if os.environ.get("SPECDEC_CACHE"):
        return cache_dir() / "data"
    from platformdirs import user_data_path

    return user_data_path("specdec", appauthor=False)


def make_data_folder(name: str = "") -> Path:
    """A folder of the data folder, made now if it is missing; others than its owner cannot enter the data folder."""
    folder = data_dir()
    folder.mkdir(0o700, parents=True, exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    return folder / name


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


def size_of(*paths: Path) -> int:
    """Bytes of files, also of those in folders, without following links. Files that vanish do not count."""
    size = 0
    for path in paths:
        for file in (path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)):
            with suppress(OSError):
                found = file.lstat()
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


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
