"""Stores of earlier texts, one for each scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
MOST = 16  # maximum number of scopes; the oldest is dropped for a new one


class Scoped(Generic[T]):
    """One store for each scope, made by ``make`` at first use."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make, self.made = make, dict[str | None, T]()

    def of(self, scope: str | None) -> T:
        if scope not in self.made:
            if len(self.made) == MOST:
                del self.made[next(iter(self.made))]
            self.made[scope] = self.make()
        return self.made[scope]
