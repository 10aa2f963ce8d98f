"""Automatic depth, against scripted machines and drafters: it finds the best depth and never loses much."""

import math
import random
from collections.abc import Sequence

import pytest

from specdec.engine.depth import MAX_DEPTH, AutoDepth, DepthChoice, StepReport
from specdec.engine.depth.calibration import expected_gain
from specdec.engine.depth.costs import Costs
from specdec.runtimes.target import TokenCosts
from specdec.speculation.candidates import Candidates, CandidateSet
from specdec.speculation.tree_builder import worth_scoring
from specdec.speculation.trees import Prices

SCORE = {1: 20.0, 2: 21.0, 4: 22.0, 8: 24.0, 16: 40.0}  # seconds of a pass
PLAIN = SCORE[1]
MOST = 99  # the depth that a row's draft may have


def seconds(tokens: int) -> float:
    below = max(n for n in SCORE if n <= tokens) if tokens < 16 else 8
    above = min(n for n in SCORE if n > below)
    return SCORE[below] + (tokens - below) * (SCORE[above] - SCORE[below]) / (above - below)


class OneRow(AutoDepth):
    """The policy, for one request after the other."""

    def start(self) -> None:
        self.row = self.begin()

    def next(self) -> DepthChoice:
        return self.choose([self.row], [MOST])

    def took(self, drafted: int, accepted: int, scored: int, draft: float, rest: float) -> None:
        self.observe(StepReport([self.row], [drafted], [accepted], scored, draft, rest))


def policy_of(*shares: float) -> OneRow:
    policy = OneRow(shares=shares or (0.1,))
    policy.start()
    return policy


Run = tuple[float, list[DepthChoice]]


def simulate(
    policy: OneRow,
    exits: Sequence[tuple[float, float]],
    tokens: int,
    rng: random.Random,
    noise: float = 0.1,
    width: int = 1,
    first: float = 0.0,
) -> Run:
    """Seconds for ``tokens`` tokens, and the choices. A drafter without probabilities, of which a tree scores ``width``
    tokens at each depth.

    exits: of each, the acceptance at each position and the seconds of a level.
    """
    done, total, choices = 0, 0.0, []
    while done < tokens:
        choice = policy.next()
        depth, (acceptance, level) = choice.depth, exits[choice.exit or 0]
        accepted = next((n for n in range(depth) if rng.random() >= acceptance), depth)
        draft = (level * depth + (first if depth else 0.0)) * rng.uniform(1 - noise, 1 + noise)
        rest = seconds(1 + depth * width) * rng.uniform(1 - noise, 1 + noise)
        policy.took(depth, accepted, 1 + depth * width, draft, rest)
        done, total = done + accepted + 1, total + draft + rest
        choices.append(choice)
    return total, choices


def fixed(acceptance: float, level: float, depth: int) -> float:
    """Seconds per token at a fixed depth, in expectation."""
    return (level * depth + seconds(1 + depth)) / sum(acceptance**i for i in range(depth + 1))


def test_tokens_go_where_they_bring_most_and_levels_serve_all_rows() -> None:
    good, bad = [0.9, 0.9, 0.9, 0.1], [0.1, 0.1, 0.01, 0.01]

    def depths(rates: Sequence[Sequence[float]], level: float, node: float = 0.2, due: bool = False) -> list[int]:
        nodes = [node * n for n in range(60)]
        return policy_of()._depths(Prices(nodes, level, rates=rates, level_allowance=float(due)))

    assert depths([good, bad], 0.1) == [3, 0] and depths([good, good], 0.1) == [3, 3]
    assert depths([bad], 0.1) == [0] and depths([bad], 0.1, due=True) == [1]
    assert depths([good], 0.8) == [0] and depths([good] * 4, 0.8) == [3] * 4


