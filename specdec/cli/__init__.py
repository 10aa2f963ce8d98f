"""The command line: arguments, calls, printing.

Text goes to stdout, everything else to stderr. Commands import torch and transformers only when they run, so help is
instant. Every failure becomes one line on stderr and an exit code: 2 is bad input, 130 is Ctrl-C. 1 is a fault of
specdec: an unexpected exception, or an output that differs from plain decoding and must not.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specdec import __version__
from specdec.base import terminal
from specdec.base.errors import SpecDecError, out_of_memory
from specdec.cli import (
    bench,
    chat,
    doctor,
    generate,
    learn,
    models,
    serve,
    train,
    verify,
)
from specdec.cli.shared import INTERRUPTED
from specdec.speculation import registry

DEBUG = "SPECDEC_DEBUG"  # environment variable: print tracebacks


class Commands(TyperGroup):
    """The root command ``specdec``: explains errors in one line, and lists plug-ins in the help."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        try:
            code = super().main(args, prog_name or "specdec", complete_var, False, windows_expand_args, **extra)
            sys.stdout.flush()  # here a failure can still be reported
        except BrokenPipeError:  # the reader closed the pipe
            code = 1
        except Exception as error:
            if not standalone_mode:
                raise
            code = _explain(error, debug=bool(os.environ.get(DEBUG)) or "--verbose" in args)
        except KeyboardInterrupt:
            code = INTERRUPTED
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and write the names of installed plug-ins to ``formatter``, which is printed after it."""
        super().format_help(ctx, formatter)
        installed = [f"{name} ({kind[:-1]})" for kind in ("drafters", "verifiers") for name in registry.outside(kind)]
        if installed:
            formatter.write(f"Installed plug-ins: {', '.join(installed)}\n")


def _explain(error: Exception, debug: bool) -> int:
    """Print one line about ``error``, or with ``debug`` its traceback; return the exit code."""
    kind, text = type(error).__name__, str(error)
    if isinstance(error, SpecDecError):
        terminal.error(text)
    elif isinstance(error, typer.Abort):
        return INTERRUPTED
    elif kind == "NoArgsIsHelpError":
        print(text)
    elif hasattr(error, "format_message"):  # a usage error of typer
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "specdec"
        terminal.error(f"{error.format_message().rstrip('.')}; see '{where} --help'")
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing '{error.filename}'" if error.filename else ""
        terminal.error(f"no space left on the disk{where}; free some space and try again")
    elif out_of_memory(error):
        terminal.error("out of memory; use a smaller model, a shorter prompt, or --dtype bfloat16")
    else:
        if debug:
            traceback.print_exception(error)
        hint = "" if debug else f"; run with {DEBUG}=1 for the traceback"
        terminal.error(f"unexpected {kind}: {text}{hint}")
        return 1
    return 2


app = typer.Typer(
    name="specdec",
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare',
)
app.command(
    epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare\n\n'
    "Example: cat letter.txt | specdec generate --system 'Answer in French.' --temperature 0.7 > answer.txt"
)(generate.generate)
app.command(epilog="Example: specdec serve qwen2.5-coder-0.5b-instruct --port 8000")(serve.serve)
app.command(epilog="Example: specdec chat --system 'Answer in one sentence.'")(chat.chat)
app.add_typer(models.app, name="models", epilog="Example: specdec models --json; then: specdec models pull NAME")
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
app.command(epilog="Example: specdec sweep quick drafter=m2r2,prompt-lookup --output DIR")(bench.sweep)
app.command(epilog="Example: specdec report DIR --format markdown")(bench.report)
app.add_typer(learn.app, name="learn", epilog="Example: specdec learn my-model --minutes 3; then: specdec learn status")
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
