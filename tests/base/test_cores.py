"""Threads are as many as this process has CPUs, and a forked child goes on with one."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from targets import needs_native
from tiny import tiny_model

from specdec.api.decoder import SpecDecoder
from specdec.base import cores, machine
from specdec.runtimes.native import library


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    threads = torch.get_num_threads()
    cores.cpus.cache_clear()
    yield
    cores.cpus.cache_clear()
    torch.set_num_threads(threads)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 CPUs without quotas; its control groups are mounted here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "mount")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(group: Path, **files: str) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("__", ".")).write_text(text)


def test_cpus_are_those_of_the_affinity(groups: Path) -> None:
    assert cores.cpus() == 16


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu__max": "max 100000\n"}, 16),
        ({"cpu__max": "250000 100000\n"}, 3),
        ({"cpu__max": "20000 100000\n"}, 1),
        ({"cpu__max": "9900000 100000\n"}, 16),
        ({"cpu__max": "nonsense"}, 16),
    ],
)
def test_a_quota_limits_the_cpus(groups: Path, files: dict[str, str], expected: int) -> None:
    (groups / "membership").write_text("0::/user/job\n")
    write(groups / "mount/user/job", **files)
    assert cores.cpus() == expected


def test_so_does_the_quota_of_a_group_above(groups: Path) -> None:
    (groups / "membership").write_text("0::/pod/container\n")
    write(groups / "mount/pod/container", cpu__max="800000 100000\n")
    write(groups / "mount/pod", cpu__max="400000 100000\n")
    assert cores.cpus() == 4


@pytest.mark.parametrize("place", ["mount/cpu,cpuacct/docker/a1", "mount/cpu/docker/a1", "mount/cpu,cpuacct"])
def test_version_1_of_control_groups(groups: Path, place: str) -> None:
    """Mounted under the controllers' names or a link to them; a container sees its own group as the mount."""
    (groups / "membership").write_text("5:cpuset:/docker/a1\n4:cpu,cpuacct:/docker/a1\n0::/\n")
    write(groups / place, cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    assert cores.cpus() == 2
    write(groups / place, cpu__cfs_quota_us="-1\n")
    cores.cpus.cache_clear()
    assert cores.cpus() == 16


def test_kernels_and_pytorch_use_no_more_threads_than_cpus(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    torch.set_num_threads(5)
    assert cores.threads() == 2
    torch.set_num_threads(1)  # whoever asks for fewer gets fewer
    cores.limit_threads()
    assert torch.get_num_threads() == cores.threads() == 1
    torch.set_num_threads(5)
    cores.limit_threads()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_waiting_threads_of_pytorch_spin_for_a_bounded_time(given: dict[str, str], expected: str) -> None:
    """Unless somebody has said what they should do."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", "import specdec, os; print(os.environ.get('GOMP_SPINCOUNT'))"]
    done = subprocess.run(command, env=kept | given, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == expected


@needs_native
def test_kernels_run_in_the_openmp_that_pytorch_has_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in another one that lies among the packages."""
    decoy = tmp_path / "torch_of_others/lib/libgomp-1.so.1"
    decoy.parent.mkdir(parents=True)
    decoy.write_bytes(b"no library")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    assert library.load.__wrapped__().level
    maps = Path("/proc/self/maps")
    assert not maps.exists() or os.path.realpath(library.openmp()) in maps.read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("runtime", ["torch", "transformers", "native"])
def test_a_forked_child_goes_on_generating(monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """It hangs where a child believes in its parent's threads."""
    if runtime == "native" and not library.runs():
        pytest.skip("there are no native kernels here")
    monkeypatch.setattr(cores, "cpus", functools.cache(lambda: 2))
    torch.set_num_threads(2)
    # Large enough for PyTorch to use its threads.
    model = tiny_model("llama", hidden_size=256, intermediate_size=1024, head_dim=64, vocab_size=5000)
    if runtime == "native":
        model = model.bfloat16()
    decoder = SpecDecoder(model, None, "prompt-lookup", runtime=runtime)

    def run() -> str:
        how = {"max_new_tokens": 8, "num_speculative_tokens": 3, "ignore_eos": True}
        return json.dumps(decoder.generate([5, 6, 7, 8] * 12, **how).token_ids)  # type: ignore[arg-type]

    expected = run()
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, run().encode())
        finally:
            os._exit(0)
    os.close(write)
    if not select.select([read], [], [], 120)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as file:
        assert file.read() == expected, "the child hangs or fails"
    os.waitpid(child, 0)
    assert run() == expected and torch.get_num_threads() == 2  # the parent goes on as before


STAT = "anon 5\nactive_file 100\ninactive_file 200\n"


@pytest.mark.parametrize(
    ("membership", "files", "left"),
    [
        ("0::/job\n", {"job": {"memory__max": "max", "memory__current": "500", "memory__stat": STAT}}, 4096),
        ("0::/job\n", {"job": {"memory__max": "1000", "memory__current": "500", "memory__stat": STAT}}, 800),
        ("0::/a/b\n", {"a": {"memory__max": "900", "memory__current": "500", "memory__stat": STAT}}, 700),
        ("0::/job\n", {"job": {"memory__max": "100", "memory__current": "500", "memory__stat": STAT}}, 0),
        ("0::/job\n", {"job": {"memory__max": "9000000", "memory__current": "5", "memory__stat": STAT}}, 4096),
        ("0::/host/path\n", {"": {"memory__max": "1000", "memory__current": "500", "memory__stat": STAT}}, 800),
        (
            "3:memory:/job\n1:cpu:/other\n",
            {
                "memory/job": {
                    "memory__limit_in_bytes": "1000",
                    "memory__usage_in_bytes": "700",
                    "memory__stat": "active_file 9\ntotal_active_file 20\ntotal_inactive_file 30\n",
                }
            },
            350,
        ),
    ],
)
def test_free_memory_is_what_machine_and_groups_leave(
    groups: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: dict[str, dict[str, str]], left: int
) -> None:
    monkeypatch.setattr(machine, "MEMINFO", groups / "meminfo")
    (groups / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    (groups / "membership").write_text(membership)
    for group, own in files.items():
        write(groups / "mount" / group, **own)
    assert machine.available_memory() == left
