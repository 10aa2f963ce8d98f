"""Request bodies. A parameter that is not declared here is an error, unless its value means that it is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from specdec.api.generation import GenerationOptions
from specdec.base import options
from specdec.serve.request import ChatPrompt, GenerationRequest, called, thought
from specdec.speculation.constraints import Json


def _token_id(given: str) -> str:
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ValueError("it maps token ids to numbers from -100 to 100, such as {'504': -100}")
    return given


OPTIONS = {*GenerationOptions.__annotations__} - {"num_speculative_tokens"}
MAX_STOPS = 4
MAX_BIASES = 1024
MAX_MEMBERS = 64  # of an object with declared members
MAX_MESSAGES = MAX_PROMPTS = 2048
MAX_PARTS = 1024
MAX_CALLS = MAX_TOOLS = 128
Text = Annotated[str, Field(min_length=1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Top = Annotated[int, Field(ge=0, le=20)]
TokenId = Annotated[str, AfterValidator(_token_id)]
Biases = Annotated[dict[TokenId, options.Bias], BeforeValidator(lambda given: check_size(given, MAX_BIASES))]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
Messages = Annotated[list["Message"], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)

# Parameters that are not supported, with the values that mean "not used".
UNUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "suffix": ("",),
}


def check_kinds(given: Any, what: str, *known: str) -> Any:
    """Refuse, in one sentence, a list with objects of types that are not ``known``."""
    for each in given if isinstance(given, list) else ():
        kind = each.get("type") if isinstance(each, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise ValueError(f"{what} of the type '{kind[:64]}' are not supported; leave them out")
    return given


def check_size(given: Any, most: int) -> Any:
    """Limit an object before its members are validated, since pydantic reports every wrong one."""
    if isinstance(given, dict) and len(given) > most:
        raise ValueError(f"an object has {len(given)} members; at most {most} are allowed")
    return given


def check_arguments(given: str) -> str:
    """Refuse arguments of a call that are no JSON object."""
    try:
        known = isinstance(from_json(given or "{}"), dict)
    except ValueError:  # also where it is nested without end
        known = False
    if not known:
        raise ValueError("the arguments of a call must be a JSON object, as text")
    return given


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    no_effect: ClassVar[Sequence[str]] = ()  # members that are left out, like all that are null
    unused: ClassVar[Mapping[str, Sequence[Any]]] = {}  # members that are left out where they are these values
    kinds: ClassVar[Sequence[str]] = ()  # what it is called, and its types

    @model_validator(mode="before")
    @classmethod
    def _check_members(cls, given: Any) -> Any:
        check_size(given, MAX_MEMBERS)
        if cls.kinds:
            check_kinds([given], *cls.kinds)
        if not isinstance(given, dict):
            return given
        unused = [key for key, values in cls.unused.items() if given.get(key) in values]
        return {
            key: value for key, value in given.items() if value is not None and key not in (*cls.no_effect, *unused)
        }


class Drafting(Strict):
    """Parameters of specdec in all protocols.

    speculative_decoding: false decodes without a drafter; the text is the same.
    num_speculative_tokens: most tokens that are drafted in a step; 0: none.
    include_metrics: add metrics of the request to the response.
    """

    speculative_decoding: bool = True
    num_speculative_tokens: Annotated[int, Field(ge=0)] | None = None
    include_metrics: bool = False

    def request_options(self, **own: Any) -> GenerationOptions:
        """The options of ``SpecDecoder.request``: the parameters of their names, and ``own``. None is not given."""
        own["num_speculative_tokens"] = self.num_speculative_tokens if self.speculative_decoding else 0
        given = self.model_dump(include=OPTIONS) | own
        return cast(GenerationOptions, {name: value for name, value in given.items() if value is not None})


class ChatExtensions(Drafting):
    """Those of chats.

    chat_template_kwargs: arguments of the model's template, such as ``enable_thinking``.
    prepare_next_turn: what is known of the next turn's prompt is run in the background when the answer has ended.
    """

    chat_template_kwargs: dict[str, Any] | None = None
    prepare_next_turn: bool = False


class StreamOptions(Strict):
    """include_draft_depth: send a chunk per token, with its depth in the draft (0: the model chose it)."""

    unused = {"include_obfuscation": (False,)}

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
            raise ValueError("json_schema and type: json_schema need each other")
        return self

    @property
    def constraint(self) -> Json | None:
        return json_of(self.type, self.json_schema)


def json_of(kind: str, schema: JsonSchema | None) -> Json | None:
    """The constraint of a format of the type ``kind``."""
    if kind == "text":
        return None
    return Json({"type": "object"} if kind == "json_object" or schema is None else schema.schema_)


class GenerationBody(Drafting):
    """What both endpoints accept.

    max_tokens: 0 runs the prompt alone, in the background, for later requests to begin with.
    per_step_metrics: add metrics of each step to the response.
    """

    names: ClassVar[Mapping[str, str]] = {}  # those of this protocol for parameters of chats, if they differ

    unused = UNUSED

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[options.Temperature, Field(le=2)] | None = None
    top_p: options.TopP | None = None
    top_k: Annotated[options.TopK, Field(le=2**31 - 1)] | None = None
    min_p: options.MinP | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: options.Seed | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: options.FrequencyPenalty | None = None
    presence_penalty: options.PresencePenalty | None = None
    logit_bias: Biases | None = None
    metadata: Any = None  # accepted without effect, like the parameters down to ``user``
    prompt_cache_key: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None
    ignore_eos: bool = False
    include_metrics: bool = True
    per_step_metrics: bool = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def request(self) -> GenerationRequest:
        """The request in this body. Raises ApiError."""
        return GenerationRequest(model=self.model, **self._parts())

    def _parts(self) -> dict[str, Any]:
        biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        streamed = self.stream_options or StreamOptions()
        return {
            "options": self.request_options(logit_bias=biases, **self._limits()),
            "n": self.n or 1,
            "constraint": self.response_format.constraint if self.response_format else None,
            "stream": bool(self.stream),
            "include_usage": streamed.include_usage,
            "include_draft_depth": streamed.include_draft_depth,
            "include_metrics": self.include_metrics,
            "per_step_metrics": self.per_step_metrics,
        }

    def _limits(self) -> dict[str, int | None]:
        """The options ``max_new_tokens`` and ``logprobs``."""
        raise NotImplementedError


class TextPart(Strict):
    kinds = "parts", "text"

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """A call that the model has made. arguments: a JSON object as text."""

    name: Annotated[str, Field(max_length=128)]
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """The arguments."""
        return dict(from_json(self.arguments or "{}"))

    _check_arguments = field_validator("arguments")(lambda given: check_arguments(given))


class ToolCall(Strict):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    unused = dict.fromkeys(("annotations", "audio", "function_call", "refusal", "tool_calls"), ([],))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content; only an assistant's with tool_calls may have none")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise ValueError("the role tool and tool_call_id need each other")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls need the role assistant")
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
            made = [(call.id, call.function.name, call.function.parsed()) for call in self.tool_calls]
            found["tool_calls"] = [called(*call) for call in made]
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


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody, ChatExtensions):
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

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def _parts(self) -> dict[str, Any]:
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
        return super()._parts() | {"chat": chat, "prepare_next_turn": self.prepare_next_turn}

    def _limits(self) -> dict[str, int | None]:
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return {"max_new_tokens": most, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionBody(GenerationBody):
    prompt: Text | Ids | Annotated[list[Text], Prompts] | Annotated[list[Ids], Prompts]
    echo: bool = False
    logprobs: Top | None = None

    @model_validator(mode="before")
    @classmethod
    def _false_is_none(cls, given: Any) -> Any:
        """``logprobs: false`` means null; 0 returns the log-probabilities of the chosen tokens alone."""
        unused = isinstance(given, dict) and given.get("logprobs") is False
        return given | {"logprobs": None} if unused else given

    def _parts(self) -> dict[str, Any]:
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return super()._parts() | {"prompts": [self.prompt] if alone else self.prompt, "echo": self.echo}

    def _limits(self) -> dict[str, int | None]:
        most = 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default
        return {"max_new_tokens": most, "logprobs": self.logprobs}


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
