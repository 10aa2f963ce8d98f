"""The tokens a drafter drafts from: all of the model's, or a reduced vocabulary that follows the context.

On small models the output head is a fifth of all bytes, and few tokens cover nearly all text. Rare words recur in the
texts that use them, so the tokens of a row's text join the trained ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specdec.base import memory
from specdec.base.devices import upload
from specdec.models.gguf.blocks import matrix
from specdec.runtimes.target import GrowingLinear, Target
from specdec.speculation.state import State

REUSE_FACTOR = 2  # a head is reused if it has at most so many times the tokens that are needed


class Context:
    """The tokens of one row's text that the drafter was not trained on.

    read: number of tokens of the text that ``DraftVocabulary.follow`` has searched for such tokens.
    added: the token ids as keys, in the order of their first occurrence; the values are None.
    """

    def __init__(self) -> None:
        self.read = 0
        self.added: dict[int, None] = {}


class DraftVocabulary:
    """Computes draft logits over the tokens that a drafter drafts from: trained ones, and tokens of the rows' texts.

    Call ``follow`` at the beginning of each step.

    target: the model.
    trained, trained_ids: the token ids that the drafter was trained on, int64 [V'], and the same as a set; None, and an
        empty set: all.
    head: the output head for ``trained``; None: the model's own. The argument may be None in any case: the head is then
        made of the model's rows for ``trained``.
    tokens: ``trained`` and the added ones, int64 [V'], the token ids of the logits; None: all.
    columns: the added tokens, those of the rows' texts that are not in ``trained``, with the index of each in its head.
    added_head: the output head of the added tokens; None: no token has been added yet.
    forbidden: whether a row has not seen an added token, bool [B, len(columns)]; None: every row has seen all of them.
    unseen: ``forbidden`` on the CPU.
    contexts: those of the last step's rows.
    """

    def __init__(self, target: Target, trained: Tensor | None, head: nn.Linear | None = None) -> None:
        self.target, self.trained = target, None if trained is None else trained.long()
        self.head = head
        if head is None and self.trained is not None:
            self.head = target.reduced_head(self.trained, lasting=True)
        self.trained_ids = frozenset() if self.trained is None else frozenset(self.trained.tolist())
        memory.release(matrix(target.model.get_output_embeddings()).data)
        self.tokens = self.trained
        self.columns: dict[int, int] = {}
        self.added_head: GrowingLinear | None = None
        self.forbidden: Tensor | None = None
        self.unseen = torch.empty(0, 0, dtype=torch.bool)
        self.contexts: list[Context] = []

    def follow(self, state: State, contexts: Sequence[Context]) -> None:
        """Add the new tokens of all rows' texts to the draft vocabulary; each row drafts only those of its own text.

        Sets ``tokens``, ``columns``, ``added_head`` and ``forbidden``. No effect if all tokens are drafted anyway.

        contexts: one context for each row of ``state``, in its order; the call updates it.
        """
        if self.trained is None:
            return
        same, self.contexts, fresh = self.contexts == [*contexts], [*contexts], list[tuple[int, int]]()
        for b, (context, ids) in enumerate(zip(contexts, state.ids, strict=True)):
            for token in ids[context.read :]:
                if token not in self.trained_ids and token not in context.added:
                    context.added[token] = None
                    fresh.append((b, token))
            context.read = len(ids)
        if same and not fresh:
            return
        if same:  # each step costs as much as its own new tokens
            new = list(dict.fromkeys(token for _, token in fresh if token not in self.columns))
        else:
            seen = dict.fromkeys(token for context in contexts for token in context.added)
            wanted = [token for token in seen if token not in self.trained_ids]  # a row may be another drafter's
            new = [token for token in wanted if token not in self.columns]
            # Several rows may have tokens of others in the head, which are forbidden; a single one may not.
            most = len(wanted) if len(contexts) == 1 else REUSE_FACTOR * len(wanted)
            if len(self.columns) + len(new) > most:
                self.columns, self.tokens, new = {}, self.trained, wanted
                if self.added_head is not None:
                    self.added_head.clear()  # drafts are captured with its memory
        old = len(self.columns)
        if new:
            added = upload(new, self.trained.device)
            self.columns.update(zip(new, range(old, old + len(new)), strict=True))
            self.added_head = self.target.extended_head(self.added_head, added)
            self.tokens = torch.cat((self.trained if self.tokens is None else self.tokens, added))
        if len(contexts) == 1 or not self.columns:
            self.forbidden = None
            return
        if same and self.forbidden is not None:
            self.unseen = F.pad(self.unseen, (0, len(new)), value=True)
            for b, token in fresh:
                self.unseen[b, self.columns[token]] = False
        else:
            unseen = [[token not in context.added for token in self.columns] for context in contexts]
            self.unseen = torch.tensor(unseen)
        self.forbidden = upload(self.unseen, self.trained.device, torch.bool)

    @property
    def heads(self) -> list[nn.Linear | None]:
        """The one or two output heads whose concatenated logits are over ``tokens``; None: the model's own head.

        With several rows, ``forbidden`` says which outputs of the second head a row may not draft.
        """
        return [self.head, self.added_head] if self.columns else [self.head]

    def logits(self, final: Tensor) -> Tensor:
        """Return draft logits [B, T, V'] over ``tokens``, from final states [B, T, D], before the final norm.

        The rows are those of the last ``follow``; tokens that a row may not draft have -inf.
        """
        return read_out(self.target, final, self.heads, self.forbidden)


def read_out(target: Target, final: Tensor, heads: Sequence[nn.Linear | None], forbidden: Tensor | None) -> Tensor:
    """Return the draft logits [B, T, V'] of one or two output heads, concatenated along the last dimension.

    The logits of each head are those of ``Target.readout``: the model's final norm, the head, and the logit cap if any.

    target: the model.
    final: estimates of the output of the model's last layer, before its final norm, [B, T, D].
    heads: the one or two output heads; None in place of a head: the model's own head.
    forbidden: for each row (sequence), whether it may not draft an output of the second head, bool [B, number of these
        outputs]. Their logits become -inf. None: all are allowed.
    """
    first, *added = (target.readout(final, head) for head in heads)
    if added and forbidden is not None:
        added = [added[0].masked_fill(forbidden[:, None], float("-inf"))]
    return torch.cat((first, *added), -1) if added else first
