"""What each drafter proposes, which options it takes, how names are read, and how outside packages add one."""

import copy
import random
import re
import sys
import tomllib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pages import ROOT
from refusals import refused
from scripted import Scripted
from spies import noted
from tiny import greedy_reference, without
from transformers import PreTrainedModel
from zoo import PROMPTS, layers_run, m2r2, other_model, run, step, watched

from specdec import SamplingParams, SpecDecError, SpecDecoder
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.exits import EarlyExitDrafter
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine.depth import AutoDepth, FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation import registry
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.state import State
from specdec.speculation.trees import Prices
from specdec.verifiers.exact import ExactVerifier

DOCS = ROOT / "docs"


def proposals(target: Target, drafter: Drafter, member: Drafter | None = None) -> dict[tuple[int, ...], list[int]]:
    """What ``member`` (None: ``drafter``) proposed after each text of a generation that ``drafter`` drafts."""
    seen = watched(member or drafter)
    run(target, drafter, PROMPTS, 24)
    return {tuple(ids): row for texts, draft in seen for ids, row in zip(texts, draft.lists(), strict=True)}


@pytest.mark.parametrize(
    ("drafter", "useless"),
    [(EarlyExitDrafter(2), (2, 3)), (LayerSkipDrafter(), (1,)), (LayerSkipDrafter([0, 2]), (0, 2))],
)
def test_leaving_out_layers_that_change_nothing_is_always_right(llama, drafter, useless) -> None:
    _, loop = run(TransformersTarget(without(llama, *useless)), drafter, PROMPTS, 21)
    for metrics in loop.metrics:
        assert set(metrics.per_step_accepted[:-1]) == {4}  # the last round may be cut by the end of the text


@pytest.mark.parametrize(
    ("drafter", "drafted", "scored"),
    [
        # Only the last drafted token is not at the exit yet.
        (EarlyExitDrafter(3), [(0, 3, 1)], [(0, 3, 1), (3, 4, 5)]),
        (LayerSkipDrafter([2]), [(0, 2, 1), (3, 4, 1)], [(0, 2, 1), (2, 4, 5)]),
        (LayerSkipDrafter([0]), [(1, 4, 1)], [(0, 4, 5)]),
    ],
)
def test_scoring_resumes_where_the_draft_left_the_exact_path(llama, drafter, drafted, scored) -> None:
    first_round = 4 * drafted + scored
    assert layers_run(TransformersTarget(llama), drafter)[: len(first_round)] == first_round


def test_the_model_as_its_own_draft_model_is_always_right_and_runs_nothing_twice(llama, monkeypatch) -> None:
    own = TransformersTarget(llama)
    fed = noted(monkeypatch, own, "layers", lambda x, *more: x.shape[1])
    _, loop = run(TransformersTarget(llama), DraftModelDrafter(own), PROMPTS[:1], 21)
    assert loop.metrics[0].mean_acceptance_length == 5
    # Each of four rounds feeds what is new (the prompt and its token; then the last draft and the bonus), then drafts.
    assert fed == [len(PROMPTS[0]) + 1, 1, 1, 1] + [2, 1, 1, 1] * 3
    _, ragged = run(TransformersTarget(llama), DraftModelDrafter(own), PROMPTS, 21)
    assert [m.mean_acceptance_length for m in ragged.metrics] == [5, 5, 5]


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_a_draft_model_keeps_nothing_of_rows_that_have_ended(llama: PreTrainedModel) -> None:
    drafter = DraftModelDrafter(TransformersTarget(llama))
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0][:2]]
    decoder = SpecDecoder(llama, drafter=drafter, learn=False)
    for depth in (3, 2):
        out = decoder.generate_batch(prompts, max_new_tokens=20, max_rows=2, num_speculative_tokens=depth)
        assert [each.token_ids for each in out] == [greedy_reference(llama, prompt, 20) for prompt in prompts]
        assert not drafter.rows and not drafter.cache.batch


