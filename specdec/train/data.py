"""Training data: reading prompts and answers, checking them, and the split into training and evaluation.

Imports nothing heavy, so that the command line reads prompts before anything else.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.bench.prompts import PACKAGED, PROMPT_SETS, load_prompts

SETS = (*PACKAGED, *PROMPT_SETS)


@dataclass(frozen=True)
class TrainingAnswer:
    """A prompt and the base model's own answer to it, both as token ids. Its length counts both.

    response_ids: empty if the prompt has no answer yet. kind: the prompt's category, "" if the file gives none.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    kind: str = ""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Prompt:
    """The texts of a user's turns, for which no answer is known. The base model will answer the first turn alone.

    kind: the prompt's category, "" if the file gives none.
    """

    turns: tuple[str, ...]
    kind: str = ""


def read(sources: Sequence[str | Path]) -> list[TrainingAnswer | Prompt]:
    """Read the answers and prompts of all ``sources``, in order: files, and names of prompt sets (``SETS``).

    A line is ``{"prompt_ids": [...], "response_ids": [...]}``, ``{"turns": [...]}``, ``{"prompt": ...}`` or plain text,
    a JSON object optionally with ``category``. A ``.gz`` file is unpacked. Raises SpecDecError for unknown names and
    unreadable files, for a broken line (with its number) and if the files are empty.
    """
    if not sources:
        raise SpecDecError("nothing to train on; give --prompts, a file or the name of a prompt set such as own")
    items = list[TrainingAnswer | Prompt]()
    for source in map(str, sources):
        if Path(source).is_file() and source not in SETS:
            items += records(Path(source))
        else:
            items += [Prompt(chat.turns, chat.category) for chat in load_prompts(source).conversations]
    if not items:
        raise SpecDecError(f"no prompts in {', '.join(map(str, sources))}; write some, or give another file")
    return items


def records(path: Path) -> Iterator[TrainingAnswer | Prompt]:
    """Yield the answers and prompts of the file ``path``, in the formats of ``read``; none if the file is empty.

    Raises SpecDecError if the file cannot be read, or for a broken line when it is reached.
    """
    for where, record in inputs.prompts(path):
        ids: list[Any] = [record.get("prompt_ids"), record.get("response_ids")]
        kind = str(record.get("category", ""))
        if all(isinstance(part, list) and part and all(type(i) is int and i >= 0 for i in part) for part in ids):
            yield TrainingAnswer(tuple(ids[0]), tuple(ids[1]), kind)
        elif "response_ids" not in record and (turns := inputs.turns(record)):
            yield Prompt(turns, kind)
        else:
            raise SpecDecError(
                f"{where} has no usable 'turns', 'prompt' or 'prompt_ids' + 'response_ids'; repair or remove it"
            )


def check_token_ids(items: Sequence[TrainingAnswer | Prompt], vocab_size: int, use: str = "train on") -> None:
    """Raise SpecDecError if an answer among ``items``, or its prompt, holds a token id of ``vocab_size`` or more.

    Prompts as text are not checked. use: what the answers are for, for the message.
    """
    for number, item in enumerate(items, start=1):
        largest = max(item.prompt_ids + item.response_ids) if isinstance(item, TrainingAnswer) else 0
        if largest >= vocab_size:
            raise SpecDecError(
                f"answer {number} to {use} holds token {largest}, but the model's vocabulary ends at "
                f"{vocab_size - 1}; give answers of this model, or prompts for it to answer"
            )


def check_holdout(
    items: Sequence[TrainingAnswer | Prompt],
    held_out: Sequence[TrainingAnswer | Prompt],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Raise SpecDecError if a prompt of ``items`` contains a prompt of ``held_out``, ignoring case and spaces.

    Held-out answers are compared with the prompts as the model would read them, in the chat template.

    encode: returns the token ids of a text as the model reads it. decode: turns token ids into text, without special
        tokens.
    """
    texts = [_words(decode(i.prompt_ids) if isinstance(i, TrainingAnswer) else " ".join(i.turns)) for i in items]
    chats = texts
    if any(isinstance(item, TrainingAnswer) for item in held_out):
        chats = [
            text if isinstance(item, TrainingAnswer) else _words(decode(encode(item.turns[0])))
            for item, text in zip(items, texts, strict=True)
        ]
    for item in held_out:
        answer = isinstance(item, TrainingAnswer)
        needle = _words(decode(item.prompt_ids) if isinstance(item, TrainingAnswer) else item.turns[0])
        for index, text in enumerate(chats if answer else texts):
            if needle in text:
                raise SpecDecError(
                    f"prompt {index + 1} to train on contains the held-out prompt '{needle.strip()[:60]}'; "
                    "remove it from the training file"
                )


def _words(text: str) -> str:
    return " " + " ".join(text.lower().split()) + " "


def prompt_hash(ids: Sequence[int]) -> int:
    """Return a hash (32 bits) of token ids that is equal in every process and on every machine."""
    return zlib.crc32(",".join(map(str, ids)).encode())


def usable(answers: Sequence[TrainingAnswer], context: int) -> list[TrainingAnswer]:
    """Return those of ``answers`` that have more than one token and fit into ``context`` tokens with their prompt."""
    return [answer for answer in answers if len(answer) <= context and len(answer.response_ids) > 1]


def split(answers: Sequence[TrainingAnswer], fraction: float) -> tuple[list[TrainingAnswer], list[TrainingAnswer]]:
    """Split the answers into (training answers, evaluation answers), each in the given order.

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


def draft_vocabulary(answers: Sequence[TrainingAnswer], size: int, always: Sequence[int], vocab_size: int) -> list[int]:
    """Choose the token ids that a drafter can draft: ``always``, then the most frequent ones of the answers.

    If the answers have too few different tokens, the most frequent tokens of their prompts follow, then the smallest
    ids below ``vocab_size``. Returns at most ``size`` ids, ascending.
    always: ids to choose in any case, such as those of end tokens. vocab_size: V, the model's number of tokens.
    """
    ranked = list[int]()
    for texts in ([answer.response_ids for answer in answers], [answer.prompt_ids for answer in answers]):
        count = Counter(token for text in texts for token in text)
        ranked += sorted(count, key=lambda token: (-count[token], token))
    ranked += range(vocab_size)  # most tokenizers give small ids to frequent merges
    return sorted(list(dict.fromkeys([*always, *ranked]))[: min(size, vocab_size)])
