"""Prompts to token ids: text, chat messages or ids. Knows nothing about models."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from pydantic import SkipValidation
from torch import Tensor

from specdec.api.text import special_tokens, token_ids
from specdec.base.errors import PromptTooLongError, SpecDecError
from specdec.base.settings import checked, short_repr

Prompt = str | Sequence[int] | Tensor | Sequence[dict[str, str]]

LONG_TOKEN = 16  # characters; a text of at most so many per token of the context is tokenised without a check
PLACEHOLDERS = range(0xF0000, 0xFFFFE)  # private code points that replace the text of special tokens in a template


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
    add_special: bool = True,
) -> list[int]:
    """Return token ids of a prompt.

    In chat messages, special tokens are text: only the template adds special ones. In plain text they are special.

    tokenizer: a transformers tokenizer; None suffices for token ids.
    prompt: text, token ids (a list or a tensor of one sequence), or chat messages (``[{"role", "content"}, ...]``).
    chat: wrap text in the tokenizer's chat template; None does so if there is one.
    system: a system message before the prompt.
    name: what error messages call the prompt.
    context: the model's context, in tokens; much longer text is refused before tokenisation, which may take minutes.
        None: there is no limit. The result may still be longer than the context.
    tools: tools for the chat template, in OpenAI's format; None: there are none.
    template: other arguments of the chat template; None: there are none.
    continue_last: whether the answer continues the last message instead of beginning a new one.
    add_special: whether plain text gets the tokens that the tokenizer puts around a text by default.
    Raises SpecDecError for an empty prompt, white space unless ``chat`` is False, a wrong type, or a chat without a
    template; PromptTooLongError for text that cannot fit the context.
    """
    if (ids := _given_ids(prompt, name)) is not None:
        return ids
    if len(prompt) == 0 or (isinstance(prompt, str) and chat is not False and not prompt.strip()):
        raise SpecDecError(f"the {name} is empty; give some text")
    if tokenizer is None:
        raise SpecDecError("text prompts need a tokenizer; pass token ids or give SpecDecoder a tokenizer")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (has_template if chat is None else chat):
        if system is not None:
            raise SpecDecError("a system prompt needs a chat template; this prompt is used as plain text")
        _check_length(tokenizer, len(prompt), context)
        return token_ids(tokenizer, prompt, add_special)
    if not has_template:
        raise SpecDecError("this tokenizer has no chat template; use plain text (apply_chat_template=False, --raw)")
    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return _encode_chat(tokenizer, messages, context, tools, template or {}, continue_last)


def _given_ids(prompt: Any, name: str) -> list[int] | None:
    """Return the ids of a prompt of token ids; None for text and messages. Raises SpecDecError for anything else.

    name: what error messages call the prompt.
    """
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
    """Return token ids of chat messages, rendered by the tokenizer's template.

    tokenizer: a transformers tokenizer with a chat template.
    messages: the chat, ``[{"role", "content"}, ...]``.
    context: the model's context, in tokens; longer text is refused before tokenisation. None: there is no limit.
    tools: tools for the template, in OpenAI's format; None: there are none.
    template: other arguments of the template, by name.
    continue_last: whether the answer continues the last message instead of beginning a new one.
    Raises SpecDecError if the template fails, PromptTooLongError for a chat that is too long.
    """
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


class _SpelledTokens:
    """Keeps special tokens that are spelled out in chat messages from becoming special.

    ``hidden`` replaces each by a private character, which a template copies like a letter. ``encode`` puts the text
    back into the rendered chat: text between two special tokens with such a character is tokenised as plain text, and
    everything else as usual. Takes time linear in the text. A private character is a code point without a meaning.

    tokenizer: a transformers tokenizer. messages: everything that is rendered, nested lists and mappings; a private
    character in it is not used.
    """

    def __init__(self, tokenizer: Any, messages: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens = {str(token): token for token in special_tokens(tokenizer).values()}
        self.spelled = _any_of(tuple(self.tokens))
        used = set[str]().union(*_texts(messages))
        self.free = (chr(c) for c in PLACEHOLDERS if chr(c) not in used)
        self.stand_ins = dict[str, str]()

    def hidden(self, messages: Any) -> Any:
        """Return a copy of ``messages``, of any nesting, with a private character in place of each special token.

        Raises SpecDecError if there are not enough private characters.
        """
        if isinstance(messages, str):
            return self.spelled.sub(self._stand_in, messages) if self.tokens else messages
        if isinstance(messages, Mapping):
            return {self.hidden(key): self.hidden(value) for key, value in messages.items()}
        return [self.hidden(value) for value in messages] if isinstance(messages, list | tuple) else messages

    def _stand_in(self, found: re.Match[str]) -> str:
        """Return the character that replaces a special token in the messages, always the same for one token.

        found: the match of ``spelled``, whose text is the special token. Raises SpecDecError if no private character
        (a Unicode code point without a meaning) is left for a new token.
        """
        if found[0] not in self.stand_ins:
            if (character := next(self.free, None)) is None:
                raise SpecDecError(
                    "the messages contain special tokens and all private characters that could replace them; leave one "
                    "or the other out"
                )
            self.stand_ins[found[0]] = character
        return self.stand_ins[found[0]]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, a chat rendered from ``hidden`` messages."""
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
        return token_ids(self.tokenizer, text, add_special=False, split_special=split_special) if text else []


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
    """Yield all strings in ``value``, nested lists and mappings such as chat messages; keys are strings, too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in itertools.chain(value, value.values()) if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _tensor_ids(prompt: Tensor, name: str) -> list[int]:
    """Return the token ids in ``prompt``, a tensor of integers [T] or [1, ..., T]. Raises SpecDecError for any other.

    name: what error messages call the prompt.
    """
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
    """Return (not raise) the error for a prompt of a wrong type.

    name: what the message calls the prompt. what: what was given instead, such as "a tensor of float32".
    """
    return SpecDecError(
        f"{name} must be text, token ids (whole numbers), an integer tensor of one sequence, or chat messages "
        f"(mappings with 'role' and 'content'); got {what}"
    )


def _check_length(tokenizer: Any, length: int, context: int | None) -> None:
    """Raise PromptTooLongError if even the tokenizer's longest tokens cannot fit a text into ``context`` tokens.

    length: number of characters of the text. context: None: there is no limit.
    """
    if context is None or length <= LONG_TOKEN * context:
        return
    most = context * max(map(len, tokenizer.get_vocab()))
    if length > most:
        raise PromptTooLongError(
            f"the prompt has {length} characters, and the model's context of {context} tokens holds at most {most}; "
            "shorten it"
        )
