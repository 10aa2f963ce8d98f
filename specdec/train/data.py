"""Training data: reading prompts and answers, checking them, and the split into training and evaluation."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.base import inputs
from specdec.base.errors import SpecDecError


@dataclass(frozen=True)
class TrainingAnswer:
    """A prompt and the base model's own answer to it, both as token ids. Its length counts both."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Prompt:
    """The texts of a user's turns, for which no answer is known. Training answers the first turn."""

    turns: tuple[str, ...]


def read(paths: Sequence[Path]) -> list[TrainingAnswer | Prompt]:
    """Read the answers and prompts of all files, in order.

    A line is ``{"prompt_ids": [...], "response_ids": [...]}``, ``{"turns": [...]}``, ``{"prompt": ...}`` or plain text.
    A ``.gz`` file is unpacked. Raises SpecDecError for unreadable files, for a broken line (with its number) and if
    the files are empty.
    """
    items = [item for path in paths for item in records(path)]
    if not items:
        raise SpecDecError(f"no prompts in {', '.join(map(str, paths))}; write some, or give another file")
    return items


def records(path: Path) -> Iterator[TrainingAnswer | Prompt]:
    """Yield the answers and prompts of one file, in the formats of ``read``; none if the file is empty."""
    for where, record in inputs.prompts(path):
        ids = record.get("prompt_ids"), record.get("response_ids")
        if all(isinstance(part, list) and part and all(type(i) is int and i >= 0 for i in part) for part in ids):
            yield TrainingAnswer(*map(tuple, ids))  # type: ignore[arg-type]
        elif "response_ids" not in record and (turns := inputs.turns(record)):
            yield Prompt(turns)
        else:
            raise SpecDecError(
                f"{where} has no usable 'turns', 'prompt' or 'prompt_ids' + 'response_ids'; repair or remove it"
            )


def check_token_ids(items: Sequence[TrainingAnswer | Prompt], vocab_size: int) -> None:
    """Raise SpecDecError if an answer holds a token id of ``vocab_size`` or more."""
    for number, item in enumerate(items, start=1):
        largest = max(item.prompt_ids + item.response_ids) if isinstance(item, TrainingAnswer) else 0
        if largest >= vocab_size:
            raise SpecDecError(
                f"answer {number} to train on holds token {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; give answers of this model, or prompts for it to answer"
            )


def check_holdout(
    items: Sequence[TrainingAnswer | Prompt],
    held_out: Sequence[TrainingAnswer | Prompt],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Raise SpecDecError if a prompt of ``items`` contains a prompt of ``held_out``, ignoring case and spaces.

    decode: turns the token ids of an answer's prompt into text.
    """
    words = [" " + " ".join(_text(item, decode).lower().split()) + " " for item in items]
    for item in held_out:
        probe = decode(item.prompt_ids) if isinstance(item, TrainingAnswer) else item.turns[0]
        needle = " " + " ".join(probe.lower().split()) + " "
        for index, text in enumerate(words):
            if needle in text:
                raise SpecDecError(
                    f"prompt {index + 1} to train on contains the held-out prompt '{needle.strip()[:60]}'; "
                    "remove it from the training file"
                )


def _text(item: TrainingAnswer | Prompt, decode: Callable[[Sequence[int]], str]) -> str:
    return decode(item.prompt_ids) if isinstance(item, TrainingAnswer) else " ".join(item.turns)


def prompt_hash(ids: Sequence[int]) -> int:
    """Return a hash (32 bits) of token ids that is equal in every process and on every machine."""
    return zlib.crc32(",".join(map(str, ids)).encode())


def split(answers: Sequence[TrainingAnswer], fraction: float) -> tuple[list[TrainingAnswer], list[TrainingAnswer]]:
    """Split the answers into (training answers, evaluation answers).

    About ``fraction`` of the prompts, chosen by hash, and at least one are for evaluation. Raises SpecDecError if
    either part would be empty.
    """
    train: list[TrainingAnswer] = []
    held: list[TrainingAnswer] = []
    for answer in answers:
        (held if prompt_hash(answer.prompt_ids) % 10_000 < fraction * 10_000 else train).append(answer)
    if not held and len(train) > 1:
        held.append(train.pop())
    if not held or not train:
        raise SpecDecError("too few answers to train on and to evaluate on; give more prompts, or other eval_fraction")
    return train, held


def draft_vocabulary(answers: Sequence[TrainingAnswer], size: int, always: Sequence[int], vocab_size: int) -> Tensor:
    """Choose the token ids that a drafter can draft: ``always``, then the most frequent ones of the answers.

    If the answers have too few different tokens, the most frequent tokens of their prompts follow, then the smallest
    ids below ``vocab_size``. Returns at most ``size`` ids, int32 [V'], ascending.
    """
    count: Counter[int] = Counter()
    for answer in answers:
        count.update(answer.response_ids)
    ranked = [token for token, _ in sorted(count.items(), key=lambda item: (-item[1], item[0]))]
    prompts: Counter[int] = Counter(token for answer in answers for token in answer.prompt_ids)
    ranked += [token for token, _ in sorted(prompts.items(), key=lambda item: (-item[1], item[0]))]
    ranked += range(vocab_size)  # most tokenizers give small ids to frequent merges
    chosen = list(dict.fromkeys([*always, *ranked]))[: min(size, vocab_size)]
    return torch.tensor(sorted(chosen), dtype=torch.int32)
