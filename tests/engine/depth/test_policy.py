"""Automatic depth, against scripted machines and drafters: it finds the best depth and never loses much."""

from __future__ import annotations

import random

import pytest

from specdec.engine.depth import MAX_DEPTH, AutoDepth, Costs, DepthChoice, RowHistory, StepReport
from specdec.speculation.trees import MOST_NODES, Prices

SCORE = {1: 20.0, 2: 21.0, 4: 22.0, 8: 24.0, 16: 40.0}
Known = tuple[tuple[float, float], ...]  # of each position: share of acceptance, and observations


class OneRow(AutoDepth):
    """The policy, for one request after the other."""

    def begin(self) -> RowHistory:
        self.row = super().begin()
        return self.row

    def next(self) -> DepthChoice:
        return self.choose([self.row])

    def took(self, drafted: int, accepted: int, scored: int, draft: float, rest: float) -> None:
        self.observe(StepReport([self.row], [drafted], [accepted], scored, draft, rest))


def policy_of(
    *drafts: tuple[float, float],
    score: dict[int, float] | None = None,
    known: Known = (),
    has_probabilities: bool = False,
) -> OneRow:
    policy = OneRow(Costs(score or SCORE, drafts, (known,) * len(drafts) if known else ()), has_probabilities)
    policy.begin()
    return policy


def seconds(rows: int) -> float:
    """What scoring takes, whatever the policy was given."""
    return Costs(SCORE, ()).scoring(rows)


def simulate(
    acceptance: float,
    draft: float,
    tokens: int,
    rng: random.Random,
    policy: OneRow,
    noise: float = 0.1,
    width: int = 1,
    behind: float = 0.0,
    fills: bool = False,
    first: float = 0.0,
) -> tuple[float, list[int]]:
    """Milliseconds for ``tokens`` tokens, and the depths chosen. A tree scores ``width`` tokens at each depth.

    fills: it takes all nodes that one token in 30 is worth; they add nothing.
    first: what the first drafted token takes beyond the others.
    behind: what a drafter with a cache of its own takes to catch up, per plain round since its last draft.
    """
    done, total, depths, since = 0, 0.0, [], 0
    while done < tokens:
        choice = policy.next()
        depth = choice.depth
        rows = 1 + depth * width
        if fills and choice.prices is not None:
            rows = 1 + choice.prices.take([1.0] * depth + [0.03] * MOST_NODES, least=depth)
        accepted = 0
        while accepted < depth and rng.random() < acceptance:
            accepted += 1
        spent = (draft * depth + (first + behind * since if depth else 0.0)) * rng.uniform(1 - noise, 1 + noise)
        since = 0 if depth else since + 1
        rest = seconds(rows) * rng.uniform(1 - noise, 1 + noise)
        policy.took(depth, accepted, rows, spent, rest)
        done, total = done + accepted + 1, total + spent + rest
        depths.append(depth)
    return total, depths


def fixed(acceptance: float, draft: float, depth: int) -> float:
    """Milliseconds per token at a fixed depth, in expectation."""
    expected = sum(acceptance**i for i in range(depth + 1))
    return (draft * depth + seconds(1 + depth)) / expected


@pytest.mark.parametrize("draft", [0.05, 3.0, 8.0, 15.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.7, 0.95])
def test_the_policy_is_close_to_the_best_fixed_depth_and_never_far_below_plain(acceptance: float, draft: float) -> None:
    rng = random.Random(int(100 * acceptance + 7 * draft))
    policy, tokens = policy_of((draft, draft)), 1500
    total, _ = simulate(acceptance, draft, tokens, rng, policy)
    best = min(fixed(acceptance, draft, k) for k in range(MAX_DEPTH + 1))
    assert total / tokens <= best * 1.06
    assert simulate(acceptance, draft, tokens, rng, policy)[0] / tokens <= best / 0.95
    assert total / tokens <= fixed(acceptance, draft, 0) / 0.97


@pytest.mark.parametrize("draft", [0.1, 2.0, 8.0, 30.0])
def test_a_useless_drafter_is_dropped_within_a_short_request(draft: float) -> None:
    policy = policy_of((draft, draft))
    total, _ = simulate(0.0, draft, 128, random.Random(1), policy, noise=0.0)
    assert 128 * SCORE[1] / total >= 0.97  # although a first request still has to find out
    again, _ = simulate(0.0, draft, 1280, random.Random(2), policy, noise=0.0)
    assert 1280 * SCORE[1] / again >= 0.985


