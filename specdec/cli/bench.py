"""``specdec bench``, also called ``specdec sweep``, and ``specdec report``.

What is measured is described in ``specdec.bench.cell``.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource

from specdec.base import options, terminal
from specdec.base.errors import SpecDecError, how_to_install
from specdec.base.files import find_config, shipped_configs
from specdec.base.terminal import duration, say, tell
from specdec.cli import shared
from specdec.cli.shared import INTERRUPTED
from specdec.models.catalogue import DEFAULT_MODEL

if TYPE_CHECKING:
    from specdec.bench.cell import Cell
    from specdec.bench.plan import Plan
    from specdec.bench.run import Decoders
    from specdec.bench.store import Store

DRAFTERS = "hf,none,prompt-lookup,m2r2"
WITH_FILE = ("file", "overrides", "data_dir", "output", "resume", "dry_run", "launcher", "ray_address", "as_json")


class Launcher(StrEnum):
    local = "local"
    ray = "ray"


class Format(StrEnum):
    html = "html"
    markdown = "markdown"
    json = "json"


@shared.grouped
def bench(
    context: typer.Context,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|FILE]",
            help="The same as --model; or a YAML file of settings, or a shipped one: quick, paper, dynamic.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...", help="Settings that replace those of FILE: limit=4 temperature=0,0.7."
        ),
    ] = None,
    loading: shared.LoadingFlags = shared.LoadingFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(),
    drafters: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Separated by commas: drafters (NAME@K drafts K tokens a step), and hf, hf-lookup, hf-early-exit, "
            "hf-assistant=MODEL (model.generate and its assisted modes). none (plain decoding) always runs. By "
            "default: hf, none, prompt-lookup, and m2r2 where one is shipped for the model.",
            autocompletion=shared.complete_drafters,
        ),
    ] = None,
    drafter_option: Annotated[
        list[str] | None, typer.Option(metavar="DRAFTER.KEY=VALUE", help="An option of one drafter; repeatable.")
    ] = None,
    prompts: shared.Prompts = "own",
    data_dir: shared.DataDir = None,
    limit: shared.Limit = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Largest number of turns of a conversation; default: all.")
    ] = None,
    max_new_tokens: shared.MaxNewTokens = 128,
    repetitions: Annotated[int, typer.Option(help="How often everything is decoded.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.", min=1)] = 1,
    num_speculative_tokens: shared.Depth = "auto",
    verifier: shared.Verifier = "exact",
    verifier_option: shared.VerifierOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the results, and for every request (results.jsonl); with FILE by default runs/NAME.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what the output folder holds.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells (combinations of settings) and measure nothing.")
    ] = False,
    launcher: Annotated[
        Launcher, typer.Option(help="local: one group after the other in this process; ray: on a Ray cluster.")
    ] = Launcher.local,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A running Ray cluster; default: $RAY_ADDRESS, else a new local one."),
    ] = None,
    as_json: shared.JsonLine = False,
) -> None:
    """Measure drafters against plain decoding and model.generate, side by side, prompt by prompt.

    Settings come from options or from FILE. A list in FILE gives several values to a setting, and each combination of
    values is a cell. Cells that differ only in their methods run side by side. Figures are medians with 95 % bootstrap
    intervals. A conversation continues with the answer of plain decoding. A cell that fails is recorded with its error,
    the others continue, and the exit code is 1.
    """
    if ray_address and launcher is not Launcher.ray:
        raise SpecDecError("--ray-address is for --launcher ray")
    if file and not _is_file(context, file):
        loading, file = replace(loading, model=shared.one_model(file, loading.model, DEFAULT_MODEL)), None
    loading.check()
    if not file:
        from specdec.bench.prompts import load_prompts

        load_prompts(prompts, data_dir)  # a missing or empty file is known before anything heavy is imported
    with terminal.status("loading"):
        from specdec.bench import launch
        from specdec.bench.plan import load_plan
        from specdec.bench.run import Decoders
        from specdec.bench.store import Store

        terminal.warn_in_lines()
        decoders = Decoders(data_dir)
        if file:
            _refuse_settings(context)
            plan = load_plan(find_config("sweeps", file, "benchmark file"), overrides or [])
        else:
            settings: dict[str, Any] = {
                **vars(loading),
                **vars(sampling),
                "verifier": verifier,
                "verifier_options": options.parse_assignments("--verifier-option", verifier_option or []),
                "num_speculative_tokens": shared.depth(num_speculative_tokens),
                "prompts": prompts,
                "limit": limit,
                "turns": turns,
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
                "repetitions": repetitions,
            }
            plan = _plan(settings, drafters, drafter_option or [], decoders)
        for cell in {cell.prompts: cell for cell in plan.cells}.values():  # a missing set fails before anything runs
            found = decoders.prompts(cell)
            if found.licence:
                say(f"prompts: {found.name} ({found.licence})")
        folder = output or (Path("runs") / plan.name if file else None)
        store = Store(folder) if folder else None
    if dry_run:
        _print_plan(plan, store.records() if store else {})
        return
    run = Run(plan, store, strict=not file)
    with run.opened(resume):
        if launcher is Launcher.ray:
            run.take(launch.run_on_ray(run.groups, data_dir, plan.resources, ray_address or None))
        else:
            run.take(launch.run_locally(run.groups, decoders, run.progress, run.log))
    run.end(as_json, resume)


class Run:
    """A plan that is being measured: its records, printed as they arrive and kept in ``store``.

    strict: a cell that fails before any has ended ends the run.
    """

    def __init__(self, plan: Plan, store: Store | None, strict: bool) -> None:
        from specdec.bench.results import labels

        self.plan, self.store, self.strict = plan, store, strict
        self.names = dict(
            zip((cell.key() for cell in plan.cells), labels([c.as_dict() for c in plan.cells]), strict=True)
        )
        self.command = shared.command_line()
        self.records: dict[str, Any] = {}
        self.groups: list[list[Cell]] = []
        self.log: Callable[[Any], object] | None = None
        self.interrupted = False

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """With the folder locked and the bar shown; ``groups`` are those that wait."""
        from specdec.bench.plan import groups

        with ExitStack() as stack:
            waiting = list(self.plan.cells)
            if self.store:
                stack.enter_context(self.store.opened(self.plan, self.command, resume))
                self.records, waiting = self.store.records(), self.store.waiting(self.plan)
                path = self.store.folder / "results.jsonl"
                file = stack.enter_context(path.open("a", buffering=1, encoding="utf-8"))
                self.log = lambda request: file.write(json.dumps(request.as_dict(), ensure_ascii=False) + "\n")
            self.groups, self.total = groups(waiting), len(self.plan.cells)
            self.before = self.done = self.total - len(waiting)
            if self.done:
                say(f"{self.done} of {self.total} cells are done already")
            self.began, self.bar = time.perf_counter(), stack.enter_context(terminal.Bar("cells"))
            yield

    def progress(self, done: float) -> None:
        """``done`` cells have been measured since the start."""
        self.bar(self.before + done, self.total)

    def take(self, arriving: Generator[dict[str, Any]]) -> None:
        """Keep and print the records until the last one or an interrupt."""
        from specdec.bench.results import outcome

        try:
            for record in arriving:
                if self.strict and not self.records and "error" in record:
                    raise SpecDecError(record["error"])
                if self.store:
                    self.store.append(record)
                self.records[record["key"]] = record
                self.done += 1
                left = (self.total - self.done) * (time.perf_counter() - self.began) / (self.done - self.before)
                after = f"; about {duration(left)} left" if self.done < self.total else ""
                what = f"[{self.done}/{self.total}] {self.names[record['key']]}: {outcome(record)}"
                tell(self.bar.progress.console, f"{what} ({record['seconds']:.0f} s{after})")
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            arriving.close()  # disconnects from the cluster

    def end(self, as_json: bool, resume: bool) -> None:
        """Print the tables and how to go on; end with the exit code."""
        from specdec.bench.results import Results
        from specdec.bench.store import finished

        if self.interrupted and not self.records:
            raise typer.Exit(INTERRUPTED)
        ordered = [self.records[cell.key()] for cell in self.plan.cells if cell.key() in self.records]
        missing = self.total - len(ordered)
        results = Results(self.plan.name, self.plan.description, self.command, ordered, missing)
        _print(results)
        if as_json:
            shared.print_json(vars(results))
        if self.store:
            whole = sum(map(finished, ordered))
            if whole < self.total:
                again = shared.command_line(*([] if resume else ["--resume"]))
                what = "interrupted; " if self.interrupted else ""
                failed = f", {len(results.failed)} failed" if results.failed else ""
                say(f"{what}{whole} of {self.total} cells are done{failed}; continue with: {again}")
            folder = self.store.folder
            say(f"results are in '{folder}'; see them with: specdec report {shlex.quote(str(folder))}")
        if self.interrupted:
            raise typer.Exit(INTERRUPTED)
        if not results.done:
            raise SpecDecError(f"every cell failed; the first: {ordered[0]['error']}")
        if results.failed:
            raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a benchmark.")],
    form: Annotated[
        Format, typer.Option("--format", help="html: a page in DIR; the others are printed.")
    ] = Format.html,
) -> None:
    """Show the results of a benchmark: a table here, and a page with pictures in its folder."""
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
                f"the page needs matplotlib; {how_to_install('plot')}, or use --format markdown or json"
            ) from None
        page = write_page(results, folder)
    table = results.table()
    terminal.print_table(table.header, table.rows)
    say(f"the page is '{page}'")


# The plan.


def _is_file(context: typer.Context, name: str) -> bool:
    """Whether the argument is a file of settings; ``sweep`` takes no model there."""
    return context.info_name == "sweep" or name.endswith((".yaml", ".yml")) or name in shipped_configs("sweeps")


def _refuse_settings(context: typer.Context) -> None:
    """Raise SpecDecError for options that are settings: with a file they are written as overrides."""
    for name in context.params:
        if name not in WITH_FILE and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            key = {"drafters": "drafter"}.get(name, name)
            flag = name.replace("_", "-")
            raise SpecDecError(f"--{flag} is for a benchmark without a file; write {key}=VALUE after the file")


def _plan(settings: Mapping[str, Any], drafters: str | None, pairs: list[str], decoders: Decoders) -> Plan:
    """The plan of the options: one group of cells."""
    from specdec.bench.cell import EXTERNAL_METHODS, Cell
    from specdec.bench.plan import Plan
    from specdec.models.drafter_folder import find_shipped

    names = shared.commas(DRAFTERS if drafters is None else drafters)
    if not names:
        raise SpecDecError(f"--drafters names none; give some, such as {DRAFTERS}")
    own = _by_drafter(names, pairs)
    plain = [n for n in names if n in EXTERNAL_METHODS and not EXTERNAL_METHODS[n].drafts and n not in own]
    if drafters is None and find_shipped("m2r2", decoders.base(Cell(**settings)).target) is None:
        names.remove("m2r2")
        say("m2r2 is left out: none is shipped for this model; train one: specdec train m2r2 --model ...")
    every = names if "none" in names else ["none", *names]
    common = {**settings, "against": ("none", *plain)}
    cells = [Cell(**common | _method(name) | {"drafter_options": own.get(name, {})}) for name in every]
    return Plan("benchmark", "", tuple({cell.key(): cell for cell in cells}.values()))


def _method(name: str) -> dict[str, Any]:
    """The drafter of ``NAME`` or ``NAME@K``, and its draft length K."""
    drafter, _, depth = name.rpartition("@")
    if drafter and depth.isdecimal():
        return {"drafter": drafter, "num_speculative_tokens": shared.depth(depth, name)}
    return {"drafter": name}


def _by_drafter(names: list[str], pairs: list[str]) -> dict[str, dict[str, Any]]:
    """``DRAFTER.KEY=VALUE`` texts as options by drafter; names may contain dots."""
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        fits = [name for name in names if pair.startswith(f"{name}.")]
        if not fits:
            raise SpecDecError(f"--drafter-option takes DRAFTER.KEY=VALUE with a name of --drafters; got '{pair}'")
        name = max(fits, key=len)
        out.setdefault(name, {}).update(options.parse_assignments("--drafter-option", [pair[len(name) + 1 :]]))
    return out


# Output.


def _print(results: Any) -> None:
    terminal.write("".join(f"{line}\n" for line in results.notes()))
    for table in results.tables():
        print()
        terminal.print_table(table.header, table.rows)


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
