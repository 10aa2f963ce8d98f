"""The text of a request from the engine's events, in pieces; the last one has OpenAI's finish reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.api.text import Detokenizer
from specdec.engine.request import Event

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


class AnswerText:
    """The text of one request so far. finish: OpenAI's finish reason, once the request has ended."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), shown: Sequence[str] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer, stops, shown)
        self.finish: str | None = None

    @property
    def text(self) -> str:
        return self.detokenizer.text

    @property
    def num_tokens(self) -> int:
        return len(self.detokenizer.ids)

    def read(self, event: Event, per_token: bool = False) -> Iterator[Piece]:
        """The new text of ``event``, as one piece or one ``per_token``. The last event's last piece has the reason."""
        depth = 0
        for token, depth in zip(event.tokens, event.depths, strict=True):
            self.detokenizer.push(token)
            if per_token and (text := self.detokenizer.take()):
                yield Piece(text, depth)
        if event.finish_reason is not None:
            self.finish = REASONS.get(event.finish_reason, event.finish_reason)
            yield Piece(self.detokenizer.finish(), depth, self.finish)
        elif not per_token and (text := self.detokenizer.take()):
            yield Piece(text, depth)
