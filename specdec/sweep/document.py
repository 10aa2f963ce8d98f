"""YAML that remembers its lines, so that every error in a file names its line. Knows no sweeps."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import yaml

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean

MOST_NODES = 50_000  # values of a file; aliases of aliases of aliases end here
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?|\d*\.\d+)([eE][-+]?\d+)?")  # YAML 1.1 takes 1e-5 for a string, people do not


@dataclass(frozen=True)
class Node:
    """A value and its place. ``value`` is a scalar, a list of nodes, or a dict of nodes by key.

    source, line: the file's name and the line, from 1; line 0 is none (an override).
    """

    value: Any
    source: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source

    def fail(self, message: str) -> NoReturn:
        raise SpecDecError(f"{self.where}: {message}")

    def holding(self, value: Any) -> Node:
        """A node of the same place with another value."""
        return replace(self, value=value)

    def items(self, what: str) -> list[tuple[str, Node]]:
        """Its keys and values, if it is a mapping (or nothing at all). Raises SpecDecError otherwise."""
        if self.value is None:
            return []
        if not isinstance(self.value, dict):
            self.fail(f"{what} must be a mapping of keys to values; got {show(self.plain())}")
        return list(self.value.items())

    def known(self, what: str, keys: Iterable[str]) -> dict[str, Node]:
        """Its items, if all keys are among ``keys``. Raises SpecDecError otherwise."""
        keys = list(keys)
        for key, node in self.items(what):
            if key not in keys:
                node.fail(f"unknown key '{key}' in {what}{did_you_mean(key, keys)}; known: {', '.join(keys)}")
        return dict(self.items(what))

    def each(self) -> list[Node]:
        """Its elements if it is a list, else itself alone: what a list is an axis of."""
        return self.value if isinstance(self.value, list) else [self]

    def plain(self) -> Any:
        """The value without its marks."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value


def show(value: Any) -> str:
    """``value`` as YAML on one line, shortened."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000)
    text = " ".join(text.replace("\n...", "").split())
    return text if len(text) <= 60 else text[:57] + "..."


def load(path: Path) -> Node:
    """The YAML file as a node. Raises SpecDecError with the line for what is not YAML or has a key twice."""
    try:
        with path.open("rb") as file:
            text = inputs.whole(file, inputs.DOCUMENT).decode("utf-8-sig")
    except FileNotFoundError:
        raise SpecDecError(f"there is no file '{path}'") from None
    except (OSError, ValueError) as error:
        raise SpecDecError(f"cannot read '{path}': {error}") from None
    return parse(text, str(path))


def parse(text: str, source: str, first: int = 1) -> Node:
    """``text`` as a node; ``source`` is the name that complaints give it, ``first`` the number of its first line."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Node(None, source, 1)
        return _Reader(loader, source, first).read(root, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise SpecDecError(f"{source}:{line}: this is not YAML: {' '.join((error.problem or '').split())}") from None
    except yaml.YAMLError as error:
        raise SpecDecError(f"{source}: this is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecDecError(f"{source}: values are nested too deeply") from None
    finally:
        loader.dispose()


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, source: str, first: int) -> None:
        self.loader, self.source, self.first, self.count = loader, source, first, 0

    def read(self, node: yaml.Node, above: tuple[int, ...]) -> Node:
        self.count += 1
        if id(node) in above:
            self.fail(node, "an alias is within what it refers to")
        if self.count > MOST_NODES:
            self.fail(node, f"more than {MOST_NODES} values, those of aliases counted; give fewer")
        above = (*above, id(node))
        value: Any
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, above)
        elif isinstance(node, yaml.SequenceNode):
            value = [self.read(child, above) for child in node.value]
        else:
            value = self._scalar(node)
        return Node(value, self.source, self.line(node))

    def line(self, node: yaml.Node) -> int:
        return int(node.start_mark.line) + self.first

    def fail(self, node: yaml.Node, message: str) -> NoReturn:
        Node(None, self.source, self.line(node)).fail(message)

    def _mapping(self, node: yaml.MappingNode, above: tuple[int, ...]) -> dict[str, Node]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, "a key must be plain text")
            if key.value in seen:
                self.fail(key, f"the key '{key.value}' is here for the second time")
            seen.add(key.value)
        self.loader.flatten_mapping(node)  # "<<"
        # A value's complaints give its key's line: a mapping or a list may begin a line later.
        return {key.value: replace(self.read(child, above), line=self.line(key)) for key, child in node.value}

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            value = self.loader.construct_object(node)
        except Exception:  # a date like 2026-13-45, a !!python tag, !!bool maybe: constructors raise what they like
            value = yaml  # not a value of a file
        if isinstance(value, str) and not node.style and _FLOAT.fullmatch(value):  # type: ignore[attr-defined]
            return float(value.replace("_", ""))
        if not isinstance(value, str | int | float | None):
            self.fail(node, f"cannot read {show(node.value)} as text or a number; quote it if it is text")
        return value
