"""Prompts to token ids, and token ids to text as they arrive, in pieces. Knows nothing about models."""

from __future__ import annotations

import copy
import functools
import itertools
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import SkipValidation
from torch import Tensor

from specdec.base.errors import PromptTooLongError, SpecDecError
from specdec.base.settings import checked, short_repr
from specdec.engine.request import Event, Request

Prompt = str | Sequence[int] | Tensor | Sequence[dict[str, str]]

CONTEXT = 16  # earlier tokens that are decoded with new ones, since a token's text depends on its context
LONG_TOKEN = 16  # characters; a text of at most so many per token of the context is tokenised without a check
PLACEHOLDERS = range(0xF0000, 0xFFFFE)  # private code points that replace the text of special tokens in a template


class SharedTokenizer:
    """A tokenizer that threads may use side by side.

    That special tokens in a text are split is a state of transformers' fast tokenizers, which a call sets for all
    threads. Here a copy splits them, made at first use, and neither ever changes its state.
    """

    _copies: ClassVar = weakref.WeakKeyDictionary[Any, Any]()
    _copying = threading.Lock()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str, add_special: bool = True, split_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        add_special: put tokens around the text, as the tokenizer does by default. split_special: special tokens in it
        are text. Raises SpecDecError if the tokenizer fails, as one without an unknown token does.
        """
        source, how = (self._copy(), {"split_special_tokens": True}) if split_special else (self.tokenizer, {})
        try:
            return [int(t) for t in source(text, add_special_tokens=add_special, **how).input_ids]
        except Exception as error:
            raise SpecDecError(f"the tokenizer cannot encode this text: {error}") from None

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ``ids``. special: with special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=not special))

    def _copy(self) -> Any:
        with self._copying:
            found = self._copies.get(self.tokenizer)
            if found is None or len(found) != len(self.tokenizer):  # tokens were added to it
                found = self._copies[self.tokenizer] = copy.deepcopy(self.tokenizer)
            return found


@checked
def encode(
    tokenizer: Any,
    prompt: SkipValidation[Prompt],
    chat: bool | None = None,
    system: str | None = None,
    name: str = "prompt",
    context: int | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    template: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> list[int]:
    """Return token ids of a prompt.

    In chat messages, special tokens are text: only the template adds special ones. In plain text they are special.

    prompt: text, token ids (a list or a tensor of one sequence), or chat messages (``[{"role", "content"}, ...]``).
    chat: wrap text in the tokenizer's chat template; None does so if there is one.
    system: a system message before the prompt.
    name: of the prompt, for messages.
    context: the model's context, in tokens; longer text is refused before tokenisation, which may take minutes.
    tools: for the chat template, in OpenAI's format. template: its other arguments.
    continue_last: the answer goes on with the last message instead of a new one.
    Raises SpecDecError for an empty prompt, a wrong type, or a chat without a template.
    """
    if (ids := _given_ids(prompt, name)) is not None:
        return ids
    if len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
        raise SpecDecError(f"the {name} is empty; give some text")
    if tokenizer is None:
        raise SpecDecError("text prompts need a tokenizer; pass token ids or give SpecDecoder a tokenizer")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (has_template if chat is None else chat):
        if system is not None:
            raise SpecDecError("a system prompt needs a chat template; this prompt is used as plain text")
        _check_length(tokenizer, len(prompt), context)
        return SharedTokenizer(tokenizer).encode(prompt)
    if not has_template:
        raise SpecDecError("this tokenizer has no chat template; use plain text (apply_chat_template=False, --raw)")
    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return _encode_chat(tokenizer, messages, context, tools, template or {}, continue_last)


def _given_ids(prompt: Any, name: str) -> list[int] | None:
    """Return the ids of a prompt of token ids; None for text and messages. Raises SpecDecError for anything else."""
    if type(prompt) is list and set(map(type, prompt)) == {int}:  # the usual case, which may be long
        return prompt
    if isinstance(prompt, Tensor | np.ndarray):
        if isinstance(prompt, np.ndarray) and prompt.dtype.kind not in "iu":
            raise _wrong(name, f"an array of {prompt.dtype}")
        return _tensor_ids(torch.as_tensor(prompt), name)
    if isinstance(prompt, str):
        return None
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise _wrong(name, short_repr(prompt))
    if len(prompt) and all(isinstance(t, Integral) and not isinstance(t, bool) for t in prompt):
        return [int(t) for t in prompt]
    for item in prompt:
        if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
            raise _wrong(name, f"a list with {short_repr(item)} in it")
    return None


def _encode_chat(
    tokenizer: Any,
    messages: list[Any],
    context: int | None,
    tools: Any,
    template: Mapping[str, Any],
    continue_last: bool,
) -> list[int]:
    """Return token ids of chat messages, rendered by the tokenizer's template."""
    contents = [message.get("content") for message in messages]  # templates may ignore other keys
    _check_length(tokenizer, sum(len(text) for text in contents if isinstance(text, str)), context)
    special = _SpelledTokens(tokenizer, [messages, tools, template])
    how = special.hidden(template) | ({"tools": special.hidden(tools)} if tools else {})
    how |= {"continue_final_message" if continue_last else "add_generation_prompt": True}
    try:
        text = tokenizer.apply_chat_template(special.hidden(messages), tokenize=False, **how)
    except Exception as error:  # a template is the model author's code and may raise any type
        raise SpecDecError(f"the chat template refuses these messages: {error}") from None
    _check_length(tokenizer, len(text), context)
    return special.encode(text)


