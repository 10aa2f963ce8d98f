"""The base model's own answers to the training prompts.

Each answer is written when it ends. Of a conversation only the first turn is answered.
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
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.speculation.sampling import SamplingParams
from specdec.train.data import Prompt, TrainingAnswer, prompt_hash, records
from specdec.train.output import ANSWERS, writing

ROWS, REFILL = 48, 12  # rows of the batch; free rows before new prompts are added


def encode_prompts(tokenizer: Any, items: Sequence[TrainingAnswer | Prompt]) -> list[TrainingAnswer | list[int]]:
    """Encode text prompts: in the model's chat template, or as they are if it has none."""
    return [item if isinstance(item, TrainingAnswer) else encode(tokenizer, item.turns[0]) for item in items]


@dataclass(frozen=True)
class AnswerSampling:
    """How to generate answers: a ``share`` of the prompts, chosen by hash, at ``temperature``, the others greedily."""

    share: float
    temperature: float
    seed: int

    def params(self, prompt: Sequence[int]) -> SamplingParams:
        key = prompt_hash(prompt)
        drawn = key % 10_000 < self.share * 10_000
        return SamplingParams(self.temperature if drawn else 0.0, seed=(self.seed + key) % 2**32)


def answer_prompts(
    output: Path,
    decoder: SpecDecoder,
    items: Sequence[TrainingAnswer | list[int]],
    limit: int,
    sampling: AnswerSampling,
    progress: Progress,
) -> list[TrainingAnswer]:
    """All answers, in order. Missing ones are generated, with at most ``limit`` tokens, and kept in ``answers.jsonl``.

    An answer does not depend on other rows of the batch (up to rounding) or on interruptions. Raises SpecDecError if
    the disk is full and if the file holds answers to other prompts.
    """
    prompts = [tuple(item) for item in items if not isinstance(item, TrainingAnswer)]
    made = _written(output / ANSWERS, set(prompts))
    left = [p for p in dict.fromkeys(prompts) if p not in made]
    task = progress.add_task("answers", total=len(made) + len(left), completed=len(made), visible=bool(left))
    if left:
        with writing("answers", output), (output / ANSWERS).open("a", encoding="utf-8") as file:
            for answer in _generate(decoder, left, limit, sampling):
                ids = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
                file.write(json.dumps(ids) + "\n")
                file.flush()
                made[answer.prompt_ids] = answer
                progress.update(task, completed=len(made))
    return [item if isinstance(item, TrainingAnswer) else made[tuple(item)] for item in items]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[tuple[int, ...]], limit: int, sampling: AnswerSampling
) -> Iterator[TrainingAnswer]:
    """Yield answers when they end."""
    context = decoder.target.context
    if long := [p for p in prompts if len(p) >= context]:
        raise SpecDecError(f"a prompt has {len(long[0])} tokens, the model's context {context}; shorten or remove it")
    target, ends = decoder.target, decoder.eos_ids()
    engine = Engine(target, decoder.drafter, decoder.verifier, FixedDepth(0), max_rows=ROWS)
    waiting = sorted(prompts, key=len, reverse=True)  # prompts of similar length are prefilled together
    running = list[Request]()
    while waiting or running:
        if len(running) <= ROWS - REFILL:
            for _ in range(min(ROWS - len(running), len(waiting))):
                prompt = waiting.pop()
                params = sampling.params(prompt)
                request = Request(
                    list(prompt), limit, replace(params, seed=sampling.seed), stream=params.seed, eos=ends
                )
                engine.submit(request)
                running.append(request)
        engine.step()
        for request in [each for each in running if each.finish_reason is not None]:
            if request.error is not None:
                raise request.error
            running.remove(request)
            yield TrainingAnswer(tuple(request.prompt), tuple(request.ids[len(request.prompt) :]))


def _written(path: Path, prompts: set[tuple[int, ...]]) -> dict[tuple[int, ...], TrainingAnswer]:
    """The answers of an earlier run. An unfinished last line is cut off."""
    made: dict[tuple[int, ...], TrainingAnswer] = {}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for answer in records(path):
            if not isinstance(answer, TrainingAnswer) or answer.prompt_ids not in prompts:
                raise SpecDecError(f"'{path}' holds answers to other prompts; use another --output or delete it")
            made[answer.prompt_ids] = answer
    return made
