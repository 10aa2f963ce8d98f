"""Teaching a drafter ahead of time: the model answers the user's prompts, then questions that it makes up itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError

ROWS = 16  # prompts that are answered together
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
    """Let the decoder's drafter learn for about ``seconds``.

    Raises SpecDecError if the drafter does not teach itself.
    """
    if not decoder.drafter.learns:
        raise SpecDecError(
            f"drafter '{decoder.drafter.label}' is trained and learns nothing more; a model without one has a drafter "
            "that teaches itself"
        )
    began, tokens = time.monotonic(), 0
    made = _conversations(decoder)
    tried = next(made)[:TRIED]
    own = [encode(decoder.tokenizer, prompt, context=decoder.target.context) for prompt in prompts]
    given = (own[at : at + ROWS] for at in range(0, len(own), ROWS))
    before = _tokens_a_step(decoder, tried)
    for batch in itertools.chain(given, made):
        for answer in _generate(decoder, batch, ANSWER, learn=True):
            tokens += len(answer)
        decoder.learn()
        spent = time.monotonic() - began
        bar(min(spent, seconds), round(seconds), tokens)
        if spent >= seconds:
            break
    return Primed(tokens, before, _tokens_a_step(decoder, tried))


def _conversations(decoder: SpecDecoder) -> Iterator[list[list[int]]]:
    """Prompts of ``ROWS`` made-up first turns, again and again; beginnings of texts if there is no chat template."""
    tokenizer, seed = decoder.tokenizer, itertools.count(time.time_ns() % 2**31)
    start = [next(iter(sorted(decoder.eos_ids())), 0)]
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        before = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False).partition(MARK)[0]
        start = tokenizer.encode(before, add_special_tokens=False)
    while True:
        found = _generate(decoder, [start] * ROWS, QUESTION if chat else 8, learn=False, seed=next(seed))
        if not chat:
            yield [[*start, *ids] for ids in found]
            continue
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
        yield [encode(tokenizer, text) for text in texts if len(text) > 10] or [encode(tokenizer, "Hello!")]


def _generate(
    decoder: SpecDecoder, prompts: Sequence[list[int]], limit: int, learn: bool, seed: int | None = None
) -> list[list[int]]:
    """Decode plainly, all prompts together; greedily, or with a ``seed`` at temperature 1."""
    how = {} if seed is None else {"temperature": 1.0, "seed": seed}
    requests = [
        decoder.request(prompt, stream=n, draft=False, max_new_tokens=limit, **how)  # type: ignore[arg-type]
        for n, prompt in enumerate(prompts)
    ]
    engine = decoder.manual_engine(1, max_rows=len(requests))
    try:
        for request in requests:
            request.learn = learn
            engine.enqueue(request)
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
