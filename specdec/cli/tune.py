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

app = typer.Typer(no_args_is_help=True, help="Choose settings for your model, machine and prompts by measurement.")


@app.command(
    "drafter",
    epilog='Example: specdec tune drafter --prompts prompts.jsonl; then: specdec generate "Why is the sky blue?"',
)
def drafter(
    argument: shared.ModelArgument = None,
    prompts: shared.FirstTurns = "own",
    drafters: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Comma-separated drafters to try; default: all that fit.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, evenly spaced over the file.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Largest number of new tokens of an answer.")] = 96,
    model: shared.Model = DEFAULT_MODEL,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    runtime: shared.Runtime = options.Runtime.auto,
    weights: shared.Weights = options.Weights.auto,
) -> None:
    """Find and store the fastest drafter and draft length; generate uses them from then on."""
    model = shared.one_model(argument, model, DEFAULT_MODEL)
    shared.check_model(model)
    with terminal.status("loading"):
        from specdec.bench.cell import Cell
        from specdec.bench.run import Decoders
        from specdec.bench.tune import all_drafters, candidates, search

        terminal.warn_in_lines()
        base = Cell(
            model=model, dtype=dtype, device=device, runtime=runtime, weights=weights,
            drafter="none", prompts=prompts, limit=limit, turns=1, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        decoders = Decoders()
        device = str(decoders.base(base).device)
        cells, refused = candidates(decoders, base, shared.commas(drafters or "") or all_drafters())
    for line in refused:
        say(f"left out: {line}")
    if not cells:
        raise SpecDecError("no drafter fits the model; see 'specdec drafters'")
    with terminal.Bar("tune") as bar:
        rows = search(decoders, cells, bar)
    terminal.print_table(
        ("drafter", "draft length", "acceptance length", "x plain"),
        [
            (r.cell.drafter, str(r.cell.num_speculative_tokens), f"{r.acceptance_length:.2f}", f"{r.speedup:.2f}")
            for r in rows
        ],
    )
    if faults := sum(row.faults for row in rows):
        raise SpecDecError(f"{faults} outputs differ from plain decoding; nothing is stored, please report this")
    best, of = rows[0].cell, f"{limit} of {prompts}"
    tuned = Tuned("none", "auto", 1.0, of)
    if rows[0].speedup > 1:
        tuned = Tuned(best.drafter, best.num_speculative_tokens, round(rows[0].speedup, 3), of)
    path = tuned_path(model, dtype, device, runtime, weights)
    save_tuned(path, tuned)
    depth = tuned.num_speculative_tokens
    length = "" if depth == "auto" else f" --num-speculative-tokens {depth}"
    say(f"stored in {path}")
    say(f"specdec generate now uses --drafter {tuned.drafter}{length} for this model: {tuned.speedup:.2f}x plain")
