"""Constraints on the output: a JSON schema, a regular expression, a grammar or a list of texts.

The package llguidance (extra ``structured``) computes which tokens are allowed. A constraint is a logits processor, a
function of the tokens before a position: drafted tokens get the masks of their own prefixes, in chains and trees, and
rejected tokens leave no trace. After a complete text only an end token is allowed. If a model reasons in a <think>
block before it answers, the constraint begins after the end of that block.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from specdec.base.errors import ConstraintError, SpecDecError, how_to_install
from specdec.base.sequences import common_prefix

LONGEST = 2**16  # maximum characters of a schema, an expression or a grammar
MASKS = 64  # number of cached masks: drafting, scoring and the search for forced tokens need the same ones
TAIL = 256  # last tokens of a text that may change between two queries; no draft is so deep
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes it
NO_TEXT = "NoExtensionBias"  # in llguidance's message: nothing is allowed
NO_END = "Too many items"  # in its message: what is forced has no end, or hardly any
REASONING = "<think>", "</think>"
CLOSED = 4  # a reasoning block that ends within so many last tokens of a prompt is the answer's, and empty
LIMITS: dict[str, Any] = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000}
LIMITS |= {"max_lexer_states": 50_000, "max_grammar_size": 100_000}

T = TypeVar("T")
_tokenizers: WeakKeyDictionary[Any, dict[tuple[int, tuple[int, ...]], Any]] = WeakKeyDictionary()


class Constraint:
    """A rule that the generated text must follow: base class of ``Json``, ``Regex``, ``Grammar`` and ``Choice``.

    A subclass is a dataclass whose first field holds the rule. It sets ``kind``. It overrides ``source`` if that field
    is not text, and ``grammar`` if the source is not a grammar in llguidance's variant of Lark.

    kind: name of the constraint in error messages.
    """

    kind: str

    @property
    def source(self) -> str:
        """The constraint as text: by default the first field. ``compile_constraint`` refuses very long texts."""
        source: str = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return source

    def grammar(self, matcher: Any) -> str:
        """Return the constraint as a grammar string that llguidance's ``LLMatcher`` takes.

        Raises ValueError if the constraint's source is invalid. matcher: llguidance's class ``LLMatcher``.
        """
        return str(matcher.grammar_from_lark(self.source))


@dataclass(frozen=True)
class Json(Constraint):
    """Constraint that allows only JSON text of a schema, on one line and spaced like ``{"a": 1, "b": [2, 3]}``.

    schema: the JSON schema as a mapping or as text, or a pydantic model class.
    """

    schema: Any
    kind = "JSON schema"

    @property
    def source(self) -> str:
        if isinstance(self.schema, str):
            return self.schema
        model = isinstance(self.schema, type) and issubclass(self.schema, BaseModel)
        try:
            return json.dumps(self.schema.model_json_schema() if model else self.schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise SpecDecError(f"the JSON schema is not JSON ({error})") from None

    def grammar(self, matcher: Any) -> str:
        try:
            schema = json.loads(self.source, parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        if not isinstance(schema, dict):
            raise ValueError("it is not a JSON object")
        return str(matcher.grammar_from_json_schema(schema, defaults=JSON_FORM))


def _refuse_constant(name: str) -> None:
    """Raise ValueError for the constant ``name`` (such as NaN or Infinity), which Python's JSON parser would accept."""
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Regex(Constraint):
    """Constraint that allows only text which the regular expression ``pattern`` matches from beginning to end.

    pattern: in the syntax of the package llguidance.
    """

    pattern: str
    kind = "regular expression"

    def grammar(self, matcher: Any) -> str:
        return str(matcher.grammar_from_regex(self.pattern))


@dataclass(frozen=True)
class Grammar(Constraint):
    """Constraint that allows only text of a grammar. lark: the grammar, in llguidance's variant of Lark."""

    lark: str
    kind = "grammar"


