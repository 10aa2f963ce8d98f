"""Scoring: what is computed of a draft's tokens."""

import pytest
from scripted import Scripted
from spies import noted
from targets import target_of
from torch import Tensor
from transformers import LogitsProcessor
from zoo import finish, new_tokens, together

from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.speculation.sampling import RowSampler, Sampler, SamplingParams
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier


def test_sampled_rows_process_logits_after_accepted_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of("native")
    drafter = NgramDrafter(9, prior=False)
    drafter.bind(target)
    processed = noted(monkeypatch, Sampler, "draw", lambda self, logits, *more: logits[..., 0].numel())
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(4))
    samplers = [RowSampler(SamplingParams(temperature=0.3, seed=seed)) for seed in (1, 2)]
    rows = [Request([5, 6, 7, 5, 6, 7, 5, 6], 24, sampler) for sampler in samplers]
    finish(engine, *rows)
    drafted, accepted, new = (
        sum(getattr(row.metrics, name) for row in rows)
        for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_new_tokens")
    )
    assert accepted > 0 and new <= sum(processed) <= new + (drafted - accepted) // 4


class Threes(LogitsProcessor):
    """A processor that allows every third token alone."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, [token for token in range(scores.shape[1]) if token % 3]] = float("-inf")
        return scores


@pytest.mark.parametrize("runtime", ["transformers", "native"])
def test_typical_acceptance_takes_only_the_tokens_of_plain_decoding_in_a_greedy_row(runtime: str) -> None:
    """With a processor, and beside rows that sample: of an unsure model, most tokens are typical."""
    target = target_of(runtime)

    def requests(greedy: int, sampled: int) -> list[Request]:
        hot, rules = RowSampler(SamplingParams(temperature=5.0)), [[], [Threes()]]
        cold = [RowSampler(SamplingParams(), rules[number % 2]) for number in range(1, 1 + greedy)]
        made = [Request([5, 6, number], 24, sampler) for number, sampler in enumerate(cold, 3)]
        return made + [Request([9, 10, number], 24, hot) for number in range(3, 3 + sampled)]

    plain = requests(2, 0)
    together(target, NoDrafter(), plain, FixedDepth(0))
    for greedy, sampled in ((1, 0), (2, 0), (2, 2)):
        drafter = Scripted(lambda ids, limit: [((7 * len(ids) + n) % 97, n) for n in range(limit)])
        rows = requests(greedy, sampled)
        together(target, drafter, rows, FixedDepth(3), TypicalVerifier(epsilon=1e-4))
        for row, expected in zip(rows[:greedy], plain, strict=False):
            assert new_tokens(row) == new_tokens(expected)
        assert all(row.metrics.num_accepted_draft_tokens for row in rows[greedy:])