@pytest.mark.parametrize("level", [0.05, 3.0, 8.0, 15.0])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.7, 0.95])
def test_a_drafter_without_probabilities_is_drafted_with_as_deep_as_is_best(acceptance: float, level: float) -> None:
    rng = random.Random(int(100 * acceptance + 7 * level))
    policy, tokens = policy_of(), 1500
    total, _ = simulate(policy, [(acceptance, level)], tokens, rng)
    best = min(fixed(acceptance, level, k) for k in range(MAX_DEPTH + 1))
    assert total / tokens <= best * 1.08 and total / tokens <= PLAIN / 0.96
    later = [simulate(policy, [(acceptance, level)], tokens, rng)[0] / tokens for _ in range(3)]
    assert sum(later) / 3 <= best / 0.95


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("level", [0.1, 2.0, 8.0, 30.0])
def test_a_useless_drafter_costs_two_percent_once_it_is_known(level: float, share: float) -> None:
    """Whatever its levels were assumed to cost. The first request has to find out."""
    policy = policy_of(share)
    total, _ = simulate(policy, [(0.0, level)], 128, random.Random(1), noise=0.0)
    assert 128 * PLAIN / total >= 0.85
    again, choices = simulate(policy, [(0.0, level)], 3000, random.Random(2), noise=0.0)
    assert 3000 * PLAIN / again >= 0.975
    assert any(choice.depth for choice in choices)  # it is tried still


def test_requests_that_come_later_lose_no_time_to_a_useless_drafter() -> None:
    policy = policy_of()
    simulate(policy, [(0.02, 3.0)], 500, random.Random(0))
    for seed in range(1, 5):
        policy.start()
        total, _ = simulate(policy, [(0.0, 3.0)], 128, random.Random(seed), noise=0.0)
        assert 128 * PLAIN / total >= 0.97


def test_a_useless_drafter_that_becomes_good_is_noticed_and_the_reverse() -> None:
    rng, policy = random.Random(3), policy_of()
    _, bad = simulate(policy, [(0.0, 2.0)], 600, rng)
    assert sum(choice.depth > 0 for choice in bad[-100:]) <= 12
    _, good = simulate(policy, [(0.9, 2.0)], 3000, rng)
    assert sorted(choice.depth for choice in good[-50:])[3] >= 4  # some are plain steps, tried
    _, worse = simulate(policy, [(0.0, 2.0)], 600, rng)
    assert sum(choice.depth > 0 for choice in worse[-100:]) <= 12


def test_every_token_of_a_tree_counts_not_only_its_depth() -> None:
    """One token of 30 % is worth a chain's step (21 s for 1.3 tokens), not that of a tree of nine (28 s)."""
    chain, tree = policy_of(), policy_of()
    _, choices = simulate(chain, [(0.3, 0.0)], 400, random.Random(5), noise=0.0)
    assert sum(choice.depth == 0 for choice in choices[-50:]) <= 4
    _, choices = simulate(tree, [(0.3, 0.0)], 400, random.Random(5), noise=0.0, width=9)
    assert sum(choice.depth == 0 for choice in choices[-50:]) > 40


def test_a_single_slow_step_does_not_end_speculation() -> None:
    policy = policy_of()
    simulate(policy, [(0.8, 1.0)], 300, random.Random(1))
    policy.next()
    policy.took(4, 4, 5, 100.0, 5000.0)
    _, choices = simulate(policy, [(0.8, 1.0)], 60, random.Random(2))
    assert sum(choice.depth == 0 for choice in choices) <= 2


