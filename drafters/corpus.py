"""The corpus of the n-gram drafter: texts of the package in a tokenizer's tokens.

It is kept in the cache folder under a name made of the tokenizer, as int32: one text after another, a -1 before each
and at the end.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import lzma
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from specdec.base import files
from specdec.base.background import Stop
from specdec.models.tokenizer import Tokenizer
from specdec.speculation.ngram import Ints

SHIPPED = "pretrained/ngram/corpus.txt.xz"  # texts, a NUL between two of them
MAX_TOKENS = 1 << 20  # tokens of a corpus
BATCH = 64  # texts that are tokenised together


def corpus(tokenizer: Any, vocab_size: int, stop: Stop | None = None) -> Ints:
    """Return the token ids of the package's texts, int32 [n], at most ``MAX_TOKENS``, with a -1 before each text.

    Return a single -1 if the tokenizer fails on the texts (a vocabulary of words may lack an unknown token).
    tokenizer: that of the model, from transformers or from ``specdec.models.tokenizer``.
    vocab_size: V; ids that are not below it become -1.
    stop: event that ends the work when it is set: Stopped is raised between two batches of texts; None: no such event.
    """
    found = np.array([-1], np.int32)
    packed = importlib.resources.files("specdec.drafters").joinpath(SHIPPED).read_bytes()
    with suppress(Exception):  # a tokenizer raises what it likes
        path, kept = path_for(tokenizer, packed), found[:0]
        with suppress(OSError):
            kept = np.fromfile(path, "<i4", MAX_TOKENS).astype(np.int32)
        if not len(kept):  # none, or what a full disk has left
            kept = tokenised(lzma.decompress(packed).decode().split("\0"), tokenizer, MAX_TOKENS, stop)
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                files.write_atomically(path, kept.astype("<i4").tobytes())
        found = kept
    found[found >= vocab_size] = -1
    return found


def tokenised(texts: Iterable[str], tokenizer: Any, most: int, stop: Stop | None = None) -> Ints:
    """Return the token ids of ``texts``, at most ``most``, int32 [n], with a -1 before each text and at the end.

    stop: event that ends the work when it is set: Stopped is raised between two batches of texts; None: no such event.
    """
    found, count, texts = list[Ints](), 0, iter(texts)
    while count < most and (batch := list(islice(texts, BATCH))):
        if stop is not None:
            stop.check()
        read = tokenizer(batch, add_special_tokens=False)["input_ids"]
        found.append(np.array([token for ids in read for token in (-1, *ids)], np.int32))
        count += len(found[-1])
    return np.append(np.concatenate([*found, np.empty(0, np.int32)])[: most - 1], np.int32(-1))


def path_for(tokenizer: Any, packed: bytes) -> Path:
    """Return the path of the cached file with a tokenizer's token ids of the compressed texts ``packed``.

    The file need not exist.
    """
    name = hashlib.sha256(packed + described(tokenizer).encode()).hexdigest()[:24]
    return files.cache_dir() / "ngram" / f"shipped-{name}.ids"


def described(tokenizer: Any) -> str:
    """Return a string that two tokenizers share only if they have the same vocabulary and rules.

    tokenizer: one of transformers, or a ``specdec.models.tokenizer.Tokenizer``.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.digest
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))
