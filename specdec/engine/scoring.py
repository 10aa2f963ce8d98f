"""Scoring a draft in one pass of the target, from where its states end, or row behind row without padding."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.devices import download, is_asynchronous, upload
from specdec.runtimes.target import Pass, largest
from specdec.speculation.draft import Draft, ancestors, check_tokens
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.state import State
from specdec.speculation.verifier import Verifier

LIKELIEST = 64  # tokens at a position of a constrained row that a device returns, so that few steps read it again


@dataclass
class Scores:
    """The result of scoring a block: the root (block index 0) and the drafted nodes (1 .. M) of each row.

    chosen: token that the target chooses after each block token, [B][1 + M] (-1: its logits are not finite). Entries of
        nodes that a row does not have mean nothing.
    p: the probabilities by which the target's sampler draws after each block token, [B, 1 + M, V]; one-hot in greedy
        rows. None: the verifier does not read them, or all rows are greedy.
    taps: for the drafter: hidden states [B, 1 + M, D] (second index: block index) by the layer that they are the input
        of; N has the output of the last layer, before the final norm, and N + 1 the logits [B, 1 + M, V]. Layers below
        the draft's ``exit_layer``, which are not run, have empty tensors.
    count: number of tokens that were run, of all rows.
    nodes: the block indices of each row that were run, in the order of the run; None: all were, by block index.
    logits: by the index of a row in the batch, raw logits [n, V] after each of its n tokens that were run, before any
        processor; only for the rows that were asked for.
    fault: why the drafted tokens cannot be scored; None: they were.
    """

    chosen: list[list[int]]
    p: Tensor | None
    taps: dict[int, Tensor]
    count: int
    nodes: list[list[int]] | None = None
    logits: dict[int, Tensor] = field(default_factory=dict)
    fault: str | None = None

    def slots(self, paths: list[list[int]]) -> list[list[int]]:
        """Return, for each token of a path, its index among the row's uncommitted tokens in the KV cache.

        These are the tokens that were run, in the order of the run, so that ``KVCache.commit`` can take the result.

        paths: for each row, the block indices of a path, the root (0) first.

        Returns a list of indices for each row, of the same lengths as ``paths``.
        """
        if self.nodes is None:
            return paths
        return [[own.index(node) for node in path] for own, path in zip(self.nodes, paths, strict=True)]


def score(
    state: State, draft: Draft, taps: dict[int, Tensor], verifier: Verifier, logit_rows: Collection[int] = ()
) -> Scores:
    """Run each row's root and drafted tokens through the target in one pass, and choose a token after each of them.

    The keys and values of these tokens stay in ``state.cache``, uncommitted. Tokens that cannot be scored raise no
    error: ``Scores.fault`` says why, and ``draft`` has no tokens afterwards.

    state: the rows, with their KV cache and sampler. draft: the drafted tokens.
    taps: its keys are the layers whose input states are wanted; the values are replaced by these states (as in
        ``Scores.taps``).
    verifier: says whether distributions are needed, and which drafted tokens it accepts.
    logit_rows: batch indices of the rows whose raw logits are returned, too (``Scores.logits``).
    """
    scorer = _Scorer(state, draft, taps, verifier, logit_rows)
    ragged = len(state.ids) > 1 and state.target.ragged and draft.states is None
    return scorer.rows() if ragged else scorer.block()


@dataclass
class _Scorer:
    """The arguments of ``score``, with one method for each of the two ways to run them: ``block`` and ``rows``.

    A *block index* numbers what is scored of a row: 0 is the root, 1 .. M are the nodes of the draft, parents first.
    """

    state: State
    draft: Draft
    taps: dict[int, Tensor]
    verifier: Verifier
    logit_rows: Collection[int]

    def block(self) -> Scores:
        """Score all rows in one pass over tokens [B, 1 + M], with padding where rows have fewer nodes.

        Layers below the draft's ``exit_layer`` are not run again for tokens whose states the draft has.
        """
        state, draft, taps, verifier = self.state, self.draft, self.taps, self.verifier
        target, cache, sampler, readout = state.target, state.cache, state.sampler, state.target.num_layers + 1
        # Run
        tokens, positions = state.block(draft)  # (B, 1 + M)
        x, tree, exit_layer = self._resume(tokens, positions), draft.ancestors(), draft.exit_layer
        mask, embedded = cache.register(exit_layer, positions, tree), draft.states is None
        ctx = Pass(positions, mask, cache, taps, ids=tokens, in_place=embedded)
        x = target.layers(x, exit_layer, target.num_layers, ctx)
        # Choose, and read drafted tokens that only the device has
        # A device had better choose after all tokens at once, unless masks come from the host.
        along = not verifier.needs_probabilities and (sampler.best_allowed or not is_asynchronous(cache.device))
        p, fault, order, unread = None, None, None, draft.unread
        row_logits: dict[int, Tensor] = {}
        likely: list[Tensor] = []
        if sampler.plain_greedy and readout not in taps and not self.logit_rows:
            *read, chosen = target.greedy_tokens(x, *unread)
        else:
            logits = target.readout(x)  # (B, 1 + M, V)
            row_logits = {b: logits[b] for b in self.logit_rows}
            if readout in taps:
                taps[readout] = logits
            if sampler.plain_greedy or along:
                needed = any(row.plain_greedy or row.masked_greedy for row in sampler.rows)
                tokens = largest(logits) if needed else torch.zeros(logits.shape[:2], dtype=torch.long)
                if is_asynchronous(cache.device):
                    self._make_masks()
                    likely = [_likeliest(logits)] if any(row.masked_greedy for row in sampler.rows) else []
            else:
                every = range(1 + len(draft.parents))
                scores = sampler.scores(logits, lambda: [self._prefixes(b, every) for b in range(len(state.ids))])
                held, deepest = draft.held, max(state.depths)
                depths = draft.depths() if held is None else range(1 + min(held.tokens.shape[1], deepest))
                after = [[len(ids) + depth for depth in depths] for ids in state.ids]
                tokens = sampler.choose(scores, after, None if held is None else held.depths)
                if verifier.needs_probabilities and not sampler.greedy:
                    p, certain = scores.softmax(-1), [b for b, row in enumerate(sampler.rows) if row.greedy]
                    p[certain] = _point_masses(tokens[certain], target.vocab_size)
            *read, chosen = download(*unread, *likely, tokens)  # [B][M], [B][(1 + M) 2 k], [B][1 + M]
        others = [_Likeliest.of(row, len(own)) for row, own in zip(read.pop(), chosen, strict=True)] if likely else []
        if read:
            order = draft.receive(read[0])
            if fault := check_tokens(draft.lists(), cache.batch, len(draft.parents), target.vocab_size):
                draft.listed = [[-1] * len(draft.parents)] * cache.batch
        if order is not None and len(order) > 1:
            p = self._reorder(order, chosen, p)
        for b, row in enumerate(sampler.rows):
            if along and not row.plain_greedy:
                best = chosen[b] if row.masked_greedy else None
                more = others[b] if others else []
                chosen[b] = self._choose_along(b, range(1 + len(draft.parents)), logits[b], best, more)
        return Scores(chosen, p, taps, positions.numel(), order, row_logits, fault)

    def _reorder(self, order: list[list[int]], chosen: list[list[int]], p: Tensor | None) -> Tensor | None:
        """Sort the results of a run by block index, for trees that the device has built; return ``p`` sorted.

        The device runs the tokens of each row in an order of its own. ``chosen`` and the states in ``taps`` are changed
        in place: afterwards entry i of a row belongs to block index i, and a node that the row lacks has the root's
        entry.

        order: for each row, the block index of each of its T tokens, in the order of the run; -1: none.
        chosen: the target's choice after each token, [B][T] in the order of the run.
        p: the target's distributions [B, T, V] in the order of the run; None: the verifier does not need them.
        """
        count = 1 + len(self.draft.parents)
        where = [[own.index(node) if node in own else 0 for node in range(count)] for own in order]
        chosen[:] = [[own[at] for at in slots] for own, slots in zip(chosen, where, strict=True)]
        index = upload(where, self.state.cache.device)[..., None]
        for layer, states in self.taps.items():
            if states.dim() > 1:
                self.taps[layer] = states.gather(1, index.expand(-1, -1, states.shape[2]))
        return None if p is None else p.gather(1, index.expand(-1, -1, p.shape[2]))

    def _resume(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states [B, 1 + M, D] of all block tokens at the input of the draft's ``exit_layer``.

        Those that ``draft.states`` lacks are computed by the layers below it.

        tokens, positions: the block's tokens and their positions, int64 [B, 1 + M] each.
        """
        draft, target, cache, exit_layer = self.draft, self.state.target, self.state.cache, self.draft.exit_layer
        done = 0 if draft.states is None else draft.states.shape[1]
        if draft.states is not None and done == tokens.shape[1]:
            return draft.states
        late, tree = _after(done, positions), draft.ancestors()
        y = target.embed(_after(done, tokens), late)
        if exit_layer:
            mask = cache.register(0, late, None if tree is None else tree[done:])
            y = target.layers(y, 0, exit_layer, Pass(late, mask, cache, ids=_after(done, tokens)))
        return y if draft.states is None else torch.cat((draft.states, y), 1)

    def rows(self) -> Scores:
        """Score the root and only the nodes that each row has, with the rows concatenated without padding, in one pass.

        The target must be able to run rows of different lengths in a pass (``Target.ragged``), and the draft have no
        hidden states to resume from (``Draft.states``). ``Scores.nodes`` has the block indices that ran.
        """
        state, draft, taps, verifier = self.state, self.draft, self.taps, self.verifier
        target, cache, lists, depths = state.target, state.cache, draft.lists(), draft.depths()
        # Run
        nodes = [_present(row, draft.parents) for row in lists]
        counts, blocks = list(map(len, nodes)), [[ids[-1], *row] for ids, row in zip(state.ids, lists, strict=True)]
        tokens = upload([[block[node] for block, own in zip(blocks, nodes, strict=True) for node in own]], cache.device)
        places = [n + depths[node] for n, own in zip(cache.rows, nodes, strict=True) for node in own]
        positions = upload([places], cache.device)  # (1, T)
        mask = cache.register(0, positions, counts=counts, trees=[_tree(draft.parents, own) for own in nodes])
        given = Pass(positions, mask, cache, taps, ids=tokens)
        x = target.layers(target.embed(tokens, positions), 0, target.num_layers, given)
        if target.num_layers + 1 in taps:
            taps[target.num_layers + 1] = target.readout(x)
        # Choose: plain greedy rows all at once; the others from logits, for which the head's weights are read once
        width, p, row_logits, begin = 1 + len(draft.parents), list[Tensor](), dict[int, Tensor](), 0
        chosen = [[0] * width for _ in nodes]
        read = [b for b, row in enumerate(state.sampler.rows) if not row.plain_greedy or b in self.logit_rows]
        plain = target.greedy_tokens(x)[0][0] if len(read) < len(nodes) else []
        logits = dict(zip(read, self._read_out(x, counts, read), strict=True))
        for b, (own, row) in enumerate(zip(nodes, state.sampler.rows, strict=True)):
            end = begin + len(own)
            found, raw = plain[begin:end], logits.pop(b, None)
            if raw is not None and row.plain_greedy:
                found = largest(raw)[0].tolist()
            elif raw is not None and not verifier.needs_probabilities:
                found = self._choose_along(b, own, raw[0], largest(raw)[0].tolist() if row.masked_greedy else None)
            elif raw is not None:
                sampler = Sampler([row])
                scores = sampler.scores(raw, lambda b=b, own=own: [self._prefixes(b, own)])  # type: ignore[misc]
                found = sampler.choose(scores, [[len(state.ids[b]) + depths[node] for node in own]])[0].tolist()
            if verifier.needs_probabilities and not state.sampler.greedy:
                if row.greedy:
                    likely = _point_masses(upload([found], cache.device), target.vocab_size)
                else:
                    likely = scores.softmax(-1)
                p.append(_padded(likely, [own], width))
            if raw is not None and b in self.logit_rows:
                row_logits[b] = raw[0]
            for node, token in zip(own, found, strict=True):
                chosen[b][node] = token
            begin = end
        for layer, states in taps.items():
            if states.dim() > 1:
                taps[layer] = _padded(states, nodes, width)
        return Scores(chosen, torch.cat(p) if p else None, taps, sum(counts), nodes, row_logits)

    def _read_out(self, x: Tensor, counts: Sequence[int], rows: Sequence[int]) -> Sequence[Tensor]:
        """Return, for each of ``rows``, the raw logits after its n tokens, [1, n, V]; all in one pass of the head.

        x: output of the last layer, before the final norm, for the tokens of all rows one row after the other,
            [1, T, D].
        counts: for each row of the batch, its number n of tokens in ``x``.
        rows: batch indices of the rows to read, rising; (): nothing is computed.
        """
        if not rows:
            return ()
        parts = x.split(list(counts), 1)
        some = x if len(rows) == len(counts) else torch.cat([parts[b] for b in rows], 1)
        return self.state.target.readout(some).split([counts[b] for b in rows], 1)

    def _make_masks(self) -> None:
        """Compute the constraints' masks after drafted tokens while the device scores.

        ``ConstraintState.mask`` caches them. No effect if only the device has the drafted tokens.
        """
        for b, row in enumerate(self.state.sampler.rows):
            if row.constraint is not None and self.draft.listed is not None:
                for path in ([], *self.draft.paths(b)):
                    row.constraint.mask(self.state.ids[b], path)

    def _choose_along(
        self,
        b: int,
        nodes: Sequence[int],
        logits: Tensor,
        best: list[int] | None,
        others: Sequence[_Likeliest] = (),
    ) -> list[int]:
        """Return the target's choice after each of T block tokens of the row with batch index ``b``.

        Logits are processed only along accepted tokens; choices after other tokens do not count, and are 0.

        nodes: block indices of the T tokens, parents first.
        logits: raw logits after the tokens, [T, V].
        best: argmax of each of them, [T], if the row takes the best token that its constraint allows; else None.
        others: the likeliest tokens of each of them, [T]; (): they were not read.
        """
        row, chosen = self.state.sampler.rows[b], [0] * len(nodes)
        texts = {0: self.state.ids[b]}  # of the accepted tokens
        place = {node: t for t, node in enumerate(nodes)}
        for t, node in enumerate(nodes):
            if node:
                token, parent = self.draft.lists()[b][node - 1], self.draft.parents[node - 1]
                if parent not in texts or not self.verifier.accepts(token, chosen[place[parent]]):
                    continue
                texts[node] = [*texts[parent], token]
            own = logits[t, None, None]  # (1, 1, V)
            if best is None:
                sampler, text = Sampler([row]), texts[node]
                chosen[t] = int(sampler.draw(own, lambda text=text: [[text]], [[len(text)]]))  # type: ignore[misc]
            else:
                chosen[t] = _best_allowed(row, texts[node], own, best[t], others[t] if others else None)
        return chosen

    def _prefixes(self, b: int, nodes: Sequence[int]) -> Sequence[Sequence[int]]:
        """Return, for each of the block tokens ``nodes``, the ids of row ``b``'s text up to and including the token."""
        block = [self.state.ids[b]]
        for token, parent in zip(self.draft.lists()[b], self.draft.parents, strict=True):
            block.append([*block[parent], max(token, 0)])
        return [block[node] for node in nodes]


