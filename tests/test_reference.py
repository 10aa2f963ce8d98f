"""The engine does what the reference does, step by step: the same drafts, accepted paths and tokens."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import greedy_reference, tiny_model
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from zoo import EOS, PROMPTS, m2r2, step

from specdec.drafters.m2r2 import PaperM2R2Drafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.reference import M2R2, DraftLogits, Sampling, Tree, decode, draft_chain, draft_tree
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler, SamplingParams
from specdec.speculation.state import State
from specdec.speculation.tree_builder import in_one_shape
from specdec.speculation.verifier import Acceptance
from specdec.verifiers.exact import ExactVerifier

COUNT, ENDS = 12, frozenset([EOS])
Drafting = Callable[[list[int], int], Tree]
Path = tuple[int, tuple[tuple[int, int], ...], bool, bool]  # as in zoo.m2r2
Row = tuple[list[int], int]  # a prompt, and how its tokens are chosen: an index of WAYS
Recorded = tuple[list[list[int]], list[int], list[int]]  # tokens on the path to each node, accepted and new tokens
target_of = functools.cache(lambda family: TransformersTarget(tiny_model(family)))

WAYS: list[tuple[SamplingParams, Sampling]] = [  # the same for the engine and for the reference
    (SamplingParams(), Sampling()),
    (SamplingParams(repetition_penalty=1.5), Sampling(processors=[RepetitionPenaltyLogitsProcessor(1.5)])),
    (SamplingParams(0.9, seed=3), Sampling(3, processors=[TemperatureLogitsWarper(0.9)])),
    (
        SamplingParams(1.3, 20, 0.9, seed=2**63 - 1),
        Sampling(2**63 - 1, 1, processors=[TemperatureLogitsWarper(1.3), TopKLogitsWarper(20), TopPLogitsWarper(0.9)]),
    ),
]


class Given(Drafter):
    """Drafts what ``draft`` makes of each row's text."""

    name = "given"

    def __init__(self, draft: Drafting) -> None:
        self.draft = draft

    def propose(self, state: State, limit: int) -> Draft:
        trees = [self.draft(ids, limit) for ids in state.ids]
        return in_one_shape([(tree.tokens, tree.parents) for tree in trees], state.cache.device)[0]


class Watching(ExactVerifier):
    """Keeps what was scored, and which of it was accepted."""

    draft: Draft
    accepted: Acceptance

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        self.draft, self.accepted = draft, super().verify(draft, chosen, p)
        return self.accepted


def by_engine(family: str, drafter: Drafter, rows: Sequence[Row], depth: int) -> list[list[Recorded]]:
    """The steps after the prefill of each row of a batch."""
    verifier = Watching()
    engine = Engine(target_of(family), drafter, verifier, FixedDepth(depth))
    samplers = [RowSampler(WAYS[way][0], stream=WAYS[way][1].stream, start=len(prompt)) for prompt, way in rows]
    requests = [Request(row[0], COUNT, sampler, eos=ENDS) for row, sampler in zip(rows, samplers, strict=True)]
    steps: dict[Request, list[Recorded]] = {request: [] for request in requests}
    for request in requests:
        engine.submit(request)
    step(engine)  # the prefill
    while running := list(engine.batch.rows):
        step(engine)
        for b, row in enumerate(running):
            tokens, path = verifier.draft.lists()[b], verifier.accepted.paths[b]
            accepted = [tokens[node - 1] for node in path[1:]]
            steps[row].append((sorted(verifier.draft.paths(b)), accepted, list(row.new_tokens)))
            assert row.metrics.per_step_accepted[-1] == min(len(accepted), len(row.new_tokens))
    assert all(request.finish_reason in ("eos", "length") for request in requests) and engine.outage is None
    return list(steps.values())


def by_reference(family: str, draft: Drafting, row: Row, depth: int) -> list[Recorded]:
    _, *steps = decode(target_of(family).model, row[0], COUNT, draft, WAYS[row[1]][1], depth, ENDS)
    found = list[Recorded]()
    for tree, path, tokens in steps:
        paths = [tree.text(tree.path(node)) for node in range(1, 1 + len(tree.tokens))]
        found.append((sorted(paths), tree.text(path), tokens))
    return found


