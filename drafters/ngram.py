"""N-grams: what followed where the text went on alike before, and a static prior where it never did.

Three sources, each overruling the one before: how often which token follows which in a small corpus, the texts of
earlier requests (as suffix decoding, arXiv 2411.04975), and the request's own text. The tree has the likeliest paths.
Needs no training; serves every tokenizer, as the corpus is text. Changes what is drafted, never the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from specdec.base import options
from specdec.base.background import Stop, Work
from specdec.runtimes.target import Target
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Traits
from specdec.speculation.ngram import Grower, Prior, Texts
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best
from specdec.speculation.trees import Prices

from .corpus import corpus

TEXT = 1 << 20  # most tokens of a request's own text that are matched
STORE = 1 << 17  # tokens of earlier requests that are kept: 2.6 MB
MOST_SCOPES = 16  # maximum number of scopes; the oldest is dropped for a new one
# How much an occurrence counts: in the corpus, in an earlier request, in the request's own text.
CORPUS_WEIGHT, STORE_WEIGHT, OWN_WEIGHT = 0.15, 0.25, 1.0


def count(tokenizer: Any, vocab_size: int, stop: Stop) -> tuple[Texts, Prior]:
    """Return the corpus in a tokenizer's tokens, as texts that are matched, and as a prior."""
    ids = corpus(tokenizer, vocab_size, stop)
    texts = Texts(len(ids))
    stop.check()
    texts.add(ids)
    stop.check()
    return texts, Prior.count(ids, vocab_size)


class NgramRow:
    """The state of a row.

    texts: its own text. seen: number of its tokens in ``texts``.
    store: the earlier texts of its scope; None before its first draft.
    """

    def __init__(self) -> None:
        self.texts, self.seen = Texts(TEXT), 0
        self.store: Texts | None = None


class NgramDrafter(Drafter):
    """Drafts the likeliest paths by n-grams: as many nodes as pay for their scoring, or ``nodes``.

    nodes: number of nodes of a tree; None: the nodes that are worth their price (``Prices``), or as many as the draft
        may be deep.
    store: number of tokens of earlier requests of this process, prompts and outputs, that are matched; 0, False: none.
    prior: whether the corpus is used, which needs the model's tokenizer.
    Raises SpecDecError where its compiled part is not built.
    """

    name: ClassVar[str] = "ngram"
    summary: ClassVar[str] = (
        "suffix matches in the text and earlier requests, and a prior counted in a corpus; no training"
    )

    traits = Traits(("ngram",), has_probabilities=True, level_shares=(0.0,))

    def __init__(self, nodes: int | None = None, store: int | bool = STORE, prior: bool = True) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.size = STORE * store if isinstance(store, bool) else options.check_int("store", store, 0)
        self.prior = bool(prior)
        self.stores = dict[str | None, Texts]()  # by scope

    def bind(self, target: Target) -> None:
        self.reading: Work[tuple[Texts, Prior]] | None = None
        self.corpus: Texts | None = None
        self.grower = Grower()
        if self.prior and target.tokenizer is not None:  # while other parts load and the prompt runs
            self.reading = Work(partial(count, target.tokenizer, target.vocab_size), "specdec corpus")

    def begin(self) -> NgramRow:
        return NgramRow()

    def end(self, row_state: NgramRow, ids: list[int], start: int, learn: bool = True) -> None:
        if row_state.store is not None and learn:
            row_state.store.add([*ids[-self.size // 2 :], -1])

    def _store(self, scope: str | None) -> Texts:
        """Return the texts of earlier requests of a scope."""
        if scope not in self.stores:
            if len(self.stores) == MOST_SCOPES:
                del self.stores[next(iter(self.stores))]
            self.stores[scope] = Texts(self.size)
        return self.stores[scope]

    def propose(self, state: State, limit: int) -> Draft:
        found = self.candidates(state, limit)
        return draft_best(found, limit, self.nodes, state)

    def candidates(self, state: State, limit: int, given: Sequence[Candidates] | None = None) -> list[Candidates]:
        if self.reading is not None:
            self.corpus, counted = self.reading.result()
            self.reading, self.grower = None, Grower(counted)
        learned = [None] * len(state.ids) if given is None else given
        rows = enumerate(zip(state.depths, learned, strict=True))
        return [self._grown(state, row, min(limit, most), own) for row, (most, own) in rows]

    def _grown(self, state: State, row: int, limit: int, learned: Candidates | None) -> Candidates:
        if not limit:
            return Candidates.none(1 if learned is None else 3)
        row_state, ids, chooser = state.row_states[row], state.ids[row], state.sampler.rows[row]
        if self.size and row_state.store is None:
            row_state.store = self._store(state.scopes[row])
        row_state.texts.add(ids[row_state.seen :])
        row_state.seen = len(ids)
        texts = (self.corpus, CORPUS_WEIGHT), (row_state.store, STORE_WEIGHT), (row_state.texts, OWN_WEIGHT)
        sources = [(each, weight) for each, weight in texts if each is not None]
        noise = None if chooser.greedy else (chooser.noise, len(ids))
        priced = state.prices or Prices(())
        tables = priced.tables[row] if priced.tables else ()
        # Nodes that are worth half their price are found, too: calibration learns from them.
        every = self.nodes is not None or learned is not None
        nodes = () if every else [price / 2 for price in priced.nodes]
        return self.grower(ids, sources, limit, learned, state.masks(row), noise, tables=tables, prices=nodes)
