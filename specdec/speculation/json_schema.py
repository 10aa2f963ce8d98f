"""Whether a JSON schema has a finite value: one that requires itself has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def can_end(schema: dict[str, Any]) -> bool:
    """Whether some value of ``schema`` is finite: False only where each way to meet it requires itself again.

    Computes the least fixed point over local references: a reference is finite if its target is.
    """
    waiting = {ref: target for ref in set(_references(schema)) if (target := _target(schema, ref)) is not None}
    while new := [ref for ref, target in waiting.items() if _ends(target, waiting)]:
        for ref in new:
            del waiting[ref]
    return _ends(schema, waiting)


def _ends(part: Any, waiting: dict[str, Any]) -> bool:
    """Whether ``part`` has a finite value, if the references in ``waiting`` have none."""
    if not isinstance(part, dict):
        return True
    ref = part.get("$ref")
    if isinstance(ref, str) and ref in waiting:
        return False
    for name in ("anyOf", "oneOf"):
        if isinstance(part.get(name), list) and part[name] and not any(_ends(each, waiting) for each in part[name]):
            return False
    needed = list(part["allOf"]) if isinstance(part.get("allOf"), list) else []
    if part.get("type") in ("object", ["object"]):
        properties, required = part.get("properties"), part.get("required")
        if isinstance(properties, dict) and isinstance(required, list):
            needed += [properties[name] for name in required if isinstance(name, str) and name in properties]
    if part.get("type") in ("array", ["array"]) and isinstance(part.get("minItems"), int) and part["minItems"] > 0:
        first = part.get("prefixItems")
        needed += first[: part["minItems"]] if isinstance(first, list) and first else [part.get("items")]
    return all(_ends(each, waiting) for each in needed)


def _references(part: Any) -> Iterator[str]:
    """All references in a schema."""
    parts = [part]
    while parts:
        each = parts.pop()
        if isinstance(each, dict):
            if isinstance(each.get("$ref"), str):
                yield each["$ref"]
            parts += each.values()
        elif isinstance(each, list):
            parts += each


def _target(schema: Any, ref: str) -> Any:
    """What a reference into the schema itself points to; None: nothing there."""
    if not ref.startswith("#"):
        return None
    for step in ref[1:].split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        schema = schema.get(step) if isinstance(schema, dict) else None
    return schema
