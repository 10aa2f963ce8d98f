"""What the n-gram drafter keeps of earlier requests between processes, where a user asks for it.

A file for each scope and tokenizer in the data folder holds the latest tokens of its requests, which only its owner can
read: ``MAGIC``, a check sum, and the tokens as int32, with a -1 behind each request. Its name is a hash.
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
import zlib
from collections.abc import Sequence

import numpy as np

from specdec.base import files
from specdec.base.errors import SpecDecWarning, errors_as, one_line
from specdec.speculation.ngram import Ints

MAGIC = b"specdec1"
MOST_TOKENS = 1 << 20  # of a file
MOST_FILES = 256  # the oldest are deleted
KEEP_EVERY = 60.0  # least seconds between two writes of a file, but at the end
LOCK, LOCK_SECONDS = ".ngrams.lock", 10.0  # held while a file is written; how long to wait for it


class KeptTexts:
    """The tokens of earlier requests of one scope, in a file. The first error makes a warning; later ones are ignored.

    Processes may share a file: each adds its own requests to what is there.

    tokenizer: text that identifies the tokenizer (``corpus.described``).
    scope: name of the tenant whose requests these are, and whose drafts alone use them; None: the default tenant.
    size: maximum number of tokens in the file.
    vocab_size: number of the tokenizer's tokens.
    path: path of the file. alone: lock that a process holds while it writes. pending: the tokens that are not in the
        file yet. every: least seconds between two writings. written: time of the last writing, in seconds of
        ``time.monotonic``. warned: whether there was a warning.
    """

    def __init__(self, tokenizer: str, scope: str | None, size: int, vocab_size: int) -> None:
        from filelock import FileLock  # imports asyncio, which is slow

        name = hashlib.sha256(repr((scope, vocab_size, tokenizer)).encode()).hexdigest()[:32]
        self.path = files.data_dir() / "ngrams" / f"{name}.ids"
        self.size, self.vocab_size = min(size, MOST_TOKENS), vocab_size
        self.alone = FileLock(files.data_dir() / LOCK, timeout=LOCK_SECONDS)
        self.pending, self.lock = list[int](), threading.Lock()
        self.warned, self.written, self.every = False, time.monotonic(), KEEP_EVERY

    def read(self) -> Ints:
        """Return the token ids in the file, int32 [n]; empty if there is no file, or, with a warning, a damaged one."""
        try:
            if self.path.stat().st_size > len(MAGIC) + 4 + 4 * MOST_TOKENS:
                raise ValueError("it is too large")
            data = self.path.read_bytes()
            head, ids = data[: len(MAGIC) + 4], np.frombuffer(data[len(MAGIC) + 4 :], "<i4").astype(np.int32)
            if head != _head(data[len(head) :]) or (len(ids) and not -1 <= ids.min() <= ids.max() < self.vocab_size):
                raise ValueError("its check sum or its tokens are wrong")
            return ids[-self.size :]
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self._warn(f"'{self.path}' is not used and is written anew: {one_line(error)}")
        return np.empty(0, np.int32)

    def add(self, ids: Sequence[int]) -> None:
        """Add the token ids of a request; they are written to the file now or by a later ``add`` or ``save``."""
        with self.lock:
            self.pending += [*ids, -1]
            del self.pending[: -self.size]
        if time.monotonic() - self.written >= self.every:
            self.save()

    def close(self) -> None:
        """Save, and let each later ``add`` write at once, because nothing else will save this object again."""
        self.every = 0.0
        self.save()

    def save(self) -> None:
        """Append the token ids that were added since the last writing to the file, of which the latest ``size`` stay.

        Warns if that fails, and forgets them.
        """
        with self.lock:
            if not self.pending:
                return
            try:
                files.make_data_folder("ngrams")
                with self.alone:
                    data = np.append(self.read(), self.pending)[-self.size :].astype("<i4").tobytes()
                    files.write_atomically(self.path, _head(data) + data, 0o600)
                others = sorted(self.path.parent.glob("[!.]*.ids"), key=lambda path: path.stat().st_mtime)
                for path in others[:-MOST_FILES]:
                    path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(f"n-grams cannot be kept in '{self.path.parent}': {one_line(error)}")
            self.pending, self.written = [], time.monotonic()

    def _warn(self, message: str) -> None:
        """Issue a SpecDecWarning with ``message``, unless this object has issued one before."""
        if not self.warned:
            warnings.warn(message, SpecDecWarning, stacklevel=2)
        self.warned = True


def forget() -> int:
    """Delete the files of all tenants and tokenizers; return their number. Raises SpecDecError if one stays."""
    found = [*(files.data_dir() / "ngrams").glob("*.ids")]
    with errors_as(f"cannot delete what is kept in '{files.data_dir() / 'ngrams'}'"):
        for path in found:
            path.unlink(missing_ok=True)
    return len(found)


def _head(data: bytes) -> bytes:
    """Return the beginning of a file with the token ids ``data``: ``MAGIC`` and their check sum."""
    return MAGIC + zlib.crc32(data).to_bytes(4, "little")
