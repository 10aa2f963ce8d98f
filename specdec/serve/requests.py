"""Requests of the engine: a prompt, how its tokens are chosen, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.api.decoder import SpecDecoder
from specdec.api.text import Detokenizer
from specdec.engine.request import Request
from specdec.speculation.constraints import Compiled
from specdec.speculation.sampling import SamplingParams


def make_request(
    decoder: SpecDecoder,
    prompt: list[int],
    params: SamplingParams,
    limit: int | None,
    stops: Sequence[str] = (),
    *,
    stream: int = 0,
    ignore_eos: bool = False,
    draft: bool = True,
    constraint: Compiled | None = None,
    logprobs: int | None = None,
    prompt_logprobs: bool = False,
) -> Request:
    """A request for at most ``limit`` new tokens, and no more than the model's context has place for.

    stream: which of several answers to one prompt. draft: False decodes plainly. constraint: what the answer must be.
    logprobs, prompt_logprobs: as in ``Request``.
    """
    free = decoder.target.context - len(prompt)
    most = free if limit is None else min(limit, free)
    return Request(
        prompt=prompt,
        limit=most,
        chooser=decoder.chooser(prompt, most, params, (), constraint, stream),
        eos=frozenset() if ignore_eos else decoder.eos_ids(),
        stop=StopStrings(decoder.tokenizer, stops) if stops else None,
        draft=draft,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


class StopStrings:
    """The rule by which a request ends at one of its stop strings. The engine's thread calls it."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.text = Detokenizer(tokenizer, stops)

    def __call__(self, token: int) -> str | None:
        self.text.push(token)
        return "stop" if self.text.stopped else None
