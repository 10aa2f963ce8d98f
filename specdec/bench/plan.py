"""The plan of a sweep: from a YAML file and overrides to checked cells. Nothing is loaded here.

The keys of a file are the settings of a cell (``specdec.bench.cell.Cell``). A list is an axis, and the cells are the
product of all axes. ``drafter`` and ``verifier`` may be mappings, ``{NAME: {option: value or list}}``. Further keys:

    name, description    of the sweep
    exclude: [{A: value or list, ...}, ...]   drops the cells that match all conditions of an entry
    resources: {cpus, gpus, memory_gb, workers}   of one task on a Ray cluster

The axis of an option is called ``drafter.NAME.OPTION`` in ``exclude`` and overrides.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings, short_repr
from specdec.bench.cell import EXTERNAL_METHODS, Cell, check_external, check_method
from specdec.speculation import registry

MAX_CELLS = 10_000
GROUPS = ("drafter", "verifier")  # settings whose values have options
WHOLE = "against"  # a setting whose value is a list
# Settings of a method. Cells that agree in all others are a group, which is measured side by side.
METHOD = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")
SETTINGS = [name for name in Cell.model_fields if not name.startswith(GROUPS)] + [*GROUPS]
KEYS = ("name", "description", "exclude", "resources", *SETTINGS)


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

    keys: tuple[str, ...]
    values: list[Any]

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether a cell with the drafter and the verifier of ``point`` has it."""
        return len(self.keys) == 1 or self.keys[1] == point[self.keys[0]]


def load_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a file with ``overrides`` (``KEY=VALUE,VALUE``) on top. Raises SpecDecError, which names either."""
    given = inputs.read_yaml(path, "benchmark file ")
    if given is None:
        raise SpecDecError(f"'{path}' is empty; a sweep needs at least one setting, such as 'drafter: m2r2'")
    with _told(f"'{path}'"):
        sweep = Sweep(given, path.stem)
    for text in overrides:
        with _told(f"override '{text}'"):
            sweep.override(text)
    with _told(f"'{path}'"):
        return sweep.plan()


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Let an error say where its cause is."""
    try:
        yield
    except (SpecDecError, ValueError) as error:
        raise SpecDecError(f"{where}: {error}") from None


class Sweep:
    """The axes of a file, and the cells that they span. Raises SpecDecError for a mistake.

    name: the name of the sweep if the file gives none.
    """

    def __init__(self, given: Any, name: str) -> None:
        items = _mapping(given, "a benchmark file", KEYS)
        self.name, self.description = items.get("name", name), items.get("description", "")
        self.resources = _mapping(items.get("resources"), "resources")
        self.axes = dict[str, Axis]()
        for setting in SETTINGS:
            if setting in items or setting in GROUPS:
                self._add((setting,), items.get(setting, getattr(Cell(), setting)))
        self.excludes = [
            {axis: _as_list(value) for axis, value in _mapping(entry, "an entry of exclude").items()}
            for entry in _as_list(items.get("exclude", []))
        ]
        points = list(self._points(excluded=True))
        for conditions in self.excludes:  # only of the file: an override may remove what they name
            for axis in conditions:
                if axis not in self.axes:
                    raise SpecDecError(f"exclude: '{axis}' is not an axis of this sweep{did_you_mean(axis, self.axes)}")
            if not any(_matches(point, conditions) for point in points):
                raise SpecDecError(f"an entry of exclude matches no cell: {conditions}")

    def _add(self, keys: tuple[str, ...], given: Any) -> None:
        """Add the axis of a setting or an option. The options of joined drafters are one level further down."""
        name = ".".join(keys)
        if keys[0] in GROUPS and (isinstance(given, dict) or len(keys) == 2):
            options = _mapping(given, f"the options of '{name}'")
            for key, value in options.items():
                self._add((*keys, key), value)
            if len(keys) > 1:
                return
            given = list(options)
        values = [_as_list(given)] if name == WHOLE else _as_list(given)
        if not values:
            raise SpecDecError(f"'{name}' is empty: the sweep would have no cell")
        for one in ({name: value} for value in values if name in SETTINGS):
            Cell().with_settings(**one)
        self.axes[name] = Axis(keys, values)

    def override(self, text: str) -> None:
        """Put ``KEY=VALUE,VALUE`` over the file."""
        key, equals, value = text.partition("=")
        keys = tuple(key.split("."))
        if group := next((group for group in GROUPS if text.startswith(f"{group}.")), None):
            names, rest = self.axes[group].values, text.removeprefix(f"{group}.")
            name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
            if name is None:
                given = rest.partition(".")[0]
                raise SpecDecError(f"the sweep has no {group} '{given}'{did_you_mean(given, names)}")
            option, equals, value = rest.removeprefix(f"{name}.").partition("=")  # names may contain =
            keys = (group, name, *option.split("."))
        elif key not in (known := (*SETTINGS, "name")) and not key.startswith("resources."):
            what = "give SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
            raise SpecDecError(f"there is no such setting{did_you_mean(key, known)}; {what}")
        values = inputs.parse_yaml(f"[{value}]") if equals else None
        if not values:
            raise SpecDecError("it gives no value; write KEY=VALUE,VALUE")
        if key == "name":
            self.name = values[0]
        elif keys[0] == "resources":
            self.resources = self.resources | {".".join(keys[1:]): values[0]}
        else:
            self._add(keys, values)

    # Cells.

    def _points(self, excluded: bool = False) -> Iterator[dict[str, Any]]:
        """Every combination of the axes, as values by axis name; with those that exclude drops, if ``excluded``."""
        count = 0
        for each in product(*(self.axes[group].values for group in GROUPS)):
            point = dict(zip(GROUPS, each, strict=True))
            axes = {n: axis.values for n, axis in self.axes.items() if n not in GROUPS and axis.applies(point)}
            for values in product(*axes.values()):
                point = point | dict(zip(axes, values, strict=True))
                if excluded or not any(_matches(point, conditions) for conditions in self.excludes):
                    if (count := count + 1) > MAX_CELLS:
                        raise SpecDecError(f"the sweep has more than {MAX_CELLS:,} cells; shorten an axis")
                    yield point

    def plan(self) -> Plan:
        """The plan. Raises SpecDecError for options that a plug-in refuses, and for a sweep without a cell."""
        cells = {cell.key(): cell for cell in map(self._cell, list(self._points()))}
        if not cells:
            raise SpecDecError("the sweep has no cell: exclude drops them all")
        name, description = (" ".join(str(text).split()) for text in (self.name, self.description))
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
        for group in GROUPS:
            check_plugin(group, point[group], values[f"{group}_options"])
        return Cell(**values).canonical()


def _mapping(value: Any, what: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """``value`` as a mapping whose keys are all ``known``; None is an empty mapping."""
    if not isinstance(value, dict | None):
        raise SpecDecError(f"{what} must be a mapping of keys to values; got {short_repr(value)}")
    found = {str(key): each for key, each in (value or {}).items()}
    if known is not None and (odd := next((key for key in found if key not in known), None)) is not None:
        raise SpecDecError(f"unknown key '{odd}' in {what}{did_you_mean(odd, known)}; known: {', '.join(known)}")
    return found


def _as_list(value: Any) -> list[Any]:
    """The values of an axis: a list, or a single value."""
    return value if isinstance(value, list) else [value]


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
