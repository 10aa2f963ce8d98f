"""A client's request, the same for every protocol: each body is translated to one, once, and the service runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.api.generation import GenerationOptions
from specdec.serve.errors import invalid
from specdec.serve.parts import AnswerParser, Schemas
from specdec.serve.tools import PLAIN
from specdec.speculation.constraints import CompiledConstraint, Constraint


def thought(text: str) -> dict[str, Any]:
    """Return the reasoning ``text`` as members of a message for a chat template.

    It is there twice, as ``reasoning_content`` and, for gpt-oss, as ``thinking``.
    """
    return dict.fromkeys(("reasoning_content", "thinking"), text)


def joined(content: str | Iterable[Any] | None) -> str:
    """Return the text of a message's content, which is text or parts with a ``text``, a line or more each.

    None is "".
    """
    parts: Iterable[Any] = () if isinstance(content, str) else content or ()
    return content if isinstance(content, str) else "\n".join(part.text for part in parts)


def called(id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a call of the tool ``name``, an entry of a message's ``tool_calls``, as chat templates expect it.

    id: the id of the call, which its result repeats. arguments: the parsed JSON object.
    """
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A chat to be answered. Raises ApiError if its parts contradict each other.

    messages: the messages as chat templates expect them, {"role", "content", ...} each.
    functions: the tools as chat templates expect them, {"name", "description", "parameters"} each.
    choice: whether functions may be called ("auto"), must be ("required") or must not be ("none").
    named: name of the function that must be called; None: no particular one.
    parallel: whether there may be several calls.
    template: the client's arguments for the chat template, by name.
    effort: amount of reasoning, such as "low"; None: the template's default.
    continue_last: whether the answer continues the last message.
    """

    messages: Sequence[dict[str, Any]]
    functions: Sequence[dict[str, Any]] = ()
    choice: str = "auto"
    named: str | None = None
    parallel: bool = True
    template: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    continue_last: bool = False

    def __post_init__(self) -> None:
        if not self.messages:
            raise invalid("messages", "'messages' needs at least one message")
        names = [function["name"] for function in self.functions]
        if len(set(names)) < len(names):
            raise invalid("tools", "two tools have the same name")
        if self.choice == "required" and not names:
            raise invalid("tool_choice", "tool_choice needs tools")
        if self.named is not None and self.named not in names:
            raise invalid("tool_choice", f"tool_choice names '{self.named[:64]}', which is not in tools")
        if self.continue_last and self.messages[-1]["role"] != "assistant":
            raise invalid("continue_final_message", "continue_final_message needs a last message of the role assistant")

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools that may be called, {"type": "function", "function": ...} each; [] for the choice "none"."""
        return [] if self.choice == "none" else [{"type": "function", "function": each} for each in self.functions]

    @property
    def schemas(self) -> Schemas:
        """The tools that may be called, {name: JSON schema of its arguments, or None without arguments}."""
        return {tool["function"]["name"]: tool["function"].get("parameters") for tool in self.tools}

    @property
    def forced(self) -> Schemas:
        """The tools of which the answer must call one, {name: JSON schema of its arguments, or None}.

        {}: the model decides whether to call a tool.
        """
        if self.named is not None:
            return {self.named: self.schemas[self.named]}
        return self.schemas if self.choice == "required" else {}

    @property
    def single(self) -> bool:
        """Whether calls after the first one are dropped from the answer.

        That is so if the client does not want parallel calls, and if a call is forced, since a small model would repeat
        a forced call without end.
        """
        return not self.parallel or bool(self.forced)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A client's request, whatever its protocol. Raises ApiError if its parts contradict each other.

    model: name of the model that the client asks for; None: the one that is served, as ``Service`` sets it.
    chat, prompts: either a chat or prompts, which are texts or token ids.
    options: the sampling and stopping options that the client has given, as ``SpecDecoder.request`` takes them.
    max_new_tokens: one of them, the maximum number of new tokens; 0: only the prompt runs; None: as many as fit.
    usual_tokens: maximum number of new tokens if the client gives none; None: as many as fit.
    constraint: what the text must follow; None: nothing. The service compiles it. constraint_from: the parameter that
        it comes from, for errors.
    stream: whether the answer is sent as server-sent events.
    n: number of answers (choices) to each prompt.
    echo: whether the prompt comes before the answer.
    include_usage, include_draft_depth: whether a stream has numbers of tokens, and each token's depth in the draft.
    include_metrics, per_step_metrics: whether the answer has figures of the request, and of each step.
    ids: token ids of each prompt. This and the following fields are set by ``Service.prepare`` or ``prepare_chat``.
    echoes: the texts of the prompts, if they come before the answers.
    new_parser: function that makes the parser of one choice's text.
    shown: texts, such as marks of a tool call, whose special tokens stay in the answer's text.
    """

    model: str | None
    options: GenerationOptions
    chat: ChatPrompt | None = None
    prompts: Sequence[str | list[int]] = ()
    n: int = 1
    usual_tokens: int | None = None
    constraint: Constraint | CompiledConstraint | None = None
    constraint_from: str = "response_format"
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    include_draft_depth: bool = False
    include_metrics: bool = False
    per_step_metrics: bool = False
    ids: Sequence[list[int]] = ()
    new_parser: Callable[[], AnswerParser] = lambda: AnswerParser(PLAIN)
    shown: Sequence[str] = ()
    echoes: Sequence[str] = ()

    def __post_init__(self) -> None:
        forced = self.chat is not None and bool(self.chat.forced)  # the compiled constraint is then that of the call
        if self.options.get("min_new_tokens") and (forced or self.constraint is not None):
            raise invalid(
                "min_tokens", "'min_tokens' cannot be combined with a format, which ends the text; leave one out"
            )
        if self.constraint is None or isinstance(self.constraint, CompiledConstraint):
            return
        if forced:
            raise invalid(
                "tool_choice",
                "a tool_choice that forces a call cannot be combined with a format of text; leave one out",
            )
        if self.chat is not None and self.chat.tools:
            raise invalid(
                "tools",
                "'tools' cannot be combined with a format of text, in which no call can be written; leave one out, or "
                "send the tool_choice none",
            )

    @property
    def max_new_tokens(self) -> int | None:
        return self.options.get("max_new_tokens")

    @property
    def num_logprobs(self) -> int | None:
        """Number of likeliest tokens to return with each log-probability; None: no log-probabilities."""
        return self.options.get("logprobs")
