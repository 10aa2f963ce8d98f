"""Statistical tests of sampling with a tiny vocabulary: p-values of joint outcomes, and a verifier that is wrong."""

from collections import Counter
from itertools import product

import torch
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, TopPLogitsWarper
from zoo import run

from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.verifier import Acceptance, Verifier


def p_value(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], total: int) -> float:
    """Return the p-value of Pearson's chi-square test of ``counts`` against the probabilities ``expected``.

    total: number of samples. 0.0 if an outcome of probability zero occurred.
    """
    if any(expected[outcome] == 0 for outcome in counts):
        return 0.0
    cells = {o: e * total for o, e in expected.items() if e > 0}
    statistic = sum((counts[o] - e) ** 2 / e for o, e in cells.items())
    return float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2.0), torch.tensor(statistic / 2)))


class AcceptsAll(Verifier):
    """A wrong verifier, as a control: it accepts every drafted token of a chain."""

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
    """Return a model of ``family`` with five tokens, several of which temperature and top-p leave."""
    ends = dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id"))
    return tiny_model(family, vocab_size=VOCAB, **ends)


def expected(model: PreTrainedModel, temperature: float, top_p: float, count: int = 3) -> dict[tuple[int, ...], float]:
    """Return {outcome: probability} of the first ``count`` tokens after ``PROMPT``, from the model's logits."""
    outcomes = list(product(range(VOCAB), repeat=count))
    ids = torch.tensor([[*PROMPT, *outcome[:-1]] for outcome in outcomes], device=model.device)
    logits = model(ids).logits[:, -count:].double().cpu() / temperature
    p = TopPLogitsWarper(top_p)(None, logits.view(-1, VOCAB)).softmax(-1).view(-1, count, VOCAB)  # type: ignore[arg-type]
    chosen = p.gather(2, torch.tensor(outcomes)[..., None])[..., 0]
    return dict(zip(outcomes, chosen.prod(-1).tolist(), strict=True))


def fit(
    target: Target, drafter: Drafter, temperature: float = 0.8, top_p: float = 0.9, verifier: Verifier | None = None
) -> float:
    """Return the p-value of the first three tokens, sampled by the engine with ``drafter`` in many rows."""
    given = {"temperature": temperature, "top_p": top_p, "seed": 11}
    out, _ = run(target, drafter, [PROMPT] * ROWS, 3, depth=2, eos=None, verifier=verifier, **given)
    return p_value(Counter(map(tuple, out)), expected(target.model, temperature, top_p), ROWS)
