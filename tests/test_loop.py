"""The loop returns what plain decoding returns, whatever is drafted: every drafter, tree, batch and family."""

from __future__ import annotations

import functools
import random
from collections import Counter
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Scripted, greedy_reference, tiny_model
from test_exact import p_value
from transformers import LogitsProcessor, PreTrainedModel

from specdec.depth import FixedDepth
from specdec.draft import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path
from specdec.drafters.none import NoDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.loop import Loop
from specdec.sampling import Sampler, SamplingParams
from specdec.target import ReferenceTarget, Target
from specdec.verifiers.exact import ExactVerifier

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [3]]


def run(
    target: Target, drafter: Drafter, prompts: list[list[int]], count: int, depth: int = 4, **sampling: float
) -> tuple[list[list[int]], Loop]:
    drafter.bind(target)
    sampler = Sampler(SamplingParams(**sampling), rows=len(prompts))  # type: ignore[arg-type]
    out: list[list[int]] = [[] for _ in prompts]
    limits = [count] * len(prompts)
    eos = lambda row, token: "eos" if token == 2 else None  # noqa: E731
    loop = Loop(target, drafter, ExactVerifier(), sampler, prompts, limits, eos, FixedDepth(depth))
    for events in loop.rounds():
        for row, tokens in events:
            out[row] += tokens
    return out, loop


def m2r2(
    target: Target,
    exit_layer: int,
    segments: tuple[tuple[int, int], ...],
    leap: bool,
    early: bool,
    siblings: tuple[int, ...] = (),
) -> M2R2Drafter:
    """A random M2R2 that drafts over every second token."""
    torch.manual_seed(1)
    layers = [layer for lo, hi in segments for layer in range(lo, hi)] + (list(range(exit_layer)) if early else [])
    path = M2R2Path(exit_layer, segments, leap, 4, {layer: list(target.linears(layer)) for layer in layers})
    network = M2R2(path, target, torch.arange(0, 97, 2, dtype=torch.int32))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return M2R2Drafter(network, siblings)


@functools.cache
def other_model(vocab: int = 97, noise: float = 0.1, **changes: int | None) -> Target:
    """A second model: its weights are the small llama's, disturbed (a little, so that they often agree)."""
    model = tiny_model("llama", vocab_size=vocab, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape) if parameter.dim() > 1 else 0)
    return ReferenceTarget(model)


def drafters(target: Target) -> dict[str, Drafter]:
    return {
        "none": NoDrafter(),
        "prompt-lookup": PromptLookupDrafter(),
        "prompt-lookup: tree": PromptLookupDrafter(continuations=3),
        "lookahead": LookaheadDrafter(),
        "m2r2: early layers with adapters": m2r2(target, 2, (), False, True),
        "m2r2: leap": m2r2(target, 1, ((2, 3),), True, False),
        "m2r2: leap to the end, adapters everywhere": m2r2(target, 1, ((2, 4),), False, True),
        "m2r2: two leaps, no early layer": m2r2(target, 0, ((1, 2), (3, 4)), True, False),
        "m2r2: tree": m2r2(target, 2, (), False, True, (3, 0, 2)),
        "m2r2: tree after a leap": m2r2(target, 1, ((2, 4),), False, False, (1, 1, 1, 1)),
        "draft-model": DraftModelDrafter(other_model()),
        "draft-model: tree, ends with its context": DraftModelDrafter(
            other_model(max_position_embeddings=16), siblings=(2, 0, 1)
        ),
        "early-exit": EarlyExitDrafter(),
        "early-exit: tree": EarlyExitDrafter(3, (2, 1)),
        "layer-skip": LayerSkipDrafter(),
        "hybrid: lookup, m2r2": HybridDrafter([PromptLookupDrafter(2, 2), m2r2(target, 1, ((2, 3),), True, False)]),
        "hybrid: lookup, lookahead": HybridDrafter([PromptLookupDrafter(2, 2, 2), LookaheadDrafter()]),
        "hybrid: an exit above a layer that m2r2 observes": HybridDrafter(
            [PromptLookupDrafter(2, 2), EarlyExitDrafter(3), m2r2(target, 1, ((2, 3),), True, False)]
        ),
        "layer-skip: tree without the first layer": LayerSkipDrafter([0, 2], (1, 1, 1)),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_generate_for_every_drafter_in_a_ragged_batch(family: str) -> None:
    model = tiny_model(family)
    target = ReferenceTarget(model)
    expected = [greedy_reference(model, prompt, 16) for prompt in PROMPTS]
    for name, drafter in drafters(target).items():
        assert run(target, drafter, PROMPTS, 16)[0] == expected, name


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
    for drafter in drafters(target).values():
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
    for name, drafter in drafters(target).items():
        assert run(target, drafter, PROMPTS, 12)[0] == [greedy_reference(model, p, 12) for p in PROMPTS], name


@pytest.mark.parametrize(
    "kind", ["none", "m2r2: leap", "m2r2: tree", "prompt-lookup", "layer-skip: tree", "draft-model", "lookahead"]
)
def test_sampling_through_the_whole_loop_follows_the_model(kind: str) -> None:
    """Joint distribution of the first three tokens over a vocabulary of five, with temperature and top-k."""
    model = tiny_model("llama", vocab_size=5, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    target, prompt, total = ReferenceTarget(model), [1, 2, 1, 2], 1536
    drafter: Drafter = drafters_small(target)[kind]
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(0, total, 512):
        out, _ = run_no_eos(target, drafter, [prompt] * 512, 3, temperature=1.5, top_k=3, seed=seed)
        counts.update(tuple(tokens) for tokens in out)
    expected = {}
    for outcome in product(range(5), repeat=3):
        logits = model(torch.tensor([[*prompt, *outcome[:2]]])).logits[0, -3:].double() / 1.5
        floor = logits.topk(3, -1).values[:, -1:]
        p = logits.masked_fill(logits < floor, float("-inf")).softmax(-1)
        expected[outcome] = float(p[range(3), list(outcome)].prod())
    assert p_value(counts, expected, total) > 1e-3


def drafters_small(target: Target) -> dict[str, Drafter]:
    def network(*path: Any) -> M2R2Drafter:
        drafter = m2r2(target, *path)
        drafter.network.draft_vocab = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
        return drafter

    return {
        "none": NoDrafter(),
        "prompt-lookup": PromptLookupDrafter(),
        "m2r2: leap": network(1, ((2, 3),), True, False),
        "m2r2: tree": network(2, (), False, True, (2, 1)),
        "layer-skip: tree": LayerSkipDrafter([1], (1, 1)),
        "lookahead": LookaheadDrafter(2, 2),
        "draft-model": DraftModelDrafter(other_model(5, 1.0, eos_token_id=None, pad_token_id=None, bos_token_id=None)),
    }


def run_no_eos(
    target: Target, drafter: Drafter, prompts: list[list[int]], count: int, **sampling: float
) -> tuple[list[list[int]], Loop]:
    drafter.bind(target)
    sampler = Sampler(SamplingParams(**sampling), rows=len(prompts))  # type: ignore[arg-type]
    limits = [count] * len(prompts)
    loop = Loop(target, drafter, ExactVerifier(), sampler, prompts, limits, lambda r, t: None, FixedDepth(2))
    out: list[list[int]] = [[] for _ in prompts]
    for events in loop.rounds():
        for row, tokens in events:
            out[row] += tokens
    return out, loop
