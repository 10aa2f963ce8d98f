"""Drafting token by token with a model: what every drafter that does so shares.

The chain follows the preferred tokens; siblings beside it cost no drafting, only scoring. Knows how tokens are picked
from logits and which siblings pay, not where the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import waits
from specdec.base.errors import SpecDecError
from specdec.speculation.draft import Draft, Drafter, State
from specdec.speculation.trees import MOST_NODES, Prices, best_first

from .vocabulary import Context, DraftVocabulary

RANKS = 4  # choices at a depth that own probabilities may take
SHAPE = ("siblings", "nodes")  # options of every drafter of chains


class Shape:
    """How many siblings each depth of a chain has: as many as are given, or those that are measured to pay.

    siblings: number of further candidates at each depth (depths beyond its length have none). nodes: most nodes of the
    tree, which is then the one expected to keep the most tokens (``best_tree``), by how often the first, second, ...
    choice at each depth has been right in this generation. Neither: such a tree of the nodes that are worth their price
    (``Prices``; none but the chain at a fixed depth). Raises SpecDecError for bad values.
    """

    DEPTHS, RANKS = 8, 5  # positions and choices that are counted
    FIRST, NEXT, WEIGHT = 0.6, 0.35, 4.0  # believed before anything was seen: of a first choice, of each further one

    def __init__(self, siblings: Sequence[int] | None = None, nodes: int | None = None) -> None:
        if siblings is not None and nodes is not None:
            raise SpecDecError("give the siblings at each depth, or how many nodes the tree may have, not both")
        self.siblings = None if siblings is None else options.wholes("siblings", siblings, 0)
        self.nodes = None if nodes is None else options.whole("nodes", nodes, 1)
        self.start()

    def start(self) -> None:
        """Forget what was seen: a generation does not depend on earlier ones."""
        believed = [self.WEIGHT * self.FIRST * self.NEXT**rank for rank in range(self.RANKS)]
        self.right = [list(believed) for _ in range(self.DEPTHS)]
        self.offered = [[self.WEIGHT] * self.RANKS for _ in range(self.DEPTHS)]
        self.pending: tuple[int, ...] = ()  # parents of the draft that is being verified

    def fit(self, limit: int, prices: Prices | None, rows: int = 1) -> tuple[int, Sequence[int]]:
        """The chain's depth, at most ``limit`` >= 1, and the siblings at each depth, in a shape for so many rows."""
        if self.siblings is not None or (self.nodes is None and prices is None):
            return limit, self.siblings or ()
        pairs = zip(self.right[:limit], self.offered[:limit], strict=True)
        accuracy = [[r / n for r, n in zip(right, offered, strict=True)] for right, offered in pairs]
        tree, values = best_first(accuracy, self.nodes or MOST_NODES, chain=True)
        if prices is not None:
            tree = tree.first(prices.take(values, least=1, exactly=self.nodes, rows=rows))
        depths = tree.depths()
        return max(depths) + 1, [depths.count(depth) - 1 for depth in range(max(depths) + 1)]

    def observe(self, paths: Sequence[Sequence[int]]) -> None:
        """Count which choices of the ``pending`` draft were right."""
        parents, self.pending = self.pending, ()
        for path in paths if parents else ():
            accepted = set(path)
            for depth in range(self.DEPTHS):
                choices = [node for node, parent in enumerate(parents, start=1) if parent == depth]
                for rank, node in enumerate(choices[: self.RANKS]):
                    self.offered[depth][rank] += 1
                    self.right[depth][rank] += node in accepted
                if depth + 1 not in accepted:  # the chain's nodes come first: number i + 1 is the one at depth i
                    break


class ShapeOptions(TypedDict, total=False):
    """What ``Shape`` is made of, as drafters of chains take it among their own options."""

    siblings: Sequence[int] | None
    nodes: int | None


