"""The keys of a sweep file and their values. Knows nothing of how cells are made of them.

The keys are the settings of a cell; plug-ins themselves check their names and options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from specdec.base import options as drafter_options
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import Settings
from specdec.bench.cell import HF_METHODS, Cell
from specdec.speculation import registry
from specdec.sweep.document import Node, show

GROUPS = ("drafter", "verifier")  # settings that have options of their own
WHOLE = "against"  # a setting that is a list itself
SETTINGS = tuple(name for name in Cell.model_fields if not name.endswith("options") and name not in (*GROUPS, WHOLE))
KEYS = ("name", "description", "zip", "exclude", "resources", *GROUPS, *SETTINGS, WHOLE)


class Resources(Settings):
    """What one cell needs of a cluster. workers: most cells at once; None: as many as fit."""

    cpus: float = Field(1, gt=0, description="a number above 0")
    gpus: float = Field(0, ge=0, description="a number >= 0")
    memory_gb: float = Field(0, ge=0, description="a number >= 0")
    workers: int | None = Field(None, gt=0, description="a whole number above 0")


@dataclass(frozen=True)
class Axis:
    name: str
    values: list[Node]


def text(node: Node | None, default: str) -> str:
    if node is None:
        return default
    if not isinstance(node.value, str) or not node.value.strip():
        node.fail(f"this must be text; got {show(node.plain())}")
    return " ".join(node.value.split())


def resources(node: Node | None) -> Resources:
    given = {} if node is None else node.known("resources", Resources.model_fields)
    for name, value in given.items():
        checked(Resources, name, value)
    return Resources(**{name: value.plain() for name, value in given.items()})


def checked(settings: type[Settings], name: str, node: Node) -> Any:
    """The node's value, if it is good as the setting ``name``. Raises SpecDecError with its line otherwise."""
    try:
        settings(**{name: node.plain()})
    except SpecDecError as error:
        node.fail(str(error))
    return node.plain()


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
            names[value.value] = value.holding(None)
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
    method, _, source = name.partition("=")
    if method in HF_METHODS:
        if (method == "hf-draft-model") != bool(source):
            raise SpecDecError(
                f"'{method}' is not loaded from anything; leave '={source}' out"
                if source
                else "'hf-draft-model' needs a model; name it: hf-draft-model=MODEL"
            )
        return
    try:
        registry.parse(name)
    except SpecDecError:
        near = did_you_mean(name, (*registry.names("drafters"), *HF_METHODS))
        if any(f"'{method}'" in near for method in HF_METHODS):
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
    method = name.partition("=")[0]
    if method in HF_METHODS:
        drafter_options.check(method, given, ("exit_layer",) if method == "hf-early-exit" else ())
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
