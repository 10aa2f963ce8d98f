"""Drafting level by level on tensors: grows a draft tree for one row (sequence), or chains with siblings for several.

A level is all draft nodes of one depth. The likeliest few nodes of each level get children, in one forward pass. As in
EAGLE-2 (arXiv 2406.16858), the score of a node is the product of the drafter's own probabilities along its path. If no
limit or mask has to be computed on the CPU, all levels can be captured as one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.base.devices import upload
from specdec.runtimes.draft_path import (
    DeviceChoice,
    DeviceTree,
    DraftPath,
    DraftRoots,
    LevelNodes,
    Masks,
    Nodes,
    Sampled,
    TreeLimits,
    calibrated,
)

# Tokens of a level, int64 [B, W], the indices of their parents in the level before, int64 [B, W], and which of all U
# tokens run so far are on their paths, bool [B, W, U] (None: a chain) -> logits [B, W, V'], or [B, 1, V'] for all.
Step = Callable[[Tensor, Tensor, Tensor | None], Tensor]
DRAWN = 64  # of how many of the likeliest tokens the noise chooses
FOUND = 24  # candidates of a row that the host reads of a tree


class Rules(NamedTuple):
    """What decides, besides the draft logits, which tokens become candidates of a draft, for B rows.

    A draft has ``levels`` levels (depths), of W nodes each that get children; k candidates are considered after a node.

    vocab: token ids of the V' draft logits, int64 [V']; None: the index of a logit is its token id.
    tables: for each row three tables that map raw probabilities to calibrated ones, [B, 3, 11] (calibrated
        probabilities at 11 fixed log-odds of raw ones, ``DraftRoots.tables``): for the draft heads; for the other
        source's tokens that the heads also have or that follow a node where the heads have no candidates; and for its
        other tokens. [B, 1, 11] without ``given``. None: probabilities are used as they are.
    noise: Gumbel noise by which sampled rows will draw: a tensor [B, levels, V], or a function of (level, token ids [B,
        W, k]) that returns the noise of these tokens. None: all rows are greedy.
    sampling: 1 / temperature (0: greedy), top-k, top-p and min-p of each row, float32 [B, 4]; None: all rows are
        greedy.
    given: trees of another source (predictor of tokens), such as n-grams, that are merged into the draft; None: there
        are none.
    forbidden: outputs of the second draft head (``DraftPath.heads``, whose logits are concatenated) that a row may not
        draft, bool [B, outputs]; None: all are allowed.
    masks: function on the CPU from the drafted token ids after the root to the tokens that may follow (bool [V]; None:
        none may). Only for a single row; None: all tokens are allowed.
    """

    vocab: Tensor | None = None
    tables: Tensor | None = None
    noise: Tensor | Callable[[int, Tensor], Tensor] | None = None
    sampling: Tensor | None = None
    given: LevelNodes | None = None
    forbidden: Tensor | None = None
    masks: Masks | None = None


def rules_of(roots: DraftRoots, vocab: Tensor | None, levels: int, size: int, waits: bool) -> Rules:
    """Return the ``Rules`` of a draft, as tensors on the device of ``roots``.

    roots: the root tokens and states of B rows, with their sampling, calibration tables and trees of other sources.
    vocab: token ids of the draft logits, int64 [V']; None: the index of a logit is its token id.
    levels: number of draft levels.
    size: V, the size of the model's vocabulary.
    waits: whether the CPU may read the candidate tokens during the draft. If so, sampling noise is made for them alone;
        if not, for the whole vocabulary beforehand.
    """
    device, noise, sampling = roots.final.device, None, None
    tables = None if roots.tables is None else upload(roots.tables, device, torch.float32)
    if roots.sampled is not None:
        noise, sampling = noise_of(roots.sampled, levels, size, device, waits)
    return Rules(vocab, tables, noise, sampling, given_of(roots.given, device), roots.forbidden, roots.masks)


def noise_of(
    sampled: Sequence[Sampled], levels: int, size: int, device: torch.device, waits: bool = False
) -> tuple[Tensor | Callable[[int, Tensor], Tensor], Tensor]:
    """Return (noise, sampling) of B rows of which at least one is sampled, as the fields of ``Rules`` hold them.

    A level is all draft nodes of one depth, which have one position in the text. ``noise`` is the Gumbel noise with
    which each row will draw its tokens at the drafted positions: a tensor [B, levels, V] on ``device`` or, if
    ``waits``, a function of (level, token ids [B, W, k]) that returns the noise of these tokens on the CPU. W is the
    number of tokens of the level, and k the number of candidates after each. Greedy rows get noise, too, which is not
    used. ``sampling`` is [B, 4]: 1 / temperature (0: the row is greedy), top-k, top-p and min-p.

    sampled: how each row is sampled. levels: number of draft levels. size: V, the size of the model's vocabulary.
    waits: whether the CPU may read the candidate tokens during the draft.
    """
    each = [[1 / s.temperature if s.temperature else 0.0, s.top_k, s.top_p, s.min_p] for s in sampled]
    sampling = upload(each, device, torch.float32)
    if waits:
        return partial(_noise_of, sampled, size), sampling
    rows = [torch.stack([s.noise(s.place + level, size, None) for level in range(levels)]) for s in sampled]
    return upload(torch.stack(rows), device, torch.float32), sampling


def _noise_of(sampled: Sequence[Sampled], size: int, level: int, ids: Tensor) -> Tensor:
    """Return the Gumbel noise of candidate tokens at one draft level, float32 [B, W, k] on the CPU.

    sampled: how each row is sampled, with the function that makes its noise. size: V, the size of the vocabulary.
    level: index of the draft level, from 0 on. ids: token ids [B, W, k].
    """
    rows = [s.noise(s.place + level, size, own.flatten()).view_as(own) for s, own in zip(sampled, ids, strict=True)]
    return torch.stack(rows)


def given_of(trees: Sequence[Nodes] | None, device: torch.device) -> LevelNodes | None:
    """Convert another source's draft trees, one per row (sequence), to tensors on ``device``, padded to G nodes.

    G is a power of two. Padding has the score -inf, and -1 as token and as parent.

    trees: for each row the lists (scores, tokens, parents, raw): log-probabilities of the nodes' paths, token ids,
        parents (0: the root, i + 1: node i), and a list with one list, the source's own probability of each node after
        its parent. None: there are no trees, and None is returned.
    """
    if trees is None:
        return None
    count = 1 << max(max(len(nodes[1]) for nodes in trees) - 1, 0).bit_length()
    rows = list[list[list[float]]]()
    for scores, tokens, parents, raw in trees:
        depths, none = [0], count - len(tokens)
        for parent in parents:
            depths.append(depths[parent] + 1)
        padded = (scores, -math.inf), (tokens, -1), (parents, -1), (raw[0], 0.0), (depths[1:], 0)
        rows.append([[*part, *[value] * none] for part, value in padded])
    every = upload(rows, device, torch.float32)
    whole = every.long()
    return LevelNodes(every[:, 0], whole[:, 1], whole[:, 2], every[:, 3:4], whole[:, 4])


def grow(
    step: Step, roots: Tensor, limits: TreeLimits, rules: Rules, keep: int | None = None, waits: bool = True
) -> LevelNodes:
    """Grow candidate tokens level by level after each row's root, and return all of them with their scores.

    A level is all candidates of one depth; level 0 follows the root. The likeliest few of a level run next, and get
    children.

    step: runs W tokens of each row, the root or the chosen ones of a level, and returns the logits after each, [B, W,
        V']: ``step(tokens [B, W], parents [B, W], paths)``, with the parents' indices among the tokens that ran before,
        and bool [B, W, U] which of all U tokens that ran so far, these last, are on each token's path (None: a chain).
    roots: the last token of each row's text, int64 [B, 1].
    limits: maximum number of levels, children per node, and costs of levels and nodes.
    rules: what besides logits decides which tokens become candidates, such as sampling noise.
    keep: maximum number of nodes per level and row that get children; None: ``limits.width`` for one row, 1 for
        several.
    waits: whether the CPU may read results during the draft. If so, growth ends before a level whose expected gain is
        below its cost.
    """
    keep = (limits.width if len(roots) == 1 else 1) if keep is None else keep
    tokens, parents = roots, torch.zeros_like(roots)  # (B, W); parents: in the level before
    nodes, scores = parents, torch.zeros(roots.shape, device=roots.device)  # (B, W), of each token: 0 is the root
    paths = None if keep == 1 else torch.ones_like(roots, dtype=torch.bool)[..., None]  # (B, W, U)
    other = None if rules.given is None else _OtherSource(rules.given, rules.tables)
    count, found, texts = 0 if other is None else other.given.tokens.shape[1], list[LevelNodes](), [list[int]()]
    heads = None if rules.tables is None else rules.tables[:, 0]
    for level in range(limits.levels):
        logits = step(tokens, parents, paths).float()
        if rules.masks is not None:
            logits = _masked(logits, rules.vocab, [rules.masks(text) for text in texts])
        best, ids = _likeliest(logits, level, rules, limits.width)  # (B, W, k)
        ids, raw = ids.expand(-1, tokens.shape[1], -1), best.exp()
        if heads is None and other is None:
            joint = scores[..., None] + best
        else:
            sure = calibrated(raw, heads)
            sure = sure if other is None else other.meet(ids, raw, sure, scores)
            joint = scores[..., None] + sure.clamp(min=1e-9).log().masked_fill(best == -math.inf, -math.inf)
        joint, flat = (joint if other is None else other.take(joint, raw)).flatten(1), ids.flatten(1)  # (B, W k)
        own = torch.full_like(flat, level + 1)
        origin = nodes[..., None].expand_as(ids).flatten(1)
        found.append(LevelNodes(joint, flat, origin, raw.expand(ids.shape).flatten(1), own))
        if level + 1 == limits.levels:
            break
        every = joint if other is None else torch.cat((joint, other.here), 1)
        scores, chosen = every.topk(min(keep, every.shape[1]))
        if rules.masks is not None or (callable(rules.noise) and len(roots) == 1):
            chosen, scores = chosen[scores > -math.inf][None], scores[scores > -math.inf][None]
            if not chosen.shape[1]:
                break
        if waits and (limits.level or limits.node):
            worth = scores.exp() * limits.rate(level + 1) - limits.node
            if float(worth.clamp(min=0).sum()) < limits.level:
                break
            if len(roots) == 1:
                some = max(int((worth > 0).sum()), 1)
                chosen, scores = chosen[:, :some], scores[:, :some]
        width = ids.shape[2]
        parents, nodes = chosen // width, 1 + count + chosen
        if other is None:
            tokens = flat.gather(1, chosen)
        else:
            tokens, parents, nodes = other.follow(chosen, scores, flat, parents, nodes)
        count += flat.shape[1]
        if rules.masks is not None:
            texts = [[*texts[b], t] for b, t in zip(parents[0].tolist(), tokens[0].tolist(), strict=True)]
        if paths is not None:
            shape = -1, -1, paths.shape[2]
            eye = torch.eye(chosen.shape[1], dtype=torch.bool, device=roots.device).expand(len(roots), -1, -1)
            paths = torch.cat((paths.gather(1, parents[..., None].expand(shape)), eye), 2)
    parts = [torch.cat(part, 1) for part in zip(*found, strict=True)]
    grown = LevelNodes(*parts)
    grown = grown._replace(raw=grown.raw[:, None])
    return grown if other is None else other.joined(grown, waits)


def _masked(logits: Tensor, vocab: Tensor | None, masks: Sequence[Tensor | None]) -> Tensor:
    """Return ``logits`` [1, W, V'] of a single row with -inf for tokens that are not allowed, as a new tensor.

    vocab: token ids of the V' logits, int64 [V']; None: the index of a logit is its token id.
    masks: for each of the W tokens of the level, which tokens may follow it, bool [V]; None: no token may.
    """
    out = torch.full_like(logits, -math.inf)
    for row, mask in enumerate(masks):
        if mask is not None:
            own = mask.to(out.device)
            own = own[: out.shape[2]] if vocab is None else own[vocab]
            out[0, row] = logits[0, row].masked_fill(~own, -math.inf)
    return out


def _likeliest(logits: Tensor, level: int, rules: Rules, width: int) -> tuple[Tensor, Tensor]:
    """Return the k = ``width`` likeliest candidates after each token of a draft level, best first.

    Returns (log-probabilities, token ids), [B, W, k] each; k is smaller if there are fewer logits, and W is 1 if the
    logits are the same for all tokens. For sampled rows, the probability is that of being drawn with the row's noise.

    logits: draft logits [B, W, V']. level: index of the draft level, from 0 on. rules: token ids of the logits, noise
        and sampling of the rows.
    """
    size = logits.shape[-1]
    best, index = logits.log_softmax(-1).topk(min(width if rules.noise is None else max(width, DRAWN), size))
    if rules.masks is not None:
        best = best.nan_to_num(-math.inf, neginf=-math.inf)  # NaN where nothing may follow
    ids = index if rules.vocab is None else rules.vocab[index]
    if rules.noise is None:
        return best, ids
    assert rules.sampling is not None
    if isinstance(rules.noise, Tensor):
        noise = rules.noise[:, level].gather(1, ids.flatten(1)).view_as(ids)
    else:
        noise = rules.noise(level, ids)
    best, place = _drawn(best, noise, rules.sampling[:, None, None].unbind(-1)).topk(min(width, size))
    return best, ids.gather(2, place)


def _drawn(best: Tensor, noise: Tensor, sampling: Sequence[Tensor]) -> Tensor:
    """Return log-probabilities, [B, W, k], that each candidate is the token that the row will draw with this noise.

    Rows with temperature 0 keep ``best``. Top-k, top-p and min-p are applied to the candidates alone, which have nearly
    all of the probability.

    best: log-probabilities of the k likeliest tokens, [B, W, k], best first.
    noise: their Gumbel noise, [B, W, k].
    sampling: 1 / temperature (0: greedy), top-k, top-p and min-p of the rows, [B, 1, 1] each.
    """
    sharpness, top_k, top_p, min_p = sampling
    gap = (best - best[..., :1]) * sharpness
    share = gap.exp()
    share = share.masked_fill((top_k > 0) & (torch.arange(best.shape[-1], device=best.device) >= top_k), 0.0)
    above = share.cumsum(-1) - share
    left = ((top_p >= 1) | (above < top_p * share.sum(-1, keepdim=True))) & (share > 0) & (share >= min_p)
    drawn = (gap + noise).log_softmax(-1).masked_fill(~left, -math.inf)
    return torch.where(sharpness > 0, drawn, best)


class _OtherSource:
    """Merges the draft trees of another source, such as n-grams, into a draft by a drafter's heads while that grows.

    A source is a predictor of tokens; a level is all nodes of one depth. ``grow`` calls ``meet``, ``take`` and
    ``follow`` for each level, and ``joined`` at the end. The other source's G nodes per row come before the heads'
    candidates. A token that both propose at the same point of the tree is one node: the other source's. Indices: b row,
    w token of the present draft level, k candidate after it, g node of the other source.

    given: the other source's trees, padded to G nodes with parents of -1.
    tables: calibration tables [B, 3, 11]; number 1 is for the other source's nodes that the heads also propose, number
        2 for the others. None: no calibration.
    inside, beside: the other source's probabilities of all nodes, calibrated by table 1 and by table 2, [B, G] each.
    reached: whether a node's parent has been in a level, so that the heads have seen it, bool [B, G].
    own: scores of nodes whose parent is in this level and which the heads do not propose, [B, W, G]; -inf for others.
    raw: the other source's own probability of each node after its parent, [B, G].
    places: the node of each token of the level in the other source's tree, [B, W]: 0: the root, g + 1: node g, -2: it
        is not in that tree.
    valid: whether node g is a child of token w, [B, W, G].
    same: whether candidate k after token w is the same token as node g, [B, W, k, G].
    here: scores (log-probabilities of paths) of the nodes whose parent is in this level, [B, G]; -inf for others.
    scores: scores of all nodes that the draft has reached so far, [B, G]; -inf for others.
    heads: raw probability that the drafter's heads give each node, [B, G]; 0: none.
    """

    def __init__(self, given: LevelNodes, tables: Tensor | None) -> None:
        self.given, self.raw = given, given.raw[:, 0]
        self.inside, self.beside = (
            calibrated(self.raw, None if tables is None else tables[:, source]) for source in (1, 2)
        )
        self.places = torch.zeros_like(given.tokens[:, :1])
        self.scores = torch.full_like(given.scores, -math.inf)
        self.heads, self.reached = torch.zeros_like(self.raw), torch.zeros_like(self.raw, dtype=torch.bool)

    def meet(self, ids: Tensor, raw: Tensor, sure: Tensor, scores: Tensor) -> Tensor:
        """Match the heads' candidates of a draft level with the other source's nodes; return their probabilities.

        The heads are the drafter's output heads; the other source is another predictor of tokens, such as n-grams. Sets
        ``valid``, ``same`` and ``own`` for the level. The result has the calibrated probabilities [B, W, k] of the k
        candidates after each of W tokens by both sources together: the larger of the two where both propose a token. If
        all probabilities after a token sum to more than 1, all but the largest are scaled down.

        ids: token ids of the candidates, [B, W, k]. raw: their raw probabilities by the heads, [B, W, k] (not read).
        sure: their calibrated probabilities by the heads, [B, W, k].
        scores: log-probabilities of the paths to the tokens of the level, [B, W].
        """
        given = self.given
        self.valid = given.parents[:, None] == self.places[..., None]
        self.same = self.valid[:, :, None] & (ids[..., None] == given.tokens[:, None, None])
        alone = self.valid & ~self.same.any(2)
        sure = torch.maximum(sure, (self.same * self.inside[:, None, None]).amax(-1))
        own = alone * self.beside[:, None]  # (B, W, G)
        # The likeliest keeps its probability, and the others share what it leaves
        total, most = sure.sum(-1) + own.sum(-1), torch.maximum(sure.amax(-1), own.amax(-1))
        others = torch.where(total > 1, (1 - most) / (total - most).clamp(min=1e-9), 1.0)[..., None]
        sure, own = (torch.where(part == most[..., None], part, part * others) for part in (sure, own))
        self.own = (scores[..., None] + own.clamp(min=1e-9).log()).masked_fill(~alone, -math.inf)
        return sure

    def take(self, joint: Tensor, raw: Tensor) -> Tensor:
        """Remove from the heads' candidates of a draft level those that are nodes of the other source, too.

        The heads are the drafter's output heads; the other source is another predictor of tokens, such as n-grams.
        The present scores of the other source's nodes in this level go to ``here`` and ``scores``, and the heads' raw
        probabilities of nodes that both propose to ``heads``. Call it after ``meet``, for the same candidates.

        joint: scores of the heads' candidates, the logarithms of the probabilities that the paths to them are accepted,
            [B, W, k]. W is the number of tokens of the level before, k the number of candidates after each.
        raw: probability of each candidate by the heads' softmax, not calibrated, [B, W, k].

        Returns ``joint`` with -inf where the candidate is a node of the other source, [B, W, k].
        """
        both = joint[..., None].masked_fill(~self.same, -math.inf).amax((1, 2))
        self.here, now = torch.maximum(both, self.own.amax(1)), self.valid.any(1)
        self.scores, self.reached = torch.where(now, self.here, self.scores), self.reached | now
        self.heads = torch.maximum(self.heads, (self.same * raw[..., None]).amax((1, 2)))
        return joint.masked_fill(self.same.any(-1), -math.inf)

    def follow(
        self, chosen: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor, nodes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tokens, parents and node numbers of the W tokens of each row that run next, int64 [B, W] each.

        A parent is an index among the tokens that ran before; a node number is 1 + the index in the whole tree. Also
        records in ``places`` which tokens are nodes of the other source (such as n-grams) and not of the draft heads.

        chosen: indices of the chosen tokens among the heads' C candidates of this level, followed by the other source's
            G nodes (C + g), [B, W].
        scores: log-probabilities of their paths, [B, W]; -inf: there is no such token.
        tokens: token ids of the heads' C candidates, [B, C].
        parents, nodes: for chosen tokens that are the heads' candidates, the index of the parent in this level, and the
            number of the node in the whole tree, [B, W] each.
        """
        at = chosen - tokens.shape[1]
        mine, at = at >= 0, at.clamp(min=0)
        tokens = tokens.gather(1, chosen.clamp(max=tokens.shape[1] - 1))
        self.places = (at + 1).masked_fill(~mine | (scores == -math.inf), -2)
        parents = torch.where(mine, self.valid.int().argmax(1).gather(1, at), parents)
        return torch.where(mine, self.given.tokens.gather(1, at), tokens), parents, torch.where(mine, at + 1, nodes)

    def joined(self, grown: LevelNodes, waits: bool) -> LevelNodes:
        """Return all candidates of the draft: the other source's nodes first, then the heads' candidates ``grown``.

        The heads are the drafter's output heads; the other source is another predictor of tokens, such as n-grams.

        grown: the heads' candidates, with one source in ``raw``.
        waits: whether the CPU reads the candidates, and then itself adds those nodes of the other source that no draft
            level has reached. If not, they are included here, with probabilities by their own source, and ``raw`` has
            three sources: the other source for nodes that no level has reached, the other source for reached nodes that
            the heads do not propose, and the heads.
        """
        given, own = self.given, self.scores
        raw = self.heads[:, None]
        if not waits:
            # A node behind those that were reached is as likely after its parent as its source says
            before = F.pad(given.scores, (1, 0)).gather(1, given.parents.clamp(min=0))
            value = torch.where(self.reached, own, given.scores - before)
            to = given.parents.masked_fill(self.reached | (given.parents < 0), 0)
            value, to = (torch.cat((part.new_zeros(len(part), 1), part), 1) for part in (value, to))
            for _ in range(to.shape[1].bit_length()):
                value, to = value + value.gather(1, to), to.gather(1, to)
            own, alone = value[:, 1:], self.heads == 0
            parts = self.raw * (alone & ~self.reached), self.raw * (alone & self.reached), self.heads
            raw = torch.stack(parts, 1)
        nothing = raw.new_zeros(len(raw), raw.shape[1] - 1, grown.raw.shape[2])
        both = own, given.tokens, given.parents.clamp(min=0), raw, given.depths
        theirs = grown._replace(raw=torch.cat((nothing, grown.raw), 1))
        return LevelNodes(*(torch.cat(parts, -1) for parts in zip(both, theirs, strict=True)))


# -- choosing nodes ---------------------------------------------------------------------------------------------------


def taken(grown: LevelNodes, choice: DeviceChoice | None) -> list[Nodes] | DeviceTree:
    """Return a draft's candidates, as lists for the CPU or as a tree that stays on the device.

    grown: the candidates of B rows, on the device.
    choice: the rule by which the device selects nodes; the selected nodes are returned as a ``DeviceTree``. None:
        returns, for each row, lists of scores, tokens, parents and raw probabilities, which waits for the device.
    """
    if choice is None:
        return grown.lists()
    return choose(grown, choice.nodes, *limits_of(choice, len(choice.depths), grown.tokens.device))


def limits_of(choice: DeviceChoice, lanes: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Convert the limits and prices of ``choice`` to tensors on ``device``, the last two arguments of ``choose``.

    Returns (bounds, prices). ``bounds`` is float32 [B, 2]: for each row the maximum depth of its nodes, and what each
    of its nodes costs beyond the prices. ``prices`` is float32 [2 + lanes * choice.nodes]: the price of scoring 0, 1,
    .. nodes of all rows together (``DeviceChoice.prices``), then ``choice.allowance``; None: nodes have no price.

    lanes: number of rows of the candidates, padding included.
    """
    beyond = choice.beyond or [0.0] * len(choice.depths)
    bounds = upload([*zip(choice.depths, beyond, strict=True)], device, torch.float32)
    if not choice.prices:
        return bounds, None
    count = 1 + lanes * choice.nodes
    prices = [*choice.prices, *[choice.prices[-1]] * count][:count]
    return bounds, upload([*prices, choice.allowance], device, torch.float32)


def choose(grown: LevelNodes, count: int, bounds: Tensor, prices: Tensor | None) -> DeviceTree:
    """Select up to ``count`` of the likeliest nodes of each row, on the device, and return them as a tree there.

    grown: the candidates of B rows. count: maximum number of nodes per row.
    bounds: for each row, the maximum depth of its nodes, and what each of its nodes costs beyond ``prices``, [B, 2].
    prices: price of scoring 0, 1, .. B * count nodes in all rows together, then the loss that is still accepted, all in
        accepted tokens (``DeviceChoice``), [2 + B * count]. Nodes that are not worth their price are left out. None:
        nodes have no price.
    """
    grown, (most, beyond) = _only(grown, _best(grown.scores, max(count, FOUND))), bounds.split(1, 1)
    values, order = grown.scores.masked_fill(grown.depths > most, -math.inf).sort(dim=1, descending=True, stable=True)
    values, order = values[:, :count], order[:, :count]
    taken = values > -math.inf
    if prices is not None:
        net = (values.exp() - beyond).masked_fill(~taken, -math.inf)
        every, places = net.flatten().sort(dim=0, descending=True, stable=True)
        gains = every.cumsum(0) - prices[1 : 1 + len(every)]
        worth = torch.where(gains.max() + prices[-1] > 0, gains.argmax() + 1, 0)
        taken = taken & (places.argsort() < worth).view_as(taken)
    picked = order.masked_fill(~taken, grown.scores.shape[1]).sort(1).values
    own = _only(grown, picked)
    every_one = torch.arange(1 + picked.shape[1], device=picked.device)
    parents = torch.cat((torch.zeros_like(picked[:, :1]), own.parents), 1)
    above = (parents[..., None] == every_one) | (every_one[:, None] == every_one)  # the root is its own parent
    paths = above.float()
    for _ in range(picked.shape[1].bit_length()):
        paths = ((paths @ paths) > 0).float()
    ancestors = paths > 0
    there = picked < grown.scores.shape[1]
    packed = torch.cat((picked.masked_fill(~there, -1), grown.packed()), 1)
    return DeviceTree(own.tokens.masked_fill(~there, -1), ancestors.sum(-1) - 1, ancestors, packed, grown.raw.shape[1])


class FixedHeads(NamedTuple):
    """Output heads of a draft whose weights stay at fixed addresses, so that a CUDA graph stays valid as a head grows.

    heads: the output heads, from final states to logits, concatenated; None is the model's own head. The last one has
        all rows of its allocated memory, also those that have no token yet.
    tokens: token id of each output, int64 [V']; None: the index of an output is its token id.
    forbidden: outputs of the second head that a row may not draft, such as those without a token, bool [B, outputs];
        None: all are allowed.
    """

    heads: Sequence[Any]
    tokens: Tensor | None
    forbidden: Tensor | None


def fixed_heads(
    heads: Sequence[nn.Module | None], tokens: Tensor | None, forbidden: Tensor | None, batch: int
) -> FixedHeads | None:
    """Return heads at fixed addresses that draft the same tokens as ``heads``.

    Returns None if the last head grows and has a bias, which has no fixed address.

    heads: output heads of the draft; None is the model's own. The last one may be a ``GrowingLinear``.
    tokens: token id of each output, int64 [V']; None: the index of an output is its token id.
    forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: all are allowed.
    batch: B, number of rows.
    """
    growing: Any = heads[-1]
    if (memory := getattr(growing, "memory", None)) is None:
        return FixedHeads(heads, tokens, forbidden)
    if growing.bias is not None:
        return None
    spare = len(memory.values) - growing.out_features
    if forbidden is None:
        forbidden = torch.zeros(batch, growing.out_features, dtype=torch.bool, device=memory.values.device)
    tokens = None if tokens is None else F.pad(tokens, (0, spare))
    return FixedHeads([*heads[:-1], memory.whole], tokens, F.pad(forbidden, (0, spare), value=True))


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` largest ``scores`` of each row, in ascending order, int64 [B, count].

    scores: [B, C]. Of equal scores, the first win. Where a score is -inf, the index is C ("no node").
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return order.masked_fill(scores.gather(1, order) == -math.inf, scores.shape[1]).sort(1).values


def _only(grown: LevelNodes, picked: Tensor) -> LevelNodes:
    """Return the candidates with only the nodes ``picked``; their parents are renumbered.

    grown: C candidates of each of B rows. picked: sorted indices of the nodes to keep, int64 [B, M], which must include
        the parents of all of them; C: no node. Such an entry gets the score -inf.
    """
    count = grown.scores.shape[1]
    at, none = picked.clamp(max=count - 1), picked == count
    place = torch.zeros_like(picked[:, :1]).repeat(1, count + 2)
    place.scatter_(1, picked + 1, torch.arange(1, 1 + picked.shape[1], device=picked.device).expand_as(picked))
    return LevelNodes(
        grown.scores.gather(1, at).masked_fill(none, -math.inf),
        grown.tokens.gather(1, at),
        place.gather(1, grown.parents.gather(1, at)).masked_fill(none, 0),
        grown.raw.gather(2, at[:, None].expand(-1, grown.raw.shape[1], -1)),
        grown.depths.gather(1, at),
    )


# -- a draft path -----------------------------------------------------------------------------------------------------


class PathStep:
    """Runs one draft level along an M2R2 draft path, and returns the logits after each of its tokens.

    A draft path computes the final state of a token from its embedding by linear projections and a few of the model's
    layers (its segments). ``grow`` calls the object once per level, first with the roots: ``step(tokens, parents,
    paths)`` returns [B, W, V']. An object serves one draft, since it keeps the states of the last level.

    path: the projections and segments.
    final: final states (before the final norm) of the tokens that the last call ran, [B, W, D]; at first, those of the
        tokens before the roots, [B, 1, D].
    carried: for each segment, the inputs of its first layer for these tokens, [B, W, D].
    level: number of calls so far.
    embed: from tokens [B, W] and the level's index to embeddings [B, W, D].
    run: runs one segment, given its index, input states [B, W, D], the level's index, the ancestors of each token (bool
        [B, W, U]; None: a chain), and the tokens [B, W]; returns states [B, W, D].
    heads: functions from final states [B, W, D] to logits, which are concatenated.
    forbidden: outputs of the second head that a row may not draft, bool [B, outputs]; None: all are allowed.
    """

    def __init__(
        self,
        path: DraftPath,
        final: Tensor,
        carried: Sequence[Tensor],
        embed: Callable[[Tensor, int], Tensor],
        run: Callable[[int, Tensor, int, Tensor | None, Tensor], Tensor],
        heads: Sequence[Callable[[Tensor], Tensor]],
        forbidden: Tensor | None,
    ) -> None:
        self.path, self.final, self.carried, self.embed, self.run = path, final, carried, embed, run
        self.heads, self.forbidden, self.level = heads, forbidden, 0

    def __call__(self, tokens: Tensor, parents: Tensor, paths: Tensor | None) -> Tensor:
        maps, segments = self.path.projections, self.path.segments
        x, before, projected = self.embed(tokens, self.level), states_of(self.final, parents), list[Tensor]()
        for number, (projection, state) in enumerate(zip(maps[: len(segments)], self.carried, strict=True)):
            projected.append(projection([x, before, states_of(state, parents)]))
            x = self.run(number, projected[-1], self.level, paths, tokens)
        self.final = maps[-1]([x, before]) if len(maps) > len(segments) else x
        self.carried, self.level = projected, self.level + 1
        first, *added = (head(self.final) for head in self.heads)
        if added and self.forbidden is not None:
            added = [added[0].masked_fill(self.forbidden[:, None], -math.inf)]
        return torch.cat((first, *added), -1) if added else first


def states_of(states: Tensor, parents: Tensor) -> Tensor:
    """Return the states, [B, W, D], of the parents of the W tokens of a draft level.

    states: states of the n tokens of the level before, [B, n, D]. parents: indices among these, int64 [B, W].
    """
    if states.shape[1] == parents.shape[1] == 1:
        return states
    return states.gather(1, parents[..., None].expand(-1, -1, states.shape[2]))
