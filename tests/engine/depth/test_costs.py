"""Costs: a formula that the times of real steps correct, under noise; kept for later processes, measured for none."""

import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from spies import noted
from tiny import tiny_model
from transformers import PreTrainedModel

from specdec import SpecDecoder
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import AutoDepth, Costs, StepReport, cost_cache
from specdec.engine.depth.calibration import COUNT_AFTER_CHANGE
from specdec.engine.depth.cost_cache import load, store
from specdec.engine.depth.costs import MOST_TOKENS, CostModel
from specdec.runtimes.draft_path import NEAR
from specdec.runtimes.target import TokenCosts
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.candidates import Candidates
from specdec.speculation.tree_builder import worth_scoring

Curve = Callable[[int], float]  # seconds of a pass over so many tokens
FLAT: Curve = lambda n: 0.06 * (1 + 0.01 * n)  # noqa: E731
STEEP: Curve = lambda n: 0.003 * (1 + 0.25 * n)  # noqa: E731


def noisy(rng: random.Random, noise: float = 0.1) -> float:
    """A factor of a step's time; one step in 40 waits for something else."""
    return math.exp(rng.gauss(0, noise)) * (3 if rng.random() < 0.025 else 1)


def taught(curve: Curve, steps: int = 400, drift: float = 0.0, seed: int = 0, most: int = 20) -> CostModel:
    """After as many passes over 1 to ``most`` tokens, of a machine that slows down by ``drift`` all in all."""
    rng, model = random.Random(seed), CostModel(TokenCosts(0.1), (0.1,))
    for step in range(steps):
        tokens = rng.randint(1, most) if rng.random() < 0.7 else 1
        model.add_pass(tokens, curve(tokens) * (1 + drift * step / steps) * noisy(rng))
    return model


@pytest.mark.parametrize("drift", [0.0, 0.5, -0.4])
@pytest.mark.parametrize("curve", [FLAT, STEEP])
def test_the_costs_of_passes_are_found_under_noise_on_a_machine_that_slows_down(curve: Curve, drift: float) -> None:
    for seed in range(4):
        passes = taught(curve, 400, drift, seed).passing([0], 19)
        true = [(1 + drift) * curve(n) for n in range(1, 21)]
        assert passes == pytest.approx(true, rel=0.3)  # a step that waited moves all of them for a while
        ratios = [a / b for a, b in zip(passes, true, strict=True)]
        assert max(ratios) / min(ratios) < 1.2  # what a node costs beside a plain pass counts


def test_a_machine_that_changes_its_speed_at_once_is_followed_within_some_dozen_steps() -> None:
    model, rng = taught(FLAT), random.Random(1)
    before = model.passing([0], 8)
    for _ in range(60):
        model.add_pass(1, 2 * FLAT(1) * noisy(rng))
    ratios = [now / then for now, then in zip(model.passing([0], 8), before, strict=True)]
    assert ratios == pytest.approx([2.0] * 9, rel=0.1)


def test_the_first_step_scales_the_formula() -> None:
    model = CostModel(TokenCosts(0.1), (0.2, 0.5))
    assert not model.known
    model.add_pass(1, 0.02)
    passes, formula = model.passing([0], 40), [math.sqrt(1 + (0.1 * n) ** 2) for n in range(1, 42)]
    assert model.known and passes == pytest.approx([0.02 * each / formula[0] for each in formula], rel=0.03)
    assert [model.level(exit, [0]) for exit in (0, 1)] == pytest.approx([0.004, 0.01])


def test_numbers_of_tokens_never_seen_cost_about_what_the_formula_says_of_their_neighbours() -> None:
    model = CostModel(TokenCosts(0.1), (0.1,))
    for _ in range(100):
        model.add_pass(1, 0.01)
        model.add_pass(8, 0.03)
    at, formula = model.passing([0], 63), [math.sqrt(1.01)] + [math.sqrt(1 + (0.1 * n) ** 2) for n in range(2, 65)]
    factor = [seconds / 0.01 * formula[0] / each for seconds, each in zip(at, formula, strict=True)]
    assert at[7] == pytest.approx(0.03, rel=0.02)
    assert 1 < factor[1] < factor[3] < factor[7]  # between the two
    assert factor[15] == pytest.approx(factor[7], rel=0.1) == pytest.approx(factor[63], rel=0.2)  # beyond them


