"""Running the tokens of a draft along an M2R2's draft path, each token as far as its exit.

When a later token goes deeper, the stages that earlier tokens have not run are run for all tokens at once. The slow
residual h of the shared layers is that of a drafter that exits early: ``PartialPass`` runs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.kvcache.cache import KVCache
from specdec.runtimes.target import Target

from ..exits.passes import PartialPass
from .network import M2R2, Carry


@dataclass
class _Token:
    """One token of each of B rows, the root or a drafted one, on its way along the draft path.

    The path is a sequence of stages, ranges of layers (``M2R2Path.stages``). Those of later layers are its segments,
    and a projection, a linear layer, makes the input of each. It reads p and the deep states (``Carry``) of the token
    before: its final state and its inputs to the segments. As it may run long after that token, a token keeps both.

    ids, positions: token ids and their positions, int64 [B, 1] each.
    p: the hidden state of the draft after the last stage that was run, [B, 1, D]; at first, the embedding.
    previous_carry: the deep states of the token before; for the root, those of the model's own pass.
    carry: the deep states of this token. Each segment appends its input; ``final`` is set by the drafter when the token
        leaves the path, and is the embedding before.
    stages_run: number of stages that were run.
    residuals: the hidden states that the exits' routers read, in the order of the stages, [B, 1, D] each.
    """

    ids: Tensor
    positions: Tensor
    p: Tensor
    previous_carry: Carry
    carry: Carry
    stages_run: int = 0
    residuals: list[Tensor] = field(default_factory=list)


class PathPass:
    """Runs the tokens of a draft along the draft path, an earlier token at least as far as a later one.

    For each token, the root first, call ``push``, then ``to`` with rising exits, and set the token's ``carry.final`` to
    the result; at the end of the draft, call ``finish``.

    network: has the path and its parameters. target: the model, whose layers run.
    cache: the model's keys and values, to which those of drafted tokens are added, uncommitted.
    carry: the model's states of the token before each row's root, the last token of its text.
    slow: runs the model's own states h of the tokens through the first layers, which scoring will not run again.
    tokens: the tokens so far, the root first; each is one token of every row.
    """

    def __init__(self, network: M2R2, target: Target, cache: KVCache, carry: Carry) -> None:
        self.network = network
        self.target = target
        self.cache = cache
        self.carry = carry
        self.slow = PartialPass(target, cache)
        self.tokens: list[_Token] = []

    def push(self, token: Tensor, positions: Tensor) -> None:
        """Add one token of each row and its position, int64 [B, 1] each, at the beginning of the path.

        Its projections will read the ``carry`` of the token that was pushed before.
        """
        before = self.tokens[-1].carry if self.tokens else self.carry
        x = self.slow.push(token, positions)
        self.tokens.append(_Token(token, positions, x, before, Carry(x, [])))

    def to(self, exit: int) -> tuple[Tensor, list[Tensor]]:
        """Run the token that was pushed last, in each of B rows, along the draft path to an exit.

        Earlier tokens run the stages before this exit, too, if they have not yet.

        exit: index of the exit, from 0, in the order of the path.

        Returns a pair: the estimate of the token's final state h[N], the output of the model's last layer, [B, 1, D];
        and a list of the hidden states that the exit's router reads, [B, 1, D] each, in the order of the path, which
        the caller must not change. If the network has no routers, some are missing, and the list is of no use.
        """
        network, token = self.network, self.tokens[-1]
        self._run(network.path.stages_to_exit[exit])
        final = network.estimate(exit, token.p, token.previous_carry)
        return final, [*token.residuals, final] if network.path.final_projection else token.residuals

    def _run(self, stages: int) -> None:
        """Run the first ``stages`` stages (``M2R2Path.stages``) of the last token, and of earlier ones that lack them.

        Sets ``p`` and ``stages_run`` of these tokens, and appends to their ``carry.inputs`` and ``residuals``.
        """
        network, target, cache = self.network, self.target, self.cache
        shared, watched = network.path.shared, network.routers is not None
        for stage in range(self.tokens[-1].stages_run, stages):
            late = [token for token in self.tokens if token.stages_run == stage]
            ids, positions = (torch.cat(part, 1) for part in zip(*((t.ids, t.positions) for t in late), strict=True))
            lo, hi = network.path.stages[stage]
            if stage < len(shared):
                x = self.slow.to(lo)  # (B, n, D)
                p = self.slow.to(hi)[:, -len(late) :]
                passed = [p]
                if network.path.adapts_early:
                    p, passed = network.run_shared(target, x, lo, hi, positions, ids, cache, watched)
            else:
                index = stage - len(shared)
                for token in late:  # one after another: each depends on the projection of the token before
                    token.carry.inputs.append(network.project(index, token.p, token.previous_carry))
                x, mask = torch.cat([token.carry.inputs[index] for token in late], 1), cache.register(lo, positions)
                p, passed = network.run_segment(target, index, x, positions, ids, mask, cache, watched)
            for column, token in enumerate(late):
                token.p, token.stages_run = p[:, column : column + 1], stage + 1
                token.residuals += [residual[:, column : column + 1] for residual in passed]

    def finish(self) -> tuple[Tensor | None, int]:
        """End the draft; return states of its tokens from which scoring can resume.

        Returns (states, layer): the model's own hidden states h of the n tokens, [B, n, D], at the input of the deepest
        layer in 1 .. E that any token has reached, and the index of this layer. (None, 0): the path has no such layers
        (E is 0), or there is no token. Keys and values of later layers, which are the drafter's, are removed from the
        cache; those below ``layer`` stay, uncommitted.
        """
        path, cache = self.network.path, self.cache
        for segment, (lo, hi) in enumerate(path.segments, start=len(path.shared)):
            cache.trim(sum(token.stages_run > segment for token in self.tokens), lo, hi)
        if not path.shared or not self.tokens:
            return None, 0
        return self.slow.finish()
