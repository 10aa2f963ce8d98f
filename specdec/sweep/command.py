"""``specdec sweep`` and ``specdec report``: their command lines."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specdec import terminal
from specdec.bench.show import say
from specdec.errors import SpecDecError
from specdec.sweep import show
from specdec.sweep.results import load_results, render, table
from specdec.sweep.store import Store

INTERRUPTED = 130


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and an estimate of the time.")] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="local: one by one in this process; ray: on a Ray cluster, or one started here.")
    ] = Launcher.local,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Ray cluster; $RAY_ADDRESS if not given.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="SPECDEC_DATA", help="Folder of named prompt sets.")
    ] = None,
) -> None:
    """Measure a grid of settings, one cell after the other; a sweep that was ended goes on with --resume.

    A cell that fails is recorded with its error, the rest goes on, and the exit code is 1.
    """
    if ray_address and launcher is not Launcher.ray:
        raise SpecDecError("--ray-address is for --launcher ray")
    with terminal.status("checking"):
        from specdec.bench.prompts import load_prompts
        from specdec.sweep.plan import find, load_plan

        plan = load_plan(find(file), overrides or [])
        for name in dict.fromkeys(cell.prompts for cell in plan.cells):  # what is missing is told before anything runs
            found = load_prompts(name, data_dir)
            if found.licence:
                say(f"prompts: {found.name} ({found.licence})")
    store = Store(output or Path("runs") / plan.name)
    if dry_run:
        show.plan(plan, store.records(), data_dir)
        return
    with store.lock(plan, resume):
        records = store.begin(plan, shlex.join(["specdec", *sys.argv[1:]]))
        waiting = [cell for cell in plan.cells if "error" in records.get(cell.key(), {"error": ""})]
        with show.Screen(plan, len(plan.cells) - len(waiting)) as screen:
            if launcher is Launcher.ray:
                from specdec.sweep.cluster import on_ray

                arriving = on_ray(waiting, plan.resources, ray_address or None, data_dir, screen.watch)
            else:
                from specdec.sweep.launch import locally

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
    show.table(table(list(records.values())))
    errors = sum("error" in record for record in records.values())
    done = len(records) - errors
    if interrupted or errors:
        again = shlex.join(["specdec", *sys.argv[1:], *([] if resume else ["--resume"])])
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
    results = load_results(folder)
    if form is not Format.html:
        terminal.write(render(results, form.value))
        return
    with terminal.status("drawing"):
        from specdec.sweep.page import write_page  # heavy

        page = write_page(results, folder)
    show.table(table(results.records))
    say(f"the page is '{page}'")
