"""Teach a drafter ahead of time: the model answers the user's prompts, then questions that it makes up itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.prompts import encode
from specdec.base.errors import SpecDecError
from specdec.engine.request import check_prompt

MAX_ROWS = 16  # most prompts that are answered together
FIRST_ROWS = 4  # prompts of the first batch, which shows how long an answer takes
QUESTION_TOKENS = 80  # most new tokens of a made-up question
ANSWER_TOKENS = 160  # most new tokens of an answer
MARK = "\0question\0"  # stands for the user's text in a rendered chat; no template has it
HOLDOUT_QUESTIONS = 6  # questions that are never learned from
HOLDOUT_TOKENS = 64  # tokens of each of their answers that are measured


@dataclass
class Primed:
    """The result of ``prime``.

    tokens: number of new tokens that the drafter learned from.
    before, after: mean acceptance length (tokens per step) on questions that are not learned from, before and after.
    """

    tokens: int
    before: float
    after: float


def prime(
    decoder: SpecDecoder,
    prompts: Sequence[str],
    seconds: float,
    bar: Callable[[float, int, int], object] = lambda *done: None,
) -> Primed:
    """Let the decoder's drafter learn from answers of the model for about ``seconds``, and save what it has learned.

    Returns how much it has learned from, and what that changed.

    prompts: texts that are answered first. When they are used up, the model makes up questions.
    bar: called after each batch of answers with the seconds so far, the seconds of the whole and the tokens so far.
    Raises SpecDecError if the drafter does not teach itself, or if what it learns would not be kept: another process
    writes the same file, or it cannot be written.
    """
    if (learner := decoder.drafter.learner) is None:
        raise SpecDecError(
            f"drafter '{decoder.drafter.traits.label}' is trained and learns nothing more; a model without one has a "
            "drafter that teaches itself"
        )
    learner.claim()
    began, tokens = time.monotonic(), 0
    tried = _questions(decoder, HOLDOUT_QUESTIONS)
    own = [encode(decoder.tokenizer, prompt, context=decoder.target.context) for prompt in prompts]
    for ids in own:  # before any is answered
        check_prompt(ids, decoder.target)
    before, count = _acceptance_length(decoder, tried), FIRST_ROWS
    while count:
        started, batch, own = time.monotonic(), own[:count] or _questions(decoder, count), own[count:]
        for answer in _generate(decoder, batch, ANSWER_TOKENS, learn=True):
            tokens += len(answer)
        decoder.learn()
        now = time.monotonic()
        bar(min(now - began, seconds), round(seconds), tokens)
        count = min(int(max(began + seconds - now, 0) / (now - started) * len(batch)), MAX_ROWS)
    return Primed(tokens, before, _acceptance_length(decoder, tried))


def _questions(decoder: SpecDecoder, count: int) -> list[list[int]]:
    """Let the model make up at most ``count`` questions; return prompts (token ids) that ask them.

    Without a chat template, the prompts are beginnings of texts.
    """
    tokenizer, seed = decoder.tokenizer, time.time_ns() % 2**31
    start = [next(iter(sorted(decoder.eos_ids())), 0)]
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        before = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False).partition(MARK)[0]
        start = tokenizer.encode(before, add_special_tokens=False)
    limit = QUESTION_TOKENS if chat else 8
    found = _generate(decoder, [start] * count, limit, learn=False, temperature=1.0, seed=seed)
    if not chat:
        return [[*start, *ids] for ids in found]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
    return [encode(tokenizer, text) for text in texts if len(text) > 10] or [encode(tokenizer, "Hello!")]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[list[int]], limit: int, learn: bool, **sampling: Any
) -> list[list[int]]:
    """Decode all prompts (token ids) together, without drafts; return the new tokens of each.

    limit: maximum number of new tokens of each. learn: whether drafters may learn from these texts.
    sampling: options of ``SpecDecoder.open``; without any, decoding is greedy.
    """
    with decoder.open(prompts, num_speculative_tokens=0, max_new_tokens=limit, **sampling) as generation:
        for request in generation.requests:
            request.learn = learn
        for _ in generation.steps():
            pass
        return [output.token_ids for output in generation.outputs()]


def _acceptance_length(decoder: SpecDecoder, prompts: Sequence[list[int]]) -> float:
    """Return the mean acceptance length (tokens per step) of answers to ``prompts``, without learning from them.

    prompts: token ids of each. They are answered one after the other.
    """
    steps = tokens = 0
    for prompt in prompts:
        with decoder.open([prompt], max_new_tokens=HOLDOUT_TOKENS) as generation:
            generation.requests[0].learn = False
            for _ in generation.steps():
                pass
        metrics = generation.outputs()[0].metrics
        steps += metrics.num_spec_steps
        tokens += metrics.num_spec_steps + metrics.num_accepted_draft_tokens
    return tokens / max(steps, 1)
