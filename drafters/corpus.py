"""The corpus of the n-gram drafter, in a tokenizer's tokens: texts of the package, and behind them the user's own.

The former are kept in the cache folder and the latter in the data folder, under names made of the tokenizer, as int32:
the texts one behind the other, a -1 before each and at the end. What is missing, damaged or too large makes the corpus
smaller; no request fails by it.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import lzma
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from specdec.base import files, inputs
from specdec.base.errors import SpecDecError, SpecDecWarning, one_line, reported
from specdec.speculation.ngram import Ints

SHIPPED = "pretrained/ngram/corpus.txt.xz"  # texts, one behind the other, a NUL between them
MOST, MOST_OWN = 1 << 20, 1 << 19  # tokens of a corpus, and of the user's texts in it
MOST_BYTES = 1 << 24  # of the package's texts, unpacked
Progress = Callable[[int, int], None]
PIECE, BATCH = 1 << 16, 64  # most characters of a text, and texts, that are tokenised at once


def corpus(tokenizer: Any, vocab_size: int) -> Ints:
    """The corpus for a model with that tokenizer, at most ``MOST`` tokens; the user's texts take the place of others.

    Empty, but for one -1, if the tokenizer cannot read it: a vocabulary of words may lack an unknown token.
    """
    found, packed = np.array([-1], np.int32), b""
    with suppress(OSError):
        packed = importlib.resources.files("specdec.drafters").joinpath(SHIPPED).read_bytes()
    with suppress(Exception):  # a tokenizer raises what it likes
        own, kept = _read(path_for(tokenizer)), _read(path_for(tokenizer, packed))
        if kept is None:
            kept = tokenised(_unpacked(packed), tokenizer, MOST)
            with suppress(OSError):
                _write(path_for(tokenizer, packed), kept)
        found = kept if own is None else np.concatenate((kept[: MOST - len(own)], own))
    found[found >= vocab_size] = -1
    return found


def tokenised(texts: Iterable[str], tokenizer: Any, most: int, progress: Progress = lambda done, total: None) -> Ints:
    """``texts`` in tokens, as many as fit ``most``; ``progress`` is called with the tokens so far and ``most``."""
    found, texts = list[int](), iter(texts)
    while len(found) < most and (batch := list(islice(texts, BATCH))):
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            found += [-1, *ids]
        progress(min(len(found), most), most)
    return np.array([*found[: most - 1], -1], np.int32)


def save_own(texts: Iterable[str], tokenizer: Any, progress: Progress) -> bool:
    """Make ``texts`` the user's own for models with that tokenizer, instead of earlier ones; whether all of them fit.

    Raises SpecDecError if there are none, the tokenizer cannot read them or the data folder cannot be written.
    """
    try:
        ids = tokenised(texts, tokenizer, MOST_OWN, progress)
    except SpecDecError:
        raise
    except Exception as error:
        raise SpecDecError(f"the model's tokenizer cannot read these texts: {one_line(error)}") from None
    if (ids < 0).all():
        raise SpecDecError("there is no text in these files; give some that are like what the model shall write")
    path = path_for(tokenizer)
    with reported(f"cannot keep the texts in '{path}'"):
        files.make_data_folder(path.parent.name)
        _write(path, ids)
    return len(ids) < MOST_OWN


def reset(tokenizer: Any) -> None:
    """Undo ``save_own``. Raises SpecDecError if the data folder cannot be written."""
    with reported(f"cannot delete '{path_for(tokenizer)}'"):
        path_for(tokenizer).unlink(missing_ok=True)


def own_tokens(tokenizer: Any) -> int:
    """How many tokens of the user's texts are counted for models with that tokenizer."""
    found = _read(path_for(tokenizer))
    return 0 if found is None else int((found >= 0).sum())


def path_for(tokenizer: Any, packed: bytes | None = None) -> Path:
    """The file of the user's texts, or of the ``packed`` ones, for a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
    name = hashlib.sha256((packed or b"") + described.encode()).hexdigest()[:24]
    return own_folder() / f"own-{name}.ids" if packed is None else files.cache_dir() / "ngram" / f"shipped-{name}.ids"


def own_folder() -> Path:
    return files.data_dir() / "ngram"


def _read(path: Path) -> Ints | None:
    """What ``_write`` wrote; None if there is nothing, or something else."""
    try:
        if path.stat().st_size > 4 * MOST:
            return None
        ids = np.fromfile(path, "<i4").astype(np.int32)
    except OSError:
        return None
    return ids if len(ids) and ids[-1] == -1 == ids.min() else None


def _write(path: Path, ids: Ints) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, ids.astype("<i4").tobytes())


def _unpacked(packed: bytes) -> list[str]:
    """The texts of the package; those before the damage, with a warning, where it is damaged."""
    unpacker, data = lzma.LZMADecompressor(), b""
    try:
        data = unpacker.decompress(packed, MOST_BYTES)
        if unpacker.eof:
            return data.decode().split("\0")
        reason = "it is too large or truncated"
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        reason = one_line(error)
    message = f"the corpus of the n-gram drafter is damaged ({reason}); install specdec again"
    warnings.warn(message, SpecDecWarning, stacklevel=2)
    return data.decode(errors="ignore").split("\0")


def read(path: Path) -> Iterator[str]:
    """The texts of a file: of ``.jsonl`` the text, prompt, turns or messages of each line; others are plain text.

    ``.gz`` is unpacked. Texts longer than ``PIECE`` characters come in pieces. Raises SpecDecError for what is not
    UTF-8, has too long lines or cannot be read, and for a record without text, with its line.
    """
    if Path(path.name.removesuffix(".gz")).suffix != ".jsonl":
        yield from _plain(path)
        return
    for where, record in inputs.prompts(path):
        if not (found := _texts(record)):
            raise SpecDecError(f"{where} has no usable 'text', 'prompt' or 'messages'; repair or remove it")
        for text in found:
            yield from _pieces(text)


def _plain(path: Path) -> Iterator[str]:
    text = ""
    with reported(f"cannot read '{path}'", ValueError):
        for _, line in inputs.lines(path):
            text += line
            if len(text) >= PIECE:
                yield from _pieces(text)
                text = ""
    if text.strip():
        yield text


def _pieces(text: str) -> Iterator[str]:
    return (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def _texts(record: Mapping[str, Any]) -> list[str]:
    messages = record.get("messages")
    found = [record.get("text"), *inputs.turns(dict(record))]
    found += [each.get("content") for each in messages if isinstance(each, dict)] if isinstance(messages, list) else []
    return [text for text in found if isinstance(text, str) and text.strip()]
