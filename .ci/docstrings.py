"""Docstrings for the API reference: brackets are no links, and ``name: ...`` lines become a list."""

import re
from typing import Any

from griffe import Extension, Object

NAMED = re.compile(r"(\w+(?:(?:, | / )\w+)*)( \[[^\]]*\])?: (?=\S)")


def markdown(text: str) -> str:
    """The docstring ``text`` as Markdown."""
    out, listed = [], False
    for line in text.splitlines():
        name = NAMED.match(line)
        ends = not line.strip() or line.startswith(("Raises ", "Returns "))
        if name and name[1] != "Note":
            out += [] if listed else [""]
            line, listed = f"- **{name[1]}**{name[2] or ''}: {line[name.end() :]}", True
        elif listed and ends:
            out.append("")
            listed = False
        elif listed:
            line = f"    {line.strip()}"
        out.append(_escaped(line))
    return "\n".join(out)


def _escaped(line: str) -> str:
    """Escape brackets that are not code."""
    parts = line.split("``")
    return "``".join(part.replace("[", "\\[") if place % 2 == 0 else part for place, part in enumerate(parts))


class PlainText(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
