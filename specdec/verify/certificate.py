"""Proof that drafts change nothing: tokens compared with those of plain decoding under the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from specdec.api.decoder import SpecDecoder
from specdec.api.generation import GenerationOutput
from specdec.base.options import Depth, SamplingParams
from specdec.base.terminal import OnProgress
from specdec.models.gguf.blocks import temporarily_dense
from specdec.models.native_model import as_transformers
from specdec.runtimes.target import Target
from specdec.speculation.sampling import Sampler, streams
from specdec.verify.replay import NEAR_TIE, first_difference, is_near_tie, margins

MAX_DETAILS = 10  # faults that are described in a certificate


@dataclass
class Check:
    """Counts of answers with drafts, compared with the answers of a reference such as plain decoding.

    name: of the comparison. answers, tokens: number of compared answers and of their tokens.
    accepted: number of tokens that were drafted and accepted.
    equal: answers that equal the reference.
    near_ties: answers that differ, but whose every token is the model's choice or a near-tie.
    largest_gap: largest distance of a near-tie's logit to the best logit.
    faults: all other answers. details: a line about each of the first ``MAX_DETAILS`` faults.
    """

    name: str
    answers: int = 0
    tokens: int = 0
    accepted: int = 0
    equal: int = 0
    near_ties: int = 0
    largest_gap: float = 0.0
    faults: int = 0
    details: list[str] = field(default_factory=list)

    def take(
        self, name: str, prompt: list[int], output: GenerationOutput, right: list[int], target: Target, sampler: Sampler
    ) -> None:
        """Compare an answer to ``prompt`` with the reference's tokens ``right`` and count the result.

        name: of the prompt, for details. sampler: the sampler of one row that chose the tokens.
        """
        answer = output.token_ids
        self.answers += 1
        self.tokens += len(answer)
        self.accepted += output.metrics.num_accepted_draft_tokens
        difference = first_difference(target, prompt, answer, right, sampler)
        if difference is None:
            self.equal += 1
            return
        wrong = [] if difference.near_tie else [str(difference)]
        gaps = margins(target, prompt, answer, sampler).tolist()  # also of what follows the near-tie
        far = [i for i, gap in enumerate(gaps) if not is_near_tie(target, prompt, answer[: i + 1], gap, sampler)]
        wrong += [f"token {i} is {answer[i]}, {gaps[i]:.3g} below the best" for i in far]
        if wrong:
            self.faults += 1
            self.details = [*self.details, f"prompt {name}: {wrong[0]}"][:MAX_DETAILS]
        else:
            self.near_ties += 1
            self.largest_gap = max(
                [self.largest_gap, difference.margin, *gaps], key=lambda gap: gap * math.isfinite(gap)
            )


class Certificate:
    """A losslessness test: prompts are answered with and without drafts, greedily and by sampling, and compared.

    Sampling uses the same random numbers with and without drafts. In float32, greedy answers are also compared with
    those of ``model.generate``.
    prompts: (name, token ids) each. params: for the sampled answers; greedy answers take all but the temperature.
    checks: {"greedy", "sampled", "generate": counts}, which grow while ``run`` works.
    complete: whether ``run`` has ended.
    """

    def __init__(
        self,
        decoder: SpecDecoder,
        prompts: Sequence[tuple[str, list[int]]],
        params: SamplingParams,
        max_new_tokens: int,
        num_speculative_tokens: Depth = "auto",
        batch_size: int = 4,
    ) -> None:
        self.decoder, self.plain = decoder, decoder.with_drafter("none")
        self.batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        self.max_new_tokens, self.num_speculative_tokens = max_new_tokens, num_speculative_tokens
        self.dtype, self.complete = decoder.target.dtype, False
        self.params = {"greedy": replace(params, temperature=0.0), "sampled": params}
        self.checks = {name: Check(name) for name in self.params}
        if self.dtype == torch.float32:
            self.checks["generate"] = Check("model.generate")

    def run(self, progress: OnProgress = lambda done, total, tokens: None) -> None:
        """Run all checks, batch by batch. progress: called with (checks done, all checks, tokens compared).

        Raises SpecDecError for prompts that exceed the model's context.
        """
        for number, batch in enumerate(self.batches, start=1):
            for name, params in self.params.items():
                self._compare(name, batch, params)
                done, total = (number - 1) * len(self.params) + (name != "greedy") + 1, len(self.batches) * 2
                progress(done, total, sum(check.tokens for check in self.checks.values()))
        self.complete = True

    def _compare(self, name: str, batch: Sequence[tuple[str, list[int]]], params: SamplingParams) -> None:
        prompts = [prompt for _, prompt in batch]
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, **vars(params)}
        outputs = self.decoder.generate_batch(prompts, num_speculative_tokens=self.num_speculative_tokens, **how)
        plain = self.plain.generate_batch(prompts, **how)
        target = self.decoder.target
        for (label, prompt), stream, output, right in zip(batch, streams(prompts), outputs, plain, strict=True):
            sampler = Sampler([self.decoder.request(prompt, stream=stream, **how).sampler])
            self.checks[name].take(label, prompt, output, right.token_ids, target, sampler)
            if name == "greedy" and "generate" in self.checks:
                tokens = expected(self.decoder, prompt, self.max_new_tokens)
                self.checks["generate"].take(label, prompt, output, tokens, target, sampler)

    @property
    def passed(self) -> bool:
        """Whether no check has found a fault so far."""
        return not any(check.faults for check in self.checks.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "passed": self.passed,
            "complete": self.complete,
            "near_tie": NEAR_TIE[self.dtype],
            "checks": [asdict(check) for check in self.checks.values()],
        }

    def page(self, facts: str) -> str:
        """Return the certificate as text of several lines. facts: text about the decoder and the machine."""
        result = "PASSED" if self.passed else "FAILED"
        rows: list[tuple[Any, ...]] = [
            ("beside", "answers", "tokens", "drafted", "equal", "near-ties", "largest gap", "faults")
        ]
        for c in self.checks.values():
            beside = c.name if c.name == "model.generate" else f"plain, {c.name}"
            gap = f"{c.largest_gap:.3g}" if c.near_ties else ""
            rows.append((beside, c.answers, c.tokens, c.accepted, c.equal, c.near_ties, gap, c.faults))
        widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
        table = ["  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        faults = [f"FAULT, {c.name}, {detail}" for c in self.checks.values() for detail in c.details]
        rule = f"A near-tie is at most {NEAR_TIE[self.dtype]:g} below the best logit."
        cut = "" if self.complete else " so far (cut short)"
        return "\n".join([f"Losslessness: {result}{cut}", "", facts, *table, *faults, "", rule])


def expected(decoder: SpecDecoder, prompt: list[int], count: int) -> list[int]:
    """Return the new token ids of a greedy ``model.generate`` of transformers, at most ``count``."""
    model: Any = as_transformers(decoder.model)
    ids = torch.tensor([prompt], device=model.device)
    with temporarily_dense(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(count, decoder.target.context - len(prompt)),
            do_sample=False,
            pad_token_id=next(iter(decoder.eos_ids()), 0),
        )
    return [int(token) for token in out[0, len(prompt) :]]
