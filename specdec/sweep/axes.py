"""In what the cells of a sweep differ, and short names for them. Knows nothing of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.sweep.schema import GROUPS

SHORT = {"num_speculative_tokens": "depth", "max_new_tokens": "tokens", "batch_size": "batch", "temperature": "T"}


def values(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a cell (``Cell.as_dict()``) by axis name; options are ``drafter.NAME.OPTION``."""
    out: dict[str, Any] = {}
    for name, value in cell.items():
        group = name.removesuffix("_options")
        out |= {name: value} if group == name else flat(f"{group}.{cell[group]}.", value)
    return out


def flat(prefix: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of joined drafters are a level down; here they are not."""
    out: dict[str, Any] = {}
    for name, value in options.items():
        out |= flat(f"{prefix}{name}.", value) if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return out


def flow(value: Any) -> str:
    """``value`` as YAML on one line."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def varying(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The axes on which these cells differ, each with its values in order of appearance."""
    found: dict[str, list[Any]] = {}
    for cell in cells:
        for name, value in values(cell).items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: taken for name, taken in found.items() if len(taken) > 1}


def labels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each cell: its drafter, and what distinguishes it from the other cells of that drafter."""
    drafters = {cell["drafter"] for cell in cells}
    differing = {drafter: varying([cell for cell in cells if cell["drafter"] == drafter]) for drafter in drafters}
    out = []
    for cell in cells:
        point = values(cell)
        own = [f"{short(name)}={flow(point[name])}" for name in differing[cell["drafter"]] if name in point]
        out.append(" ".join([cell["drafter"], *own]))
    return out


def short(axis: str) -> str:
    """The last part of an axis' name, for people."""
    name = axis.rpartition(".")[2] if axis.startswith(tuple(f"{group}." for group in GROUPS)) else axis
    return SHORT.get(name, name)
