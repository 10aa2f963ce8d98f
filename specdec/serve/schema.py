"""Request bodies. A parameter that is not declared here is ignored, unless it would change the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from specdec.api.generation import GenerationOptions
from specdec.base import options
from specdec.serve.errors import invalid
from specdec.serve.request import ChatPrompt, GenerationRequest, called, thought
from specdec.speculation.constraints import Choice, Constraint, Grammar, Json, Regex

ignored = ContextVar[set[str] | None]("ignored", default=None)  # names of members that a request's body has in vain
OPTIONS = {*GenerationOptions.__annotations__}
MAX_STOPS = 4
MAX_BIASES = 1024
MAX_MESSAGES = MAX_PROMPTS = 2048
MAX_PARTS = 1024
MAX_CALLS = MAX_TOOLS = 128
Text = Annotated[str, Field(min_length=1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
StopIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_BIASES, fail_fast=True)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_BIASES, fail_fast=True)]
Top = Annotated[int, Field(ge=0, le=20)]
TokenId = Annotated[int, Field(strict=False, ge=0)]  # as a name in JSON
Biases = Annotated[dict[TokenId, options.Bias], BeforeValidator(lambda given: _check_count(given))]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Messages = Annotated[list["Message"], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)

# Parameters that would change the text, by the values that mean "not used". A body refuses what it does not declare.
UNUSED: dict[str, tuple[Any, ...]] = {
    name: values
    for values, names in (
        ((), "adapter audio enable_thinking guided_choice guided_grammar guided_json guided_regex json_schema"),
        ((), "lora_request max_completion_tokens max_new_tokens max_output_tokens max_tokens reasoning_effort"),
        ((), "samplers thinking truncate_prompt_tokens web_search_options"),
        (("",), "chat_template format grammar guided_whitespace_pattern instructions suffix system"),
        (([],), "allowed_token_ids documents functions logits_processors lora stop stop_sequences tools"),
        (({},), "output_config reasoning"),
        ((True,), "add_generation_prompt do_sample parallel_tool_calls skip_special_tokens"),
        ((False,), "continue_final_message echo include_stop_str_in_output use_beam_search"),
        ((0,), "dry_multiplier dynatemp_range mirostat no_repeat_ngram_size xtc_probability"),
        ((1,), "best_of length_penalty n num_beams num_return_sequences repeat_penalty tfs_z typical_p"),
        ((-1,), "n_predict num_predict"),
        ((-1, 0), "top_n_sigma"),
        (("none", "auto"), "function_call tool_choice"),
        ((["text"],), "modalities"),
        (({"type": "text"},), "response_format"),
        (({}, {"format": {"type": "text"}}), "text"),
    )
    for name in names.split()
}


def _check_count(given: Any) -> Any:
    """Limit an object before its members are validated, since pydantic reports every wrong one."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"an object has {len(given)} members; at most {MAX_BIASES} are allowed")
    return given


class Strict(BaseModel):
    """An object. Members that are neither declared nor in ``unused`` are ignored, and so are those that are null."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unused: ClassVar[
        Mapping[str, Sequence[Any]]
    ] = {}  # members refused, if not declared, unless of one of these values

    @model_validator(mode="before")
    @classmethod
    def _check_members(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        declared = {field.alias or name for name, field in cls.model_fields.items()}
        used = {
            key: value
            for key, value in given.items()
            if value is not None and (key in declared or value not in cls.unused.get(key, ()))
        }
        known = declared | cls.unused.keys()
        if (names := ignored.get()) is not None:
            names.update(used.keys() - known)
        return {key: value for key, value in used.items() if key in known}


class StructuredOutputs(Strict):
    """vLLM's ways to constrain the text. Exactly one is given."""

    unused = {"structural_tag": (), "whitespace_pattern": ("",), "disable_additional_properties": (False,)}

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def rules(self) -> list[Constraint]:
        """The constraints that are given."""
        given = self.json_, self.regex, self.choice, self.grammar, {"type": "object"} if self.json_object else None
        makes: tuple[Callable[[Any], Constraint], ...] = (Json, Regex, Choice, Grammar, Json)
        return [make(value) for make, value in zip(makes, given, strict=True) if value is not None]


