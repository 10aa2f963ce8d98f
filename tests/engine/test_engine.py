"""A step returns what plain decoding returns, whatever is drafted: oracles, batches, ends."""

from collections.abc import Callable

import pytest
import torch
from scripted import Scripted, knowing, made
from targets import target_of
from tiny import greedy_reference, tiny_model
from transformers import PreTrainedModel
from zoo import CHAINS, EOS, PROMPTS, TREES, new_tokens, run, together

from specdec import Regex, SpecDecError
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.request import Request
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter, DrafterWarning
from specdec.speculation.sampling import RowSampler, SamplingParams


@pytest.mark.parametrize(("family", "makers"), [("gpt2", TREES), ("opt", CHAINS)])
def test_a_row_at_the_end_of_the_context_does_not_keep_others_from_drafting(
    family: str, makers: dict[str, Callable[[Target], Drafter]]
) -> None:
    """Their nodes are deeper than it may go, where a table of positions has no entry."""
    model = tiny_model(family, max_position_embeddings=20)
    target, prompts = TransformersTarget(model), [[5, 6] * 8 + [7], PROMPTS[0]]
    expected = [greedy_reference(model, prompt, 20 - len(prompt)) for prompt in prompts]
    for name, make in makers.items():
        drafter = make(target)
        drafter.bind(target)
        requests = [Request(prompt, 20 - len(prompt), eos=frozenset([2])) for prompt in prompts]
        together(target, drafter, requests, FixedDepth(7))
        assert [new_tokens(request) for request in requests] == expected, name


class Breaks(TransformersTarget):
    """Logits are not finite where the token at ``position`` is chosen (0: nowhere, as in the check at load)."""

    position = 0

    def layers(self, x, lo, hi, given):
        x = super().layers(x, lo, hi, given)
        broken = (given.positions == self.position - 1) & (hi == self.num_layers)
        return x.masked_fill(broken[..., None], float("nan"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_logits_that_are_not_finite_end_it_with_one_error_and_lose_nothing(llama, temperature, prompts) -> None:
    whole, _ = run(TransformersTarget(llama), NoDrafter(), prompts, 20, eos=None, temperature=temperature)
    target = Breaks(llama)
    target.position = 9
    # The broken position lies inside an accepted draft.
    drafter = knowing(*(prompt + row for prompt, row in zip(prompts, whole, strict=True)))
    drafter.bind(target)
    requests = [Request(prompt, 20, RowSampler(SamplingParams(temperature))) for prompt in prompts]
    with pytest.raises(SpecDecError, match=r"logits are not finite at position 9.*float32"):
        together(target, drafter, requests, FixedDepth(3))
    out = [new_tokens(request) for request in requests]
    longest = max(prompts, key=len)
    assert len(longest) + len(out[prompts.index(longest)]) == 9
    assert all(tokens == right[: len(tokens)] for tokens, right in zip(out, whole, strict=True))


FAULTY = {
    "raises": lambda ids, limit: 1 // 0,
    "a token outside the vocabulary": lambda ids, limit: [(97, 0)],
    "a negative token": lambda ids, limit: [(-2, 0)],
    "too deep": lambda ids, limit: [(5, i) for i in range(limit + 1)],
    "a parent that comes later": lambda ids, limit: [(5, 1), (6, 0)],
    "a negative parent": lambda ids, limit: [(5, -1)],
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_drafter_is_dropped_and_decoding_goes_on(llama: PreTrainedModel, name: str) -> None:
    script, calls = FAULTY[name], 0

    def later(ids: list[int], limit: int) -> list[tuple[int, int]]:
        nonlocal calls
        calls += 1
        return script(ids, limit) if calls > 2 else [(7, 0)]  # type: ignore[return-value]

    with pytest.warns(DrafterWarning, match="decoding goes on without it"):
        out, _ = run(TransformersTarget(llama), Scripted(later), PROMPTS[:1], 20)
    assert out == [greedy_reference(llama, PROMPTS[0], 20)] and calls == 3


def with_states(*shape: int, exit_layer: int = 2) -> Draft:
    draft = Draft(torch.full((1, 1), 7), (0,))
    draft.states, draft.exit_layer = torch.zeros(shape), exit_layer
    return draft


@pytest.mark.parametrize(
    ("draft", "why"),
    [
        (Draft(torch.full((1, 1), 7.0), (0,)), "float32, not int64"),
        (with_states(1, 32), "states at layer 2"),
        (with_states(2, 1, 32), "states at layer 2"),
        (with_states(1, 3, 32), "not 1 rows of 2 tokens"),
        (with_states(1, 1, 32, exit_layer=0), "states at layer 0"),
    ],
)
def test_a_draft_of_other_tensors_ends_no_request(llama: PreTrainedModel, draft: Draft, why: str) -> None:
    drafter = Scripted(None)
    drafter.propose = lambda state, limit: draft  # type: ignore[method-assign]
    with pytest.warns(DrafterWarning, match=why):
        out, _ = run(TransformersTarget(llama), drafter, PROMPTS[:1], 8)
    assert out == [greedy_reference(llama, PROMPTS[0], 8)]


@pytest.mark.parametrize("kind", ["transformers", "native"])
def test_forced_tokens_of_a_row_leave_the_drafts_of_others_as_they_are(kind: str) -> None:
    target = target_of(kind)
    rule, prompts = made(Regex("abcdefghij{9}")), [[5, 6, 7, 8], [9, 10, 11]]
    plain = Request(prompts[1], 24)
    together(target, NoDrafter(), [plain], FixedDepth(0))
    text = [*prompts[1], *new_tokens(plain)]

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        right = text[len(ids) :][:limit] if ids[:3] == prompts[1] else [4] * limit
        return [(token, n) for n, token in enumerate(right)]

    drafter, withdrawn = Scripted(script), list[object]()
    drafter.begin, numbers = lambda: next(numbers), iter(["bound", "free"])  # type: ignore[method-assign]
    drafter.withdraw = withdrawn.append  # type: ignore[method-assign]
    ruled = RowSampler(SamplingParams(), [rule.state(prompts[0])])
    bound = Request(prompts[0], 12, sampler=ruled, eos=frozenset([EOS]))
    free = Request(prompts[1], 24)
    together(target, drafter, [bound, free], FixedDepth(3))
    assert new_tokens(free) == new_tokens(plain)
    assert bound.metrics.accepted_by_source == {"constraint": bound.metrics.num_accepted_draft_tokens}
    assert free.metrics.accepted_by_source == {"scripted": free.metrics.num_accepted_draft_tokens}
    assert free.metrics.num_accepted_draft_tokens > 12 and set(withdrawn) == {"bound"}
