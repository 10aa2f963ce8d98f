"""Training text: prompts and token-id answers from JSONL or plain lines, and what must not be trained on.

Knows tokenisers only through ``encode`` callables, and nothing about models or drafters.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec import inputs
from specdec.errors import SpecDecError

TEXT_CONTEXT = 16  # tokens at the beginning of a piece of text that are not trained on


@dataclass(frozen=True)
class Answer:
    """A prompt and the base model's own continuation, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Prompt:
    """User turns that the base model has yet to answer."""

    turns: tuple[str, ...]


def read(paths: Sequence[Path]) -> list[Answer | Prompt]:
    """Everything in the files, in order. Lines are ``{"prompt_ids", "response_ids"}``, ``{"turns": [...]}``,
    ``{"prompt": ...}`` or plain text; ``.gz`` is unpacked.

    Raises SpecDecError for unreadable files, for a broken line (with its number) and if there is nothing at all.
    """
    items = [parse(line.strip(), path, n) for path in paths for n, line in _lines(path) if line.strip()]
    if not items:
        raise SpecDecError(f"no prompts in {', '.join(map(str, paths))}; write some, or give another file")
    return items


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Each file's whole text; ``.gz`` is unpacked. Raises SpecDecError for unreadable files and empty ones."""
    texts = ["".join(line for _, line in _lines(path)) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if not text.strip():
            raise SpecDecError(f"text file '{path}' is empty; leave it out")
    return texts


def pieces(ids: Sequence[int], length: int) -> list[Answer]:
    """Token ids of a text as answers of ``length`` tokens in all; the first few are its prompt, context only."""
    parts = [tuple(ids[start : start + length]) for start in range(0, len(ids), length)]
    return [Answer(part[:TEXT_CONTEXT], part[TEXT_CONTEXT:]) for part in parts if len(part) > TEXT_CONTEXT + 1]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from inputs.lines(path)
    except ValueError as error:
        raise SpecDecError(f"cannot read '{path}': {error}") from None


def parse(line: str, path: Path, number: int) -> Answer | Prompt:
    """What a line of a file is. Raises SpecDecError, with its number, for one that is neither."""
    if not line.startswith("{"):
        return Prompt((line,))
    try:
        data: Any = inputs.parse_json(line)
    except ValueError as error:
        raise SpecDecError(f"line {number} of '{path}' is broken JSON ({error}); repair or remove it") from None
    if "response_ids" in data:
        ids = data.get("prompt_ids"), data["response_ids"]
        if all(isinstance(part, list) and part and all(type(i) is int and i >= 0 for i in part) for part in ids):
            return Answer(tuple(ids[0]), tuple(ids[1]))
    else:
        turns = data.get("turns", data.get("prompt"))
        turns = [turns] if isinstance(turns, str) else turns
        if isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns):
            return Prompt(tuple(turns))
    raise SpecDecError(
        f"line {number} of '{path}' has no usable 'turns', 'prompt' or 'prompt_ids' + 'response_ids'; "
        "repair or remove it"
    )


def refuse_foreign(items: Sequence[Answer | Prompt], vocab_size: int) -> None:
    """Raise SpecDecError for token ids that a vocabulary of that size does not have."""
    for number, item in enumerate(items, start=1):
        largest = max(item.prompt_ids + item.response_ids) if isinstance(item, Answer) else 0
        if largest >= vocab_size:
            raise SpecDecError(
                f"answer {number} to train on holds token {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; give answers of this model, or prompts for it to answer"
            )


def refuse_held_out(
    items: Sequence[Answer | Prompt],
    held_out: Sequence[Answer | Prompt],
    decode: Callable[[Sequence[int]], str],
    what: str = "prompt",
) -> None:
    """Raise SpecDecError if a prompt to train on contains one that must be held out (compared as lower-case words)."""
    words = [" " + " ".join(_text(item, decode).lower().split()) + " " for item in items]
    for item in held_out:
        probe = decode(item.prompt_ids) if isinstance(item, Answer) else item.turns[0]
        needle = " " + " ".join(probe.lower().split()) + " "
        for index, text in enumerate(words):
            if needle in text:
                raise SpecDecError(
                    f"{what} {index + 1} to train on contains the held-out prompt '{needle.strip()[:60]}'; "
                    "remove it from the training file"
                )


def _text(item: Answer | Prompt, decode: Callable[[Sequence[int]], str]) -> str:
    return decode(item.prompt_ids) if isinstance(item, Answer) else " ".join(item.turns)


def split(answers: Sequence[Answer], fraction: float) -> tuple[list[Answer], list[Answer]]:
    """(training, evaluation): about ``fraction`` of the prompts, chosen by a hash of their ids, at least one."""
    train: list[Answer] = []
    held: list[Answer] = []
    for answer in answers:
        key = zlib.crc32(",".join(map(str, answer.prompt_ids)).encode())
        (held if key % 10_000 < fraction * 10_000 else train).append(answer)
    if not held and len(train) > 1:
        held.append(train.pop())
    if not held or not train:
        raise SpecDecError("too few answers to train on and to evaluate on; give more prompts, or other eval_fraction")
    return train, held


def draft_vocabulary(answers: Sequence[Answer], size: int, always: Sequence[int], vocab_size: int) -> Tensor:
    """The ``size`` most frequent token ids of the answers, then of the prompts, plus ``always``; int32, ascending."""
    count: Counter[int] = Counter()
    for answer in answers:
        count.update(answer.response_ids)
    ranked = [token for token, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    prompts: Counter[int] = Counter(token for answer in answers for token in answer.prompt_ids)
    ranked += [token for token, _ in sorted(prompts.items(), key=lambda item: (-item[1], item[0]))]
    ranked += range(vocab_size)  # small ids are the frequent merges of most tokenisers
    chosen = list(dict.fromkeys([*always, *ranked]))[: min(size, vocab_size)]
    return torch.tensor(sorted(chosen), dtype=torch.int32)
