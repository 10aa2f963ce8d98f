"""The kernels for Arm write the same bits as those for x86: calls of AVX2's are repeated under emulation."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from passes import (
    ALIKE,
    IN_BLOCKS,
    adapted_pass,
    drafted_rows,
    in_blocks,
    next_logits,
    play,
    random_adapters,
    random_blocks,
    random_route,
)
from passes import seeded as after_three_tokens
from replay import Recording
from tiny import model_of

from specdec.base.options import SamplingParams
from specdec.models.gguf.blocks import KINDS
from specdec.runtimes.draft_path import KNOTS, DraftRoots, TreeLimits
from specdec.runtimes.native import library, linear
from specdec.runtimes.native.target import FAMILIES, NativeTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.candidates import Candidates
from specdec.speculation.sampling import RowSampler, Sampler

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fPIC"]  # of setup.py
ROOT = Path(__file__).parents[3]
BLOCKS = "llama", "phi3", "olmo2", "gemma3_text", "mixtral", "gpt_oss", "qwen3_next"
NARROW = "llama", "mistral", "gpt_oss", "gemma3_text"  # families whose attention differs
WINDOWED = {"mistral": {"sliding_window": 12}, "gemma3_text": {"sliding_window": 12}}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"there is no {COMPILER} or no {EMULATOR}"
    ),
    pytest.mark.skipif(library.ARM or not library.runs(), reason="there are no native kernels here of x86"),
]


def maps(recording: Recording) -> None:
    """Linear maps and tables of all kinds, of few and many tokens, with numbers at their ends."""
    x, norm = torch.randn(37, 512).bfloat16(), torch.rand(512) + 0.5
    x[1], x[2], x[3, :40], x[4] = 1, -1, 0, 2.0**-126
    broken = torch.ones(2, 512).bfloat16()
    broken[0, 40], broken[1, 3] = torch.nan, -torch.inf
    for kind in KINDS:
        for scales in (0.001, 0.02), (1e-7, 1e-6), (100.0, 4000.0), (0.0, 0.0):
            recording.title = f"{kind} {scales}"
            packed = linear.Packed([random_blocks(kind, 48, 512, scales)])
            for tokens in (1, 3, 5, 37) if scales[0] == 0.001 else (4,):
                packed(x[:tokens])
        packed(x[:5], norm, 1e-5)
        packed(broken)
        table = linear.RowTable(random_blocks(kind, 40, 256))
        table(torch.tensor([3, 0, 39]))
        linear.unpack(random_blocks(kind, 40, 256), None, torch.bfloat16)
    recording.title = "16 bits"
    weight = torch.randn(1003, 64).bfloat16()
    weight[500:] = weight[:503].clone()  # ties, of which the first counts
    dense, narrow = linear.Packed([weight], torch.randn(1003)), x[:, :64]
    for tokens in (1, 5, 17, 37):
        dense(narrow[:tokens])
        dense(narrow[:tokens], norm[:64], 1e-5, after_weight=True)
        dense.largest(narrow[:tokens], norm[:64], 1e-5)
    recording.title = "an argmax by bounds"
    blocks = random_blocks("Q8_0", 1003, 256)
    bounded = linear.Packed([blocks], scale=0.5)
    bounded.bound_argmax(blocks)
    for tokens in (1, 2, 7):
        bounded.largest(x[:tokens, :256], norm[:256], 1e-5)
    for outputs in (50, 11002):  # 8 and 4 bits
        recording.title = f"{outputs} outputs for drafts"
        draft_only = linear.Packed([torch.randn(outputs, 192).bfloat16()], torch.randn(outputs), draft_only=True)
        for tokens in (1, 5, 16):
            draft_only(x[:tokens, :192])


def models(recording: Recording) -> None:
    """Passes of models in blocks and in 16 bits, with both caches, and with adapters."""
    ids = torch.randint(3, 97, (1, 45))
    for family, kinds, changes in IN_BLOCKS:
        if family in BLOCKS:
            recording.title = f"{family} in {' '.join(kinds)}"
            target = NativeTarget(in_blocks(family, kinds, **changes))
            cache = target.new_cache()
            for part in ids.split((39, 1, 5), 1):
                next_logits(target, cache, part)
    for family in (family for family in FAMILIES if family not in ALIKE):
        for kv_cache in ("auto", "int8") if family in NARROW else ("auto",):
            recording.title = f"{family} in 16 bits, KV cache {kv_cache}"
            model = model_of(family)
            target = NativeTarget(model, kv_cache=kv_cache)
            play(target)
        if family in ("llama", "phi3", "qwen3_5_text"):
            with torch.inference_mode(False):
                adapters = random_adapters(TransformersTarget(model), leave_out="self_attn.k_proj").bfloat16()
            adapted_pass(target, adapters, 3)


def drafts(recording: Recording) -> None:
    """Trees and chains of one and of several rows, sampled, and beside another source's tree."""
    cases = ("llama", "auto"), ("llama", "int8"), ("mistral", "auto"), ("gemma3_text", "auto"), ("qwen3_5_text", "auto")
    tree = Candidates([0.0] * 4, [5, 9, 7, 11], [0, 0, 1, 2], [[0.5, 0.3, 0.9, 0.4]])
    tables = [[0.02 + 0.09 * n for n in range(len(KNOTS))]] * 3
    for family, kv_cache in cases:
        recording.title = f"drafts of {family}, KV cache {kv_cache}"
        target = NativeTarget(model_of(family, **WINDOWED.get(family, {})), kv_cache=kv_cache)
        route, rows = random_route(target, heads=2), 5
        cache, roots = after_three_tokens(target)
        params = SamplingParams(seed=3, temperature=1.2, top_k=9, top_p=0.8, min_p=0.05)
        for given in (
            roots,
            replace(roots, given=[tree], tables=[tables]),
            replace(roots, sampled=Sampler([RowSampler(params)]).sampled([[1] * 7])),
        ):
            for limits in TreeLimits(5, 1), TreeLimits(4, 3), TreeLimits(6, 4, 0.02):
                drafted_rows(target, cache, given, route, limits)
        cache.select([0] * rows)
        final, *carried = (x[:, roots.place :][:, :1].repeat(rows, 1, 1) for x in (roots.final, *roots.carried))
        several = DraftRoots(list(range(rows)), roots.positions * rows, final, carried)
        for limits in TreeLimits(5, 1), TreeLimits(4, 3):
            drafted_rows(target, cache, several, route, limits)


