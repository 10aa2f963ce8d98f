"""A drafter that fails is off for a while and comes back: the texts are those of plain decoding throughout."""

import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from scripted import Clock, Scripted, knowing
from tiny import greedy_reference
from transformers import PreTrainedModel
from zoo import PROMPTS, finish, new_tokens, step

from specdec.drafters.none import NoDrafter
from specdec.engine import guard
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.drafter import DrafterWarning
from specdec.verifiers.exact import ExactVerifier

pytestmark = pytest.mark.filterwarnings("ignore::specdec.DrafterWarning")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(guard, "time", made)
    return made


class Failing(Scripted):
    """Drafts what ``texts`` go on with; fails while ``faulty``."""

    def __init__(self, texts: Sequence[list[int]] = ()) -> None:
        super().__init__(self.go_on)
        self.texts, self.faulty = texts, False

    def go_on(self, ids: list[int], limit: int) -> list[tuple[int, int]]:
        if self.faulty:
            raise IndexError("as told")
        return knowing(*self.texts).script(ids, limit)

    def work(self) -> bool:
        if self.faulty:
            raise IndexError("as told")
        return False


@pytest.fixture
def drafter(llama: PreTrainedModel) -> Failing:
    return Failing([[*prompt, *greedy_reference(llama, prompt, 60)] for prompt in PROMPTS])


@pytest.fixture
def engine(llama: PreTrainedModel, drafter: Failing) -> Iterator[Engine]:
    with Engine(TransformersTarget(llama), drafter, ExactVerifier(), FixedDepth(2)) as made:
        yield made


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == guard.__name__]


def test_a_drafter_comes_back_in_the_middle_of_the_rows(engine: Engine, drafter: Failing, clock: Clock, caplog) -> None:
    caplog.set_level(logging.INFO, "specdec")
    long = [Request(prompt, 50) for prompt in PROMPTS]
    for request in long:
        engine.submit(request)
    for _ in range(4):
        step(engine)
    drafter.faulty = True
    step(engine)
    clock.now += 0.4
    stats, drafted = engine.stats(), long[0].metrics.num_draft_tokens
    assert (stats.drafter, stats.drafter_failures) == ("off", 1) and stats.outage is not None
    assert stats.outage.error == "failed (IndexError: as told)"
    assert (stats.outage.since, round(stats.outage.seconds_left, 6)) == (1000.0, 0.6)
    drafter.faulty = False
    for _ in range(4):
        step(engine)
    assert engine.drafting == "off" and long[0].metrics.num_draft_tokens == drafted
    clock.now += 0.7
    step(engine)  # it sees the rows
    assert long[0].metrics.num_draft_tokens == drafted
    step(engine)
    assert engine.drafting == "on" and engine.outage is None
    assert long[0].metrics.num_draft_tokens == drafted + 2
    finish(engine)
    assert [[*row.prompt, *new_tokens(row)] for row in long] == [text[: len(text) - 10] for text in drafter.texts]
    why = "'scripted' failed (IndexError: as told); decoding goes on without it, and it starts again in 1 s"
    back = "drafter 'scripted' is on again, 1 s after it failed (IndexError: as told)"
    assert lines(caplog) == [f"drafter {why}", back]


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_good_time(engine, drafter, clock, caplog) -> None:
    caplog.set_level(logging.WARNING, "specdec")
    engine.submit(Request(PROMPTS[0], 50))
    drafter.faulty, pauses = True, []
    for _ in range(9):
        while engine.outage is None:
            step(engine)
        pauses.append(engine.outage.seconds_left)
        clock.now += engine.outage.seconds_left
        step(engine)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert engine.stats().drafter_failures == len(lines(caplog)) == 9  # no returns at this level
    drafter.faulty = False
    step(engine)
    clock.now += 60
    drafter.faulty = True
    step(engine)
    assert engine.outage is not None and engine.outage.seconds_left == 1


@pytest.mark.parametrize("method", ["bind", "begin"])
def test_a_drafter_that_fails_as_it_comes_back_is_off_again(engine, drafter, clock, method, caplog) -> None:
    caplog.set_level(logging.INFO, "specdec")
    request, calls = Request(PROMPTS[0], 50), itertools.count()
    engine.submit(request)
    step(engine)
    drafter.faulty = True
    step(engine)
    drafter.faulty = False

    def fails(*args: object) -> None:
        if not next(calls):
            raise ValueError("not yet")

    setattr(drafter, method, fails)
    clock.now += 1
    step(engine)
    assert engine.drafting == "off" and engine.stats().drafter_failures == 2
    clock.now += 2
    finish(engine)
    assert engine.drafting == "on" and request.metrics.num_draft_tokens
    assert [*request.prompt, *new_tokens(request)] == drafter.texts[0][:54]
    assert ["on again" in line for line in lines(caplog)] == [False, False, True]


def test_a_drafter_whose_own_work_fails_comes_back_while_nothing_runs(llama, drafter, clock) -> None:
    drafter.learner, drafter.faulty = SimpleNamespace(work=drafter.work, version=0), True  # type: ignore[assignment]
    with Engine(TransformersTarget(llama), drafter, ExactVerifier(), FixedDepth(2), learn=True) as engine:
        engine._learn()
        assert engine.drafting == "off"
        drafter.faulty = False
        clock.now += 1
        engine._learn()
        assert engine.drafting == "on"


def test_a_drafter_that_never_drafts_is_neither_on_nor_off(llama: PreTrainedModel) -> None:
    assert Engine(TransformersTarget(llama), NoDrafter(), ExactVerifier(), FixedDepth(0)).stats().drafter == "none"


def test_where_warnings_are_errors_a_failure_is_one(llama: PreTrainedModel, drafter: Failing) -> None:
    drafter.faulty = True
    engine = Engine(TransformersTarget(llama), drafter, ExactVerifier(), FixedDepth(2))
    engine.submit(Request(PROMPTS[0], 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DrafterWarning)
        step(engine)
        with pytest.raises(DrafterWarning, match="as told"):
            step(engine)