def test_more_tokens_never_take_less() -> None:
    model, rng = CostModel(TokenCosts(0.05), (0.1,)), random.Random(2)
    for _ in range(200):
        tokens = rng.choice((1, 2, 5, 9, 17))
        model.add_pass(tokens, 0.01 if tokens != 5 else 0.02)
    passes = model.passing([0], 40)
    assert passes == sorted(passes) and passes[8] >= passes[4]


def test_any_number_of_tokens_has_a_cost() -> None:
    model = taught(STEEP)
    assert len(model.passing([0] * 16, 400)) == 401 and len(model.passing([0] * (MOST_TOKENS - 1), 5)) == 2
    model.add_pass(10 * MOST_TOKENS, 5.0)


def test_a_pass_that_waited_for_something_else_hardly_counts() -> None:
    model = taught(FLAT)
    before = model.passing([0], 8)
    model.add_pass(4, 100 * FLAT(4))
    assert model.passing([0], 8) == pytest.approx(before, rel=0.12)


@pytest.mark.parametrize(
    ("level", "first", "fixed"), [(0.003, 0.002, 0.001), (0.0006, 0.0, 0.0001), (0.012, 0.02, 0.004)]
)
def test_a_level_the_first_one_and_the_rest_of_a_draft_have_costs_of_their_own(level, first, fixed) -> None:
    """Passes take 60 ms, of which 5 % are assumed for a level."""
    model, rng = CostModel(TokenCosts(0.1), (0.05,)), random.Random(3)
    model.add_pass(1, FLAT(1))
    for _ in range(400):
        levels = rng.choice((0, 0, 1, 2, 4, 7))
        seconds = fixed + (first if levels else 0.0) + levels * level
        model.add_draft(0, [0], levels, seconds * noisy(rng))
    for levels in (0, 1, 4, 7):
        found = model.drafting([0]) + (model.first(0, [0]) if levels else 0.0) + levels * model.level(0, [0])
        assert found == pytest.approx(fixed + (first if levels else 0.0) + levels * level, rel=0.15, abs=2e-4)


def test_what_the_first_draft_makes_is_not_what_later_ones_cost() -> None:
    model = CostModel(TokenCosts(0.1), (0.1,))
    model.add_pass(1, 0.01)
    model.add_draft(0, [0], 4, 30.0)
    assert model.level(0, [0]) == pytest.approx(0.001)
    for _ in range(20):
        model.add_draft(0, [0], 4, 0.008)
    assert 0.001 < model.level(0, [0]) < 0.0025


def test_slow_first_drafts_do_not_make_deeper_ones_look_dear() -> None:
    """Also where one level alone is not drafted again."""
    model = CostModel(TokenCosts(0.1), [0.1])
    model.add_pass(1, 0.005)
    for seconds in 0.03, 0.0055, 0.0055:
        model.add_draft(0, [0], 1, seconds)
    for levels in [2, 3, 5] * 4:
        model.add_draft(0, [0], levels, 0.0005 + 0.0006 * levels)
    for levels in 1, 2, 4:
        drafting = model.drafting([0]) + model.first(0, [0]) + levels * model.level(0, [0])
        assert drafting == pytest.approx(0.0005 + 0.0006 * levels, rel=0.35)


def learned() -> AutoDepth:
    """A policy after some steps of 6.3 s, with drafts of 2 levels that take 2.6 s, half of which is accepted."""
    policy = AutoDepth(shares=(0.2,))
    row = policy.begin()
    for number in range(60):
        policy.choose([row], [99])
        policy.choice = policy.choice._replace(depths=[2])
        policy.observe(StepReport([row], [2], [number % 2], 3, 2.6, 6.3))
    return policy


