"""Draw a command's run in a terminal as an SVG: python .ci/picture.py docs/generate.svg specdec generate ...

The command is that of README and docs/index.md (a test compares). Take the picture when other programs are idle.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 96


def run(command: list[str]) -> str:
    """Run the command in a terminal, and return what it prints, with the terminal's control codes."""
    written: list[bytes] = []

    def read(descriptor: int) -> bytes:
        written.append(os.read(descriptor, 65536))
        return written[-1]

    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    code = os.waitstatus_to_exitcode(pty.spawn(command, read))
    assert code == 0, code
    return b"".join(written).decode()


def main(path: str, *command: str) -> None:
    lines = [line.rpartition("\r")[2] for line in run(list(command)).replace("\r\n", "\n").split("\n")]
    text = re.sub(r"\x1b\[[?\d;]*[A-HJKlhsu]", "", "\n".join(lines)).strip("\n")
    text = re.sub(r"^(\x1b\[[\d;]*m)*[\u2800-\u28ff].*\n", "", text, flags=re.M)  # spinners
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}\n", style="bold"))
    console.print(Text.from_ansi(re.sub(r"\n{3,}", "\n\n", text)))
    svg = console.export_svg(title="specdec")
    Path(path).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S), "utf-8")  # no fonts from other hosts


if __name__ == "__main__":
    main(*sys.argv[1:])
