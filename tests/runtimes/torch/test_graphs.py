"""The PyTorch runtime by recorded passes: the eager one's numbers, whatever is replayed, grows, or is rolled back.

Recording needs a GPU. ``Replay`` stands in: it runs the function again on the same memory, and fails where a real
graph would do something else: if an operation, a number or a tensor from outside has changed since it was recorded.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from passes import (
    Replay,
    adapted_pass,
    by_path,
    drafted_rows,
    next_logits,
    play,
    random_adapters,
    random_route,
)
from tiny import ELASTIC, greedy_reference, rough_model, tiny_model
from torch import Tensor
from zoo import EVERY, PROMPTS, run

from specdec.base.errors import SpecDecError
from specdec.base.options import SamplingParams
from specdec.kvcache.cache import KVCache
from specdec.models.families import FAMILIES
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree, DraftRoots, TreeLimits
from specdec.runtimes.target import Pass
from specdec.runtimes.torch import static_cache
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.torch.target import TorchTarget
from specdec.speculation.candidates import Candidates
from specdec.speculation.device_draft import DeviceDraft
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.state import State
from specdec.speculation.tree_builder import in_one_shape, worth_scoring
from specdec.speculation.trees import Prices

ACTIONS = ["run", "run", "first layer", "first layer", "second layer", "second layer", "commit", "select", "end"]
OTHERS = sorted(FAMILIES.keys() - {"llama", "gpt_oss", "qwen3_next"})


@pytest.fixture(autouse=True)
def count() -> None:
    Replay.recorded = Replay.replayed = 0


@pytest.mark.parametrize(
    "family", ["llama", "gpt_oss", "qwen3_next", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
@torch.inference_mode()
def test_equal_to_the_eager_runtime(family: str) -> None:
    """Ragged rows, single tokens, a tree with a kept branch, resumed blocks, windows."""
    model = rough_model(family, **(ELASTIC if family == "gemma4_text" else {}))
    target = CapturedTarget(model, record=Replay)
    for _ in range(2):
        for got, expected in zip(play(target), play(TorchTarget(model)), strict=True):
            assert torch.allclose(got, expected, atol=2e-5)
    assert 0 < Replay.recorded < Replay.replayed


@torch.inference_mode()
def test_passes_are_recorded_once_for_each_bucket_and_again_when_the_cache_grows() -> None:
    model = tiny_model("llama", max_position_embeddings=2048)
    target, eager = CapturedTarget(model, record=Replay), TorchTarget(model)
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (1, 700))
    ends = [110, 111, 112, 115, 119, 121, 127, 129, 130, 136, 390, 394]  # beyond 128 tokens the cache grows
    blocks = list(zip([0, *ends], ends, strict=False))

    def logits(target: TorchTarget) -> Tensor:
        cache, out = target.new_cache(), []
        for a, b in blocks:
            out.append(next_logits(target, cache, ids[:, a:b]))
        return torch.cat(out, 1)

    expected = logits(eager)
    assert torch.allclose(logits(target), expected, atol=2e-5)
    assert Replay.recorded < 24
    assert torch.allclose(logits(target), expected, atol=2e-5)  # it begins in the grown cache
    again = Replay.recorded
    assert torch.allclose(logits(target), expected, atol=2e-5)
    assert Replay.recorded == again


@pytest.mark.parametrize(
    ("family", "drafter"),
    [
        *(
            ("llama", drafter)
            for drafter in ("m2r2: projection", "m2r2-paper", "layer-skip", "lookahead (tree)", "medusa (tree)")
        ),
        ("qwen3_moe", "ngram (tree)"),
        ("qwen3_5_text", "ngram (tree)"),
        ("qwen3_5_text", "m2r2: projection"),
        ("qwen3_5_moe_text", "medusa (tree)"),
    ],
)
def test_generations_are_the_models_own(family: str, drafter: str) -> None:
    """A batch whose rows end one after the other; twice, in the same buffer."""
    model = tiny_model(family)
    target = CapturedTarget(model, record=Replay)
    for _ in range(2):
        out, _loop = run(target, EVERY[drafter](target), PROMPTS, 20)
        assert out == [greedy_reference(model, prompt, 20) for prompt in PROMPTS]
        del _loop
    assert Replay.replayed > Replay.recorded > 0


@torch.inference_mode()
def test_changed_adapters_are_read_as_they_are() -> None:
    target = CapturedTarget(rough_model("llama"), record=Replay)
    with torch.inference_mode(False):
        adapters = random_adapters(target)
    before = adapted_pass(target, adapters, 3)
    with torch.inference_mode(False), torch.no_grad():
        for parameter in adapters.parameters():
            parameter.mul_(2)
    after = adapted_pass(target, adapters, 3)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, adapted_pass(TorchTarget(target.model), adapters, 3), atol=2e-5)


@torch.inference_mode()
def test_heads_that_are_made_anew_are_not_recorded() -> None:
    """As a draft vocabulary grows; another head may have the address of one that is gone."""
    target = CapturedTarget(tiny_model("llama"), record=Replay)
    eager, x, before = TorchTarget(target.model), torch.randn(1, 2, 32), Replay.recorded
    for count in range(1, 60):
        head = target.reduced_head(torch.arange(count) % 97)
        assert torch.allclose(target.readout(x, head), eager.readout(x, head), atol=2e-5)
        del head
    head, other = target.reduced_head(torch.arange(7)), target.reduced_head(torch.arange(7, 14))
    for each in (head, other, head):
        assert torch.allclose(target.readout(x, each), eager.readout(x, each), atol=2e-5)
    assert Replay.recorded == before


@torch.inference_mode()
def test_weights_live_as_long_as_what_was_recorded_with_them() -> None:
    """A CUDA graph knows addresses alone: unlike the stand-in's function, it keeps nothing alive."""

    class Recorded:
        def __init__(self, function: Callable[[], None]) -> None:
            function()

        def __call__(self) -> None:
            pass

    target = CapturedTarget(rough_model("llama"), record=Replay)
    target.record = Recorded
    with torch.inference_mode(False):
        adapters = random_adapters(target)
    adapted_pass(target, adapters, 3)
    maps = [weakref.ref(layer) for layer in target._adapted[adapters].values()]
    del adapters
    gc.collect()
    assert maps and all(each() is not None for each in maps)
    target.captured_functions.clear()
    gc.collect()
    assert all(each() is None for each in maps)


