"""The contracts of drafters and verifiers: a tree of proposed tokens, and the path of it that is accepted.

A step scores a *block* of 1 + M tokens: index 0 is the root (the last committed token, whose successor is sought),
indices 1 .. M are the draft's nodes in topological order.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous, upload
from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.base.settings import keywords
from specdec.models import drafter_folder
from specdec.speculation.trees import Prices

if TYPE_CHECKING:
    from specdec.kvcache.cache import KVCache
    from specdec.runtimes.target import Target
    from specdec.speculation.candidates import Candidates
    from specdec.speculation.sampling import Sampler


@dataclass
class Found:
    """What a draft was chosen from.

    rows: the candidates of each row, with what each source says.
    levels: number of levels that were drafted.
    free: the candidates of each row that a draft without levels has; None: there is no such draft.
    """

    rows: Sequence[Candidates]
    levels: int = 0
    free: Sequence[Candidates] | None = None


class Draft:
    """A tree of proposed tokens for every row of the batch (one shape for all rows).

    tokens: int64 [B, M], or lists [B][M], from which the tensor is made on ``device`` when it is read. -1 marks a node
        that a row does not have.
    listed: the tokens as lists, once the host has them.
    parents: block index of each node's parent (0: the root); a chain is (0, 1, 2, ...).
    states: hidden states [B, S, D] at layer ``exit_layer`` of the first S block tokens, whose keys and values below
        that layer are in the cache already: scoring resumes there.
    layers: number of layers that each node's token ran when it was drafted, int64 [B, M], if tokens leave the model
        early.
    found: what it was chosen from, if its drafter has probabilities.
    """

    found: Found | None = None
    states: Tensor | None = None
    exit_layer: int = 0
    layers: Tensor | None = None

    def __init__(
        self, tokens: Tensor | list[list[int]], parents: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        self.listed: list[list[int]] | None = tokens if isinstance(tokens, list) else None
        self._tokens: Tensor | None = None if isinstance(tokens, list) else tokens
        self._depths: list[int] | None = None
        self.parents, self.device = parents, torch.device(device) if self._tokens is None else self._tokens.device

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            assert self.listed is not None
            self._tokens = upload(self.listed, self.device).view(len(self.listed), len(self.parents))
        return self._tokens

    def depths(self) -> list[int]:
        """Distance of each block token from the root; the root has 0."""
        if self._depths is None:
            self._depths = [0]
            for parent in self.parents:
                self._depths.append(self._depths[parent] + 1)
        return self._depths

    def lists(self) -> list[list[int]]:
        """``tokens`` as lists [B][M]."""
        if self.listed is None:
            self.listed = self.tokens.tolist()
        return self.listed

    def paths(self, row: int) -> list[list[int]]:
        """The path of tokens from the root to each node that the row has, in the order of the nodes."""
        paths: list[list[int] | None] = [[]]
        for token, parent in zip(self.lists()[row], self.parents, strict=True):
            before = paths[parent]
            paths.append(None if before is None or token < 0 else [*before, token])
        return [path for path in paths[1:] if path]

    def ancestors(self) -> Tensor | None:
        """Bool [1 + M, 1 + M]: row i marks the block tokens on i's path to the root. None for a chain (causal)."""
        return ancestors(self.parents)

    def within(self, depths: list[int]) -> list[int]:
        """Remove the nodes of each row that are deeper than its entry of ``depths``; return the rows that may have lost
        some."""
        deep = self.depths()[1:]
        deepest = max(deep, default=0)
        cut = [b for b, most in enumerate(depths) if most < deepest]
        if not cut:
            return cut
        if self.listed is not None:
            self.listed = [
                [token if depth <= most else -1 for token, depth in zip(row, deep, strict=True)]
                for row, most in zip(self.listed, depths, strict=True)
            ]
            self._tokens = None
        else:
            bound, own = upload([[most] for most in depths], self.device), upload([deep], self.device)
            self._tokens = self.tokens.masked_fill(own > bound, -1)  # (B, M)
        return cut

    def with_chains(self, chains: Sequence[Sequence[int]]) -> Draft:
        """This draft with a further chain of tokens behind the root of each row; [] for none.

        The chain takes the place of the row's own nodes. The nodes of the draft keep their indices and their states.
        """
        count, deepest = len(self.parents), max(map(len, chains))
        tokens = [
            [*([-1] * count if chain else own), *chain, *[-1] * (deepest - len(chain))]
            for own, chain in zip(self.lists(), chains, strict=True)
        ]
        parents = [0, *range(count + 1, count + deepest)]
        made = Draft(tokens, (*self.parents, *parents), device=self.device)
        made.found, made.states, made.exit_layer, made.layers = self.found, self.states, self.exit_layer, self.layers
        return made

    @classmethod
    def empty(cls, batch: int, device: torch.device | str = "cpu") -> Draft:
        """A draft of no tokens: scoring it is plain decoding."""
        return cls([[]] * batch, (), device=device)


