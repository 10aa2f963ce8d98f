"""N-grams: what followed where the text went on alike before, and a static prior where it never did.

Four sources, each overruling the one before: how often which token follows which in a small corpus, texts that the user
names, the texts of earlier requests (as suffix decoding, arXiv 2411.04975), and the request's own text. The tree has
the likeliest paths. Needs no training; serves every tokenizer, as the corpus is text. Changes what is drafted, never
the output.
"""

from __future__ import annotations

import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from specdec.base import options
from specdec.base.background import Stop, Work
from specdec.base.errors import SpecDecError
from specdec.base.settings import validate
from specdec.runtimes.draft_path import DeviceChoice
from specdec.runtimes.target import Target
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, Given, Traits
from specdec.speculation.ngram import Grower, Prior, SortedTexts, Texts
from specdec.speculation.state import State
from specdec.speculation.tree_builder import draft_best
from specdec.speculation.trees import Prices

from .corpus import corpus as shipped
from .corpus import described
from .ngram_corpus import read_corpus
from .ngram_store import KeptTexts

TEXT = 1 << 20  # most tokens of a request's own text that are matched
STORE = 1 << 17  # tokens of earlier requests that are kept: 2.6 MB
MOST_SCOPES = 16  # maximum number of scopes; the oldest is dropped for a new one
# How much an occurrence counts: in the package's corpus, in the user's or an earlier request, in the request's text.
CORPUS_WEIGHT, STORE_WEIGHT, OWN_WEIGHT = 0.15, 0.25, 1.0


def count(tokenizer: Any, vocab_size: int, stop: Stop) -> tuple[Texts, Prior]:
    """Tokenise the corpus that the package ships, and count its tokens; this takes seconds.

    tokenizer: the model's tokenizer. vocab_size: V, the number of token ids of the model.
    stop: ``stop.check()``, which is called between steps, raises Stopped if another thread wants the work to end.

    Returns (texts, prior): the corpus as texts in which n-grams are looked up; and how often each token follows which,
    for places where no n-gram is found.
    """
    ids = shipped(tokenizer, vocab_size, stop)
    texts = Texts(len(ids))
    stop.check()
    texts.add(ids)
    stop.check()
    return texts, Prior.count(ids, vocab_size)


def _save(kept: dict[str | None, KeptTexts]) -> None:
    """Write the files of earlier texts that have changed. kept: the file of each scope (tenant; None: the default)."""
    for each in kept.values():
        each.save()


class NgramRow:
    """What an ``NgramDrafter`` keeps of one row (sequence).

    texts: the row's own text, in which n-grams are looked up.
    seen: number of the row's tokens in ``texts``.
    store: the texts of earlier requests of the row's scope (tenant); None: before the row's first draft, or none are
        used.
    kept: the file of these earlier texts; None: they are not kept.
    """

    def __init__(self) -> None:
        self.texts, self.seen = Texts(TEXT), 0
        self.store: Texts | None = None
        self.kept: KeptTexts | None = None


