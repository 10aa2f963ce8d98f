"""Teaching a drafter ahead of time: the model answers the user's prompts, then questions that it makes up itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError

ROWS, FIRST = 16, 4  # most prompts that are answered together, and those of the first batch
QUESTION, ANSWER = 80, 160  # most new tokens of a made-up question, and of an answer
Bar = Callable[[float, int, int], object]
MARK = "question"  # stands for the user's text in a rendered chat
TRIED, TRIED_TOKENS = 6, 64  # questions that are never learned from, and the tokens of their answers that are measured


@dataclass
class Primed:
    """What priming came to: tokens learned from, and mean tokens a step before and after, on held-out questions."""

    tokens: int
    before: float
    after: float


def prime(
    decoder: SpecDecoder,
    prompts: Sequence[str],
    seconds: float,
    bar: Callable[[float, int, int], object] = lambda *done: None,
) -> Primed:
    """Let the decoder's drafter learn for about ``seconds``: a batch has as many prompts as there is time for.

    Raises SpecDecError if the drafter does not teach itself, or what it learns would not be kept.
    """
    if (learner := decoder.drafter.learner) is None:
        raise SpecDecError(
            f"drafter '{decoder.drafter.traits.label}' is trained and learns nothing more; a model without one has a "
            "drafter that teaches itself"
        )
    learner.claim()
    began, tokens = time.monotonic(), 0
    tried = _questions(decoder, TRIED)
    own = [encode(decoder.tokenizer, prompt, context=decoder.target.context) for prompt in prompts]
    before, count = _tokens_a_step(decoder, tried), FIRST
    while count:
        started, batch, own = time.monotonic(), own[:count] or _questions(decoder, count), own[count:]
        for answer in _generate(decoder, batch, ANSWER, learn=True):
            tokens += len(answer)
        decoder.learn()
        now = time.monotonic()
        bar(min(now - began, seconds), round(seconds), tokens)
        count = min(int(max(began + seconds - now, 0) / (now - started) * len(batch)), ROWS)
    return Primed(tokens, before, _tokens_a_step(decoder, tried))


def _questions(decoder: SpecDecoder, count: int) -> list[list[int]]:
    """Return prompts of at most ``count`` made-up first turns; beginnings of texts if there is no chat template."""
    tokenizer, seed = decoder.tokenizer, time.time_ns() % 2**31
    start = [next(iter(sorted(decoder.eos_ids())), 0)]
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        before = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False).partition(MARK)[0]
        start = tokenizer.encode(before, add_special_tokens=False)
    found = _generate(decoder, [start] * count, QUESTION if chat else 8, learn=False, seed=seed)
    if not chat:
        return [[*start, *ids] for ids in found]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
    return [encode(tokenizer, text) for text in texts if len(text) > 10] or [encode(tokenizer, "Hello!")]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[list[int]], limit: int, learn: bool, seed: int | None = None
) -> list[list[int]]:
    """Decode plainly, all prompts together; greedily, or with a ``seed`` at temperature 1."""
    how = {} if seed is None else {"temperature": 1.0, "seed": seed}
    requests = [
        decoder.request(prompt, stream=n, num_speculative_tokens=0, max_new_tokens=limit, **how)  # type: ignore[arg-type]
        for n, prompt in enumerate(prompts)
    ]
    engine = decoder.stepped_engine(1, max_rows=len(requests))
    try:
        for request in requests:
            request.learn = learn
            engine.submit(request)
        for _ in engine.steps():
            pass
    finally:
        engine.close()
    return [request.ids[len(request.prompt) :] for request in requests]


def _tokens_a_step(decoder: SpecDecoder, prompts: Sequence[list[int]]) -> float:
    steps = tokens = 0
    for prompt in prompts:
        with decoder.open([prompt], max_new_tokens=TRIED_TOKENS) as generation:
            generation.requests[0].learn = False
            for _ in generation.steps():
                pass
        metrics = generation.outputs()[0].metrics
        steps += metrics.num_spec_steps
        tokens += metrics.num_spec_steps + metrics.num_accepted_draft_tokens
    return tokens / max(steps, 1)
