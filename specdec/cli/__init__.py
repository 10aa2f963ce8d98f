"""The command line: arguments, calls, printing.

Text goes to stdout, everything else to stderr. Commands import torch and transformers only when they run, so help is
instant.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from specdec import __version__
from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.cli import bench, chat, doctor, export, generate, pack_experts, serve, sweep, train, tune, verify
from specdec.cli.boundary import Commands

app = typer.Typer(
    name="specdec",
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare',
)
app.command(
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare\n\n'
    "Example: cat letter.txt | specdec generate --system 'Answer in French.' --temperature 0.7 > answer.txt"
)(generate.generate)
app.command(epilog="Example: specdec serve --drafter ngram+m2r2 --port 8000")(serve.serve)
app.command(epilog="Example: specdec chat --system 'Answer in one sentence.'")(chat.chat)
app.command(epilog="Example: specdec models --json")(doctor.models)
app.command(epilog="Example: specdec drafters --json")(doctor.drafters)
app.add_typer(
    train.app,
    name="train",
    epilog="Example: specdec train m2r2 --model my-model --prompts prompts.jsonl --output my-drafter --minutes 30",
)
app.command(epilog="Example: specdec bench --drafters hf,none,prompt-lookup,m2r2 --limit 8 --output DIR")(bench.bench)
app.command(epilog="Example: specdec verify --model my-model --drafter my-drafter --prompts prompts.jsonl")(
    verify.verify
)
app.command(epilog="Example: specdec sweep quick drafter=m2r2,prompt-lookup --output DIR")(sweep.sweep)
app.command(epilog="Example: specdec report DIR --format markdown")(sweep.report)
app.command("pack-experts", epilog="Example: specdec pack-experts my-moe experts --fit answers.jsonl")(
    pack_experts.pack_experts
)
app.command(epilog="Example: specdec push my-drafter my-org/my-drafter")(export.push)
app.add_typer(export.app, name="export")
app.add_typer(tune.app, name="tune")
app.command(epilog="Example: specdec doctor --json")(doctor.doctor)


def main() -> None:
    try:
        terminal.guard_streams()
    except SpecDecError as error:
        terminal.error(str(error))
        sys.exit(2)
    app()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"specdec {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Lossless speculative decoding for Hugging Face language models: the same text in less time."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
