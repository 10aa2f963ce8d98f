"""``specdec bench`` measures methods, ``specdec sweep`` the cells of a file; ``specdec report`` shows results.

``specdec.bench.cell`` describes what is measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec.base import terminal
from specdec.base.errors import SpecDecError, how_to_install
from specdec.base.files import find_config
from specdec.base.interrupts import interrupt, interrupting
from specdec.base.terminal import say, tell
from specdec.cli import shared
from specdec.cli.shared import INTERRUPTED

if TYPE_CHECKING:
    from specdec.bench.plan import Plan
    from specdec.bench.store import Store

FILES = (".yaml", ".yml")


@dataclass(frozen=True)
class RunFlags:
    """The options of ``bench`` and ``sweep`` that say where and how cells (combinations of settings) are measured.

    output: folder for the results; None: ``bench`` writes none, and ``sweep`` writes into runs/NAME.
    resume: whether the folder may hold results, which are completed. dry_run: only print the cells.
    launcher: "local": in this process; "ray": on a Ray cluster. as_json: print results as one line of JSON.
    """

    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the results, and for every request (results.jsonl); for sweep default runs/NAME.",
        ),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue what the output folder holds.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the cells (combinations of settings) and measure nothing.")
    ] = False
    launcher: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="local: one group after the other in this process; ray: on the Ray cluster at $RAY_ADDRESS, else on a "
            "new local one."
        ),
    ] = "local"
    as_json: shared.JsonLine = False


@shared.grouped
def bench(
    loading: shared.LoadingFlags = shared.LoadingFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(),
    drafters: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Separated by commas: drafters (NAME@K drafts K tokens a step), and hf, hf-lookup (model.generate, "
            "plain or with prompt lookup). none (plain decoding) always runs.",
            autocompletion=shared.complete_drafters,
        ),
    ] = "hf,none,prompt-lookup,auto",
    drafter_option: Annotated[
        list[str] | None, typer.Option(metavar="DRAFTER.KEY=VALUE", help="An option of one drafter; repeatable.")
    ] = None,
    prompts: shared.Prompts = "own",
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
    running: RunFlags = RunFlags(),
) -> None:
    """Measure drafters against plain decoding and model.generate, side by side, prompt by prompt.

    Figures are medians with 95 % bootstrap intervals. A conversation continues with the answer of plain decoding. A
    method that fails is recorded with its error, the others continue, and the exit code is 1. It is 1 as well if an
    output of an exact drafter differs from plain decoding without a near-tie. For several values of a setting, such as
    temperatures, see specdec sweep.
    """
    if loading.model.endswith(FILES):
        raise SpecDecError(f"'{loading.model}' is a file of settings; run it with: specdec sweep {loading.model}")
    loading.check()
    from specdec.bench.prompts import load_prompts

    load_prompts(prompts)  # a missing or empty file is known before anything heavy is imported
    options = [f"drafter.{pair}" for pair in drafter_option or []]
    options += [f"verifier.{verifier}.{pair}" for pair in verifier_option or []]
    settings: dict[str, Any] = {
        **vars(loading),
        **vars(sampling),
        **_methods(drafters, drafter_option or []),
        "verifier": verifier,
        "num_speculative_tokens": shared.depth(num_speculative_tokens),
        "prompts": prompts,
        "limit": limit,
        "turns": turns,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "repetitions": repetitions,
    }
    _measure(settings, options, running)


@shared.grouped
def sweep(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A YAML file of settings, or a shipped one: quick, paper, dynamic.",
            autocompletion=shared.complete_config("sweeps"),
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE,...]...", help="Settings in place of those of FILE: limit=4 temperature=0,0.7."
        ),
    ] = None,
    running: RunFlags = RunFlags(),
) -> None:
    """Measure every combination of the settings in FILE, where a list gives several values to a setting.

    A combination is a cell. Cells that differ only in their drafter, verifier or draft length run side by side, prompt
    by prompt, against plain decoding. A cell that fails is recorded with its error, the others continue, and the exit
    code is 1, as it is after a FAULT. The settings are those of specdec bench; drafter.NAME.OPTION is an option of a
    drafter.
    """
    path = find_config("sweeps", file, "benchmark file")
    _measure(path, overrides or [], running)


def _measure(source: Path | dict[str, Any], overrides: list[str], running: RunFlags) -> None:
    """Measure the cells of a file or of plain settings, print the results, and write them to the output folder.

    source: the file, or setting -> value. overrides: ``KEY=VALUE,VALUE`` in place of settings of ``source``.
    running: where and how the cells run. Raises typer.Exit with exit code 1 if some cells failed or have faults,
    SpecDecError if all failed, and typer.Exit with 130 after Ctrl-C or SIGTERM.
    """
    with terminal.status("loading"):
        from specdec.bench import launch
        from specdec.bench.plan import groups, load_plan
        from specdec.bench.run import Decoders
        from specdec.bench.store import Store

        terminal.warn_in_lines()
        decoders = Decoders()
        plan = load_plan(source, overrides)
        for cell in {cell.prompts: cell for cell in plan.cells}.values():  # a missing set fails before anything runs
            found = decoders.prompts(cell)
            if found.licence:
                say(f"prompts: {found.name} ({found.licence})")
        folder = running.output or (Path("runs") / plan.name if isinstance(source, Path) else None)
        store = Store(folder) if folder else None
    if running.dry_run:
        _print_plan(plan, store.records() if store else {})
        return
    records: dict[str, Any] = {}
    log: Callable[[Any], object] | None = None
    waiting, interrupted = list(plan.cells), False
    with ExitStack() as stack:
        if store:
            stack.enter_context(store.opened(plan, shared.command_line(), running.resume, decoders.chats(plan.cells)))
            records, waiting = store.records(), store.waiting(plan)
            log = stack.enter_context(store.logging())
        total = len(plan.cells)
        before = total - len(waiting)
        if before:
            say(f"{before} of {total} cells are done already")
        bar = stack.enter_context(terminal.Bar("cells"))
        if running.launcher == "ray":
            arriving = launch.run_on_ray(groups(waiting), plan.resources, log)
        else:
            arriving = launch.run_locally(groups(waiting), decoders, lambda done: bar(before + done, total), log)
        try:
            with interrupting(interrupt, ended=True):
                _take(arriving, plan, bar, before, records, store)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            arriving.close()  # disconnects from the cluster
    _end(plan, records, store, running, interrupted)


def _methods(drafters: str, pairs: list[str]) -> dict[str, Any]:
    """Return {"drafter": names of methods, "against": names of baselines} for the text of ``--drafters``.

    Plain decoding is always a method and a baseline. External methods that draft nothing are baselines, unless they
    have options. pairs: options of drafters, as DRAFTER.KEY=VALUE. Raises SpecDecError if no drafter is named.
    """
    from specdec.bench.cell import EXTERNAL_METHODS

    names = [name.strip() for name in drafters.split(",") if name.strip()]
    if not names:
        raise SpecDecError("--drafters names none; give some, such as --drafters none,auto")
    plain = [name for name in names if name in EXTERNAL_METHODS and not EXTERNAL_METHODS[name].drafts]
    baselines = [name for name in plain if not any(pair.startswith(f"{name}.") for pair in pairs)]
    return {"drafter": names if "none" in names else ["none", *names], "against": ["none", *baselines]}


def _take(
    arriving: Iterator[dict[str, Any]],
    plan: Plan,
    bar: terminal.Bar,
    before: int,
    records: dict[str, Any],
    store: Store | None,
) -> None:
    """Take the records of cells as they arrive: add each to ``records`` and to the store, and print a line for it.

    arriving: yields a record for each cell that has ended; this function reads it to its end.
    plan: all cells, for the lines. bar: shows the lines. before: number of cells that were done earlier.
    records: key of a cell -> its record, changed in place. store: the output folder; None: there is none.
    """
    from specdec.bench.results import labels, outcome

    named = labels([cell.as_dict() for cell in plan.cells])
    names = {cell.key(): name for cell, name in zip(plan.cells, named, strict=True)}
    for number, record in enumerate(arriving, start=before + 1):
        if store:
            store.append(record)
        records[record["key"]] = record
        what = f"[{number}/{len(names)}] {names[record['key']]}: {outcome(record)} ({record['seconds']:.0f} s)"
        tell(bar.console, what)


def _end(plan: Plan, records: Mapping[str, Any], store: Store | None, running: RunFlags, interrupted: bool) -> None:
    """Print notes, tables and how to continue.

    Raises typer.Exit (1) if some cells failed or have faults, and SpecDecError if all failed.
    records: key of a cell -> its record, for the cells of ``plan`` that have run. store: the output folder; None: there
    is none. running: the options of the command.
    interrupted: whether Ctrl-C or SIGTERM ended the run; typer.Exit (130) is then raised.
    """
    from specdec.bench.results import Results
    from specdec.bench.store import finished

    if interrupted and not records:
        raise typer.Exit(INTERRUPTED)
    ordered, total = [records[cell.key()] for cell in plan.cells if cell.key() in records], len(plan.cells)
    results = Results(plan.name, plan.description, [shared.command_line()], ordered, total - len(ordered))
    terminal.write("".join(f"{line}\n" for line in results.notes()))
    for table in results.tables():
        print()
        terminal.print_table(table.header, table.rows)
    if running.as_json:
        shared.print_json(vars(results))
    if store:
        whole = sum(map(finished, ordered))
        if whole < total:
            again = shared.command_line(*([] if running.resume else ["--resume"]))
            what = "interrupted; " if interrupted else ""
            failed = f", {len(results.failed)} failed" if results.failed else ""
            say(f"{what}{whole} of {total} cells are done{failed}; continue with: {again}")
        say(f"results are in '{store.folder}'; see them with: specdec report {shlex.quote(str(store.folder))}")
    faults = results.faults()
    if faults:
        say(
            f"FAULT: outputs of {', '.join(faults)} differ from plain decoding, and no near-tie explains it; this is a "
            "bug, please report it"
        )
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if not results.done:
        raise SpecDecError(f"every cell failed; the first: {ordered[0]['error']}")
    if faults or not all(map(finished, ordered)):
        raise typer.Exit(1)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of a benchmark.")],
    form: Annotated[
        Literal["html", "markdown", "latex", "csv", "svg"],
        typer.Option(
            "--format",
            help="html: a page in DIR; markdown and latex (tables) are printed; csv (tables), svg (charts): files "
            "in DIR.",
        ),
    ] = "html",
) -> None:
    """Show the results of a benchmark: a table here, and a page with charts in its folder."""
    from specdec.bench.results import as_latex, as_markdown, load_results, write_csv

    results = load_results(folder)
    if form in ("markdown", "latex"):
        terminal.write(as_markdown(results) if form == "markdown" else as_latex(results))
        return
    if form == "csv":
        written = write_csv(results, folder)
    else:
        if form == "html":
            table = results.table()
            terminal.print_table(table.header, table.rows)
        with terminal.status("drawing"):
            try:
                from specdec.bench.report import write_charts, write_page  # heavy
            except ImportError:
                raise SpecDecError(
                    f"the charts need matplotlib; {how_to_install('plot')}, or use --format markdown"
                ) from None
            written = [write_page(results, folder)] if form == "html" else write_charts(results, folder)
    for path in written:
        say(f"written: '{path}'")


def _print_plan(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> None:
    from specdec.bench.cell import as_yaml, method_label, short_name
    from specdec.bench.results import other_axes
    from specdec.bench.store import finished

    cells = [cell.as_dict() for cell in plan.cells]
    differing = other_axes(cells)
    rows = []
    for cell, values in zip(plan.cells, cells, strict=True):
        record = records.get(cell.key())
        failed = record is not None and ("error" in record or record.get("failed_baselines"))
        state = "to do" if record is None else "failed" if failed else "done" if finished(record) else "interrupted"
        rows.append([cell.key()[:8], method_label(values), *(as_yaml(values[name]) for name in differing), state])
    terminal.print_table(["cell", "method", *map(short_name, differing), "state"], rows)
    waiting = sum(row[-1] != "done" for row in rows)
    say(f"{plan.name}: {len(rows)} cells, {waiting} to do")