def special_tokens(tokenizer: Any) -> dict[int, Any]:
    """Return the special tokens of a tokenizer by id; ``skip_special_tokens`` leaves them out of text."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(i): token for i, token in added.items() if token.special and str(token)}


class _SpelledTokens:
    """Keeps special tokens that are spelled out in chat messages from becoming special.

    ``hidden`` replaces each by a private character, which a template copies like a letter. ``encode`` puts the text
    back into the rendered chat: text between two special tokens with such a character is tokenised as plain text, and
    everything else as usual. Takes time linear in the text.
    """

    def __init__(self, tokenizer: Any, messages: Any) -> None:
        self.tokenizer = SharedTokenizer(tokenizer)
        self.tokens = {str(token): token for token in special_tokens(tokenizer).values()}
        self.spelled = _any_of(tuple(self.tokens))
        used = set[str]().union(*_texts(messages))
        self.free = (chr(c) for c in PLACEHOLDERS if chr(c) not in used)
        self.stand_ins = dict[str, str]()

    def hidden(self, messages: Any) -> Any:
        """Return ``messages`` with the private characters. Raises SpecDecError if there are not enough of them."""
        if isinstance(messages, str):
            return self.spelled.sub(self._stand_in, messages) if self.tokens else messages
        if isinstance(messages, Mapping):
            return {self.hidden(key): self.hidden(value) for key, value in messages.items()}
        return [self.hidden(value) for value in messages] if isinstance(messages, list | tuple) else messages

    def _stand_in(self, found: re.Match[str]) -> str:
        if found[0] not in self.stand_ins:
            if (character := next(self.free, None)) is None:
                raise SpecDecError(
                    "the messages contain special tokens and all private characters that could replace them; leave one "
                    "or the other out"
                )
            self.stand_ins[found[0]] = character
        return self.stand_ins[found[0]]

    def encode(self, text: str) -> list[int]:
        """Return the rendered chat as token ids."""
        if not self.stand_ins:
            return self._ids(text)
        back = {stand_in: token for token, stand_in in self.stand_ins.items()}
        marks = re.compile(f"[{''.join(back)}]")
        ids, clean = list[int](), list[str]()
        parts = ["", *re.split(f"({self.spelled.pattern})", text), ""]  # token, text, token, ...
        for before, part, after in zip(parts[:-1:2], parts[1::2], parts[2::2], strict=True):
            clean.append(before)
            if not marks.search(part):
                clean.append(part)
                continue
            if before and self.tokens[before].rstrip:  # this token includes white space after it
                clean.append(part[: len(part) - len(part.lstrip())])
                part = part.lstrip()
            space = part[len(part.rstrip()) :] if after and self.tokens[after].lstrip else ""
            plain = marks.sub(lambda found: back[found[0]], part[: len(part) - len(space)])
            ids += self._ids("".join(clean)) + self._ids(plain, split_special=True)
            clean = [space]
        return ids + self._ids("".join(clean))

    def _ids(self, text: str, split_special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, split_special=split_special) if text else []


@functools.lru_cache(16)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """Return a regular expression that matches the longest of ``words``, without backtracking."""
    tree: dict[str, Any] = {}
    for word in words:
        place = tree
        for character in word:
            place = place.setdefault(character, {})
        place[""] = {}

    def pattern(place: dict[str, Any]) -> str:
        more = [re.escape(character) + pattern(after) for character, after in place.items() if character]
        found = f"(?:{'|'.join(more)})" if len(more) > 1 else "".join(more)
        return f"(?:{found})?" if found and "" in place else found

    return re.compile(pattern(tree))


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in chat messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in itertools.chain(value, value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _tensor_ids(prompt: Tensor, name: str) -> list[int]:
    if prompt.dtype == torch.bool or prompt.is_floating_point() or prompt.is_complex():
        raise _wrong(name, f"a tensor of {str(prompt.dtype).removeprefix('torch.')}")
    if prompt.dim() == 0 or (prompt.dim() > 1 and prompt.numel() != prompt.shape[-1]):
        raise SpecDecError(
            f"a prompt tensor holds one sequence, got shape {list(prompt.shape)}; use generate_batch for several"
        )
    if not prompt.numel():
        raise SpecDecError(f"the {name} is empty; give some token ids")
    return [int(t) for t in prompt.flatten().tolist()]


def _wrong(name: str, what: str) -> SpecDecError:
    return SpecDecError(
        f"{name} must be text, token ids (whole numbers), an integer tensor of one sequence, or chat messages "
        f"(mappings with 'role' and 'content'); got {what}"
    )


def _check_length(tokenizer: Any, length: int, context: int | None) -> None:
    """Raise PromptTooLongError if even the tokenizer's longest tokens cannot fit the text into ``context`` tokens."""
    if context is None or length <= LONG_TOKEN * context:
        return
    most = context * max(map(len, tokenizer.get_vocab()))
    if length > most:
        raise PromptTooLongError(
            f"the prompt has {length} characters, and the model's context of {context} tokens holds at most {most}; "
            "shorten it"
        )


