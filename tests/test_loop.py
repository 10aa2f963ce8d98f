"""The loop returns what plain decoding returns, whatever is drafted: oracles, batches, ends. (Drafters: test_matrix)"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from conftest import Scripted, greedy_reference, tiny_model
from transformers import LogitsProcessor, PreTrainedModel
from zoo import PROMPTS, every, m2r2, run

from specdec import loop
from specdec.depth import FixedDepth
from specdec.draft import Draft, Verdict, Verifier
from specdec.drafters.none import NoDrafter
from specdec.loop import Loop
from specdec.sampling import Sampler, SamplingParams, one_hot
from specdec.target import ReferenceTarget
from specdec.verifiers.confident import ConfidentVerifier
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.typical import TypicalVerifier


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_oracles_change_nothing_and_the_perfect_one_gets_depth_plus_one(llama: PreTrainedModel, depth: int) -> None:
    target, prompt, count = ReferenceTarget(llama), PROMPTS[0], 33
    expected = greedy_reference(llama, prompt, count)
    if expected[-1] == 2:
        pytest.fail("the reference output must not end early for this test to mean something")
    rng = random.Random(0)

    def ahead(ids: list[int], limit: int) -> list[int]:
        return expected[len(ids) - len(prompt) :][:limit]

    def chain(tokens: list[int]) -> list[tuple[int, int]]:
        return [(token, parent) for parent, token in enumerate(tokens)]

    def siblings(ids: list[int], limit: int) -> list[tuple[int, int]]:
        """A wrong, then the right token after each node of the right path."""
        nodes, parent = [], 0
        for token in ahead(ids, limit):
            nodes += [((token + 1) % 97, parent), (token, parent)]
            parent = len(nodes)
        return nodes

    def wild(ids: list[int], limit: int) -> list[tuple[int, int]]:
        """A random tree over right and random tokens."""
        good = [*ahead(ids, 2 * limit), 0]
        nodes: list[tuple[int, int]] = []
        depths = [0]
        for _ in range(rng.randrange(9)):
            parent = rng.choice([i for i, d in enumerate(depths) if d < limit])
            depths.append(depths[parent] + 1)
            right = good[min(depths[parent], len(good) - 1)]
            nodes.append((right if rng.random() < 0.6 else rng.randrange(97), parent))
        return nodes

    scripts = {
        "perfect": lambda ids, limit: chain(ahead(ids, limit)),
        "adversarial": lambda ids, limit: chain([(t + 1) % 97 for t in ahead(ids, limit)]),
        "random": lambda ids, limit: chain([rng.randrange(97) for _ in range(limit)]),
        "empty": lambda ids, limit: [],
        "siblings": siblings,
        "wild tree": wild,
    }
    lengths = {}
    for name, script in scripts.items():
        out, loop = run(target, Scripted(script), [prompt], count, depth)
        assert out == [expected], name
        lengths[name] = loop.metrics[0].mean_acceptance_length
    assert lengths["adversarial"] == lengths["empty"] == 1
    full, rest = divmod(count - 1, depth + 1)  # the first token comes from the prefill
    best = (count - 1) / (full + (rest > 0))
    assert lengths["perfect"] == lengths["siblings"] == pytest.approx(best)


def test_trees_differ_by_row_and_rows_end_apart(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    expected = [greedy_reference(llama, prompt, 20) for prompt in PROMPTS]
    starts = {tuple(prompt): reference for prompt, reference in zip(PROMPTS, expected, strict=True)}

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        prompt = next(p for p in starts if tuple(ids[: len(p)]) == p)
        ahead = starts[prompt][len(ids) - len(prompt) :][: limit if len(prompt) > 1 else 1]
        return [(token, parent) for parent, token in enumerate(ahead)]

    out, loop = run(target, Scripted(script), PROMPTS, 20)
    assert out == expected
    lengths = [m.mean_acceptance_length for m in loop.metrics]
    assert lengths[2] <= 2 < lengths[0]
    assert [m.num_spec_steps for m in loop.metrics][2] > loop.metrics[0].num_spec_steps


@pytest.mark.parametrize("early", [False, True])
def test_scoring_runs_no_layer_twice_for_what_the_draft_computed(llama: PreTrainedModel, early: bool) -> None:
    target = ReferenceTarget(llama)
    drafter = m2r2(target, 2, ((2, 3),) if not early else (), not early, early)
    calls: list[tuple[int, int, int, bool]] = []
    layers = target.layers

    def spy(x, lo, hi, *args, **kwargs):
        calls.append((lo, hi, x.shape[1], kwargs.get("adapters") is not None))
        return layers(x, lo, hi, *args, **kwargs)

    target.layers = spy  # type: ignore[method-assign]
    drafter.bind(target)
    loop = Loop(
        target,
        drafter,
        ExactVerifier(),
        Sampler(SamplingParams()),
        [PROMPTS[0]],
        [40],
        lambda r, t: None,
        FixedDepth(4),
    )
    rounds = loop.rounds()
    next(rounds)
    calls.clear()
    next(rounds)
    scoring = [c for c in calls if not c[3] and c[2] == 5]
    assert scoring == [(2, 4, 5, False)]  # all five block tokens enter at E
    below = [c for c in calls if c[0] == 0]
    per_token = 2 if early else 1  # h and p in one pass
    assert [c[2] for c in below] == [per_token] * 4 + [1]  # four drafted from, the last drafted token once


def test_processors_apply_alike_to_drafted_corrected_and_bonus_tokens(llama: PreTrainedModel) -> None:
    target, prompt = ReferenceTarget(llama), PROMPTS[1]
    out = llama.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=1.7, pad_token_id=0
    )
    expected = out[0, len(prompt) :].tolist()
    assert expected != greedy_reference(llama, prompt, 24)  # the penalty matters here
    for drafter in every(target).values():
        assert run(target, drafter, [prompt], 24, repetition_penalty=1.7)[0] == [expected]


class OnlyOddAfterEven(LogitsProcessor):
    """A processor that looks at the last token: wrong prefixes would show."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parity = 1 - int(input_ids[0, -1]) % 2
        scores = scores.clone()
        scores[:, [t for t in range(scores.shape[1]) if t % 2 != parity]] = float("-inf")
        return scores


