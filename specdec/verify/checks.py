"""What a certificate rests on: greedy answers against the model itself, and the fit of sampled tokens.

The witness is the model's own forward pass (``model.generate``, and teacher-forced logits), never our runtimes. Knows
no command line and no files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from specdec.decoder import SpecDecoder
from specdec.draft import Draft, Verdict, Verifier
from specdec.replay import NEAR_TIE
from specdec.sampling import Sampler, SamplingParams, one_hot

TAIL = 4  # tokens of each draw that are tested
ROWS = 8  # draws decoded together
ORDER = 4  # components of the test of fit
ALPHA = 1e-3  # chance that a lossless decoder fails the tests of fit of a certificate
SHOWN = 10  # faults kept in detail


@torch.inference_mode()
def witness(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """Teacher-forced logits of the model's own forward, float32 [n, V]: row i predicts ``tokens[i]`` (n tokens)."""
    ids = torch.tensor([prompt + tokens], device=model.device)  # (1, T)
    return model(ids).logits[0, len(prompt) - 1 : -1].float()


def expected(decoder: SpecDecoder, prompt: list[int], count: int) -> list[int]:
    """What ``model.generate`` answers greedily: new ids only."""
    ids = torch.tensor([prompt], device=decoder.model.device)
    out = decoder.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        repetition_penalty=1.0,
        pad_token_id=next(iter(decoder.eos_ids()), 0),
    )
    return [int(token) for token in out[0, len(prompt) :]]


@dataclass
class Greedy:
    """Greedy answers at one draft depth.

    equal: answers that are the very tokens of ``model.generate``. argmax: tokens that are the model's own choice under
    replay; near_ties: others within ``NEAR_TIE`` of it; largest_gap: the largest distance of a token's logit from the
    best one. faults: what neither explains, at most ``SHOWN`` in detail. strict: float32, where answers must be equal.
    """

    depth: int | str
    strict: bool
    answers: int = 0
    tokens: int = 0
    equal: int = 0
    argmax: int = 0
    near_ties: int = 0
    largest_gap: float = 0.0
    faults: int = 0
    details: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.faults and (self.equal == self.answers or not self.strict)

    def take(
        self, decoder: SpecDecoder, name: str, prompt: list[int], answer: list[int], right: list[int], count: int
    ) -> None:
        """Judge the ``answer`` to the prompt called ``name`` by what model.generate said and by replay."""
        logits = witness(decoder.model, prompt, answer)
        gaps = logits.amax(-1) - logits.gather(1, logits.new_tensor(answer).long()[:, None])[:, 0]  # (n,)
        limit, eos = NEAR_TIE[decoder.target.dtype], decoder.eos_ids()
        self.answers += 1
        self.tokens += len(answer)
        self.equal += answer == right
        self.argmax += int((gaps == 0).sum())
        self.near_ties += int(((gaps > 0) & (gaps <= limit)).sum())
        self.largest_gap = max(self.largest_gap, float(gaps.max()))
        wrong = [(i, f"token {i} is {answer[i]}, {float(gaps[i]):.3g} below the best") for i in _where(gaps > limit)]
        if any(token in eos for token in answer[:-1]):
            wrong.append((len(answer), "it goes on after the end of the text"))
        if len(answer) != count and answer[-1] not in eos:
            wrong.append((len(answer), f"it ends after {len(answer)} of {count} tokens, without an end of text"))
        if self.strict and answer != right and not wrong:
            at = next((i for i, (a, b) in enumerate(zip(answer, right, strict=False)) if a != b), len(answer))
            wrong.append((at, f"it differs from model.generate at token {at}"))
        self.faults += len(wrong)
        room = SHOWN - len(self.details)
        self.details += [f"prompt {name}: {what}" for _, what in wrong[: max(room, 0)]]


def _where(mask: Tensor) -> list[int]:
    return [int(i) for i in mask.nonzero()[:, 0]]


@dataclass(frozen=True)
class Fit:
    """Sampled tokens after one context, against the model's distribution there.

    position: tokens of the greedy answer that the context holds beside the prompt. impossible: drawn tokens that have
    probability 0. chi_square: Neyman's smooth statistic, with ``ORDER`` degrees of freedom.
    """

    position: int
    draws: int
    tokens: int
    impossible: int
    chi_square: float
    p_value: float


