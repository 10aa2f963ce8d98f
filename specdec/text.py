"""Text at the edges: prompts to token ids, and token ids to text as they arrive. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from specdec.errors import SpecDecError

LONG_TOKEN = 16  # characters; shorter prompts than the context holds of such tokens are tokenised to see
Prompt = str | Sequence[int] | Tensor | Sequence[dict[str, str]]


def encode(
    tokenizer: Any, prompt: Prompt, chat: bool | None = None, system: str | None = None, context: int | None = None
) -> list[int]:
    """Turn a prompt into token ids.

    prompt: text, token ids (list or tensor of one sequence), or chat messages (``[{"role", "content"}, ...]``).
    chat: wrap text in the tokenizer's chat template; None does so where there is one. Ids are taken as they are.
    context: refuse text that is too long for so many tokens before it is tokenised, which may take minutes.
    Raises SpecDecError for an empty prompt, or a chat without a template.
    """
    if isinstance(prompt, Tensor):
        if prompt.dim() > 1 and prompt.shape[0] != 1:
            raise SpecDecError(
                f"a prompt tensor holds one sequence, got shape {list(prompt.shape)}; use generate_batch for several"
            )
        prompt = [int(t) for t in prompt.flatten()]
    if not isinstance(prompt, str) and len(prompt) and not isinstance(prompt[0], dict):
        return [int(t) for t in prompt]  # type: ignore[arg-type]
    if len(prompt) == 0 or (isinstance(prompt, str) and not prompt.strip()):
        raise SpecDecError("the prompt is empty; give some text")
    if tokenizer is None:
        raise SpecDecError("text prompts need a tokenizer; pass token ids or give SpecDecoder a tokenizer")
    if context is not None and isinstance(prompt, str):
        _check_length(tokenizer, prompt, context)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str):
        if chat is False or (chat is None and not has_template):
            if system is not None:
                raise SpecDecError("a system prompt needs a chat template; this prompt is used as plain text")
            return [int(t) for t in tokenizer(prompt).input_ids]
        messages: list[Any] = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
    if not has_template:
        raise SpecDecError("this tokenizer has no chat template; use plain text (chat=False, --raw)")
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are code of the model's author and raise what they like
        raise SpecDecError(f"the chat template refuses these messages: {error}") from None
    return [int(t) for t in tokenizer(text, add_special_tokens=False).input_ids]


def _check_length(tokenizer: Any, text: str, context: int) -> None:
    """Raise SpecDecError for text with more characters than ``context`` of the tokenizer's longest tokens have."""
    if len(text) <= LONG_TOKEN * context:
        return
    most = context * max(map(len, tokenizer.get_vocab()))
    if len(text) > most:
        raise SpecDecError(
            f"the prompt has {len(text)} characters; the model's context of {context} tokens holds at most {most}; "
            "shorten it"
        )


class Detokenizer:
    """Incremental text of one output, with stop strings.

    Tokens are taken in by ``push``, and read when their text is asked for (or at once, where a stop string may be in
    them). ``take`` returns the text that has become certain: complete characters that cannot be the beginning of a stop
    string. Once ``stopped``, the text ends before the stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.ids: list[int] = []
        self.start = self.read = 0  # ids[start:read] is context whose text has been taken, ids[read:] is new
        self.text = ""  # all complete text, up to the stop string
        self.sent = 0  # characters of it that take() has returned
        self.stopped = False

    def push(self, token: int) -> None:
        self.ids.append(token)
        if self.stop:
            self._read()

    def take(self) -> str:
        if not self.stop:
            self._read()
        hold = max((n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        return self._send(len(self.text) - (0 if self.stopped else hold))

    def _read(self) -> None:
        before = self._decode(self.ids[self.start : self.read])
        after = self._decode(self.ids[self.start :])
        # A trailing replacement character is most likely half of a multi-byte one: wait for the rest.
        if len(after) > len(before) and not after.endswith("�"):
            self._extend(after[len(before) :])
            self.start, self.read = self.read, len(self.ids)

    def finish(self) -> str:
        """The text held back so far, at the end of the output."""
        if not self.stopped:
            before = self._decode(self.ids[self.start : self.read])
            self._extend(self._decode(self.ids[self.start :])[len(before) :])
            self.start = self.read = len(self.ids)
        return self._send(len(self.text))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _extend(self, piece: str) -> None:
        old = len(self.text)
        self.text += piece
        found = [at for s in self.stop if (at := self.text.find(s, max(0, old - len(s) + 1))) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _send(self, end: int) -> str:
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece
