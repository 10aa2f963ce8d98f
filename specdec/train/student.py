"""M2R2 in training: the drafter's own drafts at every position of a batch, and the loss against the base model.

Draft step s = 1, 2, ... at position t drafts the token after t, s tokens past the last verified one. It attends to the
base model's keys and values up to t - s and to the drafter's own ones after that. It reads the states that step s - 1
had at t - 1 (``Carry``; for step 1, those of the base model). The network is ``specdec.drafters.m2r2.network``.

Projections start in closed form, by ridge regression between states of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdec.base.ridge import Sums
from specdec.drafters.m2r2.network import M2R2, Carry, router_taps
from specdec.kvcache.mask import Mask
from specdec.runtimes.native.linear import rounded_for_drafts
from specdec.runtimes.target import GivenLinear, Pass, Target
from specdec.train.batches import TrainingBatch, TrainingCache

BLOCK = 256  # positions whose logits are computed together
FLOATS = 1 << 17  # logits that are compared together on a CPU


def exact_carry(network: M2R2, batch: TrainingBatch) -> Carry:
    """Return the base model's states of the token before each position, which projections read in draft step 1.

    ``Carry.final`` has the last layer's output, before the final norm, and ``Carry.inputs[s]`` the input of layer lo
    of segment s, [lo, hi), of the draft path, [B, T, D] each. Entry t is of the position before ``positions[:, t]``. At
    t = 0 that one lies before the window, and is in the batch as well (``TrainingBatch.before``).
    network: has the draft path.
    """
    path = network.path
    return Carry(batch.before[network.num_layers], [batch.before[lo] for lo, _ in path.segments])


def shared_stages(
    network: M2R2, target: Target, batch: TrainingBatch, watched: bool = False
) -> list[tuple[Tensor, list[Tensor]]]:
    """Run the early layers [0, E) of the draft path, which drafts share with the base model, at every position.

    The accelerated residual (the hidden state that drafts compute) is the base model's own state there, which the batch
    already has, unless early layers have adapters.

    network: the drafter, whose ``path.shared`` has the ranges of layers, one for each exit up to layer E (stages).
    target: the base model, which runs the layers.
    batch: B windows of T positions.
    watched: whether to collect the hidden states that routers read, too; if not, their lists may be empty.

    Returns a pair for each stage: the accelerated residual after it, [B, T, D]; and the hidden states that a router at
    its end reads, [B, T, D] each, in the order of the layers.
    """
    path, found, passed = network.path, list[tuple[Tensor, list[Tensor]]](), list[Tensor]()
    if not path.adapts_early:
        return [(batch.hidden[hi], [batch.hidden[h] for _, h in path.shared if h <= hi]) for _, hi in path.shared]
    x = target.embed(batch.ids, batch.positions)
    keys = torch.arange(batch.num_keys, device=x.device).expand(len(x), -1)  # (B, S)
    exact = keys[:, None] <= batch.positions[:, :, None]  # (B, T, S)
    own = torch.zeros(*exact.shape[:2], x.shape[1], dtype=torch.bool, device=x.device)
    mask = Mask(batch.positions, torch.cat((keys, batch.positions), 1), torch.cat((exact, own), 2))
    cache = TrainingCache(target.num_layers, batch)
    for lo, hi in path.shared:
        taps = router_taps(lo + 1, hi) if watched else None
        start = batch.hidden[lo] if lo else x
        given = Pass(batch.positions, mask, cache, taps=taps, adapters=network.adapters, ids=batch.ids)
        p = target.layers(start, lo, hi, given)
        passed = [*passed, *(taps or {}).values()]
        found.append((p, passed))
    return found


def draft_steps(
    network: M2R2, target: Target, batch: TrainingBatch, steps: int, watched: bool = False
) -> Iterator[tuple[list[tuple[Tensor, list[Tensor]]], Tensor]]:
    """Draft at every position of ``batch``, and yield (exits, valid) for each draft step s = 1 .. ``steps``.

    Entry t of step s drafts the token after position t, after s - 1 drafted tokens: those at t - s + 2 .. t, which have
    the ids of the text. It reads what the last exit of step s - 1 gave at t - 1.

    network: the drafter in training. target: the base model, whose layers it runs.
    watched: whether to collect the hidden states that routers read.

    exits: for each exit of the draft path, in order, a pair: the estimated final state [B, T, D], before the final
        norm; and the hidden states that the exit's router reads, [B, T, D] each, some of them missing unless
        ``watched``.
    valid: bool [B, T], the entries that count: the positions t - s + 1 .. t are all in the window, and none is padding.
    """
    path, early = network.path, shared_stages(network, target, batch, watched)
    start, first = early[-1] if early else (target.embed(batch.ids, batch.positions), [])
    carry, cache, valid = exact_carry(network, batch), TrainingCache(target.num_layers, batch), batch.valid
    for step in range(1, steps + 1):
        ends, p, passed, inputs = list(early), start, first, list[Tensor]()
        mask = step_mask(batch, step)
        for index in range(len(path.segments)):
            inputs.append(network.project(index, p, carry))
            p, more = network.run_segment(target, index, inputs[-1], batch.positions, batch.ids, mask, cache, watched)
            passed = [*passed, *more]
            ends.append((p, passed))
        exits = list[tuple[Tensor, list[Tensor]]]()
        for exit, run in enumerate(path.stages_to_exit):
            p, passed = ends[run - 1]
            final = network.estimate(exit, p, carry)
            exits.append((final, [*passed, final] if path.final_projection else passed))
        yield exits, valid
        carry = Carry(shift_right(exits[-1][0]), [shift_right(x) for x in inputs])
        valid = valid & shift_right(valid)


def projected_from(network: M2R2, target: Target, batch: TrainingBatch, index: int) -> tuple[Tensor, Carry]:
    """Return the inputs of one projection of an M2R2 network when a first token is drafted at each position.

    network: the drafter, whose projections before this one are used. target: the base model, which runs the layers.
    batch: B windows of T positions.
    index: 0 .. number of segments - 1: the projection to the beginning of that segment of the draft path; after these,
        the projection of each exit.

    Returns a pair: the accelerated residual [B, T, D] that enters the projection, and the base model's states of the
    token before each position (``exact_carry``).
    """
    path, carry = network.path, exact_carry(network, batch)
    early, segments = shared_stages(network, target, batch), len(path.segments)
    ends = [target.embed(batch.ids, batch.positions), *(p for p, _ in early)]
    run = len(path.shared) + index if index < segments else path.stages_to_exit[index - segments]  # stages
    mask, cache = step_mask(batch, 1), TrainingCache(target.num_layers, batch)
    for segment in range(run - len(path.shared)):
        x = network.project(segment, ends[-1], carry)
        ends.append(network.run_segment(target, segment, x, batch.positions, batch.ids, mask, cache)[0])
    return ends[run], carry


def step_mask(batch: TrainingBatch, step: int) -> Mask:
    """Return the attention mask with which draft step ``step`` runs at all T positions of ``batch`` at once.

    Draft step s = 1, 2, .. at position t drafts the token after t, where the base model has run the text up to t - s
    and the drafter itself the s positions after that. So position t sees the base model's keys up to t - s, and for
    each j in 1 .. s the key that draft step j has made at position t - s + j.

    batch: B windows of T positions, with S keys of the base model for each row (``num_keys``).

    Returns a mask of B rows, T queries and S + ``step`` T keys: those of the base model, then T of each draft step.
    """
    b, t = batch.ids.shape
    keys = torch.arange(batch.num_keys, device=batch.ids.device).expand(b, -1)  # (B, S)
    index = torch.arange(t, device=batch.ids.device)
    lag = index[:, None] - index  # (T, T), query minus key
    exact = keys[:, None] <= batch.positions[:, :, None] - step  # (B, T, S)
    own = [(lag == step - j).expand(b, -1, -1) for j in range(1, step + 1)]
    return Mask(batch.positions, torch.cat((keys, *[batch.positions] * step), 1), torch.cat((exact, *own), 2))


def shift_right(x: Tensor) -> Tensor:
    """Move the entries of ``x`` [B, T, ...] from position t - 1 to t; the first position gets zeros."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)


