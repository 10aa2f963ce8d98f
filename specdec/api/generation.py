"""A generation: its options, the engine's steps, their text, and the output of every row so far."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from specdec.api.text import text_of
from specdec.base.options import (
    BadWords,
    Count,
    Depth,
    MaxNewTokens,
    MinNewTokens,
    SamplingOptions,
    Stop,
    StopTokenIds,
    System,
)
from specdec.base.settings import Whole
from specdec.engine.engine import Engine
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.metrics import RequestMetrics
from specdec.engine.request import Request
from specdec.runtimes.native.experts import Counters
from specdec.speculation.constraints import CompiledConstraint, Constraint
from specdec.speculation.verifier import Verifier

Options = Mapping[str, Any] | None


class DecoderOptions(TypedDict, total=False):
    """The keyword arguments of ``SpecDecoder`` besides the model and the drafter; ``SpecDecoder`` explains them."""

    drafter_options: Options
    runtime: str
    weights: str
    kv_cache: str
    verifier: str | Verifier
    verifier_options: Options
    expert_cache: float | None
    expert_prefetch: bool
    learn: bool | None
    prefix_reuse: bool
    packed: bool


class RequestOptions(SamplingOptions, total=False):
    """The options of a request.

    max_new_tokens: maximum number of new tokens, 128 by default; the model's context bounds them, too.
    min_new_tokens: number of tokens before which no end token, stop token or stop string ends the text.
    temperature to logit_bias: as in ``SamplingParams``. Without a seed, each call draws a new one.
    use_model_defaults: sampling options that are not given are those of the model's ``generation_config``, as in
    ``model.generate``; else they are those of ``SamplingParams``.
    stop: strings that end the text; they may contain special tokens.
    stop_token_ids: tokens that end the text, and are not in it; they are the last of ``token_ids``.
    bad_words: texts that must not come, as in vLLM: the last token of each, as it is tokenised with and without a space
    before it, is ruled out after its others.
    apply_chat_template: wrap text in the chat template, as one message of the user; None does so if the tokenizer has
    one. Chat messages are always wrapped, token ids never. Where it is False, or None and there is no template, the new
    text continues the prompt: a space between them stays.
    system: a system message before the prompt.
    logits_processor: processors of transformers, applied at every position.
    ignore_eos: continue after end tokens.
    constraint: a Json, Regex, Grammar or Choice that the new text must follow; limit and stop strings may still cut it.
    Tokens without an alternative are drafted without the drafter. One that cannot be compiled raises SpecDecError.
    logprobs: return the log-probability of each new token, and this many of the likeliest tokens at its position. These
    are the model's own, before processors, temperature and constraints.
    prompt_logprobs: return those of the prompt, too.
    """

    max_new_tokens: MaxNewTokens
    min_new_tokens: MinNewTokens
    stop: Stop
    stop_token_ids: StopTokenIds
    bad_words: BadWords
    apply_chat_template: bool | None
    use_model_defaults: bool
    system: System
    logits_processor: Sequence[Callable[..., Any]]
    ignore_eos: bool
    constraint: Constraint | CompiledConstraint | None
    logprobs: Annotated[Whole, Field(ge=0)] | None
    prompt_logprobs: bool


class GenerationOptions(RequestOptions, total=False):
    """The options of ``generate``, ``generate_batch`` and ``stream``.

    num_speculative_tokens: depth of each draft. "auto", the default, chooses it from measured costs and the acceptance
    so far, down to plain decoding.
    max_rows: maximum number of rows that are decoded together; the next starts when one has ended. None is all.
    """

    num_speculative_tokens: Depth
    max_rows: Count | None


@dataclass
class GenerationOutput:
    """The output of one request (row), finished or interrupted.

    text: the new text, without the prompt and without special tokens; it ends before a stop string.
    token_ids: ids of all new tokens; with a lossless verifier, those of plain decoding. The last ones are the end
        token, or the tokens of a stop string.
    finish_reason: "eos": an end token of the model has come; "stop": a stop string or stop token has come; "length":
        the limit on new tokens or the model's context was reached; "interrupted": the request was closed before its
        end, or failed.
    metrics: times in seconds, numbers of tokens and steps, and acceptance of the request's drafts (``RequestMetrics``).
    logprobs: the log-probability of each new token, and the likeliest tokens at its position; None: not requested.
    prompt_logprobs: the same for the prompt's tokens from the second on; None: not requested.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: RequestMetrics
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None

    @classmethod
    def of(cls, request: Request) -> GenerationOutput:
        """Return what ``request`` has generated so far, as its output.

        Call it when no more text is read: the end of the text is flushed, also an incomplete character.
        """
        text = text_of(request)
        text.finish()
        reason = request.finish_reason if request.error is None else None
        reason = "interrupted" if reason in (None, "cancelled") else reason
        own = None if request.logprobs is None else list(request.token_logprobs)
        before = list(request.prompt_token_logprobs) if request.prompt_logprobs else None
        return cls(text.text, request.ids[len(request.prompt) :], reason, request.metrics, own, before)

    def as_dict(self) -> dict[str, Any]:
        """Return {field name: JSON value}, without the fields that are None."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        for name in ("logprobs", "prompt_logprobs"):
            if name in found:
                found[name] = [token.as_dict() for token in found[name]]
        return found | {"metrics": self.metrics.as_dict()}


class Generation:
    """A running generation. Iterating yields, per step, the new text of each row, which may be "".

    ``steps`` runs the same steps without decoding text; ``outputs`` returns the text at the end.

    engine: runs the steps, and has the drafter until the generation is closed.
    requests: one for each row.
    loads: counters of reads of a mixture's experts, as they were after the prefill; None before, and for models whose
        experts are all in memory.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.requests = engine, list(requests)
        for request in requests:
            engine.submit(request)
        self.loads: Counters | None = None

    def __iter__(self) -> Iterator[list[str]]:
        for _ in self.steps():
            timer, texts = self.engine.timer, [(request, text_of(request)) for request in self.requests]
            timer.restart()
            pieces = [text.take() if request.finish_reason is None else text.finish() for request, text in texts]
            timer.mark("detokenise")
            yield pieces

    def steps(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Run the engine's steps until all rows have ended; yield after each the new tokens, without their text.

        Yields a list of pairs (index of the row, ids of its new tokens) for the rows that have any. Raises the
        SpecDecError that ended a row.
        """
        row = {request: number for number, request in enumerate(self.requests)}
        for events in self.engine.steps():
            if self.loads is None and (experts := self.engine.target.experts) is not None:
                self.loads = replace(experts.counters)
            if events:  # a long prompt takes several steps
                yield [(row[request], tokens) for request, tokens in events]
            if error := next((request.error for request in self.requests if request.error is not None), None):
                raise error
        self.close()

    def outputs(self) -> list[GenerationOutput]:
        """Return the output of each row, in their order, so far. Call it when no more steps run, also after ``close``.

        The metrics of a mixture's experts are set here.
        """
        if self.loads is not None and (experts := self.engine.target.experts) is not None:
            decoded = sum(r.metrics.num_new_tokens - 1 for r in self.requests)  # prefills decode the first tokens
            for request in self.requests:
                request.metrics.experts = experts.figures(self.loads, decoded)
        return [GenerationOutput.of(request) for request in self.requests]

    def close(self) -> None:
        """End the generation after the current step, and free its cache; ``outputs`` stays available."""
        self.engine.close()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *error: object) -> None:
        if not sys.is_finalizing():  # modules are gone then, of a stream that the process left open
            self.close()
