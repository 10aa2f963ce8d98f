"""``specdec sweep`` and ``specdec report``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.base import terminal
from specdec.base.errors import SpecDecError, how_to_install
from specdec.base.files import find_config
from specdec.base.terminal import duration, say, tell
from specdec.cli import shared
from specdec.cli.shared import INTERRUPTED

if TYPE_CHECKING:
    from specdec.bench.plan import Plan


class Launcher(StrEnum):
    local = "local"
    ray = "ray"


class Format(StrEnum):
    html = "html"
    csv = "csv"
    markdown = "markdown"
    json = "json"


def sweep(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A YAML file, or a shipped sweep: quick, paper, dynamic.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE,...]...", help="Override settings: drafter.early-exit.exit_layer=4,8."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the results; default: runs/NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the cells.")] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="local: one by one in this process; ray: on a Ray cluster.")
    ] = Launcher.local,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A running Ray cluster; default: $RAY_ADDRESS, else a new local one."),
    ] = None,
    data_dir: shared.DataDir = None,
) -> None:
    """Measure a grid of settings, one cell after the other. --resume continues an interrupted sweep.

    A cell that fails is recorded with its error, the others continue, and the exit code is 1.
    """
    if ray_address and launcher is not Launcher.ray:
        raise SpecDecError("--ray-address is for --launcher ray")
    with terminal.status("checking"):
        from specdec.bench import launch
        from specdec.bench.plan import load_plan
        from specdec.bench.prompts import load_prompts
        from specdec.bench.results import labels, load_results, outcome
        from specdec.bench.store import Store

        plan = load_plan(find_config("sweeps", file, "sweep file"), overrides or [])
        for name in dict.fromkeys(cell.prompts for cell in plan.cells):  # a missing set fails before anything runs
            found = load_prompts(name, data_dir)
            if found.licence:
                say(f"prompts: {found.name} ({found.licence})")
    store, total = Store(output or Path("runs") / plan.name), len(plan.cells)
    if dry_run:
        _print_plan(plan, store.records())
        return
    names = dict(zip((cell.key() for cell in plan.cells), labels([c.as_dict() for c in plan.cells]), strict=True))
    with store.opened(plan, shared.command_line(), resume):
        records = store.records()
        waiting = [cell for cell in plan.cells if "error" in records.get(cell.key(), {"error": ""})]
        done = before = total - len(waiting)
        if done:
            say(f"{done} of {total} cells are done already")
        began, interrupted = time.perf_counter(), False
        with terminal.Bar("cells") as bar:
            bar(done, total)
            if launcher is Launcher.ray:
                arriving = launch.run_on_ray(waiting, data_dir, plan.resources, ray_address or None)
            else:
                terminal.warn_in_lines()
                arriving = launch.run_locally(waiting, data_dir, lambda part, of, tokens: bar(done + part / of, total))
            try:
                for record in arriving:
                    store.append(record)
                    done += 1
                    bar(done, total)
                    left = (total - done) * (time.perf_counter() - began) / (done - before)
                    after = f"; about {duration(left)} left" if done < total else ""
                    what = f"[{done}/{total}] {names[record['key']]}: {outcome(record)}"
                    tell(bar.progress.console, f"{what} ({record['seconds']:.0f} s{after})")
            except KeyboardInterrupt:
                interrupted = True
            finally:
                arriving.close()  # disconnects from the cluster
        records = store.records()
    if records:
        table = load_results(store.folder).table()
        terminal.print_table(table.header, table.rows)
    errors = sum("error" in record for record in records.values())
    done = len(records) - errors
    if interrupted or errors:
        again = shared.command_line(*([] if resume else ["--resume"]))
        what = "interrupted; " if interrupted else ""
        failed = f", {errors} failed" if errors else ""
        say(f"{what}{done} of {total} cells are done{failed}; continue with: {again}")
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
        Format, typer.Option("--format", help="html: a page and its pictures in DIR; the others are printed.")
    ] = Format.html,
) -> None:
    """Show the results of a sweep or a benchmark: a table here, and a page with pictures in its folder."""
    from specdec.bench.results import load_results, render

    results = load_results(folder)
    if form is not Format.html:
        terminal.write(render(results, form.value))
        return
    with terminal.status("drawing"):
        try:
            from specdec.bench.report import write_page  # heavy
        except ImportError:
            raise SpecDecError(
                f"the page needs matplotlib; {how_to_install('plot')}, or use --format csv, markdown or json"
            ) from None
        page = write_page(results, folder)
    table = results.table()
    terminal.print_table(table.header, table.rows)
    say(f"the page is '{page}'")


def _print_plan(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> None:
    from specdec.bench.results import as_yaml, axes, short_name, varying_axes

    cells = [cell.as_dict() for cell in plan.cells]
    differing = [name for name in varying_axes(cells) if name != "drafter"]
    rows = []
    for cell, values in zip(plan.cells, cells, strict=True):
        point, record = axes(values), records.get(cell.key())
        state = "to do" if record is None else "failed" if "error" in record else "done"
        rows.append([cell.key()[:8], cell.drafter, *(as_yaml(point.get(name)) for name in differing), state])
    terminal.print_table(["cell", "drafter", *map(short_name, differing), "state"], rows)
    waiting = sum(row[-1] != "done" for row in rows)
    say(f"{plan.name}: {len(rows)} cells, {waiting} to do")
