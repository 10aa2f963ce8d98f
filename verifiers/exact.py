"""Exact acceptance: the output keeps the target's distribution, greedy or sampled, on a chain or a tree.

Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1; Chen et al. 2023, arXiv 2302.01318),
extended to siblings: children are tested in draft order, each against what the rejected ones left of p (as in
SpecInfer, arXiv 2305.09781). Greedy decoding is the same code on a one-hot p, a deterministic draft on a one-hot q.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.draft import Draft, Verdict
from specdec.sampling import draw

Row = npt.NDArray[np.float32]  # a distribution [V]


class ExactVerifier:
    """Keeps a drafted token x with probability min(1, p(x) / q(x)); a rejection draws from what is left of p."""

    name: ClassVar[str] = "exact"
    lossless: ClassVar[bool] = True

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(draft.parents, start=1):
            children.setdefault(parent, []).append(node)
        # Read once, then judged where a look at a number costs little.
        masses, drawn = p.cpu().numpy(), None if draft.q is None else draft.q.cpu().numpy()
        paths, rests = [], []
        for b, (tokens, generator) in enumerate(zip(draft.lists(), generators, strict=True)):
            path, rest = [0], masses[b, 0]  # rest (V,): what remains of p at the end of the path
            while True:
                for node in children.get(path[-1], ()):
                    token = tokens[node - 1]
                    if token < 0:
                        continue
                    q = None if drawn is None else drawn[b, node - 1]
                    if _accept(rest, q, token, generator):
                        path.append(node)
                        rest = masses[b, node]
                        break
                    rest = _residual(rest, q, token)
                else:
                    break
            paths.append(path)
            rests.append(rest)
        return Verdict(paths, draw(np.stack(rests), generators))


def _accept(p: Row, q: Row | None, token: int, generator: torch.Generator) -> bool:
    """True with probability min(1, p / q) of ``token``."""
    have, drafted = float(p[token]), 1.0 if q is None else float(q[token])
    # Certain outcomes use no random number, so greedy decoding never touches the generator.
    if have <= 0 or have >= drafted:
        return have > 0
    return torch.rand((), generator=generator, dtype=torch.float64).item() * drafted < have


def _residual(p: Row, q: Row | None, token: int) -> Row:
    """norm(max(p - q, 0)) after ``token``, drawn from ``q`` [V] (None: a point mass), was rejected."""
    if q is not None:
        rest = np.maximum(p - q, 0)
    elif p[token] == 0:
        return p
    else:
        rest = p.copy()
        rest[token] = 0
    total = rest.sum()
    # No mass left means p = q up to rounding, and then a rejection is itself a rounding event: p is the answer.
    return rest / total if total > 0 else p
