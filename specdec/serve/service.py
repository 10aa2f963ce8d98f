"""From request bodies to requests of the engine. Knows no HTTP."""

from __future__ import annotations

import contextlib
import inspect
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from specdec.api.decoder import SpecDecoder
from specdec.api.text import SharedTokenizer, encode
from specdec.base.errors import PromptTooLongError, QueueFullError, SpecDecError
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.engine.scheduler import SHARED
from specdec.kvcache.prefix import common
from specdec.serve.answer import Prepared
from specdec.serve.chat import message
from specdec.serve.choice import ResponseChoice
from specdec.serve.clients import Client
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics
from specdec.serve.parts import Part
from specdec.serve.schema import ChatBody, CompletionBody, GenerationBody, Message, TokenizeBody
from specdec.serve.settings import ServerSettings
from specdec.serve.tools import HARMONY, PLAIN, CallFormat, find_format, find_thoughts, tool_grammar
from specdec.speculation.constraints import CompiledConstraint, Constraint
from specdec.speculation.sampling import streams

TEMPERATURE = 1.0  # OpenAI's default
TOO_LONG = "context_length_exceeded"
SEEDS = 2**53  # JavaScript's integers
PROMPT_END = 16  # tokens that may begin reasoning
SWITCHES = "enable_thinking", "thinking"  # what chat templates call it
EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}  # gpt-oss knows three
MAX_LOGPROBS = 4_000_000  # of a request with several choices; each takes about 100 bytes