@dataclass(frozen=True)
class Choice(Constraint):
    """Constraint that allows only one of the strings ``texts``, none of which may be empty."""

    texts: Sequence[str]
    kind = "choice"

    @property
    def source(self) -> str:
        if isinstance(self.texts, str) or not self.texts or not all(isinstance(t, str) and t for t in self.texts):
            raise SpecDecError("a choice needs a list of texts that are not empty")
        return "start: " + " | ".join(json.dumps(text) for text in self.texts)


def masked(scores: Tensor, allowed: Tensor | None, vocab: Tensor | None) -> Tensor:
    """Return a copy of the logits ``scores`` [..., V'] with -inf for tokens that are not allowed.

    allowed: whether a token is allowed, bool [V]; None: no token is.
    vocab: the token ids of ``scores``, int64 [V']; None: the index of a logit is its token id.
    """
    if allowed is None:
        return torch.full_like(scores, float("-inf"))
    own = (allowed[: scores.shape[-1]] if vocab is None else allowed[vocab.cpu()]).to(scores.device)
    return scores.masked_fill(~own, float("-inf"))


class CompiledConstraint:
    """A constraint that is compiled for one model; ``state`` makes the logits processor of one row (sequence).

    Several rows may use one object.

    matcher: an ``LLMatcher`` of the package llguidance at the beginning of the text. Each row gets a copy.
    vocab_size: V, the size of the model's vocabulary.
    ends: ids of the end tokens.
    block: ids of the tokens that begin and end a reasoning block; None: the model does not reason.
    special: ids of the special tokens, of which one or more stand between two turns of a chat.
    reasoning: the tokens that are allowed in a reasoning block, bool [V].
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: frozenset[int]) -> None:
        self.matcher = matcher
        self.vocab_size = vocab_size  # V
        self.ends = ends
        self.block: tuple[int, int] | None = None
        self.special = ends
        self.reasoning = torch.ones(vocab_size, dtype=torch.bool)
        self.reasoning[[end for end in ends if end < vocab_size]] = False

    def state(self, prompt: Sequence[int]) -> ConstraintState:
        """Return the logits processor of one row (sequence).

        prompt: token ids of the row's prompt, which may end in a reasoning block.
        """
        return ConstraintState(self, prompt)


def compile_constraint(
    constraint: Constraint, tokenizer: Any, vocab_size: int, ends: frozenset[int]
) -> CompiledConstraint:
    """Compile ``constraint`` for a model, and return it.

    Raises SpecDecError if the constraint is invalid, longer than ``LONGEST`` (65536) characters, or allows no text; if
    the tokenizer cannot be used or there is no end token; and if llguidance is not installed.

    tokenizer: the model's tokenizer, a fast one of transformers.
    vocab_size: V, the size of the model's vocabulary. ends: ids of the tokens that end a text.
    """
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError:
        raise SpecDecError(
            f"a constraint needs the package llguidance, which is not installed; {how_to_install('structured')}"
        ) from None
    if not isinstance(constraint, Constraint):
        raise SpecDecError(f"a constraint is a Json, Regex, Grammar or Choice; got {type(constraint).__name__}")
    if not isinstance(constraint.source, str):
        raise SpecDecError(f"the {constraint.kind} must be text; got {type(constraint.source).__name__}")
    if len(constraint.source) > LONGEST:
        raise SpecDecError(
            f"the {constraint.kind} has {len(constraint.source)} characters; at most {LONGEST} are taken; shorten it"
        )
    table = _token_table(tokenizer, vocab_size, ends)
    try:
        matcher = LLMatcher(table, constraint.grammar(LLMatcher), log_level=0, limits=LLParserLimits(**LIMITS))
    except (ValueError, RecursionError) as error:
        raise _invalid(constraint, str(error)) from None
    if matcher.is_error():
        raise _invalid(constraint, matcher.get_error())
    made = CompiledConstraint(matcher, vocab_size, ends)
    first = made.state(())
    begun = [token for token in first.forced((), 2 * LONGEST) if token not in ends]
    allowed = first.mask(begun)  # where there is a choice at first
    if first.error_text or allowed is None or not bool(allowed.any()):
        raise _invalid(constraint, first.error_text or "it allows no text")
    made.block = _block(tokenizer)
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    made.special |= {token_id for token_id, token in added.items() if token.special} - {*(made.block or ())}
    return made


def _invalid(constraint: Constraint, why: str) -> SpecDecError:
    """Return the ConstraintError that says why ``constraint`` cannot be used. why: llguidance's message."""
    return ConstraintError(f"the {constraint.kind} cannot be used: {_sentence(why)}")


