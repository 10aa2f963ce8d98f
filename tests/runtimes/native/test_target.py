"""The native runtime: the reference's numbers within bf16's rounding, and its own to the last bit whatever the pass."""

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from passes import (
    ALIKE,
    adapted_pass,
    after,
    apart,
    by_path,
    drafted,
    drafted_rows,
    in_blocks,
    next_logits,
    play,
    random_adapters,
    random_blocks,
    random_route,
    seeded,
    several,
)
from targets import needs_native, reference_of
from tiny import ROPES, SIZES, WHOLE, model_of, rough_model, sizes_of, tiny_model

from specdec.base import cores
from specdec.base.errors import SpecDecError
from specdec.base.options import SamplingParams
from specdec.kvcache.cache import KVCache
from specdec.kvcache.recurrent import ALL_LAYERS
from specdec.models.gguf.blocks import BlockLinear
from specdec.runtimes.decoder_layer import Adapters, recurrent
from specdec.runtimes.draft_path import DraftRoots, TreeLimits
from specdec.runtimes.narrow import gated_mlp
from specdec.runtimes.native import library, linear, packing
from specdec.runtimes.native.target import FAMILIES, NativeTarget
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Pass, Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.speculation.candidates import Candidates
from specdec.speculation.sampling import RowSampler, Sampler

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads", "kernels")]  # kernels share work among them
VARIANTS = (
    [(family, {}) for family in FAMILIES]
    + [("gemma4_text", WHOLE)]
    + [(f, {"rope_parameters": rope}) for f, rope in ROPES.items()]
)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@torch.inference_mode()
def test_agrees_with_the_reference_runtime(family: str, changes: dict[str, object]) -> None:
    model = model_of(family, **changes)
    routed = list[torch.Tensor]()
    native = play(NativeTarget(model), routed)
    wide = play(reference_of(model_of_float(model, family, changes)), routed)
    rough = play(reference_of(model), routed)
    for got, reference, expected in zip(native, rough, wide, strict=True):
        # As near to float32 as the model itself is in bf16, within the noise of rounding.
        assert apart(got.float(), expected) < 2 * apart(reference.float(), expected) + 0.02


def model_of_float(model: torch.nn.Module, family: str, changes: dict[str, object]) -> torch.nn.Module:
    wide = rough_model(family, **(sizes_of(family) | changes))
    wide.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return wide


