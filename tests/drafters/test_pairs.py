"""Drafters that run pairs keep few of the model's states, also of rows that never draft or draft late."""

from collections.abc import Callable, Iterator, Sequence

import pytest
from policies import DEAR
from scripted import Clock, made
from tiny import greedy_reference, tiny_model
from transformers import PreTrainedModel
from zoo import dspark, eagle3, mtp, new_tokens, watched

from specdec import Regex
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.pairs import PairDrafter, PairRow
from specdec.engine import guard
from specdec.engine.depth import DepthChoice, FixedDepth, History
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.target import Target
from specdec.runtimes.torch.static_cache import TOKENS
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler, SamplingParams
from specdec.speculation.trees import Prices
from specdec.verifiers.exact import ExactVerifier

ALONE: dict[str, Callable[[Target], Drafter]] = {"eagle3": eagle3, "dspark": dspark, "mtp": mtp}
JOINED: dict[str, Callable[[Target], Drafter]] = {
    "ngram+eagle3": lambda target: JoinedDrafter(NgramDrafter(), eagle3(target)),
    "ngram+mtp": lambda target: JoinedDrafter(NgramDrafter(), mtp(target)),
}
TEXT = [3 + n * n % 90 for n in range(400)]
DEPTH = 4


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(max_position_embeddings=1024)


def held(request: Request) -> int:
    """Number of states that the drafter keeps of a running request."""
    row = request.drafter_state
    row = row if row is None or isinstance(row, PairRow) else row.other
    assert row is None or row.count == sum(map(len, row.states))
    return 0 if row is None else row.count


def steps(
    target: Target, drafter: Drafter, policy: FixedDepth, *requests: Request, **options: int
) -> Iterator[tuple[Engine, list[int]]]:
    """Bind the drafter, and run an engine; yield it after each step, with the numbers of states of the requests."""
    drafter.bind(target)
    engine = Engine(target, drafter, ExactVerifier(), policy, **options)
    for request in requests:
        engine.submit(request)
    for _ in engine.steps():
        yield engine, [held(request) for request in requests]
    assert engine.batch.guard.failures == 0 or engine.batch.guard.outage is None


class Late(FixedDepth):
    """Drafts nothing for so many steps, and then always."""

    def __init__(self, plain: int) -> None:
        super().__init__(DEPTH)
        self.left = plain

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        self.left -= 1
        return DepthChoice([0] * len(caps)) if self.left >= 0 else super().choose(rows, caps, contexts)


class Dear(FixedDepth):
    """Drafts levels that cost too much, so that n-grams draft alone."""

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        prices = Prices([0.0] * 99, DEAR, rates=[[0.1] * cap for cap in caps])
        return super().choose(rows, caps, contexts)._replace(prices=prices)


@pytest.mark.parametrize("name", [*ALONE, *JOINED])
def test_rows_that_never_draft_hold_few_states_beside_others(model: PreTrainedModel, name: str) -> None:
    target, makers = TransformersTarget(model), ALONE | JOINED
    sampled = RowSampler(SamplingParams(temperature=1.0, seed=5))
    constrained = RowSampler(SamplingParams(), [made(Regex("[a-z]{300}")).state(TEXT[:2])])
    requests = [
        Request(TEXT[:9], 150, num_speculative_tokens=0),
        Request(TEXT[:5], 120, sampled, num_speculative_tokens=0),
        Request(TEXT[:2], 120, constrained, num_speculative_tokens=0),
        Request(TEXT[:7], 30, num_speculative_tokens=3),
    ]
    drafter = makers[name](target)
    helds = [held for _, held in steps(target, drafter, FixedDepth(4), *requests)]
    most = [max(counts) for counts in zip(*helds, strict=True)]
    assert max(most) < TOKENS, most
    assert [new_tokens(request) for request in (requests[0], requests[3])] == [
        greedy_reference(model, TEXT[:9], 150),
        greedy_reference(model, TEXT[:7], 30),
    ]


