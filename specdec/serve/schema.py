"""Request bodies. A parameter that is not declared here is an error, unless its value means that it is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import from_json

from specdec.base import options
from specdec.serve.errors import invalid
from specdec.speculation.constraints import Json


def _token_id(given: str) -> str:
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise ValueError("it maps token ids to numbers from -100 to 100, such as {'504': -100}")
    return given


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


class Extensions(Strict):
    """Parameters of specdec in all chats.

    speculative_decoding, num_speculative_tokens, include_metrics: as in ``GenerationBody``.
    chat_template_kwargs: arguments of the model's template, such as ``enable_thinking``.
    prepare_next_turn: what is known of the next turn's prompt is run in the background when the answer has ended.
    """

    speculative_decoding: bool = True
    num_speculative_tokens: Annotated[int, Field(ge=0)] | None = None
    include_metrics: bool = False
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
        if self.type == "text":
            return None
        return Json({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class GenerationBody(Strict):
    """What both endpoints accept.

    max_tokens: 0 runs the prompt alone, in the background, for later requests to begin with.
    speculative_decoding: false decodes without a drafter; the text is the same.
    num_speculative_tokens: most tokens that are drafted in a step; 0: none.
    include_metrics, per_step_metrics: add metrics of the request and of each step to the response.
    """

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
    speculative_decoding: bool = True
    num_speculative_tokens: Annotated[int, Field(ge=0)] | None = None
    include_metrics: bool = True
    per_step_metrics: bool = False

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def bias_by_token(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def sampling_options(self) -> dict[str, Any]:
        """The given fields of ``SamplingParams``."""
        given = self.model_dump(include={*options.SamplingOptions.__annotations__}, exclude_none=True)
        return given | {"logit_bias": self.bias_by_token}

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to return with each log-probability; None without log-probabilities."""
        return None


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

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, given: str) -> str:
        try:
            known = isinstance(from_json(given or "{}"), dict)
        except ValueError:  # also where it is nested without end
            known = False
        if not known:
            raise ValueError("the arguments of a call must be a JSON object, as text")
        return given


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
        if self.reasoning_content is not None:  # the second name is gpt-oss's
            found |= dict.fromkeys(("reasoning_content", "thinking"), self.reasoning_content)
        if self.tool_calls:
            found["tool_calls"] = [
                {"id": c.id, "type": c.type, "function": {"name": c.function.name, "arguments": c.function.parsed()}}
                for c in self.tool_calls
            ]
        return found


class Function(Strict):
    """parameters: a JSON schema of the arguments; None without arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody, Extensions):
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
    def _check_tool_choice(self) -> ChatBody:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names '{self.tool_choice.function.name[:64]}', which is not in tools")
        if self.forced_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("a tool_choice that forces a call cannot be combined with a format of text; leave one out")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs a last message of the role assistant")
        return self

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates expect them."""
        if self.tool_choice == "none":
            return []
        return [
            {"type": "function", "function": tool.function.model_dump(exclude_none=True, exclude={"strict"})}
            for tool in self.tools or ()
        ]

    @property
    def forced_tools(self) -> dict[str, dict[str, Any] | None]:
        """The tools of which the model must call one: name -> schema of the arguments. Empty if no call is forced."""
        if self.tool_choice in (None, "none", "auto"):
            return {}
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        schemas = {tool.function.name: tool.function.parameters for tool in self.tools or ()}
        return schemas if name is None else {name: schemas[name]}

    @property
    def allows_several_calls(self) -> bool:
        return self.parallel_tool_calls is not False and not isinstance(self.tool_choice, NamedTool)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def chat_body(given: dict[str, Any]) -> ChatBody:
    """A request of another protocol as one of chat completions. Raises ApiError."""
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        raise invalid(error, given) from None


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

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def max_new_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


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
