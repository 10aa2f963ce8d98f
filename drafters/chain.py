"""Drafting token by token with a model: how a token is picked from logits, and when a chain ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.base.devices import is_asynchronous, upload
from specdec.runtimes.draft_path import calibrated
from specdec.speculation.candidates import Candidates, CandidateSet
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.state import State

from .vocabulary import Context, DraftVocabulary


class Readout(NamedTuple):
    """The draft logits after one token of each row, where the token leaves the model.

    logits: draft logits of the next token over the V' draft tokens, [B, V'].
    certainty: probability that the target chooses the best token of ``logits``, [B, 1]; None: its softmax is used.
    layers: number of layers that the token has run, int64 [B, 1]; None: not counted.
    """

    logits: Tensor
    certainty: Tensor | None = None
    layers: Tensor | None = None


class ChainRow:
    """What a drafter of chains keeps of one row (sequence).

    context: tokens of the row's text that the drafter was not trained on, and that it drafts as well.
    """

    def __init__(self) -> None:
        self.context = Context()


class ChainDrafter(Drafter):
    """Base class of drafters that draft a chain (a tree without branches) token by token.

    A subclass implements ``propose``, which calls ``chain`` with a function that runs one token of each row. It sets
    ``vocabulary`` in ``bind`` if it drafts from some tokens only, and overrides ``begin`` if a row has more state.

    vocabulary: the tokens that the drafter drafts from; None: all of them.
    nodes: maximum number of tokens of a draft; None: as many as ``propose`` may draft.
    """

    vocabulary: DraftVocabulary | None = None
    nodes: int | None = None

    def begin(self) -> Any:
        return ChainRow()

    def chain(
        self, state: State, limit: int, step: Callable[[Tensor, Tensor], Readout], vocab: Tensor | None = None
    ) -> Draft:
        """Draft a chain of at most ``limit`` tokens, and at most ``nodes``, after the last token (root) of each row.

        All chains end early when another token is not worth its cost (``Prices.level``), except on devices for which
        the host would have to wait. Where drafts are not verified, a row's chain ends before the first token that is
        less certain than ``state.threshold``. Under a constraint, a chain ends where no token of the vocabulary is
        allowed, and probabilities are normalized over the allowed tokens. A row whose chain ends before others has
        token -1 from there on.
        state: the rows of the batch. step: function of tokens and their positions, int64 [B, 1] each, that runs them
            and returns the logits after them. It is called for the roots, then for each drafted token but the last.
        vocab: the token ids of the logits, int64 [V']; None: the ids in ``vocabulary``.
        """
        if self.vocabulary is not None:
            self.vocabulary.follow(state, [row.context for row in state.row_states])
            vocab = self.vocabulary.tokens
        limit, prices = min(limit, self.nodes or limit), state.prices
        weighs = self.traits.has_probabilities and prices is not None
        waits = not is_asynchronous(state.cache.device)
        if weighs and prices is not None:
            limit = limit if (levels := prices.levels()) and waits else min(levels, limit)
            if not limit:
                return Draft.empty(len(state.ids), state.cache.device)
        token, positions = state.roots, state.positions  # (B, 1)
        chain, layers = [token[:, :0]], list[Tensor]()
        alive = torch.ones_like(token, dtype=torch.bool)  # rows whose chain goes on
        prefixes = [] if state.sampler.plain_greedy else [list(ids) for ids in state.ids]
        reach = torch.ones(token.shape, device=token.device)  # calibrated probability that a row's chain is accepted
        raw, joint = list[Tensor](), list[Tensor]()  # by level, [B, 1]: raw probability, calibrated one of the path
        limits = None if prices is None else prices.limits(limit, 1)
        for depth in range(limit):
            # Run the last token, and pick the next one
            logits, certainty, run = step(token, positions)
            if state.threshold is not None:
                alive &= (best_probability(logits) if certainty is None else certainty) >= state.threshold
                if waits and not bool(alive.any()):
                    break
                layers += [] if run is None else [run]
            token, share = _pick(state, logits, prefixes, vocab)
            if share is not None:
                alive &= token >= 0
                if waits and not bool(alive.any()):
                    break
            ends = state.threshold is not None or share is not None
            chain.append(token.masked_fill(~alive, -1) if ends else token)
            token = token.clamp_min(0)
            positions = (positions + 1).clamp_max(state.target.context - 1)  # other rows may go deeper
            # Stop where another level is not worth its price
            if limits is not None and waits:
                assert prices is not None
                own = certainty if share is None and not weighs else share
                each = _probability(logits, token, vocab) if own is None else own
                tables = torch.tensor([row[0] for row in prices.tables]) if weighs and prices.tables else None
                reach = reach * calibrated(each.float(), tables)
                raw, joint = [*raw, each], [*joint, reach]
                deeper = upload([most > depth + 1 for most in state.depths], token.device, torch.bool)
                worth = reach[:, 0] * deeper * limits.rate(depth + 1) - limits.node
                if float(worth.clamp(min=0).sum()) < limits.level:
                    break
        drafted, parents = torch.cat(chain, 1), range(len(chain) - 1)
        draft = Draft(drafted, tuple(parents))
        if weighs and joint:
            logs = torch.cat(joint, 1).clamp(min=1e-9).log().tolist()
            rows = zip(logs, drafted.tolist(), torch.cat(raw, 1).tolist(), state.depths, strict=True)
            found = [Candidates(score, ids, [*parents], [own]).within(most) for score, ids, own, most in rows]
            draft.found = CandidateSet(found, len(parents))
        draft.layers = torch.cat(layers, 1) if layers else None
        return draft


def _pick(
    state: State, logits: Tensor, prefixes: list[list[int]], vocab: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Choose the next token of each row's chain: the best draft logit, processed as the target's logits will be.

    In sampling, that includes temperature, penalties and the very noise with which the target's token will be drawn at
    this position, so that draft and target agree as often as possible.

    state: the rows of the step, with their sampler and their constraints.
    logits: draft logits after the last token of each chain, [B, V'].
    prefixes: for each row, the ids of its text and its chain so far; the chosen token is appended (0 if the id is not
        needed). []: all rows are greedy without processors.
    vocab: the token id of each logit, int64 [V']; None: logit i is of token i.

    Returns the token ids, int64 [B, 1], -1 where no token is allowed; and their probabilities [B, 1] after processing,
    normalized over the allowed tokens, if a row has a constraint, else None.
    """
    sampler, size = state.sampler, state.target.vocab_size
    if sampler.plain_greedy:
        best = logits.argmax(-1, keepdim=True)
        return best if vocab is None else vocab[best], None
    if vocab is not None and sampler.needs_prefixes:  # processors look tokens up by their ids
        full = logits.new_full((logits.shape[0], size), float("-inf"))
        full[:, vocab] = logits
        logits, vocab = full, None
    if vocab is None and not state.constrained and not is_asynchronous(logits.device):  # as the model's own draw
        token = sampler.draw(logits[:, None], lambda: [[prefix] for prefix in prefixes], [[len(p)] for p in prefixes])
        for prefix, [chosen] in zip(prefixes, token.tolist(), strict=True):
            prefix.append(max(chosen, 0))
        return token, None
    scores = sampler.scores(logits[:, None], lambda: [[prefix] for prefix in prefixes], vocab)
    noisy = sampler.perturb(scores, [[len(prefix)] for prefix in prefixes], size, vocab)[:, 0]  # (B, V')
    values, best = noisy.max(-1, keepdim=True)
    token = (best if vocab is None else vocab[best]).masked_fill(~values.isfinite(), -1)
    read = sampler.needs_prefixes or state.constrained
    for prefix, [chosen] in zip(prefixes, token.tolist() if read else [[0]] * len(prefixes), strict=True):
        prefix.append(max(chosen, 0))
    if not state.constrained:
        return token, None
    return token, scores[:, 0].softmax(-1).gather(1, best).masked_fill(token < 0, 0.0)


def first_confident(read: Callable[[int], tuple[Tensor, ...]], exits: int, confidence: float) -> tuple[Tensor, ...]:
    """Return what ``read`` returns for each row at the first exit with certainty >= ``confidence``, else at the last.

    An exit is a layer at which a drafted token may leave the model.

    read: takes an exit's number, from 0 in rising order, runs all rows there, and returns tensors [B, ...], the second
        of them the certainty [B, 1]. It is called until all rows are certain enough, if the host can tell without
        waiting for the device.
    exits: number of exits, at least 1.
    """
    found = read(0)
    for index in range(1, exits):
        on = found[1] < confidence  # (B, 1): rows that go on
        if not is_asynchronous(on.device) and not bool(on.any()):
            break
        pairs = zip(read(index), found, strict=True)
        found = tuple(torch.where(on.view(-1, *[1] * (old.dim() - 1)), new, old) for new, old in pairs)
    return found


def best_probability(logits: Tensor) -> Tensor:
    """Return the softmax probability [B, 1] of the best token of draft logits [B, V']."""
    x = logits.float()
    return torch.exp(x.amax(-1, keepdim=True) - x.logsumexp(-1, keepdim=True))


def _probability(logits: Tensor, token: Tensor, vocab: Tensor | None) -> Tensor:
    """Return the softmax probability of one token in each row, [B, 1]; 0: no logit is of this token.

    logits: [B, V']. token: token ids, int64 [B, 1]. vocab: the token id of each logit, int64 [V']; None: its index.
    """
    p = logits.float().softmax(-1)
    return p.gather(1, token) if vocab is None else (p * (vocab == token)).sum(-1, keepdim=True)
