"""``specdec bench``: what it measures is described in ``specdec.bench.cell``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.base import options, terminal
from specdec.base.errors import SpecDecError
from specdec.cli import shared
from specdec.cli.shared import INTERRUPTED

DRAFTERS = "hf,none,prompt-lookup,m2r2"


@shared.grouped
def bench(
    loading: shared.LoadingFlags = shared.LoadingFlags(),
    sampling: shared.SamplingFlags = shared.SamplingFlags(),
    drafters: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Separated by commas: drafters (NAME@K drafts K tokens a step), and hf, hf-lookup, hf-early-exit, "
            "hf-assistant=MODEL (model.generate and its assisted modes). none (plain decoding) always runs. By "
            "default: hf, none, prompt-lookup, and m2r2 where one is shipped for the model.",
        ),
    ] = None,
    drafter_option: Annotated[
        list[str] | None, typer.Option(metavar="DRAFTER.KEY=VALUE", help="An option of one drafter; repeatable.")
    ] = None,
    prompts: shared.Prompts = "own",
    data_dir: shared.DataDir = None,
    limit: shared.Limit = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Most turns of a conversation; all if not given.")] = None,
    max_new_tokens: shared.MaxNewTokens = 128,
    repetitions: Annotated[int, typer.Option(help="How often everything is decoded.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.", min=1)] = 1,
    num_speculative_tokens: shared.Depth = "auto",
    verifier: shared.Verifier = "exact",
    verifier_option: shared.VerifierOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the results, and for every request (results.jsonl).")
    ] = None,
    as_json: shared.JsonLine = False,
) -> None:
    """Measure drafters against plain decoding and model.generate, side by side, prompt by prompt.

    Figures are medians with 95 % bootstrap intervals. Every method answers the same prompts; a conversation continues
    with the answer of plain decoding.
    """
    names = shared.commas(DRAFTERS if drafters is None else drafters)
    if not names:
        raise SpecDecError(f"--drafters names none; give some, such as {DRAFTERS}")
    own = _by_drafter(names, drafter_option or [])
    loading.check()
    with terminal.status("loading"):
        from specdec.bench.cell import EXTERNAL_METHODS, Cell
        from specdec.bench.plan import Plan
        from specdec.bench.results import Results
        from specdec.bench.run import BenchRun, Decoders
        from specdec.bench.store import Store
        from specdec.models.drafter_folder import find_shipped

        terminal.warn_in_lines()
        base = Cell(
            **vars(loading),
            **vars(sampling),
            verifier=verifier,
            verifier_options=options.parse_assignments("--verifier-option", verifier_option or []),
            num_speculative_tokens=shared.depth(num_speculative_tokens),
            prompts=prompts,
            limit=limit,
            turns=turns,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            repetitions=repetitions,
            against=(
                "none",
                *(n for n in names if n in EXTERNAL_METHODS and not EXTERNAL_METHODS[n].drafts and n not in own),
            ),
        )
        every = names if "none" in names else ["none", *names]
        cells = [base.with_settings(**_method(name), drafter_options=own.get(name, {})) for name in every]
        store = Store(output) if output else None
        if store:
            store.check(Plan("benchmark", "", tuple(cells)))
        decoders = Decoders(data_dir)
        if licence := decoders.prompts(base).licence:
            terminal.say(f"prompts: {prompts} ({licence})")
        if drafters is None and find_shipped("m2r2", decoders.base(base).target) is None:
            cells = [cell for cell in cells if cell.drafter != "m2r2"]
            terminal.say("m2r2 is left out: none is shipped for this model; train one: specdec train m2r2 --model ...")
        run, command = BenchRun(cells, decoders), shared.command_line()
    with ExitStack() as stack:
        if store:
            stack.enter_context(store.opened(Plan("benchmark", "", tuple(cells)), command))
            log = stack.enter_context((store.folder / "results.jsonl").open("w", buffering=1, encoding="utf-8"))
            run.record = lambda request: log.write(json.dumps(request.as_dict(), ensure_ascii=False) + "\n")
        run.progress = stack.enter_context(terminal.Bar("bench"))
        try:
            run.execute()
        except KeyboardInterrupt:
            if not run.requests:
                raise
        results = run.results()
        if store:
            for record in results:
                store.append(record)
    summary = {
        "command": command,
        "configuration": {k: v for k, v in base.as_dict().items() if k not in ("drafter", "drafter_options")},
        "methods": [
            {key: r["cell"][key] for key in ("drafter", "drafter_options", "num_speculative_tokens")} | r["method"]
            for r in results
        ],
        **{key: results[0][key] for key in ("prompts", "environment", "pass_ms", "seconds", "interrupted")},
    }
    _print(summary, Results("benchmark", "", command, results).table())
    if as_json:
        shared.print_json(summary)
    if run.interrupted:
        raise typer.Exit(INTERRUPTED)


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


def _over_plain(method: dict[str, Any], category: str) -> str:
    """The speedup of a method over plain decoding, in a category or in all, and that of the worst prompt."""
    found = method["categories"].get(category) if category else method
    speedup, worst = (found[name].get("none") if found else None for name in ("speedup", "worst"))
    return f"{speedup['value']:.2f} ({worst:.2f})" if speedup else ""


def _print(summary: dict[str, Any], table: Any) -> None:
    """Print the settings, the costs of passes, the figures, the phases and the percentiles."""
    cell, about, prompts = (summary[key] for key in ("configuration", "environment", "prompts"))
    skipped = f", {len(prompts['skipped'])} skipped" if prompts["skipped"] else ""
    names = {"activations": "activations", "kv_cache": "KV cache"}
    held = "".join(f", {name} in {about[key]}" for key, name in names.items() if about[key] != "as computed")
    times = f"{cell['repetitions']} repetition{'s' * (cell['repetitions'] > 1)}"
    how = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    terminal.write(
        f"{cell['model']}, {about['dtype']}, {about['runtime']} runtime on {about['device']}{held}, {about['threads']} "
        f"threads, {about['cpu']}\n"
        f"{prompts['conversations']} conversations of {prompts['name']}{skipped}, {how}, at most "
        f"{cell['max_new_tokens']} tokens, batch of {cell['batch_size']}, {times}, "
        f"{summary['seconds']:.0f} s{' (interrupted)' if summary['interrupted'] else ''}\n\n"
    )
    for engine, costs in summary["pass_ms"].items():
        one = costs.get("1") or 1.0
        shown = ", ".join(f"{ms:.1f} ({ms / one:.2f} x)" for ms in costs.values())
        terminal.write(f"{engine}: a pass over {', '.join(costs)} tokens takes {shown} ms\n")
    for method in summary["methods"]:
        if method["engine"]:
            about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in method["engine"].items())
            terminal.write(f"{method['name']}: {about.removeprefix('version ')}\n")
    print()
    terminal.print_table(table.header, table.rows)
    print()
    methods = summary["methods"]
    kinds = list(dict.fromkeys(kind for method in methods for kind in method["categories"] if kind))
    rows = [[kind or "all", *(_over_plain(method, kind) for method in methods)] for kind in [*kinds, ""]]
    terminal.print_table(("x plain (the worst prompt)", *(method["name"] for method in methods)), rows)
    print()
    phases = list(dict.fromkeys(phase for method in methods for phase in method["ledger_ms_per_step"]))
    header = ["method", "prefill ms", "decode ms/token", *(f"{p} ms/step" for p in phases), "MB"]
    rows = []
    for method in methods:
        ledger, memory = method["ledger_ms_per_step"], method["peak_memory_mb"]
        prefill, decode = method["prefill_ms"], method["decode_ms_per_token"]
        row = [method["name"], f"{prefill['value']:.0f}" if prefill else "", f"{decode['value']:.1f}" if decode else ""]
        row += [f"{ledger[phase]:.1f}" if phase in ledger else "" for phase in phases]
        rows.append([*row, "" if memory is None else f"{memory:.0f}"])
    terminal.print_table(header, rows)
    print()
    header = ["method", "P50, P99: ms/token", "ms to the first", "ms/step", "accepted at 1, 2 ..", "if all before were"]
    rows = []
    for method in methods:
        found = [method["latency_ms"][what] for what in ("token", "first_token", "step")]
        row = [method["name"], *(f"{one['p50']:.1f}, {one['p99']:.1f}" if one else "" for one in found)]
        for shares in (method["acceptance_per_position"], method["conditional_acceptance"]):
            row.append(" ".join(f"{share:.2f}".removeprefix("0") for share in shares))
        rows.append(row)
    terminal.print_table(header, rows)
    for line in prompts["skipped"]:
        terminal.say(f"skipped {line}")
