"""The plan of a benchmark: settings of a YAML file or of the command line become checked cells. No model is loaded.

The keys are the settings of a cell (``specdec.bench.cell.Cell``). A list is an axis, and the cells are the product of
all axes. ``drafter`` and ``verifier`` may be mappings, ``{NAME: {option: value or list}}``; the drafter ``NAME@K``
drafts K tokens per step. Further keys:

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

import yaml
from pydantic import Field

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings, short_repr
from specdec.bench.cell import EXTERNAL_METHODS, GROUPS, Cell, axes, check_external
from specdec.speculation import registry
from specdec.speculation.drafter_spec import DrafterSpec

MAX_CELLS = 10_000
LIST_SETTING = "against"  # the setting whose value is a list, so a list is not an axis
# Settings of a method. Cells that agree in all other settings are a group, which is measured side by side.
METHOD = ("drafter", "drafter_options", "verifier", "verifier_options", "num_speculative_tokens", "against")
SETTINGS = [name for name in Cell.model_fields if not name.startswith(GROUPS)]
KEYS = ("name", "description", "exclude", "resources", *SETTINGS, *GROUPS)


class Resources(Settings):
    """The CPUs, GPUs and GB of memory that one task (a group of cells) reserves on a machine of a Ray cluster."""

    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float = Field(0, ge=0)


@dataclass(frozen=True)
class Plan:
    """A checked benchmark: the cells (measurements of one method on one prompt set), without duplicates.

    name: name of the benchmark, and default name of its folder. description: a line for the report; may be empty.
    resources: what one task on a Ray cluster needs. settings: the plan as a YAML file that gives it again.
    """

    name: str
    description: str
    cells: tuple[Cell, ...]
    resources: Resources = field(default_factory=Resources)
    settings: str = ""


def groups(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Return the cells as groups: the cells of a group differ only in their method, and are measured side by side.

    Groups that load the same model in the same way follow each other, so each model is loaded once.
    """
    by_settings: dict[str, list[Cell]] = {}
    for cell in cells:
        shared = {name: value for name, value in cell.as_dict().items() if name not in METHOD}
        by_settings.setdefault(json.dumps(shared, sort_keys=True), []).append(cell)
    loads = [group[0].loading for group in by_settings.values()]
    return sorted(by_settings.values(), key=lambda group: loads.index(group[0].loading))


