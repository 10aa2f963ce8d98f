"""From what clients send to requests of the engine. Knows no HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import PromptTooLongError, QueueFullError, SpecDecError
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.serve.choice import Choice
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics
from specdec.serve.schema import ChatBody, CompletionBody, Message, Sampling, TokenizeBody
from specdec.serve.settings import Settings
from specdec.serve.tools import ToolForm, form_of, grammar_of
from specdec.speculation.constraints import CompiledConstraint, Constraint
from specdec.speculation.sampling import streams

TEMPERATURE = 1.0  # OpenAI's default
TOO_LONG = "context_length_exceeded"
SEEDS = 2**53  # JavaScript's whole numbers
MAX_SCORED = 4_000_000  # log-probabilities of a request with several choices; each takes about 100 bytes


class Service:
    """One model behind an engine. ``started`` is when, in seconds since 1970."""

    def __init__(self, decoder: SpecDecoder, engine: Engine, settings: Settings) -> None:
        self.decoder, self.engine, self.settings = decoder, engine, settings
        self.tokenizer, self.context = decoder.tokenizer, decoder.target.context
        self.metrics = Metrics(settings.name, engine.stats)
        self.started = int(time.time())

    def check_engine(self) -> None:
        if self.engine.closed:
            raise ApiError(503, "the engine has ended; restart the server", code="engine_ended")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"there is no model '{name[:100]}'; this server has '{self.settings.name}'"
            raise ApiError(404, message, "model", "model_not_found")

    def check(self, body: Sampling, prompts: int = 1) -> None:
        """Raises ApiError for counts beyond this server's limits: before anything is made of them."""
        self.check_model(body.model)
        self.check_engine()
        n, most = body.n or 1, self.settings.max_choices
        if n * prompts > most:
            message = f"{n * prompts} choices (prompts times n) are too many; this server gives at most {most}"
            raise ApiError(400, message, "n", "invalid_value")
        cap = self.settings.max_tokens
        if cap is not None and body.limit is not None and body.limit > cap:
            message = f"{body.limit} new tokens are too many; this server gives at most {cap}"
            raise ApiError(400, message, "max_tokens", "invalid_value")
        if body.top is not None:
            bounds = [bound for bound in (body.limit, cap, self.context) if bound is not None]
            if n * prompts > 1 and n * prompts * min(bounds) * (1 + body.top) > MAX_SCORED:
                message = (
                    f"{n * prompts} choices of up to {min(bounds)} tokens have more than {MAX_SCORED} log-probabilities"
                )
                raise ApiError(400, f"{message}; set max_tokens, or ask for fewer", "logprobs", "invalid_value")
        self.check_tokens("logit_bias", list(body.bias))

    def chat(self, body: ChatBody) -> tuple[ToolForm | None, list[str], list[int], CompiledConstraint | None]:
        """How calls of its tools are written, their names, the prompt, and what the answer must be."""
        offered = body.offered
        form = self.tool_form(offered)
        prompt = self.encode_chat(body.messages, offered)
        names = list(body.forced) or [tool["function"]["name"] for tool in offered]
        return form, names, prompt, self.constraint(body)

    def completion(self, body: CompletionBody) -> tuple[list[list[int]], list[str], CompiledConstraint | None]:
        """The prompts, their texts where they come before the answers, and what the answers must be."""
        prompts = [self.encode_text(prompt) for prompt in body.prompts]
        texts = [p if isinstance(p, str) else self.decode(p) for p in body.prompts if body.echo]
        return prompts, texts, self.constraint(body)

    def tokenize(self, body: TokenizeBody) -> list[int]:
        return self.encode_text(body.prompt or "") if body.messages is None else self.encode_chat(body.messages)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        texts = [message.as_dict() for message in messages]
        return self._encode("messages", texts, tools=tools)

    def tool_form(self, tools: Sequence[dict[str, Any]]) -> ToolForm | None:
        """How the model writes calls of ``tools``; None: there are none."""
        if not tools:
            return None
        template = getattr(self.tokenizer, "chat_template", None) and self.tokenizer.get_chat_template(tools=tools)
        if (form := form_of(str(template))) is None:
            message = "the chat template of this model has no tools, or writes calls in a form that is not known"
            raise ApiError(400, message, "tools", "unsupported_parameter")
        return form

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            self.check_fits("prompt", len(prompt))
        return self._encode("prompt", prompt, chat=False)

    def _encode(self, name: str, prompt: Any, **how: Any) -> list[int]:
        """Token ids of the parameter ``name``. Raises ApiError for what cannot be encoded, or does not fit."""
        try:
            ids = encode(self.tokenizer, prompt, context=self.context, **how)
        except SpecDecError as error:
            code = TOO_LONG if isinstance(error, PromptTooLongError) else "invalid_value"
            raise ApiError(400, str(error), name, code) from None
        self.check_fits(name, len(ids))
        self.check_tokens(name, ids)
        return ids

    def check_fits(self, name: str, tokens: int, most: int | None = None) -> None:
        if most is None:
            most = min(self.context - 1, self.settings.max_prompt_tokens or self.context)
        if tokens > most:
            message = f"there are {tokens} tokens in '{name}'; this server takes at most {most}; shorten it"
            raise ApiError(400, message, name, TOO_LONG)

    def check_tokens(self, name: str, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.decoder.target.vocab_size:
            message = f"{name} has token ids outside the model's vocabulary of {self.decoder.target.vocab_size}"
            raise ApiError(400, message, name, "invalid_value")

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text, with or without ``special`` tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def constraint(self, body: Sampling) -> CompiledConstraint | None:
        """What the answers must be; it may take a second to prepare."""
        rule: Constraint | None = None if body.response_format is None else body.response_format.constraint
        name = "response_format"
        if isinstance(body, ChatBody) and body.forced:
            form, name = self.tool_form(body.offered), "tools"
            assert form is not None
            rule = grammar_of(form, body.forced, body.several, self.tokenizer)
        if rule is None:
            return None
        try:
            return self.decoder.compile_constraint(rule, body.ignore_eos)
        except SpecDecError as error:
            raise ApiError(400, str(error), name, "invalid_value") from None

    def submit(
        self,
        prompts: Sequence[list[int]],
        body: Sampling,
        rule: CompiledConstraint | None = None,
        shown: Sequence[str] = (),
        scope: str | None = None,
    ) -> list[Choice]:
        """Start every choice of a request: ``n`` for each prompt. shown: special tokens that are in their text. scope:
        as in ``engine.Request``.

        Raises ApiError where none is started.
        """
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        rows = [prompt for prompt in prompts for _ in range(body.n or 1)]
        choices: list[Choice] = []
        try:
            for index, (prompt, stream) in enumerate(zip(rows, streams(rows), strict=True)):
                request = self._request(prompt, body, rule, seed=seed, stream=stream, scope=scope)
                handle = self.engine.submit(request)
                choices.append(Choice(index, handle, prompt, self.tokenizer, body.stops, self.metrics, shown))
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        finally:
            if len(choices) < len(rows):
                for choice in choices:
                    choice.close()
        return choices

    def drafter_of(self, body: Sampling) -> str:
        """The drafter that a request uses, as a header may name it; "none", too, while it is off as it has failed."""
        on = body.speculative_decoding and self.engine.drafting == "on"
        return quote(self.decoder.drafter.label if on else "none", safe="+=-. /")

    def end(self, choices: Sequence[Choice]) -> None:
        """A request is over, or its client has gone."""
        now = time.perf_counter()
        for choice in choices:
            choice.close()
            self.metrics.ended(choice.handle.metrics, choice.answer.finish or "abort", now - choice.began)

    def _request(self, prompt: list[int], body: Sampling, rule: CompiledConstraint | None, **how: Any) -> Request:
        limit = min(bound for bound in (body.limit, self.settings.max_tokens, self.context) if bound is not None)
        request = self.decoder.request(
            prompt,
            max_new_tokens=max(limit, 1),
            **{"temperature": TEMPERATURE, **body.sampling, **how},
            stop=body.stops,
            ignore_eos=body.ignore_eos,
            draft=body.speculative_decoding,
            constraint=rule,
            logprobs=body.top,
            prompt_logprobs=body.top is not None and isinstance(body, CompletionBody) and body.echo,
        )
        request.max_new_tokens = min(request.max_new_tokens, limit)  # 0: the prompt alone is scored
        return request