@pytest.mark.parametrize("name", JOINED)
def test_where_n_grams_draft_alone_few_states_are_held(model: PreTrainedModel, name: str) -> None:
    target = TransformersTarget(model)
    request = Request([3, 4, 5, 6] * 8, 200)
    counts = [held for _, [held] in steps(target, JOINED[name](target), Dear(DEPTH), request)]
    assert 0 < max(counts) < TOKENS + DEPTH
    assert set(request.metrics.accepted_by_source) <= {"ngram"}


@pytest.mark.parametrize("name", ALONE)
def test_drafts_after_many_plain_steps_are_those_of_all_states_at_once(
    model: PreTrainedModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts, tokens = list[list[list[int]]](), list[list[list[int]]]()
    for keeps_up in (True, False):
        if not keeps_up:
            monkeypatch.setattr(PairDrafter, "keep_up", Drafter.keep_up)
        target = TransformersTarget(model)
        drafter = ALONE[name](target)
        requests, seen = [Request(TEXT[:9], 160), Request(TEXT[3:80], 160)], watched(drafter)
        most = max(max(held) for _, held in steps(target, drafter, Late(140), *requests))
        assert (most < TOKENS) == keeps_up and len(seen) > 2
        drafts.append([row for _, draft in seen for row in draft.lists()])
        tokens.append([new_tokens(request) for request in requests])
    assert drafts[0] == drafts[1] and tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["eagle3", "mtp", "ngram+eagle3"])
def test_few_states_are_held_of_long_prompts(model: PreTrainedModel, name: str, monkeypatch) -> None:
    found = []
    for keeps_up in (True, False):
        if not keeps_up:
            monkeypatch.setattr(PairDrafter, "keep_up", Drafter.keep_up)
        target = TransformersTarget(model)
        drafter = (ALONE | JOINED)[name](target)
        requests, seen = [Request(TEXT, 12), Request(TEXT[:150], 12), Request(TEXT[:5], 12)], watched(drafter)
        most = max(max(held) for _, held in steps(target, drafter, FixedDepth(DEPTH), *requests, prefill_chunk=40))
        assert (most < TOKENS) == keeps_up
        found.append(([draft.lists() for _, draft in seen], [new_tokens(request) for request in requests]))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::specdec.DrafterWarning")
@pytest.mark.parametrize("name", ["eagle3", "ngram+mtp"])
def test_rows_of_a_restarted_drafter_hold_few_states(model: PreTrainedModel, name: str, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(guard, "time", clock)
    target = TransformersTarget(model)
    drafter = (ALONE | JOINED)[name](target)
    requests = [Request(TEXT[:9], 190, num_speculative_tokens=0), Request(TEXT[:7], 190), Request(TEXT, 150)]
    for number, (engine, counts) in enumerate(steps(target, drafter, Late(120), *requests, prefill_chunk=100)):
        assert max(counts) < TOKENS
        if number == 2:  # the longest prompt is still run
            engine.batch.guard.fail("was told to")
        clock.now += 0.5
    assert engine.batch.guard.failures == 1 and engine.drafting == "on"
    assert sum(requests[1].metrics.per_step_drafted) > 0
    assert [new_tokens(row) for row in requests] == [
        greedy_reference(model, row.prompt, row.max_new_tokens) for row in requests
    ]


def test_preempted_rows_begin_anew_with_few_states(model: PreTrainedModel) -> None:
    target = TransformersTarget(model)
    drafter = eagle3(target)
    requests = [Request(TEXT[:n], 150, num_speculative_tokens=0) for n in (8, 9)]
    most, preempted = 1 << 30, 0
    for number, (engine, counts) in enumerate(steps(target, drafter, FixedDepth(DEPTH), *requests, kv_memory=most)):
        engine.scheduler.memory.limit = 1 if number == 30 else most
        assert max(counts) < TOKENS
        preempted = engine.scheduler.preemptions
    assert preempted == 1
    assert [new_tokens(row) for row in requests] == [greedy_reference(model, row.prompt, 150) for row in requests]
