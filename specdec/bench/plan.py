"""The plan of a benchmark: from the settings of a YAML file and of the command line to checked cells. Loads nothing.

The keys are the settings of a cell (``specdec.bench.cell.Cell``). A list is an axis, and the cells are the product of
all axes. ``drafter`` and ``verifier`` may be mappings, ``{NAME: {option: value or list}}``; the drafter ``NAME@K``
drafts K tokens a step. Further keys:

    name, description    of the sweep
    exclude: [{A: value or list, ...}, ...]   drops the cells that match all conditions of an entry
    resources: {cpus, gpus, memory_gb}   of one task on a Ray cluster

An option is called ``drafter.NAME.OPTION`` in ``exclude`` and overrides.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings, short_repr
from specdec.bench.cell import EXTERNAL_METHODS, GROUPS, Cell, axes, check_external
from specdec.speculation import registry

MAX_CELLS = 10_000
WHOLE = "against"  # a setting whose value is a list
# Settings of a method. Cells that agree in all others are a group, which is measured side by side.
METHOD = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")
SETTINGS = [name for name in Cell.model_fields if not name.startswith(GROUPS)]
KEYS = ("name", "description", "exclude", "resources", *SETTINGS, *GROUPS)


class Resources(Settings):
    """What one task needs on a cluster."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float = Field(0, ge=0)


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


