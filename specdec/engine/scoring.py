"""Scoring a draft in one pass of the target: from where its states end, or row behind row without padding."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.devices import download, upload, waits
from specdec.kvcache.rows import RowCache
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.target import Target, largest
from specdec.speculation.draft import Draft, State, Verifier, ancestors, check_tokens
from specdec.speculation.sampling import Sampler


class Scores:
    """What a scoring pass says of a block.

    chosen: [B][1 + M], the target's choice after each block token (-1: its logits are not finite). p: its distributions
    [B, 1 + M, V], where the verifier reads them. taps: tapped states. count: tokens that were run. nodes: for each row,
    the block tokens it has, if the others were not run. logits: [n, V] of each row that wants them, one for each of its
    slots, before they are processed. fault: why the drafted tokens cannot be scored.
    """

    def __init__(self, chosen: list[list[int]], p: Tensor | None, taps: dict[int, Tensor], count: int) -> None:
        self.chosen, self.p, self.taps, self.count = chosen, p, taps, count
        self.nodes: list[list[int]] | None = None
        self.logits: dict[int, Tensor] = {}
        self.fault: str | None = None

    def slots(self, paths: list[list[int]]) -> list[list[int]]:
        """Where the tokens of ``paths`` are among the uncommitted slots of their rows."""
        if self.nodes is None:
            return paths
        return [[own.index(node) for node in path] for own, path in zip(self.nodes, paths, strict=True)]


def score(
    state: State, draft: Draft, taps: dict[int, Tensor], verifier: Verifier, wanted: Collection[int] = ()
) -> Scores:
    """Run the block through the target; choose a token after each of its own. wanted: rows whose logits are kept."""
    if len(state.ids) > 1 and state.target.ragged and draft.states is None:
        return _score_rows(state, draft, taps, verifier, wanted)
    return _score_block(state, draft, taps, verifier, wanted)


def _score_block(
    state: State, draft: Draft, taps: dict[int, Tensor], verifier: Verifier, wanted: Collection[int]
) -> Scores:
    """From where the draft's states end, in one shape for all rows."""
    target, cache, choosers = state.target, state.cache, state.sampler.rows
    tokens, positions = state.block(draft)  # (B, 1 + M)
    x, tree, exit_layer = _resume(state, draft, tokens, positions), draft.ancestors(), draft.exit_layer
    filled = _fill(state, draft, x, positions) if verifier.propagates else 0
    x, late = _after(filled, x), _after(filled, positions)
    x = target.layers(x, exit_layer, target.num_layers, Pass(late, cache.mask(exit_layer, late, tree), cache, taps))
    greedy, tapped = state.sampler.plain_greedy, target.num_layers + 1 in taps
    masked = not verifier.needs_probabilities and state.sampler.best_allowed
    p, unread = None, [draft.tokens] if draft.listed is None else []
    kept = dict[int, Tensor]()
    if greedy and not tapped and not wanted:
        *read, chosen = target.choose(x, *unread)
    else:
        logits = target.readout(x)  # (B, 1 + M - filled, V)
        kept = {b: logits[b] for b in wanted}
        if tapped:
            taps[target.num_layers + 1] = logits
        if greedy or masked:
            tokens = largest(logits)
            if waits(cache.device):
                _make_masks(state, draft)
        else:
            scores = state.sampler.scores(logits, lambda: _prefixes(state.ids, draft, filled))
            after = [[len(ids) + depth for depth in draft.depths()[filled:]] for ids in state.ids]
            tokens = state.sampler.choose(scores, after)
            p = scores.softmax(-1) if verifier.needs_probabilities else None
        *read, chosen = download(*unread, tokens)  # [B][M], [B][1 + M - filled]
    fault = None
    if read:
        draft.listed = read[0]
        if fault := check_tokens(read[0], cache.batch, len(draft.parents), target.vocab_size):
            draft.listed = [[-1] * len(draft.parents)] * cache.batch
    for b, row in enumerate(choosers):
        if masked and not row.plain_greedy:
            chosen[b] = _choose_allowed(state, draft, b, range(len(chosen[b])), logits[b], chosen[b], verifier)
    if filled:  # the tokens whose states were propagated have no scores
        chosen = [[0] * filled + row for row in chosen]
        p = None if p is None else F.pad(p, (0, 0, filled, 0))
        taps = {layer: F.pad(seen, (0, 0, filled, 0)) if seen.numel() else seen for layer, seen in taps.items()}
    scores_ = Scores(chosen, p, taps, len(chosen) * (1 + len(draft.parents)))
    scores_.fault, scores_.logits = fault, kept
    return scores_


