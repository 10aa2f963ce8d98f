"""Anthropic's ``/v1/messages``: its request bodies, and its answers, whole and as a stream."""

from __future__ import annotations

import itertools
import uuid
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from specdec.serve.answer import BlockAnswer, Events
from specdec.serve.errors import ApiError
from specdec.serve.parts import Part, begun_object
from specdec.serve.request import ChatPrompt, GenerationRequest, called, joined, thought
from specdec.serve.schema import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_STOPS,
    MAX_TOOLS,
    UNUSED,
    Natural,
    Options,
    Stop,
    Strict,
    ToolName,
)
from specdec.speculation.constraints import Json

PROMPT = {  # members that would change the prompt and are not supported, with the values that mean "not used"
    "add_special_tokens": (False,),
    "chat_template": ("",),
    "container": (),
    "documents": ([],),
    "functions": ([],),
    "instructions": ("",),
    "mcp_servers": ([],),
}
EFFORTS = {"enabled": "medium", "disabled": "none"}
CHOICES = {"any": "required", "none": "none"}


class TextBlock(Strict):
    type: Literal["text"]
    text: str


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedBlock(Strict):
    """Encrypted reasoning of another model. It is accepted and left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUse(Strict):
    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=256)]
    name: ToolName
    input: dict[str, Any]


class ToolResult(Strict):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=256)]
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None


AnyBlock = Annotated[TextBlock | ThinkingBlock | RedactedBlock | ToolUse | ToolResult, Field(discriminator="type")]
Texts = str | Annotated[list[TextBlock], Field(max_length=MAX_PARTS, fail_fast=True)]


class Turn(Strict):
    """A message of the conversation, in Anthropic's form.

    role: who wrote it.
    content: text, or a list of blocks (texts, reasoning, calls of tools, results of calls) that the role may have.
    """

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[AnyBlock], Field(max_length=MAX_PARTS, fail_fast=True)]

    @property
    def blocks(self) -> list[Any]:
        given = self.content
        return [TextBlock(type="text", text=given)] if isinstance(given, str) else list(given)

    def of(self, kind: type[Any]) -> list[Any]:
        return [block for block in self.blocks if isinstance(block, kind)]

    @model_validator(mode="after")
    def _check_role(self) -> Turn:
        own = {"user": (TextBlock, ToolResult), "assistant": (TextBlock, ThinkingBlock, RedactedBlock, ToolUse)}
        for block in self.blocks:
            if not isinstance(block, own.get(self.role, TextBlock)):
                raise ValueError(f"a {block.type} block does not belong to the role {self.role}")
        return self

    def messages(self) -> list[dict[str, Any]]:
        """Return this message as messages in OpenAI's form, which chat templates take.

        A user's message gives one message of the role "tool" for each result of a call, then one with the text; an
        assistant's message gives one with its text, reasoning and calls.
        """
        text = joined(self.of(TextBlock))
        if self.role != "assistant":
            found: list[dict[str, Any]] = [
                {"role": "tool", "tool_call_id": result.tool_use_id, "content": joined(result.content)}
                for result in self.of(ToolResult)
            ]
            return found + ([{"role": self.role, "content": text}] if text or not found else [])
        made: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts := "\n".join(block.thinking for block in self.of(ThinkingBlock)):
            made |= thought(thoughts)
        calls = [called(call.id, call.name, call.input) for call in self.of(ToolUse)]
        return [made | ({"tool_calls": calls} if calls else {})]


class MessageTool(Strict):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]

    @property
    def for_template(self) -> dict[str, Any]:
        found = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {key: value for key, value in found.items() if value is not None}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.name is None) == (self.type == "tool"):
            raise ValueError("tool_choice takes a name with the type tool, and only with it")
        return self


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Options):
    """The body of ``/v1/messages/count_tokens``, which is also a part of the body of ``/v1/messages``.

    The fields beside those of ``Options`` are Anthropic's; None: not given.

    messages: the conversation, in which successive messages of one role have been joined. system: the system message.
    thinking, output_config: whether and how much to reason, and the format of the text.
    unused: values with which members that are not declared are ignored (see ``Strict``).
    """

    unused = PROMPT

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _join_turns(self) -> CountBody:
        """Join successive messages of the same role in ``messages`` into one, as Anthropic does. pydantic calls it."""
        joined = list[Turn]()
        for role, group in itertools.groupby(self.messages, key=lambda turn: turn.role):
            turns = list(group)
            if role != "system" and len(turns) > 1:
                turns = [Turn.model_construct(role=role, content=[block for turn in turns for block in turn.blocks])]
            joined += turns
        self.messages = joined
        return self

    def chat(self) -> ChatPrompt:
        """Return the chat in this body. Raises ApiError if its parts contradict each other."""
        head = [{"role": "system", "content": joined(self.system)}] if self.system else []
        effort = EFFORTS.get(self.thinking.type) if self.thinking else None
        if self.output_config is not None:
            effort = self.output_config.effort or effort
        choice = self.tool_choice or ToolChoice(type="auto")
        return ChatPrompt(
            messages=[*head, *(message for turn in self.messages for message in turn.messages())],
            functions=[tool.for_template for tool in self.tools or ()],
            choice=CHOICES.get(choice.type, "auto"),
            named=choice.name,
            parallel=not choice.disable_parallel_tool_use,
            template=self.chat_template_kwargs or {},
            effort=effort,
            continue_last=self.messages[-1].role == "assistant",
        )


class MessagesBody(CountBody):
    """The body of a request to ``/v1/messages``.

    max_tokens: maximum number of new tokens. stop_sequences: texts that end the answer, and are not in it.
    """

    unused = UNUSED | PROMPT

    max_tokens: Natural
    stop_sequences: Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None

    def request(self) -> GenerationRequest:
        """Return the request in this body. Raises ApiError if its parts contradict each other."""
        form = self.output_config.format if self.output_config else None
        limits = {"max_new_tokens": self.max_tokens, "stop": self.stop_sequences}
        return self.generation(Json(form.schema_) if form else None, limits, chat=self.chat())


class MessagesAnswer(BlockAnswer):
    """The answer to a request of ``/v1/messages``: a message of the assistant."""

    @property
    def _stop(self) -> dict[str, str | None]:
        sequence = self.text.stopped
        if self.text.finish_reason == "length":
            reason = "max_tokens"
        else:
            reason = "tool_use" if self.parsers[0].called else "end_turn" if sequence is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": sequence if reason == "stop_sequence" else None}

    @property
    def _usage(self) -> dict[str, int]:
        before, cached, new = self.counts()
        return {
            "input_tokens": before - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": new,
        } | self.time_saved()

    def _message(self, content: list[Any], stop: dict[str, str | None]) -> dict[str, Any]:
        head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": self.asked.model}
        return head | {"content": content} | stop | {"usage": self._usage}

    def result(self) -> dict[str, Any]:
        return self._message([_content(block, whole=True) for block in self.blocks], self._stop)

    def begin(self) -> Events:
        message = self._message([], {"stop_reason": None, "stop_sequence": None})
        yield {"type": "message_start", "message": message}
        yield {"type": "ping"}

    def begin_block(self, block: Part) -> Events:
        yield {"type": "content_block_start", "index": self._index, "content_block": _content(block, whole=False)}

    def delta(self, block: Part, text: str) -> Events:
        kind, name = {
            "text": ("text_delta", "text"),
            "reasoning": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[block.kind]
        yield {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, name: text}}

    def end_block(self, block: Part, last: bool = False) -> Events:
        if block.kind == "reasoning":
            signature = {"type": "signature_delta", "signature": SIGNATURE}
            yield {"type": "content_block_delta", "index": self._index, "delta": signature}
        yield {"type": "content_block_stop", "index": self._index}

    def end(self) -> Events:
        yield {"type": "message_delta", "delta": self._stop, "usage": self._usage} | self.metrics()
        yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> dict[str, Any]:
        return error.anthropic_body()


SIGNATURE = "c3BlY2RlYw=="  # of all reasoning: clients send back only reasoning that has one


def _content(block: Part, whole: bool) -> dict[str, Any]:
    """Return the part ``block`` of an answer as a content block of Anthropic's protocol.

    whole: whether to include its text or arguments; if not, they are empty.
    """
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE if whole else ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": begun_object(block.text) if whole else {}}
