"""``specdec tune``."""

from __future__ import annotations

from typing import Annotated

import typer

from specdec.api.tuned import Tuned, save_tuned, tuned_path
from specdec.base import options, terminal
from specdec.base.errors import SpecDecError
from specdec.base.terminal import say
from specdec.cli import shared
from specdec.models.catalogue import DEFAULT_MODEL
from specdec.speculation import registry

app = typer.Typer(no_args_is_help=True, help="Choose settings for your model, machine and prompts by measurement.")


@app.command(
    "drafter",
    epilog='Example: specdec tune drafter --prompts prompts.jsonl; then: specdec generate "Why is the sky blue?"',
)
def drafter(
    argument: shared.ModelArgument = None,
    prompts: shared.FirstTurns = "own",
    drafters: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Drafters to try, separated by commas; default: all that fit the model.",
            autocompletion=shared.complete_drafters,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, evenly spaced over the file.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Largest number of new tokens of an answer.")] = 96,
    model: shared.Model = DEFAULT_MODEL,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    runtime: shared.Runtime = options.Runtime.auto,
    weights: shared.Weights = options.Weights.auto,
    adapter: shared.Adapter = None,
) -> None:
    """Find and store the fastest drafter and draft length; generate uses them from then on."""
    model = shared.one_model(argument, model, DEFAULT_MODEL)
    shared.check_model(model)
    shared.check_adapter(adapter)
    names = shared.commas(drafters or "")
    for name in names:
        registry.check_drafter(name)
    from specdec.bench.prompts import load_prompts

    load_prompts(prompts)  # a missing or empty file is known before the model loads
    with terminal.status("loading"):
        from specdec.bench.cell import Cell
        from specdec.bench.results import Results
        from specdec.bench.run import Decoders
        from specdec.bench.tune import all_drafters, search, speedup

        terminal.warn_in_lines()
        base = Cell(
            model=model, dtype=dtype, device=device, runtime=runtime, weights=weights, adapter=adapter,
            drafter="none", prompts=prompts, limit=limit, turns=1, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        decoders = Decoders()
        device = str(decoders.base(base).device)
        names = names or all_drafters()
    with terminal.Bar("tune") as bar:
        records = search(decoders, [base.with_settings(drafter=name) for name in names], bar)
    results = Results("tune", "", shared.command_line(), records)
    for record in results.failed:
        say(f"left out: {record['cell']['drafter']}: {record['error']}")
    if not results.done:
        raise SpecDecError("no drafter fits the model; see 'specdec drafters'")
    results = Results(results.name, "", results.command, results.done)
    table = results.table()
    terminal.print_table(table.header, table.rows)
    if faults := sum((record["method"]["equal_to_plain"] or {}).get("faults") or 0 for record in results.done):
        raise SpecDecError(f"{faults} outputs differ from plain decoding; nothing is stored, please report this")
    best, gain, of = Cell(**records[0]["cell"]), speedup(records[0]), f"{limit} of {prompts}"
    tuned = Tuned("none", "auto", 1.0, of)
    if gain > 1:
        tuned = Tuned(best.drafter, best.num_speculative_tokens, round(gain, 3), of)
    path = tuned_path(model, dtype, device, runtime, weights, adapter)
    save_tuned(path, tuned)
    depth = tuned.num_speculative_tokens
    length = "" if depth == "auto" else f" --num-speculative-tokens {depth}"
    say(f"stored in {path}")
    say(f"specdec generate now uses --drafter {tuned.drafter}{length} for this model: {tuned.speedup:.2f}x plain")