def fit(
    decoder: SpecDecoder,
    context: list[int],
    position: int,
    draws: int,
    params: SamplingParams,
    depth: int | str,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Fit:
    """Draw ``draws`` continuations of ``context``, up to ``TAIL`` tokens each, and test all their tokens together.

    Order the vocabulary in any way that the tokens before x determine: if x is drawn from p, then u = P(tokens ahead of
    x) + v p(x), v uniform, is uniform on [0, 1), and all the u are independent (Rosenblatt 1952). Tokens that the
    drafter likes better than the model does, by q / p, go first: what acceptance gets wrong, it gets wrong along that
    order. Where nothing was drafted, likely tokens go first.
    """
    watched = Watched(decoder.verifier)
    decoder = copy.copy(decoder)
    decoder.verifier = cast(Verifier, watched)
    generator = torch.Generator().manual_seed(params.seed)
    places: list[float] = []
    impossible, done = 0, 0
    while done < draws:
        rows, seed = min(ROWS, draws - done), params.seed + done
        outputs = decoder.generate_batch(
            [context] * rows,
            max_new_tokens=TAIL,
            num_speculative_tokens=depth,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=seed,
        )
        done += rows
        for row, output in enumerate(outputs):
            drafted = watched.drafted.pop(seed + row, [])
            for i, (token, p) in enumerate(
                zip(output.token_ids, _distributions(decoder, context, output.token_ids, params), strict=True)
            ):
                q = drafted[i - 1] if 0 < i <= len(drafted) else None  # the first token came with the prefill
                v = torch.rand((), generator=generator, dtype=torch.double)
                impossible += bool(p[token] <= 0)
                places.append(float(_ahead(p, q, token) + v * p[token]))
            progress(len(output.token_ids))
    statistic = smooth(torch.tensor(places, dtype=torch.double))
    return Fit(position, draws, len(places), impossible, statistic, chi_square_tail(statistic, ORDER))


def smooth(u: Tensor) -> float:
    """Neyman's smooth statistic (1937) of u [n] against the uniform distribution: squared mean components along the
    first ``ORDER`` Legendre polynomials, chi-square distributed with that many degrees of freedom."""
    x = 2 * u - 1
    polynomials = (x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2, (35 * x**4 - 30 * x**2 + 3) / 8)
    return float(sum((2 * j + 1) * part.sum() ** 2 / len(u) for j, part in enumerate(polynomials, start=1)))


class Watched:
    """An acceptance rule, and what was drafted for each token it let through: ``drafted[seed of the row]`` holds, per
    token, the distribution [V] of the first candidate, or None."""

    def __init__(self, rule: Verifier) -> None:
        self.rule = rule
        self.drafted: dict[int, list[Tensor | None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def judge(self, draft: Draft, p: Tensor, generators: list[torch.Generator]) -> Verdict:
        verdict = self.rule.judge(draft, p, generators)
        for b, (path, tokens) in enumerate(zip(verdict.paths, draft.lists(), strict=True)):
            first: dict[int, int] = {}  # of each node's children
            for node, parent in enumerate(draft.parents, start=1):
                if tokens[node - 1] >= 0:
                    first.setdefault(parent, node)
            for node in path:
                child, q = first.get(node), None
                if child is not None:
                    q = one_hot(draft.tokens[b, child - 1], p.shape[-1]) if draft.q is None else draft.q[b, child - 1]
                self.drafted.setdefault(generators[b].initial_seed(), []).append(q)
        return verdict


def _ahead(p: Tensor, q: Tensor | None, token: int) -> Tensor:
    """The probability of the tokens that go before ``token``: those with more q / p, among equals the likelier."""
    order = p.argsort(descending=True, stable=True)
    if q is not None:
        lean = q.double().cpu()[order] / p[order].clamp_min(1e-300)
        order = order[lean.argsort(descending=True, stable=True)]
    place = int((order == token).nonzero())
    return p[order[:place]].sum()


def _distributions(decoder: SpecDecoder, context: list[int], tokens: list[int], params: SamplingParams) -> Tensor:
    """The model's distribution for each of ``tokens``, after temperature, top-k and top-p; double [n, V]."""
    logits = witness(decoder.model, context, tokens)[None]  # (1, n, V)
    return Sampler(params).distribution(logits, lambda: [])[0].double().cpu()


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X >= statistic) of the chi-square distribution."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.double)
    return float(torch.special.gammaincc(half[0], half[1]))


def misfits(fits: list[Fit]) -> list[Fit]:
    """The fits that a lossless decoder would not have shown, at level ``ALPHA`` for all of them (Bonferroni)."""
    return [fit for fit in fits if fit.impossible or fit.p_value < ALPHA / len(fits)]