def test_kernels_write_the_bits_of_avx2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With byte matrices, with dot products alone, and a CPU that has neither, which is refused."""
    program, kernels, calls = tmp_path / "replay", tmp_path / "_native.so", tmp_path / "calls"
    source = ROOT / "tests/support/replay.c"
    subprocess.run([COMPILER, '-DLEVELS="", "neon", "i8mm"', source, "-o", program], check=True)
    sources = sorted((ROOT / "specdec/runtimes/native").glob("*.c"))
    subprocess.run([COMPILER, "-shared", "-Werror", *FLAGS, *sources, "-lm", "-o", kernels], check=True)
    load = library.load
    try:
        monkeypatch.setenv(library.LEVEL, "avx2")
        load.cache_clear()
        recording = Recording(load())
        monkeypatch.setattr(library, "load", lambda: recording)
        torch.manual_seed(1)
        with torch.inference_mode():
            for part in maps, models, drafts:
                part(recording)
    finally:
        monkeypatch.undo()
        load.cache_clear()
    assert recording.names == {name.removeprefix("call_") for name in vars(Recording) if name.startswith("call_")}
    recording.save(calls)
    for cpu, level in ("max", "i8mm"), ("neoverse-n1", "neon"), ("cortex-a57", ""):
        command = [EMULATOR, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", program, kernels, "2", calls]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.splitlines() == [level], cpu
        assert not done.stderr and done.returncode == 0
    calls.unlink()