def _make_masks(state: State, draft: Draft) -> None:
    """Make the masks of drafted tokens while the device scores them, where the host has them; others were drafted under
    masks, which are kept."""
    for b, row in enumerate(state.sampler.rows):
        if row.constraint is not None and draft.listed is not None:
            for path in ([], *draft.paths(b)):
                row.constraint.mask([*state.ids[b][row.constraint.start :], *path])


def _resume(state: State, draft: Draft, tokens: Tensor, positions: Tensor) -> Tensor:
    """The block's states [B, 1 + M, D] at the draft's exit layer: those the draft has, and the others run now."""
    target, cache, exit_layer = state.target, state.cache, draft.exit_layer
    done = 0 if draft.states is None else draft.states.shape[1]
    if draft.states is not None and done == tokens.shape[1]:
        return draft.states
    late, tree = _after(done, positions), draft.ancestors()
    y = target.embed(_after(done, tokens), late)
    if exit_layer:
        mask = cache.mask(0, late, None if tree is None else tree[done:])
        y = target.layers(y, 0, exit_layer, Pass(late, mask, cache))
    return y if draft.states is None else torch.cat((draft.states, y), 1)


def _fill(state: State, draft: Draft, x: Tensor, positions: Tensor) -> int:
    """How many block tokens need not be run deeper, their states x [B, 1 + M, D] at the exit being propagated.

    Those before the last token of every row, where drafted tokens are accepted without scoring.
    """
    filled = int((draft.tokens >= 0).sum(1).min())
    if filled:
        early, cache = positions[:, :filled], state.cache
        state.target.fill(x[:, :filled], draft.exit_layer, Pass(early, cache.mask(draft.exit_layer, early), cache))
    return filled


def _score_rows(
    state: State, draft: Draft, taps: dict[int, Tensor], verifier: Verifier, wanted: Collection[int]
) -> Scores:
    """Each row's own tokens alone, one row behind the other."""
    target, cache, lists, depths = state.target, state.cache, draft.lists(), draft.depths()
    assert isinstance(cache, RowCache)
    nodes = [_present(row, draft.parents) for row in lists]
    counts, blocks = list(map(len, nodes)), [[ids[-1], *row] for ids, row in zip(state.ids, lists, strict=True)]
    tokens = upload([[block[node] for block, own in zip(blocks, nodes, strict=True) for node in own]], cache.device)
    places = [n + depths[node] for n, own in zip(cache.rows, nodes, strict=True) for node in own]
    positions = upload([places], cache.device)  # (1, T)
    trees = [_tree(draft.parents, own) for own in nodes]
    mask = cache.mask(0, positions, counts=counts, trees=trees)
    x = target.layers(target.embed(tokens, positions), 0, target.num_layers, Pass(positions, mask, cache, taps))
    if target.num_layers + 1 in taps:
        taps[target.num_layers + 1] = target.readout(x)
    chosen, p, begin = [[0] * (1 + len(draft.parents)) for _ in nodes], list[Tensor](), 0
    kept = dict[int, Tensor]()
    drawn = [b for b, row in enumerate(state.sampler.rows) if not row.plain_greedy or b in wanted]
    plain = target.choose(x)[0][0] if len(drawn) < len(nodes) else []
    logits = dict(zip(drawn, _read_out(target, x, counts, drawn), strict=True))  # the head's weights are read once
    for b, (own, chooser) in enumerate(zip(nodes, state.sampler.rows, strict=True)):
        end = begin + len(own)
        found, ids, raw = plain[begin:end], state.ids[b], logits.pop(b, None)
        if raw is not None and chooser.plain_greedy:
            found = largest(raw)[0].tolist()
        elif raw is not None and chooser.masked_greedy and not verifier.needs_probabilities:
            found = _choose_allowed(state, draft, b, own, raw[0], largest(raw)[0].tolist(), verifier)
        elif raw is not None:
            sampler, before = Sampler.of([chooser]), functools.partial(_prefixes_of, ids, draft, b, own)
            scores = sampler.scores(raw, lambda before=before: [before()])  # type: ignore[misc]
            found = sampler.choose(scores, [[len(ids) + depths[node] for node in own]])[0].tolist()
        if verifier.needs_probabilities and not state.sampler.plain_greedy:
            certain = F.one_hot(upload([found], cache.device).clamp_min(0), target.vocab_size).float()
            share = certain if chooser.plain_greedy else scores.softmax(-1)
            p.append(_padded(share, [own], 1 + len(draft.parents)))
        if raw is not None and b in wanted:
            kept[b] = raw[0]
        for node, token in zip(own, found, strict=True):
            chosen[b][node] = token
        begin = end
    for layer, states in taps.items():
        if states.dim() > 1:
            taps[layer] = _padded(states, nodes, 1 + len(draft.parents))
    scored = Scores(chosen, torch.cat(p) if p else None, taps, sum(counts))
    scored.nodes, scored.logits = nodes, kept
    return scored


