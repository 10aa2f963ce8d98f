"""Runs cells on a Ray cluster, or on a Ray started here (the ``ray`` extra).

One actor is one worker: it loads a model once and keeps it until a cell needs another, and is handed cells of the same
model as long as there are any. Ray places the actors by the plan's resources. Workers need the package, the models
and the prompt files where this machine has them.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.bench.cell import Cell
from specdec.bench.run import Decoders
from specdec.models.catalogue import one_line
from specdec.sweep.launch import Watch, failed, measure
from specdec.sweep.schema import Resources

POLL = 0.5  # seconds between two queries of the workers' progress


class Worker:
    """Lives in a process of Ray's; ``progress`` answers while ``run`` is at work."""

    def __init__(self, data_dir: str | None) -> None:
        self.decoders = Decoders(Path(data_dir) if data_dir else None)
        self.state = (0, 0, 0)
        self.name = f"{platform.node()}:{os.getpid()}"

    def run(self, values: dict[str, Any]) -> dict[str, Any]:
        self.state = (0, 0, 0)
        return measure(Cell(**values), self.decoders, self._progress) | {"worker": self.name}

    def _progress(self, done: int, total: int, tokens: int) -> None:
        self.state = (done, total, tokens)

    def progress(self) -> tuple[int, int, int]:
        return self.state


def on_ray(
    cells: Sequence[Cell], resources: Resources, address: str | None, data_dir: Path | None, watch: Watch
) -> Generator[dict[str, Any]]:
    """Measure ``cells`` on the cluster at ``address`` (None: $RAY_ADDRESS, else a Ray of our own on this machine).

    Raises SpecDecError if Ray is not installed or not reached, or if a cell asks for more than any machine has.
    """
    ray = _connect(address)
    try:
        count = min(len(cells), _room(ray, resources))
        actor = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=int(resources.memory_gb * 1e9) or None,
            max_concurrency=2,
        )(Worker)
        folder = None if data_dir is None else str(data_dir.resolve())
        yield from _distribute(ray, lambda: actor.remote(folder), count, list(cells), watch)
    finally:
        ray.shutdown()  # with its actors


def _distribute(
    ray: Any, start: Callable[[], Any], count: int, waiting: list[Cell], watch: Watch
) -> Iterator[dict[str, Any]]:
    """Keep ``count`` workers at work until no cell is waiting. One that is lost fails its cell and is replaced."""
    idle: list[tuple[Any, dict[str, Any] | None]] = [(start(), None) for _ in range(count)]  # with the model it holds
    busy: dict[Any, tuple[Any, Cell, float]] = {}
    while waiting or busy:
        while waiting and idle:
            worker, model = idle.pop(0)
            cell = next((c for c in waiting if c.loading == model), waiting[0])
            waiting.remove(cell)
            busy[worker.run.remote(cell.as_dict())] = worker, cell, time.perf_counter()
            watch(cell, 0, 0, 0)
        done, _ = ray.wait(list(busy), timeout=POLL)
        for reference in done:
            worker, cell, since = busy.pop(reference)
            try:
                record = ray.get(reference)
                idle.append((worker, cell.loading))
            except ray.exceptions.RayError as error:  # the worker died, of memory as a rule, or could not begin
                ray.kill(worker)
                idle.append((start(), None))
                lost = SpecDecError(f"its worker was lost: {one_line(error)}")
                record = failed(cell, lost, time.perf_counter() - since)
            yield record
        for worker, cell, _ in () if done else busy.values():
            with suppress(ray.exceptions.RayError):  # not placed yet, or dead: its result will say
                watch(cell, *ray.get(worker.progress.remote(), timeout=POLL))


def _connect(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise SpecDecError("--launcher ray needs Ray; pip install 'specdec-m2r2[ray]'") from None
    where = address or os.environ.get("RAY_ADDRESS")
    try:
        _knock(where or "")
        ray.init(
            address=where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=None if where else False
        )
    except (OSError, RuntimeError, ValueError) as error:
        what = f"no Ray cluster at '{where}'" if where else "Ray does not start on this machine"
        raise SpecDecError(f"{what}: {one_line(error)}; check --ray-address, or leave it out to run here") from None
    return ray


def _knock(where: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray itself would try for ten minutes."""
    host, _, port = where.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


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
