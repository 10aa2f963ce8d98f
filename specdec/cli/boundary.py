"""The error boundary: every failure of a command becomes one line on stderr and an exit code.

Exit code 2 is bad input, 130 is Ctrl-C. 1 is a fault of specdec: an unexpected exception, or an output that differs
from plain decoding and must not.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.cli.shared import INTERRUPTED

DEBUG = "SPECDEC_DEBUG"  # environment variable: print tracebacks


class Commands(TyperGroup):
    """The root command."""

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


def _explain(error: Exception, debug: bool) -> int:
    """Print one line about ``error``; return the exit code."""
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
    elif isinstance(error, RecursionError) and not debug:
        terminal.error(f"a file or an option is nested too deeply; {DEBUG}=1 shows where")
    elif isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        terminal.error("out of memory; use a smaller model, a shorter prompt, or --dtype bfloat16")
    else:
        if debug:
            traceback.print_exception(error)
        hint = "" if debug else f"; run with {DEBUG}=1 for the traceback"
        terminal.error(f"unexpected {kind}: {text}{hint}")
        return 1
    return 2
