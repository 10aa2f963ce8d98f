"""A certificate of losslessness: greedy and sampled output of a decoder on the user's prompts, as data and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from specdec.api.decoder import SpecDecoder
from specdec.api.text import encode
from specdec.base.errors import SpecDecError
from specdec.base.options import Depth
from specdec.base.terminal import OnProgress
from specdec.bench.environment import environment
from specdec.bench.prompts import Conversation
from specdec.engine.replay import NEAR_TIE
from specdec.speculation.sampling import SamplingParams
from specdec.verify.checks import ALPHA, ORDER, TAIL, Fit, Greedy, expected, fit, misfits

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
