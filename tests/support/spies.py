"""Calls that a test wants to know of."""

from collections.abc import Callable
from typing import Any

import pytest


def noted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """Return a list to which each call of ``owner.name`` adds ``note(*arguments)`` before it runs.

    owner: an object, a module or a class, whose methods have ``self`` as first argument.
    """
    found, real = list[Any](), getattr(owner, name)

    def call(*given: Any, **more: Any) -> Any:
        found.append(note(*given))
        return real(*given, **more)

    monkeypatch.setattr(owner, name, call)
    return found
