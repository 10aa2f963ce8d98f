"""Token ids to text as they arrive, in pieces; and a tokenizer that threads share. Knows nothing about models."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.engine.request import Event, Request

CONTEXT = 16  # earlier tokens that are decoded with new ones, since a token's text depends on its context


_splitting = weakref.WeakKeyDictionary[Any, Any]()  # by tokenizer, a copy that splits special tokens
_copying = threading.Lock()


def token_ids(tokenizer: Any, text: str, add_special: bool = True, split_special: bool = False) -> list[int]:
    """Return the token ids of a text; threads may share a tokenizer. Raises SpecDecError if the tokenizer fails.

    Whether special tokens are split is a state of fast tokenizers, which a call would set for all threads; so a copy,
    made at first use, splits them.
    add_special: whether to add the tokens that the tokenizer puts around a text by default.
    split_special: whether special tokens in the text are tokenised like other text.
    """
    how = {"split_special_tokens": True} if split_special else {}
    if split_special:
        with _copying:
            copied = _splitting.get(tokenizer)
            if copied is None or len(copied) != len(tokenizer):  # tokens were added to it
                copied = _splitting[tokenizer] = copy.deepcopy(tokenizer)
            tokenizer = copied
    try:
        return [int(t) for t in tokenizer(text, add_special_tokens=add_special, **how).input_ids]
    except Exception as error:
        raise SpecDecError(f"the tokenizer cannot encode this text: {error}") from None


def decode_ids(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    """Return the text of token ids. special: whether to include special tokens."""
    # A cleanup removes spaces before punctuation, so that a longer text need not begin with a shorter one.
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    how = {"clean_up_tokenization_spaces": False} if cleans else {}
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, **how))


def special_tokens(tokenizer: Any) -> dict[int, Any]:
    """Return {id: token} of a tokenizer's special tokens, which ``skip_special_tokens`` leaves out of text.

    A token is an object like ``AddedToken``: ``str`` gives its text, ``lstrip`` and ``rstrip`` which space it takes.
    """
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {int(i): token for i, token in added.items() if token.special and str(token)}


REASONS = {"eos": "stop", "stop": "stop", "length": "length"}  # OpenAI's finish reason for the engine's


@dataclass(frozen=True)
class Piece:
    """A piece of new text of a request.

    text: the text; it may be "" in the last piece.
    depth: depth in the draft of the piece's last token; 0: the model chose it itself.
    finish: OpenAI's finish reason, in the last piece; None: more text follows.
    """

    text: str
    depth: int = 0
    finish: str | None = None


class Detokenizer:
    """The text of one request as its tokens arrive, up to a stop string. Without a tokenizer, the text is empty.

    The engine calls ``push`` with each new token, in its own thread if it has one. The reader of the request calls the
    other methods. With stop strings ``push`` decodes the tokens, otherwise the reader does.

    stop: strings that end the text; they may contain special tokens.
    shown: texts, such as marks of a tool call, whose special tokens stay in the text.
    hidden: ids of tokens that have no text.
    min_new_tokens: number of tokens before which no stop string ends the text.
    before: token ids of a prompt that the text continues; a space between the two stays. (): it begins a text.
    text: the decoded text so far, up to the stop string.
    whole: all decoded text, also the special tokens that readers do not get but that stop strings contain.
    window: the last tokens that have text, earlier ones as context and then new ones, which are decoded together.
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
        before: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = [s for s in stop if s]
        self.hidden = frozenset(hidden)
        self.min_new_tokens = min_new_tokens
        self.special = {i: str(token) for i, token in special_tokens(tokenizer).items()}
        self.shown = {i for i, t in self.special.items() if any(t in s for s in shown)}
        self.matched = self.shown.union(i for i, t in self.special.items() if any(t in s for s in self.stop))
        self.ids: list[int] = []  # all new tokens
        self.num_added = 0  # number of tokens that are in the window or the text
        self.certain: list[int] = []  # with stop strings: how much text is certain after each token
        self.num_read = 0
        self.finish_reason: str | None = None
        self.window = [t for t in before[-CONTEXT:] if t not in self.special]  # earlier tokens with text, then new ones
        self.context = self._decode(self.window)  # the text of the earlier ones
        if self.context.endswith("\ufffd"):  # the prompt ends within a character
            self.window, self.context = [], ""
        self.old = len(self.window)  # number of earlier tokens in the window
        self.text = ""  # all complete text, up to the stop string
        self.whole = ""  # the text with the special tokens that stop strings contain
        self.unseen: list[tuple[int, int]] = []  # their positions and lengths in ``whole``
        self.sent = 0  # characters of the text that ``take`` has returned
        self.stopped: str | None = None

    def push(self, token: int) -> str | None:
        """Add a token id; return "stop" if a stop string ends the text with it, else None."""
        self.ids.append(token)
        if not self.stop:
            return None
        self._add(len(self.ids))
        self._decode_window()
        hold = num_held(self.whole, self.stop)
        self.certain.append(len(self.text) if self.stopped is not None else self._place(len(self.whole) - hold))
        return None if self.stopped is None else "stop"

    def read(self, event: Event, per_token: bool = False) -> Iterator[Piece]:
        """Yield the text that the tokens of ``event`` complete, in pieces. The last piece has the finish reason.

        event: new tokens of the request, and whether it has ended. Their ids were given to ``push`` before.
        per_token: whether to yield a piece for each token that completes some text; if not, one piece in all.
        """
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
        """Return the certain text of the request's first ``count`` tokens that no earlier call has returned.

        Text is certain if its characters are complete and cannot begin a stop string. count: None: all tokens so far.
        """
        count = len(self.ids) if count is None else count
        if self.stop:
            return self._send(self.certain[count - 1] if count else 0)
        self._add(count)
        self._decode_window()
        return self._send(len(self.text))

    def finish(self) -> str:
        """Return the text that no earlier call has returned, at the end: an incomplete character is included."""
        self._add(len(self.ids))
        if self.stopped is None:
            self._decode_window(complete=False)
        return self._send(len(self.text))

    def _add(self, count: int) -> None:
        """Move the first ``count`` new tokens, those that were not moved yet, to ``window``, which is decoded as one.

        Hidden and special tokens have no text and are left out, but for special ones that are shown or that are part
        of a stop string: their text is appended to the output.
        """
        for token in self.ids[self.num_added : count]:
            if token in self.hidden:
                continue
            if token not in self.special:
                self.window.append(token)
            elif token in self.matched and self.stopped is None:
                self._decode_window(complete=False)
                self._extend(self.special[token], seen=token in self.shown)
        self.num_added = max(self.num_added, count)

    def _decode_window(self, complete: bool = True) -> None:
        """Decode the new tokens of ``window`` after the earlier ones, and append their text to the output.

        complete: whether to wait for further tokens while the last character is incomplete; if not, it is appended as
            a replacement character.
        """
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
        """Append the text of the window's first tokens to the output, and remove these from the window.

        The last few tokens stay, since later ones may change their text. text: the text of the whole window.
        """
        for end in range(len(self.window) - 4, len(self.window) - 8, -1):  # a character has up to four bytes
            first = self._decode(self.window[:end])
            if first + self._decode(self.window[end:]) == text:
                self._extend(first[len(self.context) :])
                del self.window[:end]
                self.old, self.context = 0, ""
                return

    def _decode(self, ids: list[int]) -> str:
        return decode_ids(self.tokenizer, ids) if ids and self.tokenizer else ""

    def _extend(self, piece: str, seen: bool = True) -> None:
        """Append ``piece`` to ``whole`` and, if ``seen``, to ``text``; cut ``text`` where a stop string begins.

        seen: whether readers get the piece; if not, it is only searched for stop strings.
        """
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
        """Convert ``place``, an index in ``whole``, which has hidden special tokens, to an index in ``text``."""
        return place - sum(min(length, place - at) for at, length in self.unseen if at < place)

    def _send(self, end: int) -> str:
        """Return ``text`` up to index ``end``, without what was returned before."""
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece


def num_held(text: str, marks: Iterable[str]) -> int:
    """Return the number of characters at the end of ``text`` that may be the beginning of one of ``marks``."""
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def text_of(request: Request) -> Detokenizer:
    """Return the ``Detokenizer`` of a request that ``SpecDecoder.request`` has made."""
    assert isinstance(request.text, Detokenizer)
    return request.text
