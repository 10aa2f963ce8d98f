"""Test losslessness: compare tokens decoded with drafts and tokens of plain decoding under the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from specdec.api.decoder import SpecDecoder
from specdec.api.generation import GenerationOutput
from specdec.base.errors import SpecDecError
from specdec.base.options import Depth, SamplingParams
from specdec.base.terminal import OnProgress
from specdec.engine.request import check_prompt
from specdec.models.gguf.blocks import temporarily_dense
from specdec.models.native_model import as_transformers
from specdec.runtimes.target import Target
from specdec.speculation.sampling import Sampler, streams
from specdec.verify.replay import NEAR_TIE, first_difference, is_near_tie, margins

MAX_DETAILS = 10  # faults that are described in a certificate
MIN_DRAFTED = 32  # drafted tokens that each part needs by default


@dataclass
class Check:
    """Counts of answers decoded with drafts, compared with the answers of a reference such as plain decoding.

    name: name of the comparison.
    answers: number of compared answers.
    tokens: number of their tokens.
    drafted: number of tokens that were drafted for them.
    accepted: number of drafted tokens that were accepted.
    equal: number of answers that equal the reference.
    near_ties: number of answers that differ from it only where logits tie within rounding.
    largest_gap: largest distance of such a token's logit to the best logit.
    faults: number of all other answers.
    details: a line of text about each of the first 10 faults.
    """

    name: str
    answers: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    equal: int = 0
    near_ties: int = 0
    largest_gap: float = 0.0
    faults: int = 0
    details: list[str] = field(default_factory=list)

    def take(
        self, name: str, prompt: list[int], output: GenerationOutput, right: list[int], target: Target, sampler: Sampler
    ) -> None:
        """Compare an answer with the reference's answer to the same prompt, and count the result in the fields.

        name: the prompt's name in ``details``. prompt: token ids. output: the answer, decoded with drafts. right: the
        tokens of the reference. target: the model. sampler: a sampler for one row, which chose the tokens of both.
        """
        answer = output.token_ids
        self.answers += 1
        self.tokens += len(answer)
        self.drafted += output.metrics.num_draft_tokens
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
    """A losslessness test: answers prompts with and without drafts, greedily and by sampling, and compares the tokens.

    It compares greedy and sampled answers to single prompts, and answers of both kinds to batches of prompts, with
    every draft length. Sampling uses the same random numbers with and without drafts. In float32, greedy answers are
    also compared with those of ``model.generate``.

    decoder: decodes with drafts.
    prompts: (name, token ids) of each prompt.
    params: sampling parameters; greedy answers take all but the temperature.
    max_new_tokens: largest number of tokens of an answer.
    lengths: draft lengths, each a number of tokens or "auto".
    batch_size: number of prompts in a batch; 1: there are no batches.
    min_drafted: number of drafted tokens that each comparison needs to prove anything.
    checks: a ``Check`` for each comparison, by name: "greedy", "sampled", "batch" (if there are batches) and "generate"
        (in float32, without penalties or a bias of one's own). It counts answers, drafted tokens and faults, and grows
        during ``run``.
    complete: whether ``run`` has ended. The test is passed if so and ``result`` is "PASSED".
    Raises SpecDecError for a prompt that is empty or exceeds the model's context.
    """

    def __init__(
        self,
        decoder: SpecDecoder,
        prompts: Sequence[tuple[str, list[int]]],
        params: SamplingParams,
        max_new_tokens: int,
        lengths: Sequence[Depth] = ("auto",),
        batch_size: int = 4,
        min_drafted: int = MIN_DRAFTED,
    ) -> None:
        for name, ids in prompts:
            try:
                check_prompt(ids, decoder.target)
            except SpecDecError as error:
                raise SpecDecError(f"prompt '{name}' cannot be answered: {error}") from None
        self.decoder, self.plain = decoder, decoder.with_drafter("none")
        self.batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
        self.max_new_tokens = max_new_tokens
        self.lengths = lengths
        self.min_drafted = min_drafted
        self.dtype, self.complete = decoder.target.dtype, False
        self.params = {"greedy": replace(params, temperature=0.0), "sampled": params}
        names = [*self.params, *(["batch"] if batch_size > 1 else [])]
        self.checks = {name: Check(name) for name in names}
        own = params.frequency_penalty or params.presence_penalty or params.logit_bias
        if self.dtype == torch.float32 and params.repetition_penalty is None and not own:
            self.checks["generate"] = Check("model.generate")

    def run(self, progress: OnProgress = lambda done, total, tokens: None) -> None:
        """Run the whole test, batch of prompts by batch. It takes several generations of each prompt.

        The counts go to ``checks`` while it runs, also if it is interrupted; ``result`` and ``as_dict`` sum them up.
        Differences between answers, faults included, are counted and raise nothing.

        progress: called after each batch, greedy and sampled, with (number done, number in all, tokens compared so
        far).
        """
        steps = list(product(self.batches, self.params))
        for done, (batch, name) in enumerate(steps, start=1):
            self._check(name, batch)
            progress(done, len(steps), sum(check.tokens for check in self.checks.values()))
        self.complete = True

    def _check(self, name: str, batch: Sequence[tuple[str, list[int]]]) -> None:
        """Answer prompts with each draft length, alone and as a batch, and compare the answers with plain decoding.

        The results are counted in ``checks``.

        name: "greedy" or "sampled". batch: (name, token ids) of each prompt.
        """
        prompts = [prompt for _, prompt in batch]
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, **vars(self.params[name])}
        plain = [output.token_ids for output in self.plain.generate_batch(prompts, **how)]
        alone = [plain[prompts.index(prompt)] for prompt in prompts]  # equal prompts draw different texts in a batch
        compared = [(name, alone, [0] * len(prompts))]
        if name == "greedy" and "generate" in self.checks:
            texts = [expected(self.decoder, prompt, self.max_new_tokens) for prompt in prompts]
            compared.append(("generate", texts, [0] * len(prompts)))
        for length in self.lengths:
            outputs = [self.decoder.generate(prompt, num_speculative_tokens=length, **how) for prompt in prompts]
            for part, rights, noise in compared:
                self._compare(part, batch, outputs, rights, noise, how)
            if "batch" in self.checks:
                outputs = self.decoder.generate_batch(prompts, num_speculative_tokens=length, **how)
                self._compare("batch", batch, outputs, plain, streams(prompts), how)

    def _compare(
        self,
        part: str,
        batch: Sequence[tuple[str, list[int]]],
        outputs: Sequence[GenerationOutput],
        rights: Sequence[list[int]],
        noise: Sequence[int],
        how: dict[str, Any],
    ) -> None:
        """Compare answers with those of a reference, and count the results in ``checks[part]``.

        part: name of the comparison, "greedy", "sampled", "batch" or "generate".
        All lists have one entry for each prompt. batch: (name, token ids). outputs: answers decoded with drafts.
        rights: tokens of the reference. noise: number of the random stream from which the answer was sampled. how: the
        options of decoding.
        """
        for (label, prompt), output, right, stream in zip(batch, outputs, rights, noise, strict=True):
            sampler = Sampler([self.decoder.request(prompt, stream=stream, **how).sampler])
            self.checks[part].take(label, prompt, output, right, self.decoder.target, sampler)

    @property
    def result(self) -> str:
        """The result so far: "FAILED" (an answer is at fault), "NOT ENOUGH DRAFTS" (they prove nothing) or "PASSED"."""
        if any(check.faults for check in self.checks.values()):
            return "FAILED"
        few = any(check.drafted < self.min_drafted for check in self.checks.values())
        return "NOT ENOUGH DRAFTS" if few else "PASSED"

    def as_dict(self) -> dict[str, Any]:
        """Return the results so far as JSON values.

        Keys: result (a text), passed, complete (whether ``run`` has ended), near_tie (largest distance to the best
        logit that counts as a tie), min_drafted, and checks, a list with the fields of each ``Check``.
        """
        return {
            "result": self.result,
            "passed": self.complete and self.result == "PASSED",
            "complete": self.complete,
            "near_tie": NEAR_TIE[self.dtype],
            "min_drafted": self.min_drafted,
            "checks": [asdict(check) for check in self.checks.values()],
        }

    def page(self, facts: str) -> str:
        """Return the results as readable text of several lines.

        facts: text about the decoder and the machine, which is part of it.
        """
        rows: list[tuple[Any, ...]] = [
            ("beside", "answers", "tokens", "drafted", "accepted", "equal", "near-ties", "largest gap", "faults")
        ]
        for c in self.checks.values():
            beside = c.name if c.name == "model.generate" else f"plain, {c.name}"
            gap = f"{c.largest_gap:.3g}" if c.near_ties else ""
            rows.append((beside, c.answers, c.tokens, c.drafted, c.accepted, c.equal, c.near_ties, gap, c.faults))
        widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
        table = ["  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        faults = [f"FAULT, {c.name}, {detail}" for c in self.checks.values() for detail in c.details]
        rules = [
            f"A near-tie is at most {NEAR_TIE[self.dtype]:g} below the best logit.",
            f"Each part needs {self.min_drafted} drafted tokens; with fewer it proves nothing.",
        ]
        cut = "" if self.complete else " so far (cut short)"
        return "\n".join([f"Losslessness: {self.result}{cut}", "", facts, *table, *faults, "", *rules])


def expected(decoder: SpecDecoder, prompt: list[int], count: int) -> list[int]:
    """Return the new token ids of transformers' greedy ``model.generate`` after ``prompt``, at most ``count``.

    decoder: gives the model and the end tokens.
    """
    model: Any = as_transformers(decoder.model)
    ids = torch.tensor([prompt], device=model.device)
    with temporarily_dense(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(count, decoder.target.context - len(prompt)),
            do_sample=False,
            pad_token_id=next(iter(decoder.eos_ids()), 0),
            eos_token_id=sorted(decoder.eos_ids()) or None,
        )
    return [int(token) for token in out[0, len(prompt) :]]