def test_costs_and_acceptance_are_kept_for_the_next_process_and_corrected_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, drafter, policy = TransformersTarget(tiny_model()), PromptLookupDrafter(), learned()
    assert load(target, drafter) is None
    store(target, drafter, policy.costs())
    again = AutoDepth(shares=(0.2,), earlier=load(target, drafter))
    speed, *errors = policy.model.state  # errors count half
    assert again.model.known and again.model.state == pytest.approx([speed, *(e / 2 for e in errors)], abs=1e-3)
    formula = 0.2 * math.exp(speed)
    assert again.model.level(0, [0]) == pytest.approx(math.sqrt(formula * policy.model.level(0, [0])), rel=1e-3)
    for own, counts in zip(again.common.all_counts(), policy.common.all_counts(), strict=True):
        assert max(own.trials) <= COUNT_AFTER_CHANGE
        means = [[each.mean(n, 0.5, 1e-9) for n in range(len(each.hits))] for each in (own, counts)]
        assert means[0] == pytest.approx(means[1], abs=0.01)
    before = again.model.passing([0], 2)[2]
    for _ in range(40):
        again.model.add_pass(3, 2.0)
    assert before > 3 and again.model.passing([0], 2)[2] == pytest.approx(2.0, rel=0.1)


def test_a_file_of_something_else_or_of_another_machine_is_not_used(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    target, drafter = TransformersTarget(tiny_model()), PromptLookupDrafter()
    costs = Costs([0.5, 0.1], {"level 0 1": 0.2})
    store(target, drafter, costs)
    assert load(target, drafter) == costs and load(target, NoDrafter()) is None
    with monkeypatch.context() as other:
        other.setattr(torch, "get_num_threads", lambda: 99)
        assert load(target, drafter) is None
    [file] = (tmp_path / "costs").iterdir()
    data = json.loads(file.read_text())
    for bad in ("", "{", "[]", json.dumps(data | {"passes": ["much"]}), file.read_text().replace("0.5", "NaN")):
        file.write_text(bad)
        assert load(target, drafter) is None
    file.write_text(json.dumps({"passes": [9.0], "hits": [[1.0] * 99], "trials": [[]]}))  # of another size
    policy = AutoDepth(earlier=load(target, drafter))
    assert policy.choose([policy.begin()], [99]).depth >= 0 and len(policy.passes) > 8


def test_a_cache_that_cannot_be_written_only_makes_the_next_process_begin_anew(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    target = TransformersTarget(tiny_model())
    store(target, NoDrafter(), Costs([1.0]))
    assert load(target, NoDrafter()) is None


def test_what_requests_find_out_is_kept_at_most_once_a_minute(llama: PreTrainedModel, monkeypatch) -> None:
    found = list[Costs]()
    monkeypatch.setattr(cost_cache, "store", lambda target, drafter, costs: found.append(costs))
    decoder = SpecDecoder(llama, None, drafter="prompt-lookup")
    for _ in range(3):
        decoder.generate([5, 6, 5, 6, 5], max_new_tokens=8)
    assert len(found) == 1 and found[0].passes
    monkeypatch.setattr("specdec.api.decoder.KEEP_EVERY", 0.0)
    decoder.generate([5, 6, 5, 6, 5], max_new_tokens=8)
    assert len(found) == 2


@pytest.mark.parametrize("drafter", ["prompt-lookup", "ngram", "m2r2"])
def test_no_request_waits_for_a_measurement(llama: PreTrainedModel, drafter: str, monkeypatch) -> None:
    """The first one runs a pass for its prompt, and one for each step."""
    passes = noted(monkeypatch, TransformersTarget, "greedy_tokens", lambda *given: None)
    decoder = SpecDecoder(llama, None, drafter=drafter, runtime="transformers", learn=False)
    out = decoder.generate([5, 6, 5, 6, 5], max_new_tokens=12)
    assert len(passes) == 1 + out.metrics.num_spec_steps


def test_a_draft_of_other_rows_costs_what_the_nearest_known_number_of_rows_says() -> None:
    model = CostModel(TokenCosts(0.1), [0.1])
    for _ in range(4):
        model.add_pass(1, 0.01)
    for rows, seconds in ((1, 0.001), (16, 0.008)) * 20:
        model.add_draft(0, [0] * rows, 0, seconds)
    assert model.drafting([0] * 15) == pytest.approx(0.008, rel=0.1)
    assert model.drafting([0] * 2) == pytest.approx(0.001, rel=0.1)
    again = CostModel(TokenCosts(0.1), [0.1], model.kept())
    formula = model.drafting([0]) / math.exp(model.kept().others["draft 0 1"])
    assert again.drafting([0] * 15) == pytest.approx(math.sqrt(formula * model.drafting([0] * 15)), rel=0.01)


def test_a_pass_of_a_long_context_costs_more_and_so_does_each_of_its_tokens() -> None:
    token = TokenCosts(0.1, read=1e-4, attend=2e-5)
    model, rng = CostModel(token, (0.1,)), random.Random(4)

    def cost(tokens: int, cached: int) -> float:
        return 0.02 * math.hypot(1 + 1e-4 * cached, tokens * (0.1 + 2e-5 * cached))

    for step in range(300):
        tokens, cached = rng.randint(1, 8), 100 if step % 2 else 16_000
        model.add_pass(tokens, cost(tokens, cached) * noisy(rng), cached, tokens * cached)
    for cached in (100, 4_000, 16_000):  # the one in the middle was never seen
        true = [cost(tokens, cached) for tokens in range(1, 9)]
        assert model.passing([cached], 7) == pytest.approx(true, rel=0.2)
    level = [model.level(0, [cached]) for cached in (0, 100, NEAR, 16_000)]
    assert level[0] < level[1] < level[2] == level[3]  # a level attends to the nearest tokens alone


def test_a_row_with_a_long_context_drafts_less_than_its_neighbour() -> None:
    policy = AutoDepth(True, 1, token=TokenCosts(0.1, read=3e-5, attend=2e-5))
    policy.observe(StepReport([policy.begin()], [0], [0], 1, 0.0, 0.02))
    rows = [policy.begin(), policy.begin()]
    for contexts in ([100, 16_000], [16_000, 100]):
        prices = policy.choose(rows, [8, 8], contexts).prices
        assert prices is not None and prices.beyond[contexts.index(100)] == 0 < prices.beyond[contexts.index(16_000)]
        likely = [Candidates([math.log(0.5 * 0.9**n) for n in range(6)], [*range(6)], [*range(6)], [[0.5] * 6])] * 2
        taken = [len(own.tokens) for own in worth_scoring(likely, 6, None, prices)]
        assert taken[contexts.index(100)] > taken[contexts.index(16_000)]


@pytest.mark.parametrize(("share", "delay"), [(0.05, 0.004), (0.3, 0.02), (0.5, 0.02), (0.3, 0.1)])
def test_drafts_that_wait_for_other_programs_leave_sane_costs(share: float, delay: float) -> None:
    """Levels that look much dearer than they are would not be tried again."""
    for seed in range(4):
        model, rng = taught(FLAT), random.Random(seed)
        for _ in range(1500):
            levels = rng.randint(0, 4)
            seconds = (0.0002 + 0.0008 * (levels > 0) + 0.0004 * levels) * noisy(rng)
            waited = rng.expovariate(1 / delay) if rng.random() < share else 0.0
            model.add_draft(0, [0], levels, seconds + waited)
        for _ in range(150):  # the machine is quiet again
            levels = rng.randint(1, 4)
            model.add_draft(0, [0], levels, (0.001 + 0.0004 * levels) * noisy(rng))
        expected = model.drafting([0]) + model.first(0, [0]) + 2 * model.level(0, [0])
        assert 0.0009 < expected < 0.0036


def test_impossible_costs_of_an_earlier_process_are_bounded() -> None:
    model = CostModel(TokenCosts(0.1), (0.1,), Costs([0.0], {"first 0 1": 712.0, "level 0 1": -712.0}))
    assert model.first(0, [0]) < 60 and model.level(0, [0]) > 0.001
