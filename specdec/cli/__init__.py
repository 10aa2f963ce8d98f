"""The command line: arguments, calls, printing.

Text goes to stdout, everything else to stderr. Commands import torch and transformers only when they run, so help is
instant. Every failure becomes one line on stderr and an exit code: 2 is bad input, 130 is Ctrl-C. 1 is a fault of
specdec: an unexpected exception, or an output that differs from plain decoding and must not.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.base import terminal
from specdec.base.errors import SpecDecError, out_of_memory
from specdec.cli.shared import INTERRUPTED
from specdec.speculation import registry

if TYPE_CHECKING:
    app: typer.Typer

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
        """Print the help, and write the names of installed plug-ins to ``formatter``, which click prints after it.

        click calls it for ``--help``. ctx: click's context of the command.
        """
        super().format_help(ctx, formatter)
        installed = [f"{name} ({kind[:-1]})" for kind in ("drafters", "verifiers") for name in registry.outside(kind)]
        if installed:
            formatter.write(f"Installed plug-ins: {', '.join(installed)}\n")


def _explain(error: Exception, debug: bool) -> int:
    """Print one line about ``error`` to stderr, after its traceback if it is unexpected and ``debug`` is set.

    Returns the exit code: 2 for bad input and other expected errors, 1 for unexpected ones, 130 for an abort.
    """
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


# The commands, as the help lists them: the module of this package that has the command, or a group of commands as its
# ``app``, and the last lines of the command's help.
COMMANDS = {
    "generate": (
        "generate",
        'Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare\n\n'
        "Example: cat letter.txt | specdec generate --system 'Answer in French.' --temperature 0.7 > answer.txt",
    ),
    "serve": ("serve", "Example: specdec serve qwen2.5-coder-0.5b-instruct --port 8000"),
    "chat": ("chat", "Example: specdec chat --system 'Answer in one sentence.'"),
    "models": ("models", "Example: specdec models --json; then: specdec models pull NAME"),
    "drafters": ("doctor", "Example: specdec drafters --json"),
    "train": (
        "train",
        "Example: specdec train m2r2 --model my-model --prompts prompts.jsonl --output my-drafter --minutes 30",
    ),
    "bench": ("bench", "Example: specdec bench --drafters hf,none,prompt-lookup,m2r2 --limit 8 --output DIR"),
    "verify": ("verify", "Example: specdec verify --model my-model --drafter my-drafter --prompts prompts.jsonl"),
    "sweep": ("bench", "Example: specdec sweep quick drafter=m2r2,prompt-lookup --output DIR"),
    "report": ("bench", "Example: specdec report DIR --format markdown"),
    "learn": ("learn", "Example: specdec learn my-model --minutes 3; then: specdec learn status"),
    "doctor": ("doctor", "Example: specdec doctor --json"),
}


def application(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Return the typer application ``specdec`` with the commands ``names``, keys of ``COMMANDS``.

    Imports only the modules of these commands.
    """
    made = typer.Typer(
        name="specdec",
        cls=Commands,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog='Example: specdec generate "Why is the sky blue?" --drafter m2r2 --compare',
    )
    made.callback(invoke_without_command=True)(root)
    for name in names:
        module, epilog = COMMANDS[name]
        found = import_module(f"specdec.cli.{module}")
        if hasattr(found, "app"):
            made.add_typer(found.app, name=name, epilog=epilog)
        else:
            made.command(name, epilog=epilog)(getattr(found, name))
    return made


def __getattr__(name: str) -> Any:
    if name == "app":  # the whole command line, which takes longer to make than one command
        return _whole()
    raise AttributeError(f"module 'specdec.cli' has no attribute '{name}'")


@functools.cache
def _whole() -> typer.Typer:
    return application()


def main() -> None:
    """Run the command that the arguments of the process name. Ends the process with its exit code."""
    try:
        terminal.guard_streams()
    except SpecDecError as error:
        terminal.error(str(error))
        sys.exit(2)
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    made = application([command]) if command in COMMANDS else _whole()
    made()


def _version(wanted: bool) -> None:
    if wanted:
        from specdec import __version__  # reads the metadata of the installed package

        print(f"specdec {__version__}")
        raise typer.Exit()


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Lossless speculative decoding for Hugging Face language models: the same text in less time."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
