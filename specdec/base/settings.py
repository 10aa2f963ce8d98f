"""Validation of settings and arguments by their annotations, with pydantic. Knows no particular setting.

An error is a SpecDecError ``NAME must be WHAT; got VALUE``, in which WHAT comes from pydantic's message.
"""

from __future__ import annotations

import functools
import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, ParamSpec, TypeVar, Unpack, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, validate_call

from specdec.base.errors import SpecDecError, did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
UNKNOWN, MISSING = "extra_forbidden", "missing"  # types of pydantic's errors
PLAIN_WORDS = {  # messages by type of error that replace pydantic's, which name Python types
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "union_tag_not_found": "must be an object with a 'type'",
    "sequence_str": "must be a list",
    MISSING: "is missing",
}
A_LIST = "an instance of Sequence", "a list"
# Parts of pydantic's messages "Input should be ..." and "List should have ... after validation, not 5".
SUBJECT, COUNTED = re.compile(r"^[A-Z]\w+ should "), re.compile(r" after validation, not (\w+)$")
Place = tuple[str | int, ...]  # keys and indices that lead to a value in the validated one
STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_building = threading.RLock()  # pydantic is not safe to use in two threads while it resolves annotations


def _whole(value: Any) -> Any:
    """Convert an integer, such as NumPy's, to int; return other values, bool included, unchanged."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    except OverflowError:
        raise ValueError("must be a smaller number") from None


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number)]


def explain(errors: Sequence[Any], given: Any) -> tuple[Any, Place, str]:
    """Choose one of pydantic's errors, to be reported to the user; return (error, place, message).

    errors: what ``ValidationError.errors()`` returns, at least one. given: the value that was validated.
    place: the keys and indices in ``given`` that lead to the wrong value. message: such as "must be a valid string".
    The first error is chosen. If its place has a union type, it is the first error there that is no mismatch of types,
    or else the innermost error if only one type of the union has errors there.
    """
    steps = [_steps(given, each["loc"], each["type"]) for each in errors]
    union = next((n for n, step in enumerate(steps[0]) if n != step), len(steps[0]))  # index of a union's type
    same = [n for n, each in enumerate(errors) if each["loc"][:union] == errors[0]["loc"][:union]]
    found = next((n for n in same if not errors[n]["type"].endswith("_type")), None)
    if found is None:
        most = max(len(steps[n]) for n in same)
        inner = [n for n in same if len(steps[n]) == most]
        found = inner[0] if len({errors[n]["loc"][: union + 1] for n in inner}) == 1 else 0
    places = [tuple(each["loc"][step] for step in own) for each, own in zip(errors, steps, strict=True)]
    words = dict.fromkeys(_wording(each) for each, at in zip(errors, places, strict=True) if at == places[found])
    others = [each.removeprefix("must be ") for each in words if each.startswith("must be ")]
    first = _wording(errors[found])
    return errors[found], places[found], "must be " + " or ".join(others) if first.startswith("must be ") else first


def _wording(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return PLAIN_WORDS.get(error["type"]) or COUNTED.sub(r" and has \1", SUBJECT.sub("must ", message)).replace(*A_LIST)


def _steps(given: Any, location: Place, kind: str, begin: int = 0) -> tuple[int, ...]:
    """Return which parts of a pydantic error's location are keys or indices in a value, as ascending indices of parts.

    Other parts name types of a union. If several readings are possible, the one with most keys is returned, preferably
    one that includes the last part.
    given: the validated value. location: the error's "loc". kind: the error's "type". begin: index of the first part of
    ``location`` that belongs to ``given``.
    """
    if begin == len(location):
        return ()
    part, ways = location[begin], [_steps(given, location, kind, begin + 1)]
    last = begin == len(location) - 1
    if isinstance(given, Mapping) and (part in given or (last and kind == MISSING)):
        ways.append((begin, *_steps(given.get(part), location, kind, begin + 1)))
    elif isinstance(given, list | tuple) and isinstance(part, int) and part < len(given):
        ways.append((begin, *_steps(given[part], location, kind, begin + 1)))
    return max(ways, key=lambda way: (len(way), way[-1:]))


def _refusal(place: Place, message: str, value: Any, near: str = "") -> SpecDecError:
    """Return the error for a wrong value of a setting or an argument.

    place: keys and indices that lead to the value, such as ("stop", 2). message: why it is wrong, after the name.
    value: the wrong value. near: text with a suggestion, as ``did_you_mean`` returns it; "": there is none.
    """
    name = ".".join(map(str, place))
    return SpecDecError(f"{name}{' ' if message.startswith('must ') else ': '}{message}{near}; got {short_repr(value)}")


def short_repr(value: Any) -> str:
    """Return ``value`` as text for a message: its repr if that has at most 60 characters, else its type."""
    if value is None or isinstance(value, bool | int | float | str | bytes | list | tuple | dict):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        if len(text) <= 60:
            return text
    return f"a {type(value).__name__}"


def validate(name: str, value: Any, kind: Any) -> Any:
    """Return ``value``, validated and converted by pydantic as the annotated type ``kind``.

    name: the value's name in messages. Raises SpecDecError if the value is not of this type.
    """
    try:
        return TypeAdapter(kind, config=STRICT).validate_python(value)
    except ValidationError as error:
        found, place, message = explain(error.errors(), value)
        raise _refusal((name, *place), message, found["input"]) from None


@functools.cache
def keywords(method: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a method takes by keyword, in order, without ``self`` and ``cls``.

    Those of a ``TypedDict`` that it unpacks (``**options: Unpack[...]``) are included.
    """
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
    """Decorate ``method``, a function or method, so that each call checks the arguments against their annotations.

    A call raises SpecDecError for arguments of a wrong type or value and for unknown keywords, and TypeError for
    missing arguments. The method gets the arguments as pydantic has validated them.
    """
    name, signature = method.__qualname__.removesuffix(".__init__"), inspect.signature(method)
    free = any(p.kind is p.VAR_KEYWORD and "Unpack" not in str(p.annotation) for p in signature.parameters.values())

    @functools.cache  # made at the first call: it takes milliseconds, and annotations may name later classes
    def validator() -> Callable[..., Any]:
        @validate_call(config=STRICT)
        @functools.wraps(method)
        def taken(*args: Any, **given: Any) -> Any:
            return args, given

        return taken

    @functools.wraps(method)
    def call(*args: P.args, **given: P.kwargs) -> R:
        known = keywords(method)
        for keyword in given:
            if keyword not in known and not free:
                hint = did_you_mean(keyword, known)
                raise SpecDecError(f"{name} takes no '{keyword}'{hint}; it takes {', '.join(known)}")
        signature.bind(*args, **given)
        try:
            with _building:
                taken = validator()
            args, given = taken(*args, **given)
        except ValidationError as error:
            every: dict[Any, Any] = dict(enumerate(args)) | dict(given)
            found, (wrong, *rest), message = explain(error.errors(), every)
            name_of_it = list(signature.parameters)[wrong] if isinstance(wrong, int) else wrong
            raise _refusal((name_of_it, *rest), message, found["input"]) from None
        return method(*args, **given)

    return call


T = TypeVar("T")


def checked_class(made: type[T]) -> type[T]:
    """Decorate a dataclass, in place, so that its constructor checks its arguments against their annotated types.

    The constructor then raises SpecDecError for arguments of a wrong type or value, and for unknown keywords.
    """
    made.__init__ = checked(made.__init__)  # type: ignore[method-assign]
    return made


class Settings(BaseModel):
    """Base class of immutable settings: a pydantic model whose fields are the keyword arguments of its constructor.

    The constructor raises SpecDecError for an unknown name, a wrong type or a value out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            found, place, message = explain(error.errors(), values)
            if not place:
                raise SpecDecError(message) from None
            if found["type"] == UNKNOWN:
                known = list(type(self).model_fields)
                hint = did_you_mean(str(place[0]), known)
                raise SpecDecError(f"unknown setting '{place[0]}'{hint}; known: {', '.join(known)}") from None
            choices = found.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
            near = did_you_mean(str(found["input"]), filter(None, choices))
            raise _refusal(place, message, found["input"], near) from None