def check(family: str, drafter: Drafter, draft: Drafting, rows: Sequence[Row], depth: int) -> int:
    """Compare both; return the number of accepted tokens."""
    found = by_engine(family, drafter, rows, depth)
    assert found == [by_reference(family, draft, row, depth) for row in rows]
    return sum(len(accepted) for steps in found for _, accepted, _ in steps)


@functools.cache
def continued(family: str, prompt: tuple[int, ...], way: int) -> list[int]:
    """The prompt with what plain decoding makes of it, beyond the end of the text."""
    steps = decode(target_of(family).model, prompt, COUNT + 8, sampling=WAYS[way][1])
    return [*prompt, *(token for step in steps for token in step.tokens)]


def test_greedy_is_generate() -> None:
    for prompt in PROMPTS:
        new = continued("llama", tuple(prompt), 0)[len(prompt) :]
        assert new == greedy_reference(target_of("llama").model, prompt, COUNT + 8)[: len(new)]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    family=st.sampled_from(["llama", "qwen3"]),
    prompts=st.lists(st.lists(st.integers(3, 96), min_size=1, max_size=6), min_size=1, max_size=3, unique_by=tuple),
    ways=st.lists(st.integers(0, len(WAYS) - 1), min_size=3, max_size=3),
    depth=st.integers(1, 6),
    width=st.integers(1, 3),
    right=st.sampled_from([0.0, 0.6, 0.9, 1.0]),
)
def test_any_drafts(family, prompts, ways, depth, width, right) -> None:
    """Chains and trees in batches whose rows choose differently; tokens are right as often as ``right`` says."""
    rows = list(zip(prompts, ways, strict=False))
    texts = [continued(family, tuple(prompt), way) for prompt, way in rows]

    def draft(text: list[int], limit: int) -> Tree:
        """A function of the text; the levels within a limit are the same under a larger one."""
        rng, tokens, parents, level = random.Random(f"{text}"), list[int](), list[int](), [0]
        ahead = next((own for own in texts if own[: len(text)] == text), text)[len(text) :]
        for place in range(min(limit, len(ahead))):
            before, level = level, []
            for _ in range(rng.randint(1, width) if before else 0):
                parents.append(rng.choice(before))
                tokens.append(ahead[place] if rng.random() < right else rng.randrange(97))
                level.append(len(tokens))
        return Tree(tokens, parents)

    accepted = check(family, Given(draft), draft, rows, depth)
    assert accepted or right < 1 or any(EOS in text for text in texts)


def check_m2r2(way: int, form: Callable[[DraftLogits], Drafting], path: Path, **options: Any) -> int:
    target = target_of("llama")
    drafter = m2r2(target, *path, **options)
    drafter.bind(target)
    reference = M2R2(target.model, drafter.network.path.to_json(), drafter.network.state_dict())
    return sum(check("llama", drafter, form(reference.logits), [(prompt, way)], 3) for prompt in PROMPTS)


PATHS: dict[str, Path] = {
    "one projection": (1, ((2, 3),), True, False),
    "two projections": (0, ((1, 2), (3, 4)), True, False),
    "adapters in all layers": (1, ((2, 4),), False, True),
    "as published": (2, (), False, True),
}


@pytest.mark.parametrize("way", [0, 2])
@pytest.mark.parametrize("name", PATHS)
def test_m2r2_drafts_chains(name: str, way: int) -> None:
    kind = {"kind": PaperM2R2Drafter} if name == "as published" else {}
    form = lambda logits: lambda *given: draft_chain(logits, *given, WAYS[way][1])  # noqa: E731
    assert check_m2r2(way, form, PATHS[name], **kind) or not way  # the draws of its random drafts share their noise


def test_m2r2_drafts_trees() -> None:
    form = lambda logits: lambda *given: draft_tree(logits, *given, width=3, nodes=9)  # noqa: E731
    check_m2r2(0, form, PATHS["two projections"], nodes=9, width=3)
