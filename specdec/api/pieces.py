"""From the engine's events to text: each piece with its place in a draft, and OpenAI's reason at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.api.text import Detokenizer
from specdec.engine.request import Event

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Piece:
    """New text. depth: of its last token in a draft, 0 if the model chose it itself. finish: why nothing follows."""

    text: str
    depth: int = 0
    finish: str | None = None


class Answer:
    """The text of one request. shown: special tokens that are in it. ``finish``: OpenAI's reason, once it has ended."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), shown: Sequence[str] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer, stops, shown)
        self.finish: str | None = None

    @property
    def text(self) -> str:
        return self.detokenizer.text

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self.detokenizer.ids)

    def read(self, event: Event, each: bool = False) -> Iterator[Piece]:
        """The text that ``event`` brings; ``each``: token by token. The last piece of all has the reason."""
        depth = 0
        for token, depth in zip(event.tokens, event.depths, strict=True):
            self.detokenizer.push(token)
            if each and (text := self.detokenizer.take()):
                yield Piece(text, depth)
        if event.finish_reason is not None:
            self.finish = REASONS.get(event.finish_reason, event.finish_reason)
            yield Piece(self.detokenizer.finish(), depth, self.finish)
        elif not each and (text := self.detokenizer.take()):
            yield Piece(text, depth)
