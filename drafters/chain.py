"""Drafting token by token with a model: what all drafters that do so share.

Knows how tokens are picked from logits and when a chain ends, not where the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.base.devices import is_asynchronous, upload
from specdec.speculation.candidates import Candidates, calibrated
from specdec.speculation.draft import Draft, Drafter, Found, State

from .vocabulary import Context, DraftVocabulary


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
    """Drafts a chain, token by token.

    vocabulary: the tokens that subclasses draft from; None: all of them.
    """

    vocabulary: DraftVocabulary | None = None

    def start(self) -> None:
        if self.vocabulary is not None:
            self.vocabulary.start()

    def begin(self) -> Any:
        return ChainRow()

    def chain(
        self, state: State, limit: int, step: Callable[[Tensor, Tensor], Readout], vocab: Tensor | None = None
    ) -> Draft:
        """Draft up to ``limit`` tokens, and not more than ``nodes``, after each row's root.

        Ends early when the whole chain is not worth another level (``Prices.level``), unless reading that waits for a
        device. Where drafts are not verified, a row's chain ends before the first token that is less certain than
        ``state.threshold``. Under a constraint it ends where no token of the vocabulary is allowed, and probabilities
        are those under the mask.

        step: takes tokens and their positions (int64 [B, 1]); called for the roots, then for each drafted token but the
            last.
        vocab: the tokens that logits are over, int64 [V']; None: those of ``vocabulary``.
        """
        if self.vocabulary is not None:
            self.vocabulary.follow(state, [row.context for row in state.row_states])
            vocab = self.vocabulary.tokens
        limit, prices = min(limit, self.nodes or limit), state.prices
        weighs = self.has_probabilities and prices is not None
        if weighs and prices is not None and not prices.levels():
            return Draft.empty(len(state.ids), state.cache.device)
        token, positions = state.roots, state.positions  # (B, 1)
        chain, layers = [token[:, :0]], list[Tensor]()
        alive = torch.ones_like(token, dtype=torch.bool)  # rows whose chain goes on
        prefixes = [] if state.sampler.plain_greedy else [list(ids) for ids in state.ids]
        reach = torch.ones(token.shape, device=token.device)  # calibrated probability that a row's chain is accepted
        raw, joint = list[Tensor](), list[Tensor]()  # [B, 1] by level: what the drafter says, and calibrated, of paths
        limits = None if prices is None else prices.limits(limit, 1)
        for depth in range(limit):
            # Run the last token, and pick the next one
            logits, certainty, run = step(token, positions)
            if state.threshold is not None:
                alive &= (best_probability(logits) if certainty is None else certainty) >= state.threshold
                if not bool(alive.any()):
                    break
                layers += [] if run is None else [run]
            token, share = _pick(state, logits, prefixes, vocab)
            if share is not None:
                alive &= token >= 0
                if not bool(alive.any()):
                    break
            ends = state.threshold is not None or share is not None
            chain.append(token.masked_fill(~alive, -1) if ends else token)
            token = token.clamp_min(0)
            positions = (positions + 1).clamp_max(state.target.context - 1)  # other rows may go deeper
            # Stop where another level is not worth its price
            if limits is not None and not is_asynchronous(token.device):
                assert prices is not None
                own = certainty if share is None and not weighs else share
                each = _probability(logits, token, vocab) if own is None else own
                tables = [row[0] for row in prices.tables] if weighs and prices.tables else [None] * len(each)
                sure = torch.stack([calibrated(p, table) for p, table in zip(each.float(), tables, strict=True)])
                reach = reach * sure
                raw, joint = [*raw, each], [*joint, reach]
                deeper = upload([most > depth + 1 for most in state.depths], token.device, torch.bool)
                worth = reach[:, 0] * deeper * limits.rate(depth + 1) - limits.node
                if float(worth.clamp(min=0).sum()) < limits.level:
                    break
        drafted, parents = torch.cat(chain, 1), range(len(chain) - 1)
        draft = Draft(drafted, tuple(parents))
        if weighs and joint:
            logs, said = torch.cat(joint, 1).clamp(min=1e-9).log().tolist(), torch.cat(raw, 1).tolist()
            rows = zip(logs, drafted.tolist(), said, state.depths, strict=True)
            found = [Candidates(score, ids, [*parents], [own]).within(most) for score, ids, own, most in rows]
            draft.found = Found(found, len(parents))
        draft.layers = torch.cat(layers, 1) if layers else None
        return draft


def _pick(
    state: State, logits: Tensor, prefixes: list[list[int]], vocab: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The tokens [B, 1] that continue the chains, from draft logits [B, V']; they are appended to ``prefixes``.

    They are chosen by the noise with which the target will choose. -1: processing leaves no token. If a row has a
    constraint, also returns the tokens' probabilities under all processing.
    """
    sampler, size = state.sampler, state.target.vocab_size
    if sampler.plain_greedy:
        best = logits.argmax(-1, keepdim=True)
        return best if vocab is None else vocab[best], None
    if vocab is not None and sampler.needs_prefixes:  # processors look tokens up by their ids
        full = logits.new_full((logits.shape[0], size), float("-inf"))
        full[:, vocab] = logits
        logits, vocab = full, None
    scores = sampler.scores(logits[:, None], lambda: [[prefix] for prefix in prefixes], vocab)
    noisy = sampler.perturb(scores, [[len(prefix)] for prefix in prefixes], size, vocab)[:, 0]  # (B, V')
    values, best = noisy.max(-1, keepdim=True)
    token = (best if vocab is None else vocab[best]).masked_fill(~values.isfinite(), -1)
    for prefix, [chosen] in zip(prefixes, token.tolist(), strict=True):
        prefix.append(max(chosen, 0))
    if not state.constrained:
        return token, None
    return token, scores[:, 0].softmax(-1).gather(1, best).masked_fill(token < 0, 0.0)


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


def _probability(logits: Tensor, token: Tensor, vocab: Tensor | None) -> Tensor:
    """The probability [B, 1] that draft logits [B, V'] give ``token`` [B, 1]; 0 outside the vocabulary."""
    p = logits.float().softmax(-1)
    return p.gather(1, token) if vocab is None else (p * (vocab == token)).sum(-1, keepdim=True)