@pytest.mark.parametrize("wrong", [0.1, 10.0])
@pytest.mark.parametrize("draft", [0.5, 6.0])
def test_wrong_figures_cost_little_and_once(draft: float, wrong: float) -> None:
    policy = policy_of((wrong * draft, wrong * draft))
    total, _ = simulate(0.0, draft, 128, random.Random(1), policy, noise=0.0)
    again, _ = simulate(0.0, draft, 1280, random.Random(2), policy, noise=0.0)
    assert 128 * SCORE[1] / total >= 0.93 and 1280 * SCORE[1] / again >= 0.985


@pytest.mark.parametrize("draft", [1.0, 4.0])
def test_a_draft_model_that_has_to_catch_up_is_probed_less(draft: float) -> None:
    """What a probe really took counts, not what a draft usually does."""
    policy = policy_of((draft, draft), known=((0.1, 9.0),) * 4)
    simulate(0.1, draft, 400, random.Random(3), policy, behind=0.1 * draft)
    total, _ = simulate(0.1, draft, 2000, random.Random(4), policy, noise=0.0, behind=0.1 * draft)
    assert 2000 * SCORE[1] / total >= 0.975


def test_a_drafter_that_is_good_and_useless_in_turns_never_costs_three_percent() -> None:
    for span in (10, 40, 160):
        policy, total = policy_of((3.0, 3.0)), 0.0
        for turn in range(24):
            total += simulate(0.9 * (turn % 2), 3.0, span, random.Random(turn), policy, noise=0.0)[0]
        assert 24 * span * SCORE[1] / total >= 0.97


def test_every_token_of_a_tree_counts_not_only_its_depth() -> None:
    """One token of 30 % is worth a chain's step (21 ms for 1.3 tokens), not that of a tree of nine (28 ms)."""
    chain, tree = policy_of((0.0, 0.0)), policy_of((0.0, 0.0))
    _, depths = simulate(0.3, 0.0, 400, random.Random(5), chain, noise=0.0)
    assert depths[-50:].count(0) <= 2  # probes of plain decoding
    _, depths = simulate(0.3, 0.0, 400, random.Random(5), tree, noise=0.0, width=9)
    assert depths[-50:].count(0) > 40


