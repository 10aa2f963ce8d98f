"""Overrides of a sweep file from the command line: ``max_new_tokens=32,64``, ``drafter.m2r2.siblings=[2,1]``."""

from __future__ import annotations

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.sweep.document import Document, parse
from specdec.sweep.schema import GROUPS, SETTINGS, WHOLE, by_name


def override(document: Document, text: str) -> None:
    """Put ``KEY=VALUE,VALUE`` into a sweep file. Raises SpecDecError for what it does not know."""
    group = next((group for group in GROUPS if text.startswith(f"{group}.")), None)
    if group:
        keys, value = _option(document, group, text)
    else:
        key, equals, value = text.partition("=")
        keys = tuple(key.split("."))
        known = (*GROUPS, *SETTINGS, WHOLE, "name")
        if not equals and key in known:
            raise SpecDecError(f"override '{text}' gives no value; write {text}=VALUE,VALUE")
        if not equals or (key not in known and keys[0] != "resources"):
            near = did_you_mean(key, known)
            raise SpecDecError(
                f"cannot override with '{text}'{near}; it is SETTING=VALUE,VALUE or drafter.NAME.OPTION=VALUE"
            )
    place = f"override '{text}'"
    values = parse(f"[{value}]", lambda line: place).value
    if not isinstance(values, list) or not values:
        raise SpecDecError(f"{place} gives no value")
    if keys[0] in GROUPS and len(keys) == 1:  # a selection: those that the file knows keep their options
        before = by_name(document, keys[0])
        document.value[keys[0]] = {str(name): before.get(str(name)) for name in values}
        document.places |= {(*keys, name): place for name in document.value[keys[0]] if name not in before}
    else:
        document.put(keys, values[0] if keys[0] in ("name", "resources") else values, place)


def _option(document: Document, group: str, text: str) -> tuple[tuple[str, ...], str]:
    """The keys and the value of ``GROUP.NAME.OPTION=VALUE``; names may have dots in them."""
    names, rest = by_name(document, group), text.removeprefix(f"{group}.")
    name = max((name for name in names if rest.startswith(f"{name}.")), key=len, default=None)
    if name is None:
        given = rest.partition(".")[0]
        raise SpecDecError(
            f"'{text}': the sweep has no {group} '{given}'{did_you_mean(given, names)}; it has {', '.join(names)}"
        )
    option, equals, value = rest.removeprefix(f"{name}.").partition("=")
    if not equals or not option:
        raise SpecDecError(f"cannot override with '{text}'; it is {group}.{name}.OPTION=VALUE,VALUE")
    return (group, name, *option.split(".")), value
