"""YAML as plain values with their line numbers, so that every error in a file names its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean, errors_as

MAX_VALUES = 50_000  # of a file; bounds what nested aliases expand to

Keys = tuple[Any, ...]  # the path to a value: keys of mappings and indices of lists


@dataclass
class Document:
    """A parsed file. places: where values stand ("FILE:LINE"), at least for () and for keys of mappings."""

    value: Any = None
    places: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Where the value stands, or the innermost mapping or list around it."""
        return next(self.places[keys[:n]] for n in range(len(keys), -1, -1) if keys[:n] in self.places)

    def move(self, keys: Keys, place: str, deep: bool) -> None:
        """Note a new place for the value at ``keys``, and (``deep``) for everything in it."""
        size = len(keys) if deep else None
        self.places = {old: at for old, at in self.places.items() if old[:size] != keys} | {keys: place}

    def fail(self, keys: Keys, message: str) -> NoReturn:
        raise SpecDecError(f"{self.place(keys)}: {message}")

    def mapping(self, keys: Keys, value: Any, what: str, known: Iterable[str] | None = None) -> dict[str, Any]:
        """``value`` as a mapping whose keys are all ``known``; None is an empty mapping."""
        if not isinstance(value, dict | None):
            self.fail(keys, f"{what} must be a mapping of keys to values; got {shortened(value)}")
        known = list(value or {} if known is None else known)
        for key in value or {}:
            if key not in known:
                near = did_you_mean(key, known)
                self.fail((*keys, key), f"unknown key '{key}' in {what}{near}; known: {', '.join(known)}")
        return value or {}


def as_list(value: Any) -> list[Any]:
    """The values of an axis: a list, or a single value."""
    return value if isinstance(value, list) else [value]


def shortened(value: Any) -> str:
    """``value`` as YAML on one line, shortened."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000)
    text = " ".join(text.replace("\n...", "").split())
    return text if len(text) <= 60 else text[:57] + "..."


def load(path: Path) -> Document:
    """Read a YAML file. Raises SpecDecError with the line of a syntax error or a repeated key."""
    with errors_as(f"cannot read '{path}'", ValueError):
        text = inputs.read_text(path)
    return parse(text, lambda line: f"{path}:{line}")


def parse(text: str, place: Callable[[int], str]) -> Document:
    """Read YAML text. place: names a line, counted from 1."""
    reader = _Reader(text)
    try:
        root = reader.get_single_node()
        reader.place, reader.places = place, {(): place(1)}
        return Document(None if root is None else reader.plain(root), reader.places)
    except (yaml.YAMLError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = place(mark.line + 1 if mark else 1)
        raise SpecDecError(f"{where}: this is not YAML: {' '.join(problem.split())}") from None
    finally:
        reader.dispose()


class _Reader(yaml.SafeLoader):
    """A loader that records the places of values. Unlike YAML 1.1 it reads 1e-5 as a number."""

    place: Callable[[int], str]
    places: dict[Keys, str]

    def plain(self, node: yaml.Node, keys: Keys = (), above: tuple[yaml.Node, ...] = ()) -> Any:
        # A mapping or a list may begin one line after its key; messages name the key's line.
        self.places.setdefault(keys, self.where(node))
        if node in above:
            self.fail(node, "an alias is within what it refers to")
        if len(self.places) > MAX_VALUES:
            self.fail(node, f"more than {MAX_VALUES} values, those of aliases counted; give fewer")
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*keys, n), above) for n, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self.scalar(node)
        out: dict[str, Any] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, "a key must be plain text")
            if key.value in out:
                self.fail(key, f"the key '{key.value}' is here for the second time")
            self.places[*keys, key.value] = self.where(key)
            out[key.value] = self.plain(child, (*keys, key.value), above)
        return out

    def scalar(self, node: yaml.Node) -> str | int | float | None:
        try:
            value = self.construct_object(node)
        except Exception:  # 2026-13-45, !!python, !!bool maybe: constructors raise various types
            value = node  # not an allowed value
        if not isinstance(value, str | int | float | None):
            self.fail(node, f"cannot read {shortened(node.value)} as text or a number; quote it if it is text")
        return value

    def where(self, node: yaml.Node) -> str:
        return self.place(node.start_mark.line + 1)

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        raise SpecDecError(f"{self.where(node)}: {message}")


_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)([eE][-+]?\d+)?$")
_Reader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