class NgramDrafter(Drafter):
    """Drafts a tree of the likeliest continuations of the text's last tokens, by n-gram counts in earlier texts.

    nodes: number of nodes of a tree; None: as many as are worth their cost (``Prices``), or the maximum depth of a
        draft if costs are not known.
    store: number of tokens of earlier requests of this process, prompts and outputs, in which n-grams are looked up,
        for each scope (tenant); True: the default, ``STORE``; 0 or False: none.
    prior: whether the package's corpus is used, which needs the model's tokenizer.
    corpus: a text file, or a folder of text files, that is read in ``bind`` and used for all tenants; None: there is
        none.
    keep: whether the tokens of earlier requests are kept in the data folder, for later processes.
    Raises SpecDecError where its compiled part is not built.
    """

    name: ClassVar[str] = "ngram"
    summary: ClassVar[str] = (
        "suffix matches in the text and earlier requests, and a prior counted in a corpus; no training"
    )

    traits = Traits(("ngram",), has_probabilities=True, level_shares=(0.0,))

    def __init__(
        self,
        nodes: int | None = None,
        store: int | bool = STORE,
        prior: bool = True,
        corpus: str | os.PathLike[str] | None = None,
        keep: bool = False,
    ) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)
        self.size = STORE * store if isinstance(store, bool) else options.check_int("store", store, 0)
        self.prior = bool(prior)
        self.place = None if corpus is None else Path(validate("corpus", corpus, str | os.PathLike[str])).expanduser()
        self.keep = validate("keep", keep, bool)
        if self.keep and not self.size:
            raise SpecDecError("nothing can be kept without a store; leave store=0 or keep out")
        self.stores = dict[str | None, Texts]()  # by scope
        self.kept = dict[str | None, KeptTexts]()  # by scope
        weakref.finalize(self, _save, self.kept)  # also when the process ends

    def bind(self, target: Target) -> None:
        self.reading: Work[tuple[Texts, Prior]] | None = None
        self.corpus: Texts | None = None
        self.grower = Grower()
        tokenizer, self.vocab_size = target.tokenizer, target.vocab_size
        self.own_corpus = None if self.place is None else read_corpus(self.place, tokenizer, self.vocab_size)
        if self.keep:
            self.tokenizer = target.fingerprint if tokenizer is None else described(tokenizer)
        if self.prior and target.tokenizer is not None:  # while other parts load and the prompt runs
            self.reading = Work(partial(count, target.tokenizer, target.vocab_size), "specdec corpus")

    def begin(self) -> NgramRow:
        return NgramRow()

    def end(self, row_state: NgramRow, ids: list[int], start: int, learn: bool = True) -> None:
        if row_state.store is not None and learn:
            row_state.store.add([*ids[-self.size // 2 :], -1])
            if row_state.kept is not None:
                row_state.kept.add(ids[-self.size // 2 :])

    def _store(self, scope: str | None) -> Texts:
        """Return the texts of earlier requests of one scope, made if need be; if there are too many, the oldest goes.

        scope: name of the tenant, whose requests alone are drafted from these texts; None: the default tenant.
        """
        if scope not in self.stores:
            if len(self.stores) == MOST_SCOPES:
                oldest = next(iter(self.stores))
                del self.stores[oldest]
                if (kept := self.kept.pop(oldest, None)) is not None:
                    kept.close()
            self.stores[scope] = Texts(self.size)
            if self.keep:
                self.kept[scope] = KeptTexts(self.tokenizer, scope, self.size, self.vocab_size)
                self.stores[scope].add(self.kept[scope].read())
        return self.stores[scope]

    def propose(self, state: State, limit: int) -> Draft:
        found = self.candidates(state, limit)
        return draft_best(found, limit, self.nodes, state)

    def candidates(
        self, state: State, limit: int, given: Given = None, choice: DeviceChoice | None = None
    ) -> list[Candidates]:
        if self.reading is not None:
            self.corpus, counted = self.reading.result()
            self.reading, self.grower = None, Grower(counted)
        learned = [None] * len(state.ids) if given is None else given
        rows = enumerate(zip(state.depths, learned, strict=True))
        return [self._grown(state, row, min(limit, most), own) for row, (most, own) in rows]

    def _grown(self, state: State, row: int, limit: int, learned: Candidates | None) -> Candidates:
        """Return the candidates after the text of one row.

        It first appends the row's new tokens to ``NgramRow.texts``, the row's own text. N-grams are looked up there, in
        the corpora and in earlier requests of the row's scope.

        state: the batch. row: index of the row in the batch. limit: maximum depth of a candidate; 0: an empty tree.
        learned: the tree of another drafter, which is merged in. ``Candidates.raw`` then has three sources: n-grams
            where that drafter has no candidates after the same parent, n-grams where it has only others, and that
            drafter. None: there is no other drafter, and n-grams are the only source.
        """
        if not limit:
            return Candidates.none(1 if learned is None else 3)
        row_state, ids, chooser = state.row_states[row], state.ids[row], state.sampler.rows[row]
        if self.size and row_state.store is None:
            row_state.store = self._store(state.scopes[row])
            row_state.kept = self.kept.get(state.scopes[row])
        if row_state.seen < len(ids):
            row_state.texts.add(ids[row_state.seen :])
            row_state.seen = len(ids)
        texts: list[tuple[Texts | SortedTexts | None, float]]
        texts = [(self.corpus, CORPUS_WEIGHT), (self.own_corpus, STORE_WEIGHT)]
        texts += [(row_state.store, STORE_WEIGHT), (row_state.texts, OWN_WEIGHT)]
        sources = [(each, weight) for each, weight in texts if each is not None]
        noise = None if chooser.greedy else (chooser.noise, len(ids))
        priced = state.prices or Prices(())
        tables = priced.tables[row] if priced.tables else ()
        # Nodes that are worth half their price are found, too: calibration learns from them.
        nodes = () if self.nodes is not None else [price / 2 for price in priced.nodes]
        return self.grower(ids, sources, limit, learned, state.masks(row), noise, tables=tables, prices=nodes)