def load_plan(path: Path | None, overrides: Sequence[str] = (), settings: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a file, with ``settings`` and then ``overrides`` (``KEY=VALUE,VALUE``) in place of what it says.

    Raises SpecDecError for a mistake, with the name of the file or the override.
    """
    where = "" if path is None else f"'{path}': "
    given = {"name": "benchmark"} if path is None else inputs.read_yaml(path, "benchmark file ")
    if given is None:
        raise SpecDecError(f"'{path}' is empty; a sweep needs at least one setting, such as 'drafter: m2r2'")
    with _told(where):
        given = _mapping(given, "a benchmark file", KEYS)
        for group in GROUPS:
            given[group] = _plugins(group, given.get(group, getattr(Cell(), group)), {})
        for name, value in (settings or {}).items():
            given[name] = _plugins(name, value, given[name]) if name in GROUPS else value
    for text in overrides:
        with _told(f"'{text}': "):
            _override(given, text)
    with _told(where):
        cells = planned = _cells(given)
        known = {axis: None for cell in planned for axis in axes(cell.as_dict())}
        # A change may remove what an entry names, also the drafter or the verifier of an option.
        changed = bool(overrides or settings)
        options = tuple(f"{group}." for group in GROUPS) if changed else ()
        for entry in _as_list(given.get("exclude") or []):
            conditions = {axis: _as_list(value) for axis, value in _mapping(entry, "an entry of exclude").items()}
            odd = next((axis for axis in conditions if axis not in known and not axis.startswith(options)), None)
            if odd is not None or not (changed or any(_matches(cell, conditions) for cell in planned)):
                what = conditions if odd is None else f"{odd}{did_you_mean(odd, known)}"
                raise SpecDecError(f"an entry of exclude matches no cell: {what}")
            cells = [cell for cell in cells if not _matches(cell, conditions)]
        if not cells:
            raise SpecDecError("the sweep has no cell: exclude drops them all")
        found = {cell.key(): cell for cell in (cell.canonical() for cell in cells)}
        resources = Resources(**_mapping(given.get("resources"), "resources"))
        name = str(given.get("name", path and path.stem))
        return Plan(name, " ".join(str(given.get("description", "")).split()), tuple(found.values()), resources)


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Let an error say where its cause is."""
    try:
        yield
    except (SpecDecError, ValueError) as error:
        raise SpecDecError(f"{where}{error}") from None


def _plugins(group: str, given: Any, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each drafter or verifier that a setting names. A name alone keeps its options of ``before``."""
    names = [] if isinstance(given, dict) else _as_list(given)
    for name in names:
        if isinstance(name, dict | list | None):
            got = "nothing" if name is None else short_repr(name)
            raise SpecDecError(f"'{group}' takes names, or a mapping of names to options; got {got}")
    named = given if isinstance(given, dict) else {name: before.get(str(name)) for name in names}
    return {str(name): _mapping(options, f"the options of '{name}'") for name, options in named.items()}


def _override(given: dict[str, Any], text: str) -> None:
    """Put ``KEY=VALUE,VALUE`` into the settings. A selection of drafters or verifiers keeps their options."""
    key, equals, value = text.partition("=")
    path = key.split(".")
    if group := next((group for group in GROUPS if text.startswith(f"{group}.")), None):
        names, rest = given[group], text.removeprefix(f"{group}.")
        name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
        if name is None:
            wanted = rest.partition(".")[0]
            raise SpecDecError(f"the sweep has no {group} '{wanted}'{did_you_mean(wanted, names)}")
        option, equals, value = rest.removeprefix(f"{name}.").partition("=")  # names may contain =
        path = [group, name, *option.split(".")]
    elif key not in (known := (*SETTINGS, *GROUPS, "name")) and path[0] != "resources":
        what = "give SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
        raise SpecDecError(f"there is no such setting{did_you_mean(key, known)}; {what}")
    values = inputs.parse_yaml(f"[{value}]") if equals else None
    if not values:
        raise SpecDecError("it gives no value; write KEY=VALUE,VALUE")
    if key in GROUPS:
        given[key] = _plugins(key, values, given[key])
        return
    if key in SETTINGS:
        for one in [values] if key == WHOLE else values:
            Cell(**{key: one})
    holder, (*parents, last) = given, path
    for parent in parents:
        holder[parent] = _mapping(holder.get(parent), f"'{parent}'")
        holder = holder[parent]
    holder[last] = values[0] if path[0] in ("name", "resources") else values


def _cells(given: Mapping[str, Any]) -> list[Cell]:
    """Every combination of the settings. Raises SpecDecError for options that a plug-in refuses."""
    settings = {
        name: [given[name]] if name == WHOLE and isinstance(given[name], list | tuple) else _as_list(given[name])
        for name in SETTINGS
        if name in given
    }
    plugins = [
        [(name, options) for name, own in given[group].items() for options in _combinations(own)] for group in GROUPS
    ]
    count = math.prod(map(len, (*plugins, *settings.values())))
    if not count:
        raise SpecDecError("a setting is empty: the sweep would have no cell")
    if count > MAX_CELLS:
        raise SpecDecError(f"the sweep has more than {MAX_CELLS:,} cells; shorten an axis")
    for group, found in zip(GROUPS, plugins, strict=True):
        for name, options in found:
            _check_plugin(group, name, options)
    cells = []
    for (drafter, drafter_options), (verifier, verifier_options), *values in product(*plugins, *settings.values()):
        cell = Cell(
            verifier=verifier,
            verifier_options=verifier_options,
            drafter_options=drafter_options,
            **dict(zip(settings, values, strict=True)) | _method(drafter),
        )
        cells.append(cell)
    return cells


def _combinations(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values of options. The options of joined drafters are mappings themselves."""
    values = [_combinations(value) if isinstance(value, dict) else _as_list(value) for value in options.values()]
    return [dict(zip(map(str, options), each, strict=True)) for each in product(*values)]


def _method(name: str) -> dict[str, Any]:
    """The settings that ``NAME`` or ``NAME@K`` gives."""
    drafter, _, depth = name.rpartition("@")
    return (
        {"drafter": drafter, "num_speculative_tokens": int(depth)}
        if drafter and depth.isdecimal()
        else {"drafter": name}
    )


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


def _matches(cell: Cell, conditions: Mapping[str, list[Any]]) -> bool:
    point = axes(cell.as_dict())
    return all(key in point and point[key] in values for key, values in conditions.items())


class _Unloaded:
    """Replaces the model in a check before loading; reading any attribute ends the check."""

    class Accessed(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        raise self.Accessed


def _check_plugin(group: str, name: str, options: Mapping[str, Any]) -> None:
    """Raise SpecDecError for an unknown plug-in and for options that it refuses with any model."""
    if group == "verifier":
        registry.verifier(name, options)
        return
    name = _method(name)["drafter"]
    kind, known = name.partition("=")[0], (*registry.names("drafters"), *EXTERNAL_METHODS)
    if kind in EXTERNAL_METHODS:
        check_external(name, options)
        return
    if kind not in known and not ("+" in kind or "/" in kind or Path(kind).is_dir()):
        raise SpecDecError(f"unknown method '{name}'{did_you_mean(kind, known)}; known: {', '.join(sorted(known))}")
    whole = registry.Choice.of(name)
    checks = [(whole, options)]
    if len(whole.parts) > 1:
        checks += [(registry.Choice(part[0], [part]), options.get(part[0], {})) for part in whole.parts]
    for choice, own in checks:
        with contextlib.suppress(_Unloaded.Accessed):
            choice.load(_Unloaded(), own)
