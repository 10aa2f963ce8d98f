"""From a sweep file and overrides to the cells to run, everything checked before anything is loaded.

The keys of a file are the settings of a cell (``specdec.bench.cell.Cell``), and a list is an axis: the cells are the
product of all axes. ``drafter`` and ``verifier`` may be mappings, ``{NAME: {option: value or list}}``. Besides:

    name, description    of the sweep
    zip: [[A, B], ...]   axes that step together instead of crossing
    exclude: [{A: value or list, ...}, ...]   drops the cells that match all of an entry's conditions
    resources: {cpus, gpus, memory_gb, workers}   of one cell, where a launcher other than this process asks

An option's axis is called ``drafter.NAME.OPTION``; so it is in ``zip``, in ``exclude`` and in overrides. Knows nothing
of running cells.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.bench.cell import Cell
from specdec.sweep.document import Node, load, show
from specdec.sweep.overrides import override
from specdec.sweep.schema import (
    GROUPS,
    KEYS,
    SETTINGS,
    WHOLE,
    Axis,
    Resources,
    check_name,
    check_options,
    checked,
    named,
    options,
    resources,
    text,
)

MOST_CELLS = 10_000


@dataclass(frozen=True)
class Plan:
    """A sweep, ready to run: every cell once, those with the same model next to each other."""

    name: str
    description: str
    cells: tuple[Cell, ...]
    resources: Resources


def shipped() -> dict[str, Path]:
    """The sweep files that come with the package, by name."""
    folder = Path(str(importlib.resources.files("specdec.configs"))) / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """The sweep file that ``name`` means: a path, or the name of a shipped one. Raises SpecDecError for neither."""
    known = shipped()
    if name in known and not Path(name).is_file():
        return known[name]
    if not Path(name).is_file():
        raise SpecDecError(f"no sweep file '{name}'{did_you_mean(name, known)}; shipped: {', '.join(known)}")
    return Path(name)


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a file with ``overrides`` (``KEY=VALUE,VALUE``) on top. Raises SpecDecError with file and line."""
    root = load(path)
    if root.value is None:
        raise SpecDecError(f"{path}: the file is empty; a sweep needs at least one setting, such as 'drafter: m2r2'")
    items = root.known("a sweep", KEYS)
    Sweep(items, root, path.stem, strict=True).check_conditions()
    for change in overrides:
        override(items, change)
    return Sweep(items, root, path.stem).plan()


