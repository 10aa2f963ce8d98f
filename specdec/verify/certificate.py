"""A certificate of losslessness: greedy and sampled output of a decoder on the user's prompts, as data and as text.

The reference is the model's own forward pass (``model.generate`` and teacher-forced logits), never our runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError
from specdec.base.options import Depth
from specdec.base.terminal import OnProgress
from specdec.bench.environment import environment
from specdec.bench.prompts import Conversation
from specdec.engine.replay import NEAR_TIE
from specdec.speculation.sampling import Sampler, SamplingParams, apply_processors, logits_processors

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
    return apply_processors(logits_processors(model, prompt, count), prompt, tokens, logits)


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


POSITIONS = (0, 16)  # sampling is tested after so many tokens of the first answer


@dataclass(frozen=True)
class CheckPlan:
    """What is checked: greedy answers to the first turn of each conversation at each depth, and sampled continuations
    of the first prompt at each position, at the last depth.

    max_new_tokens: of a greedy answer.
    draws: sampled continuations per position.
    positions: tokens of the first answer before the continuation; None is those of ``POSITIONS`` within the answer.
    params: of sampling.
    """

    depths: Sequence[Depth]
    conversations: Sequence[Conversation]
    max_new_tokens: int
    draws: int
    positions: Sequence[int] | None
    params: SamplingParams


class Certificate:
    """The results of ``run``; if it is interrupted, those of the checks until then.

    greedy: by depth. fits: by position. complete: whether ``run`` has ended.
    """

    def __init__(self, decoder: SpecDecoder, plan: CheckPlan) -> None:
        self.decoder, self.plan = decoder, plan
        self.dtype = decoder.target.dtype
        depths = plan.depths if decoder.drafter.drafts else plan.depths[:1]
        self.greedy = [Greedy(depth, self.dtype == torch.float32) for depth in depths]
        self.fits: list[Fit] = []
        self.complete = False
        self.environment = environment()

    def run(self, progress: OnProgress = lambda done, total, tokens: None) -> None:
        """Run all checks. Raises SpecDecError for prompts that do not fit the model's context."""
        plan, decoder, context = self.plan, self.decoder, self.decoder.target.context
        positions = POSITIONS if plan.positions is None else plan.positions
        total = len(plan.conversations) * (1 + len(self.greedy)) + len(positions) * plan.draws
        done = tokens = 0

        def step(new: int) -> None:
            nonlocal done, tokens
            done, tokens = done + 1, tokens + new
            progress(done, total, tokens)

        first: tuple[list[int], list[int]] = [], []
        for conversation in plan.conversations:
            prompt = encode(decoder.tokenizer, conversation.turns[0])
            count = min(plan.max_new_tokens, context - len(prompt))
            if count < 1:
                raise SpecDecError(f"prompt {conversation.id} has {len(prompt)} tokens; the context is {context}")
            right = expected(decoder, prompt, count)
            first = first if first[0] else (prompt, right)
            step(len(right))
            for check in self.greedy:
                depth = check.depth
                answer = decoder.generate(prompt, max_new_tokens=count, num_speculative_tokens=depth).token_ids
                check.take(decoder, conversation.id, prompt, answer, right, count)
                step(len(answer))
        for position in positions if plan.draws else ():
            prompt, right = first
            held = prompt + right[:position]
            if position >= len(right) or len(held) + TAIL > context:
                if plan.positions is None:
                    total -= plan.draws
                    continue
                raise SpecDecError(
                    f"position {position} is beyond the answer to the first prompt; choose others with --positions"
                )
            self.fits.append(fit(decoder, held, position, plan.draws, plan.params, self.greedy[-1].depth, step))
        self.complete = True

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.greedy) and not misfits(self.fits)

    def as_dict(self) -> dict[str, Any]:
        """The results as plain values, for JSON."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "near_tie": NEAR_TIE[self.dtype],
            "greedy": [asdict(check) | {"passed": check.passed} for check in self.greedy],
            "sampling": [asdict(one) | {"passed": one not in misfits(self.fits)} for one in self.fits],
            "sampling_level": ALPHA,
            "environment": self.environment,
        }

    def page(self, title: Sequence[str]) -> str:
        """The certificate as text. title: lines that describe the decoder."""
        about, result = self.environment, "PASSED" if self.passed else "FAILED"
        lines = [f"Losslessness: {result}{'' if self.complete else ' so far (cut short)'}", "", *title]
        lines.append(f"machine    {about['cpu']}, {about['threads']} threads")
        versions = ", ".join(f"{name} {about[name]}" for name in ("specdec", "torch", "transformers"))
        lines.append(f"versions   {versions}, commit {about['commit'] or 'unknown'}")
        return "\n".join([*lines, "", *self._greedy_lines(), "", *self._sampling_lines()])

    def _greedy_lines(self) -> list[str]:
        rule = f"every token is its choice or a near-tie, at most {NEAR_TIE[self.dtype]:g} below its best logit"
        if self.dtype == torch.float32:
            rule = "float32: the tokens of model.generate"
        rows: list[tuple[Any, ...]] = [
            ("depth", "answers", "tokens", "= generate", "its choice", "near-ties", "largest gap", "faults", "")
        ]
        for c in self.greedy:
            counts = (c.depth, c.answers, c.tokens, c.equal, c.argmax, c.near_ties, f"{c.largest_gap:.3g}", c.faults)
            rows.append((*counts, _ok(c.passed)))
        faults = [f"  FAULT at depth {c.depth}, {detail}" for c in self.greedy for detail in c.details]
        return [f"Greedy decoding, replayed by the model's own forward pass ({rule})", *_columns(rows), *faults]

    def _sampling_lines(self) -> list[str]:
        params, bad = self.plan.params, misfits(self.fits)
        how = f"temperature {params.temperature:g}, top-p {params.top_p:g}, top-k {params.top_k}"
        if not self.fits:
            return [f"Sampling ({how}): not tested"]
        rows: list[tuple[Any, ...]] = [
            ("from token", "draws", "tokens", "its choice", "near-ties", "faults", "chi-square", "p-value", "")
        ]
        for f in self.fits:
            counts = (f.position, f.draws, f.tokens, f.choices, f.near_ties, f.faults)
            rows.append((*counts, f"{f.chi_square:.1f}", f"{f.p_value:.2g}", _ok(f not in bad)))
        test = "  each token is compared with the model's choice under the same noise; its fit to the model's "
        test += f"distribution is tested by chi-square with {ORDER} degrees of freedom, level {ALPHA:g}"
        note = ["  rounding in this dtype changes probabilities slightly; float32 is the strict test"]
        return [f"Sampling ({how})", test, *_columns(rows), *(note if self.dtype != torch.float32 else [])]


def _columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of an indented plain-text table."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def _ok(passed: bool) -> str:
    return "ok" if passed else "FAULT"
