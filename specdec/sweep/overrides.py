"""Overrides of a sweep file from the command line: ``max_new_tokens=32,64``, ``drafter.m2r2.siblings=[2,1]``."""

from __future__ import annotations

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.bench.cell import Cell
from specdec.sweep.document import Node, parse
from specdec.sweep.schema import GROUPS, SETTINGS, WHOLE, named


def override(items: dict[str, Node], text: str) -> None:
    """Put ``KEY=VALUE,VALUE`` into the items of a sweep file. Raises SpecDecError for what it does not know."""
    for group in GROUPS:
        if text.startswith(f"{group}."):
            _override_option(items, group, text)
            return
    key, equals, value = text.partition("=")
    head, _, tail = key.partition(".")
    known = (*GROUPS, *SETTINGS, WHOLE, "name")
    if not equals and text in known:
        raise SpecDecError(f"override '{text}' gives no value; write {text}=VALUE,VALUE")
    if not equals or (key not in known and head != "resources"):
        near = did_you_mean(key, known)
        raise SpecDecError(
            f"cannot override with '{text}'{near}; it is SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
        )
    node = _values(value, text)
    if head == "resources":
        given = dict(items["resources"].items("resources")) if "resources" in items else {}
        items["resources"] = node.holding(given | {tail: node.each()[0]})
    elif key in GROUPS:  # a selection: those that the file knows keep their options
        before = named(items[key], key) if key in items else {}
        after = named(node, key)
        items[key] = node.holding({name: before.get(name, given) for name, given in after.items()})
    else:
        items[key] = node.each()[0] if key == "name" else node


def _override_option(items: dict[str, Node], group: str, text: str) -> None:
    names = named(items.get(group) or Node(getattr(Cell(), group), "", 0), group)
    rest = text.removeprefix(f"{group}.")
    name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if name is None:
        given = rest.partition(".")[0]
        raise SpecDecError(
            f"'{text}': the sweep has no {group} '{given}'{did_you_mean(given, names)}; it has {', '.join(names)}"
        )
    option, equals, value = rest.removeprefix(f"{name}.").partition("=")
    if not equals or not option:
        raise SpecDecError(f"cannot override with '{text}'; it is {group}.{name}.OPTION=VALUE,VALUE")
    path = option.split(".")
    node = _values(value, text)
    for key in reversed(path[1:]):
        node = node.holding({key: node})
    names[name] = _merged(names[name], node.holding({path[0]: node}))
    items[group] = node.holding(names)


def _merged(below: Node, above: Node) -> Node:
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    both = {key: _merged(below.value[key], node) for key, node in above.value.items() if key in below.value}
    return below.holding(below.value | above.value | both)


def _values(text: str, override: str) -> Node:
    """``2,3,4`` as a node: a list of YAML values."""
    node = parse(f"[{text}]", f"override '{override}'", first=0)
    if not isinstance(node.value, list) or not node.value:
        raise SpecDecError(f"override '{override}' gives no value")
    return node
