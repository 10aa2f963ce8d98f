"""The running rows, and one step of them: draft, score, verify, commit, for every drafter and every acceptance rule.

Knows no drafter, no text and no command line: tokens in, tokens out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specdec.base.errors import NotFiniteError
from specdec.engine.depth.policy import DepthPolicy, StepReport
from specdec.engine.logprobs import prompt_logprobs, token_logprobs
from specdec.engine.metrics import Ledger
from specdec.engine.request import Request
from specdec.engine.scoring import Scores, score
from specdec.kvcache.cache import KVCache
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target
from specdec.speculation.draft import Acceptance, Draft, Drafter, DrafterWarning, State, Verifier, check_draft
from specdec.speculation.sampling import Sampler
from specdec.speculation.trie import merge

NOTHING = torch.empty(0)
RESTARTS = 5  # how often a drafter that has failed begins anew in an engine's life
FORCED = 16  # most tokens that are drafted where a constraint leaves no choice


class Batch:
    """Rows that decode together; they come and go between steps.

    A drafter that fails, or proposes what cannot be scored, is dropped with a DrafterWarning; decoding goes on plainly
    until the next request comes, for which it is started again, ``RESTARTS`` times at most. failures: so far.
    """

    def __init__(self, target: Target, drafter: Drafter, verifier: Verifier, policy: DepthPolicy) -> None:
        self.target, self.verifier, self.policy = target, verifier, policy
        self.given, self.failures, self.unseen = drafter, 0, False
        self.drafter: Drafter | None = drafter  # None: it has failed
        self.rows: list[Request] = []
        self.cache = target.new_cache(0)
        self.ledger = Ledger(target.device)
        self.state = State(target, self.cache, Sampler.of([]), [], threshold=verifier.threshold)
        with self._drafting():
            drafter.start()

    # -- rows come and go ---------------------------------------------------------------------------------------------

    @property
    def drafting(self) -> str:
        """Whether the drafter is "on" or, as it has failed, "off"; "none": it never drafts."""
        return "none" if not self.given.drafts else "off" if self.drafter is None else "on"

    def restart(self, rows: Sequence[Request]) -> None:
        """Start a drafter that has failed again. It has seen nothing of ``rows``, which are all that run."""
        if self.drafter is None and self.failures <= RESTARTS:
            self.drafter, self.unseen = self.given, bool(self.rows)
            with self._drafting():
                self.given.start()
                for row in rows:
                    row.memory = self.given.begin()
            self._gather()

    def begin(self, row: Request) -> None:
        """A row is admitted: what is kept of it begins."""
        row.memory, row.metrics.num_layers = None, self.target.num_layers
        if row.history is None:
            row.history = self.policy.begin()
        if self.drafter is not None:
            with self._drafting():
                row.memory = self.drafter.begin()

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Request], cache: KVCache, counts: Sequence[int]) -> list[Request]:
        """Run the next ``counts`` tokens of the rows, whose ``cache`` this is; return those that have been run whole.

        Each of these has taken its next token then.
        """
        parts = [row.ids[n : n + count] for row, n, count in zip(rows, cache.rows, counts, strict=True)]
        taps, whole_prompts = self._taps(), self.drafter is not None and self.drafter.whole_prompts
        begun = list(cache.rows)
        every: list[Tensor] | None = [] if any(row.prompt_logprobs for row in rows) else None
        last = run_tokens(self.target, cache, parts, taps, whole_prompts, every)  # (B, 1, D)
        for row, start, states in zip(rows, begun, every or (), strict=False):
            if row.unscored and (done := len(row.prompt_scored)) < start + len(states):  # some before it gave way
                following = row.prompt[done + 1 : start + 1 + len(states)]
                row.prompt_scored += prompt_logprobs(self.target, states[done - start :], following, row.logprobs or 0)
        paths = [list(range(len(part) if whole_prompts else min(len(part), 1))) for part in parts]
        self._observe([row.memory for row in rows], paths, taps)
        whole = [b for b, (row, n) in enumerate(zip(rows, cache.rows, strict=True)) if n == len(row.ids)]
        joined = [rows[b] for b in whole]
        if joined:
            self._choose(joined, last[whole])
        self.ledger.mark("prefill")
        return joined

    def _choose(self, rows: Sequence[Request], last: Tensor) -> None:
        """Let each row take the token after its last one, whose final states [B, 1, D] these are."""
        sampler = Sampler.of([row.sampling for row in rows])
        if sampler.plain_greedy and all(row.logprobs is None for row in rows):
            [chosen] = self.target.choose(last)
        else:
            logits = self.target.readout(last)
            scores = sampler.scores(logits, lambda: [[row.ids] for row in rows])  # (B, 1, V)
            chosen = sampler.choose(scores, [[len(row.ids)] for row in rows]).tolist()
        self.ledger.mark("prefill")
        for b, (row, tokens) in enumerate(zip(rows, chosen, strict=True)):
            row.take(tokens, [0])
            if row.logprobs is not None:
                row.scored += token_logprobs(logits[b, : len(row.new)], row.new, row.logprobs)
        self.ledger.mark("detokenise")

    def join(self, rows: Sequence[Request], cache: KVCache) -> None:
        """Add rows that have been run, with their cache."""
        if self.rows:
            self.cache.join(cache)
        else:
            self.cache = cache
        self.rows += rows
        self._gather()

    def keep(self, rows: Sequence[Request]) -> None:
        """Let all other rows go."""
        alive = [b for b, row in enumerate(self.rows) if row in rows]
        if len(alive) == len(self.rows):
            return
        if alive:
            self.cache.select(close_up(alive))
        else:
            self.cache = self.target.new_cache(0)
        self.rows = [self.rows[b] for b in close_up(alive)]
        self._gather()

    def clear(self) -> None:
        """Let all rows go."""
        self.rows, self.cache = [], self.target.new_cache(0)
        self._gather()

    def _gather(self) -> None:
        rows = self.rows
        sampler = Sampler.of([row.sampling for row in rows])
        memory, scopes = [row.memory for row in rows], [row.scope for row in rows]
        self.state = replace(
            self.state, cache=self.cache, sampler=sampler, ids=[row.ids for row in rows], memory=memory, scopes=scopes
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, scoring: Callable[[], object] = lambda: None) -> None:
        """Draft, score, verify, let each row take what is accepted, and commit what it has taken.

        A row may end inside its draft: what is behind the end is never committed, so that the cache has what was run of
        the row's text, and nothing else. scoring: called when the model is about to score.
        """
        depths = self._budget()
        self.ledger.begin()
        forced = self._forced()
        draft = self._draft([0 if tokens else depth for tokens, depth in zip(forced, depths, strict=True)])
        if any(forced):
            draft = self._put_first(forced, draft)
        self.ledger.mark("draft")
        scoring()
        scores = self._score(draft)
        self.ledger.mark("score")
        accepted = self.verifier.verify(draft, scores.chosen, scores.p)
        self.ledger.mark("accept")
        taken = self._take(draft, accepted)
        self.ledger.mark("detokenise")
        slots = scores.slots(taken)
        self.cache.commit(slots)
        self._observe(self.state.memory, taken, scores.taps)
        self.unseen = False
        self.ledger.mark("commit")
        self._learn(draft, accepted, scores.count, any(forced))
        for b, logits in scores.logits.items():
            row = self.rows[b]
            row.scored += token_logprobs(logits[slots[b]], row.new, row.logprobs or 0)

    def _take(self, draft: Draft, accepted: Acceptance) -> list[list[int]]:
        """Let each row take its new tokens; return the part of its path that the cache needs: one node for each."""
        drafted, places, paths = draft.lists(), draft.depths(), []
        for b, (row, path, token) in enumerate(zip(self.rows, accepted.paths, accepted.next_tokens, strict=True)):
            row.take([*(drafted[b][node - 1] for node in path[1:]), token], [*(places[node] for node in path[1:]), 0])
            paths.append(path[: len(row.new)])
        return paths

    def _budget(self) -> list[int]:
        """How deep to draft for each row in this step."""
        state, rows = self.state, self.rows
        able = self.drafter is not None and not self.unseen
        drafting = [b for b, row in enumerate(rows) if row.draft and able]
        choice = self.policy.choose([rows[b].history for b in drafting], len(rows) - len(drafting))
        state.exit, state.prices = choice.exit, choice.prices
        depths = [0] * len(rows)
        for b, depth in zip(drafting, choice.depths or [choice.depth] * len(drafting), strict=True):
            depths[b] = self._room(b, depth)
        self.ledger.mark("overhead")
        return depths

    def _room(self, b: int, most: int) -> int:
        """How deep a draft of row ``b`` may be, at most ``most``."""
        row = self.rows[b]
        # A lossy rule's text may depend on the depth: there the limit does not bound it.
        most = min(most, row.left - 1) if self.verifier.lossless else most
        return max(min(most, self.target.context - 1 - self.cache.rows[b]), 0) if row.draft else 0

    def _forced(self) -> list[list[int]]:
        """The tokens that each row's constraint leaves no choice about; drafted before the drafter is asked."""
        if self.drafter is None or self.unseen or not self.drafter.drafts:
            return [[] for _ in self.rows]
        found = []
        for b, row in enumerate(self.rows):
            constraint, room = row.sampling.constraint, self._room(b, FORCED)
            found.append(constraint.forced(row.ids, room) if constraint is not None and room else [])
        return found

    def _put_first(self, forced: list[list[int]], draft: Draft) -> Draft:
        """``draft`` with the forced tokens of a row in place of what was drafted for it."""
        self.cache.roll_back()  # states below an exit layer belong to the draft as it was
        paths = [[tokens] if tokens else draft.paths(b) for b, tokens in enumerate(forced)]
        for b in range(len(self.rows)):
            self._withdraw(b)
        return merge(paths, self.cache.device)[0]

    def _withdraw(self, b: int) -> None:
        if self.drafter is not None:
            with self._drafting():
                self.drafter.withdraw(self.state.memory[b])

    def _draft(self, depths: list[int]) -> Draft:
        """What the drafter proposes, at most ``depths`` deep, if it can be scored; else nothing."""
        state, limit = self.state, max(depths)
        if limit and self.drafter is not None:
            with self._drafting():
                draft = self.drafter.propose(state, limit)
                fault = check_draft(draft, len(self.rows), limit, self.target.vocab_size)
                if fault is None:
                    for b in draft.within(depths):
                        self.drafter.withdraw(state.memory[b])
                    return draft
                self._drop(f"proposed a draft that cannot be scored: {fault}")
        self.cache.roll_back()  # what a drafter that failed has left there
        return Draft.empty(len(self.rows), self.cache.device)

    def _score(self, draft: Draft) -> Scores:
        wanted = [b for b, row in enumerate(self.rows) if row.logprobs is not None]
        scores = score(self.state, draft, self._taps(), self.verifier, wanted)
        if scores.fault is not None:
            self._drop(f"proposed tokens that cannot be scored: {scores.fault}")
        return scores

    def _learn(self, draft: Draft, accepted: Acceptance, scored: int, forced: bool) -> None:
        """Book what was drafted and accepted in each row's metrics, and let the depth policy see what the step took.

        forced: some of it was not the drafter's, so the policy learns nothing from it.
        """
        drafted, depths, deepest = draft.lists(), draft.depths(), []
        for b, (row, path) in enumerate(zip(self.rows, accepted.paths, strict=True)):
            nodes = [node for node, token in enumerate(drafted[b], start=1) if token >= 0]
            deepest.append(max((depths[node] for node in nodes), default=0))
            row.metrics.step(deepest[-1], len(nodes), min(len(path) - 1, len(row.new)))
            if self.verifier.threshold is not None and draft.layers is not None:
                took = path[1 : 1 + len(row.new)]
                row.metrics.exit_layers += draft.layers[b, [node - 1 for node in took]].tolist()
        if not forced:
            step, taken = self.ledger.step, [len(path) - 1 for path in accepted.paths]
            rest = step["score"] + step["accept"] + step["commit"]
            histories = [row.history for row in self.rows]
            self.policy.observe(StepReport(histories, deepest, taken, scored, step["draft"], rest))
        self.ledger.mark("overhead")

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
        self.drafter, self.failures = None, self.failures + 1

    def _taps(self) -> dict[int, Tensor]:
        return dict.fromkeys(self.drafter.taps if self.drafter is not None else (), NOTHING)

    def _observe(self, memory: list[object], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        if self.drafter is not None:
            with self._drafting():
                self.drafter.observe(memory, paths, taps)

    def end(self, row: Request) -> None:
        """A row has left for good."""
        if self.drafter is not None:
            with self._drafting():
                self.drafter.end(row.memory, row.ids)


def not_finite(target: Target, row: Request, number: int | None) -> NotFiniteError:
    """The error of a row, whose next token cannot be chosen. number: of the row, where there are several."""
    where = f"position {len(row.ids)}" + (f" of row {number}" if number is not None else "")
    remedy = "use --dtype float32" if target.dtype == torch.float16 else "the checkpoint may be damaged; get it again"
    return NotFiniteError(f"the model's logits are not finite at {where} ({target.dtype}); {remedy}")


def close_up(alive: list[int]) -> list[int]:
    """The rows that go on, in an order that moves few of them: the last ones take the places of those that ended."""
    count = len(alive)
    stay, last = {b for b in alive if b < count}, iter([b for b in alive if b >= count])
    return [b if b in stay else next(last) for b in range(count)]
