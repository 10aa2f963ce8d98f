"""The running rows, and one step of them: draft, score, verify, commit, for every drafter and every verifier.

Knows no drafter, no text and no command line: tokens in, tokens out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import NotFiniteError
from specdec.engine.depth.policy import MAX_FIXED_DEPTH, DepthChoice, DepthPolicy, StepReport
from specdec.engine.guard import DrafterGuard
from specdec.engine.logprobs import prompt_logprobs, token_logprobs
from specdec.engine.metrics import PhaseTimer
from specdec.engine.request import Request
from specdec.engine.scoring import score
from specdec.kvcache.cache import KVCache
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target
from specdec.speculation.draft import Draft, check_draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import Sampler
from specdec.speculation.state import State
from specdec.speculation.verifier import Acceptance, Verifier

NOTHING = torch.empty(0)
# Phases of a step (``PhaseTimer``) whose seconds count as scoring, and as drafting.
SCORING, DRAFTING = ("score", "accept", "commit"), ("overhead", "draft")
FORCED = 16  # maximum number of tokens that are drafted where a constraint leaves no choice


class Batch:
    """The rows that decode together, one per running request; rows join and leave between steps.

    While the drafter is off after a failure, rows are decoded without drafts.

    target: the model. verifier: decides which drafted tokens are accepted.
    policy: chooses the draft depths. guard: calls the drafter, and turns it off after an error.
    rows: the requests. cache: their keys and values, one row for each request in the same order.
    state: the rows as drafters see them. timer: the seconds of each phase of a step.
    chosen: whether the depth policy has chosen the draft depths of this step.
    drafter_behind: whether the drafter was restarted and has seen no hidden states of the rows yet; the next step runs
        without drafts, and shows it the first ones.
    """

    def __init__(self, target: Target, drafter: Drafter, verifier: Verifier, policy: DepthPolicy) -> None:
        self.target = target
        self.verifier = verifier
        self.policy = policy
        self.guard, self.drafter_behind = DrafterGuard(drafter, target), False
        self.rows: list[Request] = []
        self.chosen = True
        self.cache = target.new_cache(0)
        self.timer = PhaseTimer(target.device)
        self.state = State(target, self.cache, Sampler([]), [], threshold=verifier.threshold)

    # -- rows come and go ---------------------------------------------------------------------------------------------

    @property
    def drafter(self) -> Drafter | None:
        """The drafter; None while it is off after a failure."""
        return self.guard.drafter

    @property
    def drafting(self) -> str:
        """The drafter's status: "on", "off" (it has failed) or "none" (it never drafts)."""
        return "none" if not self.guard.configured.traits.drafts else "off" if self.drafter is None else "on"

    def recover(self, rows: Sequence[Request]) -> None:
        """Restart a drafter that has failed if its pause is over; no effect otherwise. Called before each step.

        rows: all running requests, those whose prompts run included; each gets a new ``drafter_state``.
        """

        def begin(drafter: Drafter) -> None:
            for row in rows:
                row.drafter_state = drafter.begin()

        if self.guard.restart(begin):
            self.drafter_behind = bool(self.rows)
            self._update_state()

    def begin(self, row: Request) -> None:
        """Set a row's ``drafter_state`` and ``depth_history`` before its prompt runs.

        A preempted row, whose prompt runs again, keeps its ``depth_history``.
        """
        row.metrics.num_layers = self.target.num_layers
        row.depth_history = row.depth_history or self.policy.begin()
        row.drafter_state = self.guard.call(lambda drafter: drafter.begin())

    @torch.inference_mode()
    def prefill(self, rows: Sequence[Request], cache: KVCache, counts: Sequence[int]) -> list[Request]:
        """Run the next ``counts[b]`` tokens of each prompt, and return the rows whose prompts are then complete.

        Each of these has got its next token (``Request.new_tokens``), which may have ended it, or has ended without
        one. Prompts include the output of preempted rows.

        rows: requests whose prompts are being run. cache: their keys and values so far, in the same order.
        counts: for each row, how many tokens to run after those in the cache.
        """
        starts = list(cache.rows)
        parts = [row.ids[n : n + count] for row, n, count in zip(rows, starts, counts, strict=True)]
        taps, whole_prompts = self._taps(), self.drafter is not None and self.drafter.traits.whole_prompts
        states: list[Tensor] | None = [] if any(row.prompt_logprobs for row in rows) else None
        last = run_tokens(self.target, cache, parts, taps, whole_prompts, states)  # (B, 1, D)
        cache.evict()
        if states is not None:
            for row, start, own in zip(rows, starts, states, strict=True):
                self._add_prompt_logprobs(row, start, own)
        paths = [list(range(len(part) if whole_prompts else min(len(part), 1))) for part in parts]
        self._observe([row.drafter_state for row in rows], paths, taps)
        complete = [b for b, (row, n) in enumerate(zip(rows, cache.rows, strict=True)) if n == len(row.ids)]
        joined = [rows[b] for b in complete]
        if joined:
            self._choose_first(joined, last[complete])
        if whole_prompts:
            alive = [(row, n) for row, n in zip(rows, cache.rows, strict=True) if row.finish_reason is None]
            self._keep_up([row.drafter_state for row, _ in alive], [row.ids[: n + 1] for row, n in alive])
        self.timer.mark("prefill")
        return joined

    def _add_prompt_logprobs(self, row: Request, start: int, states: Tensor) -> None:
        """Append log-probabilities of prompt tokens to ``row.prompt_token_logprobs``, if the row wants them.

        Those that are there already are left out.

        states: output of the last layer, before the final norm, for n consecutive prompt tokens, [n, D]. Each gives the
            log-probability of the token after it.
        start: index in the prompt of the first of these n tokens.
        """
        done = len(row.prompt_token_logprobs)  # some may be there from before a preemption
        if row.needs_prompt_logprobs and done < start + len(states):
            following = row.prompt[done + 1 : start + 1 + len(states)]
            scored = prompt_logprobs(self.target, states[done - start :], following, row.logprobs or 0)
            row.prompt_token_logprobs += scored

    def _choose_first(self, rows: Sequence[Request], last: Tensor) -> None:
        """Choose the token after the prompt of each of ``rows``, and append it to the row with its log-probability.

        last: output of the last layer, before the final norm, for the last token of each of these rows, [B, 1, D].
        """
        sampler = Sampler([row.sampler for row in rows])
        if sampler.plain_greedy and all(row.logprobs is None for row in rows):
            [chosen] = self.target.greedy_tokens(last)
        else:
            logits = self.target.readout(last)
            chosen = sampler.draw(
                logits, lambda: [[row.ids] for row in rows], [[len(row.ids)] for row in rows]
            ).tolist()
        self.timer.mark("prefill")
        for b, (row, tokens) in enumerate(zip(rows, chosen, strict=True)):
            row.append(tokens, [0])
            if row.logprobs is not None:
                row.token_logprobs += token_logprobs(logits[b, : len(row.new_tokens)], row.new_tokens, row.logprobs)
        self.timer.mark("detokenise")

    def join(self, rows: Sequence[Request], cache: KVCache) -> None:
        """Add rows whose prompts have run, after the present ones.

        cache: the keys and values of these rows, in this order. The batch takes them over.
        """
        if self.rows:
            self.cache.join(cache)
        else:
            self.cache = cache
        self.rows += rows
        self._update_state()

    def keep(self, rows: Sequence[Request]) -> None:
        """Remove all rows but ``rows``, with their keys and values; the others keep their order."""
        alive = [b for b, row in enumerate(self.rows) if row in rows]
        if len(alive) == len(self.rows):
            return
        if alive:
            self.cache.select(alive)
        else:
            self.cache = self.target.new_cache(0)
        self.rows = [self.rows[b] for b in alive]
        self._update_state()

    def _update_state(self) -> None:
        """Replace ``state`` by one of the present rows, without prices and draft depths, after rows have changed."""
        rows = self.rows
        self.state = replace(
            self.state,
            cache=self.cache,
            sampler=Sampler([row.sampler for row in rows]),
            ids=[row.ids for row in rows],
            prices=None,  # of the rows of a step
            row_states=[row.drafter_state for row in rows],
            scopes=[row.scope for row in rows],
            depths=[0] * len(rows),
        )

    # -- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, on_score: Callable[[], object] = lambda: None) -> None:
        """Run one step: draft, score, verify, append the accepted tokens to each row, and commit them to the cache.

        A row may end inside its draft. Tokens after its end are not committed: the cache holds only the row's text. The
        new tokens are in ``Request.new_tokens``. Rows that have ended stay in the batch until ``keep`` removes them.

        on_score: called just before the model scores.
        """
        # Draft
        forced = self._forced_tokens()
        self._choose_depths(forced)
        self.timer.begin()
        draft = self._draft()
        if any(forced):
            draft = draft.with_chains(forced)
        self.timer.mark("draft")
        # Score
        on_score()
        wanted = [b for b, row in enumerate(self.rows) if row.logprobs is not None]
        scores = score(self.state, draft, self._taps(), self.verifier, wanted)
        if scores.fault is not None:
            self.guard.fail(f"proposed tokens that cannot be scored: {scores.fault}")
        self.timer.mark("score")
        # Verify
        accepted = self.verifier.verify(draft, scores.chosen, scores.p)
        self.timer.mark("accept")
        paths = self._append(draft, accepted)
        self.timer.mark("detokenise")
        # Commit
        slots = scores.slots(paths)
        self.cache.commit(slots)
        self.cache.evict()
        self._observe(self.state.row_states, paths, scores.taps)
        self.drafter_behind = False
        self.timer.mark("commit")
        self._record(draft, accepted, scores.count, forced)
        self._keep_up(self.state.row_states, self.state.ids)
        self.timer.mark("draft")  # the step is reported already: it is no cost of its draft
        for b, logits in scores.logits.items():
            row = self.rows[b]
            row.token_logprobs += token_logprobs(logits[slots[b]], row.new_tokens, row.logprobs or 0)

    def _choose_depths(self, forced: Sequence[Sequence[int]]) -> None:
        """Set ``depths``, ``exit`` and ``prices`` of ``state`` for this step, and the attribute ``chosen``.

        The depth policy chooses them, unless all rows that draft have a draft depth of their own.

        forced: for each row, the next tokens that its constraint determines; a row that has any gets depth 0.
        """
        state, rows = self.state, self.rows
        if self.drafter is not None and self.drafter.learner is not None:
            self.policy.follow(self.drafter.learner.version)
        able = self.drafter is not None and not self.drafter_behind
        caps = [self._deepest(b) if able and not tokens else 0 for b, tokens in enumerate(forced)]
        fixed = [row.num_speculative_tokens for row, cap in zip(rows, caps, strict=True) if cap]
        self.chosen = None in fixed or not fixed
        choice = DepthChoice(caps)
        if self.chosen:
            choice = self.policy.choose([row.depth_history for row in rows], caps, self.cache.rows)
        state.exit, state.prices, state.depths = choice.exit, choice.prices, list(choice.depths)
        self.timer.mark("overhead")

    def _deepest(self, b: int) -> int:
        """Return the maximum draft depth of the row of index ``b`` in ``rows``; 0: it does not draft.

        It is the least of the row's ``num_speculative_tokens`` (at most ``MAX_FIXED_DEPTH``), the free positions of the
        model's context and, with a lossless verifier, the tokens that it may still get, less the model's own.
        """
        row, depth = self.rows[b], self.target.context - 1 - self.cache.rows[b]
        if row.num_speculative_tokens is not None:
            depth = min(depth, row.num_speculative_tokens, MAX_FIXED_DEPTH)
        # A lossy rule's text may depend on the depth, so the number of remaining tokens does not bound it there.
        return max(min(depth, row.remaining - 1) if self.verifier.lossless else depth, 0)

    def _forced_tokens(self) -> list[list[int]]:
        """Return, for each row, the next tokens that its constraint leaves no choice of, at most ``FORCED`` (16).

        They are drafted instead of the drafter's tokens. []: there are none, or nothing is drafted in this step.
        """
        if self.drafter is None or self.drafter_behind or not self.drafter.traits.drafts:
            return [[] for _ in self.rows]
        found = []
        for b, row in enumerate(self.rows):
            constraint = row.sampler.constraint
            limit = 0 if constraint is None else min(self._deepest(b), FORCED)
            found.append(constraint.forced(row.ids, limit) if constraint is not None and limit else [])
        return found

    def _draft(self) -> Draft:
        """Return the drafter's draft, cut to ``State.depths``; an empty draft if the drafter fails."""
        state, limit = self.state, max(self.state.depths)

        def propose(drafter: Drafter) -> Draft | None:
            draft = drafter.propose(state, limit)
            fault = check_draft(draft, len(self.rows), limit, self.target.vocab_size)
            if fault is not None:
                self.guard.fail(f"proposed a draft that cannot be scored: {fault}")
                return None
            for b in draft.within(state.depths):
                drafter.withdraw(state.row_states[b])
            return draft

        if limit and (draft := self.guard.call(propose)) is not None:
            return draft
        self.cache.roll_back()  # entries of a drafter that failed
        return Draft.empty(len(self.rows), self.cache.device)

    def _append(self, draft: Draft, accepted: Acceptance) -> list[list[int]]:
        """Append the accepted tokens to each row, up to where the row ends.

        Return the paths to commit: for each row, the block indices whose tokens are in its text, from the root on (0:
        the root, i + 1: node i of the draft). The model's own token after the path is in the text, but in no path.
        """
        tokens, depths, paths = draft.lists(), draft.depths(), []
        for b, (row, path, token) in enumerate(zip(self.rows, accepted.paths, accepted.next_tokens, strict=True)):
            row.append([*(tokens[b][node - 1] for node in path[1:]), token], [*(depths[node] for node in path[1:]), 0])
            paths.append(path[: len(row.new_tokens)])
        return paths

    def _record(self, draft: Draft, accepted: Acceptance, scored: int, forced: Sequence[Sequence[int]]) -> None:
        """Update each row's metrics, and report the step to the depth policy if it has chosen the depths.

        Steps with forced tokens are not reported.

        accepted: the accepted path of each row. scored: number of tokens that were scored, the roots included.
        forced: for each row, the tokens that its constraint determined; []: none.
        """
        tokens, depths, deepest, counts = draft.lists(), draft.depths(), list[int](), list[int]()
        seconds = self.timer.step
        other, drafting = (sum(seconds[phase] for phase in phases) for phases in (SCORING, DRAFTING))
        off = None if self.guard.outage is None else f"drafter off: {self.guard.outage.error}"
        for b, (row, path, own) in enumerate(zip(self.rows, accepted.paths, forced, strict=True)):
            row.metrics.drafting_off = off or row.metrics.drafting_off
            nodes = [node for node, token in enumerate(tokens[b], start=1) if token >= 0]
            counts.append(len(nodes))
            deepest.append(max((depths[node] for node in nodes), default=0))
            taken = row.new_tokens[: len(path) - 1]
            row.metrics.step(deepest[-1], len(nodes), min(len(path) - 1, len(row.new_tokens)), len(self.rows))
            row.metrics.add_sources(["constraint"] * len(taken) if own else self._sources(draft, b, taken))
            if self.chosen and self.policy.plain_seconds is not None:
                row.metrics.draft_saved_seconds += self.policy.plain_seconds * len(path) - other - drafting
            if self.verifier.threshold is not None and draft.layers is not None and not own:
                used = path[1 : 1 + len(row.new_tokens)]
                row.metrics.exit_layers += draft.layers[b, [node - 1 for node in used]].tolist()
        if self.chosen and not any(forced):
            histories, right = [row.depth_history for row in self.rows], [len(path) - 1 for path in accepted.paths]
            new = [row.new_tokens for row in self.rows]
            self.policy.observe(
                StepReport(histories, deepest, right, scored, drafting, other, new, draft.found, counts)
            )
        self.timer.mark("overhead")

    def _sources(self, draft: Draft, b: int, tokens: list[int]) -> list[str]:
        """Return which source of candidates, such as "ngram", proposed each of the accepted ``tokens`` of row ``b``.

        Without candidates (``Draft.found`` is None), it is the drafter's label. tokens: accepted drafted token ids.
        """
        if draft.found is None:
            return [self.guard.configured.traits.label] * len(tokens)
        found, names = draft.found.rows[b], self.guard.configured.traits.sources
        return [names[found.source(node)] for node in found.path(tokens)]

    # -- the drafter --------------------------------------------------------------------------------------------------

    def _taps(self) -> dict[int, Tensor]:
        """Return {layer: empty tensor} for the layers whose input states the drafter reads; a pass sets the values."""
        return dict.fromkeys(self.drafter.traits.taps if self.drafter is not None else (), NOTHING)

    def _observe(self, row_states: list[object], paths: list[list[int]], taps: dict[int, Tensor]) -> None:
        """Show the drafter which tokens each row has accepted (``Drafter.observe``), unless it is off after an error.

        row_states: for each row, what ``Drafter.begin`` returned.
        paths: for each row, the indices along T in ``taps`` of its accepted tokens.
        taps: hidden states [B, T, D] by the number of the layer that they are the input of.
        """
        self.guard.call(lambda drafter: drafter.observe(row_states, paths, taps))

    def _keep_up(self, row_states: list[Any], texts: list[list[int]]) -> None:
        """Let the drafter compute what need not wait for a draft (``Drafter.keep_up``), unless it is off.

        row_states, texts: for each row, what ``Drafter.begin`` returned, and its text.
        """
        self.guard.call(lambda drafter: drafter.keep_up(row_states, texts))

    def learn(self) -> bool:
        """Let the drafter train itself for about 50 ms; return False if it has no data, does not learn, or is off."""
        return bool(self.guard.call(lambda drafter: drafter.learner is not None and drafter.learner.work()))

    def end(self, row: Request) -> None:
        """Tell the drafter that the request ``row`` has ended (``Drafter.end``)."""
        self.guard.call(lambda drafter: drafter.end(row.drafter_state, row.ids, len(row.prompt), row.learn))


def not_finite(target: Target, row: Request, number: int | None) -> NotFiniteError:
    """Return the error for a row whose logits are not finite. number: the row's number in a batch; None: one row."""
    where = f"position {len(row.ids)}" + (f" of row {number}" if number is not None else "")
    remedy = "use --dtype float32" if target.dtype == torch.float16 else "the checkpoint may be damaged; get it again"
    return NotFiniteError(f"the model's logits are not finite at {where} ({target.dtype}); {remedy}")
