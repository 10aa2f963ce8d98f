"""The checks of a certificate: greedy answers against the model, and the fit of sampled tokens.

The reference is the model's own forward pass (``model.generate`` and teacher-forced logits), never our runtimes. Knows
no command line and no files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.api.decoder import SpecDecoder
from specdec.base.options import Depth
from specdec.engine.replay import NEAR_TIE
from specdec.models import generation_config
from specdec.speculation.sampling import Sampler, SamplingParams

TAIL = 4  # tokens of a sampled continuation
ROWS = 8  # continuations decoded together
ORDER = 4  # components of the test of fit
ALPHA = 1e-3  # probability that a lossless decoder fails the tests of fit of a certificate
MAX_DETAILS = 10  # faults kept with their details


@torch.inference_mode()
def model_logits(model: Any, prompt: list[int], tokens: list[int], count: int) -> Tensor:
    """Teacher-forced logits of the model's own forward, float32 [n, V]: row i predicts ``tokens[i]`` (n tokens).

    The logits processors of the model's generation_config are applied, as for requests of ``count`` new tokens.
    """
    ids = torch.tensor([prompt + tokens], device=model.device)  # (1, T)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    return generation_config.apply_processors(
        generation_config.logits_processors(model, prompt, count), prompt, tokens, logits
    )


def expected(decoder: SpecDecoder, prompt: list[int], count: int) -> list[int]:
    """The new token ids of a greedy ``model.generate``."""
    ids = torch.tensor([prompt], device=decoder.model.device)
    out = decoder.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=next(iter(decoder.eos_ids()), 0),
    )
    return [int(token) for token in out[0, len(prompt) :]]


@dataclass
class Greedy:
    """Greedy answers at one draft depth.

    strict: answers must equal those of ``model.generate`` (in float32).
    equal: answers with the tokens of ``model.generate``.
    argmax: tokens with the model's best logit.
    near_ties: other tokens within ``NEAR_TIE`` of the best logit.
    largest_gap: largest difference of a token's logit to the best one.
    faults: deviations that are no near-tie. details: of at most ``MAX_DETAILS`` of them.
    """

    depth: Depth
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
        """Compare the ``answer`` to the prompt ``name`` with that of model.generate and with the model's logits."""
        logits = model_logits(decoder.model, prompt, answer, count)
        gaps = logits.amax(-1) - logits.gather(1, logits.new_tensor(answer).long()[:, None])[:, 0]  # (n,)
        limit, eos = NEAR_TIE[decoder.target.dtype], decoder.eos_ids()
        self.answers += 1
        self.tokens += len(answer)
        self.equal += answer == right
        self.argmax += int((gaps == 0).sum())
        self.near_ties += int(((gaps > 0) & (gaps <= limit)).sum())
        self.largest_gap = max(self.largest_gap, float(gaps.max()))
        far = [i for i, gap in enumerate(gaps.tolist()) if not gap <= limit]  # NaN is no near-tie
        wrong = [f"token {i} is {answer[i]}, {float(gaps[i]):.3g} below the best" for i in far]
        if any(token in eos for token in answer[:-1]):
            wrong.append("it continues after an end token")
        if len(answer) != count and answer[-1] not in eos:
            wrong.append(f"it ends after {len(answer)} of {count} tokens without an end token")
        if self.strict and answer != right and not wrong:
            at = next((i for i, (a, b) in enumerate(zip(answer, right, strict=False)) if a != b), len(answer))
            wrong.append(f"it differs from model.generate at token {at}")
        self.faults += len(wrong)
        self.details = [*self.details, *(f"prompt {name}: {what}" for what in wrong)][:MAX_DETAILS]


@dataclass(frozen=True)
class Fit:
    """Sampled tokens after one context, compared with the model's choice under the same noise and its distribution.

    position: tokens of the greedy answer in the context, after the prompt.
    choices: tokens that the model chooses, too.
    near_ties: other tokens within ``NEAR_TIE`` of its choice; the rest are faults.
    impossible: tokens with probability 0.
    chi_square: Neyman's smooth statistic, with ``ORDER`` degrees of freedom.
    """

    position: int
    draws: int
    tokens: int
    choices: int
    near_ties: int
    impossible: int
    chi_square: float
    p_value: float

    @property
    def faults(self) -> int:
        return self.tokens - self.choices - self.near_ties


def fit(
    decoder: SpecDecoder,
    context: list[int],
    position: int,
    draws: int,
    params: SamplingParams,
    depth: Depth,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Fit:
    """Sample ``draws`` continuations of ``context``, up to ``TAIL`` tokens each, and test all their tokens together.

    Each token must be the argmax of the model's perturbed logits: then drafts have no influence. A second test is that
    tokens x are draws from the model's distribution p: with tokens ordered by p and v uniform, u = P(tokens before x) +
    v p(x) is uniform on [0, 1), and all u are independent (Rosenblatt 1952).
    """
    generator = torch.Generator().manual_seed(params.seed)
    places: list[float] = []
    choices, ties, impossible, done = 0, 0, 0, 0
    while done < draws:
        rows, own = min(ROWS, draws - done), replace(params, seed=params.seed + done)
        outputs = decoder.generate_batch(
            [context] * rows,
            max_new_tokens=TAIL,
            num_speculative_tokens=depth,
            **{name: getattr(own, name) for name in ("temperature", "top_k", "top_p", "seed")},
        )
        done += rows
        for stream, output in enumerate(outputs):
            sampler = Sampler(own, streams=[stream])
            limit = NEAR_TIE[decoder.target.dtype] * sampler.sharpness
            logits = model_logits(decoder.model, context, output.token_ids, TAIL)[None]  # (1, n, V)
            scores = sampler.scores(logits, lambda: [])
            after = range(len(context), len(context) + len(output.token_ids))
            perturbed = sampler.perturb(scores, [after], scores.shape[-1])[0]
            for token, noisy, p in zip(output.token_ids, perturbed, scores[0].softmax(-1).double().cpu(), strict=True):
                gap = float(noisy.max() - noisy[token])
                choices += gap == 0
                ties += 0 < gap <= limit
                impossible += bool(p[token] <= 0)
                v = torch.rand((), generator=generator, dtype=torch.double)
                places.append(float(p[p > p[token]].sum() + v * p[token]))
            progress(len(output.token_ids))
    statistic = smooth(torch.tensor(places, dtype=torch.double))
    p_value = chi_square_tail(statistic, ORDER)
    return Fit(position, draws, len(places), choices, ties, impossible, statistic, p_value)


def smooth(u: Tensor) -> float:
    """Neyman's smooth statistic (1937) of u [n] against the uniform distribution: squared mean components along the
    first ``ORDER`` Legendre polynomials, chi-square distributed with that many degrees of freedom."""
    x = 2 * u - 1
    polynomials = (x, (3 * x**2 - 1) / 2, (5 * x**3 - 3 * x) / 2, (35 * x**4 - 30 * x**2 + 3) / 8)
    return float(sum((2 * j + 1) * part.sum() ** 2 / len(u) for j, part in enumerate(polynomials, start=1)))


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X >= statistic) of the chi-square distribution."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.double)
    return float(torch.special.gammaincc(half[0], half[1]))


def misfits(fits: list[Fit]) -> list[Fit]:
    """The fits that fail, at level ``ALPHA`` for all of them together (Bonferroni)."""
    return [fit for fit in fits if fit.faults or fit.impossible or not fit.p_value >= ALPHA / len(fits)]