class Teacher:
    """The base model's distributions over a draft vocabulary, and the loss of a drafter's logits against them.

    Call ``begin`` for each batch first. The vocabulary of a batch is the drafter's own plus further tokens, first those
    that the base model chooses in the batch (when it drafts, a drafter also adds the tokens of its context).
    Distributions are those of valid positions only, and logits are compared a few positions at a time: those of a whole
    batch would not fit into the CPU's caches.

    vocab: the drafter's own vocabulary, token ids, 1-dimensional; None: the full vocabulary.
    sharpen: share of probability that moves to the base model's most likely token, if the vocabulary has it.
    variation: share of the loss that is the total variation; the rest is KL.
    extra: number of further tokens in the vocabulary of a batch; without effect if ``vocab`` is None.
    rounds: whether drafters read their own vocabulary's head as drafts on a CPU do, rounded to 4 or 8 bits.
    target: the base model, whose final norm and output head make the logits.
    """

    def __init__(
        self,
        target: Target,
        vocab: Tensor | None,
        sharpen: float = 0.0,
        variation: float = 0.0,
        extra: int = 512,
        rounds: bool = False,
    ) -> None:
        self.target = target
        self.sharpen = sharpen
        self.variation = variation
        self.vocab = None if vocab is None else vocab.long()
        self.own = set() if vocab is None else set(vocab.tolist())
        self.extra = 0 if vocab is None else min(extra, target.vocab_size - len(vocab))
        self.head: nn.Linear | None = None
        self.draft_head: nn.Linear | None = None
        self.rounded: Tensor | None = None  # rows of the draft head
        if self.vocab is not None and rounds:
            weight = target.reduced_head(self.vocab).weight.detach()
            self.rounded = rounded_for_drafts(weight.bfloat16()).to(weight.dtype)
        self.index_of: Tensor | None = None  # token id -> index in the batch's vocabulary, or -1

    @torch.no_grad()
    def begin(self, batch: TrainingBatch) -> None:
        """Compute the base model's distributions for ``batch`` and set the attributes that describe them.

        The vocabulary of the batch has V' tokens, in this order: the drafter's own and ``extra`` further ones, first
        those that the base model chooses at valid positions. With ``vocab`` None, it is the full vocabulary.

        best, next: indices in this vocabulary of the base model's and the text's next token, [B, T]; -1: not in it.
        row: number of each position among the n valid ones, [B, T]; of no meaning at padding.
        p: probabilities [n, V'], normalized over the vocabulary of the batch. entropy: entropy of ``p``, [n].
        mass: the base model's probability of the whole vocabulary of the batch, [n].
        """
        if self.vocab is not None:
            seen = torch.zeros(self.target.vocab_size, dtype=torch.int8, device=self.vocab.device)
            seen[batch.best[batch.valid]] = 1
            seen[self.vocab] = -1
            more = seen.argsort(descending=True, stable=True)[: self.extra]  # chosen tokens first, none of vocab
            vocab = torch.cat((self.vocab, more))
            self.head = self.draft_head = self.target.reduced_head(vocab)
            if self.rounded is not None:
                own = len(self.rounded)
                weight = torch.cat((self.rounded, self.head.weight[own:]))
                self.draft_head = GivenLinear(weight, self.head.bias)
            self.index_of = torch.full_like(seen, -1, dtype=torch.long)
            self.index_of[vocab] = torch.arange(len(vocab), device=vocab.device)
        self.best, self.next = (i if self.index_of is None else self.index_of[i] for i in (batch.best, batch.next_ids))
        self.row = batch.valid.flatten().cumsum(0).view_as(batch.valid) - 1
        best, log_z = self.best[batch.valid], batch.log_z[batch.valid]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for at, _, logits in self.read_out(batch.hidden[self.target.num_layers][batch.valid], self.head):
            for few, x in split(at, logits):
                log_p = torch.log_softmax(x, -1, dtype=torch.float32)
                inside = x[:, 0].float() - log_p[:, 0]  # log of the sum of exp(logit) over the vocabulary
                p = log_p.exp()
                if self.sharpen:
                    share = self.sharpen * (best[few] >= 0).float()[:, None]
                    p = (p * (1 - share)).scatter_add(1, best[few].clamp_min(0)[:, None], share)
                    log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
                found.append((p.to(x.dtype), -(p * log_p).sum(-1), torch.exp(inside - log_z[few])))
        self.p, self.entropy, self.mass = (torch.cat(each) for each in zip(*found, strict=True))

    def logits(self, final: Tensor) -> Tensor:
        """Return the drafter's logits for its estimated final states: [B, T, D] to [B, T, V']."""
        return self.target.readout(final, self.draft_head)

    def read_out(self, final: Tensor, head: nn.Linear | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (indices [m], final states [m, D], logits [m, V']) of ``final`` [n, D], ``BLOCK`` at a time.

        The states are copies, in which the gradients of the logits end. head: ``head``, or ``draft_head`` for drafts.
        """
        for start in range(0, len(final), BLOCK):
            at = torch.arange(start, min(start + BLOCK, len(final)), device=final.device)
            part = final[at].detach().requires_grad_(torch.is_grad_enabled())
            yield at, part, self.target.readout(part[None], head).squeeze(0)

    def compare(self, final: Tensor, valid: Tensor, weight: float | Tensor = 1.0) -> tuple[Tensor, float, Tensor]:
        """Compare the drafts of estimated final states ``final`` [B, T, D], before the final norm, with the base model.

        valid: bool [B, T], the positions that count, all of them valid in the batch.
        weight: factor on the loss of each position, one number or [B, T].

        Returns the loss, a scalar with gradients: the sum over ``valid`` of the weighted losses (``distance``), divided
        by the number of valid positions of the batch, which may be more; the share that agree with the base model's
        choice; and whether the most likely token is the text's next one, bool [B, T], False outside ``valid``.
        """
        weights = torch.as_tensor(weight, device=final.device).expand(valid.shape)[valid] / len(self.p)
        chosen = torch.stack((self.best[valid], self.next[valid]), 1)  # (n, 2)
        loss, hits = _Distillation.apply(final[valid], self, self.row[valid], weights, chosen)  # type: ignore[no-untyped-call]
        right = torch.zeros_like(valid)
        right[valid] = hits[:, 1]
        return loss, float(hits[:, 0].float().mean()), right

    def distance(self, log_q: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a drafter's log-probabilities ``log_q`` [n, V'] at positions ``row`` [n], and the slope.

        It is (1 - variation) * KL(base || draft) + variation * (1 - sum(min(base, draft))), [n]. The second term, the
        total variation, is the probability that speculative sampling rejects the draft.
        The slope is the derivative by the logits of the draft, [n, V'].
        """
        p, q = self.p[row].float(), log_q.exp()
        away, slope = -(p * log_q).sum(-1) - self.entropy[row], q - p
        if self.variation:
            below = q * (q < p)
            overlap = torch.minimum(q, p).sum(-1)
            away = torch.lerp(away, 1 - overlap, self.variation)
            slope = torch.lerp(slope, q * below.sum(-1, keepdim=True) - below, self.variation)
        return away, slope

    def hits(self, logits: Tensor) -> Tensor:
        """Return whether the most likely token of ``logits`` [B, T, V'] is the base model's choice, bool [B, T]."""
        return agree(logits, self.best)

    def known(self, batch: TrainingBatch) -> Tensor:
        """Return for each position of ``batch`` whether the drafter could draft the base model's choice, bool [B, T].

        The choice must be in the drafter's vocabulary or in the text up to the position. Padding is False.
        """
        if self.vocab is None:
            return batch.valid
        known = torch.zeros_like(batch.valid)
        for b, text in enumerate(batch.texts):
            ids, start, best = text.tolist(), int(batch.positions[b, 0]), batch.best[b].tolist()
            seen = self.own | set(ids[:start])
            for i, token in enumerate(ids[start:]):
                seen.add(token)
                known[b, i] = best[i] in seen
        return known


class _Distillation(torch.autograd.Function):
    """The weighted sum of ``Teacher.distance`` over n positions, whose gradient is computed together with it.

    So no logits are stored for the backward pass.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, final: Tensor, teacher: Teacher, row: Tensor, weight: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and whether the most likely token is each of ``chosen`` [n, k], bool [n, k].

        final: estimated final states [n, D]. row: number of each position in the teacher's distributions, [n].
        weight: factor on each position's loss, [n]. chosen: indices in the vocabulary of the batch, -1: none.
        """
        loss, gradient, hits = torch.zeros((), device=final.device), torch.zeros_like(final), list[Tensor]()
        with torch.set_grad_enabled(ctx.needs_input_grad[0]):
            for at, part, logits in teacher.read_out(final, teacher.draft_head):
                slopes = list[Tensor]()
                with torch.no_grad():
                    for few, x in split(at, logits):
                        log_q = torch.log_softmax(x, -1, dtype=torch.float32)
                        away, slope = teacher.distance(log_q, row[few])
                        loss += (away * weight[few]).sum()
                        hits.append(agree(log_q[:, None], chosen[few]))
                        slopes.append((slope * weight[few, None]).to(x.dtype))
                if ctx.needs_input_grad[0]:
                    gradient[at] = torch.autograd.grad(logits, part, torch.cat(slopes))[0]
        ctx.save_for_backward(gradient)
        found = torch.cat(hits) if hits else chosen.bool()
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    def backward(ctx: Any, loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.saved_tensors[0] * loss, None, None, None, None


def split(at: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``at`` [m] and ``logits`` [m, V'] a few rows at a time, so that a CPU's caches keep what they become."""
    rows = max(FLOATS // logits.shape[1], 1) if logits.device.type == "cpu" else BLOCK
    return zip(at.split(rows), logits.split(rows), strict=True)


def agree(logits: Tensor, index: Tensor) -> Tensor:
    """Return whether the token ``index`` [..., T] is what ``logits`` [..., T or 1, V'] draft, bool [..., T].

    That is the first of the most likely ones: in bfloat16, several are often equally likely.

    index: in the vocabulary of the logits; -1: none, which is False.
    """
    return logits.detach().argmax(-1) == index


def fit_projections(network: M2R2, target: Target, batches: Callable[[], Iterable[TrainingBatch]]) -> None:
    """Set the weights of all projections (linear layers) of an M2R2 network by ridge regression, one after the other.

    A projection learns to predict the base model's state at the layer to which it leads, from the states that reach it
    when a first token is drafted with the projections fitted before (``fit_projection``).

    network: the drafter in training; its projections are overwritten.
    target: the base model, which runs the layers.
    batches: function that returns a new iterator over the training data at each call; it is called once for each
        projection.
    """
    for index in range(len(network.projections)):
        fit_projection(network, target, batches(), index)


@torch.no_grad()
def fit_projection(network: M2R2, target: Target, batches: Iterable[TrainingBatch], index: int) -> None:
    """Set the weights of one projection of an M2R2 network by ridge regression to the base model's states.

    The regression goes from the projection's inputs, when a first token is drafted at each position, to the base
    model's state there: its input of the layer where segment ``index`` begins or, at an exit, its final state.

    network: the drafter; only projection ``index`` is overwritten, and those before it must be fitted.
    target: the base model, which runs the layers. batches: the training data.
    index: 0 .. number of segments - 1: the projection to the beginning of that segment of the draft path; after these,
        the projection of each exit.
    """
    path, layer = network.path, network.projections[index]
    sums = Sums(layer.in_features, layer.out_features)
    goal = path.segments[index][0] if index < len(path.segments) else network.num_layers
    for batch in batches:
        features = network.features(index, *projected_from(network, target, batch, index))
        sums.add(features[batch.valid], batch.hidden[goal][batch.valid])
    sums.fit(layer)
