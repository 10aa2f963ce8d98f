"""The one decoding loop: prefill, then draft, score, accept, commit, for every drafter and every acceptance rule.

Knows no drafter, no text and no command line: tokens in, tokens out, for a batch of ragged rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec import kernels
from specdec.depth import DepthPolicy
from specdec.draft import Draft, Drafter, State, Verdict, Verifier
from specdec.metrics import Ledger, RequestMetrics
from specdec.prefill import prefill
from specdec.sampling import Sampler, draw
from specdec.target import Target
from specdec.transfer import download

NOTHING = torch.empty(0)
DRAFTED = 16  # slots that the nodes of a usual draft take


class Loop:
    """One generation. ``rounds`` yields, after the prefill and after each round, ``[(row, new tokens), ...]``.

    ``limits[b]``: most new tokens of row b. ``stop(row, token)`` is asked for each new token in order and returns a
    finish reason or None; a row ends there, or at its limit with reason "length". Reasons land in ``finished``.
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
        self.target, self.drafter, self.verifier = target, drafter, verifier
        self.limits, self.stop, self.policy = limits, stop, policy
        self.state = State(target, target.new_cache(len(prompts)), sampler, [list(p) for p in prompts])
        self.state.threshold = getattr(verifier, "threshold", None)
        longest = max((len(p) + limit for p, limit in zip(prompts, limits, strict=True)), default=0)
        self.state.cache.expected = min(longest + DRAFTED, target.context)
        self.rows = list(range(len(prompts)))  # the request behind each row of the batch
        self.finished: dict[int, str] = {}
        self.metrics = [RequestMetrics(num_prompt_tokens=len(p), num_layers=target.num_layers) for p in prompts]
        self.ledger = Ledger()
        drafter.start(len(prompts))

    def rounds(self) -> Iterator[list[tuple[int, list[int]]]]:
        self.ledger.restart()
        yield self._commit(self._prefill(), prefill=True)
        while self.rows:
            self.ledger.restart()
            yield self._commit(self._round())

    @torch.inference_mode()
    def admit(self, prompts: list[list[int]], limits: list[int], sampler: Sampler) -> list[tuple[int, list[int]]]:
        """Add rows between two rounds, with the sampler of theirs; return their first tokens, as ``rounds`` does.

        They are numbered after those there are. For drafters that keep nothing per row (``stateless``).
        """
        assert getattr(self.drafter, "stateless", False), "this drafter's rows begin together"
        first, state = len(self.metrics), self.state

        def stop(row: int, token: int) -> str | None:
            return self.stop(first + row, token)

        guests = Loop(self.target, self.drafter, self.verifier, sampler, prompts, limits, stop, self.policy)
        events = guests._commit(guests._prefill(), prefill=True)
        self.limits, self.metrics = self.limits + limits, self.metrics + guests.metrics
        self.finished |= {first + row: reason for row, reason in guests.finished.items()}
        if not self.rows:
            self.state = guests.state
        elif guests.rows:
            state.ids += guests.state.ids
            state.cache.join(guests.state.cache)
            state.sampler.generators += sampler.generators
        self.rows += [first + row for row in guests.rows]
        return [(first + row, tokens) for row, tokens in events]

    @torch.inference_mode()
    def _prefill(self) -> list[list[int]]:
        """Run the prompts through the target; return each row's first token."""
        state = self.state
        last = prefill(self.target, state.cache, state.ids, self._taps, self.drafter.observe)  # (B, 1, D)
        logits = self.target.readout(last)  # (B, 1, V)
        p = state.sampler.distribution(logits, lambda: [[ids] for ids in state.ids])
        firsts = [[token] for token in draw(p[:, 0], state.sampler.generators)]
        self.ledger.mark("prefill")
        return firsts

    @torch.inference_mode()
    def _round(self) -> list[list[int]]:
        """Draft, score, accept, commit; return each row's new tokens."""
        state, target, cache, drafter = self.state, self.target, self.state.cache, self.drafter
        room = max(self.limits[r] - self.metrics[r].num_new_tokens for r in self.rows) - 1  # the bonus token is one
        limit = min(self.policy.depth(cache.batch), room, target.context - 1 - cache.committed)
        if limit > 0:
            state.confidence, state.spare = self.policy.confidence(), self.policy.spare(cache.batch, limit)
            state.exit = self.policy.exit
        self.ledger.mark("overhead")
        draft = drafter.propose(state, limit) if limit > 0 else Draft.empty(cache.batch, cache.device)
        drafting = self.ledger.mark("draft")

        depths, (tokens, positions) = draft.depths(), state.block(draft)  # (B, 1 + M)
        tree, exit_layer = draft.ancestors(), draft.exit_layer
        done = 0 if draft.states is None else draft.states.shape[1]  # block tokens that are already at exit_layer
        x = draft.states
        if done < tokens.shape[1]:
            late = _after(done, positions)
            y = target.embed(_after(done, tokens), late)
            if exit_layer:
                mask = cache.mask(0, late, None if tree is None else tree[done:])
                y = target.layers(y, 0, exit_layer, late, mask, cache)
            x = y if x is None else torch.cat((x, y), 1)
        assert x is not None
        taps, filled = self._taps(), self._fill(draft, x, positions)
        x, late = _after(filled, x), _after(filled, positions)
        mask = cache.mask(exit_layer, late, tree)
        x = target.layers(x, exit_layer, target.num_layers, late, mask, cache, taps)
        greedy, tapped = state.sampler.plain_greedy, target.num_layers + 1 in taps
        logits = target.readout(x) if tapped or not greedy else NOTHING  # (B, 1 + M, V)
        if tapped:
            taps[target.num_layers + 1] = logits
        if filled:  # nobody asks about tokens whose states were propagated
            taps = {layer: F.pad(seen, (0, 0, filled, 0)) if seen.numel() else seen for layer, seen in taps.items()}
        if greedy:
            unread = [draft.tokens] if draft.listed is None else []
            if tapped:
                *read, chosen = download(*unread, kernels.argmax(logits))  # [B][M], [B][1 + M]
            else:
                *read, chosen = target.choose(x, *unread)
            draft.listed = read[0] if read else draft.listed
            rest = self.ledger.mark("score")
            verdict = _judge_choice(self.verifier, draft, [[0] * filled + row for row in chosen] if filled else chosen)
        else:
            p = F.pad(logits, (0, 0, filled, 0)) if filled else logits
            p = state.sampler.distribution(p, lambda: _prefixes(state.ids, draft))  # (B, 1 + M, V)
            draft.lists()
            rest = self.ledger.mark("score")
            verdict = self.verifier.judge(draft, p, state.sampler.generators)
        rest += self.ledger.mark("accept")
        cache.keep(verdict.paths)
        drafter.observe(verdict.paths, taps)
        drafted, new = draft.lists(), []
        for b, (path, token) in enumerate(zip(verdict.paths, verdict.next_tokens, strict=True)):
            nodes = [n for n, t in enumerate(drafted[b], start=1) if t >= 0]
            deepest = max((depths[n] for n in nodes), default=0)
            self.metrics[self.rows[b]].step(deepest, len(nodes), len(path) - 1)
            new.append([drafted[b][n - 1] for n in path[1:]] + [token])
            if state.threshold is not None and draft.layers is not None:
                self.metrics[self.rows[b]].exit_layers += draft.layers[b, [n - 1 for n in path[1:]]].tolist()
        rest += self.ledger.mark("commit")
        seen = [self.metrics[r] for r in self.rows]
        offered, accepted = [m.per_step_drafted[-1] for m in seen], [m.per_step_accepted[-1] for m in seen]
        self.policy.observe(offered, accepted, tokens.numel(), drafting, rest)
        self.ledger.mark("overhead")
        return new

    def _fill(self, draft: Draft, x: Tensor, positions: Tensor) -> int:
        """How many block tokens need not be run deeper, their states x [B, 1 + M, D] at the exit being propagated.

        Those before the last token of every row, where drafted tokens stand unjudged and the rule allows it.
        """
        if not getattr(self.verifier, "propagates", False):
            return 0
        filled = int((draft.tokens >= 0).sum(1).min())
        if filled:
            early, cache = positions[:, :filled], self.state.cache
            mask = cache.mask(draft.exit_layer, early)
            self.target.fill(x[:, :filled], draft.exit_layer, early, mask, cache)
        return filled

    def _taps(self) -> dict[int, Tensor]:
        return dict.fromkeys(self.drafter.taps, NOTHING)

    @torch.inference_mode()
    def _commit(self, new: list[list[int]], prefill: bool = False) -> list[tuple[int, list[int]]]:
        """Append each row's new tokens, cut where plain decoding would stop, and drop the rows that ended."""
        events, alive, rows = [], [], list(self.rows)
        for b, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            metrics, kept = self.metrics[row], 0
            for token in tokens:
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
        self.ledger.mark("detokenise")
        if len(alive) < len(self.rows):
            alive = _close_up(alive)
            self.rows = [self.rows[b] for b in alive]
            if alive:
                self.state.ids = [self.state.ids[b] for b in alive]
                for part in (self.state.cache, self.state.sampler, self.drafter):
                    part.select(alive)
        self.ledger.mark("overhead")
        seconds = sum(self.ledger.seconds.values())
        for row in rows:
            metrics = self.metrics[row]
            metrics.prefill_seconds = self.ledger.seconds["prefill"]
            metrics.decode_seconds = seconds - metrics.prefill_seconds
            metrics.ledger = dict(self.ledger.seconds)
        return events