class _Likeliest(NamedTuple):
    """The k likeliest tokens at a position: their ids, best first, and their logits."""

    ids: list[int]
    logits: list[float]

    @classmethod
    def of(cls, row: list[int], count: int) -> list[_Likeliest]:
        """Unpack the result of ``_likeliest`` for one row; return one object for each position.

        row: the row's T 2 k integers: for each position k token ids, then the bits of their k logits.
        count: T, the number of positions.
        """
        whole = np.array(row).reshape(count, 2, -1)
        logits = whole[:, 1].astype(np.int32).view(np.float32)
        return [cls(*each) for each in zip(whole[:, 0].tolist(), logits.tolist(), strict=True)]

    def best(self, allowed: Tensor) -> int | None:
        """Return the likeliest of these k tokens that is allowed; among equally likely ones, the smallest id.

        None: none of the k is allowed, or the largest allowed logit is not finite, or equals the smallest of the k, so
        that an allowed token outside of the k may be as likely.

        allowed: whether each token of the vocabulary may come, bool [V].
        """
        there = [(token, logit) for token, logit in zip(self.ids, self.logits, strict=True) if allowed[token]]
        # Tokens that are not here may be as likely as the last one that is
        if not there or there[0][1] == self.logits[-1] or not math.isfinite(there[0][1]):
            return None
        return min(token for token, logit in there if logit == there[0][1])