def _sentence(why: str) -> str:
    """Return an error message of the package llguidance as one short sentence, without the dump of its state.

    why: the message.
    """
    if NO_TEXT in why:
        return "it allows no text"
    if NO_END in why:
        return "what it requires has no end, or is too long"
    lines = [line.strip() for line in why.partition("<state>")[0].splitlines() if line.strip(" ^\t")]
    return " ".join(lines)[:300]


def _token_table(tokenizer: Any, vocab_size: int, ends: frozenset[int]) -> Any:
    """Return the tokenizer as llguidance's ``LLTokenizer``. Takes about a second, then is cached with the tokenizer.

    Raises SpecDecError if the tokenizer is not a fast one, if llguidance refuses it, or if there is no end token.

    tokenizer: the model's tokenizer, of transformers.
    vocab_size: V, the size of the model's vocabulary. ends: ids of the end tokens.
    """
    from llguidance import LLTokenizer

    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise SpecDecError("a constraint needs a fast tokenizer; give SpecDecoder one")
    if not ends:
        raise SpecDecError("a constraint needs a model with an end token; this one has none")
    tables, key = _tokenizers.setdefault(tokenizer, {}), (vocab_size, tuple(sorted(ends)))
    if key not in tables:
        try:
            whole = copy.copy(backend)
            whole.no_padding()
            whole.no_truncation()
            tables[key] = LLTokenizer(whole.to_str(), n_vocab=max(vocab_size, len(tokenizer)), eos_token=sorted(ends))
        except ValueError as error:
            raise SpecDecError(f"a constraint cannot be used with this tokenizer: {error}") from None
    return tables[key]


def _block(tokenizer: Any) -> tuple[int, int] | None:
    """Return the ids of the tokens <think> and </think>, which enclose a model's reasoning.

    None if the tokenizer's chat template does not use them, or if they are not single tokens.
    """
    if REASONING[1] not in str(getattr(tokenizer, "chat_template", None)):
        return None
    begin, end = tokenizer.convert_tokens_to_ids(list(REASONING))
    if begin is None or end is None:
        return None
    return (begin, end) if tuple(tokenizer.convert_ids_to_tokens([begin, end])) == REASONING else None


