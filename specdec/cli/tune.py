"""``specdec tune``."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
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
    prompts: shared.FirstTurns = "own",
    drafters: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Comma-separated drafters to try; default: all that fit.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, evenly spaced over the file.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most new tokens of an answer.")] = 96,
    model: shared.Model = DEFAULT_MODEL,
    dtype: shared.Dtype = "auto",
    device: shared.Device = "auto",
    runtime: shared.Runtime = options.Runtime.auto,
    weights: shared.Weights = options.Weights.auto,
) -> None:
    """Find and store the fastest drafter and draft length; generate uses them from then on."""
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


@app.command("prior", epilog="Example: specdec tune prior --model my-model --texts answers.jsonl --texts notes.txt")
def prior(
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Texts like those that the model shall write: plain text, or .jsonl with text, prompt, turns or "
            "messages; .gz too. Repeatable.",
        ),
    ] = None,
    reset: Annotated[bool, typer.Option("--reset", help="Forget your texts.")] = False,
    model: shared.Model = DEFAULT_MODEL,
) -> None:
    """Count your own texts into what ngram drafts from, for models with that tokenizer, instead of earlier ones.

    Without --texts and --reset: say what is counted.
    """
    if texts and reset:
        raise SpecDecError("--texts replaces earlier texts and --reset forgets them; give one of the two")
    with terminal.status("loading"):
        from specdec.drafters import corpus
        from specdec.models.loading import read_tokenizer

        terminal.warn_in_lines()
        tokenizer = read_tokenizer(model)
    if reset:
        corpus.reset(tokenizer)
    if texts:
        with terminal.Bar("tokens") as bar:
            if not corpus.save_own(chain.from_iterable(map(corpus.read, texts)), tokenizer, bar):
                say("your texts are longer than what is kept: the rest is left out")
    count = corpus.own_tokens(tokenizer)
    kept = f"{count:,} tokens of yours, kept in {corpus.path_for(tokenizer)}" if count else "no texts of yours"
    say(f"with models of this tokenizer, ngram drafts from its own corpus and {kept}")
