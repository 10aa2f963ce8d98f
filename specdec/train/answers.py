"""Generation of the base model's own answers to the training prompts, which are what a drafter learns from.

Each answer is written to disk when it ends. A conversation is answered at its first turn only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from specdec.api.decoder import SpecDecoder
from specdec.api.prompts import encode
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.speculation.sampling import RowSampler, SamplingParams
from specdec.train.data import Prompt, TrainingAnswer, prompt_hash, records
from specdec.train.output import ANSWERS, writing
from specdec.train.settings import TrainSettings

MAX_ROWS = 48  # answers generated in one batch


def answer_prompts(
    output: Path,
    decoder: SpecDecoder,
    items: Sequence[TrainingAnswer | Prompt],
    settings: TrainSettings,
    progress: Progress,
) -> list[TrainingAnswer]:
    """Return one answer for each of ``items``, in the same order: given answers as they are, prompts answered.

    ``decoder``'s model answers the prompts that ``output``/answers.jsonl does not hold yet, and the new answers are
    appended to this file. A prompt is encoded in the model's chat template, or as plain text if the model has none.
    An answer does not depend on the other rows of its batch (up to rounding) or on interruptions of the run.
    Raises SpecDecError if the disk is full and if the file holds answers to other prompts.
    """
    answers = [item if isinstance(item, TrainingAnswer) else encode(decoder.tokenizer, item.turns[0]) for item in items]
    prompts = [tuple(item) for item in answers if not isinstance(item, TrainingAnswer)]
    made = _written(output / ANSWERS, set(prompts))
    left = [p for p in dict.fromkeys(prompts) if p not in made]
    task = progress.add_task("answers", total=len(made) + len(left), completed=len(made), visible=bool(left))
    if left:
        with writing("answers", output), (output / ANSWERS).open("a", encoding="utf-8") as file:
            for answer in _generate(decoder, left, settings):
                ids = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
                file.write(json.dumps(ids) + "\n")
                file.flush()
                made[answer.prompt_ids] = answer
                progress.update(task, completed=len(made))
    return [item if isinstance(item, TrainingAnswer) else made[tuple(item)] for item in answers]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[tuple[int, ...]], settings: TrainSettings
) -> Iterator[TrainingAnswer]:
    """Yield the answers to ``prompts`` (token ids) in the order in which the answers end.

    The share ``settings.sampled`` of the prompts, chosen by hash, is sampled; all others are decoded greedily.
    """
    target, ends = decoder.target, decoder.eos_ids()
    if long := [p for p in prompts if len(p) >= target.context]:
        raise SpecDecError(
            f"a prompt has {len(long[0])} tokens, the model's context {target.context}; shorten or remove it"
        )
    engine = Engine(target, decoder.drafter, decoder.verifier, FixedDepth(0), max_rows=MAX_ROWS)
    for prompt in sorted(prompts, key=len):  # prompts of similar length are prefilled together
        key = prompt_hash(prompt)
        sampled = key % 10_000 < settings.sampled * 10_000
        params = SamplingParams(settings.temperature if sampled else 0.0, seed=settings.seed)
        stream = (settings.seed + key) % 2**32
        sampler = RowSampler(params, stream=stream, start=len(prompt))
        engine.submit(Request(list(prompt), settings.max_new_tokens, sampler, eos=ends))
    for events in engine.steps():
        for request, _ in events:
            if request.error is not None:
                raise request.error
            if request.finish_reason is not None:
                yield TrainingAnswer(tuple(request.prompt), tuple(request.ids[len(request.prompt) :]))


def _written(path: Path, prompts: set[tuple[int, ...]]) -> dict[tuple[int, ...], TrainingAnswer]:
    """Read an earlier run's answers, by prompt. Raises SpecDecError if a prompt is not in ``prompts``."""
    made: dict[tuple[int, ...], TrainingAnswer] = {}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for answer in records(path):
            if not isinstance(answer, TrainingAnswer) or answer.prompt_ids not in prompts:
                raise SpecDecError(f"'{path}' holds answers to other prompts; use another --output or delete it")
            made[answer.prompt_ids] = answer
    return made