def _likeliest(logits: Tensor) -> Tensor:
    """Return the k = ``LIKELIEST`` likeliest tokens at each position of logits [B, T, V], as int64 [B, T 2 k].

    For each position come k token ids, best first, and then the bit patterns of their k logits in float32, so that one
    read gets both. k is V if V is smaller. ``_Likeliest.of`` unpacks a row.
    """
    values, ids = logits.float().topk(min(LIKELIEST, logits.shape[-1]))
    return torch.stack((ids, values.view(torch.int32).long()), 2).flatten(1)


def _best_allowed(
    row: RowSampler, text: Sequence[int], logits: Tensor, best: int, others: _Likeliest | None = None
) -> int:
    """Return the token with the largest logit that the row's constraint allows after ``text``; -1: there is none.

    logits: raw logits after ``text``, [1, 1, V].
    text: ids of the prompt and the tokens after it, up to the position.
    best: the argmax of ``logits``; -1: they are not finite. others: the likeliest tokens; None: they are not known.
    """
    constraint = row.constraint
    assert constraint is not None
    mask = constraint.mask(text)
    if mask is None or best < 0 or mask[best]:
        return -1 if mask is None else best
    if others is not None and (found := others.best(mask)) is not None:
        return found
    ids = torch.from_numpy(np.flatnonzero(mask.numpy()))  # in one thread: waking a team takes longer
    at = int(largest(logits.index_select(2, upload(ids, logits.device)))) if len(ids) else -1
    return int(ids[at]) if at >= 0 else -1