@pytest.mark.parametrize("draft", [1.0, 3.0, 4.0])
def test_nodes_that_pay_do_not_make_deeper_drafts_look_expensive(draft: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them are worth scoring beside a short chain than beside a long one."""
    monkeypatch.setitem(globals(), "SCORE", {1: 20.0, 2: 20.0, 4: 20.0, 8: 21.0, 16: 40.0})
    mean = {}
    for fills in (False, True):
        policy = policy_of((draft, draft))
        simulate(0.8, draft, 200, random.Random(6), policy, fills=fills)
        _, depths = simulate(0.8, draft, 800, random.Random(6), policy, fills=fills)
        mean[fills] = sum(depths) / len(depths)
    assert abs(mean[True] - mean[False]) < 0.4


def test_a_useless_drafter_that_becomes_good_is_noticed_and_the_reverse() -> None:
    rng, policy = random.Random(3), policy_of((2.0, 2.0))
    _, bad = simulate(0.0, 2.0, 600, rng, policy)
    assert sum(bad[-100:]) <= 20
    _, good = simulate(0.9, 2.0, 3000, rng, policy)
    assert sorted(good[-50:])[2] >= 4  # one or two may be probes of plain decoding
    _, worse = simulate(0.0, 2.0, 600, rng, policy)
    assert sum(worse[-100:]) <= 20


def test_a_single_slow_step_does_not_end_speculation() -> None:
    policy = policy_of((2.0, 2.0))
    simulate(0.7, 2.0, 300, random.Random(4), policy)
    before = policy.next().depth
    policy.took(before, before, 1 + before, 2.0 * before, 5000.0)
    assert policy.next().depth >= before - 1


def prices_of(policy: OneRow) -> Prices:
    prices = policy.next().prices
    assert prices is not None
    return prices


def test_price_of_a_level_rises_with_the_cost_of_drafting() -> None:
    thresholds = []
    for draft in (0.5, 2.0, 5.0):
        policy = policy_of((draft, draft))
        simulate(0.7, draft, 300, random.Random(5), policy)
        thresholds.append(prices_of(policy).level)
    assert 0 < thresholds[0] < thresholds[1] < thresholds[2]


def test_a_wrong_figure_for_drafting_is_corrected_by_what_steps_take() -> None:
    policy = policy_of((0.01, 0.01))
    _, depths = simulate(0.5, 15.0, 600, random.Random(6), policy)
    assert depths[0] > 0 and sum(depths[-100:]) <= 20


@pytest.mark.parametrize(("busy", "slow"), [(12.0, 36.0), (1.0, 36.0), (12.0, 1.0), (0.3, 3.0)])
def test_figures_of_a_busy_machine_are_corrected_and_speculation_comes_back(busy: float, slow: float) -> None:
    """The table has scoring ``busy`` times and drafting ``slow`` times too expensive."""
    rng, policy = random.Random(11), policy_of((2.0 * slow, 2.0 * slow), score={n: busy * s for n, s in SCORE.items()})
    simulate(0.7, 2.0, 400, rng, policy)
    total, depths = simulate(0.7, 2.0, 600, rng, policy)
    assert depths[-100:].count(0) <= 4  # probes
    assert total / 600 <= 1.08 * min(fixed(0.7, 2.0, k) for k in range(MAX_DEPTH + 1))
    assert policy.costs().drafts[0][0] == pytest.approx(2.0, rel=0.2)
    assert policy.costs().score[1] == pytest.approx(SCORE[1], rel=0.2)


def test_a_machine_that_becomes_slow_slows_both_sides_and_changes_nothing() -> None:
    """Three times slower for a while, drafting and scoring alike: the depth that was best still is."""
    policy = policy_of((2.0, 2.0))
    simulate(0.7, 2.0, 300, random.Random(4), policy)
    before = policy.next().depth
    for _ in range(40):
        policy.took(before, before, 1 + before, 6.0 * before, 3 * seconds(1 + before))
        assert policy.next().depth >= before - 1


@pytest.mark.parametrize("draft", [0.5, 3.0, 8.0, 20.0, 60.0])
def test_a_drafter_of_random_tokens_never_costs_three_percent(draft: float) -> None:
    """First request included, once the policy has met the drafter before; costs in any order of magnitude."""
    policy = policy_of((draft, draft), known=((0.0, 9.0),) * 4)
    for seed in range(4):
        total, _ = simulate(0.0, draft, 128, random.Random(seed), policy, noise=0.0)
        assert 128 * SCORE[1] / total >= 0.97


def test_an_adversary_whose_first_drafts_are_accepted_and_no_later_one_is_bounded() -> None:
    policy, total, done, tries = policy_of((3.0, 3.0)), 0.0, 0, 0
    while done < 3000:
        depth = policy.next().depth
        tries += depth > 0
        accepted = depth if tries <= 6 else 0
        total += 3.0 * depth + seconds(1 + depth)
        policy.took(depth, accepted, 1 + depth, 3.0 * depth, seconds(1 + depth))
        done += 1 + accepted
    assert done * SCORE[1] / total >= 0.97


def test_what_was_learned_about_a_drafter_begins_the_next_policy() -> None:
    policy = policy_of((2.0, 2.0))
    assert policy.costs() == Costs(SCORE, ((2.0, 2.0),), ((),))
    simulate(0.7, 2.0, 600, random.Random(9), policy)
    (known,) = policy.costs().yields
    assert known and all(share == pytest.approx(0.7, abs=0.3) for share, seen in known if seen >= 9)
    again = OneRow(policy.costs())
    again.begin()
    policy.begin()
    assert again.next().depth == policy.next().depth


def test_large_batches_make_deep_drafts_expensive() -> None:
    policy = policy_of((1.0, 1.0))
    simulate(0.7, 1.0, 600, random.Random(8), policy)
    assert policy.choose([policy.row] * 16).depth < policy.next().depth


def test_nodes_are_cheap_where_scoring_is_flat() -> None:
    flat = policy_of((2.0, 2.0), score={1: 20.0, 2: 20.2, 4: 20.4, 8: 20.8, 16: 22.0})
    steep = policy_of((0.2, 0.2), score={1: 10.0, 2: 12.0, 4: 14.0, 8: 20.0, 16: 40.0})
    unlikely = [0.05] * MOST_NODES
    many, few = (prices_of(policy).take(unlikely) for policy in (flat, steep))
    assert many >= 15 and few == 0


def test_drafts_that_cost_nothing_leave_the_cost_of_others_alone_and_make_drafting_worth_it() -> None:
    policy = policy_of((0.5, 0.5), (8.0, 8.0), has_probabilities=True)
    for _ in range(30):  # deep drafts that fail
        prices = Prices([0.0] * 25, levels=6)
        prices.take([0.1] * 6)
        policy.choice = DepthChoice(12, 1, prices)
        policy.took(6, 0, 7, 48.0, seconds(7))
    before = policy.costs()
    policy.budget.elapsed = 0.0
    assert policy.next().depth == 0
    for _ in range(60):
        prices = Prices([0.0] * 25, levels=0)
        prices.take([0.9] * 4)
        policy.choice = DepthChoice(12, 1, prices)
        policy.took(4, 4, 5, 0.01, seconds(5))
    assert policy.costs().drafts[1] == before.drafts[1]
    policy.hold, policy.budget.elapsed = 0, 0.0
    choice = policy.next()
    assert choice.depth and choice.exit is None


def test_of_two_sources_the_learned_one_is_probed_where_it_yields_nothing() -> None:
    policy, pays = policy_of((0.5, 0.5), (8.0, 2.0), has_probabilities=True), list[bool]()
    for _ in range(400):
        choice = policy.next()
        learned = choice.exit == 1
        prices = choice.prices or Prices([0.0] * 25)
        learned |= prices.learned_pays([0.5, 0.25, 0.1], 3, 1)
        prices.levels = int(learned)
        prices.take([0.9] * 4)
        pays.append(learned)
        policy.took(4, 1, 5, 8.0 if learned else 0.5, seconds(5))
    assert any(pays[:20]) and 0 < sum(pays[100:]) < 20


def test_a_draft_deeper_than_planned_raises_no_expectation() -> None:
    policy = policy_of((0.5, 0.5), (8.0, 2.0), has_probabilities=True)
    for _ in range(30):
        prices = Prices([0.0] * 25, level=0.5, levels=6)
        prices.learned_pays([0.2], 1, 1)  # one level is planned
        prices.take([0.9] * 6)
        policy.choice = DepthChoice(12, 1, prices)
        policy.took(6, 6, 7, 8.0, seconds(7))
    choice = policy.next()
    assert choice.prices is not None and choice.prices.trust == 1


def simulate_tree(
    tokens: int, rng: random.Random, policy: OneRow, draft: float, sure: tuple[float, ...], power: float = 1.0
) -> tuple[float, list[int]]:
    """Milliseconds for ``tokens`` tokens, and the levels drafted, of a drafter that knows how sure it is.

    A step is easy or hard: its tokens are right with one of ``sure``. The drafter says p ** (1 / power) for p.
    """
    done, total, drafted = 0, 0.0, list[int]()
    while done < tokens:
        choice, right, levels, reach, accepted, rows = policy.next(), rng.choice(sure), 0, 1.0, 0, 1
        if choice.depth and (prices := choice.prices) is not None:
            reaches = list[float]()
            while levels < choice.depth:
                levels, reach = levels + 1, reach * right
                reaches.append(reach ** (1 / power))
                if not prices.pays([reaches[-1] ** prices.exponent]):
                    break
            prices.levels = levels
            count = prices.take([said**prices.exponent for said in reaches])
            rows += count
            while accepted < count and rng.random() < right:
                accepted += 1
        policy.took(rows - 1, accepted, rows, draft * levels, seconds(rows))
        done, total = done + accepted + 1, total + draft * levels + seconds(rows)
        drafted.append(levels)
    return total, drafted


@pytest.mark.parametrize("draft", [0.5, 2.0, 5.0])
def test_a_drafter_that_knows_how_sure_it_is_beats_every_fixed_depth(draft: float) -> None:
    """Half the steps are easy, half are hard: long drafts pay in the first ones alone."""
    sure, policy = (0.95, 0.2), policy_of((draft, draft), has_probabilities=True)
    simulate_tree(2000, random.Random(1), policy, draft, sure)
    total, _ = simulate_tree(4000, random.Random(2), policy, draft, sure)

    def rate(depth: int) -> float:
        expected = sum(sum(right**i for i in range(depth + 1)) for right in sure) / len(sure)
        return expected / (draft * depth + seconds(1 + depth))

    assert 4000 / total > 1.02 * max(rate(depth) for depth in range(MAX_DEPTH + 1))


@pytest.mark.parametrize("power", [0.6, 1.0, 2.0])
def test_probabilities_are_corrected_by_what_is_accepted(power: float) -> None:
    policy = policy_of((1.0, 1.0), has_probabilities=True)
    simulate_tree(6000, random.Random(3), policy, 1.0, (0.9, 0.5), power)
    assert policy.model.exponents[0] == pytest.approx(power, rel=0.35)


@pytest.mark.parametrize("draft", [0.5, 3.0, 8.0, 20.0])
def test_a_drafter_that_is_sure_and_wrong_never_costs_three_percent(draft: float) -> None:
    for known in ((), ((0.0, 9.0),) * 4):
        policy, total = policy_of((draft, draft), known=known, has_probabilities=True), 0.0
        for _ in range(4):
            policy.begin()
            done = 0
            while done < 256:
                choice = policy.next()
                rows = 1
                if choice.depth and choice.prices is not None:
                    rows += choice.prices.take([0.9**i for i in range(1, 1 + choice.depth)])
                spent = draft * (rows - 1)
                policy.took(rows - 1, 0, rows, spent, seconds(rows))
                total, done = total + spent + seconds(rows), done + 1
        assert 4 * 256 * SCORE[1] / total >= 0.97


def simulate_rows(acceptance: list[float], steps: int, rng: random.Random, policy: OneRow) -> tuple[float, float]:
    """Tokens per millisecond of rows that decode together, over that of plain decoding, and the mean drafted depth.

    A level costs the same for one row as for all.
    """
    rows, total, tokens, drafted = [policy.begin() for _ in acceptance], 0.0, 0, 0
    for _ in range(steps):
        choice = policy.choose(rows)
        depths = list(choice.depths or [choice.depth] * len(rows))
        accepted = [
            next((i for i in range(d) if rng.random() >= p), d) for d, p in zip(depths, acceptance, strict=True)
        ]
        scored, draft = len(rows) + sum(depths), 3.0 * max(depths)
        policy.observe(StepReport(rows, depths, accepted, scored, draft, seconds(scored)))
        total += draft + seconds(scored)
        tokens, drafted = tokens + len(rows) + sum(accepted), drafted + sum(depths)
    return tokens / total / (len(rows) / seconds(len(rows))), drafted / steps / len(rows)


def test_rows_find_out_together_that_drafting_pays_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one row alone a level would not pay, and each has seen few drafts of its own."""
    monkeypatch.setitem(globals(), "SCORE", {1: 20.0, 8: 24.0, 16: 28.0, 17: 40.0, 32: 44.0})
    for seed in range(6):
        policy = policy_of((3.0, 3.0), known=((0.1, 40.0),))
        simulate_rows([0.6] * 8, 400, random.Random(seed), policy)
        speed, depth = simulate_rows([0.6] * 8, 200, random.Random(seed), policy)
        assert speed > 1.15 and depth > 0.8


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_rows_whose_drafts_fail_lose_little_together(rows: int) -> None:
    for seed in range(4):
        policy = policy_of((3.0, 3.0), known=((0.6, 40.0),))
        simulate_rows([0.02] * rows, 100, random.Random(seed), policy)
        assert simulate_rows([0.02] * rows, 200, random.Random(seed), policy)[0] > 0.97


Exits = list[tuple[float, float]]  # of each: acceptance, and milliseconds of drafting one token


def simulate_exits(exits: Exits, tokens: int, seed: int, policy: OneRow) -> tuple[float, list[tuple[int, int]]]:
    """Milliseconds for ``tokens`` tokens, and the exit and depth of every step."""
    rng, total, done, steps = random.Random(seed), 0.0, 0, list[tuple[int, int]]()
    while done < tokens:
        depth, exit, *_ = policy.next()
        acceptance, draft = exits[exit or 0]
        accepted = 0
        while accepted < depth and rng.random() < acceptance:
            accepted += 1
        policy.took(depth, accepted, 1 + depth, draft * depth, seconds(1 + depth))
        total, done = total + draft * depth + seconds(1 + depth), done + accepted + 1
        steps.append((exit or 0, depth))
    return total, steps


@pytest.mark.parametrize(
    "exits",
    [
        [(0.2, 1.0), (0.8, 3.0), (0.85, 9.0)],  # the middle one is worth its time
        [(0.7, 1.0), (0.75, 6.0), (0.8, 12.0)],  # the first
        [(0.05, 2.0), (0.1, 4.0), (0.95, 6.0)],  # the last
        [(0.05, 4.0), (0.1, 8.0), (0.2, 12.0)],  # none
        [(0.0, 0.5), (0.0, 0.5), (0.0, 0.5)],
    ],
)
def test_the_exit_that_pays_is_found_and_little_is_lost_on_the_way(exits: Exits) -> None:
    policy = policy_of(*[(draft, draft) for _, draft in exits])
    simulate_exits(exits, 300, 1, policy)
    total, _ = simulate_exits(exits, 1500, 2, policy)
    best = min(fixed(a, d, k) for a, d in exits for k in range(MAX_DEPTH + 1))
    assert total / 1500 <= 1.07 * best


def test_unlucky_first_drafts_do_not_end_an_exit_for_good() -> None:
    """The better exit fails whenever it is tried at first, and is found in spite of that, at a bounded price."""
    policy = policy_of((2.0, 2.0), (2.5, 2.5))
    simulate_exits([(0.6, 2.0), (0.0, 2.5)], 200, 1, policy)
    _, steps = simulate_exits([(0.6, 2.0), (0.9, 2.5)], 3000, 2, policy)
    assert [exit for exit, _ in steps[-100:]].count(1) > 80


def test_a_request_with_exits_none_of_which_pays_loses_under_three_percent() -> None:
    for seed in range(4):
        policy = policy_of((1.0, 1.0), (4.0, 4.0), (8.0, 8.0))
        total, _ = simulate_exits([(0.0, 1.0), (0.0, 4.0), (0.0, 8.0)], 128, seed, policy)
        assert 128 * SCORE[1] / total >= 0.97


def test_a_text_that_suits_no_draft_does_not_spoil_the_next_request() -> None:
    """Requests differ: each begins with what all had in common, and finds out about itself."""
    policy, total, done = policy_of((3.0, 2.0)), 0.0, 0
    for seed in range(24):
        policy.begin()
        spent, depths = simulate(0.8 if seed % 2 else 0.2, 2.0, 128, random.Random(seed), policy, noise=0.0)
        total, done = total + spent, done + 128
        if seed % 2 and seed > 2:
            assert sum(depth > 0 for depth in depths) > 0.8 * len(depths)
    useless = policy_of((3.0, 2.0), known=((0.02, 60.0),) * 2)
    for seed in range(4):
        useless.begin()
        total, _ = simulate(0.0, 2.0, 128, random.Random(seed), useless, noise=0.0)
        assert 128 * SCORE[1] / total >= 0.98


def test_a_first_drafted_token_that_costs_more_than_further_ones_makes_drafts_deeper() -> None:
    depths = []
    for first, further in ((5.0, 5.0), (9.0, 1.0)):
        policy = policy_of((first, further))
        simulate(0.7, further, 400, random.Random(2), policy, noise=0.0, first=first - further)
        depths.append(sorted(policy.next().depth for _ in range(9))[4])  # one may be a probe
    assert depths[1] > depths[0]


def test_most_plain_steps_take_no_decision() -> None:
    policy, decisions = policy_of((4.0, 4.0)), 0
    simulate(0.0, 4.0, 200, random.Random(1), policy)
    for _ in range(300):
        decisions += policy.hold == 0
        depth = policy.next().depth
        policy.took(depth, 0, 1 + depth, 4.0 * depth, seconds(1 + depth))
    assert decisions <= 60


@pytest.mark.parametrize("draft", [0.5, 2.0])
def test_a_drafter_that_changes_is_judged_anew_and_one_that_stays_bad_costs_little(draft: float) -> None:
    speeds = []
    for forgets in (False, True):
        policy, total = policy_of((draft, draft), has_probabilities=True), 0.0
        for part in range(20):
            total += simulate_tree(60, random.Random(part), policy, draft, (0.1, 0.2))[0]
            if forgets:
                policy.forget()
        assert 1200 * SCORE[1] / total >= 0.97
        speeds.append(simulate_tree(300, random.Random(1), policy, draft, (0.85, 0.95))[0])
    assert speeds[1] < speeds[0]
