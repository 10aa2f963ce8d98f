"""What a sweep file may say: its keys, and what each of them may be. Knows nothing of how cells are made of it.

The keys are the settings of a cell; names and options of drafters and verifiers are asked of the plug-ins themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from specdec import options as drafter_options
from specdec import registry
from specdec.bench.cell import HF_ARMS, Cell
from specdec.errors import SpecDecError, did_you_mean
from specdec.sweep.document import Node, show

GROUPS = ("drafter", "verifier")  # settings that have options of their own
WHOLE = "against"  # a setting that is a list itself
SETTINGS = tuple(
    f.name for f in dataclasses.fields(Cell) if not f.name.endswith("options") and f.name not in (*GROUPS, WHOLE)
)
KEYS = ("name", "description", "zip", "exclude", "resources", *GROUPS, *SETTINGS, WHOLE)


@dataclass(frozen=True)
class Resources:
    """What one cell needs of a cluster. workers: most cells at once; None: as many as fit."""

    cpus: float = 1
    gpus: float = 0
    memory_gb: float = 0
    workers: int | None = None


@dataclass(frozen=True)
class Axis:
    name: str
    values: list[Node]


def place(node: Node) -> tuple[str, int]:
    return node.source, node.line


def text(node: Node | None, default: str) -> str:
    if node is None:
        return default
    if not isinstance(node.value, str) or not node.value.strip():
        node.fail(f"this must be text; got {show(node.plain())}")
    return " ".join(node.value.split())


def resources(node: Node | None) -> Resources:
    given = {} if node is None else node.known("resources", [f.name for f in dataclasses.fields(Resources)])
    for name, value in given.items():
        plain = value.plain()
        whole = name == "workers"
        good = type(plain) is int if whole else type(plain) in (int, float) and math.isfinite(plain)
        if not good or plain < 0 or (plain == 0 and name in ("workers", "cpus")):
            value.fail(f"{name} must be a {'whole number' if whole else 'number'} above 0; got {show(plain)}")
    return Resources(**{name: value.plain() for name, value in given.items()})


def against(node: Node | None) -> list[str] | None:
    if node is None:
        return None
    names = [value.plain() for value in node.each()]
    try:
        Cell(against=tuple(names))
    except SpecDecError as error:
        node.fail(str(error))
    return names


def named(node: Node, what: str) -> dict[str, Node]:
    """Names with the node of their options, from a name, a list of names, or a mapping from name to options."""
    if isinstance(node.value, dict):
        names = dict(node.value)
    else:
        names = {}
        for value in node.each():
            if not isinstance(value.value, str) or not value.value:
                value.fail(f"'{what}' must be a name, a list of names or a mapping; got {show(value.plain())}")
            if value.value in names:
                value.fail(f"'{what}' has the value {value.value} twice")
            names[value.value] = Node(None, *place(value))
    if not names:
        node.fail(f"'{what}' is empty: the sweep would have no cell")
    return names


def options(prefix: str, node: Node) -> Iterator[Axis]:
    """The axes of a drafter's or a verifier's options; those of joined drafters are a level down."""
    for name, value in node.items(f"the options of '{prefix}'"):
        if isinstance(value.value, dict):
            yield from options(f"{prefix}.{name}", value)
            continue
        values = value.each()
        if not values:
            value.fail(f"'{name}' is an empty list: the sweep would have no cell")
        yield Axis(f"{prefix}.{name}", values)


class _Unloaded:
    """Stands in for a model that is not loaded yet: looking at it ends a check."""

    class Looked(Exception):
        pass

    def __getattr__(self, name: str) -> Any:
        raise self.Looked


def check_name(group: str, name: str) -> None:
    if group == "verifier":
        registry.lookup("verifiers", name)
        return
    arm, _, source = name.partition("=")
    if arm in HF_ARMS:
        if (arm == "hf-draft-model") != bool(source):
            raise SpecDecError(
                f"'{arm}' is not loaded from anything; leave '={source}' out"
                if source
                else "'hf-draft-model' needs a model; name it: hf-draft-model=MODEL"
            )
        return
    try:
        registry.parse(name)
    except SpecDecError:
        near = did_you_mean(name, (*registry.names("drafters"), *HF_ARMS))
        if any(f"'{arm}'" in near for arm in HF_ARMS):
            raise SpecDecError(f"unknown drafter '{name}'{near}") from None
        raise


def check_options(group: str, name: str, given: dict[str, Any]) -> None:
    """Raise SpecDecError for what a plug-in has against its options whatever the model is."""
    if group == "verifier":
        try:
            registry.lookup("verifiers", name)(**given)
        except TypeError as error:
            raise SpecDecError(f"verifier '{name}' does not take these options: {error}") from None
        return
    arm = name.partition("=")[0]
    if arm in HF_ARMS:
        drafter_options.check(arm, given, ("exit_layer",) if arm == "hf-early-exit" else ())
        return
    parts = registry.parse(name)
    if len(parts) > 1:
        names = [part for part, _ in parts]
        for key, own in given.items():
            if key not in names or not isinstance(own, dict):
                raise SpecDecError(
                    f"'{name}' has no option '{key}'{did_you_mean(key, names)}; options of joined drafters are "
                    f"mappings under their names: {', '.join(names)}"
                )
    for part, source in parts:
        own = given if len(parts) == 1 else given.get(part, {})
        with contextlib.suppress(_Unloaded.Looked):
            registry.lookup("drafters", part).load(_Unloaded(), source, **own)
