"""Generation of the base model's own answers to the training prompts, which are what a drafter learns from.

Each answer is written to disk when it ends. A conversation is answered at its first turn only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from specdec.train.output import writing
from specdec.train.settings import TrainSettings

MAX_ROWS = 48  # answers generated in one batch
SALT = 1  # in the hash that chooses which are sampled: another one chooses which are held out


def known_answers(file: Path, decoder: SpecDecoder, items: Sequence[TrainingAnswer | Prompt]) -> list[TrainingAnswer]:
    """Return ``items`` as answers, in the same order; those of prompts that have no answer yet are empty.

    A prompt is encoded in the model's chat template, or as plain text if the model has none. Its answer is taken from
    ``file`` if an earlier call of ``answer_prompts`` has written it there. Raises SpecDecError if this file holds
    answers to other prompts.
    decoder: its tokenizer encodes the prompts. No answer is generated here.
    """
    given = [
        item
        if isinstance(item, TrainingAnswer)
        else TrainingAnswer(tuple(encode(decoder.tokenizer, item.turns[0])), (), item.kind)
        for item in items
    ]
    made = _written(file, {answer.prompt_ids for answer in given if not answer.response_ids})
    return [a if a.response_ids else replace(made.get(a.prompt_ids, a), kind=a.kind) for a in given]


def answer_prompts(
    file: Path,
    decoder: SpecDecoder,
    known: Sequence[TrainingAnswer],
    settings: TrainSettings,
    progress: Progress,
) -> list[TrainingAnswer]:
    """Return the answers ``known`` with ``decoder``'s answers to the prompts that have none, in the same order.

    The new answers are appended to ``file``. An answer does not depend on the other rows of its batch (up to rounding)
    or on interruptions of the run. Raises SpecDecError if the disk is full.
    known: the result of ``known_answers``. settings: those of the answers, such as ``max_new_tokens``, ``temperature``.
    progress: gets a bar with the number of finished answers.
    """
    left = {answer.prompt_ids: answer for answer in known if not answer.response_ids}
    task = progress.add_task("answers", total=len(known), visible=bool(left), unit="answers", part="answers")
    progress.advance(task, len(known) - len(left))
    made = dict[tuple[int, ...], TrainingAnswer]()
    if left:
        with writing("answers", file.parent), file.open("a", encoding="utf-8") as out:
            for answer in _generate(decoder, list(left), settings):
                ids = {"prompt_ids": answer.prompt_ids, "response_ids": answer.response_ids}
                kind = left[answer.prompt_ids].kind
                out.write(json.dumps(ids | ({"category": kind} if kind else {})) + "\n")
                out.flush()
                made[answer.prompt_ids] = replace(answer, kind=kind)
                progress.advance(task)
    return [answer if answer.response_ids else made[answer.prompt_ids] for answer in known]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[tuple[int, ...]], settings: TrainSettings
) -> Iterator[TrainingAnswer]:
    """Yield ``decoder``'s answers to ``prompts`` (token ids) in the order in which the answers end.

    Of the prompts the share ``settings.sampled``, chosen by hash, is sampled; all others are decoded greedily.
    Raises SpecDecError for a prompt that fills the model's context.
    """
    target, ends = decoder.target, decoder.eos_ids()
    if long := [p for p in prompts if len(p) >= target.context]:
        raise SpecDecError(
            f"a prompt has {len(long[0])} tokens, the model's context {target.context}; shorten or remove it"
        )
    engine = Engine(target, decoder.drafter, decoder.verifier, FixedDepth(0), max_rows=MAX_ROWS)
    for prompt in sorted(prompts, key=len):  # prompts of similar length are prefilled together
        key = prompt_hash(prompt)
        sampled = prompt_hash([*prompt, SALT]) % 10_000 < settings.sampled * 10_000
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
    """Return {token ids of a prompt: its answer} of an earlier run from the file ``path``; {} if it is missing.

    An unfinished last line is cut off the file. Raises SpecDecError if a prompt is not in ``prompts`` (token ids).
    """
    made: dict[tuple[int, ...], TrainingAnswer] = {}
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        for answer in records(path):
            if not isinstance(answer, TrainingAnswer) or answer.prompt_ids not in prompts:
                raise SpecDecError(f"'{path}' holds answers to other prompts; use another --output or delete it")
            made[answer.prompt_ids] = answer
    return made
