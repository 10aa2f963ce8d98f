"""The depth controller, against scripted machines and drafters: it finds the best depth and never loses much."""

from __future__ import annotations

import random

import pytest

from specdec.depth import AutoDepth

SCORE = {1: 20.0, 2: 21.0, 4: 22.0, 8: 24.0, 16: 40.0}


def simulate(
    acceptance: float,
    draft: float,
    tokens: int,
    rng: random.Random,
    policy: AutoDepth,
    noise: float = 0.1,
    width: int = 1,
    behind: float = 0.0,
    fills: bool = False,
) -> tuple[float, list[int]]:
    """Milliseconds for ``tokens`` tokens, and the depths chosen. A tree scores ``width`` tokens at each depth.

    fills: it adds as many siblings as there is room for; they add nothing.
    behind: what a drafter with a cache of its own takes to catch up, per plain round since its last draft.
    """
    done, total, depths, since = 0, 0.0, [], 0
    true = AutoDepth(SCORE, [(0.0, 0.0)])  # what the machine takes, whatever the policy was told
    while done < tokens:
        depth = policy.depth(1)
        rows = 1 + depth * width + (policy.spare(1, depth) if fills else 0)
        accepted = 0
        while accepted < depth and rng.random() < acceptance:
            accepted += 1
        spent = (draft * depth + (behind * since if depth else 0.0)) * rng.uniform(1 - noise, 1 + noise)
        since = 0 if depth else since + 1
        rest = true.seconds(rows) * rng.uniform(1 - noise, 1 + noise)
        policy.observe([depth], [accepted], rows, spent, rest)
        done, total = done + accepted + 1, total + spent + rest
        depths.append(depth)
    return total, depths


def fixed(acceptance: float, draft: float, depth: int) -> float:
    """Milliseconds per token at a fixed depth, in expectation."""
    expected = sum(acceptance**i for i in range(depth + 1))
    return (draft * depth + AutoDepth(SCORE, [(0.0, 0.0)]).seconds(1 + depth)) / expected


@pytest.mark.parametrize("draft", [0.05, 3.0, 8.0, 15.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.7, 0.95])
def test_it_is_close_to_the_best_fixed_depth_and_never_far_below_plain(acceptance: float, draft: float) -> None:
    rng = random.Random(int(100 * acceptance + 7 * draft))
    policy, tokens = AutoDepth(SCORE, [(draft, draft)]), 1500
    total, _ = simulate(acceptance, draft, tokens, rng, policy)
    best = min(fixed(acceptance, draft, k) for k in range(AutoDepth.MOST + 1))
    assert total / tokens <= best * 1.06
    assert total / tokens <= fixed(acceptance, draft, 0) / 0.97


@pytest.mark.parametrize("draft", [0.1, 2.0, 8.0, 30.0])
def test_it_drops_a_useless_drafter_within_a_short_request(draft: float) -> None:
    policy = AutoDepth(SCORE, [(draft, draft)])
    total, _ = simulate(0.0, draft, 128, random.Random(1), policy, noise=0.0)
    assert 128 * SCORE[1] / total >= 0.97  # although a first request still has to find out
    again, _ = simulate(0.0, draft, 1280, random.Random(2), policy, noise=0.0)
    assert 1280 * SCORE[1] / again >= 0.985


@pytest.mark.parametrize("told", [0.1, 10.0])
@pytest.mark.parametrize("draft", [0.5, 6.0])
def test_wrong_figures_cost_little_and_once(draft: float, told: float) -> None:
    policy = AutoDepth(SCORE, [(told * draft, told * draft)])
    total, _ = simulate(0.0, draft, 128, random.Random(1), policy, noise=0.0)
    again, _ = simulate(0.0, draft, 1280, random.Random(2), policy, noise=0.0)
    assert 128 * SCORE[1] / total >= 0.93 and 1280 * SCORE[1] / again >= 0.985


