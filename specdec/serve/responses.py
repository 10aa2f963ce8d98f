"""OpenAI's ``/v1/responses``: its request bodies, and its answers, whole and as a stream. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from specdec.api.text import token_ids
from specdec.engine.request import Handle
from specdec.serve.answer import BlockAnswer, Events
from specdec.serve.errors import ApiError
from specdec.serve.metrics import Metrics
from specdec.serve.parts import Part, begun_object
from specdec.serve.request import ChatPrompt, GenerationRequest, called, joined, thought
from specdec.serve.schema import (
    ANY,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    UNUSED,
    Choosing,
    Effort,
    Function,
    JsonSchema,
    MaxTokens,
    OfFunction,
    Options,
    Strict,
    json_of,
)


class TextItem(Strict):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str


Texts = Annotated[list[TextItem], Field(max_length=MAX_PARTS, fail_fast=True)]


class MessageItem(Strict):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Texts


class CallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=256)]
    name: Annotated[str, Field(max_length=128)]
    arguments: str


class OutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=256)]
    output: str | Texts


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    summary: Texts | None = None
    content: Texts | None = None


Item = Annotated[
    MessageItem | CallItem | OutputItem | ReasoningItem,
    Field(discriminator="type"),
    BeforeValidator(lambda given: {"type": "message"} | given if isinstance(given, dict) else given),
]
Input = str | Annotated[list[Item], Field(max_length=MAX_MESSAGES, fail_fast=True)]


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the entries of a request's ``input`` (``Item``) as messages for a chat template, in their order.

    Successive reasoning, text and calls of the assistant become one message.
    """
    found = list[dict[str, Any]]()
    for item in items:
        last = found[-1] if found and found[-1]["role"] == "assistant" else {}
        bare = bool(last) and not last["content"] and "tool_calls" not in last
        if isinstance(item, OutputItem):
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
        elif isinstance(item, MessageItem) and not (item.role == "assistant" and bare):
            role = "system" if item.role == "developer" else item.role
            found.append({"role": role, "content": joined(item.content)})
        elif isinstance(item, MessageItem):
            last["content"] = joined(item.content)
        else:
            if not last or (isinstance(item, ReasoningItem) and not bare):
                last = {"role": "assistant", "content": ""}
                found.append(last)
            if isinstance(item, ReasoningItem):
                last |= thought(joined(item.content or item.summary))
            else:
                last.setdefault("tool_calls", []).append(called(item.call_id, item.name, begun_object(item.arguments)))
    return found


class FunctionTool(Function, OfFunction):  # type: ignore[misc]  # the plugin's model_construct
    """A function that the model may call.

    Unlike in chats, its name, description and parameters stand beside ``type``, not in a member ``function``.
    """


class NamedFunction(OfFunction):
    name: str


class Format(JsonSchema):
    """The member ``text.format`` of a request, which says what form the answer's text must have.

    Unlike in chats, the members of the schema stand beside ``type``, not in a member ``json_schema``.

    type: "text": any text; "json_object": any JSON object, or one that follows the schema; "json_schema": JSON that
        follows the schema.
    """

    type: Literal["text", "json_object", "json_schema"]


class TextConfig(Strict):
    unused: ClassVar = {"verbosity": ("medium",)}
    format: Format | None = None


class Reasoning(Strict):
    effort: Effort | None = None


