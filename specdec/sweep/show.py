"""What ``specdec sweep`` and ``specdec report`` show on a terminal. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from specdec import report
from specdec.bench.cell import Cell
from specdec.bench.show import say
from specdec.sweep import axes
from specdec.sweep.plan import Plan
from specdec.sweep.results import Table, speedup_of
from specdec.terminal import Progress, duration, tell


def plan(plan: Plan, records: Mapping[str, Mapping[str, Any]], data_dir: Path | None) -> None:
    """Print what would run, and how long it may take."""
    from specdec.sweep.estimate import estimate

    cells = [cell.as_dict() for cell in plan.cells]
    differing = [name for name in axes.varying(cells) if name != "drafter"]
    rows = []
    for cell, values in zip(plan.cells, cells, strict=True):
        point = axes.values(values)
        record = records.get(cell.key())
        state = "to do" if record is None else "failed" if "error" in record else "done"
        rows.append([cell.key()[:8], cell.drafter, *(axes.flow(point.get(name)) for name in differing), state])
    report.columns(["cell", "drafter", *map(axes.short, differing), "state"], rows)
    waiting = [cell for cell in plan.cells if "error" in records.get(cell.key(), {"error": ""})]
    with report.status("estimating"):
        seconds = estimate(waiting, records.values(), data_dir)
    took = "unknown (a model is not on this machine yet)" if seconds is None else f"about {duration(seconds)}"
    say(f"{plan.name}: {len(plan.cells)} cells, {len(waiting)} to do; time on this machine, one by one: {took}")


class Screen:
    """Progress on stderr: bars on a terminal, and a line for every cell that ends."""

    def __init__(self, plan: Plan, done: int) -> None:
        names = axes.labels([cell.as_dict() for cell in plan.cells])
        self.labels = {cell.key(): name for cell, name in zip(plan.cells, names, strict=True)}
        self.ended_cells, self.total, self.start = done, len(plan.cells), time.perf_counter()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
        self.bars = Progress(
            *columns,
            transient=True,
            refresh_per_second=2,  # a faster one would slow what is measured
        )
        self.all = self.bars.add_task("cells", total=self.total, completed=done, rate="")
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Screen:
        if self.ended_cells:
            say(f"{self.ended_cells} of {self.total} cells are done already")
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def watch(self, cell: Cell, done: int, total: int, tokens: int) -> None:
        """How far a cell under way is."""
        key = cell.key()
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(f"  {self.labels[key]}", total=None, rate="loading")
        self.bars.update(
            self.tasks[key], completed=done, total=total or None, rate=f"{tokens} tokens" if total else "loading"
        )

    def ended(self, record: Mapping[str, Any]) -> None:
        """A cell has ended: its line."""
        self.ended_cells += 1
        key = record["key"]
        if key in self.tasks:
            self.bars.remove_task(self.tasks.pop(key))
        self.bars.update(self.all, completed=self.ended_cells)
        if "error" in record:
            what = f"failed: {record['error']}"
        else:
            rate = record["arm"]["tokens_per_second"]
            gain = speedup_of(record)
            what = f"{rate['value']:.1f} tok/s" if rate else "nothing to time"
            what += f", {gain[1]['value']:.2f} x {gain[0]}" if gain else ""
        counted = f"[{self.ended_cells}/{self.total}]"
        tell(self.bars.console, f"{counted} {self.labels[key]}: {what} ({record['seconds']:.0f} s)")


def table(table: Table) -> None:
    """Print a table to stdout."""
    report.columns(table.header, [list(map(str, row)) for row in table.rows])