def load_plan(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """Read and check the plan of a YAML file, or of settings as they would stand in a file. Loads no model.

    source: path of the file, or {key: value or list of values}; the keys are the settings of ``Cell`` and name,
        description, exclude and resources.
    overrides: texts ``KEY=VALUE,VALUE`` that replace settings of ``source``.
    Raises SpecDecError for a mistake, with the name of the file or the override.
    """
    path, where = (source, f"'{source}': ") if isinstance(source, Path) else (None, "")
    given = (
        {"name": "benchmark", **source} if isinstance(source, Mapping) else inputs.read_yaml(source, "benchmark file ")
    )
    if given is None:
        raise SpecDecError(f"'{path}' is empty; a sweep needs at least one setting, such as 'drafter: m2r2'")
    with _errors_from(where):
        given = _mapping(given, "a benchmark file", KEYS)
        for group in GROUPS:
            given[group] = _plugins(group, given.get(group, getattr(Cell(), group)), {})
    for text in overrides:
        with _errors_from(f"'{text}': "):
            _override(given, text)
    with _errors_from(where):
        cells = planned = _cells(given)
        known = {axis: None for cell in planned for axis in axes(cell.as_dict())}
        # An override may remove what an entry names, also the drafter or the verifier of an option.
        options = tuple(f"{group}." for group in GROUPS) if overrides else ()
        for entry in _as_list(given.get("exclude") or []):
            conditions = {axis: _as_list(value) for axis, value in _mapping(entry, "an entry of exclude").items()}
            odd = next((axis for axis in conditions if axis not in known and not axis.startswith(options)), None)
            if odd is not None or not (overrides or any(_matches(cell, conditions) for cell in planned)):
                what = conditions if odd is None else f"{odd}{did_you_mean(odd, known)}"
                raise SpecDecError(f"an entry of exclude matches no cell: {what}")
            cells = [cell for cell in cells if not _matches(cell, conditions)]
        if not cells:
            raise SpecDecError("the sweep has no cell: exclude drops them all")
        found = {cell.key(): cell for cell in (cell.canonical() for cell in cells)}
        resources = Resources(**_mapping(given.get("resources"), "resources"))
        name, description = _text(given, "name", path and path.stem), _text(given, "description", "")
        text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
        return Plan(name, " ".join(description.split()), tuple(found.values()), resources, text)


@contextlib.contextmanager
def _errors_from(where: str) -> Iterator[None]:
    """Raise a SpecDecError or ValueError of the ``with`` block as a SpecDecError whose text begins with ``where``."""
    try:
        yield
    except (SpecDecError, ValueError) as error:
        raise SpecDecError(f"{where}{error}") from None
    except RecursionError:
        raise SpecDecError(f"{where}it is nested too deeply") from None


def _text(given: Mapping[str, Any], key: str, default: Any) -> str:
    """Return the text ``given[key]``, or ``default``. Raises SpecDecError for a list or a mapping."""
    value = given.get(key, default)
    if isinstance(value, dict | list):
        raise SpecDecError(f"'{key}' must be a text")
    return str(value)


def _plugins(group: str, given: Any, before: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {name: options} for the value ``given`` of the setting ``group`` ("drafter" or "verifier").

    The value is a name, a list of names or a mapping of names to options. Raises SpecDecError for other values.

    before: {name: options} of the setting before an override; names without a mapping keep these options, and get {} if
        they are not there.
    """
    names = [] if isinstance(given, dict) else _as_list(given)
    for name in names:
        if isinstance(name, dict | list | None):
            got = "nothing" if name is None else short_repr(name)
            raise SpecDecError(f"'{group}' takes names, or a mapping of names to options; got {got}")
    named = given if isinstance(given, dict) else {name: before.get(str(name)) for name in names}
    return {str(name): _mapping(options, f"the options of '{name}'") for name, options in named.items()}


def _override(given: dict[str, Any], text: str) -> None:
    """Change the settings ``given`` in place by the override ``text``, ``KEY=VALUE,VALUE``.

    Drafters and verifiers that it selects keep the options that they have in ``given``. Raises SpecDecError or
    ValueError for an unknown key or a wrong value.
    """
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
        for one in [values] if key == LIST_SETTING else values:
            Cell(**{key: one})
    holder, (*parents, last) = given, path
    for parent in parents:
        holder[parent] = _mapping(holder.get(parent), f"'{parent}'")
        holder = holder[parent]
    holder[last] = values[0] if path[0] in ("name", "resources") else values


def _cells(given: Mapping[str, Any]) -> list[Cell]:
    """Return a cell for every combination of settings, also those that ``exclude`` drops later.

    given: setting -> value or list of values; "drafter" and "verifier" -> {name: options}. Raises SpecDecError if there
    is no combination, or too many.
    """
    settings = {
        name: [given[name]] if name == LIST_SETTING and isinstance(given[name], list | tuple) else _as_list(given[name])
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
    """Return {option: value} for each combination of the values of ``options``.

    options: option -> value, list of values, or nested options.
    """
    values = [_combinations(value) if isinstance(value, dict) else _as_list(value) for value in options.values()]
    return [dict(zip(map(str, options), each, strict=True)) for each in product(*values)]


def _method(name: str) -> dict[str, Any]:
    """Return the settings of a cell that the ``name`` of a drafter stands for.

    ``NAME@K`` gives {"drafter": NAME, "num_speculative_tokens": K}, ``NAME`` the first alone.
    """
    drafter, _, depth = name.rpartition("@")
    return (
        {"drafter": drafter, "num_speculative_tokens": int(depth)}
        if drafter and depth.isdecimal()
        else {"drafter": name}
    )


def _mapping(value: Any, what: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    """Return ``value`` as a dict with text keys; None becomes an empty one.

    known: the allowed keys; None: any. Raises SpecDecError, which calls the value ``what``, for other keys and types.
    """
    if not isinstance(value, dict | None):
        raise SpecDecError(f"{what} must be a mapping of keys to values; got {short_repr(value)}")
    checked = {str(key): each for key, each in (value or {}).items()}
    if known is not None and (odd := next((key for key in checked if key not in known), None)) is not None:
        raise SpecDecError(f"unknown key '{odd}' in {what}{did_you_mean(odd, known)}; known: {', '.join(known)}")
    return checked


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(cell: Cell, conditions: Mapping[str, list[Any]]) -> bool:
    point = axes(cell.as_dict())
    return all(key in point and point[key] in values for key, values in conditions.items())


class _Unloaded:
    """Stands for a model in checks of a drafter's options before loading: reading any attribute raises ``Accessed``."""

    class Accessed(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        raise self.Accessed


def _check_plugin(group: str, name: str, options: Mapping[str, Any]) -> None:
    """Raise SpecDecError for an unknown drafter or verifier, and for options that it always refuses.

    group: "drafter" or "verifier". name: its name, for a drafter also ``NAME@K``. options: those it is to be loaded
    with.
    """
    if group == "verifier":
        registry.verifier(name, options)
        return
    name = _method(name)["drafter"]
    kind, known = name.partition("=")[0], ("auto", *registry.names("drafters"), *EXTERNAL_METHODS)
    if kind in EXTERNAL_METHODS:
        check_external(name, options)
        return
    if kind not in known and not ("+" in kind or "/" in kind or Path(kind).is_dir()):
        raise SpecDecError(f"unknown method '{name}'{did_you_mean(kind, known)}; known: {', '.join(sorted(known))}")
    whole = DrafterSpec.parse(name).resolved()
    checks = [(whole, options)]
    if len(whole.parts) > 1:
        checks += [(DrafterSpec((part,)), options.get(part.name, {})) for part in whole.parts]
    for spec, own in checks:
        with contextlib.suppress(_Unloaded.Accessed):
            spec.load(_Unloaded(), own)
