"""Two-model speculation: a second, smaller model drafts (Leviathan, arXiv 2211.17192; Chen, arXiv 2302.01318).

The draft model has a cache of its own. Before each draft, the tokens it drafted are compared with the text: equal ones
stay in the cache, the others are replaced. So other drafters may draft in between.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.base.sequences import common_prefix
from specdec.kvcache.cache import KVCache
from specdec.models import loading
from specdec.runtimes.prefill import prefill
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Traits
from specdec.speculation.state import State

from .chain import ChainDrafter, ChainRow, Readout

PADDING = re.compile(r"\[PAD\d+\]")  # tokens with which llama.cpp's converter fills up a vocabulary


class DraftModelRow(ChainRow):
    """What a ``DraftModelDrafter`` keeps of one row. cache: the draft model's keys and values of its text."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache


class DraftModelDrafter(ChainDrafter):
    """Drafts a chain with a second model, which must have the target's vocabulary.

    A row is not drafted for once its text is longer than the draft model's context. Raises SpecDecError, when bound, if
    the vocabularies differ.

    draft_target (argument ``own``): the runtime of the draft model.
    tokenizer: the draft model's tokenizer, which must equal the target's; None: not known, and not compared.
    vocab: the token ids that both models have, int64 [V']; None: all.
    cache: the draft model's keys and values of ``rows``, the row states of the last step.
    fed: the last draft, and how many of each row's drafted tokens are in the cache uncommitted; None: no token is.
    """

    name: ClassVar[str] = "draft-model"
    summary: ClassVar[str] = "a second, smaller model with the same vocabulary (draft-model=NAME); no training"

    def __init__(self, own: Target, tokenizer: Any = None) -> None:
        self.draft_target, self.tokenizer = own, tokenizer
        self.vocab: Tensor | None = None

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> DraftModelDrafter:
        """Load a draft model, and make the drafter. Raises SpecDecError if no model is named, or it cannot be loaded.

        target: the model to draft for, whose dtype and device the draft model gets.
        source: the draft model: a folder, a GGUF file or a Hugging Face id; None: the option ``model`` names it.
        kwargs: options; the only one is ``model``, which is used in place of ``source``.
        """
        options.check_names(cls.name, kwargs, ("model",))
        model = kwargs.get("model", source)
        if not isinstance(model, str) or not model:
            raise SpecDecError(
                "drafter 'draft-model' needs a second model; name it: draft-model=NAME (a folder, GGUF file or "
                "Hugging Face id)"
            )
        loaded, tokenizer = loading.load(model, dtype=target.dtype, device=target.device)
        return cls(make_target(loaded)[0], tokenizer)

    def bind(self, target: Target) -> None:
        ours, theirs = target.vocab_size, self.draft_target.vocab_size
        sizes = f"vocabularies of {ours} and {theirs} tokens"
        if target.tokenizer is not None and self.tokenizer is not None:
            if odd := _difference(target.tokenizer, self.tokenizer):
                raise SpecDecError(f"the model and the draft model have different tokenizers ({sizes}): {odd}")
        elif ours != theirs:
            raise SpecDecError(f"the model and the draft model have different {sizes}; they must share one")
        # With one tokenizer, sizes differ only by padding.
        self.vocab = None if ours == theirs else torch.arange(min(ours, theirs), device=target.device)
        self.traits = Traits((self.name,), cost_key=self.draft_target.fingerprint)
        self.cache, self.rows = self.draft_target.new_cache(0), list[DraftModelRow]()
        self.fed: tuple[Draft, int] | None = None

    def begin(self) -> DraftModelRow:
        return DraftModelRow(self.draft_target.new_cache())

    def end(self, row_state: DraftModelRow, ids: list[int], start: int, learn: bool = True) -> None:
        if any(row_state is row for row in self.rows):  # the memory of its keys and values is freed
            self.cache, self.rows, self.fed = self.draft_target.new_cache(0), [], None

    def propose(self, state: State, limit: int) -> Draft:
        own = self.draft_target
        fits = [b for b, ids in enumerate(state.ids) if len(ids) <= own.context]
        if not fits:
            return Draft.empty(len(state.ids), own.device)
        if len(fits) < len(state.ids):
            return self.propose(state.of(fits), limit).spread(fits, len(state.ids))
        limit = min(limit, own.context + 1 - max(map(len, state.ids)))
        if state.row_states != self.rows:
            self.rows, self.fed = list(state.row_states), None
            self.cache = self.cache.of([entries for row in self.rows for entries in row.cache.entries])
        cache = self.cache
        root: Tensor | None = self._catch_up(state.ids)

        def step(token: Tensor, positions: Tensor) -> Readout:
            nonlocal root
            x, root = root, None
            if x is None:
                given = Pass(positions, cache.register(0, positions), cache, ids=token)
                x = own.layers(own.embed(token, positions), 0, own.num_layers, given)
            logits = own.readout(x)[:, 0]
            return Readout(logits if self.vocab is None else logits[:, : self.vocab.numel()])

        draft = self.chain(state, limit, step, self.vocab)
        self.fed = draft, max(max(draft.depths()) - 1, 0)  # the host has its tokens when they are scored
        return draft

    def _catch_up(self, ids: list[list[int]]) -> Tensor:
        """Run the tokens of each row's text that the draft model's KV cache lacks, and commit them.

        Keys and values of the last draft's accepted tokens are in the cache already; those of the others are dropped.

        ids: token ids of the text of each of B rows.

        Returns the output of the draft model's last layer, before the final norm, for the last token of each text, [B,
        1, D].
        """
        cache = self.cache
        fed = [[] for _ in ids] if self.fed is None else [row[: self.fed[1]] for row in self.fed[0].lists()]
        accepted = [common_prefix(own, row[n:-1]) for own, n, row in zip(fed, cache.rows, ids, strict=True)]
        if any(accepted):
            cache.commit([list(range(n)) for n in accepted])
            cache.evict()
        else:
            cache.trim(cache.lengths[0] - cache.committed)
        last = self.draft_target.vocab_size - 1  # padding of the target's embedding may lie beyond it
        new = [[min(t, last) for t in row[n:]] for n, row in zip(cache.rows, ids, strict=True)]
        return prefill(self.draft_target, cache, new)


def _difference(ours: Any, theirs: Any) -> str:
    """Return a sentence about the first difference between two tokenizers' vocabularies; "": there is none.

    Tokens that only fill a vocabulary up, which differ between files of one family, do not count.

    ours, theirs: the tokenizers of the model and of the draft model, as transformers or we have them.
    """
    a, b = (
        {index: token for token, index in t.get_vocab().items() if not PADDING.fullmatch(token)} for t in (ours, theirs)
    )
    for index in sorted(a.keys() | b.keys()):
        if a.get(index) != b.get(index):
            return f"token {index} is {a.get(index)!r} for the model and {b.get(index)!r} for the draft model"
    return ""
