"""Options, as users give them in Python, in YAML or on the command line: one clear line for a bad one.

Knows no drafter and no method: each says which options it has and what they may be. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean


class Runtime(StrEnum):
    auto = "auto"
    native = "native"
    graphs = "graphs"
    fused = "fused"
    reference = "reference"


class Weights(StrEnum):
    auto = "auto"
    dense = "dense"
    int8 = "int8"
    int4 = "int4"


class KVCache(StrEnum):
    auto = "auto"
    int8 = "int8"


class Activations(StrEnum):
    auto = "auto"
    int8 = "int8"
    bf16 = "bf16"


MAX_SEED = 2**63 - 1
GREEDY_BELOW = 1e-5  # temperatures below it: logits / T would overflow float32, and the softmax is one-hot anyway

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """What a value may be: ``need`` completes "must be ...", ``holds`` tests it and may raise."""

    need: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.need} or {other.need}", lambda value: self.holds(value) or other.holds(value))


def is_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number (NumPy's included); not True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number; not True and False."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def wholes_from(low: int, high: int | None = None, note: str = "") -> Kind:
    if high is None:
        return Kind(f"a whole number >= {low}{note}", lambda value: is_whole(value) and low <= value)
    return Kind(f"a whole number in [{low}, {high}]{note}", lambda value: is_whole(value) and low <= value <= high)


def numbers(span: str, inside: Callable[[float], bool]) -> Kind:
    return Kind(f"a number {span}", lambda value: is_number(value) and inside(value))


def instance(need: str, *types: type) -> Kind:
    return Kind(need, lambda value: isinstance(value, types))


def lists(of: str, each: Callable[[Any], bool]) -> Kind:
    return Kind(f"a list of {of}", lambda value: isinstance(value, Sequence) and all(map(each, value)))


def one_of(*values: Any) -> Kind:
    return Kind(", ".join(map(repr, values)), lambda value: any(value is v or value == v for v in values))


BOOL = instance("True or False", bool)
TEXT = instance("text", str)
NONE = Kind("None", lambda value: value is None)
SEED = wholes_from(0, MAX_SEED)


def check_values(given: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raise SpecDecError for the first value that is not of its kind, naming it."""
    for name, kind in kinds.items():
        if name in given:
            try:
                good = kind.holds(given[name])
            except Exception:  # whatever was given: comparing it may raise anything
                good = False
            if not good:
                raise SpecDecError(f"{name} must be {kind.need}; got {shown(given[name])}")


def shown(value: Any) -> str:
    """``value`` for a message: as it is written in Python if that is short, else what it is."""
    if value is None or isinstance(value, bool | int | float | str | bytes | list | tuple | dict):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        if len(text) <= 60:
            return text
    return f"a {type(value).__name__}"


def keywords(method: Callable[..., Any], only: bool = False) -> list[str]:
    """The names that may (``only``: must) be given by keyword."""
    kinds = [inspect.Parameter.KEYWORD_ONLY] + [inspect.Parameter.POSITIONAL_OR_KEYWORD] * (not only)
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.kind in kinds and p.name not in ("self", "cls")]


def checked(
    name: str, kinds: Mapping[str, Kind] | None = None, *others: Callable[..., Any]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have the method ``name`` refuse arguments that are not of their kind, and keywords that it does not take.

    others: what the method hands its further keywords to. Raises SpecDecError.
    """

    def wrap(method: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(method)
        known = list(dict.fromkeys([*keywords(method), *(k for other in others for k in keywords(other, only=True))]))

        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for keyword in kwargs:
                if keyword not in known:
                    hint = did_you_mean(keyword, known)
                    raise SpecDecError(f"{name} takes no '{keyword}'{hint}; it takes {', '.join(known)}")
            check_values(signature.bind(*args, **kwargs).arguments, kinds or {})
            return method(*args, **kwargs)

        return call

    return wrap


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
    need = f">= {low}" if high is None else f"in {low} .. {high}"
    check_values({name: value}, {name: Kind(f"a whole number {need}", wholes_from(low, high).holds)})
    return int(value)


def wholes(name: str, values: Any, low: int) -> tuple[int, ...]:
    """``values``, if they are a list of whole numbers >= low. Raises SpecDecError otherwise."""
    check_values({name: values}, {name: lists(f"whole numbers >= {low}", wholes_from(low).holds)})
    return tuple(values)


def probability(name: str, value: Any) -> float:
    """``value``, if it is a number in [0, 1]. Raises SpecDecError otherwise."""
    check_values({name: value}, {name: Kind("a probability in [0, 1]", lambda p: is_number(p) and 0 <= p <= 1)})
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
