"""Scoring: what is computed of a draft's tokens."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from zoo import finish

from specdec.drafters.ngram import NgramDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.speculation.sampling import SamplingParams, Transforms
from specdec.verifiers.exact import ExactVerifier


@pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")
def test_sampled_rows_process_logits_after_accepted_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    target = NativeTarget(tiny_model(hidden_size=64, head_dim=32, intermediate_size=96).bfloat16())
    drafter, processed = NgramDrafter(9, prior=False), list[int]()
    drafter.bind(target)
    transform = Transforms.__call__

    def spy(self, logits, prefixes, vocab=None):  # type: ignore[no-untyped-def]
        processed.append(logits.shape[0] * logits.shape[1])
        return transform(self, logits, prefixes, vocab)

    monkeypatch.setattr(Transforms, "__call__", spy)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(4))
    rows = [Request([5, 6, 7, 5, 6, 7, 5, 6], 24, SamplingParams(temperature=0.3, seed=seed)) for seed in (1, 2)]
    finish(engine, *rows)
    drafted, accepted, new = (
        sum(getattr(row.metrics, name) for row in rows)
        for name in ("num_draft_tokens", "num_accepted_draft_tokens", "num_new_tokens")
    )
    assert accepted > 0 and sum(processed) <= new + (drafted - accepted) // 4
