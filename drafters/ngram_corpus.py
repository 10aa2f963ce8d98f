"""The corpus that a user names for the n-gram drafter: text files in a tokenizer's tokens, sorted to be searched.

It is built once and kept in the cache folder, from which it is mapped. The name of its file is made of the tokenizer
and of the size and the time of change of each text. The file is int32: ``HEADER`` numbers, the tokens, their places in
order.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdec.base import files, inputs, terminal
from specdec.base.errors import SpecDecError, errors_as, one_line
from specdec.speculation.ngram import Ints, SortedTexts

from .corpus import described, tokenised

MOST_TOKENS = 1 << 25  # of a corpus: 268 MB
MOST_BYTES = 64_000_000  # of a file; larger ones are skipped
PIECE = 1 << 16  # characters that are tokenised as one text, at least; and half of the most
HEADER, VERSION = 4, 1  # numbers: VERSION, tokens, files that were read, files that were skipped


@dataclass
class Reading:
    """The text files at a path, and counts of the files that were read and skipped.

    stats: ``os.stat`` of each file, by its path. files, skipped: numbers of files that ``pieces`` has read and skipped.
    """

    stats: dict[Path, os.stat_result]
    files: int = 0
    skipped: int = 0

    def pieces(self, bar: terminal.Bar) -> Iterator[str]:
        """Yield the files' texts in parts, of whole lines unless a line is long (``PIECE``).

        Skips files that are binary, larger than ``MOST_BYTES`` or unreadable. Counts files in ``files`` and
        ``skipped``. bar: shows the megabytes done.
        """
        done, whole = 0, sum(state.st_size for state in self.stats.values()) / 1e6
        for path, state in self.stats.items():
            text = "\0"
            with suppress(OSError, ValueError):
                text = inputs.read_text(path, MOST_BYTES)
            if "\0" in text:
                self.skipped += 1
            else:
                self.files += 1
                start = 0
                while start < len(text):
                    end = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
                    yield text[start:end]
                    start = end
            done += state.st_size
            bar(done / 1e6, round(whole) or 1)


def read_corpus(place: Path, tokenizer: Any, vocab_size: int) -> SortedTexts:
    """Read the texts of a user's corpus; return their tokens, sorted so that n-grams are found. Prints counts of files.

    The result is kept in the cache folder, and read from there while no file has changed.
    Raises SpecDecError if there is no text or no tokenizer, or the tokenizer fails on it.
    place: a UTF-8 text file, or a folder, whose files are read recursively but for hidden ones.
    tokenizer: that of the model; None: there is none. vocab_size: V; ids that are not below it become -1.
    """
    if tokenizer is None:
        raise SpecDecError("a corpus of n-grams needs the model's tokenizer; give SpecDecoder one")
    with errors_as(f"the corpus '{place}' cannot be read"):
        texts = Reading(_stats(place))
    owner, content = _names(place, texts, described(tokenizer), vocab_size)
    path = files.cache_dir() / "ngram" / f"corpus-{owner}-{content}.ids"
    if (found := _mapped(path, vocab_size)) is None:
        try:
            with terminal.Bar(f"reading {place}", "MB") as bar:
                ids = tokenised(texts.pieces(bar), tokenizer, MOST_TOKENS)
        except Exception as error:  # a tokenizer raises what it likes
            raise SpecDecError(f"the corpus '{place}' cannot be tokenised: {one_line(error)}") from None
        ids[ids >= vocab_size] = -1
        with terminal.status(f"sorting {len(ids):,} tokens"):
            order = SortedTexts.sort(ids).view(np.int32)
        found = np.concatenate(([VERSION, len(ids), texts.files, texts.skipped], ids, order), dtype=np.int32)
        with suppress(OSError):  # a cache folder that is full or read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(path, found.tobytes(), 0o600)
            for other in path.parent.glob(f"corpus-{owner}-*.ids"):  # of texts that have changed
                if other != path:
                    other.unlink()
    _, count, read, skipped = found[:HEADER].tolist()
    if not read:
        raise SpecDecError(f"the corpus '{place}' has no text; name a UTF-8 file of up to 64 MB, or a folder of them")
    cut = f"; no more than {MOST_TOKENS:,} are read" if count == MOST_TOKENS else ""
    more = f" ({skipped:,} skipped: binary, unreadable or larger than 64 MB)" if skipped else ""
    terminal.say(f"n-grams of '{place}': {count:,} tokens of {read:,} files{more}{cut}")
    return SortedTexts(found[HEADER : HEADER + count], found[HEADER + count :].view(np.uint32))


def _stats(place: Path) -> dict[Path, os.stat_result]:
    """Return ``os.stat`` of the file ``place``, or of all files in the folder ``place`` and below it, by their paths.

    Hidden files and folders, and links in the folder, are left out. Raises OSError if ``place`` does not exist.
    """
    found = {place: place.stat()}
    if place.is_dir():
        found = {}
        for folder, folders, names in os.walk(place):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                with suppress(OSError):
                    found[path] = path.lstat()
    return {path: state for path, state in found.items() if stat.S_ISREG(state.st_mode)}


def _names(place: Path, texts: Reading, tokenizer: str, vocab_size: int) -> tuple[str, str]:
    """Return (owner, content), two parts of the cached file's name, 16 hexadecimal digits each.

    owner: hash of the corpus as the user names it: of the path ``place``, the tokenizer and ``vocab_size``.
    content: hash of the state of its files: of their paths, sizes and times of change. A cached file of the same owner
        with another content is out of date.

    texts: the files. tokenizer: text that identifies the tokenizer (``corpus.described``). vocab_size: V.
    """
    owner = hashlib.sha256(f"{place.resolve()}\n{vocab_size}\n{tokenizer}".encode(errors="surrogateescape"))
    content = hashlib.sha256(repr((VERSION, MOST_TOKENS)).encode())
    for path, state in texts.stats.items():
        content.update(repr((os.fsencode(path.relative_to(place)), state.st_size, state.st_mtime_ns)).encode())
    return owner.hexdigest()[:16], content.hexdigest()[:16]


def _mapped(path: Path, vocab_size: int) -> Ints | None:
    """Map a cached file into memory, and return all its numbers, int32 [n]; None: it is missing or damaged.

    They are ``HEADER`` numbers, the token ids, and the indices of all tokens in sorted order. All are checked to be in
    range. vocab_size: V, which the token ids must be below.
    """
    try:
        found = np.memmap(path, np.int32, "r")
        version, count, *_ = found[:HEADER].tolist()
        ids, order = found[HEADER : HEADER + count], found[HEADER + count :].view(np.uint32)
        fits = version == VERSION and len(ids) == len(order) == count > 0
        return found if fits and ids.min() >= -1 and ids.max() < vocab_size and order.max() < count else None
    except (OSError, ValueError):
        return None
