"""Runs cells, one after the other in this process or on a Ray cluster (the ``ray`` extra).

Both yield one record for each cell as it ends. What fails is recorded, and the rest goes on. Interrupting one loses the
cells under way, no others.
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

from specdec.base.errors import SpecDecError, one_line
from specdec.base.terminal import OnProgress
from specdec.bench.cell import Cell
from specdec.bench.run import Decoders, run_cell
from specdec.sweep.plan import Resources


def locally(cells: Sequence[Cell], data_dir: Path | None, progress: OnProgress) -> Generator[dict[str, Any]]:
    """Measure ``cells`` here, in order. A model stays loaded until a cell needs another."""
    decoders = Decoders(data_dir)
    for cell in cells:
        yield measure(cell, decoders, progress)


def measure(cell: Cell, decoders: Decoders, progress: OnProgress | None = None) -> dict[str, Any]:
    """The result of a cell, or a record of why there is none; never raises but for an interrupt."""
    start = time.perf_counter()
    try:
        result = run_cell(cell, decoders, progress)
        json.dumps(result, allow_nan=False)  # a figure that is none is a failure of this cell alone
        return result
    except Exception as error:
        return failed(cell, error, time.perf_counter() - start)


def failed(cell: Cell, error: BaseException, seconds: float) -> dict[str, Any]:
    """The record of a cell that failed: its error in one line."""
    kind, text = type(error).__name__, one_line(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory"
    elif not isinstance(error, SpecDecError):
        text = f"unexpected {kind}: {text}"
    return {"key": cell.key(), "cell": cell.as_dict(), "error": text, "seconds": seconds}


# --- on Ray ----------------------------------------------------------------------------------------------------------


def on_ray(
    cells: Sequence[Cell], data_dir: Path | None, resources: Resources, address: str | None
) -> Generator[dict[str, Any]]:
    """Measure ``cells`` on the cluster at ``address`` (None: $RAY_ADDRESS, else a Ray of our own on this machine).

    A cell is a task, which Ray places by its resources. The machines need the package, the models and the prompt files
    where this one has them. Raises SpecDecError if Ray is not installed or not reached, or if a cell asks for more than
    any machine has.
    """
    ray = _connect(address)
    try:
        memory = int(resources.memory_gb * 1e9) or None
        how = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": memory}
        # A process stays for further cells, and a cell that ends its process is not tried again.
        task = ray.remote(**how, max_calls=0, max_retries=0)(_in_task)
        folder = None if data_dir is None else data_dir.resolve()
        waiting, most = list(cells), _room(ray, resources)
        running: dict[Any, tuple[Cell, float]] = {}
        while waiting or running:
            while waiting and len(running) < most:
                cell = waiting.pop(0)
                running[task.remote(cell.as_dict(), folder)] = cell, time.perf_counter()
            for reference in ray.wait(list(running))[0]:
                cell, since = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayError as error:  # the process died, of memory as a rule, or could not begin
                    lost = SpecDecError(f"its worker was lost: {one_line(error)}")
                    yield failed(cell, lost, time.perf_counter() - since)
    finally:
        ray.shutdown()


def _in_task(values: dict[str, Any], data_dir: Path | None) -> dict[str, Any]:
    return measure(Cell(**values), _decoders(data_dir)) | {"worker": f"{platform.node()}:{os.getpid()}"}


@functools.lru_cache(maxsize=1)
def _decoders(data_dir: Path | None) -> Decoders:
    """Those of this process, whose model the next cell may use again."""
    return Decoders(data_dir)


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SpecDecError("--launcher ray needs Ray; pip install 'specdec-m2r2[ray]'") from None
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        host, _, port = (where or "").removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # where nobody listens, Ray would try for ten minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None if where else False
        )
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no Ray cluster at '{where}'" if where else "Ray does not start on this machine"
        raise SpecDecError(f"{what}: {one_line(error)}; check --ray-address, or leave it out to run here") from None
    return ray


def _room(ray: Any, resources: Resources) -> int:
    """How many cells the cluster can run at once. Raises SpecDecError if no machine of it can run one."""
    needed = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gb * 1e9}
    needed = {name: amount for name, amount in needed.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0) / amount for name, amount in needed.items())) for node in nodes)
    if room < 1:
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needed}
        asked = ", ".join(f"{name} {needed[name]:g} of at most {largest[name]:g}" for name in needed)
        raise SpecDecError(f"no machine of the cluster can run a cell: it asks for {asked}; change 'resources'")
    return min(room, resources.workers or room)