def _point_masses(chosen: Tensor, size: int) -> Tensor:
    """Return one-hot distributions [B, T, V = ``size``] of the tokens ``chosen`` [B, T]; all zero where one is -1."""
    return F.one_hot(chosen.clamp_min(0), size).float() * (chosen >= 0)[..., None]


def _present(row: list[int], parents: tuple[int, ...]) -> list[int]:
    """Return the block indices that a row has: 0 (the root), and nodes with a token whose parent the row has, too.

    row: the token of each node, [M]; -1: the row lacks it. parents: the block index of each node's parent.
    """
    own, there = [0], {0}
    for node, (token, parent) in enumerate(zip(row, parents, strict=True), start=1):
        if token >= 0 and parent in there:
            own.append(node)
            there.add(node)
    return own


def _tree(parents: tuple[int, ...], own: list[int]) -> Tensor | None:
    """Return the attention mask bool [n, n] of the block indices ``own``; None: they are a chain.

    Row i marks ``own[i]`` and its ancestors. parents: the block index of each node's parent, of the whole draft.
    """
    place = {node: at for at, node in enumerate(own)}
    return ancestors(tuple(place[parents[node - 1]] for node in own[1:]))


def _padded(x: Tensor, nodes: Sequence[Sequence[int]], count: int) -> Tensor:
    """Return ``x`` [1, T, D], which has the rows' tokens concatenated, as [B, count, D] by block index.

    nodes: for each row, the block index of each of its tokens. Other block indices get zeros.
    """
    out = x.new_zeros(len(nodes), count, x.shape[2])
    rows = [b for b, own in enumerate(nodes) for _ in own]
    out[rows, [node for own in nodes for node in own]] = x[0]
    return out


def _after(count: int, x: Tensor) -> Tensor:
    """Return ``x`` [B, T, ...] without the first ``count`` tokens."""
    return x[:, count:] if count else x