@functools.lru_cache(256)
def ancestors(parents: tuple[int, ...]) -> Tensor | None:
    """``Draft.ancestors`` of a draft with these parents."""
    if parents == tuple(range(len(parents))):
        return None
    paths = [1]  # a bit for each block token on the path
    for node, parent in enumerate(parents, start=1):
        paths.append(paths[parent] | 1 << node)
    return torch.tensor([[path >> node & 1 for node in range(len(paths))] for path in paths], dtype=torch.bool)


@dataclass
class Acceptance:
    """What is accepted of a draft.

    paths: the accepted block indices of each row, root first.
    next_tokens: the token that follows each path.
    """

    paths: list[list[int]]
    next_tokens: list[int]


UNBOUNDED = 1 << 30  # a depth that no draft has


@dataclass
class State:
    """The rows of the batch, as drafters see them. Whatever is by row has an entry for each, in the batch's order.

    ids[b]: prompt and output of row b; its last token, the root, is not yet cached.
    prices: the costs of levels and nodes; None: a draft may be as deep as its limit, and is a chain by default.
    exit: number of the last exit that tokens may go to; None: any.
    threshold: minimum confidence of the tokens to propose, which are then accepted without scoring; None: drafts are
        verified.
    row_states[b]: what ``Drafter.begin`` returned for row b.
    scopes[b]: text of one scope must not be drafted in another.
    depths[b]: maximum depth of row b's draft; 0: the row does not draft in this step.
    """

    target: Target
    cache: KVCache
    sampler: Sampler
    ids: list[list[int]]
    prices: Prices | None = None
    exit: int | None = None
    threshold: float | None = None
    row_states: list[Any] = field(default_factory=list)
    scopes: list[str | None] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.ids)
        self.row_states = self.row_states or [None] * count
        self.scopes = self.scopes or [None] * count
        self.depths = self.depths or [UNBOUNDED] * count
        if not len(self.row_states) == len(self.scopes) == len(self.depths) == count:
            raise ValueError(f"of {count} rows, some have no state, scope or depth")

    @property
    def constrained(self) -> bool:
        """Whether a row's text has a constraint."""
        return any(row.constraint is not None for row in self.sampler.rows)

    def allowed(self, row: int, tokens: list[int]) -> list[int]:
        """``tokens``, cut before the first that the row's constraint does not allow after its text."""
        constraint = self.sampler.rows[row].constraint
        return tokens if constraint is None else tokens[: constraint.allows(self.ids[row], tokens)]

    def masks(self, row: int) -> Callable[[Sequence[int]], Tensor | None] | None:
        """A function from tokens that follow the row's root to the tokens allowed after them: bool [V], or None if they
        are not allowed themselves. None: the row has no constraint."""
        constraint, ids = self.sampler.rows[row].constraint, self.ids[row]
        return None if constraint is None else lambda tokens: constraint.mask([*ids[constraint.start :], *tokens])

    @property
    def roots(self) -> Tensor:
        """The root token of each row, int64 [B, 1]."""
        return upload([[row[-1]] for row in self.ids], self.cache.device)

    @property
    def positions(self) -> Tensor:
        """The position of each row's root, int64 [B, 1]."""
        return upload([[n] for n in self.cache.rows], self.cache.device)

    def block(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """The tokens that scoring ``draft`` runs, roots first, and their positions: int64 [B, 1 + M] each.

        Nodes that a row does not have may lie past the end of its context: they get the last position.
        """
        device, depths, last = self.cache.device, draft.depths(), self.target.context - 1
        positions = upload([[min(n + depth, last) for depth in depths] for n in self.cache.rows], device)
        if draft.listed is None and is_asynchronous(device):  # reading drafted tokens would wait for them
            return torch.cat((self.roots, draft.tokens.clamp(0, self.target.vocab_size - 1)), 1), positions
        rows = zip(self.ids, draft.lists(), strict=True)
        return upload([[ids[-1], *(max(token, 0) for token in tokens)] for ids, tokens in rows], device), positions


class Drafter(ABC):
    """Proposes tokens. A subclass implements ``propose``; the other methods do nothing by default.

    Rows come and go between two steps. What belongs to a row is in the row's own state (``begin``).

    training: the command that trains one, if there is one.
    needs_training: whether it drafts only with trained parameters.
    before_others: defaults that differ where another drafter comes after it (``HybridDrafter``).
    drafts: False for the drafter that never proposes anything.
    nodes: number of nodes of its tree, if it is given.
    blends: whether it merges the candidates of another drafter into its own (``candidates``).
    taps: layers whose input states ``observe`` receives. N stands for the final state, N + 1 for the logits of a step,
        [B, 1 + M, V] (an empty tensor for a prompt).
    whole_prompts: whether ``observe`` receives the states of all prompt tokens.
    num_exits: number of exits to choose from; with more than one, the drafter obeys ``State.exit``.
    has_probabilities: whether it knows probabilities of its tokens, and sizes drafts by ``State.prices``.
    level_share: about the share of a pass's bytes that drafting a level reads, by exit; 0: it has no levels.
    leaves_early: whether tokens may leave the model early, with a confidence (``State.threshold``).
    learns: whether it has work to do between requests (``learn``).
    version: changes when it begins to draft differently; what was measured before says little then.
    path: a text that tells drafters with different costs apart, beside the name.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    training: ClassVar[str | None] = None
    needs_training: ClassVar[bool] = False
    before_others: ClassVar[dict[str, Any]] = {}
    drafts: ClassVar[bool] = True
    blends: ClassVar[bool] = False
    taps: tuple[int, ...] = ()
    whole_prompts: bool = False
    num_exits: int = 1
    nodes: int | None = None
    level_share: tuple[float, ...] = (0.1,)
    has_probabilities: bool = False
    leaves_early: bool = False
    learns: bool = False
    version: int = 0
    path: str = ""

    @property
    def label(self) -> str:
        """The name for people; of joined drafters, the names of all."""
        return self.name

    @property
    def sources(self) -> tuple[str, ...]:
        """The source of each kind of probabilities, which are calibrated apart."""
        return (self.name,)

    @classmethod
    def load(cls, target: Target, source: str | None = None, **kwargs: Any) -> Drafter:
        """Make one for ``target`` from ``source`` (a folder or a name) and options.

        By default there is no source, and options are the arguments of the constructor.
        """
        options.check_names(cls.name, kwargs, keywords(cls), source)
        return cls(**kwargs)

    @classmethod
    def find(cls, target: Target, source: str | None) -> Path:
        """The folder ``source``, or the drafter shipped for the target's weights. Raises SpecDecError if none is."""
        folder = drafter_folder.find_shipped(cls.name, target) if source is None else Path(source)
        if folder is None:
            raise cls.not_shipped(target.model.config._name_or_path)
        return folder

    @classmethod
    def training_command(cls, model: str) -> str:
        """How to train one for the model of that name."""
        return f"{cls.training} --model {model or 'MODEL'} --prompts FILE --output DIR"

    @classmethod
    def not_shipped(cls, model: str) -> SpecDecError:
        """The error for a model of that name, for which there is none."""
        return SpecDecError(
            f"no {cls.name} drafter is shipped for this model; train one: {cls.training_command(model)}, then pass "
            "--drafter DIR"
        )

    def bind(self, target: Target) -> None:  # noqa: B027 (optional)
        """Attach to a target once; raise SpecDecError if the two do not fit."""

    def start(self) -> None:  # noqa: B027 (optional)
        """Forget what was learned from earlier rows, none of which runs any more."""

    def begin(self) -> Any:
        """The state of a new row, whose prompt has not been run."""
        return None

    @abstractmethod
    def propose(self, state: State, limit: int) -> Draft:
        """Draft at most ``limit`` >= 1 tokens in depth after each row's root: the largest of ``state.depths``.

        Nodes of a row that are deeper than its own entry are removed before scoring.
        """

    def candidates(
        self, state: State, limit: int, given: Sequence[Candidates] | None = None
    ) -> list[Candidates] | None:
        """What may follow each row's root, with probabilities, at most ``limit`` deep.

        given: the candidates of each row that another source has already. A drafter that ``blends`` merges them with
            its own; one that drafts levels may draft behind them.
        None: it has no probabilities, or its own draft is worth more.
        """
        return None

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:  # noqa: B027
        """Receive the states [B, T, D] at the tapped layers of a block just run, and the paths that are accepted.

        row_states: of the block's rows.
        paths: block indices; empty for a row that was not run. The block of a part of a prompt is only its last token,
            unless the drafter reads ``whole_prompts``.
        taps: empty tensors for layers below the exit layer of a draft with states, which are not run again.
        """

    def withdraw(self, row_state: Any) -> None:  # noqa: B027 (optional)
        """The row's proposal is not scored, or only in part."""

    def end(self, row_state: Any, ids: list[int], start: int, learn: bool = True) -> None:  # noqa: B027 (optional)
        """A row has ended.

        ids: its prompt and output. start: number of prompt tokens. learn: whether later requests may be drafted
        differently for it.
        """

    def claim(self) -> None:  # noqa: B027 (optional)
        """Become the process that keeps what is learned. Raises SpecDecError if another one is, or nothing can be."""

    def learn(self) -> bool:
        """Do a piece of work, of about 50 ms, between two steps; False if there is none."""
        return False

    def save(self) -> None:  # noqa: B027 (optional)
        """Keep what was learned for later processes."""


class Verifier(ABC):
    """Decides which path of a draft is accepted: a function of the draft and the target's choices.

    name: as in the registry; label: the name with the rule's settings.
    lossless: whether the output is what plain decoding returns.
    needs_probabilities: whether ``verify`` reads ``p`` where tokens are sampled.
    threshold: minimum confidence of the drafter in a token, for a rule that accepts without scoring
        (``State.threshold``).
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    needs_probabilities: ClassVar[bool] = False
    threshold: float | None = None

    @property
    def label(self) -> str:
        return self.name

    def accepts(self, token: int, choice: int) -> bool:
        """Whether drafted ``token`` is accepted where the target chooses ``choice`` (-1: there is none)."""
        return token == choice >= 0

    def verify(self, draft: Draft, chosen: list[list[int]], p: Tensor | None) -> Acceptance:
        """Accept a path of ``draft`` for each row; by default the one along tokens that ``accepts`` takes.

        chosen: the token that the target chooses after each block token, [B][1 + M] (-1: its logits are not finite).
        p: the target's distributions [B, 1 + M, V]; None in greedy decoding, or if the rule does not need them.
        """
        accepted = Acceptance([], [])
        for tokens, choices in zip(draft.lists(), chosen, strict=True):
            path = [0]
            for node, parent in enumerate(draft.parents, start=1):
                if parent == path[-1] and self.accepts(tokens[node - 1], choices[parent]):
                    path.append(node)
            accepted.paths.append(path)
            accepted.next_tokens.append(choices[path[-1]])
        return accepted


class DrafterWarning(SpecDecWarning):
    """A drafter failed or proposed what cannot be scored; the request goes on without it."""


def check_draft(draft: Draft, batch: int, limit: int, vocab_size: int) -> str | None:
    """Why ``draft`` cannot be scored for ``batch`` rows, at most ``limit`` deep; None if it can.

    Tokens that only a device holds are checked when they are read.
    """
    count, parents = len(draft.parents), draft.parents
    if any(not 0 <= parent <= node for node, parent in enumerate(parents)):
        return f"its tree is not in topological order (parents {parents})"
    if max(draft.depths()) > limit:
        return f"it is {max(draft.depths())} tokens deep, {limit} are allowed"
    if draft.listed is None and tuple(draft.tokens.shape) != (batch, count):
        return f"its tokens are {tuple(draft.tokens.shape)}, not {batch} rows of {count}"
    if draft.listed is None and draft.tokens.dtype != torch.int64:
        return f"its tokens are {draft.tokens.dtype}, not int64"
    if (states := draft.states) is not None and not (
        states.dim() == 3 and len(states) == batch and states.shape[1] <= 1 + count and draft.exit_layer
    ):
        where = f"at layer {draft.exit_layer}"
        return f"its states {where} are {tuple(states.shape)}, not {batch} rows of {1 + count} tokens or fewer"
    if draft.listed is None and is_asynchronous(draft.device):
        return None
    return check_tokens(draft.lists(), batch, count, vocab_size)


def check_tokens(rows: list[list[int]], batch: int, count: int, vocab_size: int) -> str | None:
    """Why drafted tokens [B][M] cannot be scored; None if they can."""
    if len(rows) != batch or any(len(row) != count for row in rows):
        return f"its tokens are not {batch} rows of {count}"
    for row in rows:
        if row and not -1 <= min(row) <= max(row) < vocab_size:
            return f"token {min(row) if min(row) < -1 else max(row)} is outside the vocabulary of {vocab_size}"
    return None