def _choose_allowed(
    state: State, draft: Draft, b: int, nodes: Sequence[int], logits: Tensor, found: list[int], verifier: Verifier
) -> list[int]:
    """What the target chooses after the block tokens ``nodes`` of row ``b`` under the row's constraint [T].

    logits: [T, V], raw. found: [T], the largest. Masks are made along what is accepted alone: choices after other
    tokens do not count, and stay as they are.
    """
    constraint, chosen = state.sampler.rows[b].constraint, list(found)
    texts = {0: state.ids[b]}  # of the accepted tokens
    place = {node: t for t, node in enumerate(nodes)}
    assert constraint is not None
    for t, node in enumerate(nodes):
        if node:
            token, parent = draft.lists()[b][node - 1], draft.parents[node - 1]
            if parent not in texts or not verifier.accepts(token, chosen[place[parent]]):
                continue
            texts[node] = [*texts[parent], token]
        mask = constraint.mask(texts[node][constraint.start :])
        if mask is None:
            chosen[t] = -1
        elif chosen[t] >= 0 and not mask[chosen[t]]:
            ids = torch.from_numpy(np.flatnonzero(mask.numpy()))  # in one thread: a team of them takes longer to wake
            row = logits[t].index_select(0, ids.to(logits.device))
            best = int(largest(row[None, None])) if len(ids) else -1
            chosen[t] = int(ids[best]) if best >= 0 else -1
    return chosen


def _read_out(target: Target, x: Tensor, counts: Sequence[int], rows: Sequence[int]) -> Sequence[Tensor]:
    """Logits [1, n, V] of each of ``rows``, whose tokens are among those of all rows in ``x`` [1, T, D]."""
    if not rows:
        return ()
    parts = x.split(list(counts), 1)
    some = x if len(rows) == len(counts) else torch.cat([parts[b] for b in rows], 1)
    return target.readout(some).split([counts[b] for b in rows], 1)


def _present(row: list[int], parents: tuple[int, ...]) -> list[int]:
    """The block tokens that a row has: the root, and the nodes with a token whose parents are there."""
    own, there = [0], {0}
    for node, (token, parent) in enumerate(zip(row, parents, strict=True), start=1):
        if token >= 0 and parent in there:
            own.append(node)
            there.add(node)
    return own


def _tree(parents: tuple[int, ...], own: list[int]) -> Tensor | None:
    """Which of a row's block tokens lie on each other's paths, bool [n, n]; None for a chain."""
    place = {node: at for at, node in enumerate(own)}
    return ancestors(tuple(place[parents[node - 1]] for node in own[1:]))


def _padded(x: Tensor, nodes: Sequence[Sequence[int]], count: int) -> Tensor:
    """``x`` [1, T, D], the rows' tokens one behind the other -> [B, count, D]."""
    out = x.new_zeros(len(nodes), count, x.shape[2])
    rows = [b for b, own in enumerate(nodes) for _ in own]
    out[rows, [node for own in nodes for node in own]] = x[0]
    return out


def _after(count: int, x: Tensor) -> Tensor:
    """``x`` [B, T, ...] without the first ``count`` tokens. A slice costs as much if it takes everything."""
    return x[:, count:] if count else x


def _prefixes(ids: list[list[int]], draft: Draft, start: int = 0) -> Sequence[Sequence[Sequence[int]]]:
    """The tokens up to and including each block token from ``start`` on, per row: what a logits processor reads."""
    every = range(start, 1 + len(draft.parents))
    return [_prefixes_of(row, draft, b, every) for b, row in enumerate(ids)]


def _prefixes_of(ids: list[int], draft: Draft, row: int, nodes: Sequence[int]) -> Sequence[Sequence[int]]:
    block = [ids]
    for token, parent in zip(draft.lists()[row], draft.parents, strict=True):
        block.append([*block[parent], max(token, 0)])
    return [block[node] for node in nodes]
