"""The cache folder and the data folder, atomic writing, and the package's YAML files. Imports nothing heavy."""

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
    "ngram": "the corpus of the package, and those of `--ngram-corpus`, in the tokens of each model",
    "specdec-work": "work in progress",
}
DATA = {
    "learned": "what drafters learned from your texts",
    "ngrams": "the tokens of earlier requests, with `--keep-ngrams`",
    "chat_history": "what you typed in `specdec chat`",
}


def cache_dir() -> Path:
    """Return the folder for files that can be made again, which may not exist.

    It is ``$SPECDEC_CACHE``, else the platform's cache folder.
    """
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("specdec", appauthor=False)


def data_dir() -> Path:
    """Return the folder for files that cannot be made again, which may not exist.

    It is ``$SPECDEC_DATA``, else ``$SPECDEC_CACHE/data``, else the platform's data folder.
    """
    if named := os.environ.get("SPECDEC_DATA"):
        return Path(named).expanduser().absolute()
    if os.environ.get("SPECDEC_CACHE"):
        return cache_dir() / "data"
    from platformdirs import user_data_path

    return user_data_path("specdec", appauthor=False)


def make_data_folder(name: str = "") -> Path:
    """Return the folder ``name`` inside the data folder, created if it is missing; "": the data folder itself.

    A new data folder can be entered by its owner alone.
    """
    folder = data_dir()
    folder.mkdir(0o700, parents=True, exist_ok=True)
    (folder / name).mkdir(exist_ok=True)
    return folder / name


def write_atomically(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write ``data`` to the file ``path`` so that a reader sees the old or the new content, and never a part.

    The data go to a temporary file in the same folder, which is synced and renamed. mode: the permissions of the file.
    Raises OSError.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def size_of(*paths: Path) -> int:
    """Return the size in bytes of files, and of folders with all that is in them, without following links.

    Files that vanish do not count.
    """
    size = 0
    for path in paths:
        for file in (path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)):
            with suppress(OSError):
                found = file.lstat()
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return size


def shipped_configs(kind: str) -> dict[str, Path]:
    """Return {name without ".yaml": path} of the YAML files that the package contains, sorted by name.

    kind: their folder in ``specdec.configs``: "sweeps" or "train".
    """
    folder = Path(str(importlib.resources.files("specdec.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(kind: str, name: str, what: str) -> Path:
    """Return the path of a YAML file: ``name`` itself if it is a file, else the package's file of this name.

    name: a path with its suffix, or the name of a package's file without ".yaml".
    kind: the folder of the package's files, "sweeps" or "train". what: what the file is, such as "sweep", in the
    message of the SpecDecError that is raised if there is no such file.
    """
    known = shipped_configs(kind)
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise SpecDecError(f"no {what} '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}, or a YAML file")
    return known[name]
