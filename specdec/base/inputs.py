"""Text from users: read within limits, decoded as UTF-8, parsed as JSON or YAML.

Functions raise ValueError with a short reason, and the caller adds the place; ``prompts`` and ``read_yaml`` raise
SpecDecError. Imports nothing heavy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from specdec.base.errors import SpecDecError, errors_as

LINE = 64_000_000  # bytes of a line, and of a prompt on stdin
DOCUMENT = 4_000_000  # bytes of a YAML file


def read_bounded(file: IO[bytes], most: int) -> bytes:
    """Read ``file`` from its position to its end and return the bytes; ValueError if they are more than ``most``."""
    data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"larger than {most / 1e6:.0f} MB")
    return data


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, line) of a UTF-8 text file, which may be a ``.gz``, without a byte-order mark.

    A line keeps its line break, as "\n". Raises ValueError, while it is iterated, if the file cannot be read, is not
    UTF-8, or has a line of more than 64 MB (``LINE``).
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while data := file.readline(LINE + 1):
                number += 1
                if len(data) > LINE:
                    raise ValueError(f"line {number} is larger than {LINE / 1e6:.0f} MB")
                yield number, data.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(getattr(error, "strerror", None) or str(error)) from None


def prompts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) for each line of a file of prompts that is not empty.

    place: text that names line and file, for messages. record: the line's JSON object, or ``{"prompt": text}`` for a
    line of plain text. Raises SpecDecError for a file that cannot be read or has broken JSON.
    """
    with errors_as(f"cannot read '{path}'", ValueError):
        for number, line in lines(path):
            where, text = f"line {number} of '{path}'", line.strip()
            if text.startswith("{"):
                try:
                    yield where, parse_json(text)
                except ValueError as error:
                    raise SpecDecError(f"{where} is broken JSON ({error}); repair or remove it") from None
            elif text:
                yield where, {"prompt": text}


def turns(record: dict[str, Any]) -> tuple[str, ...]:
    """Return the texts of the user's turns in a record of ``prompts``: its "turns" (a list), else its "prompt".

    Returns () if the record has neither, or a turn is blank or no text.
    """
    found = record.get("turns", record.get("prompt"))
    found = [found] if isinstance(found, str) else found
    if isinstance(found, list) and all(isinstance(turn, str) and turn.strip() for turn in found):
        return tuple(found)
    return ()


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is broken or nested too deeply."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text, with safe types only. Raises ValueError if it is broken."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # constructors of tags and dates raise any type
        raise ValueError(" ".join(str(error).split())) from None


def read_text(path: Path, most: int | None = None) -> str:
    """Return the text of a UTF-8 file.

    A byte-order mark is dropped. Raises OSError if it cannot be read, and ValueError if it is not UTF-8 or has more
    than ``most`` bytes (None: 4 MB).
    """
    with path.open("rb") as file:
        return read_bounded(file, DOCUMENT if most is None else most).decode("utf-8-sig")


def read_yaml(path: Path, what: str = "") -> Any:
    """Return the value in a YAML file. Raises SpecDecError if it cannot be read.

    what: what the file is, with a space at its end, such as "sweep ", in the message; "": the message does not say it.
    """
    with errors_as(f"cannot read {what}'{path}'", ValueError):
        return parse_yaml(read_text(path))