def test_a_drafter_that_begins_to_draft_differently_is_tried_anew() -> None:
    """What is known of another version counts little, and it is tried at once."""
    waits = []
    for changes in (False, True):
        policy = policy_of()
        policy.follow(1)
        simulate(policy, [(0.02, 6.0)], 1500, random.Random(1))
        policy.follow(2 if changes else 1)
        _, choices = simulate(policy, [(0.9, 6.0)], 1000, random.Random(2))
        waits.append(next((n for n, choice in enumerate(choices) if choice.depth >= 4), len(choices)))
    assert waits[1] < 0.7 * waits[0], waits


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
def test_the_exit_that_pays_is_found_and_little_is_lost_on_the_way(exits: list[tuple[float, float]]) -> None:
    policy = policy_of(*(level / 20 for _, level in exits))
    simulate(policy, exits, 500, random.Random(1))
    total, _ = simulate(policy, exits, 2000, random.Random(2))
    best = min(fixed(a, level, k) for a, level in exits for k in range(MAX_DEPTH + 1))
    assert total / 2000 <= 1.06 * best


def rows_of(policy: AutoDepth, acceptance: Sequence[float], steps: int, rng: random.Random) -> tuple[float, list[int]]:
    """Tokens per second of rows that decode together over those of plain decoding, and the depths of each. A level
    takes 3 s for all rows."""
    rows, total, tokens, drafted = [policy.begin() for _ in acceptance], 0.0, 0, [0] * len(acceptance)
    for _ in range(steps):
        choice = policy.choose(rows, [MOST] * len(rows))
        depths = list(choice.depths)
        accepted = [
            next((n for n in range(depth) if rng.random() >= p), depth)
            for depth, p in zip(depths, acceptance, strict=True)
        ]
        scored, draft = len(rows) + sum(depths), 3.0 * max(depths)
        policy.observe(StepReport(rows, depths, accepted, scored, draft, flat(scored)))
        total, tokens = total + draft + flat(scored), tokens + len(rows) + sum(accepted)
        drafted = [a + b for a, b in zip(drafted, depths, strict=True)]
    return tokens / total / (len(rows) / flat(len(rows))), drafted


def flat(tokens: int) -> float:
    return 20 + 0.4 * tokens


def test_rows_draft_together_where_a_level_pays_for_all_of_them_alone() -> None:
    policy = policy_of()
    rows_of(policy, [0.6] * 8, 200, random.Random(1))
    speed, drafted = rows_of(policy, [0.6] * 8, 200, random.Random(2))
    assert speed > 0.965 * 1.277 and min(drafted) > 150  # of two tokens a row in each step


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_rows_whose_drafts_fail_lose_little_together(rows: int) -> None:
    policy = policy_of()
    rows_of(policy, [0.02] * rows, 100, random.Random(1))
    assert rows_of(policy, [0.02] * rows, 400, random.Random(2))[0] > 0.975


def test_a_row_whose_drafts_fail_drafts_less_than_its_neighbours() -> None:
    policy = AutoDepth(token=TokenCosts(0.03))
    _, drafted = rows_of(policy, [0.9, 0.9, 0.02, 0.9], 300, random.Random(3))
    assert drafted[2] < 0.3 * min(drafted[:2])


def test_rows_that_never_draft_wait_for_the_pass_as_well() -> None:
    policy = policy_of()
    rows_of(policy, [0.5] * 2, 200, random.Random(1))
    fresh = [policy.begin() for _ in range(32)]
    alone, beside = (policy.choose(fresh[: 2 + plain], [MOST, MOST, *[0] * plain]) for plain in (0, 30))
    assert sum(alone.depths) > sum(beside.depths) and not any(beside.depths[2:])
    assert policy.choose([policy.begin()] * 4, [0] * 4).depth == 0


