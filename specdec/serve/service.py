"""From clients' requests to those of the engine. Knows no HTTP and no protocol."""

from __future__ import annotations

import inspect
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

from specdec.api.decoder import SpecDecoder
from specdec.api.prompts import encode
from specdec.api.text import decode_ids, text_of
from specdec.base.errors import PromptTooLongError, QueueFullError, SpecDecError
from specdec.engine.engine import Engine
from specdec.engine.request import Handle, Request
from specdec.serve.clients import Client
from specdec.serve.errors import ApiError, TooLongError, invalid
from specdec.serve.metrics import Metrics
from specdec.serve.parts import AnswerParser
from specdec.serve.request import ChatPrompt, GenerationRequest
from specdec.serve.schema import TokenizeBody
from specdec.serve.settings import ServerSettings
from specdec.serve.tools import HARMONY, LLAMA, PLAIN, ChatTemplate, find_format, find_thoughts, tool_grammar
from specdec.speculation.constraints import CompiledConstraint, Constraint
from specdec.speculation.sampling import streams

TEMPERATURE = 1.0  # OpenAI's default
SEEDS = 2**53  # JavaScript's integers
PROMPT_END = 16  # tokens that may begin reasoning
SWITCHES = "enable_thinking", "thinking"  # what chat templates call it
EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}  # gpt-oss knows three
MAX_CHOICES = 64  # of a request: its prompts times n
MAX_LOGPROBS = 4_000_000  # of a request with several choices; each takes about 100 bytes


