"""Options of drafters, as users give them in Python, in YAML or on the command line: one clear line for a bad one.

Knows no drafter: each says which options it has and what they may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from specdec import inputs
from specdec.errors import SpecDecError, did_you_mean


def check(drafter: str, given: Iterable[str], known: Sequence[str] = (), source: str | None = None) -> None:
    """Raise SpecDecError for an option that is not ``known``, and for a ``source`` (of a drafter that takes none)."""
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise SpecDecError(f"drafter '{drafter}' has no option '{name}'{did_you_mean(name, known)}; {has}")
    if source is not None:
        raise SpecDecError(f"drafter '{drafter}' is not loaded from anything; leave '={source}' out")


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value``, if it is a whole number in [low, high]. Raises SpecDecError otherwise."""
    if type(value) is not int or value < low or (high is not None and value > high):
        need = f">= {low}" if high is None else f"in {low} .. {high}"
        raise SpecDecError(f"{name} must be a whole number {need}; got {value!r}")
    return int(value)


def wholes(name: str, values: Any, low: int) -> tuple[int, ...]:
    """``values``, if they are a list of whole numbers >= low. Raises SpecDecError otherwise."""
    if not isinstance(values, Sequence) or any(type(v) is not int or v < low for v in values):
        raise SpecDecError(f"{name} must be a list of whole numbers >= {low}; got {values!r}")
    return tuple(values)


def probability(name: str, value: Any) -> float:
    """``value``, if it is a number in [0, 1]. Raises SpecDecError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SpecDecError(f"{name} must be a probability in [0, 1]; got {value!r}")
    return float(value)


def assignments(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """``KEY=VALUE`` texts of a repeatable ``flag`` as a mapping; values are YAML. Raises SpecDecError otherwise."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        try:
            out[key] = inputs.parse_yaml(value)
        except ValueError:
            given = ""
        if not (key and given):
            raise SpecDecError(f"{flag} takes KEY=VALUE, such as exit_layer=8 or skip=[4,5]; got '{pair}'")
    return out


UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(flag: str, text: str) -> float | int:
    """A share ("0.25", "25%") as a float in (0, 1], or a size ("300MB", "2GiB", "1000000") as an int of bytes."""
    number = text.strip().upper()
    unit = next((u for u in sorted(UNITS, key=len, reverse=True) if number.endswith(u)), "")
    try:
        value = float(number.removesuffix(unit).removesuffix("%"))
        share = value / 100 if number.endswith("%") else value
        if unit or (value > 1 and not number.endswith("%")):
            if value * UNITS.get(unit, 1) >= 1:
                return int(value * UNITS.get(unit, 1))
        elif 0 < share <= 1:
            return share
    except (ValueError, OverflowError):
        pass
    raise SpecDecError(f"{flag} takes a share in (0, 1], such as 0.25, or a size, such as 300MB; got '{text}'")
