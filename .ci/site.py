"""Pages of the site from other sources: the command line, and Markdown files in the repository's root."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md"}


def on_files(files: Files, config: Any) -> Files:
    from specdec.cli import app

    files.append(File.generated(config, "cli.md", content=command_line(typer.main.get_command(app))))
    for page, source in BESIDE.items():
        files.append(File.generated(config, page, content=moved((ROOT / source).read_text("utf-8"))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page without links to source files, which are not part of the site."""
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\.py\)", r"\1", markdown)


def moved(text: str) -> str:
    """A page of the repository's root with links that work in the folder of documents."""
    for page, source in BESIDE.items():
        text = text.replace(f"]({source}", f"]({page}")
    return text.replace("](docs/", "](")


def command_line(root: Any) -> str:
    """Every command with its arguments and options, as Markdown."""
    parts, seen = ["# Command line", "", "Every command prints this with `--help`.", ""], dict[str, str]()
    for path, command in commands("specdec", root):
        names = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
        text = " ".join((command.help or "").replace("\b", "").split())
        parts += [f"## {path}", "", escaped(text), "", "```text", " ".join([path, *names, "[OPTIONS]"]), "```", ""]
        table = "\n".join(row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False))
        first = seen.setdefault(table, path)
        parts += ["| | |", "|---|---|", table, ""] if first == path else [f"The options are those of `{first}`.", ""]
    return "\n".join(parts)


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """All commands that run by themselves, by their paths such as "specdec train m2r2"."""
    if path != "specdec" and getattr(command, "invoke_without_command", True):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(f"{path} {name}", inner)


def row(parameter: Any) -> str:
    """A parameter as a line of a table: its names and values, what it does, its default."""
    named = parameter.param_type_name == "argument"
    metavar = parameter.metavar or parameter.name.upper()
    name = metavar if named else ", ".join(parameter.opts + parameter.secondary_opts)
    name += "" if named or parameter.is_flag else f" {metavar}"
    text, default = (parameter.help or "").strip(), parameter.default
    if not (callable(default) or default in (None, False, "", (), [])):
        text += f" Default: {getattr(default, 'value', default)}."
    return f"| `{name}` | {escaped(' '.join(text.split()) + ' Required.' * parameter.required)} |"


def escaped(text: str) -> str:
    """Plain text for a cell: Markdown and HTML are escaped, and quoted commands are code."""
    text = re.sub(r"([\\*_<>|\[\]])", r"\\\1", text)
    return re.sub(r"'((?:specdec|--)[^']*)'", lambda found: f"`{found[1].replace(chr(92), '')}`", text)
