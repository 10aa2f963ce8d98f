"""Drafting token by token with a model: what every drafter that does so shares.

The chain follows the preferred tokens; siblings beside it cost no drafting, only scoring. Knows how tokens are picked
from logits, not where the logits come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.draft import Draft, State
from specdec.sampling import draw


class _Nodes:
    """Draft nodes being collected: tokens [B, n] and distributions [B, V], under the chain's node at ``depth``."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.q: list[Tensor] = []
        self.parents: list[int] = []

    def add(self, tokens: Tensor, q: list[Tensor], depth: int) -> None:
        self.tokens.append(tokens)
        self.q += q
        self.parents += [depth] * tokens.shape[1]  # chain node i has block index i + 1, the root 0


def draft_chain(
    state: State,
    limit: int,
    step: Callable[[Tensor, Tensor], Tensor],
    siblings: Sequence[int] = (),
    vocab: Tensor | None = None,
    certainty: Callable[[Tensor], Tensor] | None = None,
) -> Draft:
    """Draft up to ``limit`` tokens after each row's root; the chain's nodes come first, then the siblings.

    step: takes tokens and their positions (int64 [B, 1]) and returns the logits [B, V'] of what follows them; asked
        first for the roots, then for each drafted token but the last.
    siblings: number of further candidates at each depth of the chain (depths beyond its length have none).
    vocab: int64 [V'], the tokens that logits are over; None: all of the target's.
    certainty: takes the logits of a step and returns the probability [B, 1] that their best token is the model's; None:
        what the logits say themselves.
    Ends early once no row's whole chain stands with a probability of ``state.confidence``. Where nothing will be
    judged, a row's chain ends before the first token less certain than ``state.threshold``, and has no siblings.
    """
    chain, beside = _Nodes(), _Nodes()
    token, positions = state.roots, state.positions  # (B, 1)
    going = torch.ones_like(token, dtype=torch.bool)  # rows whose chain goes on
    none = token[:, :0]
    prefixes = [list(ids) for ids in state.ids]
    reach = torch.ones(token.shape, device=token.device)  # probability that a row's whole chain stands
    for depth in range(limit):
        logits = step(token, positions)
        width = 1 + (siblings[depth] if depth < len(siblings) else 0)
        if state.threshold is not None:
            width, sure = 1, best_probability(logits) if certainty is None else certainty(logits)
            going &= sure >= state.threshold
            if not bool(going.any()):
                break
        tokens, q = _pick(state, logits, width, prefixes, vocab)
        token = tokens[:, :1]
        chain.add(token if state.threshold is None else token.masked_fill(~going, -1), q[:1], depth)
        beside.add(tokens[:, 1:], q[1:], depth)
        positions = positions + 1
        if state.confidence > 0:
            reach = reach * (_probability(logits, token, vocab) if certainty is None else certainty(logits))
            if float(reach.max()) < state.confidence:
                break
    every = [*chain.q, *beside.q]
    return Draft(
        torch.cat((none, *chain.tokens, *beside.tokens), 1),
        (*chain.parents, *beside.parents),
        q=torch.stack(every, 1) if every else None,
    )


def within(siblings: Sequence[int], depth: int, spare: int) -> list[int]:
    """The most promising ``spare`` of the ``siblings`` of a chain of ``depth``: first ones first, then early ones."""
    out = [0] * depth
    for level in range(max(siblings, default=0)):
        for at, wanted in enumerate(siblings[:depth]):
            if wanted > level and spare > 0:
                out[at], spare = out[at] + 1, spare - 1
    return out


def _pick(
    state: State, logits: Tensor, width: int, prefixes: list[list[int]], vocab: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Tokens [B, width] after the chain's end, from draft logits [B, V'], and the distribution of each if sampled.

    The first continues the chain (and is appended to its ``prefixes``); the others are its siblings, in order of
    preference (greedy: the most likely tokens; sampling: draws without replacement, each with its own distribution
    [B, V]).
    """
    if state.sampler.plain_greedy:
        best = logits.topk(width).indices if width > 1 else logits.argmax(-1, keepdim=True)
        return (best if vocab is None else vocab[best]), []
    small = vocab is not None and not state.sampler.prefix_processors  # processors look tokens up by their ids
    if vocab is not None and not small:
        full = logits.new_full((logits.shape[0], state.target.vocab_size), float("-inf"))
        full[:, vocab] = logits
        logits = full
    p = state.sampler.distribution(logits[:, None], lambda: [[prefix] for prefix in prefixes])[:, 0]  # (B, V or V')
    if state.sampler.greedy:
        # Processed logits are a point mass: siblings would have no probability to be anything else.
        chosen, q = p.argmax(-1, keepdim=True), list[Tensor]()
    else:
        chosen, q = _without_replacement(p, width, state.sampler.generators)
        if small and vocab is not None:
            chosen = torch.where(chosen < 0, chosen, vocab[chosen.clamp_min(0)])
            q = [row.new_zeros(row.shape[0], state.target.vocab_size).index_copy_(1, vocab, row) for row in q]
    for prefix, token in zip(prefixes, chosen[:, 0].tolist(), strict=True):
        prefix.append(token)
    return chosen, q


def _without_replacement(p: Tensor, count: int, generators: list[torch.Generator]) -> tuple[Tensor, list[Tensor]]:
    """Draw ``count`` distinct tokens per row of p [B, V]: tokens [B, count] and the distribution of each draw.

    A row that runs out of mass gets -1: no such node.
    """
    tokens, q = [], []
    for _ in range(count):
        mass = p.sum(-1, keepdim=True)  # (B, 1)
        p = torch.where(mass > 0, p / mass, p)
        alive = mass[:, 0] > 0
        drawn = [draw(row, g) if a else -1 for row, g, a in zip(p, generators, alive.tolist(), strict=True)]
        token = torch.tensor(drawn, device=p.device)[:, None]
        tokens.append(token)
        q.append(p)
        p = p.scatter(1, token.clamp_min(0), 0.0)
    return torch.cat(tokens, 1), q


def best_probability(logits: Tensor) -> Tensor:
    """The probability [B, 1] that draft logits [B, V'] give their best token."""
    x = logits.float()
    return torch.exp(x.amax(-1, keepdim=True) - x.logsumexp(-1, keepdim=True))


def _probability(logits: Tensor, token: Tensor, vocab: Tensor | None) -> Tensor:
    """What the draft itself gives ``token`` [B, 1], from its logits [B, V'] -> [B, 1]; 0 outside its vocabulary."""
    p = logits.float().softmax(-1)
    if vocab is None:
        return p.gather(1, token)
    return (p * (vocab == token)).sum(-1, keepdim=True)