class ConstraintState:
    """The constraint on the text of one row (sequence), as a logits processor.

    The row's text only grows, but for drafted tokens at its end. So all tokens before the last ``TAIL`` (256) ones of a
    text are taken to be those of every later text, and a query does not read them again.

    compiled: the constraint, compiled for the model.
    prompt: the token ids of the row's prompt. start: their number.
    inside: whether the prompt ends in a reasoning block (<think> .. </think>), which is not constrained.
    may_reason: whether the answer may begin with a reasoning block.
    matcher, consumed: llguidance's matcher, and the generated tokens that it has consumed.
    fixed: number of first tokens in ``consumed`` that every later text has.
    searched: index in the text before which no reasoning block ends. answer: where the block has ended; None: unknown.
    masks: cached results of ``mask``, by the length of the text and its last tokens.
    error_text: why the matcher failed; "": it did not.
    """

    def __init__(self, compiled: CompiledConstraint, prompt: Sequence[int]) -> None:
        self.compiled, self.start = compiled, len(prompt)
        block: Sequence[int] = compiled.block or ()
        last = next((n for n in reversed(range(len(prompt))) if prompt[n] in block), -1)
        opened = last >= 0 and prompt[last] == block[0]
        self.inside = opened and compiled.special.isdisjoint(prompt[last + 1 :])  # else it is text of an earlier turn
        closed = last >= 0 and not opened and len(prompt) - last <= CLOSED
        self.may_reason = bool(block) and not self.inside and not closed
        self.matcher, self.consumed = compiled.matcher.deep_copy(), list[int]()
        self.error_text = ""
        self._expect_any_text()

    def _expect_any_text(self) -> None:
        """Take no token of earlier texts for one of later texts."""
        self.fixed, self.searched = 0, self.start
        self.answer: int | None = None
        self.masks: dict[tuple[int, tuple[int, ...]], Tensor | None] = {}

    def error(self, ids: Sequence[int]) -> SpecDecError | None:
        """Return an error if no token can follow the text ``ids`` (prompt and output); None: some token can."""
        why = self.error_text
        if not why and self.mask(ids) is None:
            why = "the tokenizer and the grammar disagree on what is allowed"
        return ConstraintError(f"the constraint cannot be kept: {why}") if why else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._expect_any_text()  # a caller outside the engine may have several
        return self.masked(input_ids[0].tolist(), scores)

    def masked(self, ids: Sequence[int], scores: Tensor, vocab: Tensor | None = None) -> Tensor:
        """Return the logits ``scores`` [1, V'] of the token after ``ids``, with -inf for tokens that are not allowed.

        All are -inf if ``ids`` itself breaks the constraint, as behind a drafted token that will be rejected.

        ids: prompt and output. vocab: the token ids of ``scores``, int64 [V']; None: the index of a logit is its token
            id.
        """
        return masked(scores, self.mask(ids), vocab)

    def mask(self, ids: Sequence[int], drafted: Sequence[int] = ()) -> Tensor | None:
        """Return which tokens may follow the text ``ids`` and then ``drafted``, bool [V] on the CPU.

        It is cached, so the caller must not change it. None if no token may follow, or if the text itself breaks the
        constraint.

        ids: prompt and output; drafted tokens may be at the end, too. drafted: tokens after it.
        """
        end = len(ids) + len(drafted)
        key = end, tuple(_part(ids, drafted, max(end - TAIL, self.start), end))
        if key not in self.masks:
            if len(self.masks) >= MASKS:
                self.masks.clear()
            self.masks[key] = self._guarded(lambda: self._mask(ids, drafted), None)
        return self.masks[key]

    def forced(self, ids: Sequence[int], limit: int) -> list[int]:
        """Return the tokens that must follow ``ids`` (prompt and output), because the constraint allows no others.

        [] if it allows a choice, or no token. limit: maximum number of tokens to return.
        """
        found = list[int]()
        while len(found) < limit:
            more = self._guarded(partial(self._forced, ids, found), list[int]())
            if not more:
                break
            found += more
        return found[:limit]

    def allows(self, ids: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of ``tokens``, from the first on, the constraint allows after ``ids`` (prompt and output)."""
        return self._guarded(lambda: self._allows(ids, tokens), 0)

    def _begin(self, ids: Sequence[int], drafted: Sequence[int]) -> int | None:
        """Return the index in the text from which on tokens are constrained: after the prompt, or a reasoning block.

        None if all tokens after the prompt are in an open reasoning block. ids, drafted: as for ``mask``.
        """
        block, start, end = self.compiled.block, self.start, len(ids) + len(drafted)
        if self.answer is not None and self.answer <= end:
            return self.answer
        if block is None or not (
            self.inside or (self.may_reason and _part(ids, drafted, start, start + 1) == [block[0]])
        ):
            return start
        at = min(self.searched, end)
        rest = _part(ids, drafted, at, end)
        begin = at + rest.index(block[1]) + 1 if block[1] in rest else None
        if begin is None:
            self.searched = max(self.searched, end - TAIL)
        elif begin <= end - TAIL:
            self.answer = begin
        return begin

    def _mask(self, ids: Sequence[int], drafted: Sequence[int]) -> Tensor | None:
        """Compute which tokens may follow a text, bool [V]; None: no token may, or the text breaks the constraint.

        ids, drafted: as for ``mask``.
        """
        begin, block = self._begin(ids, drafted), self.compiled.block
        if begin is None:
            return self.compiled.reasoning
        if not self._go_to(ids, drafted, begin):
            return None
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: self.compiled.vocab_size].astype(bool)
        if block is not None and self.may_reason and len(ids) + len(drafted) == self.start:
            allowed[block[0]] = True
        return torch.from_numpy(allowed)

    def _forced(self, ids: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """Return one or more tokens that must follow the text ``ids`` and then ``drafted``.

        [] if there is a choice, or if no token may follow. ids, drafted: as for ``mask``.
        """
        begin = self._begin(ids, drafted)
        if begin is None or (self.may_reason and len(ids) + len(drafted) == self.start):
            return []
        if not self._go_to(ids, drafted, begin):
            return []
        if more := self.matcher.compute_ff_tokens():
            return list(more)
        if (mask := self.mask(ids, drafted)) is None:
            return []
        allowed = mask.numpy()  # not torch: waking a team of threads takes ten times as long
        return [int(allowed.argmax())] if np.count_nonzero(allowed) == 1 else []

    def _allows(self, ids: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of ``tokens``, counted from the first, are allowed after the text ``ids``.

        ids: prompt and output.
        """
        begin, ends = self._begin(ids, tokens), self.compiled.ends
        free = tokens if begin is None else tokens[: max(begin - len(ids), 0)]  # in a reasoning block
        count = next((n for n, token in enumerate(free) if token in ends), len(free))
        if begin is None or count < len(free) or not self._go_to(ids, free, begin):
            return count
        rest = tokens[count : next((n + 1 for n in range(count, len(tokens)) if tokens[n] in ends), len(tokens))]
        return count + int(self.matcher.validate_tokens(list(rest)))

    def _go_to(self, ids: Sequence[int], drafted: Sequence[int], begin: int) -> bool:
        """Move llguidance's matcher to the end of a text, and return whether it allows all tokens from ``begin`` on.

        ids, drafted: as for ``mask``. begin: index from which on the text is constrained.
        """
        count = len(ids) + len(drafted) - begin
        known = self.fixed if self.fixed <= count else 0
        new = _part(ids, drafted, begin + known, begin + count)
        shared = known + common_prefix(self.consumed[known:], new)
        if shared < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - shared)
            del self.consumed[shared:]
        more = new[shared - known :]
        if self.compiled.ends.isdisjoint(more):
            self.consumed += more[: self.matcher.try_consume_tokens(more)]
        self.fixed = max(min(count - TAIL, len(self.consumed)), known)
        return len(self.consumed) == count

    def _guarded(self, query: Callable[[], T], otherwise: T) -> T:
        """Return ``query()``. If llguidance's matcher fails in it, reset the matcher and return ``otherwise``.

        The reason is then in ``error_text``. Exceptions of ``query`` are caught.

        query: function that uses the matcher.
        """
        try:
            answer, why = query(), self.matcher.get_error()
        except Exception as error:  # of the matcher: it must not end other rows
            answer, why = otherwise, str(error)
        if not why:
            return answer
        self.error_text = _sentence(why)
        self.matcher, self.consumed, self.fixed = self.compiled.matcher.deep_copy(), [], 0
        return otherwise


def _part(ids: Sequence[int], drafted: Sequence[int], first: int, end: int) -> list[int]:
    """Return the tokens from index ``first`` to ``end`` of ``ids`` and the tokens ``drafted`` after it."""
    before = len(ids)
    if end <= before:
        return list(ids[first:end])
    return [*ids[first:], *drafted[max(first - before, 0) : end - before]]
