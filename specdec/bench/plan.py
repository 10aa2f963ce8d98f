"""The plan of a sweep: from a YAML file and overrides to checked cells. Nothing is loaded here.

The keys of a file are the settings of a cell (``specdec.bench.cell.Cell``). A list is an axis, and the cells are the
product of all axes. ``drafter`` and ``verifier`` may be mappings, ``{NAME: {option: value or list}}``. Further keys:

    name, description    of the sweep
    zip: [[A, B], ...]   axes that step together
    exclude: [{A: value or list, ...}, ...]   drops the cells that match all conditions of an entry
    resources: {cpus, gpus, memory_gb, workers}   of one task on a Ray cluster

The axis of an option is called ``drafter.NAME.OPTION`` in ``zip``, ``exclude`` and overrides.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings
from specdec.bench.cell import EXTERNAL_METHODS, Cell, check_external, check_method
from specdec.bench.document import Keys, as_list, load, parse, shortened
from specdec.speculation import registry

MAX_CELLS = 10_000
GROUPS = ("drafter", "verifier")  # settings whose values have options
WHOLE = "against"  # a setting whose value is a list
# Settings of a method. Cells that agree in all others are a group, which is measured side by side.
METHOD = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")
SETTINGS = [name for name in Cell.model_fields if not name.startswith(GROUPS)] + [*GROUPS]
KEYS = ("name", "description", "zip", "exclude", "resources", *SETTINGS)


class Resources(Settings):
    """What one task needs on a cluster. workers: maximum of tasks at once; None: as many as fit."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float = Field(0, ge=0)
    workers: int | None = Field(None, gt=0)


@dataclass(frozen=True)
class Plan:
    """Cells that are ready to run, each once."""

    name: str
    description: str
    cells: tuple[Cell, ...]
    resources: Resources = field(default_factory=Resources)


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells that are measured side by side; groups of one model in a row."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = {name: value for name, value in cell.as_dict().items() if name not in METHOD}
        found.setdefault(json.dumps(shared, sort_keys=True), []).append(cell)
    loads = [group[0].loading for group in found.values()]
    return sorted(found.values(), key=lambda group: loads.index(group[0].loading))


@dataclass(frozen=True)
class Axis:
    """A setting, or an option of a drafter or verifier: its keys in the file, and its values."""

    keys: Keys
    values: list[Any]

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether a cell with the drafter and the verifier of ``point`` has it."""
        return len(self.keys) == 1 or self.keys[1] == point[self.keys[0]]


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a file with ``overrides`` (``KEY=VALUE,VALUE``) on top. Raises SpecDecError with file and line."""
    sweep = Sweep(path)
    for text in overrides:
        sweep.override(text)
    return sweep.plan()


