"""Sampling on a small scale: p-values of joint outcomes, through verifiers alone and through the whole loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, TopPLogitsWarper
from zoo import run

from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Target
from specdec.speculation.draft import Acceptance, Draft, Drafter, Verifier
from specdec.speculation.sampling import Noise

V, DEPTH, RUNS = 3, 3, 2500


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


TARGET = matrix(1, zeros=True)
Choose = Callable[[Tensor, int], int]  # the token that a distribution [V] and a position's noise give
Script = Callable[[Choose, int, int], list[tuple[int, int]]]  # (choose, root, its position) -> (token, parent) nodes


def drawn(q: Tensor) -> Script:
    """Drafts what ``q`` chooses under the target's own noise, a sibling beside each token."""

    def script(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
        first = choose(q[root], at + 1)
        second = choose(q[first], at + 2)
        return [(first, 0), (second, 1), ((first + 1) % V, 0), ((second + 2) % V, 1)]

    return script


def knows(wanted: bool) -> Script:
    """Drafts just what the target will choose, or never."""

    def script(choose: Choose, root: int, at: int) -> list[tuple[int, int]]:
        first = (choose(TARGET[root], at + 1) + (not wanted)) % V
        return [(first, 0), ((choose(TARGET[first], at + 2) + (not wanted)) % V, 1)]

    return script


DRAFTS: dict[str, Script] = {
    "q differs": drawn(matrix(2)),
    "q = p": drawn(TARGET),
    "q = 0 where p > 0": drawn(matrix(3, zeros=True)),
    "deterministic": lambda choose, root, at: [((root + 2) % V, 0), ((root + 1) % V, 1), ((root + 1) % V, 0)],
    "knows the choice": knows(True),
    "avoids the choice": knows(False),
    "nothing": lambda choose, root, at: [],
}


def sample(script: Script, verifier: Verifier, noise: Callable[[int], Callable[[int, int], Tensor]] = Noise) -> float:
    """P-value of DEPTH tokens after token 0, decoded by steps of ``verifier`` (the last step is cut)."""
    counts: Counter[tuple[int, ...]] = Counter()
    for stream in range(RUNS):
        own = noise(stream)

        def choose(p: Tensor, position: int, own: Callable[[int, int], Tensor] = own) -> int:
            return int((p.log() + own(position, V)).argmax())

        out = [0]
        while len(out) <= DEPTH:
            at = len(out) - 1
            nodes = script(choose, out[-1], at)
            tokens, parents = [t for t, _ in nodes], tuple(p for _, p in nodes)
            draft = Draft([tokens], parents)
            block = [out[-1], *tokens]
            chosen = [choose(TARGET[t], at + 1 + depth) for t, depth in zip(block, draft.depths(), strict=True)]
            accepted = verifier.verify(draft, [chosen], TARGET[block][None])
            out += [tokens[n - 1] for n in accepted.paths[0][1:]] + accepted.next_tokens
        counts[tuple(out[1 : DEPTH + 1])] += 1
    expected = {
        o: float(TARGET[0, o[0]] * TARGET[o[0], o[1]] * TARGET[o[1], o[2]]) for o in product(range(V), repeat=DEPTH)
    }
    return p_value(counts, expected, RUNS)


class AcceptsAll(Verifier):
    """Control: every drafted token of the chain is accepted."""

    name, lossless = "accepts all", True

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        paths = []
        for tokens in draft.lists():
            path = [0]
            for node, parent in enumerate(draft.parents, start=1):
                if parent == path[-1] and tokens[node - 1] >= 0:
                    path.append(node)
            paths.append(path)
        return Acceptance(paths, [row[path[-1]] for row, path in zip(chosen, paths, strict=True)])


PROMPT, ROWS, VOCAB = [1, 2, 1, 2], 256, 5


def small(family: str) -> PreTrainedModel:
    """A model of five tokens, of which temperature and top-p leave several."""
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"))
    return tiny_model(family, vocab_size=VOCAB, **ends)


def expected(model: PreTrainedModel, temperature: float, top_p: float, count: int = 3) -> dict[tuple[int, ...], float]:
    """The distribution of the first ``count`` tokens after ``PROMPT``."""
    outcomes = list(product(range(VOCAB), repeat=count))
    ids = torch.tensor([[*PROMPT, *outcome[:-1]] for outcome in outcomes], device=model.device)
    logits = model(ids).logits[:, -count:].double().cpu() / temperature
    p = TopPLogitsWarper(top_p)(None, logits.view(-1, VOCAB)).softmax(-1).view(-1, count, VOCAB)  # type: ignore[arg-type]
    chosen = p.gather(2, torch.tensor(outcomes)[..., None])[..., 0]
    return dict(zip(outcomes, chosen.prod(-1).tolist(), strict=True))


def fit(
    target: Target,
    drafter: Drafter,
    temperature: float = 0.8,
    top_p: float = 0.9,
    verifier: Verifier | None = None,
) -> float:
    """P-value of the first three tokens, sampled through the whole loop."""
    given = {"temperature": temperature, "top_p": top_p, "seed": 11}
    out, _ = run(target, drafter, [PROMPT] * ROWS, 3, depth=2, eos=None, verifier=verifier, **given)
    assert isinstance(target, ReferenceTarget)
    return p_value(Counter(map(tuple, out)), expected(target.model, temperature, top_p), ROWS)
