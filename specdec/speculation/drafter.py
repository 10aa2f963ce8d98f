"""The contract of drafters: the base class ``Drafter``, and what the engine must know of one (``Traits``)."""

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

    An *exit* is a layer of the model at which drafted tokens may leave it; exits are numbered from 0, and most drafters
    have one. A *level* is all tokens that are drafted at one depth of the tree, in one pass of the drafter.

    sources: the names of those that propose its candidate tokens, such as ("ngram", "m2r2"); probabilities are
        calibrated for each. A drafter by itself is its only source.
    drafts: whether it ever proposes a token.
    taps: the layers whose input states ``Drafter.observe`` receives. N (the number of layers) stands for the output of
        the last layer, before the final norm, N + 1 for the logits of a step, [B, 1 + M, V] (an empty tensor for a
        prompt).
    whole_prompts: whether ``observe`` receives the states of all prompt tokens; False: of the last token of each part
        of a prompt only.
    has_probabilities: whether it knows probabilities of its tokens, and chooses its nodes by the costs in
        ``State.prices``.
    level_shares: for each exit, the bytes that drafting one level reads, as a part of the bytes that a pass of the
        model reads; 0: it has no levels. A drafter with more than one exit obeys ``State.exit``.
    leaves_early: whether its tokens leave the model at an early layer with a confidence, so that a verifier may accept
        them without scoring (``State.threshold``).
    cost_key: text that distinguishes drafters of the same name which need different times to draft.
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
        """The drafter's name in output; joined drafters have the names of both, with a + between them."""
        return "+".join(dict.fromkeys(self.sources))


class Learner(ABC):
    """Base class of the part of a drafter that trains it, while the engine runs, on rows (sequences) that ended.

    A drafter that has one in its attribute ``learner`` gives it the data itself, by methods of the subclass; the engine
    calls ``work`` between its steps. A subclass implements all methods.
    """

    @property
    @abstractmethod
    def version(self) -> int:
        """A number that changes when training has replaced the drafter's weights; older statistics then count less."""

    @abstractmethod
    def work(self) -> bool:
        """Train the drafter for about 50 ms, between two steps of the engine; return False if there are no data."""

    @abstractmethod
    def claim(self) -> None:
        """Make this process the only one that writes the file of learned weights (``save``), until it ends.

        Raises SpecDecError if another process is that already, or if the file cannot be written.
        """

    @abstractmethod
    def save(self) -> None:
        """Write the drafter's learned weights to its file, which later processes load; no effect before ``claim``."""


class Drafter(ABC):
    """Proposes tokens. A subclass has a name and implements ``propose``; the other methods have defaults.

    A *row* is one sequence of the batch, and its *root* the last token of its text, after which a draft begins. Rows
    come and go between two steps. What a drafter stores for a row is in an object of the row's own (``begin``).

    name: name in the registry, such as "m2r2". summary: one line for the command ``specdec drafters``.
    training: the command that trains one, such as "specdec train m2r2"; None: there is none.
    needs_training: whether it drafts only with trained parameters.
    traits: what the engine must know of the drafter. By default, ``Traits((name,))``: it proposes tokens without
        probabilities, and all count as of one source (who proposes a token), named like the drafter. ``bind`` replaces
        the object if it depends on the model.
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
        """Return a draft: a tree of proposed tokens after each row's root (the last token of its text).

        state: the rows of the batch, with their token ids, KV cache and maximum depths.
        limit: maximum depth of the draft, at least 1: the largest of ``state.depths``. The engine removes a row's nodes
            that are deeper than the row's own entry there. A deeper draft is an error, after which the drafter is off.
        """

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """Make a drafter for ``target`` and return it; the caller binds it.

        The default is for drafters without parameters: it passes ``kwargs`` to the constructor. Raises SpecDecError for
        an option that the drafter does not have, and for a source if it takes none.

        target: the model for which it will draft.
        source: a folder or a hub name from which its parameters are loaded; None: no source was given.
        kwargs: the drafter's options by name.
        """
        options.check_names(cls.name, kwargs, keywords(cls), source)
        return cls(**kwargs)

    def bind(self, target: Target) -> None:  # noqa: B027 (optional)
        """Attach the drafter to a model, and forget all rows. Raises SpecDecError if the two do not fit.

        Called before the first step, and again when the drafter starts anew after a failure. Does nothing by default.
        """

    def begin(self) -> Any:
        """Return an object with what the drafter stores for a new row (sequence), whose prompt has not run yet.

        The engine keeps it until the row ends, and passes it to the other methods, which may change it. None, the
        default: the drafter stores nothing.
        """
        return None

    def candidates(
        self,
        state: State,
        limit: int,
        given: Sequence[Candidates] | None = None,
        choice: DeviceChoice | None = None,
    ) -> list[Candidates] | DeviceTree | None:
        """Return each row's tree of candidate tokens after its root, with probabilities; at most ``limit`` deep.

        Joined drafters (ngram+X) call it. With a ``choice``, it may return the selected trees on the device. None, the
        default: this drafter has no candidates in this step, and the draft of ``propose`` is used.

        state: the rows of the batch. limit: maximum depth of a node.
        given: for each row, the candidates by n-grams; a drafter may draft further tokens after them, too. None: there
            are none.
        choice: rule by which the device selects nodes from both drafters' candidates; None: the CPU selects them.
        """
        return None

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:  # noqa: B027
        """Receive hidden states of tokens that the model has run, and which of these tokens were accepted.

        Called after each step, and after each part of a prompt that has run. The tokens are blocks of T per row: the
        root and the draft's nodes (block index 0 is the root, i + 1 is node i), or a part of a prompt.

        row_states: what ``begin`` returned for each row.
        paths: for each row, the block indices of the accepted tokens; [] for a row that was not run. A part of a prompt
            is a block of its last token alone, unless ``Traits.whole_prompts`` is set.
        taps: input states by layer, [B, T, D], for the layers ``Traits.taps``. Layers below ``Draft.exit_layer`` are
            not run again, and have empty tensors.
        """

    def keep_up(self, row_states: list[Any], texts: Sequence[Sequence[int]]) -> None:  # noqa: B027 (optional)
        """Compute what need not wait for the next draft, such as from hidden states that pile up. No effect by default.

        Called at the end of each step, and after each part of a prompt if ``Traits.whole_prompts`` is set. Its time
        does not count as the cost of a draft. There may be no draft for long, or ever.

        row_states: what ``begin`` returned for each row.
        texts: for each row, the token ids of its text up to the token after the last one that the model has run.
        """

    def withdraw(self, row_state: Any) -> None:  # noqa: B027 (optional)
        """Forget a row's last draft, because the model will score it only in part or not at all.

        Called between ``propose`` and the pass that scores the draft. row_state: what ``begin`` returned for the row.
        """

    def end(self, row_state: Any, ids: list[int], start: int, learn: bool = True) -> None:  # noqa: B027 (optional)
        """Forget a row (sequence) that has ended.

        row_state: what ``begin`` returned for it.
        ids: its token ids, prompt and output.
        start: number of prompt tokens.
        learn: whether later requests may be drafted differently because of this row.
        """


class DrafterWarning(SpecDecWarning):
    """Warning that a drafter failed, or drafted what cannot be scored; decoding goes on without it."""