def test_a_row_beyond_the_draft_models_context_ends_no_drafts_of_others(llama: PreTrainedModel) -> None:
    short = other_model(max_position_embeddings=len(PROMPTS[1]) + 16)
    prompts = [PROMPTS[1] + PROMPTS[0] * 12, PROMPTS[1]]
    metrics = {}
    for count in (2, 1):
        decoder = SpecDecoder(llama, drafter=DraftModelDrafter(short), learn=False)
        out = decoder.generate_batch(prompts[-count:], max_new_tokens=12, num_speculative_tokens=3)
        assert [each.token_ids for each in out] == [greedy_reference(llama, p, 12) for p in prompts[-count:]]
        metrics[count] = [each.metrics for each in out]
    assert not metrics[2][0].num_draft_tokens
    assert metrics[2][1].num_draft_tokens == metrics[1][0].num_draft_tokens > 0


def test_a_row_that_the_draft_model_skips_teaches_no_other_row(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    found = dict[int, list[float]]()
    for count in (0, 4):
        own = other_model(noise=0.0, max_position_embeddings=48)
        drafter = JoinedDrafter(NgramDrafter(prior=False, store=0), DraftModelDrafter(own))
        drafter.bind(target)
        policy = AutoDepth.of(drafter, target.token_costs)
        engine = Engine(target, drafter, ExactVerifier(), policy, max_rows=8)
        prompts = [[3 + (7 * n * n + b) % 90 for n in range(60)] for b in range(count)]
        for prompt in [*prompts, *([5 + b, 6, 7, 8] for b in range(8))]:
            engine.submit(Request(prompt, 40))
        for _ in engine.steps():
            pass
        [counts, *_] = policy.common.by_position
        found[count] = [hits / trials for hits, trials in zip(counts.hits, counts.trials, strict=True) if trials > 1]
    assert found[4] and min(found[4]) > 0.95 and min(found[0]) > 0.95, found


def test_a_draft_model_keeps_nothing_of_rows_whose_step_failed(llama: PreTrainedModel, monkeypatch) -> None:
    target = TransformersTarget(llama)
    drafter = DraftModelDrafter(other_model())
    drafter.bind(target)
    engine = Engine(target, drafter, ExactVerifier(), FixedDepth(3))
    engine.submit(Request(PROMPTS[0], 40))
    for _ in range(3):
        step(engine)
    assert drafter.rows
    monkeypatch.setattr(target, "layers", Mock(side_effect=RuntimeError("out of memory")))
    with pytest.raises(RuntimeError):
        step(engine)
    assert not drafter.rows and not drafter.cache.nbytes


def test_a_draft_model_with_other_tokens_is_refused(llama: PreTrainedModel) -> None:
    target = TransformersTarget(llama)
    with pytest.raises(SpecDecError, match="vocabularies of 97 and 90 tokens"):
        DraftModelDrafter(other_model(90)).bind(target)
    target.tokenizer = Words("a", "b", "c")
    with pytest.raises(SpecDecError, match=r"97 and 97 tokens.*token 1 is 'b' for the model and 'x' for the draft"):
        DraftModelDrafter(other_model(), Words("a", "x", "c")).bind(target)


@pytest.mark.parametrize("size", [90, 104])
def test_a_draft_model_may_pad_its_vocabulary_otherwise(llama: PreTrainedModel, size: int) -> None:
    target = TransformersTarget(llama)
    target.tokenizer = Words("a", "b", "c", "[PAD3]")
    drafter = DraftModelDrafter(other_model(size), Words("a", "b", "c", *(f"[PAD{n}]" for n in range(3, size))))
    for sampling in ({}, {"temperature": 2.0}):
        out, loop = run(target, drafter, [[5, 96, 7]], 20, eos=None, **sampling)
        assert len(out[0]) == 20 and loop.metrics[0].num_draft_tokens > 0
    assert run(target, drafter, [[5, 96, 7]], 20)[0] == [greedy_reference(llama, [5, 96, 7], 20)]


def draft_after(drafter: Drafter, target: Target, ids: list[int], limit: int = 3) -> list[tuple[int, ...]]:
    """The paths from root to leaf of the draft after ``ids``."""
    sampler = Sampler([RowSampler(SamplingParams())])
    state = State(target, target.new_cache(), sampler, [ids], row_states=[drafter.begin()])
    draft = drafter.propose(state, limit)
    return [tuple(path) for i, path in enumerate(draft.paths(0), 1) if i not in draft.parents]


def test_prompt_lookup_drafts_different_continuations_longest_match_first(llama: PreTrainedModel) -> None:
    target, ids = TransformersTarget(llama), [1, 2, 3, 9, 2, 3, 4, 5, 3, 6, 7, 2, 3, 4, 8, 1, 2, 3]
    expected = [(9, 2, 3), (4, 8, 1), (6, 7, 2)]  # after 1 2 3; after 2 3, the later one; after 3
    for count in (1, 2, 3, 9):
        assert draft_after(PromptLookupDrafter(continuations=count), target, ids) == expected[:count]
    assert draft_after(PromptLookupDrafter(prompt_lookup_min=2, continuations=9), target, ids) == expected[:2]


def looked_up(ids: list[int], count: int, limit: int) -> list[tuple[int, ...]]:
    """What prompt lookup says: the texts after earlier occurrences of the last tokens, of most tokens and latest first.

    At most ``count``, which begin with different tokens.
    """
    found = dict[int, tuple[int, ...]]()
    for n in range(min(8, len(ids)), 0, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[-n:] and len(found) < count:
                found.setdefault(ids[end], tuple(ids[end : end + limit]))
    return list(found.values())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_prompt_lookup_finds_what_a_search_through_the_text_finds(llama: PreTrainedModel, count: int) -> None:
    """Also as the text grows."""
    rng, target, drafter = random.Random(count), TransformersTarget(llama), PromptLookupDrafter(continuations=count)
    sampler, ids, row = Sampler([RowSampler(SamplingParams())]), [5], drafter.begin()
    for _ in range(60):
        ids += rng.choices(range(3, 7), k=rng.randint(1, 5))
        draft = drafter.propose(State(target, target.new_cache(), sampler, [ids], row_states=[row]), 4)
        paths = [tuple(path) for i, path in enumerate(draft.paths(0), 1) if i not in draft.parents]
        assert paths == looked_up(ids, count, 4)


def test_prompt_lookup_keeps_less_than_a_kilobyte_of_a_token() -> None:
    row, ids = PromptLookupDrafter().begin(), random.Random(0).choices(range(50_000), k=5000)
    tracemalloc.start()
    row.add(ids)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1000 * len(ids)


def test_what_the_lookahead_pool_learns_is_what_the_model_says(llama: PreTrainedModel) -> None:
    target, drafter = TransformersTarget(llama), LookaheadDrafter(window=3, ngram=3, guesses=99)
    propose, drafted, rows = drafter.propose, [], []

    def spy(state: State, limit: int) -> Draft:
        draft = propose(state, limit)
        drafted.append((list(state.ids[0]), copy.deepcopy(state.row_states[0].window)))
        rows.append(state.row_states[0])
        return draft

    drafter.propose = spy  # type: ignore[method-assign]
    expected = greedy_reference(llama, PROMPTS[0], 24)
    assert run(target, drafter, PROMPTS[:1], 24)[0] == [expected]
    assert len(drafted[0][1]) == 3
    for ids, window in drafted:
        for number, (head, after) in enumerate(window):
            before = [*ids, *(trajectory[0] for trajectory in window[:number]), head, after]
            answer = int(llama(torch.tensor([before])).logits[0, -1].argmax())
            assert (after, answer) in rows[0].pool[head]


@pytest.mark.parametrize("name", ["m2r2", "draft-model", "layer-skip"])
def test_a_drafter_proposes_the_same_whoever_drafted_before(llama: PreTrainedModel, name: str) -> None:
    target = TransformersTarget(llama)
    make: dict[str, Callable[[], Drafter]] = {
        "m2r2": lambda: m2r2(target, 1, ((2, 3),), True, False),
        "draft-model": lambda: DraftModelDrafter(other_model()),
        "layer-skip": lambda: LayerSkipDrafter(),
    }
    alone = proposals(target, make[name]())
    second = make[name]()
    beside = proposals(target, JoinedDrafter(NgramDrafter(), second), second)
    common = alone.keys() & beside.keys()
    assert len(common) >= 8 and len(common) > len(PROMPTS)
    for ids in common:
        n = min(len(alone[ids]), len(beside[ids]))
        assert alone[ids][:n] == beside[ids][:n]


def test_names_are_read_with_sources_folders_and_joins(tmp_path: Path) -> None:
    folder = tmp_path / "a+b=c"
    folder.mkdir()
    (folder / "config.json").write_text('{"drafter": "m2r2"}')

    def parts(text: str) -> list[tuple[str, str | None]]:
        return [tuple(part) for part in DrafterSpec.parse(text).resolved().parts]

    assert parts("auto") == [] and parts("m2r2") == [("m2r2", None)]
    assert parts(str(folder)) == [("m2r2", str(folder))]
    assert parts(f"draft-model={folder}") == [("draft-model", str(folder))]
    assert parts(f"ngram+draft-model={folder}") == [("ngram", None), ("draft-model", str(folder))]
    plain = folder.rename(tmp_path / "plain")
    assert parts(f"ngram+{plain}") == [("ngram", None), ("m2r2", str(plain))]
    hub = DrafterSpec.parse("ngram+org/name@main").parts[1]
    assert hub == ("", "org/name@main")  # nothing is downloaded


@pytest.mark.parametrize("text", ["m2r2+ngram", "prompt-lookup+m2r2", "ngram+m2r2+medusa", "ngram+none", "ngram+ngram"])
def test_only_ngrams_and_one_other_drafter_are_joined(text: str) -> None:
    with pytest.raises(SpecDecError, match=r"drafters are joined as ngram\+X, such as ngram\+m2r2"):
        DrafterSpec.parse(text)


def test_joined_drafters_take_their_options_by_name(llama: PreTrainedModel) -> None:
    options = {"early-exit": {"exit_layer": 3}, "ngram": {"nodes": 5}}
    decoder = SpecDecoder(llama, drafter="ngram+early-exit", drafter_options=options)
    joined = decoder.drafter
    assert isinstance(joined, JoinedDrafter) and joined.ngram.nodes == 5 and joined.other.exit_layer == 3  # type: ignore[attr-defined]
    assert decoder.generate(PROMPTS[0], max_new_tokens=12).token_ids == greedy_reference(llama, PROMPTS[0], 12)


@pytest.mark.parametrize("prices", [None, Prices([0.01 * n for n in range(60)], 0.1, rates=[[0.9] * 3, [0.9] * 2])])
def test_a_joined_draft_has_the_tokens_of_a_drafter_without_probabilities(llama, prices: Prices | None) -> None:  # type: ignore[no-untyped-def]
    """Beside n-grams, as deep as each row may draft; and none of them where a level costs more than it adds."""
    other = Scripted(lambda ids, limit: [(90, 0), (91, 1), (92, 2)][:limit])
    target, drafter = TransformersTarget(llama), JoinedDrafter(NgramDrafter(12, prior=False), other)
    drafter.bind(target)
    rows = [[5, 6, 7, 5, 6], [20, 21, 22]]
    sampler = Sampler([RowSampler(SamplingParams()) for _ in rows])
    state = State(target, target.new_cache(), sampler, rows, prices, depths=[3, 2])
    state.row_states = [drafter.begin() for _ in rows]
    draft = drafter.propose(state, 3)
    assert {(90, 91, 92), (7,)} <= set(map(tuple, draft.paths(0))) and draft.paths(1) == [[90], [90, 91]]
    assert draft.found is not None and draft.found.levels == 3 and drafter.traits.label == "ngram+scripted"
    if prices is not None:
        prices.level = 3.0
        draft = drafter.propose(state, 3)
        assert [7] in draft.paths(0) and [90] not in draft.paths(0) and draft.paths(1) == []


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("none", {"depth": 1}, "'none' has no option 'depth'; it has none"),
    ("none=folder", {}, "'none' takes no source; leave '=folder' out"),
    ("prompt-lookup", {"continuation": 2}, "no option 'continuation' .did you mean 'continuations'"),
    ("prompt-lookup", {"continuations": 0}, "continuations must be greater than or equal to 1; got 0"),
    ("prompt-lookup", {"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "got 4 and 3"),
    ("early-exit", {"exit_layer": 4}, "exit_layer must be less than or equal to 3; got 4"),
    ("early-exit", {"nodes": 7}, "no option 'nodes'"),
    ("deed", {}, "no deed drafter is shipped for this model; train one: specdec train deed"),
    ("deed", {"exit_layer": 3}, "no option 'exit_layer'"),
    ("skip-decode", {"deepest": 4}, "deepest must be less than or equal to 3; got 4"),
    ("skip-decode", {"deepest": 1, "shallowest": 2}, "falls from deepest to shallowest; got 1 and 2"),
    ("skip-decode", {"horizon": 0}, "horizon must be greater than or equal to 1"),
    ("skip-decode=folder", {}, "'skip-decode' takes no source"),
    ("early-exit=folder", {}, "'early-exit' takes no source"),
    ("layer-skip", {"skip": [4]}, r"layers 0 .. 3, not everything; got \[4\]"),
    ("layer-skip", {"skip": [0, 1, 2, 3]}, "not everything"),
    ("layer-skip", {"skip": [-1]}, "skip.0 must be greater than or equal to 0"),
    ("lookahead", {"ngram": 1}, "ngram must be greater than or equal to 2"),
    ("lookahead", {"window": 2.5}, "window must be a valid integer; got 2.5"),
    ("draft-model", {}, "needs a second model; name it: draft-model=NAME"),
    ("ngram+m2r3", {}, "unknown drafter 'm2r3' .did you mean 'm2r2'"),
    (
        "ngram+early-exit",
        {"window": 3},
        r"drafter 'ngram\+early-exit' has no option 'window'; it has ngram, early-exit",
    ),
    ("ngram+early-exit", {"ngram": 3}, "options of 'ngram' as a mapping; got 3"),
]


@pytest.mark.parametrize(("drafter", "options", "message"), REFUSED)
def test_bad_options_are_refused_in_one_line(llama, drafter, options, message) -> None:
    with refused(message):
        SpecDecoder(llama, drafter=drafter, drafter_options=options, runtime="transformers")


def test_a_class_that_is_not_a_drafter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.DRAFTERS, "other", "specdec.speculation.draft:Draft")
    with refused(r"drafter 'other' \(specdec.speculation.draft:Draft\) is not a subclass of .*Drafter"):
        registry.lookup("drafters", "other")


def test_the_documented_example_works_as_an_outside_package(llama: PreTrainedModel, tmp_path, monkeypatch) -> None:
    text = (DOCS / "extend.md").read_text("utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class BigramDrafter" in block)
    project = tomllib.loads(next(b for b in re.findall(r"```toml\n(.*?)```", text, re.S)))
    ((name, value),) = project["project"]["entry-points"]["specdec.drafters"].items()
    (tmp_path / f"{value.partition(':')[0]}.py").write_text(code)
    info = tmp_path / "example-1.0.dist-info"  # as an installer leaves it
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[specdec.drafters]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "outside", registry.outside.__wrapped__)  # read again

    decoder = SpecDecoder(llama, drafter=name)
    outs = decoder.generate_batch(PROMPTS, max_new_tokens=24, num_speculative_tokens=4)
    assert [out.token_ids for out in outs] == [greedy_reference(llama, prompt, 24) for prompt in PROMPTS]
    assert all(out.metrics.num_draft_tokens > 0 for out in outs)
    assert SpecDecoder(llama, drafter=f"ngram+{name}").generate(PROMPTS[0], max_new_tokens=8).token_ids
    with pytest.raises(SpecDecError, match=f"drafter '{name}' has no option"):
        SpecDecoder(llama, drafter=name, drafter_options={"x": 1})


def test_an_unknown_option_of_an_outside_drafter_is_refused_by_name(llama: PreTrainedModel, monkeypatch) -> None:
    class Outside(Scripted):
        def __init__(self, size: int = 4) -> None:
            super().__init__(lambda ids, limit: [])

        @classmethod
        def load(cls, target, source=None, **more):
            return cls(**more)

    monkeypatch.setattr(registry, "outside", lambda kind: {"outside": "prompt_lookup_outside:Outside"})
    monkeypatch.setitem(sys.modules, "prompt_lookup_outside", SimpleNamespace(Outside=Outside))
    says = r"drafter 'outside' has no option 'sizes' \(did you mean 'size'\?\); it has size"
    for name, given in (("outside", {"sizes": 3}), ("ngram+outside", {"outside": {"sizes": 3}})):
        with pytest.raises(SpecDecError, match=says):
            SpecDecoder(llama, drafter=name, drafter_options=given)
    assert isinstance(SpecDecoder(llama, drafter="outside", drafter_options={"size": 3}).drafter, Outside)


def test_the_page_names_every_drafter_that_is_built_in() -> None:
    text = (DOCS / "choose-a-drafter.md").read_text("utf-8")
    assert [name for name in registry.DRAFTERS if f"| `{name}` |" not in text] == []
