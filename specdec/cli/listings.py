"""``specdec models`` and ``specdec drafters``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from specdec.base import terminal
from specdec.base.errors import SpecDecError
from specdec.cli.shared import print_json
from specdec.models.catalogue import embedded_models, shipped_drafters
from specdec.speculation import registry

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def models(as_json: AsJson = False) -> None:
    """List the embedded models: licence, sizes, cache state, shipped drafters and location."""
    rows = embedded_models()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    cells = []
    for row in rows:
        sizes = [f"{size / 1e6:.0f} MB" for size in (row.download_bytes, row.cached_bytes)]
        shipped = ", ".join(row.drafters) or "-"
        cells.append((row.name, row.licence, *sizes, "yes" if row.cached else "no", shipped, row.where))
    terminal.print_table(("name", "licence", "download", "on disk", "cached", "shipped drafters", "where"), cells)


def drafters(as_json: AsJson = False) -> None:
    """List the drafters: summary, training command, and the models for which one is shipped."""
    rows = [_drafter(name) for name in sorted(registry.names("drafters"))]
    if as_json:
        print_json(rows)
        return
    cells = [
        (row["name"], row["summary"], row["training"] or "not needed", ", ".join(row["shipped_for"]) or "-")
        for row in rows
    ]
    terminal.print_table(("name", "summary", "training", "shipped for"), cells)


def _drafter(name: str) -> dict[str, Any]:
    try:
        found = registry.lookup("drafters", name)
        summary, training = found.summary, found.training
    except (ImportError, AttributeError, SpecDecError) as error:  # a broken plug-in must not hide the others
        summary, training = f"cannot be loaded: {error}", None
    return {
        "name": name,
        "summary": summary,
        "training": training,
        "shipped_for": shipped_drafters().get(name, []),
    }