class Options(Strict):
    """Parameters of all protocols beside those that each calls by a name of its own.

    num_speculative_tokens: most tokens that are drafted in a step; 0 decodes plainly.
    include_metrics: add metrics of the request to the response.
    chat_template_kwargs: arguments of the model's template, such as ``enable_thinking``.
    """

    stream: bool | None = None
    temperature: Annotated[options.Temperature, Field(le=2)] | None = None
    top_p: options.TopP | None = None
    top_k: Annotated[options.TopK, Field(le=2**31 - 1), BeforeValidator(lambda k: 0 if k == -1 else k)] | None = None
    min_p: options.MinP | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: options.FrequencyPenalty | None = None
    presence_penalty: options.PresencePenalty | None = None
    logit_bias: Biases | None = None
    seed: options.Seed | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: StopIds | None = None
    bad_words: Annotated[list[Stop], Field(max_length=MAX_BIASES, fail_fast=True)] | None = None
    structured_outputs: StructuredOutputs | None = None
    num_speculative_tokens: Annotated[int, Field(ge=0)] | None = None
    include_metrics: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def generation(self, form: Constraint | None, limits: Mapping[str, Any], **more: Any) -> GenerationRequest:
        """The request. form: the constraint of the protocol. limits: options beside those here. Raises ApiError."""
        rules = self.structured_outputs.rules if self.structured_outputs else []
        rules += [] if form is None else [form]
        if len(rules) > 1:
            raise invalid("response_format", "the text can have one format only; leave the others out")
        chosen = self.model_dump(include=OPTIONS) | {"min_new_tokens": self.min_tokens}
        return GenerationRequest(
            options=cast(GenerationOptions, {k: v for k, v in (chosen | dict(limits)).items() if v is not None}),
            constraint=rules[0] if rules else None,
            stream=bool(self.stream),
            include_metrics=self.include_metrics,
            **more,
        )


class StreamOptions(Strict):
    """include_draft_depth: send a chunk per token, with its depth in the draft (0: the model chose it)."""

    include_usage: bool = False
    include_draft_depth: bool = False


class JsonSchema(Strict):
    """The output follows ``schema`` with or without ``strict``."""

    name: Annotated[str, Field(max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """json_object: any JSON object. json_schema: JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type: json_schema, and only with it")
        return self

    @property
    def constraint(self) -> Json | None:
        return json_of(self.type, self.json_schema)


def json_of(kind: str, schema: JsonSchema | None) -> Json | None:
    """The constraint of a format of the type ``kind``."""
    if kind == "text":
        return None
    return Json({"type": "object"} if kind == "json_object" or schema is None else schema.schema_)


class GenerationBody(Options):
    """What OpenAI's first two endpoints have in common.

    max_tokens: 0 only runs the prompt, in the background, for later requests to begin with.
    per_step_metrics: add metrics of each step to the response.
    """

    unused = UNUSED

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    include_metrics: bool = True
    per_step_metrics: bool = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def asked(self, most: int | None, logprobs: int | None, **more: Any) -> GenerationRequest:
        """The request. most: new tokens. Raises ApiError."""
        streamed = self.stream_options or StreamOptions()
        return self.generation(
            self.response_format.constraint if self.response_format else None,
            {"max_new_tokens": most, "logprobs": logprobs, "stop": self.stop},
            model=self.model,
            n=self.n or 1,
            include_usage=streamed.include_usage,
            include_draft_depth=streamed.include_draft_depth,
            per_step_metrics=self.per_step_metrics,
            **more,
        )


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that the model has made. arguments: a JSON object as text."""

    name: Annotated[str, Field(max_length=128)]
    arguments: Annotated[pydantic.Json[dict[str, Any]], BeforeValidator(lambda given: given or "{}")]


class ToolCall(Strict):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    unused = dict.fromkeys(("annotations", "audio", "function_call", "refusal"), ([],))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content; only an assistant's with tool_calls may have none")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        found: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        found |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key))}
        if self.reasoning_content is not None:
            found |= thought(self.reasoning_content)
        if self.tool_calls:
            found["tool_calls"] = [
                called(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        return found


class Function(Strict):
    """parameters: a JSON schema of the arguments; None without arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The function as chat templates expect it."""
        return self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)


class OfFunction(Strict):
    type: Literal["function"]


class Tool(OfFunction):
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(OfFunction):
    function: FunctionName


class ChatBody(GenerationBody):
    """continue_final_message: the answer goes on with the last message, which is the assistant's."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.add_generation_prompt is self.continue_final_message:
            raise ValueError("add_generation_prompt must be true, or false with continue_final_message: true")
        return self

    def request(self) -> GenerationRequest:
        """The request in this body. Raises ApiError."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        chat = ChatPrompt(
            messages=[message.for_template() for message in self.messages],
            functions=[tool.function.for_template for tool in self.tools or ()],
            choice=self.tool_choice if isinstance(self.tool_choice, str) else "auto",
            named=named,
            parallel=self.parallel_tool_calls is not False,
            template=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            continue_last=self.continue_final_message,
        )
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.asked(most, (self.top_logprobs or 0) if self.logprobs else None, chat=chat)


class CompletionBody(GenerationBody):
    prompt: Text | Ids | Annotated[list[Text], Prompts] | Annotated[list[Ids], Prompts]
    echo: bool = False
    logprobs: Top | None = None

    def request(self) -> GenerationRequest:
        """The request in this body. Raises ApiError."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        most = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default
        return self.asked(most, self.logprobs, prompts=[self.prompt] if alone else self.prompt, echo=self.echo)


class TokenizeBody(Strict):
    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
