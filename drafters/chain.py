"""Drafting token by token with a model: what all drafters that do so share.

The chain follows the preferred tokens; siblings beside it cost no drafting, only scoring. Knows how tokens are picked
from logits and which siblings pay, not where the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.base import options
from specdec.base.devices import is_asynchronous
from specdec.speculation.candidates import Candidates, calibrated
from specdec.speculation.draft import Draft, Drafter, Found, State

from .vocabulary import Context, DraftVocabulary

RANKS = 4  # number of candidates at a depth, if drafts are sized by the drafter's own probabilities


class Readout(NamedTuple):
    """What is read of a token where it leaves the model.

    logits: logits of the next token, [B, V'].
    certainty: the probability that their best token is the model's, [B, 1]; None: by the logits themselves.
    layers: number of layers that the token ran, int64 [B, 1], if that is counted.
    """

    logits: Tensor
    certainty: Tensor | None = None
    layers: Tensor | None = None


class ChainRow:
    """The state of a row in a drafter of chains."""

    def __init__(self) -> None:
        self.context = Context()


class ChainDrafter(Drafter):
    """Drafts token by token; siblings beside the chain cost no drafting.

    A drafter that ``has_probabilities`` sizes its draft by them, siblings included, unless ``nodes`` are given.

    nodes: number of nodes of the tree. Those beside the chain are spread evenly, the first tokens get one more. None:
        no siblings, or those that are worth their price.
    vocabulary: the tokens that subclasses draft from; None: all of them.
    """

    vocabulary: DraftVocabulary | None = None

    def __init__(self, nodes: int | None = None) -> None:
        self.nodes = None if nodes is None else options.check_int("nodes", nodes, 1)

    def start(self) -> None:
        if self.vocabulary is not None:
            self.vocabulary.start()

    def begin(self) -> Any:
        return ChainRow()

    def _sizes(self, limit: int) -> tuple[int, list[int]]:
        """The chain's depth, at most ``limit`` >= 1, and the number of siblings at each depth."""
        if self.nodes is None:
            return limit, [0] * limit
        depth = min(limit, self.nodes)
        each, more = divmod(self.nodes - depth, depth)
        return depth, [each + (place < more) for place in range(depth)]

    def chain(
        self, state: State, limit: int, step: Callable[[Tensor, Tensor], Readout], vocab: Tensor | None = None
    ) -> Draft:
        """Draft up to ``limit`` tokens after each row's root; the chain's nodes come first, then the siblings.

        Ends early when the whole chain is not worth another level (``Prices.level``), unless reading that waits for a
        device. Where drafts are not verified, a row's chain ends before the first token that is less certain than
        ``state.threshold``, and has no siblings. Under a constraint it ends where no token of the vocabulary is
        allowed, and probabilities are those under the mask.

        step: takes tokens and their positions (int64 [B, 1]); called for the roots, then for each drafted token but the
            last.
        vocab: the tokens that logits are over, int64 [V']; None: those of ``vocabulary``.
        """
        if self.vocabulary is not None:
            self.vocabulary.follow(state, [row.context for row in state.row_states])
            vocab = self.vocabulary.tokens
        prices = state.prices
        weighs = self.has_probabilities and prices is not None and self.nodes is None
        if weighs and prices is not None and not prices.levels():
            return Draft.empty(len(state.ids), state.cache.device)
        limit, siblings = (limit, [RANKS - 1] * limit) if weighs else self._sizes(limit)
        token, positions = state.roots, state.positions  # (B, 1)
        chain, beside, layers = [token[:, :0]], list[Tensor](), list[Tensor]()
        parents: list[int] = []  # of the siblings: the chain's node i has block index i + 1, the root 0
        alive = torch.ones_like(token, dtype=torch.bool)  # rows whose chain goes on
        prefixes = [] if state.sampler.plain_greedy else [list(ids) for ids in state.ids]
        reach = torch.ones(token.shape, device=token.device)  # calibrated probability that a row's chain is accepted
        raw, joint = list[Tensor](), list[Tensor]()  # [B, W] by level: what the drafter says, and calibrated, of paths
        limits = None if prices is None else prices.limits(limit, 1)
        for depth in range(limit):
            # Run the last token, and pick the next one with its siblings
            logits, certainty, run = step(token, positions)
            width = 1 + siblings[depth]
            if state.threshold is not None:
                width, sure = 1, best_probability(logits) if certainty is None else certainty
                alive &= sure >= state.threshold
                if not bool(alive.any()):
                    break
                layers += [] if run is None else [run]
            tokens, shares = _pick(state, logits, width, prefixes, vocab)
            if shares is not None:
                alive &= tokens[:, :1] >= 0
                if not bool(alive.any()):
                    break
                tokens = tokens.masked_fill(~alive, -1)
            ends = state.threshold is not None or shares is not None
            token = tokens[:, :1].clamp_min(0)
            chain.append(token.masked_fill(~alive, -1) if ends else token)
            beside.append(tokens[:, 1:])
            parents += [depth] * (tokens.shape[1] - 1)
            positions = (positions + 1).clamp_max(state.target.context - 1)  # other rows may go deeper
            # Stop where another level is not worth its price
            if limits is not None and not is_asynchronous(token.device):
                own = weighs or certainty is None
                each = _probability(logits, tokens if weighs else token, vocab) if own else certainty
                each = each if shares is None else shares[:, : tokens.shape[1] if weighs else 1]
                assert each is not None and prices is not None
                tables = [row[0] for row in prices.tables] if weighs and prices.tables else [None] * len(each)
                sure = torch.stack([calibrated(p, table) for p, table in zip(each.float(), tables, strict=True)])
                raw, joint = [*raw, each], [*joint, reach * sure]
                reach = joint[-1][:, :1]
                worth = reach[:, 0] * limits.rate(depth + 1) - limits.node
                if float(worth.clamp(min=0).sum()) < limits.level:
                    break
        drafted, parents = torch.cat((*chain, *beside), 1), [*range(len(chain) - 1), *parents]
        found = None
        if weighs and prices is not None and joint:  # keep the siblings that are worth their price
            order = [
                torch.cat([part[:, :1] for part in parts] + [part[:, 1:] for part in parts], 1)
                for parts in (joint, raw)
            ]
            values, length = order[0].mean(0).tolist(), len(joint)
            likely = sorted(range(length, len(values)), key=lambda i: -values[i])
            count = prices.take([values[i] for i in (*range(length), *likely)], least=length, rows=len(token))
            selected = [*range(length), *sorted(likely[: count - length])]
            logs, said = order[0].clamp(min=1e-9).log().tolist(), order[1].tolist()
            rows = zip(logs, drafted.tolist(), said, strict=True)
            found = Found([Candidates(score, ids, parents, [own]) for score, ids, own in rows], length)
            drafted, parents = drafted[:, selected], [parents[i] for i in selected]
        draft = Draft(drafted, tuple(parents))
        draft.found = found
        draft.layers = torch.cat(layers, 1) if layers else None
        return draft


def _pick(
    state: State, logits: Tensor, width: int, prefixes: list[list[int]], vocab: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, width] after the chain's end, best first, from draft logits [B, V'].

    The first continues the chain (and is appended to its ``prefixes``), the others are its siblings, by the noise with
    which the target will choose. -1: processing leaves no such token. If a row has a constraint, also returns the
    tokens' probabilities under all processing.
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


def first_confident(read: Callable[[int], tuple[Tensor, ...]], exits: int, confidence: float) -> tuple[Tensor, ...]:
    """Each row's result of ``read`` at the first of its exits with enough confidence, else at the last.

    read: takes all rows to an exit; the second part of its result is the certainty, as in ``Readout``.
    """
    found = read(0)
    for index in range(1, exits):
        on = found[1] < confidence  # (B, 1): rows that go on
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
    """The probabilities [B, W] that draft logits [B, V'] give ``tokens`` [B, W]; 0 outside the vocabulary."""
    p = logits.float().softmax(-1)
    if vocab is None:
        return p.gather(1, tokens.clamp_min(0)).masked_fill(tokens < 0, 0.0)
    return torch.stack([(p * (vocab == token)).sum(-1) for token in tokens[..., None].unbind(1)], 1)