class Readout(NamedTuple):
    """What is read of a token where it leaves the model.

    logits: [B, V'], of what follows it. certainty: the probability [B, 1] that their best token is the model's; None:
    what the logits say themselves. layers: int64 [B, 1], those that the token ran, if that is counted.
    """

    logits: Tensor
    certainty: Tensor | None = None
    layers: Tensor | None = None


class ChainRow:
    """What a drafter of chains keeps of a row."""

    def __init__(self) -> None:
        self.context = Context()


class ChainDrafter(Drafter):
    """Drafts token by token; siblings beside the chain cost no drafting.

    A drafter that ``has_probabilities`` sizes its draft by them, siblings included, if no shape is given.

    siblings, nodes: see ``Shape``.
    vocabulary: the tokens that subclasses draft from; None: all of them.
    """

    vocabulary: DraftVocabulary | None = None

    def __init__(self, **shape: Unpack[ShapeOptions]) -> None:
        self.shape = Shape(**shape)

    def start(self) -> None:
        self.shape.start()
        if self.vocabulary is not None:
            self.vocabulary.start()

    def begin(self) -> Any:
        return ChainRow()

    def observe(self, row_states: list[Any], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        self.shape.observe(paths)

    def chain(
        self, state: State, limit: int, step: Callable[[Tensor, Tensor], Readout], vocab: Tensor | None = None
    ) -> Draft:
        """Draft up to ``limit`` tokens after each row's root; the chain's nodes come first, then the siblings.

        step: takes tokens and their positions (int64 [B, 1]); called first for the roots, then for each drafted token
            but the last.
        vocab: int64 [V'], the tokens that logits are over; None: those of ``vocabulary``.
        Ends early once the whole chain is not worth another level (``Prices.level``), where reading that does not wait
        for a device. Where nothing will be verified, a row's chain ends before the first token that is
        less certain than ``state.threshold``, and has no siblings. Under a constraint it ends where the vocabulary has
        nothing that is allowed, and probabilities are those under the mask.
        """
        if self.vocabulary is not None:
            self.vocabulary.follow(state, [row.context for row in state.row_states])
            vocab = self.vocabulary.tokens
        prices = state.prices
        weighs = self.has_probabilities and prices is not None and self.shape.nodes is None
        limit, siblings = (limit, [RANKS - 1] * limit) if weighs else self.shape.fit(limit, prices, len(state.ids))
        token, positions = state.roots, state.positions  # (B, 1)
        chain, beside, layers = [token[:, :0]], list[Tensor](), list[Tensor]()
        parents: list[int] = []  # of the siblings: the chain's node i has block index i + 1, the root 0
        going = torch.ones_like(token, dtype=torch.bool)  # rows whose chain goes on
        prefixes = [] if state.sampler.plain_greedy else [list(ids) for ids in state.ids]
        reach = torch.ones(token.shape, device=token.device)  # calibrated probability that a row's chain is accepted
        on, off = list[float](), list[float]()  # mean probabilities of the chain's nodes and of those beside it
        for depth in range(limit):
            logits, certainty, run = step(token, positions)
            width = 1 + (siblings[depth] if depth < len(siblings) else 0)
            if state.threshold is not None:
                width, sure = 1, best_probability(logits) if certainty is None else certainty
                going &= sure >= state.threshold
                if not bool(going.any()):
                    break
                layers += [] if run is None else [run]
            tokens, shares = _pick(state, logits, width, prefixes, vocab)
            if shares is not None:
                going &= tokens[:, :1] >= 0
                if not bool(going.any()):
                    break
                tokens = tokens.masked_fill(~going, -1)
            ends = state.threshold is not None or shares is not None
            token = tokens[:, :1].clamp_min(0)
            chain.append(token.masked_fill(~going, -1) if ends else token)
            beside.append(tokens[:, 1:])
            parents += [depth] * (tokens.shape[1] - 1)
            positions = (positions + 1).clamp_max(state.target.context - 1)  # other rows may go deeper
            if prices is not None and not waits(token.device):
                own = weighs or certainty is None
                each = _probability(logits, tokens if weighs else token, vocab) if own else certainty
                each = each if shares is None else shares[:, : tokens.shape[1] if weighs else 1]
                assert each is not None
                joint = reach * each.pow(prices.exponent)  # (B, 1 or W)
                values, reach = joint.mean(0).tolist(), joint[:, :1]
                on, off = [*on, values[0]], [*off, *values[1:]]
                if len(token) * values[0] < prices.level:
                    break
        drafted, parents = torch.cat((*chain, *beside), 1), [*range(len(chain) - 1), *parents]
        if weighs and prices is not None:
            order = sorted(range(len(off)), key=lambda i: -off[i])
            count = prices.take([*on, *(off[i] for i in order)], least=len(on), rows=len(token))
            kept = [*range(len(on)), *sorted(len(on) + i for i in order[: count - len(on)])]
            drafted, parents = drafted[:, kept], [parents[i] for i in kept]
        draft = Draft(drafted, tuple(parents))
        draft.layers = torch.cat(layers, 1) if layers else None
        self.shape.pending = draft.parents
        return draft


def _pick(
    state: State, logits: Tensor, width: int, prefixes: list[list[int]], vocab: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, width] after the chain's end, best first, from draft logits [B, V']; and, if a row has a constraint,
    their probabilities under all that is processed.

    The first continues the chain (and is appended to its ``prefixes``), the others are its siblings: those that the
    draft's logits rank next, under the noise by which the target will choose. -1: processing leaves no such token.
    """
    sampler, size = state.sampler, state.target.vocab_size
    if sampler.plain_greedy:
        best = logits.topk(width).indices if width > 1 else logits.argmax(-1, keepdim=True)
        return best if vocab is None else vocab[best], None
    if vocab is not None and sampler.needs_prefixes:  # processors look tokens up by their ids
        full = logits.new_full((logits.shape[0], size), float("-inf"))
        full[:, vocab] = logits
        logits, vocab = full, None
    scores = sampler.scores(logits[:, None], lambda: [[prefix] for prefix in prefixes], vocab)
    noisy = sampler.perturb(scores, [[len(prefix)] for prefix in prefixes], size, vocab)[:, 0]  # (B, V')
    values, best = noisy.topk(min(width, noisy.shape[1]))
    tokens = (best if vocab is None else vocab[best]).masked_fill(~values.isfinite(), -1)
    for prefix, token in zip(prefixes, tokens[:, 0].tolist(), strict=True):
        prefix.append(max(token, 0))
    if not state.constrained:
        return tokens, None
    return tokens, scores[:, 0].softmax(-1).gather(1, best).masked_fill(tokens < 0, 0.0)


def first_sure(read: Callable[[int], tuple[Tensor, ...]], exits: int, bar: float) -> tuple[Tensor, ...]:
    """What each row has at the first of its exits that is sure enough, else at the last.

    ``read(i)`` takes all rows to exit i; like a ``Readout`` its second part is the certainty.
    """
    found = read(0)
    for index in range(1, exits):
        on = found[1] < bar  # (B, 1): rows that go on
        if not bool(on.any()):
            break
        pairs = zip(read(index), found, strict=True)
        found = tuple(torch.where(on.view(-1, *[1] * (old.dim() - 1)), new, old) for new, old in pairs)
    return found


def best_probability(logits: Tensor) -> Tensor:
    """The probability [B, 1] that draft logits [B, V'] give their best token."""
    x = logits.float()
    return torch.exp(x.amax(-1, keepdim=True) - x.logsumexp(-1, keepdim=True))


def _probability(logits: Tensor, tokens: Tensor, vocab: Tensor | None) -> Tensor:
    """What the draft itself gives ``tokens`` [B, W], from its logits [B, V'] -> [B, W]; 0 outside its vocabulary."""
    p = logits.float().softmax(-1)
    if vocab is None:
        return p.gather(1, tokens.clamp_min(0)).masked_fill(tokens < 0, 0.0)
    return torch.stack([(p * (vocab == token)).sum(-1) for token in tokens[..., None].unbind(1)], 1)
