"""Runs groups of cells, one after the other in this process or in parallel on a Ray cluster (the ``ray`` extra).

Both functions yield the records of a group when it ends. A failure is recorded and the other cells continue; if a Ray
worker is lost, all cells of its group fail. An interrupt loses only the running groups.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from specdec.base.errors import SpecDecError, how_to_install, one_line
from specdec.bench.cell import Cell
from specdec.bench.plan import Resources
from specdec.bench.run import Decoders, Record, failure_record, measure

Groups = Sequence[list[Cell]]
Log = Callable[[dict[str, Any]], Any]


def run_locally(
    groups: Groups,
    decoders: Decoders,
    progress: Callable[[float], Any],
    record: Log | None = None,
) -> Generator[Record]:
    """Measure the groups of cells in this process, in order, and yield a record per cell.

    groups: cells that differ only in their methods, in each group (``plan.groups``).
    decoders: keeps the last model loaded until a group needs another one.
    progress: called with the number of cells that are done, which may be a fraction.
    record: called with each finished request (``BenchRequest.as_dict``); None: not called.
    """
    for number, group in enumerate(groups):
        before = sum(map(len, groups[:number]))

        def report(part: int, of: int, tokens: int, before: int = before, cells: list[Cell] = group) -> None:
            progress(before + len(cells) * part / of)

        yield from measure(group, decoders, report, (lambda request: record(request.as_dict())) if record else None)


def split(groups: Groups, count: int) -> list[list[Cell]]:
    """Halve the largest groups, in a copy of the list, until there are ``count`` groups or every group has one cell."""
    parts = list(groups)
    while len(parts) < count and len(largest := max(parts, key=len)) > 1:
        at, half = parts.index(largest), len(largest) // 2
        parts[at : at + 1] = [largest[:half], largest[half:]]
    return parts


# --- on Ray ----------------------------------------------------------------------------------------------------------


def run_on_ray(groups: Groups, resources: Resources, record: Log | None = None) -> Generator[Record]:
    """Measure the groups on the Ray cluster at $RAY_ADDRESS, else on a new local one, and yield a record per cell.

    Records come when their group has ended, in any order of the groups, after the calls of ``record`` for its requests
    (``BenchRequest.as_dict``). The caller must exhaust or close the generator,
    which disconnects from the cluster.

    A group is a Ray task that needs ``resources``; groups are split until all of the cluster is busy. All machines need
    the package, the models and the prompt files at the same paths. Raises SpecDecError if Ray is not installed or not
    reachable, or if a task needs more resources than any machine has.
    """
    ray = _connect()
    try:
        memory = int(resources.memory_gb * 1e9) or None
        how = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "memory": memory}
        # Processes are reused for further cells; a group that ends its process is not repeated.
        task = ray.remote(**how, max_calls=0, max_retries=0)(_in_task)
        parts, start = split(groups, _capacity(ray, resources)), time.perf_counter()
        running = {task.remote([cell.as_dict() for cell in group]): group for group in parts}
        while running:
            for reference in ray.wait(list(running))[0]:
                group = running.pop(reference)
                try:
                    records, requests = ray.get(reference)
                    if record:
                        for request in requests:
                            record(request)
                    yield from records
                except ray.exceptions.RayError as error:  # the process died, usually out of memory, or did not start
                    lost = SpecDecError(f"its worker was lost: {one_line(error)}")
                    yield from [failure_record(cell, lost, time.perf_counter() - start) for cell in group]
    finally:
        ray.shutdown()


def _in_task(values: list[dict[str, Any]]) -> tuple[list[Record], list[dict[str, Any]]]:
    """Measure a group of cells in a Ray worker; return (records, requests).

    values: ``Cell.as_dict()`` of each cell. Records have the worker's host and process id as well, and requests are
    ``BenchRequest.as_dict()``.
    """
    worker, requests = {"worker": f"{platform.node()}:{os.getpid()}"}, list[dict[str, Any]]()
    found = measure([Cell(**cell) for cell in values], _decoders(), record=lambda r: requests.append(r.as_dict()))
    return [record | worker for record in found], requests


@functools.cache
def _decoders() -> Decoders:
    """Return the decoders of this worker process, which later tasks reuse with the model that is loaded."""
    return Decoders()


def _connect() -> Any:
    """Connect to the Ray cluster at $RAY_ADDRESS, else to a new local one; return the imported module ``ray``.

    Raises SpecDecError if Ray is not installed, or the cluster cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SpecDecError(f"--launcher ray needs Ray, which is not installed; {how_to_install('ray')}") from None
    where = os.environ.get("RAY_ADDRESS")
    try:
        host, _, port = (where or "").removeprefix("ray://").rpartition(":")
        if port.isdecimal():  # without a listener Ray would retry for ten minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address=where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None if where else False
        )
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no Ray cluster at '{where}'" if where else "Ray does not start on this machine"
        raise SpecDecError(f"{what}: {one_line(error)}; check RAY_ADDRESS, or unset it to run here") from None
    return ray


def _capacity(ray: Any, resources: Resources) -> int:
    """Return how many tasks, each of which needs ``resources``, the cluster can run at once.

    ray: the module, connected to the cluster. Raises SpecDecError if no machine can run one.
    """
    needed = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_gb * 1e9}
    needed = {name: amount for name, amount in needed.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    capacity = sum(int(min(node.get(name, 0) / amount for name, amount in needed.items())) for node in nodes)
    if capacity < 1:
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needed}
        asked = ", ".join(f"{name} {needed[name]:g} of at most {largest[name]:g}" for name in needed)
        raise SpecDecError(f"no machine of the cluster can run a task: it needs {asked}; change 'resources'")
    return capacity