def of_rows(target: TorchTarget, rows: int) -> tuple[KVCache, DraftRoots]:
    """A cache with texts of different lengths, and the roots behind them."""
    cache = target.new_cache(0)
    states = list[list[Tensor]]()
    for row in range(rows):
        own, ids = target.new_cache(), torch.randint(3, 97, (1, 3 + 2 * row))
        positions, taps = torch.arange(ids.shape[1])[None], {1: torch.empty(0), 3: torch.empty(0)}
        x = target.embed(ids, positions)
        final = target.layers(x, 0, 4, Pass(positions, own.register(0, positions), own, taps))
        own.commit([list(range(ids.shape[1]))])
        states.append([part[:, -1:].clone() for part in (final, *taps.values())])
        cache.join(own)
    final, *carried = (torch.cat(parts) for parts in zip(*states, strict=True))
    return cache, DraftRoots([5 + row for row in range(rows)], cache.rows, final, carried)


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_drafts_are_those_of_the_eager_runtime(rows: int) -> None:
    """Trees and chains, greedy or with noise, calibrated, beside another source, with a head that grows."""
    targets = CapturedTarget(rough_model("llama"), record=Replay), TorchTarget(rough_model("llama"))
    torch.manual_seed(5)
    route = random_route(targets[0], 2, torch.float32)
    assert route.tokens is not None
    random, both = torch.get_rng_state(), list[tuple[KVCache, DraftRoots]]()
    for target in targets:
        torch.set_rng_state(random)
        both.append(of_rows(target, rows))
    params = [SamplingParams(temperature=0.5 * (row + (rows == 1)), seed=row, top_k=9 * row) for row in range(rows)]
    sampled = Sampler([RowSampler(each) for each in params]).sampled([[1] * 7] * rows)
    tree = Candidates([-0.1, -0.4, -0.9], [7, int(route.tokens[3]), 9], [0, 1, 0], [[0.9, 0.7, 0.4]])
    tables = [[[0.02 + 0.09 * n for n in range(11)]] * 3] * rows
    growing = replace(route, heads=[route.heads[0], targets[0].extended_head(None, route.tokens[50:])], made={})
    forbidden = None if rows == 1 else torch.rand(rows, 20) < 0.5
    changes: list[dict[str, Any]] = [
        {},
        {"tables": tables},
        {"sampled": sampled},
        {"given": [tree] * rows, "tables": tables},
        {"given": [Candidates.none()] * rows, "forbidden": forbidden},
    ]
    found = list[list[Candidates]]()
    for how in changes:
        for path, limits in (route, TreeLimits(4, 3)), (growing, TreeLimits(3, 3)), (growing, TreeLimits(5, 1)):
            before = Replay.recorded
            for _ in range(2):
                found = [
                    drafted_rows(t, cache, replace(roots, **how), path, limits)
                    for t, (cache, roots) in zip(targets, both, strict=True)
                ]
                for ours, theirs in zip(*found, strict=True):
                    assert by_path(ours) == pytest.approx(by_path(theirs), abs=1e-4) and ours.tokens
                    assert ours.raw[0] == pytest.approx(theirs.raw[0], abs=1e-4)
            assert Replay.recorded == before + 1
            assert all(cache.lengths == [max(cache.rows)] * 4 for cache, _ in both)
            if "given" in how:
                continue
            # What the device takes is what the host would
            cache, roots = both[0]
            state = State(
                targets[0], cache, Sampler([RowSampler(SamplingParams())] * rows), [[1] * n for n in cache.rows]
            )
            prices = Prices([0.03 * n for n in range(40)])
            for count, priced in (2, None), (5, None), (9, prices):
                choice = DeviceChoice(count, [2] * rows, () if priced is None else priced.nodes)
                held = targets[0].draft_rows(cache, replace(roots, **how, choice=choice), path, limits)
                assert isinstance(held, DeviceTree)
                draft = DeviceDraft(held, state, limits.levels)
                every = [own.within(2) for own in found[1]]
                best = worth_scoring(every, 9, None, priced) if priced else [own.best(count) for own in every]
                expected, _ = in_one_shape([(own.tokens, own.parents) for own in best])
                assert draft.lists() == expected.lists() and draft.parents == expected.parents


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next"])
@torch.inference_mode()
def test_adapters_of_recurrent_layers_are_those_of_drafts_alone(family: str) -> None:
    """Rows that draft chains with adapters, and a row that drafts a tree without, in one static cache.

    Pending tokens, which run with a draft, run as the model does; so what the model computes next is its own.
    """
    targets = CapturedTarget(rough_model(family), record=Replay), TorchTarget(rough_model(family))
    assert {0, 2} <= targets[0].recurrent_layers
    torch.manual_seed(5)
    adapted = replace(random_route(targets[0], 2, torch.float32), segments=((0, 1), (2, 3)), made={})
    plain = replace(adapted, adapters=None, made={})
    random, both = torch.get_rng_state(), list[list[tuple[KVCache, DraftRoots]]]()
    for target in targets:
        torch.set_rng_state(random)
        both.append([of_rows(target, 2), of_rows(target, 1)])
    for kept in (3, 2, 1):
        before, found = Replay.replayed, list[list[Candidates]]()
        for target, rows in zip(targets, both, strict=True):
            own = list[Candidates]()
            for (cache, roots), path in zip(rows, (adapted, plain), strict=True):
                now = replace(roots, positions=cache.rows)
                limits = TreeLimits(4, 2 if path is plain else 1)
                own += drafted_rows(target, cache, now, path, limits)
                if path is plain:
                    other = drafted_rows(target, cache, now, adapted, limits)
                    assert by_path(other[0]) != by_path(own[-1])
            found.append(own)
        assert Replay.replayed >= before + 3
        for ours, theirs in zip(*found, strict=True):
            assert by_path(ours) == pytest.approx(by_path(theirs), abs=1e-4) and ours.tokens
        for n in range(2):
            ids = torch.randint(3, 97, (2 - n, 3))
            scored = [next_logits(target, rows[n][0], ids, kept) for target, rows in zip(targets, both, strict=True)]
            torch.testing.assert_close(*scored, atol=5e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_mixed_load_is_captured_a_few_times() -> None:
    """Trees, chains and one to eight rows, whose numbers of tokens differ from step to step."""
    target, eager = CapturedTarget(tiny_model("llama"), record=Replay), TorchTarget(tiny_model("llama"))
    target.captured_functions.clear()
    for rows in (1, 2, 3, 5, 8, 7, 4, 1):
        caches = [each.new_cache(rows) for each in (target, eager)]
        for t in (9, 1, 5, 7, 3, 2, 4, 1)[: 8 if rows < 5 else 6]:
            ids, tree = torch.randint(3, 97, (rows, t)), torch.ones(t, t, dtype=torch.bool).tril()
            tree[t // 2, t // 2 - 1] = t < 3  # a branch
            found = list[Tensor]()
            for runtime, cache in zip((target, eager), caches, strict=True):
                positions = torch.tensor(cache.rows)[:, None] + torch.arange(t)
                mask = cache.register(0, positions, tree if t % 2 else None)
                x = runtime.layers(runtime.embed(ids, positions), 0, 4, Pass(positions, mask, cache))
                found.append(runtime.readout(x))
                cache.commit([list(range(1 + (t > 2) * (b % 2))) for b in range(rows)])
            torch.testing.assert_close(*found, atol=2e-5, rtol=1e-5)
    assert len(target.captured_functions) <= 24


@torch.inference_mode()
def test_the_cache_doubles_counts_and_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CapturedTarget(tiny_model("llama", max_position_embeddings=1024), record=Replay)
    static = target.static
    cache = target.new_cache(3)
    next_logits(target, cache, torch.full((3, 2), 5))
    assert static.whole is not None and static.whole.shape[2] == 4  # lanes
    lane, slots = static.whole.nbytes // 4, static.whole.shape[4]
    assert cache.nbytes == 3 * lane // 2  # half of a lane's slots are spare
    assert target.spare_bytes == static.whole.nbytes - cache.nbytes
    for _ in range(slots // 20):
        next_logits(target, cache, torch.full((3, 20), 5))
    assert static.whole.shape[4] == 2 * slots
    cache.select([2])
    assert cache.nbytes == 3 * lane // 2 and target.spare_bytes == static.whole.nbytes - cache.nbytes
    assert static.whole is not None and target.captured_functions
    monkeypatch.setattr(static_cache, "KEPT", 0)
    memory = weakref.ref(static.whole)
    del cache
    assert static.whole is None and memory() is None and target.spare_bytes == 0
    next_logits(target, target.new_cache(1), torch.tensor([[5]]))


def test_rows_that_end_with_the_process_release_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter has cleared the module by then."""
    problems = list[Any]()
    target = CapturedTarget(tiny_model("llama"), record=Replay)
    cache = target.new_cache()
    with torch.inference_mode():
        next_logits(target, cache, torch.tensor([[5]]))
    monkeypatch.setattr(sys, "unraisablehook", problems.append)
    monkeypatch.setattr(static_cache, "KEPT", None)
    del cache
    assert not problems and target.static.whole is not None


def entries_of(cache: KVCache) -> list[Tensor]:
    """A copy of the keys and values of each row and layer, uncommitted tokens included, [2, S, H, d] each."""
    each = [cache.of_layer(layer, row) for row in range(cache.batch) for layer in range(len(cache.lengths))]
    return [torch.stack([*own.values()]) for own in each]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether each row and layer begins with what is expected."""
    return all(torch.equal(x[:, : y.shape[1]], y) for x, y in zip(found, expected, strict=True))


def run_layers(target: TorchTarget, cache: KVCache, count: int, lo: int = 0, hi: int = 2) -> None:
    """Run the next ``count`` tokens of each row, whose states are random, through layers [lo, hi), without a commit."""
    positions = torch.tensor(cache.rows)[:, None] + cache.uncommitted(lo) + torch.arange(count)
    mask = cache.register(lo, positions)
    target.layers(torch.randn(cache.batch, count, target.hidden_size), lo, hi, Pass(positions, mask, cache))


@pytest.mark.parametrize("how", ["committed", "uncommitted", "early layers"])
@torch.inference_mode()
def test_a_captured_pass_leaves_rows_alone_that_grew_without_capture(how: str) -> None:
    """Rows in lanes of 256 slots go on in passes of over 64 tokens. Then comes another row's prompt of 40 tokens."""
    target = CapturedTarget(tiny_model("llama", max_position_embeddings=1024), record=Replay)
    rows, other = target.new_cache(3), target.new_cache()
    for count in 100, 1:  # the second pass is captured
        next_logits(target, rows, torch.randint(3, 97, (3, count)))
    assert target.static.slots == 256
    for _ in range(4):
        run_layers(target, rows, 25, 0, 2 if how == "early layers" else 4)
        if how == "committed":
            rows.commit([range(25)] * 3)
    if how == "early layers":  # the others begin, captured
        run_layers(target, rows, 8, 2, 4)
    expected, recorded = entries_of(rows), Replay.recorded
    next_logits(target, other, torch.randint(3, 97, (1, 40)))
    assert Replay.recorded > recorded and same(entries_of(rows), expected)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_no_pass_changes_what_others_have_stored(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random passes of three caches, captured or not, through both layers or one, rows that go, commits.

    The texts begin where lanes are nearly full.
    """
    monkeypatch.setattr(static_cache, "KEPT", 0)  # so that lanes are small again when all rows have ended
    random = Random(seed)
    torch.manual_seed(seed)
    target = CapturedTarget(tiny_model("llama", max_position_embeddings=4096, num_hidden_layers=2), record=Replay)
    caches = list[tuple[KVCache, list[Tensor]]]()
    for step in range(120):
        if step % 15 == 0:
            caches.clear()
            assert target.static.whole is None
        while len(caches) < 3:
            cache = target.new_cache(random.choice([1, 2, 3]))
            full = max(target.static.slots, static_cache.SLOTS) - static_cache.SPARE
            run_layers(target, cache, full - random.randrange(100))
            cache.commit([range(cache.uncommitted(0))] * cache.batch)
            caches.append((cache, entries_of(cache)))
        cache, expected = caches.pop(random.randrange(3))
        count, action = random.choice([1, 2, 8, 25, 40, 60]), random.choice(ACTIONS)
        if behind := cache.lengths[0] - cache.lengths[1]:
            run_layers(target, cache, min(count, behind) if action == "second layer" else behind, 1)
        if action == "run":
            run_layers(target, cache, count)
        elif action == "first layer":
            run_layers(target, cache, count, 0, 1)
        elif action == "commit":
            most = cache.uncommitted(0)
            paths = [sorted(random.sample(range(most), random.randint(0, most))) for _ in cache.entries]
            both = [(n, path) for n, path in zip(cache.rows, paths, strict=True) for _ in cache.lengths]
            moved = zip(entries_of(cache), both, strict=True)
            expected = [x[:, [*range(n), *(n + slot for slot in path)]] for x, (n, path) in moved]
            cache.commit(paths)
        elif action == "select":
            kept = random.sample(range(cache.batch), random.randint(1, cache.batch))
            expected = [expected[2 * row + layer][:, : cache.rows[row]] for row in kept for layer in (0, 1)]
            cache.select(kept)
        assert same(entries_of(cache), expected)
        if action != "end":
            caches.append((cache, entries_of(cache)))
        del cache
        assert all(same(entries_of(other), own) for other, own in caches)
    assert Replay.replayed > Replay.recorded > 0


@torch.inference_mode()
def test_a_full_device_says_so() -> None:
    target = CapturedTarget(tiny_model("llama"), record=Replay)

    target.record = Mock(side_effect=torch.OutOfMemoryError("tried to allocate 20 GiB"))
    target.captured_functions.clear()
    with pytest.raises(SpecDecError, match=r"the memory of this device is full; lower --kv-memory .*\(tried to"):
        next_logits(target, target.new_cache(1), torch.tensor([[5]]))


@torch.inference_mode()
def test_rows_that_come_and_go_meet_buffers_of_their_shape() -> None:
    """One row, two, and one again; and what begins in the buffer that these leave behind."""
    target, eager = CapturedTarget(tiny_model("llama"), record=Replay), TorchTarget(tiny_model("llama"))

    def step(runtime: TorchTarget, cache: KVCache, token: int) -> Tensor:
        return next_logits(runtime, cache, torch.full((cache.batch, 1), token))

    def play(runtime: TorchTarget) -> list[Tensor]:
        cache = runtime.new_cache(1)
        seen = [step(runtime, cache, token) for token in (5, 6)]
        for _ in range(2):
            cache.join(cache.take(0))
            seen += [step(runtime, cache, token) for token in (7, 8)]
            cache.select([1])
            seen += [step(runtime, cache, token) for token in (9, 10)]
        return seen

    expected = play(eager)
    for _ in range(3):
        before = Replay.recorded
        for got, right in zip(play(target), expected, strict=True):
            assert torch.allclose(got, right, atol=2e-5)
    assert Replay.recorded == before < Replay.replayed


@torch.inference_mode()
def test_the_stand_in_fails_where_a_graph_would_go_wrong() -> None:
    x, state = torch.ones(3), {"times": 2}
    graph = Replay(lambda: x.mul_(state["times"]))
    graph()
    state["times"] = 3
    with pytest.raises(AssertionError, match="what was recorded"):
        graph()
    with pytest.raises(AssertionError, match="waits"):
        Replay(lambda: x.add_(x.sum().item()))


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SpecDecError, match="need the model on a CUDA device, not on 'cpu'"):
        CapturedTarget(tiny_model("llama"))


@torch.inference_mode()
def test_what_was_not_finite_in_one_request_reaches_no_later_one() -> None:
    """Its keys and values stand in slots that are masked; a mask does not hide what is not a number."""
    target = CapturedTarget(tiny_model("llama"), record=Replay)

    def run(cache: KVCache, ids: list[list[int]]) -> Tensor:
        return next_logits(target, cache, torch.tensor(ids))

    def broken() -> KVCache:
        cache = target.new_cache(2)
        run(cache, [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
        cache.data[1][:, :, :, : cache.committed + 2] = torch.nan  # and of a draft
        return cache

    def guest() -> KVCache:
        cache = target.new_cache(1)
        run(cache, [[20, 21]])
        return cache

    right = run(guest(), [[22]])
    cache = broken()
    cache.select([0])
    cache.join(guest())
    torch.testing.assert_close(run(cache, [[3], [22]])[1:], right)
    del cache
    broken()
    cache = target.new_cache(2)  # to which the same buffer is lent
    run(cache, [[20, 21]] * 2)
    torch.testing.assert_close(run(cache, [[22]] * 2), right.expand(2, -1, -1))