REASONS = {"eos": "stop", "stop": "stop", "length": "length"}  # OpenAI's finish reason for the engine's


@dataclass(frozen=True)
class Piece:
    """New text.

    depth: of its last token in a draft; 0 if the model chose that token.
    finish: the finish reason, in the last piece.
    """

    text: str
    depth: int = 0
    finish: str | None = None


class Detokenizer:
    """The text of one request as its tokens arrive, up to a stop string. Without a tokenizer, the text is empty.

    The engine calls ``push`` with each new token, in its own thread if it has one. The reader of the request calls the
    other methods. With stop strings ``push`` decodes the tokens, otherwise the reader does.

    stop: strings that end the text; they may contain special tokens.
    shown: special tokens that stay in the text.
    hidden: tokens that have no text.
    min_new_tokens: number of tokens before which no stop string ends the text.
    stopped: the stop string that has come, or None.
    num_read: number of tokens in the events that ``read`` got.
    finish_reason: OpenAI's finish reason after the last event, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        shown: Sequence[str] = (),
        hidden: Iterable[int] = (),
        min_new_tokens: int = 0,
    ) -> None:
        self.tokenizer, self.stop, self.shown = tokenizer, [s for s in stop if s], list(shown)
        self.hidden, self.min_new_tokens = frozenset(hidden), min_new_tokens
        self.special = {i: str(token) for i, token in special_tokens(tokenizer).items()}
        self.matched = {i for i, t in self.special.items() if any(t in s for s in [*self.stop, *shown])}
        self.ids: list[int] = []  # all new tokens
        self.num_added = 0  # number of tokens that are in the window or the text
        self.certain: list[int] = []  # with stop strings: how much text is certain after each token
        self.num_read = 0
        self.finish_reason: str | None = None
        self.window: list[int] = []  # tokens with text: earlier ones as context, then new ones
        self.old, self.context = 0, ""  # number of earlier tokens in the window, and their text
        self.text = ""  # all complete text, up to the stop string
        self.whole = ""  # the text with the special tokens that stop strings contain
        self.unseen: list[tuple[int, int]] = []  # their positions and lengths in ``whole``
        self.sent = 0  # characters of the text that ``take`` has returned
        self.stopped: str | None = None

    def push(self, token: int) -> str | None:
        """Add a token; return "stop" if a stop string ends the text with it."""
        self.ids.append(token)
        if not self.stop:
            return None
        self._add(len(self.ids))
        self._decode_window()
        hold = max((n for s in self.stop for n in range(1, len(s)) if self.whole.endswith(s[:n])), default=0)
        self.certain.append(len(self.text) if self.stopped is not None else self._place(len(self.whole) - hold))
        return None if self.stopped is None else "stop"

    def read(self, event: Event, per_token: bool = False) -> Iterator[Piece]:
        """Yield the new text of ``event``, as one piece or one ``per_token``. The last piece has the finish reason."""
        depth = 0
        for depth in event.depths:
            self.num_read += 1
            if per_token and (text := self.take(self.num_read)):
                yield Piece(text, depth)
        if event.finish_reason is not None:
            self.finish_reason = REASONS.get(event.finish_reason, event.finish_reason)
            yield Piece(self.finish(), depth, self.finish_reason)
        elif not per_token and (text := self.take(self.num_read)):
            yield Piece(text, depth)

    def take(self, count: int | None = None) -> str:
        """Return the new text of the first ``count`` tokens (None: all tokens) that is certain.

        These are complete characters that cannot begin a stop string.
        """
        count = len(self.ids) if count is None else count
        if self.stop:
            return self._send(self.certain[count - 1] if count else 0)
        self._add(count)
        self._decode_window()
        return self._send(len(self.text))

    def finish(self) -> str:
        """Return the rest of the text, at the end of the output."""
        self._add(len(self.ids))
        if self.stopped is None:
            self._decode_window(complete=False)
        return self._send(len(self.text))

    def _add(self, count: int) -> None:
        """Put tokens into the window, up to number ``count``."""
        for token in self.ids[self.num_added : count]:
            if token in self.hidden:
                continue
            if token not in self.special:
                self.window.append(token)
            elif token in self.matched and self.stopped is None:
                self._decode_window(complete=False)
                self._extend(self.special[token], seen=self.special[token] in self.shown)
        self.num_added = max(self.num_added, count)

    def _decode_window(self, complete: bool = True) -> None:
        if len(self.window) == self.old:
            return
        text = self._decode(self.window)
        if complete and text.endswith("�"):  # usually a part of a character: wait for the rest
            if len(self.window) - self.old > CONTEXT:  # too many tokens for one character: the first ones are certain
                self._cut(text)
        elif len(text) > len(self.context):
            self._extend(text[len(self.context) :])
            self.context = text
            if len(self.window) > CONTEXT:
                del self.window[: self.old]
                self.context = self._decode(self.window)
            self.old = len(self.window)

    def _cut(self, text: str) -> None:
        """Add the text of the window without its last few tokens, which have a text of their own."""
        for end in range(len(self.window) - 4, len(self.window) - 8, -1):  # a character has up to four bytes
            first = self._decode(self.window[:end])
            if first + self._decode(self.window[end:]) == text:
                self._extend(first[len(self.context) :])
                del self.window[:end]
                self.old, self.context = 0, ""
                return

    def _decode(self, ids: list[int]) -> str:
        return SharedTokenizer(self.tokenizer).decode(ids) if ids and self.tokenizer else ""

    def _extend(self, piece: str, seen: bool = True) -> None:
        old = len(self.whole)
        self.whole += piece
        if seen:
            self.text += piece
        else:
            self.unseen.append((old, len(piece)))
        stops = self.stop if len(self.ids) >= self.min_new_tokens else ()
        found = [(at, s) for s in stops if (at := self.whole.find(s, max(0, old - len(s) + 1))) >= 0]
        if found:
            at, self.stopped = min(found)
            self.text = self.text[: self._place(at)]

    def _place(self, place: int) -> int:
        """Return the position in the text of a position in ``whole``."""
        return place - sum(min(length, place - at) for at, length in self.unseen if at < place)

    def _send(self, end: int) -> str:
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece


def text_of(request: Request) -> Detokenizer:
    """Return the text of a request that ``SpecDecoder.request`` has made."""
    assert isinstance(request.text, Detokenizer)
    return request.text
