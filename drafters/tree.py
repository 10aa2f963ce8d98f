"""The draft made of the candidates that a target's ``grow`` finds."""

from __future__ import annotations

import torch

from specdec.runtimes.tree_drafting import Candidates
from specdec.speculation.draft import Draft


def likeliest(found: Candidates, budget: int, device: torch.device) -> Draft:
    """The tree of the ``budget`` best candidates. A candidate's parent scores at least as well, and comes before it."""
    tokens, parents = found.tokens, found.parents
    if len(tokens) > budget:
        kept = sorted(sorted(range(len(tokens)), key=lambda i: (-found.scores[i], i))[:budget])
        place = {0: 0} | {node + 1: at for at, node in enumerate(kept, start=1)}
        tokens, parents = [tokens[node] for node in kept], [place[parents[node]] for node in kept]
    return Draft([tokens], tuple(parents), device=device)
