"""Exact acceptance follows the target's distribution: chi-square on joint outcomes, with controls that must fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from specdec.draft import Draft, Verdict
from specdec.sampling import draw, one_hot
from specdec.verifiers.exact import ExactVerifier

V, DEPTH, RUNS = 3, 3, 6000


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], total: int) -> float:
    """Of Pearson's chi-square test; outcomes of probability zero must not occur."""
    if any(expected[outcome] == 0 for outcome in counts):
        return 0.0
    cells = {o: e * total for o, e in expected.items() if e > 0}
    statistic = sum((counts[o] - e) ** 2 / e for o, e in cells.items())
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2)))


def matrix(seed: int, zeros: bool = False) -> Tensor:
    """A random Markov chain: row i is the distribution after token i."""
    p = torch.rand(V, V, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.05
    if zeros:
        p[torch.arange(V), (torch.arange(V) + 1) % V] = 0
    return p / p.sum(-1, keepdim=True)


TARGET = matrix(1)
# How a node's token is drafted: a chain matrix to draw from and report, or a rule that is deterministic.
DRAFTS = {
    "q differs": matrix(2),
    "q = p": TARGET,
    "q = 0 where p > 0": matrix(3, zeros=True),
    "q one-hot": one_hot(torch.tensor([2, 0, 1]), V),
    "deterministic": None,
}


def chain(q: Tensor | None, generator: torch.Generator) -> Draft:
    tokens, rows, last = [], [], 0
    for _ in range(DEPTH - 1):
        row = one_hot(torch.tensor((last + 1) % V), V) if q is None else q[last]
        [last] = draw(row[None], [generator])
        tokens.append(last)
        rows.append(row)
    return Draft(torch.tensor([tokens]), (0, 1), None if q is None else torch.stack(rows)[None])


def tree(q: Tensor | None, generator: torch.Generator) -> Draft:
    """Two siblings drawn without replacement after the root, one child under each."""
    first = torch.ones(V) / V if q is None else q[0]
    if q is None:
        a, b, second = 1, 2, None
    else:
        [a] = draw(first[None], [generator])
        rest = first.clone()
        rest[a] = 0
        # A point mass leaves nothing to draw a second sibling from: draw it from another distribution.
        second = rest / rest.sum() if rest.sum() > 0 else torch.ones(V) / V
        [b] = draw(second[None], [generator])
    under = [one_hot(torch.tensor((t + 1) % V), V) if q is None else q[t] for t in (a, b)]
    c, d = (draw(row[None], [generator])[0] for row in under)
    rows = None if q is None else torch.stack([first, second, *under])[None]
    return Draft(torch.tensor([[a, b, c, d]]), (0, 0, 1, 2), rows)


def sample(make: Callable[[Tensor | None, torch.Generator], Draft], q: Tensor | None, verifier: object) -> float:
    """P-value of DEPTH tokens after token 0, decoded by rounds of ``verifier`` (the last round is cut)."""
    generator = torch.Generator().manual_seed(7)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(RUNS):
        out: list[int] = []
        while len(out) < DEPTH:
            root = out[-1] if out else 0
            # The draft starts from token 0 always: a poor draft must not matter.
            draft = make(q, generator)
            block = torch.tensor([root, *draft.tokens[0].tolist()])
            verdict = verifier.judge(draft, TARGET[block][None], [generator])  # type: ignore[attr-defined]
            out += [int(draft.tokens[0, n - 1]) for n in verdict.paths[0][1:]] + verdict.next_tokens
        counts[tuple(out[:DEPTH])] += 1
    expected = {
        o: float(TARGET[0, o[0]] * TARGET[o[0], o[1]] * TARGET[o[1], o[2]]) for o in product(range(V), repeat=DEPTH)
    }
    return p_value(counts, expected, RUNS)


@pytest.mark.parametrize("make", [chain, tree])
@pytest.mark.parametrize("kind", DRAFTS)
def test_sampling_is_exact(make: Callable[[Tensor | None, torch.Generator], Draft], kind: str) -> None:
    assert sample(make, DRAFTS[kind], ExactVerifier()) > 1e-3


class KeepsAll:
    """Control: every drafted token stands."""

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        path = [0, *range(1, 1 + draft.tokens.shape[1])]
        return Verdict([path], draw(p[:, path[-1]], generators))


class NoResidual(ExactVerifier):
    """Control: after a rejection the correction is drawn from p instead of the residual."""

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        verdict = super().judge(draft, p, generators)
        return Verdict(verdict.paths, draw(p[:, verdict.paths[0][-1]], generators))


class WrongQ(ExactVerifier):
    """Control: a deterministic draft judged as if it had been drawn from a flat q."""

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        flat = torch.full((1, draft.tokens.shape[1], V), 1 / V)
        return super().judge(Draft(draft.tokens, draft.parents, flat), p, generators)


@pytest.mark.parametrize(
    ("verifier", "kind"), [(KeepsAll(), "q differs"), (NoResidual(), "q differs"), (WrongQ(), "deterministic")]
)
def test_biased_rules_are_caught(verifier: object, kind: str) -> None:
    assert sample(chain, DRAFTS[kind], verifier) < 1e-6


def test_greedy_takes_the_matching_sibling_and_uses_no_random_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    draft = Draft(torch.tensor([[2, 1, 0, -1]]), (0, 0, 2, 3))
    p = one_hot(torch.tensor([[1, 0, 0, 2, 2]]), 3)
    verdict = ExactVerifier().judge(draft, p, [generator])
    assert verdict == Verdict([[0, 2, 3]], [2])
    assert torch.equal(generator.get_state(), before)


def test_rejection_with_no_mass_left_falls_back_to_p() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0]] * 2])
    draft = Draft(torch.tensor([[2]]), (0,), p[:, :1])  # drawn where p = q = 0: only rounding can do that
    verdict = ExactVerifier().judge(draft, p, [torch.Generator().manual_seed(0)])
    assert verdict.paths == [[0]] and verdict.next_tokens[0] in (0, 1)