def passes(target: Target, ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Logits [1, T, V] of ``ids`` [1, T], run in blocks that end at ``ends``."""
    cache = target.new_cache()
    parts = [next_logits(target, cache, ids[:, a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("family", "kv_cache"),
    [
        *((family, "auto") for family in FAMILIES if family not in ALIKE),
        ("llama", "int8"),
        ("gemma3_text", "int8"),
        ("gemma4_text", "int8"),
    ],
)
@torch.inference_mode()
def test_a_token_does_not_depend_on_what_is_scored_with_it(family: str, kv_cache: str) -> None:
    changes = {"rope_parameters": ROPES[family]} if family in ROPES else {}
    target = NativeTarget(model_of(family, **changes), kv_cache=kv_cache)
    torch.manual_seed(5)
    ids = torch.randint(3, 97, (1, 50))
    single = passes(target, ids, list(range(1, 51)))
    for ends in ([50], [3, 4, 9, 25, 50], [1, 35, 50], [16, 17, 22, 38, 50]):
        assert torch.equal(passes(target, ids, ends), single)
    # Beside another row, shorter or longer; and as a branch of a tree, whose slots are not in the order of its path.
    batch = torch.cat((ids[:, :20], torch.randint(3, 97, (1, 20))))
    positions, cache = torch.arange(20).expand(2, -1), target.new_cache(2)
    x = target.layers(
        target.embed(batch, positions), 0, 4, Pass(positions, cache.register(0, positions), cache, ids=batch)
    )
    assert torch.equal(target.readout(x)[0], single[0, :20])
    cache.commit([list(range(20)), list(range(7))])
    tree = torch.zeros(6, 6, dtype=torch.bool)
    for node, ancestors in enumerate(([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4], [0, 2, 4, 5])):
        tree[node, ancestors] = True
    tokens = torch.full((2, 6), 5)
    tokens[0, [0, 2, 4, 5]] = ids[0, 20:24]
    offsets = torch.tensor([0, 1, 1, 2, 2, 3])
    positions = torch.tensor([[20], [7]]) + offsets
    given = Pass(positions, cache.register(0, positions, tree), cache, ids=tokens)
    x = target.layers(target.embed(tokens, positions), 0, 4, given)
    assert torch.equal(target.readout(x)[0, [0, 2, 4, 5]], single[0, 20:24])
    cache.commit([[0, 2, 4, 5], [0]])
    assert torch.equal(next_logits(target, cache, ids[:, 24:25].expand(2, -1))[0], single[0, 24:25])


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@torch.inference_mode()
def test_a_branch_deeper_than_a_window_sees_in_each_layer_what_its_window_shows(family: str) -> None:
    target = NativeTarget(model_of(family, sliding_window=3))
    ids = torch.randint(3, 97, (1, 27), generator=torch.Generator().manual_seed(4))
    single = passes(target, ids, [20, *range(21, 28)])
    cache, positions = target.new_cache(), torch.arange(20)[None]
    target.layers(target.embed(ids[:, :20], positions), 0, 4, Pass(positions, cache.register(0, positions), cache))
    cache.commit([list(range(20))])
    path, other = [0, 1, 3, 4, 6, 7, 8], [0, 2, 5]  # nodes of a branch, and of one beside it
    tree, tokens, offsets = torch.zeros(9, 9, dtype=torch.bool), torch.full((1, 9), 5), torch.zeros(9, dtype=torch.long)
    for branch in (path, other):
        for depth, node in enumerate(branch):
            tree[node, branch[: depth + 1]], offsets[node] = True, depth
    tokens[0, path] = ids[0, 20:]
    positions = 20 + offsets[None]
    x = target.layers(target.embed(tokens, positions), 0, 4, Pass(positions, cache.register(0, positions, tree), cache))
    assert torch.equal(target.readout(x)[0, path], single[0, 20:])


@torch.inference_mode()
def test_tables_reach_to_positions_beyond_the_slots() -> None:
    """A drafter's cache may begin within the text, where the model's reuses a prefix."""
    target = NativeTarget(model_of("llama", max_position_embeddings=4096))
    ids, positions, cache = torch.tensor([[5, 6, 7]]), torch.arange(3000, 3003)[None], target.new_cache()
    target.layers(target.embed(ids, positions), 0, 4, Pass(positions, cache.register(0, positions), cache))
    assert target._positions >= 3003


@pytest.mark.parametrize(
    ("family", "kv_cache"), [("mistral", "auto"), ("llama", "int8"), ("qwen3_5_text", "auto"), ("qwen3_moe", "auto")]
)
@torch.inference_mode()
def test_a_long_prompt_goes_through_in_slices(family: str, kv_cache: str) -> None:
    """Its logits, those of routers and tapped states are those of short passes."""
    window = {"sliding_window": 600} if family == "mistral" else {}
    target = NativeTarget(model_of(family, max_position_embeddings=2048, **window), kv_cache=kv_cache)
    ids = torch.randint(3, 97, (1, 1100), generator=torch.Generator().manual_seed(8))

    def run(ends: list[int]) -> torch.Tensor:
        cache, start, out = target.new_cache(), 0, []
        for end in ends:
            positions, taps = torch.arange(start, end)[None], {1: torch.empty(0)}
            mask, routed = cache.register(0, positions), torch.zeros(end - start, 4, target.packed.mixture.experts)
            given = Pass(positions, mask, cache, taps, routed=routed)
            x = target.layers(target.embed(ids[:, start:end], positions), 0, 4, given)
            out.append(torch.cat((taps[1], target.readout(x), routed.flatten(1)[None]), -1))
            cache.commit([list(range(end - start))])
            start = end
        return torch.cat(out, 1)

    whole = run([1100])
    assert torch.equal(whole, run([300, 650, 700, 705, 1100]))
    assert torch.equal(whole, run([*range(100, 1101, 100)]))


@torch.inference_mode()
def test_a_model_in_blocks_gives_the_logits_of_its_bf16_values() -> None:
    model, dense = in_blocks(), model_of("llama")
    others = {name: value for name, value in model.state_dict().items() if "proj" not in name}
    dense.load_state_dict(others, strict=False)
    for name, module in model.named_modules():
        if isinstance(module, BlockLinear):
            dense.get_submodule(name).weight.copy_(module.weight)
    dense.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    rounded, whole = NativeTarget(model), NativeTarget(dense)
    assert (rounded.weight_format, whole.weight_format) == ("4 and 5 and 8 bits", "16 bits")
    assert (rounded.activations, whole.activations) == ("8 bits", "as computed")
    assert rounded.bytes_read < 0.7 * whole.bytes_read
    ours, theirs = play(rounded), play(whole)
    assert all(0 < apart(a.float(), b.float()) < 0.2 for a, b in zip(ours, theirs, strict=True))
    exact = NativeTarget(model, "dense")
    assert exact.weight_format == "16 bits"
    assert all(torch.equal(a, b) for a, b in zip(play(exact), theirs, strict=True))


@pytest.mark.parametrize(("weights", "most"), [("int4", 0.15), ("int8", 0.01)])
@torch.inference_mode()
def test_rounded_weights_round_the_model(weights: str, most: float) -> None:
    model = model_of("llama")
    linears = [name for name, _ in model.named_modules() if name.endswith("proj")]
    before = {name: model.get_submodule(name).weight.clone() for name in linears}
    target, _ = make_target(model, weights=weights)
    assert isinstance(target, NativeTarget)
    after = {name: model.get_submodule(name).weight for name in linears}
    for name in linears:
        assert 0 < apart(after[name], before[name]) < most, name
    again, _ = make_target(model, weights=weights)  # what is rounded stays what it is
    assert all(torch.equal(model.get_submodule(name).weight, after[name]) for name in linears)
    assert all(torch.equal(a, b) for a, b in zip(play(target), play(again), strict=True))
    NativeTarget(model, "dense")
    assert type(model.get_submodule(linears[0])) is torch.nn.Linear


@torch.inference_mode()
def test_experts_with_biases_are_rounded_like_others() -> None:
    model = model_of("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    before, biases = experts.gate_up_proj.clone(), experts.gate_up_proj_bias.clone()
    target = NativeTarget(model, "int8")  # agrees with the model's own pass
    assert all(item.kinds == {library.Q8} for item in target.packed.expert_maps)
    assert target.bytes_read < NativeTarget(model_of("gpt_oss")).bytes_read
    after = model.model.layers[0].mlp.experts.to_transformers()
    assert 0 < apart(after.gate_up_proj, before) < 0.01 and torch.equal(after.gate_up_proj_bias, biases)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ALIKE])
@torch.inference_mode()
def test_adapters_agree_with_the_reference_runtime(family: str) -> None:
    """They are merged into weights that are quantised for drafts, and leave the model as it is."""
    model = model_of(family)
    reference, target = reference_of(model), NativeTarget(model)
    assert target.linears(1) == reference.linears(1)
    with torch.inference_mode(False):
        adapters = random_adapters(reference, leave_out="self_attn.k_proj").bfloat16()
    expected, plain = (adapted_pass(reference, adapters, 3), adapted_pass(target, None, 3))
    got = adapted_pass(target, adapters, 3)
    share = 0.2  # of what the adapters change
    assert (got - expected).float().norm() < share * (plain - expected).float().norm()
    assert torch.equal(adapted_pass(target, None, 3), plain)


@pytest.mark.parametrize("narrow", [False, True])
def test_training_sees_the_weights_that_drafts_read(narrow: bool, monkeypatch) -> None:
    """Adapted layers compute what the native kernels do, and gradients reach the low-rank terms."""
    monkeypatch.setattr(linear, "LARGE", 0)  # 4 bits, as large layers
    model = model_of("llama")
    target, training = NativeTarget(model), TorchTarget(model, packs=False)
    adapters = random_adapters(training)
    if narrow:
        shapes = {n: training.linears(n) | gated_mlp(training.block(n)).shapes(32) for n in range(3)}
        adapters = Adapters(shapes, 3, dict.fromkeys(range(3), 32))
        for name, parameter in adapters.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3 if name.endswith("up") else 0.1)
    adapters.bfloat16()

    def distance() -> float:
        with torch.no_grad():
            return apart(*(adapted_pass(each, adapters, 6).float() for each in (training, target)))

    exact = distance()
    training.round_adapted(adapters)
    assert distance() < 0.3 * exact
    for parameter in adapters.parameters():
        parameter.requires_grad_(True)
    adapted_pass(training, adapters, 6).float().square().sum().backward()
    assert all(each.grad is not None and bool(each.grad.any()) for each in adapters.parameters())


@pytest.mark.parametrize(("outputs", "kind", "least", "most"), [(50, "Q8", 0, 0.02), (11002, "Q4", 0.05, 0.12)])
@torch.inference_mode()
def test_maps_for_drafts_are_within_their_bits_and_do_not_depend_on_other_rows(outputs, kind, least, most) -> None:
    torch.manual_seed(12)
    weight, bias, x = torch.randn(outputs, 192).bfloat16(), torch.randn(outputs).bfloat16(), torch.randn(70, 192)
    x, draft_only, dense = x.bfloat16(), linear.Packed([weight], bias, draft_only=True), linear.Packed([weight], bias)
    assert draft_only.kinds == {getattr(library, kind)} and draft_only.rounded and not dense.rounded
    found = draft_only(x)
    assert least < apart(found.float(), dense(x).float()) < most
    assert all(torch.equal(found[-rows:], draft_only(x[-rows:])) for rows in (1, 5, 16))


@torch.inference_mode()
def test_four_bits_for_drafts_hold_what_four_bits_can() -> None:
    """Codes 0 .. 15 times a step for 32 inputs, and a least number: nothing is rounded."""
    outputs, inputs = 16400, 128
    torch.manual_seed(13)
    codes = torch.randint(0, 16, (outputs, 4, 32))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    weight = codes * torch.tensor([14, 1, 3, 9]).view(4, 1) + torch.tensor([-112, -5, -20, -30]).view(4, 1)
    weight = weight.view(outputs, inputs).bfloat16()
    x = torch.randint(-127, 128, (40, inputs)).bfloat16()
    x[:, ::32] = 127  # a block's scale is 1
    packed = linear.Packed([weight], draft_only=True)
    assert packed.kinds == {library.Q4}
    assert torch.equal(packed(x), (x.double() @ weight.double().T).bfloat16())


def by_levels(target: Target, *how: Any) -> Candidates:
    """What other runtimes do with ``target``: one pass for each level."""
    [nodes] = Target.draft_rows(target, *how)
    return Candidates(*nodes)


CHAIN, WIDE_TREE, PRICED = TreeLimits(5, 1), TreeLimits(4, 3), TreeLimits(6, 4, 0.02)


@pytest.mark.parametrize(
    ("family", "window", "kv_cache", "limits"),
    [
        *(("llama", None, "auto", limits) for limits in (CHAIN, WIDE_TREE, PRICED)),
        *(("qwen3_5_text", None, "auto", limits) for limits in (CHAIN, PRICED)),
        *(("mistral", 12, "auto", WIDE_TREE), ("llama", None, "int8", PRICED), ("gemma3_text", 12, "auto", PRICED)),
        ("gemma4_text", 12, "auto", PRICED),
        ("gemma4_text", None, "int8", WIDE_TREE),
    ],
)
@torch.inference_mode()
def test_trees_grow_in_one_call_as_they_do_in_parts(family, window, kv_cache, limits) -> None:
    model = model_of(family, **({} if window is None else {"sliding_window": window}))
    with torch.no_grad():
        if getattr(model.config, "final_logit_softcapping", None) is None:  # capped logits would all be the cap
            model.get_output_embeddings().weight.mul_(6)  # few near ties
        for layer in model.model.layers:  # what a token sees of its path matters
            (layer.linear_attn.out_proj if recurrent(layer) else layer.self_attn.o_proj).weight.mul_(8)
    target = NativeTarget(model, kv_cache=kv_cache)
    ids = torch.randint(3, 97, (1, 21), generator=torch.Generator().manual_seed(6))
    cache, roots = after(target, ids)
    total = same = 0
    for number in range(4):
        torch.manual_seed(number)
        route = random_route(target, heads=2)
        whole = drafted(target, cache, roots, route, limits)
        parts = by_levels(target, cache, roots, route, limits)
        assert cache.lengths == [21] * 4
        # Built for the route the first time, and used again.
        states = DraftRoots([5], [21], roots.final[:, -1:].clone(), [tap[:, -1:].clone() for tap in roots.carried])
        assert drafted(target, cache, states, route, limits) == whole
        assert len(parts.scores) > limits.width
        assert whole.parents[: limits.width] == [0] * limits.width
        assert abs(max(whole.depths()) - max(parts.depths())) <= 1  # both end where no path is likely enough
        ours, theirs = by_path(whole), by_path(parts)
        common = ours.keys() & theirs.keys()
        assert max(abs(ours[path] - theirs[path]) for path in common) < 0.12
        for found in (whole, parts):  # without tables, a path is as likely as the heads say
            [said] = found.raw
            before = [found.scores[parent - 1] if parent else 0.0 for parent in found.parents]
            assert found.scores == pytest.approx([a + math.log(p) for a, p in zip(before, said, strict=True)], abs=1e-3)
        total, same = total + len(theirs), same + len(common)
    assert same > 0.75 * total  # near ties may fall either way, and take all behind them along
    # What was committed is as it was.
    again, _ = after(target, ids)
    assert torch.equal(cache.data[0][:, :, :, :21], again.data[0][:, :, :, :21])
    for each in (cache, again):  # what is pending joins the states
        next_logits(target, each, ids[:, :1], keep=0)
    assert all(
        torch.equal(*(each.states[ALL_LAYERS,] for each in both))
        for both in zip(cache.states, again.states, strict=True)
    )


@pytest.mark.parametrize("share", [0.04, 0.5])
@torch.inference_mode()
def test_trees_grow_under_masks_in_one_call_as_they_do_in_parts(share: float) -> None:
    model, limits = model_of("llama"), TreeLimits(4, 3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)  # few near ties
    target = NativeTarget(model)
    cache, roots = seeded(target)
    free = TreeLimits(1, 16)

    def masks(text: Sequence[int]) -> torch.Tensor | None:
        random = torch.Generator().manual_seed(hash(tuple(text)) % 2**31)
        return torch.rand(97, generator=random) < share if len(text) < 3 else None

    total = same = 0
    for number in range(8):
        torch.manual_seed(number)
        route = random_route(target, heads=2)
        ways = partial(drafted, target), partial(by_levels, target)
        ours, theirs = (by_path(grow(cache, replace(roots, masks=masks), route, limits)) for grow in ways)
        assert all(bool(masks(path[:-1])[path[-1]]) for path in ours)  # type: ignore[index]
        assert cache.lengths == [3] * 4 and max(map(len, ours), default=0) <= 3
        assert all(abs(ours[path] - theirs[path]) < 0.3 for path in ours.keys() & theirs.keys())
        total, same = total + len(theirs), same + len(ours.keys() & theirs.keys())
    assert same > 0.75 * total > 0
    assert len(drafted(target, cache, replace(roots, masks=lambda text: None), route, free).tokens) == 0
    assert len(drafted(target, cache, roots, route, free).tokens) == 16
    for error in (ValueError("no mask"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            drafted(target, cache, replace(roots, masks=Mock(side_effect=error)), route, limits)
        assert cache.lengths == [3] * 4


@pytest.mark.parametrize(
    ("family", "kv_cache", "rows"), [("llama", "bf16", 16), ("llama", "int8", 5), ("qwen3_5_text", "bf16", 5)]
)
@torch.inference_mode()
def test_chains_of_several_rows_are_those_of_each_row_alone(family: str, kv_cache: str, rows: int) -> None:
    target = NativeTarget(model_of(family), kv_cache=kv_cache)
    torch.manual_seed(3)
    route, levels, alone = random_route(target, heads=2), 5, list[list[int]]()
    caches, finals, carried = list[KVCache](), list[torch.Tensor](), list[list[torch.Tensor]]()
    for row in range(rows):
        count = 3 + 7 * row % 19
        ids = torch.randint(3, 97, (1, count), generator=torch.Generator().manual_seed(row))
        cache, roots = after(target, ids)
        roots = replace(roots, tokens=[row])
        alone.append(drafted(target, cache, roots, route, TreeLimits(levels, 1)).tokens)
        caches.append(cache)
        finals.append(roots.final[:, -1:])
        carried.append([tap[:, -1:] for tap in roots.carried])
    together = caches[0]
    for cache in caches[1:]:
        together.join(cache)
    lengths, held = list(together.rows), [data.clone() for data in together.data]
    states = [torch.cat(parts) for parts in zip(*carried, strict=True)]
    roots = DraftRoots(list(range(rows)), lengths, torch.cat(finals), states)
    added, outputs = route.heads[1], set[int]()
    assert added is not None and route.tokens is not None
    outputs.update(route.tokens[-added.out_features :].tolist())
    hidden = torch.zeros(rows, added.out_features, dtype=torch.bool)
    hidden[1] = True
    assert any(outputs & set(chain) for chain in alone)
    limits = TreeLimits(levels, 1)
    own = drafted_rows(target, together, replace(roots, forbidden=hidden), route, limits)
    assert own is not None and not outputs & set(own[1].tokens)
    assert [chain.tokens for b, chain in enumerate(own) if b != 1] == alone[:1] + alone[2:]
    for _ in range(2):  # built the first time, and used again
        found = drafted_rows(target, together, roots, route, limits)
        assert found is not None and [chain.tokens for chain in found] == alone
        assert all(chain.parents == list(range(levels)) and chain.scores[-1] < 0 for chain in found)
        wide = drafted_rows(target, together, roots, route, TreeLimits(levels, 3))
        assert wide is not None and [found.tokens[::3] for found in wide] == alone
        parents = [0 if level == 0 else 3 * level - 2 for level in range(levels) for _ in range(3)]
        assert all(found.parents == parents and len(set(found.tokens[:3])) == 3 for found in wide)
    if levels > 1:  # another level must pay for all rows together
        gain = sum(max(0.5 * math.exp(chain.scores[0]) - 0.001, 0.0) for chain in found)
        for level, deep in (1.01 * gain, 1), (0.99 * gain, 2):
            limits = TreeLimits(2, 1, level, node=0.001, rates=[0.9, 0.5])
            ended = drafted_rows(target, together, roots, route, limits)
            assert ended is not None and [chain.tokens for chain in ended] == [tokens[:deep] for tokens in alone]
        assert together.rows == lengths and together.lengths == [max(lengths)] * 4
    both = zip(together.data, held, lengths, strict=True)
    assert all(torch.equal(now[:, :, :, :n], before[:, :, :, :n]) for now, before, n in both)
    assert len({tuple(chain) for chain in alone}) > 1


@pytest.mark.parametrize(("family", "blocks"), [("llama", False), ("llama", True), ("qwen3_5_text", False)])
@pytest.mark.parametrize("threads", [4 * (os.cpu_count() or 1), 70])
@torch.inference_mode()
def test_more_threads_than_cores_wait_for_each_other(
    family: str, blocks: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of them sleep at every barrier, and each is woken; up to 64 threads take work from one another."""
    target = NativeTarget(in_blocks(kinds=["Q4_1"]) if blocks else model_of(family))
    monkeypatch.setattr(cores, "threads", lambda: 1)
    expected = play(target)
    monkeypatch.setattr(cores, "threads", lambda: threads)
    assert all(torch.equal(a, b) for a, b in zip(play(target), expected, strict=True))


@pytest.mark.parametrize("size", [1.0, 40.0])
@torch.inference_mode()
def test_probabilities_of_all_tokens_sum_to_one(size: float) -> None:
    """Exponentials are those of numbers near 0 and far below it."""
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(size)
    target, tokens = NativeTarget(model), torch.arange(20, 36)
    cache, roots = seeded(target)
    torch.manual_seed(2)
    route = replace(random_route(target, heads=2), heads=[target.reduced_head(tokens)], tokens=tokens, made={})
    scores = torch.tensor(drafted(target, cache, roots, route, TreeLimits(1, 16)).scores)
    assert scores.shape == (16,) and abs(float(scores.double().exp().sum()) - 1) < 1e-5


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "top_k": 3},
    {"temperature": 1.5, "top_p": 0.1},
    {"temperature": 1.0, "min_p": 0.9},
    {"temperature": 1.2, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_sampled_rows_draft_what_their_noise_prefers(rows: int) -> None:
    """With all outputs among the best ones, the first tokens are those that the sampler would choose, in order."""
    target, tokens = NativeTarget(model_of("llama")), torch.arange(20, 36)
    torch.manual_seed(2)
    route = replace(random_route(target, heads=2), heads=[target.reduced_head(tokens)], tokens=tokens, made={})
    cache, roots = seeded(target)
    roots = several(cache, roots, rows)
    greedy = drafted_rows(target, cache, roots, route, TreeLimits(1, 16))
    assert greedy is not None and all(sorted(found.tokens) == tokens.tolist() for found in greedy)
    order = [greedy[0].tokens.index(token) for token in tokens.tolist()]
    logits = torch.tensor(greedy[0].scores)[order]
    seen = set()
    for seed in range(40):
        params = [SamplingParams(seed=seed, **SAMPLING[(seed + row) % len(SAMPLING)]) for row in range(rows)]
        params[-1] = params[-1] if rows == 1 else SamplingParams()  # a greedy row beside others
        sampler = Sampler([RowSampler(each, stream=row) for row, each in enumerate(params)])
        ids = [[1] * (7 + seed)] * rows
        own = replace(roots, sampled=sampler.sampled(ids))
        found = drafted_rows(target, cache, own, route, TreeLimits(1, 4))
        scores = sampler.scores(logits.repeat(rows, 1)[:, None], lambda: [], tokens)
        noisy = sampler.perturb(scores, [[len(text)] for text in ids], target.vocab_size, tokens)[:, 0]
        for row, candidates in enumerate(found):
            best = noisy[row].topk(4)
            wanted = tokens[best.indices][best.values.isfinite()].tolist()
            assert candidates.tokens == wanted and candidates.parents == [0] * len(wanted)
            assert candidates.scores == sorted(candidates.scores, reverse=True) and candidates.scores[0] <= 0
            seen.add(len(wanted))
    assert {1, 3, 4} <= seen


@torch.inference_mode()
def test_trees_grow_alike_in_a_team_that_is_smaller_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under OMP_THREAD_LIMIT or OMP_DYNAMIC."""
    openmp = ctypes.CDLL(torch._C.__file__)
    target = NativeTarget(model_of("llama"))
    cache, roots = seeded(target)
    torch.manual_seed(1)
    route = random_route(target, heads=2)
    monkeypatch.setattr(cores, "threads", lambda: 3)
    most = openmp.omp_get_max_active_levels()
    try:
        expected = drafted(target, cache, roots, route, TreeLimits(3, 3))
        openmp.omp_set_max_active_levels(0)  # teams of one thread
        found = drafted(target, cache, roots, route, TreeLimits(3, 3))
    finally:
        openmp.omp_set_max_active_levels(most)
    assert (found.tokens, found.parents) == (expected.tokens, expected.parents)
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)


def test_rows_are_read_by_integers_of_any_width() -> None:
    table = linear.RowTable(torch.arange(64.0).view(2, 32).bfloat16())
    assert table(torch.tensor([1, 0, 1, 1], dtype=torch.int32))[:, 0].tolist() == [32, 0, 32, 32]


@pytest.mark.parametrize("kind", [linear.Q4, linear.Q8])
def test_a_map_is_packed_in_pieces_as_it_is_at_once(monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    torch.manual_seed(8)
    monkeypatch.setattr(linear, "LARGE", 0 if kind == linear.Q4 else 10**9)
    monkeypatch.setattr(linear, "CHUNK_WEIGHTS", 64 * 33)
    weight, bias = torch.randn(171, 64).bfloat16(), torch.randn(171)
    pieces = linear.packing(weight, bias, 2.0, 3.0)
    count, made = 0, None
    while made is None:
        try:
            next(pieces)
            count += 1
        except StopIteration as end:
            made = end.value
    once = linear.Packed([weight], bias, draft_only=True, scale=2.0, cap=3.0)
    x = torch.randn(5, 64).bfloat16()
    assert count == 6 and made.kinds == {kind} and torch.equal(made.tiles[0], once.tiles[0])
    assert torch.equal(made(x), once(x))


@pytest.mark.parametrize("rows", [1, 17, 70])
def test_the_largest_output_is_found_without_the_outputs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "cpus", lambda: 3)
    torch.manual_seed(5)
    weight, norm = torch.randn(1003, 64).bfloat16(), torch.rand(64)
    weight[500:] = weight[:503].clone()  # ties, of which the first counts
    weight[1002] = 3 * weight[1002]
    x = torch.randn(rows, 64).bfloat16()
    x[-1] = float("nan") if rows > 1 else x[-1]
    packed, threads = linear.Packed([weight]), torch.get_num_threads()
    expected = packed(x, norm, 1e-5).argmax(-1)
    assert expected.max() < 500 or 1002 in expected
    expected[~x.isfinite().all(-1)] = -1
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert packed.largest(x[:, None], norm, 1e-5) == expected.tolist()
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def test_a_large_head_in_8_bits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = in_blocks(kinds=["Q4_1"])
    size = model.config.hidden_size
    model.lm_head = BlockLinear(random_blocks("Q8_0", 97, size), None, torch.bfloat16)
    small = NativeTarget(model)
    monkeypatch.setattr(packing, "BOUNDED_BYTES", 1000)
    monkeypatch.setattr(packing, "BOUNDED_SHARE", 0.001)
    large = NativeTarget(model)
    assert small.head(None).proxy is None and large.head(None).proxy is not None
    x = torch.randn(1, 5, size).bfloat16()
    assert small.greedy_tokens(x) == large.greedy_tokens(x) == [large.readout(x).argmax(-1).tolist()]
    assert large.bytes_read < small.bytes_read - 0.3 * 97 * size


def test_refusals_and_fallback() -> None:
    with pytest.raises(SpecDecError, match="bfloat16 on a CPU"):
        NativeTarget(tiny_model("llama", **SIZES))
    with pytest.raises(SpecDecError, match="unknown to the native runtime"):
        NativeTarget(tiny_model("opt").bfloat16())
    target, note = make_target(tiny_model("llama").bfloat16())  # heads of 8
    assert target.runtime == "torch" and "heads of" in note
    assert make_target(model_of("llama"))[0].runtime == "native"
