"""The base model's own answers to the training prompts: generated in batches, written as they come, greedy.

Of a prompt of several turns the first is answered. Knows nothing about states and students.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from specdec.decoder import SpecDecoder
from specdec.errors import SpecDecError
from specdec.text import encode
from specdec.train.data import Answer, Prompt

FILE = "answers.jsonl"
BATCH = 32


def encode_prompts(tokenizer: Any, items: Sequence[Answer | Prompt], model: str) -> list[Answer | list[int]]:
    """Text prompts as token ids, in the model's chat template. Raises SpecDecError if it has none."""
    if any(isinstance(item, Prompt) for item in items) and not getattr(tokenizer, "chat_template", None):
        raise SpecDecError(
            f"model '{model}' has no chat template for text prompts; give answers as token ids "
            '({"prompt_ids": [...], "response_ids": [...]})'
        )
    return [item if isinstance(item, Answer) else encode(tokenizer, item.turns[0], chat=True) for item in items]


def answer_prompts(
    output: Path, model: Any, tokenizer: Any, items: Sequence[Answer | list[int]], limit: int, progress: Progress
) -> list[Answer]:
    """All answers, in order; those missing are generated (at most ``limit`` tokens) and kept in ``answers.jsonl``."""
    prompts = [item for item in items if not isinstance(item, Answer)]
    made = _written(output / FILE, prompts)
    task = progress.add_task("answers", total=len(prompts), completed=len(made), visible=len(prompts) > len(made))
    decoder = SpecDecoder(model, tokenizer, drafter="none")
    try:
        while len(made) < len(prompts):
            batch = prompts[len(made) : len(made) + BATCH]
            outs = decoder.generate_batch(batch, max_new_tokens=limit)
            made += [Answer(tuple(ids), tuple(out.token_ids)) for ids, out in zip(batch, outs, strict=True)]
            with (output / FILE).open("a", encoding="utf-8") as file:
                for answer in made[-len(batch) :]:
                    ids = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
                    file.write(json.dumps(ids) + "\n")
            progress.update(task, completed=len(made))
    except OSError as error:
        raise SpecDecError(
            f"cannot write answers to '{output}': {error.strerror or error}; free space and --resume"
        ) from None
    fresh = iter(made)
    return [item if isinstance(item, Answer) else next(fresh) for item in items]


def _written(path: Path, prompts: Sequence[list[int]]) -> list[Answer]:
    """The answers an earlier run left; a line that it did not finish is cut off."""
    if not path.exists():
        return []
    made, good = [], 0
    with path.open("r+b") as file:
        for line, prompt in zip(file, prompts, strict=False):
            try:
                data = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            if data["prompt_ids"] != prompt:
                raise SpecDecError(f"'{path}' holds answers to other prompts; use another --output or delete it")
            made.append(Answer(tuple(prompt), tuple(data["response_ids"])))
            good += len(line)
        file.truncate(good)
    return made
