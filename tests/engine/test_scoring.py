"""Scoring: what is computed of a draft's tokens."""

from __future__ import annotations

import pytest
from scripted import Scripted
from tiny import model_of, tiny_model
from torch import Tensor
from transformers import LogitsProcessor
from zoo import finish, new_tokens, together

from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.sampling import RowSampler, Sampler, SamplingParams
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier

needs_native = pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")


@needs_native
def test_sampled_rows_process_logits_after_accepted_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = NativeTarget(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96).bfloat16())
    drafter, processed = NgramDrafter(9, prior=False), list[int]()
    drafter.bind(target)
    process = Sampler.scores

    def spy(self, logits, prefixes, vocab=None):  # type: ignore[no-untyped-def]
        processed.append(logits.shape[0] * logits.shape[1])
        return process(self, logits, prefixes, vocab)

    monkeypatch.setattr(Sampler, "scores", spy)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(4))
    samplers = [RowSampler(SamplingParams(temperature=0.3, seed=seed)) for seed in (1, 2)]
    rows = [Request([5, 6, 7, 5, 6, 7, 5, 6], 24, sampler) for sampler in samplers]
    finish(engine, *rows)
    drafted, accepted, new = (
        sum(getattr(row.metrics, name) for row in rows)
        for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_new_tokens")
    )
    assert accepted > 0 and sum(processed) <= new + (drafted - accepted) // 4


class Threes(LogitsProcessor):
    """A processor that allows every third token alone."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, [token for token in range(scores.shape[1]) if token % 3]] = float("-inf")
        return scores


@pytest.mark.parametrize("kind", [TransformersTarget, pytest.param(NativeTarget, marks=needs_native)])
def test_typical_acceptance_takes_only_the_tokens_of_plain_decoding_in_a_greedy_row(kind: type[Target]) -> None:
    """With a processor, and beside rows that sample: of an unsure model, most tokens are typical."""
    target = kind(model_of("llama") if kind is NativeTarget else tiny_model("llama"))  # type: ignore[call-arg]

    def requests(greedy: int, sampled: int) -> list[Request]:
        sampled_row, rules = RowSampler(SamplingParams(temperature=5.0)), [[], [Threes()]]
        hot = [Request([9, 10, number], 24, sampled_row) for number in range(3, 3 + sampled)]
        made = [
            Request([5, 6, number], 24, RowSampler(SamplingParams(), rules[number % 2]))
            for number in range(3, 3 + greedy)
        ]
        return made + hot

    plain = requests(2, 0)
    together(target, NoDrafter(), plain, FixedDepth(0))
    for greedy, sampled in ((1, 0), (2, 0), (2, 2)):
        drafter = Scripted(lambda ids, limit: [((7 * len(ids) + n) % 97, n) for n in range(limit)])
        rows = requests(greedy, sampled)
        together(target, drafter, rows, FixedDepth(3), TypicalVerifier(epsilon=1e-4))
        for row, expected in zip(rows[:greedy], plain, strict=False):
            assert new_tokens(row) == new_tokens(expected)
        assert all(row.metrics.num_accepted_draft_tokens for row in rows[greedy:])