class ResponsesBody(Options):
    unused = UNUSED | {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "previous_response_id": (),
        "prompt": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Input
    instructions: str | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Annotated[Choosing | NamedFunction | None, ANY] = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: MaxTokens = None
    metadata: dict[str, Any] | None = None

    def chat(self) -> ChatPrompt:
        """Return the chat in this body. Raises ApiError if its parts contradict each other."""
        text = self.input
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else messages_of(text)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return ChatPrompt(
            messages=messages,
            functions=[tool.for_template for tool in self.tools or ()],
            choice=self.tool_choice if isinstance(self.tool_choice, str) else "auto",
            named=self.tool_choice.name if isinstance(self.tool_choice, NamedFunction) else None,
            parallel=self.parallel_tool_calls is not False,
            template=self.chat_template_kwargs or {},
            effort=self.reasoning.effort if self.reasoning else None,
        )

    def request(self) -> GenerationRequest:
        """Return the request in this body. Raises ApiError if its parts contradict each other."""
        form = self.text.format if self.text else None
        rule = json_of(form.type, form.schema_) if form else None
        return self.generation(rule, {"max_new_tokens": self.max_output_tokens}, chat=self.chat())


class ResponsesAnswer(BlockAnswer):
    """The answer to a request of ``/v1/responses``.

    body: the request's body; the answer repeats some of its members.
    created: Unix time of the request, in seconds.
    key: random text that is part of all ids in the answer.
    number: number of events so far, the next one's ``sequence_number``.
    """

    def __init__(
        self, asked: GenerationRequest, handles: Sequence[Handle], counters: Metrics, body: ResponsesBody
    ) -> None:
        super().__init__(asked, handles, counters)
        self.body = body
        self.created = int(time.time())
        self.key = uuid.uuid4().hex
        self.number = 0

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        """Return the protocol's response object with this ``status``, such as "completed", and an empty ``output``.

        more: members that replace those of the result, or are added.
        """
        found: dict[str, Any] = {"id": f"resp_{self.key}", "object": "response", "created_at": self.created}
        found |= {"status": status, "error": None, "incomplete_details": None, "model": self.asked.model, "output": []}
        return found | {name: getattr(self.body, name) for name in ECHOED} | {
            "parallel_tool_calls": self.body.parallel_tool_calls is not False,
            "tool_choice": self.body.model_dump()["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in self.body.tools or ()],
            "usage": None,
        } | more  # fmt: skip

    def result(self) -> dict[str, Any]:
        cut = self.text.finish_reason == "length"
        output = [self._item(n, block, self._status(n == self._index)) for n, block in enumerate(self.blocks)]
        before, cached, new = self.counts()
        thoughts = [block.text for block in self.blocks if block.kind == "reasoning"]
        thought = sum(len(token_ids(self.text.tokenizer, text, add_special=False)) for text in thoughts)
        usage = {
            "input_tokens": before,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0} | self.time_saved(),
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": min(thought, new)},
            "total_tokens": before + new,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response(
            "incomplete" if cut else "completed",
            output=output,
            usage=usage,
            incomplete_details=details,
            completed_at=None if cut else int(time.time()),
        )

    def _status(self, last: bool) -> str:
        """Return the status of an output item that has ended: "completed", or "incomplete" if it was cut.

        last: whether it is the last item, the only one that the limit on new tokens may have cut.
        """
        return "incomplete" if last and self.text.finish_reason == "length" else "completed"

    def _item(self, index: int, block: Part, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": f"{PREFIXES[block.kind]}_{self.key}{index}", "status": status}
        if block.kind == "call":
            return item | {"type": "function_call", "call_id": block.id, "name": block.name, "arguments": block.text}
        content = [_part(block)] if status != "in_progress" else []
        if block.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": content}
        return item | {"type": "reasoning", "summary": [], "content": content}

    def begin(self) -> Events:
        for name in ("created", "in_progress"):
            yield {"type": f"response.{name}", "response": self._response("in_progress")}

    def begin_block(self, block: Part) -> Events:
        item = self._item(self._index, block, "in_progress")
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        if block.kind != "call":
            yield self._event("response.content_part.added", part=_part(block))

    def delta(self, block: Part, text: str) -> Events:
        more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
        yield self._event(f"response.{NAMES[block.kind]}.delta", delta=text, **more)

    def end_block(self, block: Part, last: bool = False) -> Events:
        kind = NAMES[block.kind]
        if block.kind == "call":
            yield self._event(f"response.{kind}.done", name=block.name, arguments=block.text)
        else:
            more: dict[str, Any] = {"logprobs": []} if block.kind == "text" else {}
            yield self._event(f"response.{kind}.done", text=block.text, **more)
            yield self._event("response.content_part.done", part=_part(block))
        item = self._item(self._index, block, self._status(last))
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def end(self) -> Events:
        found = self.result()
        yield {"type": f"response.{found['status']}", "response": found | self.metrics()}

    def failure(self, error: ApiError) -> dict[str, Any]:
        what = {"code": error.code or "server_error", "message": error.message}
        return {"type": "response.failed", "response": self._response("failed", error=what)}

    def _written(self, event: dict[str, Any]) -> bytes:
        event, self.number = event | {"sequence_number": self.number}, self.number + 1
        return super()._written(event)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        """Return the event of type ``kind`` about the last block, with the id and the index of its output item.

        more: further members of the event.
        """
        block = self.blocks[-1]
        place = {"item_id": self._item(self._index, block, "")["id"], "output_index": self._index}
        return {"type": kind} | place | ({} if block.kind == "call" else {"content_index": 0}) | more


ECHOED = "instructions", "metadata", "temperature", "top_p"  # members of the request
PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}
NAMES = {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}


def _part(block: Part) -> dict[str, Any]:
    """Return the content part of an output item, with all text so far of ``block``, which is text or reasoning."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
