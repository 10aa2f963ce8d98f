"""Runs cells, one after the other in this process or in parallel on a Ray cluster (the ``ray`` extra).

Both ways yield one record per cell when it ends. A failure is recorded and the other cells continue. An interrupt
loses only the running cells.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError, how_to_install, one_line
from specdec.base.terminal import OnProgress
from specdec.bench.cell import Cell
from specdec.bench.plan import Resources
from specdec.bench.run import Decoders, run_cell


def run_locally(cells: Sequence[Cell], data_dir: Path | None, progress: OnProgress) -> Generator[dict[str, Any]]:
    """Measure ``cells`` in this process, in order. A model stays loaded until a cell needs another."""
    decoders = Decoders(data_dir)
    for cell in cells:
        yield measure(cell, decoders, progress)


def measure(cell: Cell, decoders: Decoders, progress: OnProgress | None = None) -> dict[str, Any]:
    """The result of a cell, or the record of its failure. Only an interrupt raises."""
    start = time.perf_counter()
    try:
        result = run_cell(cell, decoders, progress)
        json.dumps(result, allow_nan=False)  # NaN fails this cell only
        return result
    except Exception as error:
        return failure_record(cell, error, time.perf_counter() - start)


def failure_record(cell: Cell, error: BaseException, seconds: float) -> dict[str, Any]:
    """The record of a cell that failed: its error in one line."""
    kind, text = type(error).__name__, one_line(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory"
    elif not isinstance(error, SpecDecError):
        text = f"unexpected {kind}: {text}"
    return {"key": cell.key(), "cell": cell.as_dict(), "error": text, "seconds": seconds}


# --- on Ray ----------------------------------------------------------------------------------------------------------


def run_on_ray(
    cells: Sequence[Cell], data_dir: Path | None, resources: Resources, address: str | None
) -> Generator[dict[str, Any]]:
    """Measure ``cells`` on the cluster at ``address`` (None: $RAY_ADDRESS, else a new local cluster).

    A cell is a Ray task, placed by its resources. All machines need the package, the models and the prompt files at
    the same paths. Raises SpecDecError if Ray is not installed or not reachable, or if a cell needs more resources than
    any machine has.
    """
    ray = _connect(address)
    try:
        memory = int(resources.memory_gb * 1e9) or None
        how = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": memory}
        # Processes are reused for further cells; a cell that ends its process is not tried again.
        task = ray.remote(**how, max_calls=0, max_retries=0)(_in_task)
        folder = None if data_dir is None else data_dir.resolve()
        waiting, most = list(cells), _capacity(ray, resources)
        running: dict[Any, tuple[Cell, float]] = {}
        while waiting or running:
            while waiting and len(running) < most:
                cell = waiting.pop(0)
                running[task.remote(cell.as_dict(), folder)] = cell, time.perf_counter()
            for reference in ray.wait(list(running))[0]:
                cell, since = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:  # the process died, usually out of memory, or did not start
                    lost = SpecDecError(f"its worker was lost: {one_line(error)}")
                    yield failure_record(cell, lost, time.perf_counter() - since)
    finally:
        ray.shutdown()


def _in_task(values: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    return measure(Cell(**values), _decoders(data_dir)) | {"worker": f"{platform.node()}:{os.getpid()}"}


@functools.lru_cache(maxsize=1)
def _decoders(data_dir: Path | None) -> Decoders:
    """The decoders of this process, whose model the next cell may reuse."""
    return Decoders(data_dir)


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SpecDecError(f"--launcher ray needs Ray, which is not installed; {how_to_install('ray')}") from None
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        host, _, port = (where or "").removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # without a listener Ray would retry for ten minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None if where else False
        )
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no Ray cluster at '{where}'" if where else "Ray does not start on this machine"
        raise SpecDecError(f"{what}: {one_line(error)}; check --ray-address, or leave it out to run here") from None
    return ray


def _capacity(ray: Any, resources: Resources) -> int:
    """How many cells the cluster can run at once. Raises SpecDecError if no machine can run one."""
    needed = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gb * 1e9}
    needed = {name: amount for name, amount in needed.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    capacity = sum(int(min(node.get(name, 0) / amount for name, amount in needed.items())) for node in nodes)
    if capacity < 1:
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needed}
        asked = ", ".join(f"{name} {needed[name]:g} of at most {largest[name]:g}" for name in needed)
        raise SpecDecError(f"no machine of the cluster can run a cell: it needs {asked}; change 'resources'")
    return min(capacity, resources.workers or capacity)
