"""The rows (sequences) of the batch in one step, as drafters see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.base.devices import is_asynchronous, upload
from specdec.speculation.draft import Draft
from specdec.speculation.sampling import Sampler
from specdec.speculation.trees import Prices

if TYPE_CHECKING:
    from specdec.kvcache.cache import KVCache
    from specdec.runtimes.target import Target

UNBOUNDED = 1 << 30  # a depth that no draft has


@dataclass
class State:
    """The rows (sequences) of the batch in one step, as drafters see them. Lists have one entry for each row b.

    A row's root is the last token of its text, after which drafts begin.

    target: the model.
    cache: the model's keys and values of all rows; a row's root is not in it yet.
    sampler: chooses the model's tokens, and gives drafters the noise and the logits processors.
    ids: ids[b] has the token ids of row b, prompt and output; the last one is the root.
    prices: what drafting a level (the tokens at one depth) and scoring a node (a drafted token) costs, in accepted
        tokens; None: a draft may be as deep as its limit, and is a chain by default.
    exit: index of the last exit (layer at which drafted tokens may leave the model) that tokens may use; None: any.
    threshold: minimum probability, in [0, 1], that the drafter gives its tokens, which are then accepted without
        scoring; None: drafts are scored.
    row_states: row_states[b] is what ``Drafter.begin`` returned for row b.
    scopes: scopes[b] names the owner of row b's text, which is never drafted for other owners; None is the default
        owner.
    depths: depths[b] is the maximum depth of row b's draft; 0: the row does not draft in this step.
    """

    target: Target
    cache: KVCache
    sampler: Sampler
    ids: list[list[int]]
    prices: Prices | None = None
    exit: int | None = None
    threshold: float | None = None
    row_states: list[Any] = field(default_factory=list)
    scopes: list[str | None] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.ids)
        self.row_states = self.row_states or [None] * count
        self.scopes = self.scopes or [None] * count
        self.depths = self.depths or [UNBOUNDED] * count
        if not len(self.row_states) == len(self.scopes) == len(self.depths) == count:
            raise ValueError(f"of {count} rows, some have no state, scope or depth")

    def of(self, rows: Sequence[int]) -> State:
        """Return the state of the rows with the indices ``rows`` alone, in this order."""
        ids, states = [self.ids[b] for b in rows], [self.row_states[b] for b in rows]
        scopes, depths = [self.scopes[b] for b in rows], [self.depths[b] for b in rows]
        cache = self.cache.of([self.cache.entries[b] for b in rows])
        sampler = Sampler([self.sampler.rows[b] for b in rows])
        return replace(self, cache=cache, sampler=sampler, ids=ids, row_states=states, scopes=scopes, depths=depths)

    @property
    def constrained(self) -> bool:
        """Whether the new tokens of any row are constrained, such as by a JSON schema (``RowSampler.constraint``).

        Drafters should not propose tokens that the constraint forbids: ``allowed`` and ``masks`` say which.
        """
        return any(row.constraint is not None for row in self.sampler.rows)

    def allowed(self, row: int, tokens: list[int]) -> list[int]:
        """Return ``tokens`` up to the first one that the constraint of row ``row`` forbids; all without a constraint.

        tokens: ids of tokens that follow the row's text. The forbidden token is not included.
        """
        constraint = self.sampler.rows[row].constraint
        return tokens if constraint is None else tokens[: constraint.allows(self.ids[row], tokens)]

    def masks(self, row: int) -> Callable[[Sequence[int]], Tensor | None] | None:
        """Return the constraint of row ``row`` as a function; None: there is no constraint.

        The function takes the ids of drafted tokens after the row's text, and returns which tokens may follow, bool
        [V]; None if the drafted tokens break the constraint.
        """
        constraint, ids = self.sampler.rows[row].constraint, self.ids[row]
        return None if constraint is None else lambda tokens: constraint.mask(ids, tokens)

    @property
    def roots(self) -> Tensor:
        """The token id of each row's root (the last token of its text), int64 [B, 1], on the cache's device."""
        return upload([[row[-1]] for row in self.ids], self.cache.device)

    @property
    def positions(self) -> Tensor:
        """The position in the text of each row's root (its last token), int64 [B, 1], on the cache's device."""
        return upload([[n] for n in self.cache.rows], self.cache.device)

    def block(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Return (tokens, positions) of the block that the model runs to score ``draft``, int64 [B, 1 + M] each.

        Index 0 of a block is the row's root, the last token of its text; then the M draft nodes follow. A node that a
        row does not have gets token 0. Positions stay below the model's context size.
        """
        device, depths, last = self.cache.device, draft.depths(), self.target.context - 1
        if draft.held is not None:
            tokens = torch.cat((self.roots, draft.tokens.clamp(min=0)), 1)
            return tokens, (self.positions + draft.held.depths).clamp(max=last)
        positions = upload([[min(n + depth, last) for depth in depths] for n in self.cache.rows], device)
        if draft.listed is None and is_asynchronous(device):  # reading drafted tokens would wait for them
            return torch.cat((self.roots, draft.tokens.clamp(0, self.target.vocab_size - 1)), 1), positions
        rows = zip(self.ids, draft.lists(), strict=True)
        return upload([[ids[-1], *(max(token, 0) for token in tokens)] for ids, tokens in rows], device), positions