class Sweep:
    """The axes of a file, and the cells that they span. Raises SpecDecError with the line of a mistake."""

    def __init__(self, path: Path) -> None:
        self.document = document = load(path)
        if document.value is None:
            raise SpecDecError(
                f"{path}: the file is empty; a sweep needs at least one setting, such as 'drafter: m2r2'"
            )
        items = document.mapping((), document.value, "a sweep", KEYS)
        self.name, self.description = items.get("name", path.stem), items.get("description", "")
        self.resources = document.mapping(("resources",), items.get("resources"), "resources")
        self.axes = dict[str, Axis]()
        for name in SETTINGS:
            if name in items or name in GROUPS:
                self._add((name,), items.get(name, getattr(Cell(), name)))
        self.zips = [[str(name) for name in as_list(entry)] for entry in as_list(items.get("zip", []))]
        self.excludes = [
            {
                axis: as_list(value)
                for axis, value in document.mapping(("exclude", number), entry, "an entry of exclude").items()
            }
            for number, entry in enumerate(as_list(items.get("exclude", [])))
        ]
        self._check_values()
        self._check_conditions()  # of the file alone: an override may remove what they name

    def _add(self, keys: Keys, given: Any) -> None:
        """Add the axis of a setting or an option. The options of joined drafters are one level further down."""
        name = ".".join(keys)
        if keys[0] in GROUPS and (isinstance(given, dict) or len(keys) == 2):
            options = self.document.mapping(keys, given, f"the options of '{name}'")
            for key, value in options.items():
                self._add((*keys, key), value)
            if len(keys) > 1:
                return
            given = list(options)
        self.axes[name] = Axis(keys, [as_list(given)] if name == WHOLE else as_list(given))

    def override(self, text: str) -> None:
        """Put ``KEY=VALUE,VALUE`` over the file."""
        key, equals, value = text.partition("=")
        keys: Keys = tuple(key.split("."))
        if group := next((group for group in GROUPS if text.startswith(f"{group}.")), None):
            names, rest = self.axes[group].values, text.removeprefix(f"{group}.")
            name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
            if name is None:
                given = rest.partition(".")[0]
                near = did_you_mean(given, names)
                raise SpecDecError(f"'{text}': the sweep has no {group} '{given}'{near}; it has {', '.join(names)}")
            option, equals, value = rest.removeprefix(f"{name}.").partition("=")  # names may contain =
            key, keys = f"{group}.{name}.{option}", (group, name, *option.split("."))
        elif key not in (known := (*SETTINGS, "name")) and not key.startswith("resources."):
            near = did_you_mean(key, known)
            what = "it is SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
            raise SpecDecError(f"cannot override with '{text}'{near}; {what}")
        if not equals:
            raise SpecDecError(f"override '{text}' gives no value; write {text}=VALUE,VALUE")
        place = f"override '{text}'"
        values = parse(f"[{value}]", lambda line: place).value
        if not isinstance(values, list) or not values:
            raise SpecDecError(f"{place} gives no value")
        self.document.move(keys, place, deep=key not in GROUPS)  # names keep their options
        if key == "name":
            self.name = values[0]
        elif keys[0] == "resources":
            self.resources = self.resources | {".".join(keys[1:]): values[0]}
        else:
            self.axes[key] = Axis(keys, [values] if key == WHOLE else values)

    # Checks.

    def _check(self, settings: type[Settings], name: str, value: Any, keys: Keys) -> None:
        try:
            settings(**{name: value})
        except SpecDecError as error:
            self.document.fail(keys, str(error))

    def _check_values(self) -> None:
        fail = self.document.fail
        for key, text in (("name", self.name), ("description", self.description)):
            if not isinstance(text, str) or not (text.strip() or key == "description"):
                fail((key,), f"this must be text; got {shortened(text)}")
        for key, value in self.resources.items():
            self._check(Resources, key, value, ("resources", key))
        for name, axis in self.axes.items():
            if not axis.values:
                fail(axis.keys, f"'{axis.keys[-1]}' is empty: the sweep would have no cell")
            for number, value in enumerate(axis.values):
                if name in SETTINGS:
                    self._check(Cell, name, value, (*axis.keys, number))
                if value in axis.values[:number]:
                    fail((*axis.keys, number), f"'{axis.keys[-1]}' has the value {shortened(value)} twice")
        for number, zipped in enumerate(self.zips):
            others = {name for names in self.zips[:number] for name in names}
            lengths = {name: len(self.axes[name].values) for name in zipped if name in self.axes}
            if len(zipped) < 2 or others & {*zipped} or len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                what = f"an entry of zip lists axes with as many values each, and an axis is in one entry; {counts}"
                fail(("zip", number), what)

    def _check_conditions(self) -> None:
        """Raise SpecDecError for axes and values in zip and exclude that the sweep does not have."""
        for number, names in enumerate(self.zips):
            for name in names:
                self._known(
                    ("zip", number), name, [n for n in self.axes if n not in GROUPS], "not an axis of this sweep"
                )
        points = list(self._points(excluded=True))
        for number, conditions in enumerate(self.excludes):
            for axis, values in conditions.items():
                self._known(("exclude", number, axis), axis, self.axes, "not an axis of this sweep")
                taken = [point[axis] for point in points if axis in point]
                for value in values:
                    self._known(("exclude", number, axis), value, taken, f"not a value of {axis} in this sweep")
            if not any(_matches(point, conditions) for point in points):
                what = f"this entry of exclude matches no cell: {shortened(conditions)}"
                self.document.fail(("exclude", number), what)

    def _known(self, keys: Keys, value: Any, known: Collection[Any], what: str) -> None:
        if value not in known:
            near = did_you_mean(str(value), map(str, known))
            self.document.fail(keys, f"{keys[0]}: '{shortened(value)}' is {what}{near}")

    # Cells.

    def _points(self, excluded: bool = False) -> Iterator[dict[str, Any]]:
        """Every combination of the axes, as values by axis name; with those that exclude drops, if ``excluded``."""
        names = product(*(self.axes[group].values for group in GROUPS))
        spans = [(point, self._steps(point)) for point in (dict(zip(GROUPS, each, strict=True)) for each in names)]
        total = sum(math.prod(map(len, steps)) for _, steps in spans)
        if total > MAX_CELLS:
            self.document.fail(
                (), f"this sweep has {total:,} cells, more than the most of {MAX_CELLS:,}; shorten an axis"
            )
        for point, span in spans:
            for steps in product(*span):
                for step in steps:
                    point = point | step
                if excluded or not any(_matches(point, conditions) for conditions in self.excludes):
                    yield point

    def _steps(self, point: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The values of each axis that applies, by name; zipped axes step together."""
        axes = {n: axis.values for n, axis in self.axes.items() if n not in GROUPS and axis.applies(point)}
        out = []
        while axes:
            first = next(iter(axes))
            zipped = next((names for names in self.zips if first in names), [first])
            taken = {name: axes.pop(name) for name in [*axes] if name in zipped}
            out.append([dict(zip(taken, row, strict=True)) for row in zip(*taken.values(), strict=True)])
        return out

    def plan(self) -> Plan:
        """The plan. Raises SpecDecError for combinations that cannot work and for a sweep without a cell."""
        self._check_values()
        cells = {cell.key(): cell for cell in map(self._cell, self._points())}
        if not cells:
            self.document.fail((), "this sweep has no cell: exclude drops them all")
        name, description = (" ".join(text.split()) for text in (self.name, self.description))
        return Plan(name, description, tuple(cells.values()), Resources(**self.resources))

    def _cell(self, point: dict[str, Any]) -> Cell:
        values: dict[str, Any] = {f"{group}_options": {} for group in GROUPS}
        for name, value in point.items():
            group, *path = self.axes[name].keys
            if not path:
                values[name] = value
                continue
            holder = values[f"{group}_options"]
            for key in path[1:-1]:
                holder = holder.setdefault(key, {})
            holder[path[-1]] = value
        cell = Cell(**values)
        native = cell.dtype in ("auto", "bfloat16") and cell.device in ("auto", "cpu")
        native = native and cell.runtime in ("auto", "native")
        given = f"cannot go with dtype {cell.dtype}, device {cell.device}, runtime {cell.runtime}"
        for name in ("weights", "kv_cache", "activations"):
            value = getattr(cell, name)
            if value in ("int8", "int4") and not native:
                need = "needs bfloat16, the CPU and the native runtime"
                self.document.fail((name,), f"{name} {value} {need}; it {given}; exclude the combination")
        for group in GROUPS:
            self._check_plugin(group, point[group], values[f"{group}_options"])
        return cell.canonical()

    def _check_plugin(self, group: str, name: str, options: Mapping[str, Any]) -> None:
        try:
            check_plugin(group, name, options)
        except SpecDecError as error:
            listed = (group, self.axes[group].values.index(name))
            named = (group, name) if (group, name) in self.document.places else listed
            own = (axis.keys for axis in self.axes.values() if axis.keys[:2] == (group, name))
            option = next((keys for keys in own if keys[-1] in str(error)), None)  # that the error is about
            self.document.fail(option or named, str(error))


def _matches(point: dict[str, Any], conditions: dict[str, list[Any]]) -> bool:
    return all(key in point and point[key] in values for key, values in conditions.items())


class _Unloaded:
    """Replaces the model in a check before loading; reading any attribute ends the check."""

    class Accessed(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        raise self.Accessed


def check_plugin(group: str, name: str, options: Mapping[str, Any]) -> None:
    """Raise SpecDecError for an unknown plug-in and for options that it refuses with any model."""
    if group == "verifier":
        registry.verifier(name, options)
    elif name.partition("=")[0] in EXTERNAL_METHODS:
        check_external(name, options)
    else:
        check_method(name)
        whole = registry.Choice.of(name)
        checks = [(whole, options)]
        if len(whole.parts) > 1:
            checks += [(registry.Choice(part[0], [part]), options.get(part[0], {})) for part in whole.parts]
        for choice, own in checks:
            with contextlib.suppress(_Unloaded.Accessed):
                choice.load(_Unloaded(), own)
