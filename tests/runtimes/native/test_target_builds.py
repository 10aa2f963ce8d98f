"""Models in blocks have the same logits, to the last bit, in every build of the kernels that this CPU runs."""

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builds import build
from passes import IN_BLOCKS, in_blocks, next_logits
from refusals import refused
from targets import needs_native

from specdec.base import machine
from specdec.base.errors import SpecDecError
from specdec.runtimes.native import library, linear
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target

pytestmark = [needs_native, pytest.mark.usefixtures("two_threads")]


@torch.inference_mode()
def everything(target: Target) -> list[torch.Tensor]:
    """Logits of a prompt, of passes of 1, 5 and 16 tokens, after a reused prefix, and of three rows at once."""
    ids = torch.randint(3, 97, (3, 60), generator=torch.Generator().manual_seed(3))
    cache, rows = target.new_cache(), target.new_cache(3)
    found, start = [], 0
    for count in (33, 1, 5, 16):
        found.append(next_logits(target, cache, ids[:1, start : start + count]))
        start += count
        cache.checkpoint(0)
    prefix = cache.copy(0, 34)
    found.append(next_logits(target, prefix, ids[1:2, 34:41]))
    found += [next_logits(target, rows, ids[:, :19], 13), next_logits(target, rows, ids[:, 13:18])]
    return found


NARROW = "llama", "mistral", "gpt_oss", "gemma3_text"  # families whose attention differs
CASES = [(*case, "auto") for case in IN_BLOCKS] + [(*case, "int8") for case in IN_BLOCKS if case[0] in NARROW]


@pytest.mark.parametrize(("family", "kinds", "changes", "kv_cache"), CASES)
def test_logits_are_equal_in_every_build(family: str, kinds: tuple[str, ...], changes: dict, kv_cache: str) -> None:
    found: dict[str, list[torch.Tensor]] = {}
    for level in library.LEVELS[1:]:
        with build(level) as there:
            if there:
                found[level] = everything(NativeTarget(in_blocks(family, kinds, **changes), kv_cache=kv_cache))
    first, *others = found
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in found[first])
    for level in others:
        for one, other in zip(found[first], found[level], strict=True):
            assert torch.equal(one, other), level
    assert others or not {"avx512_vnni", "i8mm"} & machine.features()


def test_numbers_too_small_for_bf16_are_zero_in_every_build() -> None:
    weight = torch.eye(32).bfloat16()
    for level in library.LEVELS[1:]:
        with build(level) as there:
            if there:
                x = torch.full((3, 32), 2.0**-126).bfloat16()
                packed = linear.Packed([weight / 4])
                assert torch.equal(packed(x), torch.zeros(3, 32).bfloat16()), level


def test_norms_are_equal_in_every_build() -> None:
    """Of so many numbers that another order of sums changes some."""
    x, found = torch.randn(4096, 256, generator=torch.Generator().manual_seed(6)).bfloat16(), dict[str, torch.Tensor]()
    for level in library.LEVELS[1:]:
        with build(level) as there:
            if there:
                found[level] = linear.Packed([torch.eye(256).bfloat16()])(x, torch.ones(256), 1e-5)
    first, *others = found.values()
    assert all(torch.equal(first, other) for other in others)


def test_a_broken_kernel_fails_the_check_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear._block_tiles

    @torch.inference_mode()  # the memory of tiles may come from a pass of an earlier test
    def wrong(*given: Any) -> tuple[int, torch.Tensor]:
        kind, tiles = right(*given)
        return kind, tiles.copy_(tiles ^ 7)  # codes and scales are others

    monkeypatch.setattr(linear, "_block_tiles", wrong)
    with pytest.raises(SpecDecError, match=r"the native runtime gives other logits than this 'llama' model|NaN"):
        NativeTarget(in_blocks())


def test_a_cpu_without_the_instructions_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(specdec_open=lambda most: 0))
    monkeypatch.setattr(machine, "processor_name", lambda: "Pentium 4")
    library.load.cache_clear()
    with refused(r"AVX2, FMA and F16C, or an Arm CPU with dot products .*; this one is Pentium 4"):
        library.load()
    library.load.cache_clear()
