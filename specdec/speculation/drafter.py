"""The contract of drafters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import Tensor

from specdec.base import options
from specdec.base.errors import SpecDecWarning
from specdec.base.settings import keywords
from specdec.runtimes.draft_path import DeviceChoice, DeviceTree
from specdec.speculation.candidates import Candidates
from specdec.speculation.draft import Draft
from specdec.speculation.state import State

if TYPE_CHECKING:
    from specdec.runtimes.target import Target

# The argument ``given`` of ``Drafter.candidates``, and what it returns.
Given: TypeAlias = Sequence[Candidates] | None
Trees: TypeAlias = list[Candidates] | DeviceTree | None


@dataclass(frozen=True)
class Traits:
    """What the engine must know of a drafter that is bound to a model.

    An *exit* is a place in the model where drafted tokens may leave it, numbered from 0; most drafters have one. A
    *level* is all tokens that are drafted at one depth.

    sources: the name of each source of its candidates; probabilities are calibrated for each source. A drafter by
        itself has one source, its name.
    drafts: whether it ever proposes a token.
    taps: the layers whose input states ``observe`` receives. N stands for the final state, N + 1 for the logits of a
        step, [B, 1 + M, V] (an empty tensor for a prompt).
    whole_prompts: whether ``observe`` receives the states of all prompt tokens, or of the last one of each part.
    has_probabilities: whether it knows probabilities of its tokens, and chooses its nodes by ``State.prices``.
    level_shares: for each exit, the bytes that drafting one level reads, as an approximate share of the bytes of a pass
        of the model; 0: it has no levels. A drafter with more than one exit obeys ``State.exit``.
    leaves_early: whether its tokens leave the model early, with a confidence (``State.threshold``).
    cost_key: distinguishes drafters of the same name that need different times to draft.
    """

    sources: tuple[str, ...]
    drafts: bool = True
    taps: tuple[int, ...] = ()
    whole_prompts: bool = False
    has_probabilities: bool = False
    level_shares: tuple[float, ...] = (0.1,)
    leaves_early: bool = False
    cost_key: str = ""

    @property
    def label(self) -> str:
        """The drafter's name in output; joined drafters have both names, with a + between them."""
        return "+".join(dict.fromkeys(self.sources))


class Learner(ABC):
    """Base class of the part of a drafter that trains it on rows that have ended."""

    @property
    @abstractmethod
    def version(self) -> int:
        """A number that changes when the drafter is replaced by a better one, so that earlier statistics count less."""

    @abstractmethod
    def work(self) -> bool:
        """Learn for about 50 ms, between two steps; return False if there is nothing to learn from."""

    @abstractmethod
    def claim(self) -> None:
        """Become the process that writes what is learned. Raises SpecDecError if another does, or writing fails."""

    @abstractmethod
    def save(self) -> None:
        """Write what was learned to the disk for later processes, if this process has claimed the file."""


class Drafter(ABC):
    """Proposes tokens. A subclass has a name and implements ``propose``; the other methods have defaults.

    A *row* is one text of the batch, and its *root* the last token of the text, after which a draft begins. Rows come
    and go between two steps. What belongs to a row is in the row's own state (``begin``).

    name: name in the registry, such as "m2r2". summary: one line for ``specdec drafters``.
    training: the command that trains one, such as "specdec train m2r2"; None: there is none.
    needs_training: whether it drafts only with trained parameters.
    traits: what the engine must know; by default that there is one source. ``bind`` sets what depends on the target.
    learner: the object that trains it while the process runs; None: it does not learn.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    training: ClassVar[str | None] = None
    needs_training: ClassVar[bool] = False
    traits: Traits
    learner: Learner | None = None

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "traits" not in vars(cls):
            cls.traits = Traits((cls.name,))

    @abstractmethod
    def propose(self, state: State, limit: int) -> Draft:
        """Return a draft: tokens after each row's root.

        limit: maximum depth of the draft, at least 1: the largest of ``state.depths``. The engine removes a row's nodes
            that are deeper than the row's own entry there.
        """

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """Make a drafter for ``target``. By default there is no source, and options are those of the constructor.

        Raises SpecDecError for an option that the drafter does not have.

        source: a folder or a name from which it is loaded; None: no source. kwargs: the drafter's options.
        """
        options.check_names(cls.name, kwargs, keywords(cls), source)
        return cls(**kwargs)

    def bind(self, target: Target) -> None:  # noqa: B027 (optional)
        """Attach to a target, and forget all rows; raise SpecDecError if the two do not fit.

        Called once, and again when the drafter starts anew after a failure.
        """

    def begin(self) -> Any:
        """Return an object with what the drafter keeps of a new row, whose prompt has not run yet."""
        return None

    def candidates(
        self,
        state: State,
        limit: int,
        given: Sequence[Candidates] | None = None,
        choice: DeviceChoice | None = None,
    ) -> list[Candidates] | DeviceTree | None:
        """Return each row's tree of candidate tokens after its root, at most ``limit`` deep, with probabilities.

        With a ``choice``, the trees may be on the device. Return None if this drafter has no candidates in this step;
        then the draft of ``propose`` is used.

        given: the candidates of each row that n-grams have; a drafter may draft levels after them, too. None: none.
        choice: rule by which the device selects nodes from both drafters' candidates; None: the host selects.
        """
        return None

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:  # noqa: B027
        """Receive the states of a block of tokens that was run, at the layers ``Traits.taps``, and the accepted paths.

        row_states: what ``begin`` returned for each row of the block.
        paths: the accepted block indices of each row; empty for a row that was not run. A part of a prompt is a block
            of its last token alone, unless the drafter reads ``Traits.whole_prompts``.
        taps: by layer, [B, T, D]. Layers below ``Draft.exit_layer`` are not run again, and have empty tensors.
        """

    def withdraw(self, row_state: Any) -> None:  # noqa: B027 (optional)
        """Forget the row's last draft, because it is scored only in part or not at all.

        row_state: what ``begin`` returned for the row.
        """

    def end(self, row_state: Any, ids: list[int], start: int, learn: bool = True) -> None:  # noqa: B027 (optional)
        """Forget a row that has ended.

        row_state: what ``begin`` returned for it.
        ids: its prompt and output.
        start: number of prompt tokens.
        learn: whether later requests may be drafted differently because of this row.
        """


class DrafterWarning(SpecDecWarning):
    """Warning that a drafter failed, or drafted what cannot be scored; decoding goes on without it."""
