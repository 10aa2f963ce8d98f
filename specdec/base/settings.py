"""Validation by annotations, with pydantic. An error is ``NAME must be WHAT; got VALUE``.

WHAT comes from the annotation, or from the title of its ``Field``. Knows no particular setting.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, validate_call
from pydantic.fields import FieldInfo

from specdec.base.errors import SpecDecError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:
    """Convert NumPy's integers; True and False are none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    except OverflowError:
        raise ValueError("too large") from None


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]


def expected(kind: Any) -> str:
    """What a value of this type must be, such as "a whole number >= 1"."""
    bounds = dict[str, float]()
    if isinstance(kind, FieldInfo) or get_origin(kind) is Annotated:
        kind, *marks = (kind.annotation, kind) if isinstance(kind, FieldInfo) else get_args(kind)
        for mark in marks:
            if isinstance(mark, FieldInfo):
                if mark.title:
                    return mark.title
                for bound in mark.metadata:
                    bounds |= {name: getattr(bound, name) for name in ("ge", "gt", "le") if hasattr(bound, name)}
    if kind is int or kind is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le")
        span = "" if low is None else f" {'>=' if 'ge' in bounds else '>'} {low}"
        if high is not None:
            span = f" in {low} .. {high}" if kind is int else f" in {'[' if 'ge' in bounds else '('}{low}, {high}]"
        return ("a whole number" if kind is int else "a number") + span
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(expected, args))
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, args[:-1])), repr(args[-1]))))
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping by name" if args[0] is str else "a mapping"
    if origin is not None and issubclass(origin, Sequence | set | frozenset):
        each = expected(args[0])
        return "a list of " + ("texts" if each == "text" else re.sub(r"^an? (\w+ number|number)", r"\1s", each))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind)}"
    words = {bool: "True or False", str: "text", type(None): "None", Callable: "callable"}
    name = getattr(kind, "__name__", str(kind))
    name = "path" if name in ("Path", "PathLike") else f"torch.{name}" if kind.__module__ == "torch" else name
    return words.get(origin or kind) or f"a{'n' if name[0] in 'AEIOU' else ''} {name}"


def short_repr(value: Any) -> str:
    """``value`` for a message: its repr if that is short, else its type."""
    if value is None or isinstance(value, bool | int | float | str | bytes | list | tuple | dict):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        if len(text) <= 60:
            return text
    return f"a {type(value).__name__}"


def validate(name: str, value: Any, kind: Any) -> Any:
    """``value``, validated. Raises SpecDecError if it is not of this ``kind``, an annotated type."""
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError:
        raise SpecDecError(f"{name} must be {expected(kind)}; got {short_repr(value)}") from None


@functools.cache
def keywords(method: Callable[..., Any]) -> list[str]:
    """The names of a method's keyword arguments, also those of a ``TypedDict`` that it unpacks."""
    names = list[str]()
    for p in inspect.signature(method).parameters.values():
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in ("self", "cls"):
            names.append(p.name)
        elif p.kind is p.VAR_KEYWORD and get_origin(kind := _hints(method).get(p.name)) is Unpack:
            names += get_args(kind)[0].__annotations__
    return names


@functools.cache
def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(method, include_extras=True)


def checked(method: Callable[P, R]) -> Callable[P, R]:
    """Make a method raise SpecDecError for arguments of a wrong type or value and for unknown keywords."""
    name, signature = method.__qualname__.removesuffix(".__init__"), inspect.signature(method)
    free = any(p.kind is p.VAR_KEYWORD and "Unpack" not in str(p.annotation) for p in signature.parameters.values())

    @validate_call(config=STRICT | ConfigDict(defer_build=True))
    @functools.wraps(method)
    def taken(*args: Any, **given: Any) -> Any:
        return args, given

    @functools.wraps(method)
    def call(*args: P.args, **given: P.kwargs) -> R:
        known = keywords(method)
        for keyword in given:
            if keyword not in known and not free:
                hint = did_you_mean(keyword, known)
                raise SpecDecError(f"{name} takes no '{keyword}'{hint}; it takes {', '.join(known)}")
        bound = signature.bind(*args, **given).arguments
        try:
            args, given = taken(*args, **given)
        except ValidationError as error:
            place = error.errors()[0]["loc"][0]
            wrong = list(bound)[place] if isinstance(place, int) else str(place)
            kinds = _hints(method)
            for kind in list(kinds.values()):
                if get_origin(kind) is Unpack:
                    kinds = kinds | get_type_hints(get_args(kind)[0], include_extras=True)
            value = bound[wrong] if wrong in bound else given[wrong]
            raise SpecDecError(f"{wrong} must be {expected(kinds[wrong])}; got {short_repr(value)}") from None
        return method(*args, **given)

    return call


T = TypeVar("T")


def checked_class(made: type[T]) -> type[T]:
    """``checked`` for the fields of a dataclass."""
    made.__init__ = checked(made.__init__)  # type: ignore[method-assign]
    return made


class Settings(BaseModel):
    """Immutable settings. Raises SpecDecError for an unknown name, a wrong type or a value out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecDecError(self._sentence(error.errors()[0], values)) from None

    @classmethod
    def _sentence(cls, error: Any, values: dict[str, Any]) -> str:
        if not error["loc"]:
            return str(error["msg"]).removeprefix("Value error, ")
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            known = list(cls.model_fields)
            return f"unknown setting '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
        choices = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
        near = did_you_mean(str(error["input"]), filter(None, choices))
        return f"{name} must be {expected(cls.model_fields[name])}{near}; got {short_repr(values[name])}"