def _after(count: int, x: Tensor) -> Tensor:
    """``x`` [B, T, ...] without the first ``count`` tokens. A slice costs as much if it takes everything."""
    return x[:, count:] if count else x


def _judge_choice(verifier: Verifier, draft: Draft, choice: list[list[int]]) -> Verdict:
    """The verdict on point masses at ``choice`` [B][1 + M], by the verifier's own rule."""
    if not draft.parents:  # nothing to judge
        return Verdict([[0] for _ in choice], [row[0] for row in choice])
    verdict = Verdict([], [])
    for tokens, row in zip(draft.lists(), choice, strict=True):
        nodes = zip(tokens, draft.parents, strict=True)
        match = tuple(token == row[parent] if token >= 0 else None for token, parent in nodes)
        path, at = _judge_match(_Same(verifier), draft.parents, match)
        verdict.paths.append(list(path))
        verdict.next_tokens.append(row[at])
    return verdict


class _Same:
    """A verifier as a key: itself, whatever it says that it equals."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier

    def __hash__(self) -> int:
        return id(self.verifier)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.verifier is other.verifier


@functools.lru_cache(maxsize=1024)
def _judge_match(rule: _Same, parents: tuple[int, ...], match: tuple[bool | None, ...]) -> tuple[tuple[int, ...], int]:
    """The path that stands in a row, and the block token whose choice follows it.

    match: which drafted tokens are the choice after their parents (None: no such token). With point masses nothing else
    counts, so each choice is a token of its own here, and one more stands for all others.
    """
    count = 1 + len(parents)
    names = {None: -1, False: count}
    tokens = [names.get(same, parent) for same, parent in zip(match, parents, strict=True)]
    p = torch.eye(count, count + 1)[None]  # (1, 1 + M, 2 + M)
    verdict = rule.verifier.judge(Draft([tokens], parents), p, [torch.Generator()])
    return tuple(verdict.paths[0]), verdict.next_tokens[0]


def _close_up(alive: list[int]) -> list[int]:
    """The rows that go on, in an order that moves few of them: the last ones take the places of those that ended."""
    count = len(alive)
    stay, last = {b for b in alive if b < count}, iter([b for b in alive if b >= count])
    return [b if b in stay else next(last) for b in range(count)]


def _prefixes(ids: list[list[int]], draft: Draft) -> list[list[list[int]]]:
    """The tokens up to and including each block token, per row: what a logits processor looks at."""
    out = []
    for row, tokens in zip(ids, draft.lists(), strict=True):
        block = [row]
        for token, parent in zip(tokens, draft.parents, strict=True):
            block.append([*block[parent], max(token, 0)])
        out.append(block)
    return out
