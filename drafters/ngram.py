"""N-grams: what followed where the text went on alike before, and a static prior where it never did.

Three sources, each overruling the one before: how often which token follows which in a small corpus, the texts of
earlier requests (as suffix decoding, arXiv 2411.04975), and the request's own text. The tree has the likeliest paths.
Needs no training; serves every tokenizer, as the corpus is text. Changes what is drafted, never the output.
"""

from __future__ import annotations

from typing import ClassVar

from specdec.base import options
from specdec.runtimes.target import Target
from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.ngram import Grower, Prior, Scoped, Texts
from specdec.speculation.trie import draft_best, in_one_shape, worth_scoring

from .corpus import corpus

TEXT = 1 << 20  # most tokens of a request's own text that are matched
STORE = 1 << 17  # tokens of earlier requests that are kept: 2.6 MB
# How much an occurrence counts: in the corpus, in an earlier request, in the request's own text.
CORPUS_WEIGHT, STORE_WEIGHT, OWN_WEIGHT = 0.15, 0.25, 1.0
NO_CANDIDATES = Candidates([], [], [])
SAMPLED = 8  # most levels where tokens are sampled: noise is made for each


class NgramRow:
    """The text of one request. seen: tokens entered. store: earlier texts of its scope, set by its first draft."""

    def __init__(self) -> None:
        self.texts, self.seen = Texts(TEXT), 0
        self.store: Texts | None = None


class NgramDrafter(Drafter):
    """Drafts the likeliest paths by n-grams: as many nodes as pay for their scoring, or ``nodes``.

    nodes: of a tree; None: those worth their price (``Prices``), or as many as the draft may be deep. store: tokens of
    earlier requests of this process, prompts and outputs, that are matched; 0 or false: none. prior: whether the corpus
    is used; it needs the model's tokenizer.
    Raises SpecDecError where its compiled part is not built.
    """

    name: ClassVar[str] = "ngram"
    summary: ClassVar[str] = (
        "suffix matches in the text and earlier requests, and a prior counted in a corpus; no training"
    )
    blends: ClassVar[bool] = True
    has_probabilities = True

    def __init__(self, nodes: int | None = None, store: int | bool = STORE, prior: bool = True) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.size = STORE * store if isinstance(store, bool) else options.check_int("store", store, 0)
        self.prior = bool(prior)
        self.stores = Scoped(lambda: Texts(self.size))

    def bind(self, target: Target) -> None:
        self.corpus, counted = None, None
        if self.prior and target.tokenizer is not None:
            ids = corpus(target.tokenizer, target.vocab_size)
            self.corpus, counted = Texts(len(ids)), Prior.count(ids, target.vocab_size)
            self.corpus.add(ids)
        self.grower = Grower(counted)

    def begin(self) -> NgramRow:
        return NgramRow()

    def end(self, row_state: NgramRow, ids: list[int], start: int, learn: bool = True) -> None:
        if row_state.store is not None and learn:
            row_state.store.add([*ids[-self.size // 2 :], -1])

    def propose(self, state: State, limit: int) -> Draft:
        return self.blend(state, limit, [NO_CANDIDATES] * len(state.ids))

    def alone(self, state: State, limit: int) -> Draft | None:
        prices = state.prices
        if prices is None:
            return None
        grown = [self._grown(state, row, limit, NO_CANDIDATES) for row in range(len(state.ids))]
        found = worth_scoring(grown, limit, self.nodes, prices, levels=0)
        right = [0.0] * limit  # by level, of all rows
        for own in found:
            for depth, probability in zip(own.depths(), prices.calibrated(own.scores, free=True), strict=True):
                right[depth - 1] += probability
        scored = sum(len(own.tokens) for own in found)
        if prices.learned_pays(right, scored, len(found)) or state.exit is not None:
            return None
        return in_one_shape([(own.tokens, own.parents) for own in found], state.cache.device)[0]

    def blend(self, state: State, limit: int, learned: list[Candidates]) -> Draft:
        # A drafter that has learned nothing yet runs no level: as its own, such a draft would make levels look cheap.
        levels = max(own.levels() for own in learned) if any(own.tokens for own in learned) else 0
        found = [self._grown(state, row, limit, own) for row, own in enumerate(learned)]
        return draft_best(found, limit, self.nodes, state, levels)

    def _grown(self, state: State, row: int, limit: int, learned: Candidates) -> Candidates:
        row_state, ids, chooser = state.row_states[row], state.ids[row], state.sampler.rows[row]
        if self.size and row_state.store is None:
            row_state.store = self.stores.of(state.scopes[row] if state.scopes else None)
        row_state.texts.add(ids[row_state.seen :])
        row_state.seen = len(ids)
        texts = (self.corpus, CORPUS_WEIGHT), (row_state.store, STORE_WEIGHT), (row_state.texts, OWN_WEIGHT)
        sources = [(each, weight) for each, weight in texts if each is not None]
        noise = None
        if not chooser.transforms.greedy:
            size = state.target.vocab_size
            noise = [chooser.noise(len(ids) + depth, size) for depth in range(min(limit, SAMPLED))]
        return self.grower(ids, sources, limit, learned, state.masks(row), noise, general=int(self.corpus is not None))