def by_source(policy: OneRow, said: float, right: float, level: float, free: float, tokens: int, seed: int) -> float:
    """Seconds for ``tokens`` tokens of a drafter with probabilities that says ``said``, and is right with ``right``.

    free: seconds of a draft without levels. A level takes ``level``; 0: there are none, and all tokens are free.
    """
    rng, done, total = random.Random(seed), 0, 0.0
    while done < tokens:
        choice, drafting, nodes, levels, found, accepted, lucky = policy.next(), 0.0, 0, 0, None, 0, 0
        if choice.depth and choice.prices is not None:
            prices, drafting = choice.prices, free
            levels = prices.levels() if level else 0
            depth = min(levels if level else choice.depth, 8)
            sure = prices.tables[0][0][min(range(11), key=lambda n: abs(n - 4 - logit(said)))]
            scores = [(n + 1) * log(sure) for n in range(depth)]
            rows = [Candidates(scores, [1] * depth, list(range(depth)), [[said] * depth])]
            nodes = len(worth_scoring(rows, 8, None, prices)[0].tokens)
            lucky = next((n for n in range(9) if rng.random() >= right), 9)
            accepted = min(lucky, nodes)
            drafting += levels * level
            found = CandidateSet(rows, levels)
        tokens_of = [1] * accepted + [1 if lucky > accepted else 2]
        report = StepReport(
            [policy.row], [nodes], [accepted], 1 + nodes, drafting, seconds(1 + nodes), [tokens_of], found
        )
        policy.observe(report)
        done, total = done + accepted + 1, total + drafting + seconds(1 + nodes)
    return total


def logit(p: float) -> float:
    return log(p / (1 - p))


def log(x: float) -> float:
    return math.log(max(x, 1e-9))


def sourced(share: float) -> OneRow:
    policy = OneRow(True, 1, (share,))
    policy.start()
    return policy


@pytest.mark.parametrize(("level", "free"), [(0.0, 0.2), (0.0, 3.0), (0.6, 0.2), (4.0, 0.2), (10.0, 1.0)])
def test_a_drafter_that_is_sure_and_wrong_costs_two_percent_once_it_is_known(level: float, free: float) -> None:
    policy = sourced(0.1 if level else 0.0)
    first = by_source(policy, 0.9, 0.02, level, free, 128, 1)
    assert 128 * PLAIN / first >= 0.88
    for seed in range(2, 5):
        policy.start()
        assert 1000 * PLAIN / by_source(policy, 0.9, 0.02, level, free, 1000, seed) >= 0.975


@pytest.mark.parametrize("others", [0, 7])
def test_rows_that_never_draft_say_nothing_of_the_drafter(others: int) -> None:
    """A drafter that is always right is worth as much beside them, but for what they wait for."""
    policy = AutoDepth(token=TokenCosts(0.001))
    rows = [policy.begin() for _ in range(1 + others)]
    for _ in range(60):
        choice = policy.choose(rows, [MOST, *[0] * others])
        drafted = [choice.depths[0], *[0] * others]
        policy.observe(StepReport(rows, drafted, drafted, len(rows) + sum(drafted), 0.1, 20.0))
    assert expected_gain(rows[0], policy.common, len(rows)) > 5 and choice.depth > 4
    fresh = policy.begin()
    assert all(row.gains.trials == fresh.gains.trials for row in rows[1:])


def test_a_row_says_nothing_of_levels_deeper_than_it_may_draft() -> None:
    policy = AutoDepth(True, 1)
    rows = [policy.begin(), policy.begin()]
    policy.choose(rows, [1, 4])
    found = CandidateSet([Candidates.none(), Candidates.none()], levels=4)
    policy.observe(StepReport(rows, [1, 4], [1, 4], 7, 1.0, 20.0, [[5, 6]] * 2, found))
    assert [sum(row.by_position[0].trials) for row in rows] == [1, 4]
    assert [sum(row.by_position[0].hits) for row in rows] == [1, 4]


def test_steps_that_do_not_draft_save_nothing_whatever_earlier_costs_say() -> None:
    policy = AutoDepth(earlier=Costs(passes=[math.log(0.005)]))
    row = policy.begin()
    for _ in range(20):
        policy.choose([row], [0], [10])
        assert policy.plain_seconds == pytest.approx(0.005, rel=0.1)
        policy.observe(StepReport([row], [0], [0], 1, 0.0, 0.005, [[5]]))
    assert policy.speedup == pytest.approx(1, rel=0.1)