@pytest.mark.parametrize("draft", [1.0, 4.0])
def test_a_draft_model_that_has_to_catch_up_is_asked_the_less(draft: float) -> None:
    """What a probe really took counts, not what a draft usually does."""
    policy = AutoDepth(SCORE, [(draft, draft)], accepted=[[(0.1, 9.0)] * 4])
    simulate(0.1, draft, 400, random.Random(3), policy, behind=0.1 * draft)
    total, _ = simulate(0.1, draft, 2000, random.Random(4), policy, noise=0.0, behind=0.1 * draft)
    assert 2000 * SCORE[1] / total >= 0.975


def test_a_drafter_that_is_good_and_useless_in_turns_never_costs_three_percent() -> None:
    for span in (10, 40, 160):
        policy, total = AutoDepth(SCORE, [(3.0, 3.0)]), 0.0
        for turn in range(24):
            total += simulate(0.9 * (turn % 2), 3.0, span, random.Random(turn), policy, noise=0.0)[0]
        assert 24 * span * SCORE[1] / total >= 0.97


def test_it_counts_every_token_of_a_tree_not_only_its_depth() -> None:
    """One token of 30 % is worth a chain's round (21 ms for 1.3 tokens), not that of a tree of nine (28 ms)."""
    chain, tree = AutoDepth(SCORE, [(0.0, 0.0)]), AutoDepth(SCORE, [(0.0, 0.0)])
    _, depths = simulate(0.3, 0.0, 400, random.Random(5), chain, noise=0.0)
    assert depths[-50:].count(0) == 0
    _, depths = simulate(0.3, 0.0, 400, random.Random(5), tree, noise=0.0, width=9)
    assert depths[-50:].count(0) > 40


