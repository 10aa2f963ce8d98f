"""Layer skipping: what is drafted without some layers."""

from __future__ import annotations

import pytest
from tiny import greedy_reference, without
from transformers import PreTrainedModel
from zoo import PROMPTS

from specdec import SpecDecoder
from specdec.drafters.layer_skip import ranges_without


@pytest.mark.parametrize("runtime", ["reference", "fused"])
@pytest.mark.parametrize("skip", [[1], [0, 3], [1, 2]])
def test_layers_that_change_nothing_are_not_missed(llama: PreTrainedModel, skip: list[int], runtime: str) -> None:
    model = without(llama, *skip)
    decoder = SpecDecoder(model, drafter="layer-skip", drafter_options={"skip": skip}, runtime=runtime)
    outs = decoder.generate_batch(PROMPTS, max_new_tokens=21, num_speculative_tokens=4, ignore_eos=True)
    for out, prompt in zip(outs, PROMPTS, strict=True):
        assert out.token_ids == greedy_reference(model, prompt, 21) or 2 in out.token_ids
        assert set(out.metrics.per_step_accepted[:-1]) == {4}
    # ... and those that do are missed, but never by the output.
    decoder = SpecDecoder(llama, drafter="layer-skip", drafter_options={"skip": skip}, runtime=runtime)
    out = decoder.generate(PROMPTS[0], max_new_tokens=21, num_speculative_tokens=4)
    assert out.token_ids == greedy_reference(llama, PROMPTS[0], 21)


def test_the_way_without_some_layers() -> None:
    assert ranges_without({2}, 5) == [(0, 2), (3, 5)]
    assert ranges_without({0, 1}, 4) == [(2, 4)] and ranges_without({1, 3}, 4) == [(0, 1), (2, 3)]
    assert ranges_without({0, 1}, 2) == []
