"""Attention over blocks of keys: the same bits whatever the pass and the build, also where scores are far apart."""

import pytest
import torch
from builds import build
from passes import WIDE, in_blocks
from targets import needs_native

from specdec.kvcache.cache import KVCache
from specdec.runtimes.native import library
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Pass

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads")]
LENGTH = 395  # values of the first 128 keys are added in chains: blocks of 64 that end 256 positions before the token
PATH = [0, 2, 3, 6, 7]  # nodes of a tree that are committed, across the border of two blocks of keys
CASES = [  # families, types of their matrices, sizes
    ("llama", ["Q4_1"], {}),
    ("mistral", ["Q4_1"], {"sliding_window": 330}),
    ("gpt_oss", ["MXFP4"], WIDE | {"sliding_window": 70}),
    ("gemma2", ["Q4_1"], {}),
]


def states(target: NativeTarget, cache: KVCache, x: torch.Tensor, keep: list[int], tree: torch.Tensor | None = None):
    """Final states of ``x`` [1, T, H] as the next tokens, or as a tree of them; those in ``keep`` stay."""
    depths = torch.arange(x.shape[1]) if tree is None else tree.sum(-1) - 1
    positions = (cache.rows[0] + depths)[None]
    out = target.layers(x, 0, target.num_layers, Pass(positions, cache.register(0, positions, tree), cache))
    cache.commit([keep])
    return out


def tree_of(parents: list[int]) -> torch.Tensor:
    tree = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            tree[node] |= tree[parent]
    return tree


def chain(target: NativeTarget, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
    cache, parts = target.new_cache(), []
    for start, end in zip([0, *ends], ends, strict=False):
        parts.append(states(target, cache, x[:, start:end], list(range(end - start))))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("sharpness", [1.0, 300.0])
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@pytest.mark.parametrize(("family", "kinds", "changes"), CASES)
@torch.inference_mode()
def test_bits_depend_on_the_visible_keys_alone(family, kinds, changes, kv_cache, sharpness) -> None:
    model = in_blocks(family, kinds, **changes)
    x = torch.randn(1, LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = []
    for level in library.LEVELS[1:]:
        with build(level) as there:
            if not there:
                continue
            target = NativeTarget(model, kv_cache=kv_cache)
            target.packed.struct.scale *= sharpness
            single = chain(target, x, list(range(1, LENGTH + 1)))
            found.append(single)
            assert single.isfinite().all() and single.std() > 0
            for ends in ([LENGTH], [61, 66, 126, 142, 318, LENGTH], [1, 65, 129, 131, 317, 322, 383, LENGTH]):
                assert torch.equal(chain(target, x, ends), single), (level, ends)
            # A tree whose committed path has other slots before it is committed: at a border of blocks, and not.
            tree = tree_of([-1, 0, 0, 2, 1, 0, 3, 6])
            for start in 20, 59, 61, 125, 317, 380:
                cache = target.new_cache()
                states(target, cache, x[:, :start], list(range(start)))
                nodes = x[:, start : start + 1].repeat(1, 8, 1) * 3
                nodes[:, PATH] = x[:, start : start + len(PATH)]
                got = states(target, cache, nodes, PATH, tree)
                assert torch.equal(got[:, PATH], single[:, start : start + len(PATH)]), (level, start)
                rest = x[:, start + len(PATH) :]
                assert torch.equal(states(target, cache, rest, []), single[:, start + len(PATH) :]), (level, start)
    if family != "gpt_oss":  # routers are in bf16, whose products are added in an order of each build's own
        assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
@torch.inference_mode()
def test_a_key_that_a_token_does_not_see_may_hold_anything(kv_cache: str) -> None:
    target, generator = NativeTarget(in_blocks(), kv_cache=kv_cache), torch.Generator().manual_seed(3)
    x = torch.randn(1, 75, target.hidden_size, generator=generator).bfloat16()
    expected = chain(target, x, [70, 75])[:, 70:]
    for broken in float("inf"), float("nan"):
        cache = target.new_cache()
        states(target, cache, x[:, :70], list(range(70)))
        nodes = x[:, [70, 71, 71, 72, 73]]  # the third one is beside the path 0, 1, 3, 4
        nodes[:, 2] = broken
        got = states(target, cache, nodes, [0, 1, 3, 4], tree_of([-1, 0, 0, 1, 3]))
        assert torch.equal(got[:, [0, 1, 3, 4]], expected[:, :4])
        assert not got[:, 2].isfinite().any()
        assert torch.equal(states(target, cache, x[:, 74:], [0]), expected[:, 4:])
