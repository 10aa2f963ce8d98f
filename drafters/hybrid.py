"""Several drafters together, as in ``ngram+m2r2``: one tree of the candidates of both, where both have probabilities.

Otherwise, as in ``prompt-lookup+m2r2``, each row takes the first proposal: a drafter that is cheap and sometimes right
comes first, one that always proposes last. All of them observe every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecError
from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Target
from specdec.speculation import registry
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.tree_builder import draft_best, merge, worth_scoring

ALONE, BESIDE, LEARNED = range(3)  # what n-grams say where nothing else has a candidate, where it has others; the other


class HybridDrafter(Drafter):
    """Each row takes the draft of the first of ``members`` that has a token for it.

    If there are two and the first ``blends``, it makes one tree of its own candidates and those of the second.
    """

    name: ClassVar[str] = "hybrid"
    summary: ClassVar[str] = (
        "drafters joined by '+': ngram+m2r2 draft one tree; of others, the first that proposes drafts"
    )

    def __init__(self, members: Sequence[Drafter]) -> None:
        self.members = list(members)

    @property
    def label(self) -> str:
        return "+".join(member.name for member in self.members)

    @property
    def sources(self) -> tuple[str, ...]:
        first, *_, last = (member.name for member in self.members)
        return (first, first, last) if self.has_probabilities else (self.label,)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> HybridDrafter:
        """Load the drafters that ``source`` joins; ``kwargs`` holds the options of each, by its name."""
        return cls.join(target, registry.parse(source) if source else [], kwargs)

    @classmethod
    def join(cls, target: Target, parts: Sequence[tuple[str, str | None]], kwargs: Mapping[str, Any]) -> HybridDrafter:
        """The same for drafters by name and source."""
        if len(parts) < 2:
            raise SpecDecError("drafter 'hybrid' needs at least two drafters; join them: ngram+m2r2")
        options.check_names(cls.name, kwargs, [name for name, _ in parts])
        for name, own in kwargs.items():
            if not isinstance(own, Mapping):
                raise SpecDecError(f"drafter 'hybrid' takes the options of '{name}' as a mapping; got {own!r}")
        members = []
        for place, (name, own_source) in enumerate(parts, start=1):
            found = registry.lookup("drafters", name)
            usual = found.before_others if place < len(parts) else {}
            members.append(registry.load_drafter(name, target, own_source, {**usual, **kwargs.get(name, {})}))
        return cls(members)

    def bind(self, target: Target) -> None:
        for member in self.members:
            member.bind(target)
        self.taps = tuple(sorted({layer for member in self.members for layer in member.taps}))
        self.whole_prompts = any(member.whole_prompts for member in self.members)
        self.blends_pair = len(self.members) == 2 and self.members[0].blends
        last = self.members[-1]
        self.has_probabilities = self.blends_pair and last.has_probabilities
        self.level_share = last.level_share
        self.leaves_early = self.blends_pair and last.leaves_early
        self.learns = any(member.learns for member in self.members)
        self.path = "+".join(f"{member.name} {member.path}" for member in self.members)

    def start(self) -> None:
        for member in self.members:
            member.start()

    def begin(self) -> list[Any]:
        return [member.begin() for member in self.members]

    def end(self, row_state: list[Any], ids: list[int], start: int, learn: bool = True) -> None:
        for member, own in zip(self.members, row_state, strict=True):
            member.end(own, ids, start, learn)

    @property
    def version(self) -> int:  # type: ignore[override]
        return sum(member.version for member in self.members)

    def claim(self) -> None:
        for member in self.members:
            member.claim()

    def learn(self) -> bool:
        return any([member.learn() for member in self.members])

    def save(self) -> None:
        for member in self.members:
            member.save()

    def propose(self, state: State, limit: int) -> Draft:
        if self.blends_pair and (blended := self._blended(state, limit)) is not None:
            return blended
        used, draft = dict[int, Draft](), Draft.empty(len(state.ids), state.cache.device)  # by row
        missing = list(range(len(state.ids)))
        for number, member in enumerate(self.members):
            draft = member.propose(self._of_member(state, number), limit)
            found = missing  # the last one's draft need not be read
            if number < len(self.members) - 1:
                lists = draft.lists()
                found = [b for b in missing if max(lists[b], default=-1) >= 0]
            used |= dict.fromkeys(found, draft)
            missing = [b for b in missing if b not in used]
            if not missing:
                break
            _drop_states(draft, state.cache)
        if any(each is not draft for each in used.values()):
            _drop_states(draft, state.cache)
            for own in state.row_states:
                self.withdraw(own)
            draft = merge([used[b].paths(b) for b in range(len(state.ids))], state.cache.device)[0]
        draft.found = None  # members' probabilities are not those of one source
        if draft.exit_layer > min(self.taps, default=draft.exit_layer):
            _drop_states(draft, state.cache)  # another member observes layers that scoring would not run
        return draft

    def _of_member(self, state: State, number: int) -> State:
        """``state`` for a member, whose path may go to any exit."""
        return replace(state, row_states=[own[number] for own in state.row_states], exit=None)

    def _blended(self, state: State, limit: int) -> Draft | None:
        """One tree of the candidates of both; None if the second has none."""
        first, second = self.members
        prices, nodes = state.prices, first.nodes
        if state.threshold is not None:  # n-grams have no confidence that drafts could be accepted by
            return second.propose(self._of_member(state, 1), limit)
        of_first = self._of_member(state, 0)
        free = first.candidates(of_first, limit) or []
        alone = worth_scoring(free, limit, nodes, prices)
        if prices is not None and self.has_probabilities and not prices.levels(alone):
            return draft_best(free, limit, nodes, state, 0, alone)
        of_second = self._of_member(state, 1)
        if prices is not None and self.has_probabilities:
            of_second.prices = prices.of(LEARNED, ALONE, BESIDE)
        if (learned := second.candidates(of_second, limit, free)) is None:
            if not self.has_probabilities:
                return None
            draft = second.propose(of_second, limit)  # the better one where there are no candidates, as under penalties
            for each in () if draft.found is None else draft.found.rows:
                each.raw[:] = [[0.0] * len(each.tokens), [0.0] * len(each.tokens), *each.raw]
            return draft
        if not any(each.tokens for each in learned):  # it has learned nothing yet
            return draft_best(free, limit, nodes, state, 0, alone)
        levels = max(each.levels() for each in learned)
        return draft_best(first.candidates(of_first, limit, learned) or [], limit, nodes, state, levels, alone)

    def withdraw(self, row_state: list[Any]) -> None:
        for member, own in zip(self.members, row_state, strict=True):
            member.withdraw(own)

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        for number, member in enumerate(self.members):
            member.observe([own[number] for own in row_states], paths, taps)


def _drop_states(draft: Draft, cache: KVCache) -> None:
    """Remove the states of ``draft``, and their entries in the cache: scoring starts at layer 0."""
    if draft.states is not None:
        cache.trim(draft.states.shape[1], 0, draft.exit_layer)
        draft.states, draft.exit_layer = None, 0
