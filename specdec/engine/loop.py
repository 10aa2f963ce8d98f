"""The one decoding loop: prefill, then draft, score, verify, commit, for every drafter and every acceptance rule.

Knows no drafter, no text and no command line: tokens in, tokens out, for a batch of ragged rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.base.devices import download
from specdec.base.errors import NotFiniteError
from specdec.engine.depth import DepthPolicy
from specdec.engine.metrics import Ledger, RequestMetrics
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.prefill import prefill
from specdec.runtimes.target import Target, largest
from specdec.speculation.draft import (
    Acceptance,
    Draft,
    Drafter,
    DrafterWarning,
    State,
    Verifier,
    check_draft,
    check_tokens,
)
from specdec.speculation.sampling import Sampler

NOTHING = torch.empty(0)
DRAFTED = 16  # slots that the nodes of a usual draft take


@dataclass
class Scores:
    """What a scoring pass says of a block. chosen: [B][1 + M], the target's choice after each block token (-1: its
    logits are not finite). p: its distributions [B, 1 + M, V], where the verifier reads them. taps: tapped states."""

    chosen: list[list[int]]
    p: Tensor | None
    taps: dict[int, Tensor]


class Loop:
    """One generation. ``steps`` yields, after the prefill and after each step, ``[(row, new tokens), ...]``.

    ``limits[b]``: most new tokens of row b. ``stop(row, token)`` is called for each new token in order and returns a
    finish reason or None; a row ends there, or at its limit with reason "length". Reasons land in ``finished``.
    Raises NotFiniteError where the model's logits are not finite, after yielding the tokens before that position. A
    drafter that fails, or proposes what cannot be scored, is dropped with a DrafterWarning; decoding goes on plainly.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        verifier: Verifier,
        sampler: Sampler,
        prompts: list[list[int]],
        limits: list[int],
        stop: Callable[[int, int], str | None],
        policy: DepthPolicy,
    ) -> None:
        self.target, self.verifier, self.limits, self.stop, self.policy = target, verifier, limits, stop, policy
        self.drafter: Drafter | None = drafter
        self.state = State(target, target.new_cache(len(prompts)), sampler, [list(p) for p in prompts])
        self.state.threshold = verifier.threshold
        longest = max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0)
        self.state.cache.expected = min(longest + DRAFTED, target.context)
        self.rows = list(range(len(prompts)))  # the request behind each row of the batch
        self.finished: dict[int, str] = {}
        self.ledger = Ledger(target.device)
        self.metrics = [RequestMetrics(len(p), num_layers=target.num_layers) for p in prompts]
        for metrics in self.metrics:
            metrics.ledger = self.ledger.seconds  # shared until the row ends
        self.fault: str | None = None  # why decoding cannot go on
        with self._drafting():
            drafter.start(len(prompts))

    def steps(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Prefill, then step until every row has ended."""
        self.ledger.restart()
        yield self._commit(self._prefill(), prefill=True)
        while self.rows and self.fault is None:
            self.ledger.restart()
            yield self._commit(self._step())
        if self.fault is not None:
            raise NotFiniteError(self.fault)

    @torch.inference_mode()
    def admit(self, prompts: list[list[int]], limits: list[int], sampler: Sampler) -> list[tuple[int, list[int]]]:
        """Add rows between two steps, with samplers of their own; return their first tokens, as ``steps`` does.

        They are numbered after those there are. For drafters that keep nothing per row (``stateless``).
        """
        assert self.drafter is not None and self.drafter.stateless, "this drafter's rows begin together"
        first, state = len(self.metrics), self.state

        def stop(row: int, token: int) -> str | None:
            return self.stop(first + row, token)

        others = Loop(self.target, self.drafter, self.verifier, sampler, prompts, limits, stop, self.policy)
        events = others._commit(others._prefill(), prefill=True)
        self.limits, self.metrics = self.limits + limits, self.metrics + others.metrics
        self.finished |= {first + row: reason for row, reason in others.finished.items()}
        self.fault = self.fault or others.fault
        if not self.rows:
            self.state = others.state
        elif others.rows:
            state.ids += others.state.ids
            state.cache.join(others.state.cache)
            state.sampler.join(others.state.sampler)
        self.rows += [first + row for row in others.rows]
        for row in self.rows:
            self.metrics[row].ledger = self.ledger.seconds
        return [(first + row, tokens) for row, tokens in events]

    @torch.inference_mode()
    def _prefill(self) -> list[list[int]]:
        """Run the prompts through the target; return each row's first token."""
        state = self.state
        last = prefill(self.target, state.cache, state.ids, self._taps, self._observe)  # (B, 1, D)
        if state.sampler.plain_greedy:
            [chosen] = self.target.choose(last)
        else:
            scores = state.sampler.scores(self.target.readout(last), lambda: [[ids] for ids in state.ids])  # (B, 1, V)
            chosen = state.sampler.choose(scores, [[len(ids)] for ids in state.ids]).tolist()
        self.ledger.mark("prefill")
        return chosen

    @torch.inference_mode()
    def _step(self) -> list[list[int]]:
        """Draft, score, verify, commit; return each row's new tokens."""
        limit = self._budget()
        self.ledger.begin()
        draft = self._draft(limit)
        self.ledger.mark("draft")
        scores = self._score(draft)
        self.ledger.mark("score")
        accepted = self.verifier.verify(draft, scores.chosen, scores.p)
        self.ledger.mark("accept")
        self.state.cache.commit(accepted.paths)
        self._observe(accepted.paths, scores.taps)
        self.ledger.mark("commit")
        self._learn(draft, accepted)
        drafted = draft.lists()
        pairs = zip(accepted.paths, accepted.next_tokens, strict=True)
        return [[drafted[b][node - 1] for node in path[1:]] + [token] for b, (path, token) in enumerate(pairs)]

    def _budget(self) -> int:
        """How deep to draft in this step."""
        state, cache = self.state, self.state.cache
        depth, state.exit, state.prices = self.policy.choose(cache.batch)
        if self.verifier.lossless:  # a lossy rule's text may depend on the depth, which no other row may change
            depth = min(depth, max(self.limits[r] - self.metrics[r].num_new_tokens for r in self.rows) - 1)
        depth = min(depth, self.target.context - 1 - cache.committed) if self.drafter is not None else 0
        self.ledger.mark("overhead")
        return max(depth, 0)

    def _draft(self, limit: int) -> Draft:
        """What the drafter proposes, at most ``limit`` deep, if it can be scored; else nothing."""
        state = self.state
        if limit and self.drafter is not None:
            with self._drafting():
                draft = self.drafter.propose(state, limit)
                fault = check_draft(draft, state.cache.batch, limit, self.target.vocab_size)
                if fault is None:
                    return draft
                self._drop(f"proposed a draft that cannot be scored: {fault}")
        state.cache.roll_back()  # what a drafter that failed has left there
        return Draft.empty(state.cache.batch, state.cache.device)

    def _score(self, draft: Draft) -> Scores:
        """Run the block through the target from where the draft's states end; choose a token after each of its own."""
        state, target, cache = self.state, self.target, self.state.cache
        tokens, positions = state.block(draft)  # (B, 1 + M)
        x, tree, exit_layer = self._resume(draft, tokens, positions), draft.ancestors(), draft.exit_layer
        taps, filled = self._taps(), self._fill(draft, x, positions)
        x, late = _after(filled, x), _after(filled, positions)
        x = target.layers(x, exit_layer, target.num_layers, Pass(late, cache.mask(exit_layer, late, tree), cache, taps))
        greedy, tapped = state.sampler.plain_greedy, target.num_layers + 1 in taps
        p, unread = None, [draft.tokens] if draft.listed is None else []
        if greedy and not tapped:
            *read, chosen = target.choose(x, *unread)
        else:
            logits = target.readout(x)  # (B, 1 + M - filled, V)
            if tapped:
                taps[target.num_layers + 1] = logits
            if greedy:
                tokens = largest(logits)
            else:
                scores = state.sampler.scores(logits, lambda: _prefixes(state.ids, draft, filled))
                after = [[len(ids) + depth for depth in draft.depths()[filled:]] for ids in state.ids]
                tokens = state.sampler.choose(scores, after)
                p = scores.softmax(-1) if self.verifier.needs_probabilities else None
            *read, chosen = download(*unread, tokens)  # [B][M], [B][1 + M - filled]
        if read:
            draft.listed = read[0]
            if fault := check_tokens(read[0], cache.batch, len(draft.parents), target.vocab_size):
                self._drop(f"proposed tokens that cannot be scored: {fault}")
                draft.listed = [[-1] * len(draft.parents)] * cache.batch
        if filled:  # the tokens whose states were propagated have no scores
            chosen = [[0] * filled + row for row in chosen]
            p = None if p is None else F.pad(p, (0, 0, filled, 0))
            taps = {layer: F.pad(seen, (0, 0, filled, 0)) if seen.numel() else seen for layer, seen in taps.items()}
        return Scores(chosen, p, taps)

    def _resume(self, draft: Draft, tokens: Tensor, positions: Tensor) -> Tensor:
        """The block's states [B, 1 + M, D] at the draft's exit layer: those the draft has, and the others run now."""
        target, cache, exit_layer = self.target, self.state.cache, draft.exit_layer
        done = 0 if draft.states is None else draft.states.shape[1]
        if draft.states is not None and done == tokens.shape[1]:
            return draft.states
        late, tree = _after(done, positions), draft.ancestors()
        y = target.embed(_after(done, tokens), late)
        if exit_layer:
            mask = cache.mask(0, late, None if tree is None else tree[done:])
            y = target.layers(y, 0, exit_layer, Pass(late, mask, cache))
        return y if draft.states is None else torch.cat((draft.states, y), 1)

    def _fill(self, draft: Draft, x: Tensor, positions: Tensor) -> int:
        """How many block tokens need not be run deeper, their states x [B, 1 + M, D] at the exit being propagated.

        Those before the last token of every row, where drafted tokens are accepted without scoring.
        """
        if not self.verifier.propagates:
            return 0
        filled = int((draft.tokens >= 0).sum(1).min())
        if filled:
            early, cache = positions[:, :filled], self.state.cache
            mask = cache.mask(draft.exit_layer, early)
            self.target.fill(x[:, :filled], draft.exit_layer, Pass(early, mask, cache))
        return filled

    # -- the drafter, which must not end a request --------------------------------------------------------------------

    @contextmanager
    def _drafting(self) -> Iterator[None]:
        try:
            yield
        except DrafterWarning:  # where warnings are errors
            raise
        except Exception as error:
            self._drop(f"failed ({type(error).__name__}: {error})")

    def _drop(self, why: str) -> None:
        """Go on without the drafter."""
        assert self.drafter is not None
        warnings.warn(f"drafter '{self.drafter.name}' {why}; decoding goes on without it", DrafterWarning, stacklevel=2)
        self.drafter = None

    def _taps(self) -> dict[int, Tensor]:
        return dict.fromkeys(self.drafter.taps if self.drafter is not None else (), NOTHING)

    def _observe(self, paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        if self.drafter is not None:
            with self._drafting():
                self.drafter.observe(paths, taps)

    # -- after a step -------------------------------------------------------------------------------------------------

    def _learn(self, draft: Draft, accepted: Acceptance) -> None:
        """Book what was drafted and accepted in each row's metrics, and let the depth policy see what the step took."""
        drafted, depths, deepest = draft.lists(), draft.depths(), []
        for b, path in enumerate(accepted.paths):
            metrics = self.metrics[self.rows[b]]
            nodes = [node for node, token in enumerate(drafted[b], start=1) if token >= 0]
            deepest.append(max((depths[node] for node in nodes), default=0))
            metrics.step(deepest[-1], len(nodes), len(path) - 1)
            if self.verifier.threshold is not None and draft.layers is not None:
                metrics.exit_layers += draft.layers[b, [node - 1 for node in path[1:]]].tolist()
        step, scored = self.ledger.step, len(drafted) * (1 + len(draft.parents))
        rest = step["score"] + step["accept"] + step["commit"]
        self.policy.observe(deepest, [len(path) - 1 for path in accepted.paths], scored, step["draft"], rest)
        self.ledger.mark("overhead")

    @torch.inference_mode()
    def _commit(self, new: list[list[int]], prefill: bool = False) -> list[tuple[int, list[int]]]:
        """Append each row's new tokens, cut where plain decoding would stop, and drop the rows that ended."""
        events, alive, rows = [], [], list(self.rows)
        for b, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            metrics, kept = self.metrics[row], 0
            for token in tokens:
                if token < 0:
                    self.fault = self.fault or _not_finite(self.target, row, len(self.state.ids[b]) + kept, len(rows))
                    break
                kept += 1
                metrics.num_new_tokens += 1
                reason = self.stop(row, token)
                if reason is None and metrics.num_new_tokens >= self.limits[row]:
                    reason = "length"
                if reason is not None:
                    self.finished[row] = reason
                    break
            if not prefill:
                metrics.per_step_accepted[-1] = min(metrics.per_step_accepted[-1], kept)
                del metrics.exit_layers[metrics.num_accepted_draft_tokens :]
            self.state.ids[b] += tokens[:kept]
            events.append((row, tokens[:kept]))
            if row not in self.finished:
                alive.append(b)
        self.state.sampler.forget([len(ids) for ids in self.state.ids])
        self.ledger.mark("detokenise")
        if len(alive) < len(self.rows):
            self._select(_close_up(alive))
        self.ledger.mark("overhead")
        for row in self.finished.keys() & set(rows):
            self.metrics[row].ledger = dict(self.ledger.seconds)
        return events

    def _select(self, alive: list[int]) -> None:
        """Keep only the rows ``alive`` of the batch, in that order."""
        self.rows = [self.rows[b] for b in alive]
        if not alive:
            return
        self.state.ids = [self.state.ids[b] for b in alive]
        self.state.cache.select(alive)
        self.state.sampler.select(alive)
        if self.drafter is not None:
            with self._drafting():
                self.drafter.select(alive)


def _after(count: int, x: Tensor) -> Tensor:
    """``x`` [B, T, ...] without the first ``count`` tokens. A slice costs as much if it takes everything."""
    return x[:, count:] if count else x


def _not_finite(target: Target, row: int, position: int, rows: int) -> str:
    where = f"position {position}" + (f" of row {row}" if rows > 1 else "")
    remedy = "use --dtype float32" if target.dtype == torch.float16 else "the checkpoint may be damaged; get it again"
    return f"the model's logits are not finite at {where} ({target.dtype}); {remedy}"


def _close_up(alive: list[int]) -> list[int]:
    """The rows that go on, in an order that moves few of them: the last ones take the places of those that ended."""
    count = len(alive)
    stay, last = {b for b in alive if b < count}, iter([b for b in alive if b >= count])
    return [b if b in stay else next(last) for b in range(count)]


def _prefixes(ids: list[list[int]], draft: Draft, start: int = 0) -> Sequence[Sequence[Sequence[int]]]:
    """The tokens up to and including each block token from ``start`` on, per row: what a logits processor reads."""
    out = []
    for row, tokens in zip(ids, draft.lists(), strict=True):
        block = [row]
        for token, parent in zip(tokens, draft.parents, strict=True):
            block.append([*block[parent], max(token, 0)])
        out.append(block[start:])
    return out