class Service:
    """One model and its engine. started: Unix time in seconds."""

    def __init__(self, decoder: SpecDecoder, engine: Engine, settings: ServerSettings) -> None:
        self.decoder, self.engine, self.settings = decoder, engine, settings
        self.tokenizer, self.context = decoder.tokenizer, decoder.target.context
        self.metrics = Metrics(settings.name, engine.stats)
        self.started = int(time.time())
        self.next_turns = dict[str | None, Request]()  # of each key the last that was prepared

    def check_engine(self) -> None:
        if self.engine.closed:
            raise ApiError(503, "the engine has ended; restart the server", code="engine_ended")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.name:
            message = f"there is no model '{name[:100]}'; this server has '{self.settings.name}'"
            raise ApiError(404, message, "model", "model_not_found")

    def check_limits(self, body: GenerationBody, prompts: int = 1) -> None:
        """Raise ApiError if a count exceeds this server's limits, before anything of that size is made."""
        self.check_model(body.model)
        self.check_engine()
        choices, wanted, most = (body.n or 1) * prompts, body.max_new_tokens, self.settings.max_tokens
        if choices > self.settings.max_choices:
            message = f"{choices} choices exceed the limit, {self.settings.max_choices}; lower n or send fewer prompts"
            raise ApiError(400, message, "n", "invalid_value")
        if most is not None and wanted is not None and wanted > most:
            message = f"{wanted} new tokens exceed this server's limit of {most}; ask for fewer"
            raise ApiError(400, message, "max_tokens", "invalid_value")
        self._check_logprobs(body, choices, choices * self._max_new_tokens(body))
        self.check_token_ids("logit_bias", list(body.bias_by_token))

    def _check_logprobs(self, body: GenerationBody, choices: int, tokens: int) -> None:
        """Raise ApiError if ``tokens``, of all choices, would have too many log-probabilities."""
        if body.num_logprobs is not None and choices > 1 and tokens * (1 + body.num_logprobs) > MAX_LOGPROBS:
            message = f"up to {tokens} tokens in {choices} choices have more than {MAX_LOGPROBS} log-probabilities"
            raise ApiError(400, f"{message}; set max_tokens, or ask for fewer", "logprobs", "invalid_value")

    def _max_new_tokens(self, body: GenerationBody) -> int:
        """The smallest limit on new tokens: the client's, the server's and the model's."""
        limits = body.max_new_tokens, self.settings.max_tokens, self.context
        return min(limit for limit in limits if limit is not None)

    def prepare_chat(self, body: ChatBody) -> Prepared:
        """Encode a chat, and compile what its answer must be."""
        tools, template = body.callable_tools, self.template(body.callable_tools)
        form, thoughts = find_format(template), find_thoughts(template)
        if tools:
            form = self.call_format(template)
        elif form is not HARMONY:  # marks of calls stay special without tools
            form = PLAIN
        prompt, constraint = self.encode_chat(body), self.constraint(body)
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
        if constraint is not None:
            state = constraint.state(prompt)
            inside, thoughts = state.inside, thoughts if state.inside or state.may_reason else None
        else:
            end = self.decode(prompt[-PROMPT_END:], special=True).rstrip()
            inside = thoughts is not None and end.endswith(thoughts[0].rstrip())
        single, forced = not body.allows_several_calls, body.forced_tools
        return Prepared(prompt, constraint, form, forced or schemas, single, thoughts, inside, bool(forced))

    def prepare_completion(self, body: CompletionBody) -> tuple[list[list[int]], list[str], CompiledConstraint | None]:
        """The prompts, their texts if they are echoed, and the constraint on the answers."""
        prompts = [self.encode_text(prompt) for prompt in body.prompts]
        if body.echo:
            n, new = body.n or 1, self._max_new_tokens(body)
            self._check_logprobs(body, n * len(prompts), n * sum(len(ids) + new for ids in prompts))
        texts = [p if isinstance(p, str) else self.decode(p) for p in body.prompts if body.echo]
        return prompts, texts, self.constraint(body)

    def tokenize(self, body: TokenizeBody) -> list[int]:
        if body.messages is None:
            return self.encode_text(body.prompt or "")
        return self._encode("messages", [message.for_template() for message in body.messages])

    def encode_chat(self, body: ChatBody) -> list[int]:
        messages, tools = [message.for_template() for message in body.messages], body.callable_tools
        how = {"template": self.template_arguments(body), "continue_last": body.continue_final_message}
        return self._encode("messages", messages, tools=tools, **how)

    def template(self, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The chat template for a request with ``tools``; "" if there is none."""
        if not getattr(self.tokenizer, "chat_template", None):
            return ""
        return str(self.tokenizer.get_chat_template(tools=list(tools) or None))

    def template_arguments(self, body: ChatBody) -> dict[str, Any]:
        """The client's arguments for the chat template. Raises ApiError for one that it does not have."""
        given = dict(body.chat_template_kwargs or {})
        known = set(re.findall(r"\w+", self.template(body.callable_tools)))
        known -= {"messages", *self.tokenizer.special_tokens_map}
        known -= set(inspect.signature(self.tokenizer.apply_chat_template).parameters)
        for name in given:
            if name not in known:
                message = f"this model's chat template has no argument '{name[:64]}'; leave it out"
                raise ApiError(400, message, "chat_template_kwargs", "invalid_value")
        if (effort := body.reasoning_effort) is None:
            return given
        if "reasoning_effort" in known:
            return {"reasoning_effort": EFFORTS.get(effort, effort)} | given
        switch = next((name for name in SWITCHES if name in known), None)
        return ({switch: effort != "none"} if switch else {}) | given

    def call_format(self, template: str) -> CallFormat:
        """How the model writes tool calls. Raises ApiError if that is unknown."""
        if isinstance(found := find_format(template), CallFormat):
            return found
        message = "this model's chat template has no tools or an unknown format of calls; leave 'tools' out"
        raise ApiError(400, message, "tools", "unsupported_parameter")

    def encode_text(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            self.check_length("prompt", len(prompt))
        return self._encode("prompt", prompt, chat=False)

    def _encode(self, name: str, prompt: Any, **options: Any) -> list[int]:
        """Token ids of the parameter ``name``. Raises ApiError if it cannot be encoded or is too long."""
        try:
            ids = encode(self.tokenizer, prompt, context=self.context, **options)
        except SpecDecError as error:
            code = TOO_LONG if isinstance(error, PromptTooLongError) else "invalid_value"
            raise ApiError(400, str(error), name, code) from None
        self.check_length(name, len(ids))
        self.check_token_ids(name, ids)
        return ids

    def check_length(self, name: str, tokens: int, most: int | None = None) -> None:
        """Raise ApiError for more than ``most`` tokens; None is the limit of prompts."""
        if most is None:
            most = min(self.context - 1, self.settings.max_prompt_tokens or self.context)
        if tokens > most:
            message = f"'{name}' has {tokens} tokens, more than this server's limit of {most}; shorten it"
            raise ApiError(400, message, name, TOO_LONG)

    def check_token_ids(self, name: str, ids: Sequence[int]) -> None:
        if max(ids, default=0) >= self.decoder.target.vocab_size:
            message = f"{name} has token ids outside the model's vocabulary of {self.decoder.target.vocab_size}"
            raise ApiError(400, message, name, "invalid_value")

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ``ids``. special: keep special tokens."""
        return SharedTokenizer(self.tokenizer).decode(ids, special)

    def constraint(self, body: GenerationBody) -> CompiledConstraint | None:
        """The compiled constraint on the answers; compiling may take a second."""
        rule: Constraint | None = None if body.response_format is None else body.response_format.constraint
        name = "response_format"
        try:
            if isinstance(body, ChatBody) and body.forced_tools:
                form, name = self.call_format(self.template(body.callable_tools)), "tools"
                if not form.forceable:
                    message = "calls in this model's format cannot be forced; set tool_choice to 'auto'"
                    raise ApiError(400, message, "tool_choice", "unsupported_parameter")
                rule = tool_grammar(form, body.forced_tools, body.allows_several_calls, self.tokenizer)
            return None if rule is None else self.decoder.compile_constraint(rule, body.ignore_eos)
        except SpecDecError as error:
            raise ApiError(400, str(error), name, "invalid_value") from None

    def submit(
        self,
        prompts: Sequence[list[int]],
        body: GenerationBody,
        client: Client,
        constraint: CompiledConstraint | None = None,
        made: Prepared | None = None,
    ) -> list[ResponseChoice]:
        """Submit a request for each choice: ``n`` per prompt. Raises ApiError if not all are accepted.

        made: the chat, if it is one.
        """
        shown = () if made is None else made.shown
        seed = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        rows = [prompt for prompt in prompts for _ in range(body.n or 1)]
        choices: list[ResponseChoice] = []
        client.begin(len(rows))
        try:
            for index, (prompt, stream) in enumerate(zip(rows, streams(rows), strict=True)):
                request = self._request(prompt, body, client, constraint, seed=seed, stream=stream)
                if made is not None and (stop := made.stop(self.tokenizer, body.stop_strings)) is not None:
                    request.stop = stop
                handle = self.engine.submit(request)
                choices.append(
                    ResponseChoice(index, handle, prompt, self.tokenizer, body.stop_strings, self.metrics, shown)
                )
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        finally:
            if len(choices) < len(rows):
                client.end(len(rows), 0)
                for choice in choices:
                    choice.close()
        return choices

    def prepare_next_turn(self, body: ChatBody, answer: Sequence[Part], ids: Sequence[int], client: Client) -> None:
        """Run in the background what is known of the prompt after an ``answer``, where it differs from ``ids``.

        ids: the tokens of prompt and answer.
        """
        said, head = message(answer), {"role": "user"}
        if calls := said.get("tool_calls"):
            head = {"role": "tool", "tool_call_id": calls[0]["id"]}
        with contextlib.suppress(ApiError, SpecDecError, ValueError):  # nobody waits for it
            last = Message.model_validate({"role": "assistant"} | said)
            both = []
            for text in "ab":  # what the two prompts share is known
                messages = [*body.messages, last, Message.model_validate(head | {"content": text})]
                both.append(self.encode_chat(body.model_copy(update={"messages": messages})))
            known = both[0][: common(*both)]
            if len(known) > common(known, ids) + SHARED:
                warm = body.model_copy(update={"max_tokens": 0, "max_completion_tokens": None, "logprobs": None})
                request = self._request(known, warm, client, None, seed=0, stream=0)
                before, self.next_turns[client.scope] = self.next_turns.get(client.scope), request
                if before is not None:
                    before.cancelled = True  # if it still waits
                self.engine.enqueue(request)

    def drafter_label(self, body: GenerationBody) -> str:
        """The drafter of a request, for a header; "none" while the drafter is off."""
        on = body.speculative_decoding and self.engine.drafting == "on"
        return quote(self.decoder.drafter.label if on else "none", safe="+=-. /")

    def finish(self, choices: Sequence[ResponseChoice], client: Client) -> None:
        """Close the choices of a request, which has finished or whose client has disconnected, and count them."""
        now = time.perf_counter()
        for choice in choices:
            choice.close()
            self.metrics.record_finished(choice.handle.metrics, choice.answer.finish or "abort", now - choice.started)
        used = sum(choice.handle.metrics.num_prompt_tokens + choice.answer.num_tokens for choice in choices)
        client.end(len(choices), used)
        if client.key is not None:
            self.metrics.record_key(client.name, len(choices), used)

    def _request(
        self,
        prompt: list[int],
        body: GenerationBody,
        client: Client,
        constraint: CompiledConstraint | None,
        **options: Any,
    ) -> Request:
        max_new_tokens = self._max_new_tokens(body)
        request = self.decoder.request(
            prompt,
            max_new_tokens=max(max_new_tokens, 1),
            **{"temperature": TEMPERATURE, **body.sampling_options, **options},
            stop=body.stop_strings,
            ignore_eos=body.ignore_eos,
            draft=body.speculative_decoding,
            constraint=constraint,
            logprobs=body.num_logprobs,
            scope=client.scope,
            prompt_logprobs=body.num_logprobs is not None and isinstance(body, CompletionBody) and body.echo,
        )
        request.max_new_tokens = min(request.max_new_tokens, max_new_tokens)  # 0 scores the prompt alone
        request.background = not max_new_tokens and body.num_logprobs is None
        request.sender = client.sender
        if client.key is not None:
            request.priority, request.scope_rows = client.key.priority, client.key.max_rows
            request.learn = client.key.learn
        return request