class Service:
    """Turns clients' requests into requests of one engine.

    asked: in all methods, the client's request (``GenerationRequest``). A choice is one text for one prompt.
    context: maximum number of tokens of a prompt and its answer.
    metrics: the counters that ``/metrics`` shows.
    started: Unix time of the start, in seconds.
    templates: the analysed chat templates, by their text.
    """

    def __init__(self, decoder: SpecDecoder, engine: Engine, settings: ServerSettings) -> None:
        self.decoder = decoder
        self.engine = engine
        self.settings = settings
        self.tokenizer = decoder.tokenizer
        self.context = decoder.target.context
        self.metrics = Metrics(settings.name, engine.stats)
        self.started = int(time.time())
        self.templates = dict[str, ChatTemplate]()

    def check_engine(self) -> None:
        if self.engine.closed:
            raise ApiError(503, "the engine has ended; restart the server", code="engine_ended")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"there is no model '{name[:100]}'; this server has '{self.settings.name}'"
            raise ApiError(404, message, "model", "model_not_found")

    def start(
        self, translate: Callable[[], GenerationRequest], client: Client
    ) -> tuple[GenerationRequest, list[Handle]]:
        """Check, encode and submit a client's request; return it as ``prepare`` completes it, and a handle per choice.

        The call may take seconds, so it runs in a thread. Raises ApiError if the request is refused; then nothing runs.
        translate: makes the request from the body. client: the sender.
        """
        asked = translate()
        self.check_limits(asked)
        asked = replace(asked, model=self.settings.name)
        asked = self.prepare(asked) if asked.chat is None else self.prepare_chat(asked, asked.chat)
        return asked, self.submit(asked, client)

    def check_limits(self, asked: GenerationRequest) -> None:
        """Raise ApiError if a count in the request, such as ``n``, exceeds a limit of this server.

        It is called before anything of that size is made. Also refuses unknown models, ids in ``logit_bias`` that the
        model lacks, and any request after the engine has ended.
        """
        self.check_model(asked.model)
        self.check_engine()
        choices, wanted, most = asked.n * max(len(asked.prompts), 1), asked.max_new_tokens, self.settings.max_tokens
        if choices > MAX_CHOICES:
            raise invalid("n", f"{choices} choices exceed the limit, {MAX_CHOICES}; lower n or send fewer prompts")
        if most is not None and wanted is not None and wanted > most:
            raise invalid("max_tokens", f"{wanted} new tokens exceed this server's limit of {most}; ask for fewer")
        self._check_least(asked)
        self._check_logprobs(asked, choices, choices * self._max_new_tokens(asked))
        self.check_token_ids("logit_bias", list(asked.options.get("logit_bias") or ()))

    def _check_least(self, asked: GenerationRequest) -> None:
        """Raise ApiError if the minimum number of new tokens exceeds the maximum."""
        least, most = asked.options.get("min_new_tokens", 0), self._max_new_tokens(asked)
        if least <= most:
            return
        if asked.max_new_tokens is None:
            message = f"'min_tokens' is {least}, and at most {most} new tokens are possible"
            message += "; lower it" if asked.usual_tokens is None else " without 'max_tokens'; set it, too"
            raise invalid("min_tokens", message)
        message = f"'max_tokens' allows {most} new tokens, fewer than the {least} of 'min_tokens'; change one of them"
        raise invalid("max_tokens", message)

    def _check_logprobs(self, asked: GenerationRequest, choices: int, tokens: int) -> None:
        """Raise ApiError if the answer would have more than ``MAX_LOGPROBS`` log-probabilities in several choices.

        A token has 1 + ``asked.num_logprobs`` of them: its own, and those of the likeliest tokens at its position. One
        choice alone may have any number.

        asked: the client's request; its ``num_logprobs`` is None if it asks for no log-probabilities.
        choices: number of choices of the answer (``n`` times the number of prompts).
        tokens: maximum number of tokens with log-probabilities, in all choices together.
        """
        if asked.num_logprobs is not None and choices > 1 and tokens * (1 + asked.num_logprobs) > MAX_LOGPROBS:
            message = f"up to {tokens} tokens in {choices} choices have more than {MAX_LOGPROBS} log-probabilities"
            raise invalid("logprobs", f"{message}; set max_tokens, or ask for fewer")

    def _max_new_tokens(self, asked: GenerationRequest) -> int:
        """Return the smallest limit on new tokens of a choice among the client's, the server's and the model's."""
        own = asked.usual_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        limits = own, self.settings.max_tokens, self.context
        return min(limit for limit in limits if limit is not None)

    def prepare(self, asked: GenerationRequest) -> GenerationRequest:
        """Return a copy of a request without a chat, with ``ids``, a compiled ``constraint`` and ``echoes``.

        Raises ApiError for prompts that are too long or unusable, and for an invalid constraint.
        """
        prompts = [self.encode_text(prompt) for prompt in asked.prompts]
        if asked.echo:
            new = self._max_new_tokens(asked)
            self._check_logprobs(asked, asked.n * len(prompts), asked.n * sum(len(ids) + new for ids in prompts))
        texts = [p if isinstance(p, str) else self.decode(p) for p in asked.prompts if asked.echo]
        constraint = self.compile(asked, asked.constraint, asked.constraint_from)
        return replace(asked, ids=prompts, constraint=constraint, echoes=texts)

    def prepare_chat(self, asked: GenerationRequest, chat: ChatPrompt) -> GenerationRequest:
        """Return a copy of a chat's request with ``ids``, a compiled ``constraint``, ``new_parser`` and ``shown``.

        chat: the chat of ``asked``. Raises ApiError if the model's template does not support what the chat asks for.
        """
        template, tools, forced = self.template(chat), chat.schemas, chat.forced
        form, thoughts = template.form, template.thoughts
        if not tools and form is not HARMONY:  # marks of calls stay special without tools
            form = PLAIN
        prompt = self.encode_chat(chat, template)
        if forced:
            form, constraint = LLAMA, self.compile(asked, tool_grammar(forced), "tools")
        else:
            constraint = self.compile(asked, asked.constraint, asked.constraint_from)
        if constraint is not None:
            state = constraint.state(prompt)
            inside, thoughts = state.inside, thoughts if state.inside or state.may_reason else None
        else:
            end = self.decode(prompt[-PROMPT_END:], special=True).rstrip()
            inside = thoughts is not None and end.endswith(thoughts[0].rstrip())
        parser = partial(AnswerParser, form, forced or tools, chat.single, thoughts, inside)
        shown = [*form.special, *(thoughts or ())]
        return replace(asked, ids=[prompt], constraint=constraint, new_parser=parser, shown=shown)

    def tokenize(self, body: TokenizeBody) -> list[int]:
        if body.messages is None:
            return self.encode_text(body.prompt or "", body.add_special_tokens is not False)
        return self.encode_chat(body.chat())

    def encode_chat(self, chat: ChatPrompt, template: ChatTemplate | None = None) -> list[int]:
        """Return the token ids of a chat. template: its chat template; None: the method ``template`` finds it.

        Raises ApiError if the template has no tools and the chat has some, and for a chat that cannot be used.
        """
        template = template or self.template(chat)
        if chat.tools and template.form is PLAIN:
            message = "this model's chat template has no tools or an unknown format of calls; leave 'tools' out"
            raise ApiError(400, message, "tools", "unsupported_parameter")
        arguments = self.template_arguments(chat, template)
        how = {"tools": chat.tools, "template": arguments, "continue_last": chat.continue_last}
        return self._encode("messages", chat.messages, **how)

    def template(self, chat: ChatPrompt) -> ChatTemplate:
        """Return what the tokenizer's chat template for ``chat`` supports; chats with tools may have another template.

        The result is kept in ``templates``. A tokenizer without a template gives one that supports nothing.
        """
        text = ""
        if getattr(self.tokenizer, "chat_template", None):
            text = str(self.tokenizer.get_chat_template(tools=chat.tools or None))
        if text not in self.templates:
            others = {"messages", *self.tokenizer.special_tokens_map}
            others.update(inspect.signature(self.tokenizer.apply_chat_template).parameters.keys() - {"documents"})
            arguments = frozenset(re.findall(r"\w+", text)) - others
            self.templates[text] = ChatTemplate(find_format(text), find_thoughts(text), arguments)
        return self.templates[text]

    def template_arguments(self, chat: ChatPrompt, template: ChatTemplate) -> dict[str, Any]:
        """Return the arguments for the chat template ``template``: the client's, and one that sets ``chat.effort``.

        Raises ApiError for one that the template ignores.
        """
        given, known, effort = dict(chat.template), template.arguments, chat.effort
        for name in given:
            if name not in known:
                message = f"this model's chat template has no argument '{name[:64]}'; leave it out"
                raise invalid("chat_template_kwargs", message)
        if effort is None:
            return given
        if "reasoning_effort" in known:
            return {"reasoning_effort": EFFORTS.get(effort, effort)} | given
        switch = next((name for name in SWITCHES if name in known), None)
        return ({switch: effort != "none"} if switch else {}) | given

    def encode_text(self, prompt: str | list[int], add_special: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            self.check_length("prompt", len(prompt), self.context - 1)
        return self._encode("prompt", prompt, chat=False, add_special=add_special)

    def _encode(self, name: str, prompt: Any, **options: Any) -> list[int]:
        """Return the token ids of ``prompt``: text, token ids or messages. Raises ApiError if it cannot be used.

        name: the parameter of the request that has it, for errors. options: keyword arguments of ``prompts.encode``.
        """
        try:
            ids = encode(self.tokenizer, prompt, context=self.context, **options)
        except SpecDecError as error:
            if isinstance(error, PromptTooLongError):
                raise TooLongError(name, self.context, str(error), str(error)) from None
            raise invalid(name, str(error)) from None
        self.check_length(name, len(ids), self.context - 1)
        self.check_token_ids(name, ids)
        return ids

    def check_length(self, name: str, tokens: int, most: int) -> None:
        """Raise ApiError if the parameter ``name`` has more than ``most`` tokens. tokens: how many it has."""
        if tokens > most:
            rest = f"'{name}' has {tokens}; shorten it"
            raise TooLongError(name, self.context, rest, f"{tokens} tokens > {most} maximum")

    def check_token_ids(self, name: str, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.decoder.target.vocab_size:
            message = f"{name} has token ids outside the model's vocabulary of {self.decoder.target.vocab_size}"
            raise invalid(name, message)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of the token ids ``ids``. special: whether to keep special tokens."""
        return decode_ids(self.tokenizer, ids, special)

    def compile(
        self, asked: GenerationRequest, rule: Constraint | CompiledConstraint | None, name: str
    ) -> CompiledConstraint | None:
        """Compile the constraint ``rule`` (None: none), which may take a second. Raises ApiError if it is invalid.

        name: the parameter that ``rule`` comes from, for errors.
        """
        try:
            ignore_eos = asked.options.get("ignore_eos", False)
            return None if rule is None else self.decoder.compile_constraint(rule, ignore_eos)
        except SpecDecError as error:
            raise invalid(name, str(error)) from None

    def submit(self, asked: GenerationRequest, client: Client) -> list[Handle]:
        """Submit a request for each choice to the engine: ``n`` per prompt. Returns their handles, prompt by prompt.

        client: the sender, with its key. Raises ApiError if not all are accepted; then none runs.
        """
        seed = asked.options.get("seed", secrets.randbelow(SEEDS))
        rows = [prompt for prompt in asked.ids for _ in range(asked.n)]
        handles = list[Handle]()
        try:
            for prompt, stream in zip(rows, streams(rows), strict=True):
                handles.append(self.engine.submit(self._request(prompt, asked, client, seed=seed, stream=stream)))
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        finally:
            for handle in handles if len(handles) < len(rows) else ():
                handle.cancel()
        return handles

    def drafter_label(self, asked: GenerationRequest) -> str:
        """Return the drafter's name, percent-encoded for a header; "none" if the request or engine drafts nothing."""
        on = asked.options.get("num_speculative_tokens") != 0 and self.engine.drafting == "on"
        return quote(self.decoder.drafter.traits.label if on else "none", safe="+=-. /")

    def finish(self, handles: Sequence[Handle], client: Client) -> None:
        """End a client's request: cancel its choices that still run, and count all in the metrics.

        Call it once, when the response has ended or the client has gone.

        handles: those of its choices, which may have ended. client: the sender.
        """
        now, tokens = time.perf_counter(), 0
        for handle in handles:
            handle.cancel()
            text = text_of(handle.request)
            seconds, began = now - handle.request.submit_time, handle.request.phases_at_start is not None
            self.metrics.record_finished(handle.metrics, text.finish_reason or "abort", seconds, began)
            tokens += handle.metrics.num_prompt_tokens * began + text.num_read
        if client.key is not None:
            self.metrics.record_key(client.key.name, len(handles), tokens)

    def _request(
        self,
        prompt: list[int],
        asked: GenerationRequest,
        client: Client,
        **options: Any,
    ) -> Request:
        max_new_tokens = self._max_new_tokens(asked)
        options = {"temperature": TEMPERATURE, **asked.options, **options, "max_new_tokens": max(max_new_tokens, 1)}
        scored = asked.echo and asked.num_logprobs is not None
        options |= {"constraint": asked.constraint, "shown": asked.shown, "scope": client.scope}
        options["apply_chat_template"] = asked.chat is not None and not asked.chat.continue_last
        request = self.decoder.request(prompt, **options, prompt_logprobs=scored)
        request.max_new_tokens = min(request.max_new_tokens, max_new_tokens)  # 0 only scores the prompt
        request.background = not max_new_tokens and asked.num_logprobs is None
        request.sender = client.sender
        if client.key is not None:
            request.priority, request.scope_rows = client.key.priority, client.key.max_rows
            request.learn = client.key.learn
        return request