class Sweep:
    """A sweep file under inspection: its axes, and the points that they span.

    strict: conditions may name only what there is; overrides can take an axis away from them.
    """

    def __init__(self, items: dict[str, Node], root: Node, name: str, strict: bool = False) -> None:
        self.root, self.items = root, items
        self.name = text(items.get("name"), name)
        self.description = text(items.get("description"), "")
        self.resources = resources(items.get("resources"))
        self.against = None if WHOLE not in items else checked(Cell, WHOLE, items[WHOLE].holding(items[WHOLE].each()))
        self.axes = [Axis(name, self._setting(name, items[name])) for name in SETTINGS if name in items]
        defaults = Cell()
        self.names = {group: self._group(group, getattr(defaults, group)) for group in GROUPS}
        self.options = {
            group: {name: list(options(f"{group}.{name}", node)) for name, node in names.items()}
            for group, names in self.names.items()
        }
        self.zips = self._zips(strict)
        self.excludes = self._excludes(strict)

    # Read the file.

    def _setting(self, name: str, node: Node) -> list[Node]:
        values = node.each()
        if not values:
            node.fail(f"'{name}' is an empty list: the sweep would have no cell")
        seen: list[Any] = []
        for value in values:
            plain = checked(Cell, name, value)
            if plain in seen:
                value.fail(f"'{name}' has the value {show(plain)} twice")
            seen.append(plain)
        return values

    def _group(self, group: str, default: str) -> dict[str, Node]:
        names = named(self.items.get(group) or self.root.holding(default), group)
        for name, node in names.items():
            try:
                check_name(group, name)
            except SpecDecError as error:
                node.fail(str(error))
        return names

    def _zips(self, strict: bool) -> list[list[str]]:
        known, taken, groups = self._axis_names(), set[Any](), []
        for entry in self.items["zip"].each() if "zip" in self.items else []:
            names = [node.plain() for node in entry.each()]
            if len(names) < 2:
                entry.fail("an entry of zip is a list of two or more axes that step together, such as [[model, dtype]]")
            for name in names:
                if strict and name not in known:
                    hint = "; drop unwanted pairs with exclude" if name in GROUPS else ""
                    entry.fail(f"zip: '{show(name)}' is no axis here{did_you_mean(str(name), known)}{hint}")
                if name in taken:
                    entry.fail(f"zip has '{name}' twice")
                taken.add(name)
            lengths = {name: known[name] for name in names if name in known}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                entry.fail(f"axes that step together must have the same number of values: {counts}")
            groups.append(names)
        return groups

    def _axis_names(self) -> dict[str, int]:
        """The number of values of every axis that may be zipped."""
        axes = [*self.axes, *(axis for names in self.options.values() for axes in names.values() for axis in axes)]
        return {axis.name: len(axis.values) for axis in axes}

    def _excludes(self, strict: bool) -> list[tuple[Node, dict[str, list[Any]]]]:
        known, out = [*GROUPS, *self._axis_names()], []
        for entry in self.items["exclude"].each() if "exclude" in self.items else []:
            what = "an entry of exclude"
            conditions = entry.known(what, known) if strict else dict(entry.items(what))
            if not conditions:
                entry.fail("an entry of exclude needs at least one condition, such as {drafter: none}")
            out.append((entry, {key: [v.plain() for v in value.each()] for key, value in conditions.items()}))
        return out

    def check_conditions(self) -> None:
        """Raise SpecDecError for an entry of exclude that drops nothing: a typo, as a rule."""
        points = list(self._points(excluded=True))
        for entry, conditions in self.excludes:
            for key, values in conditions.items():
                taken = [point[key] for point in points if key in point]
                for value in values:
                    if value not in taken:
                        near = did_you_mean(str(value), {str(t) for t in taken})
                        entry.fail(f"exclude: {key} is never {show(value)} in this sweep{near}")
            if not any(_matches(point, conditions) for point in points):
                entry.fail(f"this entry of exclude matches no cell: {show(entry.plain())}")

    # Make the cells.

    def _points(self, excluded: bool = False) -> Iterator[dict[str, Any]]:
        """Every combination of the axes, as values by axis name; with those that exclude drops, if asked for."""
        spans = []
        for drafter, verifier in product(self.names["drafter"], self.names["verifier"]):
            axes = [*self.axes, *self.options["drafter"][drafter], *self.options["verifier"][verifier]]
            spans.append(({"drafter": drafter, "verifier": verifier}, _together(axes, self.zips)))
        total = sum(math.prod(len(steps) for steps in span) for _, span in spans)
        if total > MOST_CELLS:
            self.root.fail(f"this sweep has {total:,} cells, more than the most of {MOST_CELLS:,}; cut an axis")
        for fixed, span in spans:
            for steps in product(*span):
                point = fixed | {name: value for step in steps for name, value in step.items()}
                if excluded or not any(_matches(point, conditions) for _, conditions in self.excludes):
                    yield point

    def plan(self) -> Plan:
        """The plan. Raises SpecDecError for combinations that cannot work and for a sweep without a cell."""
        cells: dict[str, Cell] = {}
        for point in self._points():
            cell = self._cell(point)
            cells.setdefault(cell.key(), cell)
        if not cells:
            self.root.fail("this sweep has no cell: exclude drops them all")
        loads = list(dict.fromkeys(tuple(cell.loading.values()) for cell in cells.values()))
        ordered = sorted(cells.values(), key=lambda cell: loads.index(tuple(cell.loading.values())))
        return Plan(self.name, self.description, tuple(ordered), self.resources)

    def _cell(self, point: dict[str, Any]) -> Cell:
        values: dict[str, Any] = {} if self.against is None else {WHOLE: self.against}
        for name, value in point.items():
            if name in GROUPS:
                values[name] = value
                values[f"{name}_options"] = {}
            elif name in SETTINGS:
                values[name] = value
        for group in GROUPS:
            prefix = f"{group}.{values[group]}."
            for name, value in point.items():
                if name.startswith(prefix):
                    _put(values[f"{group}_options"], name.removeprefix(prefix).split("."), value)
        cell = Cell(**values)
        if cell.weights in ("int8", "int4") and (
            cell.dtype not in ("auto", "bfloat16") or cell.device not in ("auto", "cpu") or cell.runtime == "reference"
        ):
            self.items["weights"].fail(
                f"weights {cell.weights} need bfloat16, the CPU and a runtime of ours; they cannot go with "
                f"dtype {cell.dtype}, device {cell.device}, runtime {cell.runtime}; exclude the combination"
            )
        for group in GROUPS:
            name, own = getattr(cell, group), getattr(cell, f"{group}_options")
            try:
                check_options(group, name, own)
            except SpecDecError as error:
                self._blame(group, name, str(error)).fail(str(error))
        return cell.canonical()

    def _blame(self, group: str, name: str, message: str) -> Node:
        """The place of the option that ``message`` is about; else of the name it is an option of."""
        found = {}
        for axis in self.options[group][name]:
            if match := re.search(rf"\b{re.escape(axis.name.rpartition('.')[2])}\b", message):
                found[match.start()] = axis.values[0]
        return found[min(found)] if found else self.names[group][name]


def _together(axes: list[Axis], zips: list[list[str]]) -> list[list[dict[str, Any]]]:
    """The steps of each axis, or of each group of zipped ones: values by axis name."""
    out: list[list[dict[str, Any]]] = []
    done: set[str] = set()
    for axis in axes:
        if axis.name in done:
            continue
        group = next((names for names in zips if axis.name in names), [axis.name])
        members = [other for other in axes if other.name in group]  # options of another drafter are not here
        done.update(other.name for other in members)
        rows = zip(*(other.values for other in members), strict=True)
        out.append([{o.name: v.plain() for o, v in zip(members, row, strict=True)} for row in rows])
    return out


def _matches(point: dict[str, Any], conditions: dict[str, list[Any]]) -> bool:
    return all(key in point and point[key] in values for key, values in conditions.items())


def _put(options: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        options = options.setdefault(key, {})
    options[path[-1]] = value