def test_custom_processors_see_the_path_to_their_node(llama: PreTrainedModel) -> None:
    target = ReferenceTarget(llama)
    drafter = Scripted(lambda ids, limit: [(4, 0), (5, 0), (6, 1), (7, 2), (7, 1)])
    drafter.bind(target)
    sampler = Sampler(SamplingParams(), [OnlyOddAfterEven()])
    loop = Loop(target, drafter, ExactVerifier(), sampler, [PROMPTS[0]], [20], lambda r, t: None, FixedDepth(4))
    ids = list(PROMPTS[0])
    for events in loop.rounds():
        ids += events[0][1]
    plain = Loop(target, NoDrafter(), ExactVerifier(), sampler, [PROMPTS[0]], [20], lambda r, t: None, FixedDepth(1))
    assert ids[4:] == [t for events in plain.rounds() for t in events[0][1]]
    assert all((a + b) % 2 for a, b in pairwise(ids))


def test_output_ends_at_eos_inside_a_draft(llama: PreTrainedModel) -> None:
    target, prompt = ReferenceTarget(llama), PROMPTS[0]
    expected = greedy_reference(llama, prompt, 20)
    end = expected[5]
    cut = expected[: expected.index(end) + 1]
    script = lambda ids, limit: [(t, i) for i, t in enumerate(expected[len(ids) - len(prompt) :][:limit])]  # noqa: E731
    drafter = Scripted(script)
    drafter.bind(target)
    stop = lambda row, token: "eos" if token == end else None  # noqa: E731
    loop = Loop(target, drafter, ExactVerifier(), Sampler(SamplingParams()), [prompt], [20], stop, FixedDepth(7))
    out = [t for events in loop.rounds() for t in events[0][1]]
    assert out == cut and loop.finished == {0: "eos"}
    assert sum(loop.metrics[0].per_step_accepted) <= len(cut)


def test_generation_stops_at_the_context_limit() -> None:
    model = tiny_model("gpt2", n_positions=32)
    target = ReferenceTarget(model)
    prompt = list(range(3, 23))
    drafter = Scripted(lambda ids, limit: [(5, i) for i in range(limit)])
    out, _ = run(target, drafter, [prompt], 32 - len(prompt), 7)
    assert out == [greedy_reference(model, prompt, 12)]


def test_long_prompts_are_prefilled_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.prefill.CHUNK", 3)
    model = tiny_model("mistral")
    target = ReferenceTarget(model)
    for name, drafter in every(target).items():
        assert run(target, drafter, PROMPTS, 12)[0] == [greedy_reference(model, p, 12) for p in PROMPTS], name


@dataclass
class Unhashable(ExactVerifier):
    """A rule that cannot be the key of a dictionary."""

    calls: int = 0

    def judge(self, draft: Draft, p: torch.Tensor, generators: list[torch.Generator]) -> Verdict:
        self.calls += 1
        return super().judge(draft, p, generators)


@pytest.mark.parametrize("rule", [ExactVerifier(), TypicalVerifier(), ConfidentVerifier(), Unhashable()])
def test_kept_verdicts_on_greedy_drafts_are_the_rules_own(rule: Verifier) -> None:
    source = torch.Generator().manual_seed(3)
    pick = lambda high, *size: torch.randint(0, high, size, generator=source).tolist()  # noqa: E731
    for _ in range(200):
        count = 1 + pick(6, 1)[0]
        parents = tuple(pick(node, 1)[0] for node in range(1, count + 1))
        seen: list[set[int]] = [set() for _ in range(count + 1)]  # by parent: siblings differ
        tokens = []
        for parent in parents:
            free = sorted({*range(-1, 7)} - (seen[parent] - {-1}))
            tokens.append(free[pick(len(free), 1)[0]])
            seen[parent].add(tokens[-1])
        choice = pick(7, 1, count + 1)
        draft, generators = Draft([tokens], parents), [torch.Generator()]
        direct = rule.judge(draft, one_hot(torch.tensor(choice), 7), generators)
        assert loop._judge_choice(rule, draft, choice) == direct


def test_a_verdict_is_kept_for_its_rule_alone() -> None:
    first, second = Unhashable(), Unhashable()
    for rule, calls in ((first, 1), (first, 1), (second, 1)):
        verdict = loop._judge_choice(rule, Draft([[4, 9], [9, 4]], (0, 1)), [[4, 9, 3], [9, 4, 8]])
        assert verdict == Verdict([[0, 1, 2]] * 2, [3, 8]) and rule.calls == calls
