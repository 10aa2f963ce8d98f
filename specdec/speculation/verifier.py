"""The contract of verifiers, which decide how much of a draft is accepted."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from specdec.speculation.draft import Draft


@dataclass
class Acceptance:
    """The accepted part of a draft, for each row (sequence) of a batch.

    paths: paths[b] has the block indices of row b's accepted tokens: 0 (the root, the last token of the text), then i +
        1 for an accepted node i of the draft.
    next_tokens: next_tokens[b] is the token that follows row b's path (-1: the logits there are not finite).
    """

    paths: list[list[int]]
    next_tokens: list[int]


class Verifier(ABC):
    """Decides which path of a draft is accepted, from the draft and the target model's choices.

    A subclass sets ``name`` and ``lossless``, and overrides ``accepts`` or ``verify``.

    name: name in the registry, such as "exact".
    lossless: whether the output is what plain decoding returns.
    needs_probabilities: whether ``verify`` reads the target's distributions ``p`` where tokens are sampled.
    threshold: minimum probability, in [0, 1], that the drafter gives a token, for a rule that accepts without scoring
        (``State.threshold``); None: drafts are scored.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    needs_probabilities: ClassVar[bool] = False
    threshold: float | None = None

    def accepts(self, token: int, choice: int) -> bool:
        """Return whether the drafted token id ``token`` is accepted where the target model chooses ``choice``.

        choice: a token id; -1: the logits are not finite, so that nothing is accepted.
        """
        return token == choice >= 0

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        """Return which path of the draft each row (sequence) accepts, and the token after it.

        By default the path goes from the root down to a child that ``accepts`` accepts, as long as there is one.

        draft: the tree of M drafted tokens for each of B rows.
        chosen: chosen[b][i] is the token that the target model chooses after token i of row b's block (0: the root, i +
            1: node i of the draft); -1: its logits are not finite.
        p: the target's distributions [B, 1 + M, V]; None in greedy decoding, or if the rule does not need them.
        """
        accepted = Acceptance([], [])
        for tokens, choices in zip(draft.lists(), chosen, strict=True):
            path = [0]
            for node, parent in enumerate(draft.parents, start=1):
                if parent == path[-1] and self.accepts(tokens[node - 1], choices[parent]):
                    path.append(node)
            accepted.paths.append(path)
            accepted.next_tokens.append(choices[path[-1]])
        return accepted

    @property
    def label(self) -> str:
        """The verifier's name and options, as results show them."""
        return self.name
