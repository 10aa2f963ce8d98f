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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings
from specdec.bench.cell import Cell
from specdec.sweep.document import Document, Keys, each, load, show
from specdec.sweep.overrides import override
from specdec.sweep.schema import GROUPS, KEYS, SETTINGS, WHOLE, Resources, by_name, check_plugin

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
    document = load(path)
    if document.value is None:
        raise SpecDecError(f"{path}: the file is empty; a sweep needs at least one setting, such as 'drafter: m2r2'")
    Sweep(document, path.stem).check_conditions()
    for change in overrides:
        override(document, change)
    return Sweep(document, path.stem).plan()


class Sweep:
    """A sweep file under inspection: its axes, and the points that they span.

    settings: the values of each axis. names: of drafters and of verifiers, each with the values of its options' axes.
    """

    def __init__(self, document: Document, name: str) -> None:
        self.document = document
        self.items = document.mapping((), document.value, "a sweep", KEYS)
        self.name, self.description = self._text("name", name), self._text("description", "")
        given = document.mapping(("resources",), self.items.get("resources"), "resources", Resources.model_fields)
        for key, value in given.items():
            self._check(Resources, key, value, ("resources", key))
        self.resources = Resources(**given)
        self.against = {WHOLE: each(self.items[WHOLE])} if WHOLE in self.items else {}
        for value in self.against.values():
            self._check(Cell, WHOLE, value, (WHOLE,))
        self.settings = {name: self._axis((name,), self.items[name]) for name in SETTINGS if name in self.items}
        for name, values in self.settings.items():
            for number, value in enumerate(values):
                self._check(Cell, name, value, (name, number))
        self.names = {
            group: {name: self._options((group, name), given) for name, given in by_name(document, group).items()}
            for group in GROUPS
        }
        options = (axes for names in self.names.values() for axes in names.values())
        self.axes = self.settings | {name: values for axes in options for name, values in axes.items()}
        self.zips = self._zips()
        self.excludes = self._excludes()

    # Read the file.

    def _text(self, key: str, default: str) -> str:
        value = self.items.get(key, default)
        if not isinstance(value, str) or (key in self.items and not value.strip()):
            self.document.fail((key,), f"this must be text; got {show(value)}")
        return " ".join(value.split())

    def _check(self, settings: type[Settings], name: str, value: Any, keys: Keys) -> None:
        try:
            settings(**{name: value})
        except SpecDecError as error:
            self.document.fail(keys, str(error))

    def _axis(self, keys: Keys, value: Any) -> list[Any]:
        values = each(value)
        if not values:
            self.document.fail(keys, f"'{keys[-1]}' is an empty list: the sweep would have no cell")
        for number, one in enumerate(values):
            if one in values[:number]:
                self.document.fail((*keys, number), f"'{keys[-1]}' has the value {show(one)} twice")
        return values

    def _options(self, keys: Keys, given: Any) -> dict[str, list[Any]]:
        """The axes of a drafter's or a verifier's options; those of joined drafters are a level down."""
        prefix, out = ".".join(keys), dict[str, list[Any]]()
        for name, value in self.document.mapping(keys, given, f"the options of '{prefix}'").items():
            if isinstance(value, dict):
                out |= self._options((*keys, name), value)
            else:
                out[f"{prefix}.{name}"] = self._axis((*keys, name), value)
        return out

    def _zips(self) -> list[list[str]]:
        groups = [[str(name) for name in each(entry)] for entry in each(self.items.get("zip", []))]
        for number, names in enumerate(groups):
            others = {name for group in groups[:number] for name in group}
            lengths = {name: len(self.axes[name]) for name in names if name in self.axes}
            if len(names) < 2 or others & {*names} or len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                what = f"an entry of zip lists axes with as many values each, and an axis is in one entry; {counts}"
                self.document.fail(("zip", number), what)
        return groups

    def _excludes(self) -> list[dict[str, list[Any]]]:
        entries = enumerate(each(self.items.get("exclude", [])))
        return [
            {
                axis: each(value)
                for axis, value in self.document.mapping(("exclude", number), entry, "an entry of exclude").items()
            }
            for number, entry in entries
        ]

    def check_conditions(self) -> None:
        """Raise SpecDecError for what zip and exclude name and the file does not have. Overrides may take it away."""
        for number, names in enumerate(self.zips):
            for name in names:
                self._known(("zip", number), name, self.axes, "not an axis of this sweep")
        points = list(self._points(excluded=True))
        for number, conditions in enumerate(self.excludes):
            for axis, values in conditions.items():
                self._known(("exclude", number, axis), axis, [*GROUPS, *self.axes], "not an axis of this sweep")
                taken = [point[axis] for point in points if axis in point]
                for value in values:
                    self._known(("exclude", number, axis), value, taken, f"not a value of {axis} in this sweep")
            if not any(_matches(point, conditions) for point in points):
                self.document.fail(("exclude", number), f"this entry of exclude matches no cell: {show(conditions)}")

    def _known(self, keys: Keys, value: Any, known: Collection[Any], what: str) -> None:
        if value not in known:
            self.document.fail(keys, f"{keys[0]}: '{show(value)}' is {what}{did_you_mean(str(value), map(str, known))}")

    # Make the cells.

    def _points(self, excluded: bool = False) -> Iterator[dict[str, Any]]:
        """Every combination of the axes, as values by axis name; with those that exclude drops, if asked for."""
        spans = []
        for drafter, verifier in product(*self.names.values()):
            axes = self.settings | self.names["drafter"][drafter] | self.names["verifier"][verifier]
            spans.append(({"drafter": drafter, "verifier": verifier}, _steps(axes, self.zips)))
        total = sum(math.prod(len(steps) for steps in span) for _, span in spans)
        if total > MOST_CELLS:
            self.document.fail((), f"this sweep has {total:,} cells, more than the most of {MOST_CELLS:,}; cut an axis")
        for point, span in spans:
            for steps in product(*span):
                for step in steps:
                    point = point | step
                if excluded or not any(_matches(point, conditions) for conditions in self.excludes):
                    yield point

    def plan(self) -> Plan:
        """The plan. Raises SpecDecError for combinations that cannot work and for a sweep without a cell."""
        cells: dict[str, Cell] = {}
        for point in self._points():
            cell = self._cell(point)
            cells.setdefault(cell.key(), cell)
        if not cells:
            self.document.fail((), "this sweep has no cell: exclude drops them all")
        loads = [cell.loading for cell in cells.values()]
        ordered = sorted(cells.values(), key=lambda cell: loads.index(cell.loading))
        return Plan(self.name, self.description, tuple(ordered), self.resources)

    def _cell(self, point: dict[str, Any]) -> Cell:
        values: dict[str, Any] = self.against | {name: point[name] for name in (*GROUPS, *self.settings)}
        for group in GROUPS:
            options = values[f"{group}_options"] = {}
            prefix = f"{group}.{point[group]}."
            for name in self.names[group][point[group]]:
                *path, last = name.removeprefix(prefix).split(".")
                holder = options
                for key in path:
                    holder = holder.setdefault(key, {})
                holder[last] = point[name]
        cell = Cell(**values)
        elsewhere = cell.dtype not in ("auto", "bfloat16") or cell.device not in ("auto", "cpu")
        given = f"dtype {cell.dtype}, device {cell.device}, runtime {cell.runtime}; exclude the combination"
        if cell.weights in ("int8", "int4") and (elsewhere or cell.runtime == "reference"):
            self.document.fail(
                ("weights",),
                f"weights {cell.weights} need bfloat16, the CPU and a runtime of ours; they cannot go with {given}",
            )
        if cell.kv_cache == "int8" and (elsewhere or cell.runtime not in ("auto", "native")):
            self.document.fail(
                ("kv_cache",),
                f"an 8-bit KV cache needs bfloat16, the CPU and the native runtime; it cannot go with {given}",
            )
        for group in GROUPS:
            name = point[group]
            try:
                check_plugin(group, name, values[f"{group}_options"])
            except SpecDecError as error:
                self.document.fail(self._subject(group, name, str(error)), str(error))
        return cell.canonical()

    def _subject(self, group: str, name: str, message: str) -> Keys:
        """The option that ``message`` is about; else the name it is an option of."""
        found: dict[int, Keys] = {}
        for axis in self.names[group][name]:
            path = axis.removeprefix(f"{group}.{name}.").split(".")
            if match := re.search(rf"\b{re.escape(path[-1])}\b", message):
                found[match.start()] = (group, name, *path)
        return found[min(found)] if found else (group, name)


def _steps(axes: dict[str, list[Any]], zips: list[list[str]]) -> list[list[dict[str, Any]]]:
    """The steps of each axis, or of each group of zipped ones: values by axis name."""
    out: list[list[dict[str, Any]]] = []
    done: set[str] = set()
    for axis in axes:
        if axis not in done:
            group = next((names for names in zips if axis in names), [axis])
            members = [name for name in axes if name in group]  # options of another drafter are not here
            done.update(members)
            rows = zip(*(axes[name] for name in members), strict=True)
            out.append([dict(zip(members, row, strict=True)) for row in rows])
    return out


def _matches(point: dict[str, Any], conditions: dict[str, list[Any]]) -> bool:
    return all(key in point and point[key] in values for key, values in conditions.items())
