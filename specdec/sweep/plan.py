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

import contextlib
import importlib.resources
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings
from specdec.bench.cell import OTHERS, Cell, check_method, check_other
from specdec.speculation import registry
from specdec.sweep.document import Keys, each, load, parse, show

MOST_CELLS = 10_000
GROUPS = ("drafter", "verifier")  # settings that have options of their own
WHOLE = "against"  # a setting that is a list itself
SETTINGS = [name for name in Cell.model_fields if not name.startswith(GROUPS)]
KEYS = ("name", "description", "zip", "exclude", "resources", *GROUPS, *SETTINGS)


class Resources(Settings):
    """What one cell needs of a cluster. workers: most cells at once; None: as many as fit."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float = Field(0, ge=0)
    workers: int | None = Field(None, gt=0)


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
    sweep = Sweep(path)
    for change in overrides:
        sweep.override(change)
    return sweep.plan()


class Sweep:
    """A sweep file: its axes, and the points that they span.

    settings: the values of each axis. names: of drafters and of verifiers, each with the values of its options' axes.
    paths: the way to each axis in the file.
    """

    def __init__(self, path: Path) -> None:
        self.document = document = load(path)
        if document.value is None:
            raise SpecDecError(
                f"{path}: the file is empty; a sweep needs at least one setting, such as 'drafter: m2r2'"
            )
        items = document.mapping((), document.value, "a sweep", KEYS)
        self.name, self.description = items.get("name", path.stem), items.get("description", "")
        self.resources = document.mapping(("resources",), items.get("resources"), "resources")
        self.paths: dict[str, Keys] = {name: (name,) for name in SETTINGS}
        self.settings = {name: self._values(name, items[name]) for name in SETTINGS if name in items}
        self.names = {group: self._names(group, items.get(group, getattr(Cell(), group))) for group in GROUPS}
        self.zips = [[str(name) for name in each(entry)] for entry in each(items.get("zip", []))]
        self.excludes = [
            {
                axis: each(value)
                for axis, value in document.mapping(("exclude", number), entry, "an entry of exclude").items()
            }
            for number, entry in enumerate(each(items.get("exclude", [])))
        ]
        self._check_conditions()

    # Read the file, and what goes over it.

    def _values(self, name: str, value: Any) -> list[Any]:
        return [each(value)] if name == WHOLE else each(value)

    def _names(self, group: str, given: Any) -> dict[str, dict[str, list[Any]]]:
        """The options of a group's plug-ins by name, of a mapping, of a list of names or of one name."""
        if isinstance(given, dict):
            return {name: self._options((group, name), options) for name, options in given.items()}
        names = each(given)
        for number, name in enumerate(names):
            if not isinstance(name, str) or not name:
                what = f"'{group}' must be a name, a list of names or a mapping; got {show(name)}"
                self.document.fail((group, number), what)
            if name in names[:number]:
                self.document.fail((group, number), f"'{group}' has the value {name} twice")
            self.document.places.setdefault((group, name), self.document.place((group, number)))
        return {name: {} for name in names}

    def _options(self, keys: Keys, given: Any) -> dict[str, list[Any]]:
        """The axes of a drafter's or a verifier's options; those of joined drafters are a level down."""
        axis, out = ".".join(keys), dict[str, list[Any]]()
        for name, value in self.document.mapping(keys, given, f"the options of '{axis}'").items():
            if isinstance(value, dict):
                out |= self._options((*keys, name), value)
            else:
                out[f"{axis}.{name}"], self.paths[f"{axis}.{name}"] = each(value), (*keys, name)
        return out

    def override(self, text: str) -> None:
        """Put ``KEY=VALUE,VALUE`` over the file. Raises SpecDecError for what it does not know."""
        key, equals, value = text.partition("=")
        keys: Keys = (key,)
        if group := next((group for group in GROUPS if text.startswith(f"{group}.")), None):
            names, rest = self.names[group], text.removeprefix(f"{group}.")
            name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
            if name is None:
                given = rest.partition(".")[0]
                near = did_you_mean(given, names)
                raise SpecDecError(f"'{text}': the sweep has no {group} '{given}'{near}; it has {', '.join(names)}")
            option, equals, value = rest.removeprefix(f"{name}.").partition("=")  # names may have = in them
            keys, key = (group, name, *option.split(".")), f"{group}.{name}.{option}"
        elif key not in (known := (*GROUPS, *SETTINGS, "name")) and not key.startswith("resources."):
            near = did_you_mean(key, known)
            what = "it is SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
            raise SpecDecError(f"cannot override with '{text}'{near}; {what}")
        if not equals:
            raise SpecDecError(f"override '{text}' gives no value; write {text}=VALUE,VALUE")
        place = f"override '{text}'"
        values = parse(f"[{value}]", lambda line: place).value
        if not isinstance(values, list) or not values:
            raise SpecDecError(f"{place} gives no value")
        self.document.over(keys, place, deep=key not in GROUPS)
        if group:
            self.names[group][keys[1]][key], self.paths[key] = values, keys
        elif key in GROUPS:  # those that the file knows keep their options
            self.names[key] = {name: self.names[key].get(name, {}) for name in self._names(key, values)}
        elif key in SETTINGS:
            self.settings[key] = self._values(key, values)
        elif key == "name":
            self.name = values[0]
        else:
            self.resources = self.resources | {key.removeprefix("resources."): values[0]}

    # Check it.

    @property
    def axes(self) -> dict[str, list[Any]]:
        options = (axes for names in self.names.values() for axes in names.values())
        return self.settings | {name: values for axes in options for name, values in axes.items()}

    def _check(self, settings: type[Settings], name: str, value: Any, keys: Keys) -> None:
        try:
            settings(**{name: value})
        except SpecDecError as error:
            self.document.fail(keys, str(error))

    def _check_values(self) -> None:
        for key, text in (("name", self.name), ("description", self.description)):
            if not isinstance(text, str) or not (text.strip() or key == "description"):
                self.document.fail((key,), f"this must be text; got {show(text)}")
        for key, value in self.resources.items():
            self._check(Resources, key, value, ("resources", key))
        for group, names in self.names.items():
            if not names:
                self.document.fail((group,), f"'{group}' is empty: the sweep would have no cell")
        for axis, values in self.axes.items():
            keys = self.paths[axis]
            if not values:
                self.document.fail(keys, f"'{keys[-1]}' is an empty list: the sweep would have no cell")
            for number, value in enumerate(values):
                if value in values[:number]:
                    self.document.fail((*keys, number), f"'{keys[-1]}' has the value {show(value)} twice")
                if axis in SETTINGS:
                    self._check(Cell, axis, value, (*keys, number))
        for number, zipped in enumerate(self.zips):
            others = {name for names in self.zips[:number] for name in names}
            lengths = {name: len(self.axes[name]) for name in zipped if name in self.axes}
            if len(zipped) < 2 or others & {*zipped} or len(set(lengths.values())) > 1:
                counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                what = f"an entry of zip lists axes with as many values each, and an axis is in one entry; {counts}"
                self.document.fail(("zip", number), what)

    def _check_conditions(self) -> None:
        """Raise SpecDecError for what zip and exclude name and the file does not have. Overrides may take it away."""
        self._check_values()
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
        self._check_values()
        cells: dict[str, Cell] = {}
        for point in self._points():
            cell = self._cell(point)
            cells.setdefault(cell.key(), cell)
        if not cells:
            self.document.fail((), "this sweep has no cell: exclude drops them all")
        loads = [cell.loading for cell in cells.values()]
        ordered = sorted(cells.values(), key=lambda cell: loads.index(cell.loading))
        name, description = (" ".join(text.split()) for text in (self.name, self.description))
        return Plan(name, description, tuple(ordered), Resources(**self.resources))

    def _cell(self, point: dict[str, Any]) -> Cell:
        values: dict[str, Any] = {name: point[name] for name in (*GROUPS, *self.settings)}
        for group in GROUPS:
            options = values[f"{group}_options"] = {}
            for axis in self.names[group][point[group]]:
                *above, last = self.paths[axis][2:]
                holder = options
                for key in above:
                    holder = holder.setdefault(key, {})
                holder[last] = point[axis]
        cell = Cell(**values)
        elsewhere = cell.dtype not in ("auto", "bfloat16") or cell.device not in ("auto", "cpu")
        given = f"cannot go with dtype {cell.dtype}, device {cell.device}, runtime {cell.runtime}"
        if cell.weights in ("int8", "int4") and (elsewhere or cell.runtime == "reference"):
            need = f"weights {cell.weights} need bfloat16, the CPU and a runtime of ours"
            self.document.fail(("weights",), f"{need}; they {given}; exclude the combination")
        if cell.kv_cache == "int8" and (elsewhere or cell.runtime not in ("auto", "native")):
            need = "an 8-bit KV cache needs bfloat16, the CPU and the native runtime"
            self.document.fail(("kv_cache",), f"{need}; it {given}; exclude the combination")
        if cell.activations == "int8" and (elsewhere or cell.runtime not in ("auto", "native")):
            need = "8-bit activations need bfloat16, the CPU and the native runtime"
            self.document.fail(("activations",), f"{need}; they {given}; exclude the combination")
        for group in GROUPS:
            name = point[group]
            try:
                check_plugin(group, name, values[f"{group}_options"])
            except SpecDecError as error:
                found = (self.paths[axis] for axis in self.names[group][name] if self.paths[axis][-1] in str(error))
                self.document.fail(next(found, (group, name)), str(error))  # at the option that it is about
        return cell.canonical()


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


class _Unloaded:
    """Stands in for a model that is not loaded yet: looking at it ends a check."""

    class Looked(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        raise self.Looked


def check_plugin(group: str, name: str, options: Mapping[str, Any]) -> None:
    """Raise SpecDecError for an unknown plug-in and for what it has against its options whatever the model is."""
    if group == "verifier":
        registry.verifier(name, options)
    elif name.partition("=")[0] in OTHERS:
        check_other(name, options)
    else:
        check_method(name)
        parts = registry.parse(name)
        checks = [(*parts[0], options)]
        if len(parts) > 1:
            checks = [("hybrid", name, options), *((part, source, options.get(part, {})) for part, source in parts)]
        for part, source, own in checks:
            with contextlib.suppress(_Unloaded.Looked):
                registry.lookup("drafters", part).load(_Unloaded(), source, **own)
