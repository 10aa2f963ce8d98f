"""The base model's own answers to the training prompts: a batch of ragged rows that is refilled as rows end.

Answers are written as they are finished. Of a prompt of several turns the first is answered. Knows nothing about states
and students.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress
from specdec.engine.depth import FixedDepth
from specdec.engine.loop import Loop
from specdec.speculation.sampling import Sampler, SamplingParams
from specdec.train.data import Answer, Prompt, prompt_hash, records
from specdec.train.output import ANSWERS, writing

ROWS, REFILL = 48, 12  # rows of the batch; those that must have ended before new ones come


def encode_prompts(tokenizer: Any, items: Sequence[Answer | Prompt], model: str) -> list[Answer | list[int]]:
    """Text prompts as token ids, in the model's chat template. Raises SpecDecError if it has none."""
    if any(isinstance(item, Prompt) for item in items) and not getattr(tokenizer, "chat_template", None):
        raise SpecDecError(
            f"model '{model}' has no chat template for text prompts; give answers as token ids "
            '({"prompt_ids": [...], "response_ids": [...]})'
        )
    return [item if isinstance(item, Answer) else encode(tokenizer, item.turns[0], chat=True) for item in items]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: ``share`` of the prompts (chosen by a hash) at ``temperature``, the others greedily."""

    share: float
    temperature: float
    seed: int

    def params(self, prompt: Sequence[int]) -> SamplingParams:
        key = prompt_hash(prompt)
        drawn = key % 10_000 < self.share * 10_000
        return SamplingParams(self.temperature if drawn else 0.0, seed=(self.seed + key) % 2**32)


def answer_prompts(
    output: Path,
    model: Any,
    tokenizer: Any,
    items: Sequence[Answer | list[int]],
    limit: int,
    sampling: Sampling,
    progress: Progress,
) -> list[Answer]:
    """All answers, in order; those missing are generated (at most ``limit`` tokens) and kept in ``answers.jsonl``.

    An answer does not depend on what else is in the batch (up to rounding), nor on where a killed run stopped. Raises
    SpecDecError if the disk is full, and if the file holds answers to other prompts.
    """
    prompts = [tuple(item) for item in items if not isinstance(item, Answer)]
    made = _written(output / ANSWERS, set(prompts))
    left = [p for p in dict.fromkeys(prompts) if p not in made]
    task = progress.add_task("answers", total=len(made) + len(left), completed=len(made), visible=bool(left))
    if left:
        with writing("answers", output), (output / ANSWERS).open("a", encoding="utf-8") as file:
            for answer in _generate(SpecDecoder(model, tokenizer, drafter="none"), left, limit, sampling):
                ids = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
                file.write(json.dumps(ids) + "\n")
                file.flush()
                made[answer.prompt_ids] = answer
                progress.update(task, completed=len(made))
    return [item if isinstance(item, Answer) else made[tuple(item)] for item in items]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[tuple[int, ...]], limit: int, sampling: Sampling
) -> Iterator[Answer]:
    """Answers as they are finished."""
    context = decoder.target.context
    if long := [p for p in prompts if len(p) >= context]:
        raise SpecDecError(f"a prompt has {len(long[0])} tokens, the model's context {context}; shorten or remove it")
    for drawn in (False, True):  # a batch has one temperature
        kind = [p for p in prompts if bool(sampling.params(p).temperature) == drawn]
        if kind:
            yield from _refilled(decoder, sorted(kind, key=len), limit, sampling)  # similar ones are prefilled together


def _refilled(
    decoder: SpecDecoder, prompts: Sequence[tuple[int, ...]], limit: int, sampling: Sampling
) -> Iterator[Answer]:
    """The same for prompts of one temperature: row i of the loop answers prompt i."""
    target, ends = decoder.target, decoder.eos_ids()
    outs: list[list[int]] = [[] for _ in prompts]

    def stop(row: int, token: int) -> str | None:
        outs[row].append(token)
        return "eos" if token in ends else None

    def batch(start: int, count: int) -> tuple[list[list[int]], list[int], Sampler]:
        some = prompts[start : start + count]
        params = [sampling.params(p) for p in some]
        sampler = Sampler(replace(params[0], seed=sampling.seed), streams=[p.seed for p in params])
        return [list(p) for p in some], [min(limit, target.context - len(p)) for p in some], sampler

    rows, limits, sampler = batch(0, ROWS)
    loop = Loop(target, decoder.drafter, decoder.verifier, sampler, rows, limits, stop, FixedDepth(0))
    given: set[int] = set()
    for _ in loop.steps():
        while len(loop.metrics) < len(prompts) and len(loop.rows) <= ROWS - REFILL:
            loop.admit(*batch(len(loop.metrics), ROWS - len(loop.rows)))
        for row in sorted(loop.finished.keys() - given):
            given.add(row)
            yield Answer(prompts[row], tuple(outs[row]))


def _written(path: Path, prompts: set[tuple[int, ...]]) -> dict[tuple[int, ...], Answer]:
    """The answers an earlier run left; a line that it did not finish is cut off."""
    made: dict[tuple[int, ...], Answer] = {}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for answer in records(path):
            if not isinstance(answer, Answer) or answer.prompt_ids not in prompts:
                raise SpecDecError(f"'{path}' holds answers to other prompts; use another --output or delete it")
            made[answer.prompt_ids] = answer
    return made
