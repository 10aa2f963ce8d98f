"""The tokens a drafter drafts from: all of the model's, or a reduced vocabulary that follows the context.

On small models the output head is a fifth of all bytes, and few tokens cover nearly all text. Rare words recur where
they have been used, so the tokens of a row's own context join the trained ones. Knows nothing of how states come about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from specdec.base import memory
from specdec.base.devices import upload
from specdec.models.gguf.blocks import stored
from specdec.runtimes.target import Target
from specdec.speculation.draft import State

KEPT = 2  # a head may have so many times the tokens that are needed


class Context:
    """The tokens of one row's text that the trained ones lack, in the order in which they came."""

    def __init__(self) -> None:
        self.read = 0  # tokens of the text that have been read
        self.more: dict[int, None] = {}


class DraftVocabulary:
    """Readout of final states over ``tokens``, int64 [V'] (None: every token).

    trained: the drafter's own tokens, int [V'], or None. ``follow`` begins each step.
    """

    def __init__(self, target: Target, trained: Tensor | None) -> None:
        self.target, self.trained = target, None if trained is None else trained.long()
        self.head = None if self.trained is None else target.reduced_head(self.trained)
        self.known = frozenset() if self.trained is None else frozenset(self.trained.tolist())
        memory.release(stored(target.model.get_output_embeddings()))
        self.start()

    def start(self) -> None:
        self.tokens = self.trained
        self.more: list[int] = []  # tokens of the rows' texts that the trained ones lack
        self.more_head: nn.Linear | None = None
        self.hidden: Tensor | None = None  # bool [B, added], where rows differ: added tokens that a row has not seen

    def follow(self, state: State, contexts: Sequence[Context]) -> None:
        """Add the tokens of the rows' texts. No row drafts from another's."""
        if self.trained is None:
            return
        for context, ids in zip(contexts, state.ids, strict=True):
            context.more.update((token, None) for token in ids[context.read :] if token not in self.known)
            context.read = len(ids)
        wanted = list(contexts[0].more)
        if len(contexts) > 1:
            every = dict.fromkeys(token for context in contexts for token in context.more)
            wanted = list(every)
            if every.keys() <= set(self.more) and len(self.more) <= KEPT * len(every):
                wanted = self.more  # a head that serves is not made again
        if wanted != self.more:
            self.more, self.more_head, self.tokens = wanted, None, self.trained
            if wanted:
                added = upload(wanted, self.trained.device)
                self.more_head = self.target.reduced_head(added)
                self.tokens = torch.cat((self.trained, added))
        self.hidden = None
        if len(contexts) > 1 and self.more:
            unseen = [[token not in context.more for token in self.more] for context in contexts]
            self.hidden = upload(unseen, self.trained.device, torch.bool)

    @property
    def heads(self) -> list[nn.Linear | None]:
        """What ``tokens`` are read out by, one head beside the other (None: the model's own), but for ``hidden``."""
        return [self.head] if self.more_head is None else [self.head, self.more_head]

    def logits(self, final: Tensor, read: Callable[[Tensor, nn.Linear | None], Tensor] | None = None) -> Tensor:
        """Draft logits [B, T, V'] over ``tokens``, from final states [B, T, D].

        read: how they are read out; None: as the model's.
        """
        read = read or self.target.readout
        logits = read(final, self.head)
        if self.more_head is None:
            return logits
        more = read(final, self.more_head)  # (B, T, added)
        if self.hidden is not None:
            more = more.masked_fill(self.hidden[:, None], float("-inf"))
        return torch.cat((logits, more), -1)
