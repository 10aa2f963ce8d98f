"""The kernels for Arm write the same bits as those for x86: calls of the kernels that tests make here, in AVX2, are
repeated under emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specdec.runtimes.native import library

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fPIC"]  # of setup.py
ROOT = Path(__file__).parents[3]
TESTS = ["test_linear.py", "test_target_builds.py", "test_target.py"]
# The layers of families are in the calls of ``agrees``; adapters need some of them.
ADAPTERS, TREES = "adapters and (beside or llama or phi3 or qwen3_5)", "in_one_call"
KERNELS = f"(test_linear and not wide) or ({TREES}) or ({ADAPTERS}) or chains or largest"
OTHERS = "granite or olmoe or olmo2 or smollm3 or qwen3- or phi3 or ministral3 or gemma- or qwen3_5_moe"
ALIKE = "granite or olmoe or smollm3 or qwen3- or ministral3 or gemma- or qwen3_5_moe"  # kernels of the other families
LOGITS = f"logits_are_equal and not ({OTHERS})"
WHICH = f"not masks and ({LOGITS} or avx2 and ({KERNELS} or agrees and not ({ALIKE})))"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"there is no {COMPILER} or no {EMULATOR}"
    ),
    pytest.mark.skipif(library.ARM or not library.runs(), reason="there are no native kernels here of x86"),
]


def build(folder: Path) -> tuple[Path, Path]:
    """``replay.c`` and the kernels, for Arm."""
    program, kernels, levels = folder / "replay", folder / "_native.so", '"", "neon", "i8mm"'
    subprocess.run([COMPILER, f"-DLEVELS={levels}", ROOT / "tests/support/replay.c", "-o", program], check=True)
    sources = sorted((ROOT / "specdec/runtimes/native").glob("*.c"))
    subprocess.run([COMPILER, "-shared", "-Werror", *FLAGS, *sources, "-lm", "-o", kernels], check=True)
    return program, kernels


def test_kernels_write_the_bits_of_avx2(tmp_path: Path) -> None:
    """With byte matrices, with dot products alone, and a CPU that has neither, which is refused."""
    built, calls = build(tmp_path), tmp_path / "calls"
    pytest_ = [sys.executable, "-m", "pytest", "-n", "0", "-m", "", "-p", "replay", "-p", "no:cacheprovider"]
    environment = os.environ | {"REPLAY": str(calls), "PYTHONPATH": str(ROOT / "tests/support")}
    tests = [Path(__file__).with_name(name) for name in TESTS]
    subprocess.run([*pytest_, "-k", WHICH, *tests], check=True, cwd=ROOT, env=environment)
    for cpu, level in ("max", "i8mm"), ("neoverse-n1", "neon"), ("cortex-a57", ""):
        command = [EMULATOR, "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", *built, "2", calls]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.splitlines() == [level], cpu
        assert not done.stderr and done.returncode == 0
    calls.unlink()
