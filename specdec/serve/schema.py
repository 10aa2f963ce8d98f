"""Bodies of OpenAI's chats and completions, and what the bodies of all protocols share.

A parameter that no body declares is ignored, unless it would change the text: then the request is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from specdec.api.generation import GenerationOptions
from specdec.base import options
from specdec.serve.errors import invalid
from specdec.serve.parts import begun_object
from specdec.serve.request import ChatPrompt, GenerationRequest, called, joined, thought
from specdec.speculation.constraints import Choice, Constraint, Grammar, Json, Regex

ignored = ContextVar[set[str] | None]("ignored", default=None)  # names of members that a request's body has in vain
OPTIONS = {*GenerationOptions.__annotations__}
MAX_STOPS = 64
MAX_BIASES = 1024
MAX_MESSAGES = MAX_PROMPTS = 2048
MAX_PARTS = 1024
MAX_CALLS = MAX_TOOLS = 128
SMALLEST_TOP_P = 1e-9  # leaves one token


def _whole(given: Any) -> Any:
    """Return a whole number such as 128.0, as some clients write integers, as int; other values unchanged."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


def unless(unused: float, instead: Any) -> BeforeValidator:
    """Return a validator that replaces the number ``unused`` by ``instead``. Other values, also false, stay."""
    return BeforeValidator(lambda given: instead if type(given) in (int, float) and given == unused else given)


Whole = Annotated[int, BeforeValidator(_whole)]
Natural = Annotated[Whole, Field(ge=0)]
MaxTokens = Annotated[Natural | None, unless(-1, None)]
Text = Annotated[str, Field(min_length=1)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
Choosing = Literal["none", "auto", "required"]
ANY = BeforeValidator(lambda given: "required" if given == "any" else given)  # the name at Anthropic and Mistral
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
StopIds = Annotated[list[Natural], Field(max_length=MAX_BIASES, fail_fast=True)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_BIASES, fail_fast=True)]
Top = Annotated[Whole, Field(ge=0, le=20)]
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
        ((), "samplers thinking thinking_budget truncate_prompt_tokens web_search_options"),
        (("",), "chat_template format grammar guided_whitespace_pattern instructions suffix system"),
        (([],), "allowed_token_ids documents functions logits_processors lora stop stop_sequences tools"),
        (({},), "options output_config reasoning"),
        ((False,), "add_special_tokens"),
        ((True,), "add_generation_prompt do_sample parallel_tool_calls skip_special_tokens"),
        ((False,), "continue_final_message echo include_stop_str_in_output use_beam_search"),
        ((0,), "dry_multiplier dynatemp_range mirostat no_repeat_ngram_size top_a xtc_probability"),
        ((1,), "best_of length_penalty n num_beams num_return_sequences repeat_penalty tfs_z typical_p"),
        ((-1,), "n_predict num_predict"),
        ((-1, 0), "top_n_sigma"),
        (("none", "auto"), "function_call tool_choice"),
        (("medium",), "verbosity"),
        ((["text"],), "modalities"),
        (({"type": "text"},), "response_format"),
        (({}, {"format": {"type": "text"}}), "text"),
    )
    for name in names.split()
}


def _check_count(given: Any) -> Any:
    """Return ``given`` unchanged, or raise ValueError if it is an object with too many members to validate."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"an object has {len(given)} members; at most {MAX_BIASES} are allowed")
    return given


class Strict(BaseModel):
    """Base class of JSON objects in request bodies. Members that are null or not declared are ignored.

    unused: {undeclared member: the values with which it is accepted and ignored, since they mean "not used"}. With any
    other value it would change the text, and the request is refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unused: ClassVar[Mapping[str, Sequence[Any]]] = {}

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
    """vLLM's constraints on the text; a request gives one of the fields.

    json_: a JSON schema, as an object or as text.
    regex: a regular expression that the whole text matches.
    choice: the texts of which one is the answer.
    grammar: a grammar in Lark's notation.
    json_object: whether the text is any JSON object.
    unused: vLLM's other fields, each with the values with which it is accepted, and ignored (see ``Strict``).
    """

    unused = {"structural_tag": (), "whitespace_pattern": ("",), "disable_additional_properties": (False,)}

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None

    @property
    def rules(self) -> list[Constraint]:
        """Return the constraints that the client has given, as a list."""
        given = self.json_, self.regex, self.choice, self.grammar, {"type": "object"} if self.json_object else None
        makes: tuple[Callable[[Any], Constraint], ...] = (Json, Regex, Choice, Grammar, Json)
        return [make(value) for make, value in zip(makes, given, strict=True) if value is not None]