@pytest.mark.parametrize("draft", [1.0, 3.0, 4.0])
def test_siblings_do_not_make_deeper_drafts_look_dear(draft: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for more of them beside a short chain than beside a long one."""
    monkeypatch.setitem(globals(), "SCORE", {1: 20.0, 2: 20.0, 4: 20.0, 8: 21.0, 16: 40.0})
    mean = {}
    for fills in (False, True):
        policy = AutoDepth(SCORE, [(draft, draft)])
        simulate(0.8, draft, 200, random.Random(6), policy, fills=fills)
        _, depths = simulate(0.8, draft, 800, random.Random(6), policy, fills=fills)
        mean[fills] = sum(depths) / len(depths)
    assert abs(mean[True] - mean[False]) < 0.4


def test_it_notices_when_a_useless_drafter_becomes_good_and_the_reverse() -> None:
    rng, policy = random.Random(3), AutoDepth(SCORE, [(2.0, 2.0)])
    _, bad = simulate(0.0, 2.0, 600, rng, policy)
    assert sum(bad[-100:]) <= 20
    _, good = simulate(0.9, 2.0, 3000, rng, policy)
    assert min(good[-50:]) >= 4
    _, worse = simulate(0.0, 2.0, 600, rng, policy)
    assert sum(worse[-100:]) <= 20


def test_a_single_slow_round_does_not_end_speculation() -> None:
    policy = AutoDepth(SCORE, [(2.0, 2.0)])
    simulate(0.7, 2.0, 300, random.Random(4), policy)
    before = policy.depth(1)
    policy.observe([before], [before], 1 + before, 2.0 * before, 5000.0)
    assert policy.depth(1) >= before - 1


def test_confidence_threshold_rises_with_the_cost_of_drafting() -> None:
    thresholds = []
    for draft in (0.5, 4.0, 10.0):
        policy = AutoDepth(SCORE, [(draft, draft)])
        simulate(0.7, draft, 300, random.Random(5), policy)
        thresholds.append(policy.confidence())
    assert 0 < thresholds[0] < thresholds[1] < thresholds[2] <= 1


def test_a_wrong_figure_for_drafting_is_corrected_by_what_rounds_take() -> None:
    policy = AutoDepth(SCORE, [(0.01, 0.01)])
    _, depths = simulate(0.5, 15.0, 600, random.Random(6), policy)
    assert depths[0] > 0 and sum(depths[-100:]) <= 20


@pytest.mark.parametrize(("busy", "slow"), [(12.0, 36.0), (1.0, 36.0), (12.0, 1.0), (0.3, 3.0)])
def test_figures_measured_on_a_busy_machine_are_mended_and_speculation_comes_back(busy: float, slow: float) -> None:
    """Scoring told ``busy`` times and drafting ``slow`` times too dear: the request loses little, and then nothing."""
    rng, policy = random.Random(11), AutoDepth({n: busy * s for n, s in SCORE.items()}, [(2.0 * slow, 2.0 * slow)])
    simulate(0.7, 2.0, 400, rng, policy)
    total, depths = simulate(0.7, 2.0, 600, rng, policy)
    assert min(depths[-100:]) > 0
    assert total / 600 <= 1.08 * min(fixed(0.7, 2.0, k) for k in range(AutoDepth.MOST + 1))
    assert policy.exits[0].cost(1) == pytest.approx(2.0, rel=0.2) and policy.seconds(1) == pytest.approx(
        SCORE[1], rel=0.2
    )


def test_a_machine_that_becomes_slow_slows_both_sides_and_changes_nothing() -> None:
    """Three times slower for a while, drafting and scoring alike: the depth that was best still is."""
    policy = AutoDepth(SCORE, [(2.0, 2.0)])
    simulate(0.7, 2.0, 300, random.Random(4), policy)
    before = policy.depth(1)
    for _ in range(40):
        policy.observe(
            [before], [before], 1 + before, 6.0 * before, 3 * AutoDepth(SCORE, [(0.0, 0.0)]).seconds(1 + before)
        )
        assert policy.depth(1) >= before - 1


@pytest.mark.parametrize("draft", [0.5, 3.0, 8.0, 20.0, 60.0])
def test_a_drafter_of_random_tokens_never_costs_three_percent(draft: float) -> None:
    """First request included, once the policy has met the drafter before; costs in any order of magnitude."""
    policy = AutoDepth(SCORE, [(draft, draft)], accepted=[[(0.0, 9.0)] * 4])
    for seed in range(4):
        total, _ = simulate(0.0, draft, 128, random.Random(seed), policy, noise=0.0)
        assert 128 * SCORE[1] / total >= 0.97


def test_an_adversary_whose_first_drafts_stand_and_no_later_one_is_bounded() -> None:
    policy, total, done = AutoDepth(SCORE, [(3.0, 3.0)]), 0.0, 0
    true = AutoDepth(SCORE, [(0.0, 0.0)])
    while done < 3000:
        depth = policy.depth(1)
        accepted = depth if sum(policy.exits[0].offered) < 6 else 0
        total += 3.0 * depth + true.seconds(1 + depth)
        policy.observe([depth], [accepted], 1 + depth, 3.0 * depth, true.seconds(1 + depth))
        done += 1 + accepted
    assert done * SCORE[1] / total >= 0.97


def test_what_was_learned_about_a_drafter_begins_the_next_policy() -> None:
    policy = AutoDepth(SCORE, [(2.0, 2.0)])
    assert policy.known() == [[]]
    simulate(0.7, 2.0, 600, random.Random(9), policy)
    (known,) = policy.known()
    assert known and all(share == pytest.approx(0.7, abs=0.3) for share, seen in known if seen >= 9)
    again = AutoDepth(SCORE, [(2.0, 2.0)], accepted=[known])
    assert abs(again.depth(1) - policy.depth(1)) <= 1 and again.expected()[1] == pytest.approx(
        1 + known[0][0], abs=0.05
    )


def test_large_batches_make_deep_drafts_dear() -> None:
    policy = AutoDepth(SCORE, [(1.0, 1.0)])
    simulate(0.7, 1.0, 600, random.Random(8), policy)
    assert policy.depth(16) < policy.depth(1)


def test_nodes_beside_the_chain_are_offered_where_scoring_is_flat() -> None:
    flat = AutoDepth({1: 20.0, 2: 20.2, 4: 20.4, 8: 20.8, 16: 22.0}, [(2.0, 2.0)])
    steep = AutoDepth({1: 10.0, 2: 12.0, 4: 13.0, 8: 20.0, 16: 40.0}, [(2.0, 2.0)])
    assert flat.spare(1, 4) == AutoDepth.SIBLINGS and steep.spare(1, 4) == 0
    assert flat.spare(4, 4) <= flat.spare(1, 4)


Exits = list[tuple[float, float]]  # of each: acceptance, and milliseconds of drafting one token


def simulate_exits(exits: Exits, tokens: int, seed: int, policy: AutoDepth) -> tuple[float, list[tuple[int, int]]]:
    """Milliseconds for ``tokens`` tokens, and the exit and depth of every round."""
    rng, total, done, ways, true = random.Random(seed), 0.0, 0, list[tuple[int, int]](), AutoDepth(SCORE, [(0.0, 0.0)])
    while done < tokens:
        depth = policy.depth(1)
        acceptance, draft = exits[policy.exit or 0]
        accepted = 0
        while accepted < depth and rng.random() < acceptance:
            accepted += 1
        policy.observe([depth], [accepted], 1 + depth, draft * depth, true.seconds(1 + depth))
        total, done = total + draft * depth + true.seconds(1 + depth), done + accepted + 1
        ways.append((policy.exit or 0, depth))
    return total, ways


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
def test_it_finds_the_exit_that_pays_and_loses_little_on_the_way(exits: Exits) -> None:
    policy = AutoDepth(SCORE, [(draft, draft) for _, draft in exits])
    simulate_exits(exits, 300, 1, policy)
    total, _ = simulate_exits(exits, 1500, 2, policy)
    best = min(fixed(a, d, k) for a, d in exits for k in range(AutoDepth.MOST + 1))
    assert total / 1500 <= 1.06 * best


def test_unlucky_first_drafts_do_not_end_an_exit_for_good() -> None:
    """The better exit fails whenever it is tried at first, and is found in spite of that, at a bounded price."""
    policy = AutoDepth(SCORE, [(2.0, 2.0), (2.5, 2.5)])
    simulate_exits([(0.6, 2.0), (0.0, 2.5)], 200, 1, policy)
    _, ways = simulate_exits([(0.6, 2.0), (0.9, 2.5)], 3000, 2, policy)
    assert [exit for exit, _ in ways[-100:]].count(1) > 80


def test_a_request_with_exits_none_of_which_pays_loses_under_three_percent() -> None:
    for seed in range(4):
        policy = AutoDepth(SCORE, [(1.0, 1.0), (4.0, 4.0), (8.0, 8.0)])
        total, _ = simulate_exits([(0.0, 1.0), (0.0, 4.0), (0.0, 8.0)], 128, seed, policy)
        assert 128 * SCORE[1] / total >= 0.97


def test_a_text_that_suits_no_draft_does_not_spoil_the_next_request() -> None:
    """Requests differ: each begins with what all had in common, and finds out about itself."""
    policy, total, done = AutoDepth(SCORE, [(3.0, 2.0)]), 0.0, 0
    for seed in range(24):
        policy.begin()
        spent, depths = simulate(0.8 if seed % 2 else 0.2, 2.0, 128, random.Random(seed), policy, noise=0.0)
        total, done = total + spent, done + 128
        if seed % 2 and seed > 2:
            assert sum(depth > 0 for depth in depths) > 0.8 * len(depths)
    useless = AutoDepth(SCORE, [(3.0, 2.0)], accepted=[[(0.02, 60.0)] * 2])
    for seed in range(4):
        useless.begin()
        total, _ = simulate(0.0, 2.0, 128, random.Random(seed), useless, noise=0.0)
        assert 128 * SCORE[1] / total >= 0.98


def test_a_first_drafted_token_that_is_dearer_than_further_ones_makes_drafts_deeper() -> None:
    flat, steep = AutoDepth(SCORE, [(5.0, 5.0)]), AutoDepth(SCORE, [(9.0, 1.0)])
    for policy in (flat, steep):
        simulate(0.7, 5.0, 300, random.Random(2), policy, noise=0.0)
    assert steep.loss(1) > flat.loss(1) and steep.loss(8) < flat.loss(8)
    assert max(range(9), key=steep.speeds()[0].__getitem__) > max(range(9), key=flat.speeds()[0].__getitem__)
