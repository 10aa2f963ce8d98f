"""Several drafters in turn: the first that proposes something drafts the step, as in ``prompt-lookup+m2r2``.

One that is cheap and right now and then comes first, one that always has an answer last. All of them see what became
of every step, also of those that another one drafted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.runtimes.cache import KVCache
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.draft import Draft, Drafter, State


class HybridDrafter(Drafter):
    """Asks ``members`` in order and takes the first draft that has a token for every row, else the last one's.

    A step has one drafter for the whole batch: rows do not mix them.
    """

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = "drafters joined by '+', such as prompt-lookup+m2r2: the first that finds something drafts"

    def __init__(self, members: Sequence[Drafter]) -> None:
        self.members = list(members)

    @property
    def label(self) -> str:
        return "+".join(member.name for member in self.members)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **given: Any) -> HybridDrafter:
        """Load the drafters that ``source`` joins; the options of each are given under its name.

        A drafter may have other defaults where another one comes after it: ``before_others``, of its class.
        """
        parts = registry.parse(source) if source else []
        if len(parts) < 2:
            raise SpecDecError("drafter 'hybrid' needs at least two drafters; join them: prompt-lookup+m2r2")
        options.check(cls.name, given, [name for name, _ in parts])
        for name, own in given.items():
            if not isinstance(own, Mapping):
                raise SpecDecError(f"drafter 'hybrid' takes the options of '{name}' as a mapping; got {own!r}")
        members = []
        for place, (name, own_source) in enumerate(parts, start=1):
            found = registry.lookup("drafters", name)
            usual = found.before_others if place < len(parts) else {}
            members.append(found.load(target, own_source, **{**usual, **given.get(name, {})}))
        return cls(members)

    def bind(self, target: Target) -> None:
        for member in self.members:
            member.bind(target)
        self.taps = tuple(sorted({layer for member in self.members for layer in member.taps}))
        self.path = "+".join(f"{member.name} {member.path}" for member in self.members)

    def start(self, batch: int) -> None:
        for member in self.members:
            member.start(batch)

    def propose(self, state: State, limit: int) -> Draft:
        *first, last = self.members
        for member in first:
            draft = member.propose(state, limit)
            if draft.parents and all(max(row) >= 0 for row in draft.lists()):
                break
            _give_back(draft, state.cache)
        else:
            draft = last.propose(state, limit)
        if draft.exit_layer > min(self.taps, default=draft.exit_layer):
            _give_back(draft, state.cache)  # another member observes layers that scoring would not run
        return draft

    def observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        for member in self.members:
            member.observe(paths, taps)

    def select(self, rows: list[int]) -> None:
        for member in self.members:
            member.select(rows)


def _give_back(draft: Draft, cache: KVCache) -> None:
    """Take the states out of ``draft``, and what belongs to them out of the cache: scoring starts at layer 0."""
    if draft.states is not None:
        cache.trim(draft.states.shape[1], 0, draft.exit_layer)
        draft.states, draft.exit_layer = None, 0