class Options(Strict):
    """The parameters that have the same name in all protocols. None: not given.

    model: the name of the model; without it, the one that is served answers.
    stream: whether to send the answer as server-sent events.
    temperature, top_p, top_k, min_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed: as in
    ``SamplingParams``; a top_k of -1 is 0, a top_p of 0 keeps one token, and a seed of -1 is none.
    ignore_eos: whether to continue after end tokens. min_tokens: tokens before which nothing ends the text.
    stop_token_ids: ids of further tokens that end the text. bad_words: texts that must not come.
    structured_outputs: constraint on the text.
    num_speculative_tokens: maximum number of tokens that are drafted in a step; 0: no drafts.
    include_metrics: whether to add metrics of the request to the response.
    chat_template_kwargs: arguments of the model's template, such as ``enable_thinking``.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[options.Temperature, Field(le=2)] | None = None
    top_p: Annotated[options.TopP, unless(0, SMALLEST_TOP_P)] | None = None
    top_k: Annotated[options.TopK, Field(le=2**31 - 1), unless(-1, 0), BeforeValidator(_whole)] | None = None
    min_p: options.MinP | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: options.FrequencyPenalty | None = None
    presence_penalty: options.PresencePenalty | None = None
    logit_bias: Biases | None = None
    seed: Annotated[options.Seed | None, unless(-1, None), BeforeValidator(_whole)] = None
    ignore_eos: bool = False
    min_tokens: Natural | None = None
    stop_token_ids: StopIds | None = None
    bad_words: Annotated[list[Stop], Field(max_length=MAX_BIASES, fail_fast=True)] | None = None
    structured_outputs: StructuredOutputs | None = None
    num_speculative_tokens: Natural | None = None
    include_metrics: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def generation(self, form: Constraint | None, limits: Mapping[str, Any], **more: Any) -> GenerationRequest:
        """Return the request in this body. Raises ApiError if its parts contradict each other.

        form: the constraint from a parameter that only this protocol has; None: there is none.
        limits: options of ``GenerationOptions`` that the protocol gives by names of its own; the value None: not given.
        more: further fields of ``GenerationRequest``.
        """
        rules = self.structured_outputs.rules if self.structured_outputs else []
        rules += [] if form is None else [form]
        if len(rules) > 1:
            raise invalid("response_format", "the text can have one format only; leave the others out")
        chosen = self.model_dump(include=OPTIONS) | {"min_new_tokens": self.min_tokens}
        return GenerationRequest(
            options=cast(GenerationOptions, {k: v for k, v in (chosen | dict(limits)).items() if v is not None}),
            model=self.model,
            constraint=rules[0] if rules else None,
            constraint_from="structured_outputs" if form is None else "response_format",
            stream=bool(self.stream),
            include_metrics=self.include_metrics,
            **more,
        )


class StreamOptions(Strict):
    """What a stream has besides the text.

    include_usage: whether a last chunk has the numbers of tokens.
    include_draft_depth: whether each token has a chunk, with its depth in the draft (0: the model chose it).
    """

    include_usage: bool = False
    include_draft_depth: bool = False


class JsonSchema(Strict):
    """A JSON schema that the text follows, whether ``strict`` is given or not.

    schema_: the schema, in the member ``schema``; {} allows any JSON. name, description: not used.
    """

    name: Annotated[str, Field(max_length=64)] = "answer"
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The format of the text: any text, any JSON object, or JSON that follows a schema.

    json_schema: the schema, which the type "json_schema" needs and the others refuse.
    schema_: the schema of the type "json_object", in the member ``schema``, as llama.cpp has it; None: any object.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("json_schema goes with type: json_schema, and only with it")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("schema goes with type: json_object, and only with it")
        return self

    @property
    def constraint(self) -> Json | None:
        return json_of(self.type, self.json_schema.schema_ if self.json_schema else self.schema_)


def json_of(kind: str, schema: dict[str, Any] | None) -> Json | None:
    """Return the constraint for a format, the text "text", "json_object" or "json_schema".

    kind: the format. schema: that of the JSON text; None, and {} for "json_object": any object. Not used for "text".
    """
    if kind == "text":
        return None
    return Json({"type": "object"} if schema is None or (kind == "json_object" and not schema) else schema)


class GenerationBody(Options):
    """The parameters that ``/v1/chat/completions`` and ``/v1/completions`` share.

    max_tokens: maximum number of new tokens; 0: only the prompt runs, in the background, for later requests that begin
        with it; None, for which -1 is another name: as many as fit.
    n: number of answers to each prompt.
    stop: texts that end the answer.
    stream_options: what a stream has besides the text; only with ``stream``.
    response_format: constraint on the text.
    per_step_metrics: whether to add metrics of each step to the response.
    """

    unused = UNUSED

    max_tokens: MaxTokens = None
    n: Annotated[Whole, Field(ge=1)] | None = None
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
        """Return the request in this body. Raises ApiError if its parts contradict each other.

        most: maximum number of new tokens; None: as many as fit.
        logprobs: number of the likeliest tokens to return with each log-probability; None: no log-probabilities.
        more: further fields of ``GenerationRequest``.
        """
        streamed = self.stream_options or StreamOptions()
        return self.generation(
            self.response_format.constraint if self.response_format else None,
            {"max_new_tokens": most, "logprobs": logprobs, "stop": self.stop},
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
    """A tool call in a message of the assistant.

    arguments: a JSON object, mostly as text. Of cut text it is what is there, and of other text it is empty, since
    clients send back what a model wrote.
    """

    name: Annotated[str, Field(max_length=128)]
    arguments: Annotated[
        dict[str, Any],
        BeforeValidator(
            lambda given: begun_object(given) if isinstance(given, str) else given,
            json_schema_input_type=str | dict[str, Any],
        ),
    ] = {}


class ToolCall(Strict):
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """A message of a chat.

    reasoning: another name of ``reasoning_content``.
    prefix: whether the answer continues this message, which must be the assistant's and the last.
    """

    unused = dict.fromkeys(("annotations", "audio", "function_call", "refusal"), ([],))

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool = False

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and self.role != "tool" and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs content; only a tool's and an assistant's with tool_calls may have none")
        if self.prefix and self.role != "assistant":
            raise ValueError("prefix: true needs the role assistant")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it: role ("system" for "developer"), content as text, ...

        The name, reasoning, and tool calls or the id of one are there only if the client has given them.
        """
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": joined(self.content)}
        found |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key))}
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        if reasoning is not None:
            found |= thought(reasoning)
        if self.tool_calls:
            found["tool_calls"] = [
                called(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        return found


class Function(Strict):
    """A function that the model may call. parameters: a JSON schema of the arguments; None: it has none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The function as chat templates expect it: name, and description and parameters if they are given."""
        return self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)


class OfFunction(Strict):
    type: Literal["function"]


class Tool(OfFunction):
    function: Function


class FunctionName(Strict):
    name: str


class NamedTool(OfFunction):
    function: FunctionName


class ChatParts(Strict):
    """What the tokens of a chat depend on, in requests that generate and in those that count.

    tools: the functions that the model may call.
    tool_choice: whether tools may be called ("auto"), must be ("required") or must not be ("none"), or which one must.
    parallel_tool_calls: whether an answer may have several calls; None: it may.
    chat_template_kwargs: arguments of the model's template, such as ``enable_thinking``.
    reasoning_effort: amount of reasoning, such as "low", for chat templates that support it.
    continue_final_message: whether the answer continues the last message, which must be the assistant's.
    add_generation_prompt: not needed; if given, whether the answer does not continue the last message.
    """

    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[Choosing | NamedTool | None, ANY] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return self.continue_final_message or bool(self.messages and self.messages[-1].prefix)

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.add_generation_prompt is self.continues:
            raise ValueError("add_generation_prompt must be true, or false if the answer continues the last message")
        return self

    def chat(self) -> ChatPrompt:
        """Return the chat in this body. Raises ApiError if its parts contradict each other."""
        return ChatPrompt(
            messages=[message.for_template() for message in self.messages or ()],
            functions=[tool.function.for_template for tool in self.tools or ()],
            choice=self.tool_choice if isinstance(self.tool_choice, str) else "auto",
            named=self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None,
            parallel=self.parallel_tool_calls is not False,
            template=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            continue_last=self.continues,
        )


class ChatBody(GenerationBody, ChatParts):  # type: ignore[misc]  # the plugin's model_construct
    """The body of ``/v1/chat/completions``.

    max_completion_tokens: another name of ``max_tokens``, which it overrides.
    logprobs: whether to return log-probabilities.
    top_logprobs: number of the likeliest tokens to return with each log-probability.
    """

    messages: Messages
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def request(self) -> GenerationRequest:
        """Return the request in this body. Raises ApiError if its parts contradict each other."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.asked(most, (self.top_logprobs or 0) if self.logprobs else None, chat=self.chat())


class CompletionBody(GenerationBody):
    """The body of ``/v1/completions``.

    prompt: a text, a list of token ids, or several prompts: a list of texts or of such lists.
    echo: whether the prompt comes before the answer.
    logprobs: number of the likeliest tokens to return with each log-probability; None: no log-probabilities.
    """

    unused = UNUSED | {"add_special_tokens": (True,)}

    prompt: Text | Ids | Annotated[list[Text], Prompts] | Annotated[list[Ids], Prompts]
    echo: bool = False
    logprobs: Top | None = None

    def request(self) -> GenerationRequest:
        """Return the request in this body. Raises ApiError if its parts contradict each other."""
        alone = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        prompts = [self.prompt] if alone else self.prompt
        return self.asked(self.max_tokens, self.logprobs, prompts=prompts, echo=self.echo, usual_tokens=16)


class TokenizeBody(ChatParts):
    """The body of ``/tokenize``: a text, or a chat with what the tokens of a chat depend on.

    add_special_tokens: whether a text gets the tokens that the tokenizer adds, such as <s>; None: it does. Chats have
    those of their template.
    """

    unused = {
        "chat_template": ("",),
        "documents": ([],),
        "enable_thinking": (),
        "functions": ([],),
        "truncate_prompt_tokens": (),
    }

    model: str | None = None
    prompt: Text | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens: true needs a prompt; the template of messages adds them")
        return self


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
