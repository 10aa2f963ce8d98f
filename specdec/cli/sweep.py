"""``specdec sweep`` and ``specdec report``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress, duration, say, tell
from specdec.cli import shared
from specdec.cli.shared import INTERRUPTED

if TYPE_CHECKING:
    from specdec.bench.cell import Cell
    from specdec.sweep.plan import Plan


class Launcher(StrEnum):
    local = "local"
    ray = "ray"


class Format(StrEnum):
    html = "html"
    csv = "csv"
    markdown = "markdown"
    json = "json"


def sweep(
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML file, or a shipped one: quick, paper, dynamic.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE,...]...", help="Over the file: drafter.early-exit.exit_layer=4,8."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the results; runs/NAME if not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells.")] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="local: one by one in this process; ray: on a Ray cluster, or one started here.")
    ] = Launcher.local,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Ray cluster; $RAY_ADDRESS if not given.")
    ] = None,
    data_dir: shared.DataDir = None,
) -> None:
    """Measure a grid of settings, one cell after the other; a sweep that was ended goes on with --resume.

    A cell that fails is recorded with its error, the rest goes on, and the exit code is 1.
    """
    if ray_address and launcher is not Launcher.ray:
        raise SpecDecError("--ray-address is for --launcher ray")
    with terminal.status("checking"):
        from specdec.bench.prompts import load_prompts
        from specdec.sweep.plan import find, load_plan
        from specdec.sweep.results import load_results
        from specdec.sweep.store import Store

        plan = load_plan(find(file), overrides or [])
        for name in dict.fromkeys(cell.prompts for cell in plan.cells):  # what is missing ends it before anything runs
            found = load_prompts(name, data_dir)
            if found.licence:
                say(f"prompts: {found.name} ({found.licence})")
    store = Store(output or Path("runs") / plan.name)
    if dry_run:
        _print_plan(plan, store.records())
        return
    with store.lock(plan, resume):
        records = store.begin(plan, shared.command_line())
        waiting = [cell for cell in plan.cells if "error" in records.get(cell.key(), {"error": ""})]
        if done := len(plan.cells) - len(waiting):
            say(f"{done} of {len(plan.cells)} cells are done already")
        with Screen(plan, done) as screen:
            if launcher is Launcher.ray:
                from specdec.sweep.cluster import on_ray

                arriving = on_ray(waiting, plan.resources, ray_address or None, data_dir, screen.watch)
            else:
                from specdec.sweep.launch import locally

                terminal.warn_in_lines()
                arriving = locally(waiting, data_dir, screen.watch)
            interrupted = False
            try:
                for record in arriving:
                    store.append(record)
                    screen.ended(record)
            except KeyboardInterrupt:
                interrupted = True
            finally:
                arriving.close()  # ends the workers of a cluster
        records = store.records()
    if records:
        table = load_results(store.folder).table()
        terminal.columns(table.header, table.rows)
    errors = sum("error" in record for record in records.values())
    done = len(records) - errors
    if interrupted or errors:
        again = shared.command_line(*([] if resume else ["--resume"]))
        what = "interrupted; " if interrupted else ""
        failed = f", {errors} failed" if errors else ""
        say(f"{what}{done} of {len(plan.cells)} cells are done{failed}; go on with: {again}")
    say(f"results are in '{store.folder}'; see them with: specdec report {shlex.quote(str(store.folder))}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not done:
        raise SpecDecError(f"every cell failed; the first: {next(iter(records.values()))['error']}")
    if errors:
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a sweep or of a benchmark.")],
    form: Annotated[
        Format, typer.Option("--format", help="html: a page and its pictures, in DIR; the others go to stdout.")
    ] = Format.html,
) -> None:
    """Show what a sweep or a benchmark measured: a table here, and a page with pictures in its folder."""
    from specdec.sweep.results import load_results, render

    results = load_results(folder)
    if form is not Format.html:
        terminal.write(render(results, form.value))
        return
    with terminal.status("drawing"):
        from specdec.sweep.page import write_page  # heavy

        page = write_page(results, folder)
    table = results.table()
    terminal.columns(table.header, table.rows)
    say(f"the page is '{page}'")


def _print_plan(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> None:
    from specdec.sweep import axes

    cells = [cell.as_dict() for cell in plan.cells]
    differing = [name for name in axes.varying(cells) if name != "drafter"]
    rows = []
    for cell, values in zip(plan.cells, cells, strict=True):
        point, record = axes.values(values), records.get(cell.key())
        state = "to do" if record is None else "failed" if "error" in record else "done"
        rows.append([cell.key()[:8], cell.drafter, *(axes.flow(point.get(name)) for name in differing), state])
    terminal.columns(["cell", "drafter", *map(axes.short, differing), "state"], rows)
    waiting = sum(row[-1] != "done" for row in rows)
    say(f"{plan.name}: {len(rows)} cells, {waiting} to do")


class Screen(Progress):
    """Progress on stderr: bars on a terminal, and a line for every cell that ends."""

    def __init__(self, plan: Plan, done: int) -> None:
        from specdec.sweep import axes

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeElapsedColumn())
        super().__init__(*columns, transient=True, refresh_per_second=2)  # a faster one slows what is measured
        names = axes.labels([cell.as_dict() for cell in plan.cells])
        self.labels = {cell.key(): name for cell, name in zip(plan.cells, names, strict=True)}
        self.before, self.done, self.total, self.began = done, done, len(plan.cells), time.perf_counter()
        self.all = self.add_task("cells", total=self.total, completed=done, rate="")
        self.under_way: dict[str, TaskID] = {}

    def watch(self, cell: Cell, done: int, total: int, tokens: int) -> None:
        """Show how far a cell under way is."""
        key, rate = cell.key(), f"{tokens} tokens" if total else "loading"
        if key not in self.under_way:
            self.under_way[key] = self.add_task(f"  {self.labels[key]}", total=None, rate=rate)
        self.update(self.under_way[key], completed=done, total=total or None, rate=rate)

    def ended(self, record: Mapping[str, Any]) -> None:
        """Print the line of a cell that has ended, and how long the others may take."""
        from specdec.sweep.results import speedup_of

        self.done += 1
        key, label = record["key"], self.labels[record["key"]]
        if key in self.under_way:
            self.remove_task(self.under_way.pop(key))
        self.update(self.all, completed=self.done)
        if "error" in record:
            what = f"failed: {record['error']}"
        else:
            rate, gain = record["method"]["tokens_per_second"], speedup_of(record)
            what = f"{rate['value']:.1f} tok/s" if rate else "nothing to time"
            what += f", {gain[1]['value']:.2f} x {gain[0]}" if gain else ""
        each = (time.perf_counter() - self.began) / (self.done - self.before)
        left = self.total - self.done
        after = f"; about {duration(left * each)} left" if left else ""
        tell(self.console, f"[{self.done}/{self.total}] {label}: {what} ({record['seconds']:.0f} s{after})")
