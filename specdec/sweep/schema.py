"""The keys of a sweep file and their values. Knows nothing of how cells are made of them.

The keys are the settings of a cell; plug-ins themselves check their names and options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from specdec.base.settings import Settings
from specdec.bench.cell import OTHERS, Cell, check_method, check_other
from specdec.speculation import registry
from specdec.sweep.document import Document, each, show

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


def by_name(document: Document, group: str) -> dict[str, Any]:
    """The options of a group's plug-ins by name. A name and a list of names become a mapping in the document."""
    given = document.value.get(group, getattr(Cell(), group))
    if not isinstance(given, dict):
        names = each(given)
        for number, name in enumerate(names):
            if not isinstance(name, str) or not name:
                document.fail(
                    (group, number), f"'{group}' must be a name, a list of names or a mapping; got {show(name)}"
                )
            if name in names[:number]:
                document.fail((group, number), f"'{group}' has the value {name} twice")
            document.places[group, name] = document.place((group, number))
        given = document.value[group] = dict.fromkeys(names)
    if not given:
        document.fail((group,), f"'{group}' is empty: the sweep would have no cell")
    return given


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
