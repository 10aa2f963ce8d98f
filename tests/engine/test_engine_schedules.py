"""Whatever comes, goes, waits and ends when: every answer is that of plain decoding alone.

A state machine drives an engine on tiny models, and each text is compared with one that is decoded token by token,
without an engine. Most runs have an oracle for a drafter, which knows how each text goes on, also behind its end: so
texts end inside accepted drafts, at every place of them.
"""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from policies import alternating
from scripted import Clock, OnlyOddAfterEven, made
from targets import needs_native
from tiny import model_of, tiny_model
from transformers import LogitsProcessor
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor
from zoo import EOS, EVERY, alike, new_tokens, step

from specdec import Regex, SpecDecError
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.m2r2 import M2R2Drafter, fits, learning, replay
from specdec.drafters.m2r2.learning import M2R2Learner
from specdec.drafters.ngram import NgramDrafter
from specdec.engine import guard, metrics, scheduler
from specdec.engine.batch import Batch
from specdec.engine.depth import DepthChoice, FixedDepth, History
from specdec.engine.engine import Engine
from specdec.engine.logprobs import TokenLogprob, prompt_logprobs, token_logprobs
from specdec.engine.memory import PrefillBatch, cache_sizes
from specdec.engine.request import Handle, Request
from specdec.engine.scheduler import Scheduler
from specdec.kvcache import window
from specdec.kvcache.prefix import Prefix, PrefixStore
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.target import Target
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation.draft import Draft
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler, Sampler, SamplingParams
from specdec.speculation.state import State
from specdec.verifiers.exact import ExactVerifier

CONTEXT, MOST, BEHIND, TOP = 128, 12, 6, 2  # BEHIND: tokens that the oracle knows of behind the last one
KINDS = [  # the native runtime is ten times as fast; "recurrent", "window": with recurrent or windowed layers
    *(pytest.param(kind, marks=needs_native) for kind in ("native", "native recurrent", "native window")),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("transformers", "recurrent")),
]


@functools.cache
def target_of(kind: str) -> Target:
    if kind.startswith("native"):
        families = {"native": "llama", "native recurrent": "qwen3_5_text", "native window": "gemma3_text"}
        return NativeTarget(model_of(families[kind]))
    return TransformersTarget(tiny_model("llama" if kind == "transformers" else "qwen3_next"))


def examples(kind: str, count: int) -> int:
    return count if kind.startswith("native") else count // (3 if kind == "recurrent" else 2)


class Style(NamedTuple):
    """How tokens are chosen; nothing in it has a state."""

    params: SamplingParams = SamplingParams()
    processors: tuple[LogitsProcessor, ...] = ()
    pattern: str | None = None

    def sampler(self, prompt: list[int], stream: int) -> RowSampler:
        rule = [] if self.pattern is None else [rules(self.pattern).state(prompt)]
        return RowSampler(self.params, [*self.processors, *rule], stream)


rules = functools.cache(lambda pattern: made(Regex(pattern)))  # compiled
STYLES = [
    Style(),
    Style(SamplingParams(0.9, seed=3)),
    Style(SamplingParams(1.3, 20, seed=1)),
    Style(SamplingParams(0.8, 0, 0.9, 0.02, 1.3)),
    Style(SamplingParams(repetition_penalty=1.5)),
    Style(SamplingParams(frequency_penalty=0.7, presence_penalty=0.4, logit_bias={7: 1.5, 60: -2.0})),
    Style(SamplingParams(1.1), (OnlyOddAfterEven(),)),
    Style(processors=(NoRepeatNGramLogitsProcessor(2),)),
    Style(pattern="([a-e]{3,9}(north|nothing) )*!"),
    Style(SamplingParams(1.2), pattern="[a-z]{2,12}(foo|fool)x?"),
]


class Plain(NamedTuple):
    """What plain decoding makes of a prompt, without an end: its new tokens, and log-probabilities."""

    tokens: list[int]
    scored: list[TokenLogprob]
    prompt_token_logprobs: list[TokenLogprob]


@functools.cache
@torch.inference_mode()
def plain(kind: str, prompt: tuple[int, ...], style: int, stream: int) -> Plain:
    """The prompt in one pass, and then a token in each; where no token may follow, the text is at its end."""
    target, ids, states = target_of(kind), list(prompt), list[torch.Tensor]()
    sampler = Sampler([STYLES[style].sampler(ids, stream)])
    cache, found = target.new_cache(), Plain([], [], [])
    last = run_tokens(target, cache, [ids], every=states)
    found.prompt_token_logprobs[:] = prompt_logprobs(target, states[0][:-1], ids[1:], TOP)
    while len(found.tokens) < MOST + BEHIND:
        logits = target.readout(last)  # (1, 1, V)
        [[token]] = sampler.choose(sampler.scores(logits, lambda: [[ids]]), [[len(ids)]]).tolist()
        if token < 0:
            break
        found.tokens.append(token)
        found.scored.extend(token_logprobs(logits[0], [token], TOP))
        ids.append(token)
        if len(ids) >= CONTEXT:
            break
        last = run_tokens(target, cache, [[token]])
    return found


class Oracle(Drafter):
    """Drafts how a text goes on: ``right`` right tokens, and then a wrong one. texts: by the row's sampler.

    siblings: wrong tokens beside each right one. (In a row without more to say the wrong ones stand alone.)
    """

    name = "oracle"

    def __init__(self, siblings: int = 0) -> None:
        self.siblings, self.hits = siblings, 0
        self.texts: dict[RowSampler, list[int]] = {}

    def propose(self, state: State, limit: int) -> Draft:
        pairs = zip(state.sampler.rows, state.ids, strict=True)
        rows = [self._draft(self.texts[row], len(ids), limit) for row, ids in pairs]
        width = 1 + self.siblings
        levels = max(map(len, rows)) // width
        parents = [level * width for level in range(levels) for _ in range(width)]
        return Draft([row + [-1] * (len(parents) - len(row)) for row in rows], tuple(parents))

    def _draft(self, text: list[int], start: int, limit: int) -> list[int]:
        right = text[start : start + min(self.hits, limit)]
        drafted = [other % 97 for token in right for other in (*range(token + 1, token + 1 + self.siblings), token)]
        wrong = (text[start + len(right)] + 9) % 97 if start + len(right) < len(text) else 5
        return drafted + [wrong] * (1 + self.siblings) if len(right) < limit else drafted


class Varied(FixedDepth):
    """Every row drafts another depth in every step, mostly the whole."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.rng = random.Random(0)

    def choose(self, rows: Sequence[History], caps: Sequence[int], contexts: Sequence[int] = ()) -> DepthChoice:
        depths = [self.rng.choice((self.depth, self.rng.randrange(self.depth + 1))) for _ in caps]
        return DepthChoice([min(pair) for pair in zip(caps, depths, strict=True)])


@dataclass(eq=False)
class Case:
    """A request with its reference. rule, at: what its stop rule does at which new token."""

    plain: Plain
    request: Request
    rule: str | None
    at: int
    handle: Handle | None = None

    def stop(self, token: int) -> str | None:
        if self.request.metrics.num_new_tokens == self.at:
            if self.rule == "raise":
                raise ValueError("as told")
            if self.rule == "cancel":
                self.request.cancelled = True
        return "stop" if self.request.metrics.num_new_tokens == self.at and self.rule == "stop" else None

    def expected(self) -> tuple[list[int], str | None]:
        """The text, cut where it ends, and why; "cancelled": the most there is."""
        limit = min(self.request.max_new_tokens, len(self.plain.tokens))
        for count, token in enumerate(self.plain.tokens[:limit], start=1):
            own = "error" if count == self.at and self.rule == "raise" else None
            reason = own or ("eos" if token in self.request.eos else None)
            reason = reason or ("stop" if count == self.at and self.rule == "stop" else None)
            reason = reason or ("length" if count == self.request.max_new_tokens else None)
            if reason is not None:
                return self.plain.tokens[:count], reason
        return self.plain.tokens[:limit], "length" if not self.request.max_new_tokens else "error"


class Schedules(RuleBasedStateMachine):
    """kind: of the runtime. makers: of drafters; without any, there is an oracle. swapped: fits that began to serve.

    checked: answers, and their drafted tokens that were accepted.
    """

    swapped: ClassVar = Counter[str]()
    checked: ClassVar = Counter[str]()

    def __init__(self, kind: str, makers: Sequence[Callable[[Target], Drafter]] = ()) -> None:
        super().__init__()
        self.kind, self.makers, self.target = kind, makers, target_of(kind)
        self.cases: list[Case] = []
        self.pieces = 1000

    @initialize(
        rows=st.integers(1, 4),
        memory=st.sampled_from([1000, 1000, 160, 80]),
        depth=st.integers(1, 6),
        siblings=st.integers(0, 2),
        reuse=st.sampled_from([True, True, True, False]),
        data=st.data(),
    )
    def begin(self, rows: int, memory: int, depth: int, siblings: int, reuse: bool, data: st.DataObject) -> None:
        self.oracle = Oracle(siblings)
        self.drafter: Drafter = self.oracle
        if self.makers:
            self.drafter = data.draw(st.sampled_from(self.makers), label="drafter")(self.target)
        token, state = tokens_bytes(self.kind)
        self.engine = Engine(
            self.target,
            self.drafter,
            ExactVerifier(),
            alternating(self.drafter, depth) if self.makers else Varied(depth),
            max_rows=rows,
            kv_memory=memory * token + 16 * state,
            prefixes=PrefixStore() if reuse else None,
        )

    # -- what comes ---------------------------------------------------------------------------------------------------

    def prompt(self, data: st.DataObject) -> list[int]:
        """New words, or a text that has come, whole or a beginning of it, with other words behind it."""
        words = data.draw(st.lists(st.integers(3, 96), min_size=1, max_size=14), label="words")
        if not self.cases or not data.draw(st.integers(0, 4), label="afresh"):
            return words
        case = data.draw(st.sampled_from(self.cases[-4:]), label="of")
        start, ids = len(case.request.prompt), case.request.ids
        cut = data.draw(st.sampled_from(["whole", "text", "prompt", "behind"]), label="cut")
        if cut == "text":
            ids = ids[: data.draw(st.integers(min(start, len(ids)), len(ids)), label="count")]
        elif cut == "prompt":
            ids = ids[: data.draw(st.integers(1, start), label="count")]
        elif cut == "behind":  # as its text would have gone on
            ids = [*case.request.prompt, *case.plain.tokens[: len(ids) - start + 1]]
        return [*ids, *data.draw(st.sampled_from([words, words[:1], []]), label="then")][: CONTEXT - 2] or words

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        logprobs = data.draw(st.sampled_from([None, "new", "prompt"]), label="logprobs")
        self.submit(data, self.prompt(data), logprobs)

    def submit(self, data: st.DataObject, prompt: list[int], logprobs: str | None) -> None:
        style = data.draw(st.integers(0, len(STYLES) - 1), label="style")
        limit, at = data.draw(st.integers(0, MOST), label="limit"), data.draw(st.integers(1, MOST), label="at")
        ends = data.draw(st.sampled_from(["eos", "eos", "stop", "raise", "cancel", None]), label="ends")
        depth = data.draw(st.sampled_from([None, None, None, 0, 0, 1, 3]), label="depth")
        scope = data.draw(st.sampled_from("aaab"), label="scope")
        for stream in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="n")):
            found = plain(self.kind, tuple(prompt), style, stream)
            eos = set() if STYLES[style].pattern is None else {EOS}
            if ends == "eos" and len(found.tokens) >= at:
                eos.add(found.tokens[at - 1])
            request = Request(
                prompt,
                limit,
                eos=frozenset(eos),
                sampler=STYLES[style].sampler(prompt, stream),
                num_speculative_tokens=depth,
                logprobs=None if logprobs is None else TOP,
                prompt_logprobs=logprobs == "prompt",
                scope=scope,
            )
            case = Case(found, request, ends, at)
            request.text = SimpleNamespace(push=case.stop)
            self.oracle.texts[request.sampler] = [*prompt, *found.tokens]
            case.handle = self.engine.submit(request)
            self.cases.append(case)

    # -- what happens -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.engine.busy)
    @rule(
        right=st.integers(0, 6),
        chunk=st.sampled_from([1, 2, 3, 7, 40]),
        count=st.integers(1, 4),
        pieces=st.sampled_from([1000, 0, 7]),
        vocabulary=st.sampled_from([40, 64]),
    )
    def step(self, right: int, chunk: int, count: int, pieces: int = 1000, vocabulary: int = 64) -> None:
        self.oracle.hits, self.engine.scheduler.chunk, self.pieces = right, chunk, pieces
        fits.VOCABULARY = vocabulary
        for _ in range(count):
            self.advance()

    @precondition(lambda self: self.engine.busy)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        going = [case for case in self.cases if case.request.finish_reason is None]
        if going:
            case = going[data.draw(st.integers(0, 99), label="case") % len(going)]
            case.handle.cancel()

    @precondition(lambda self: self.engine.busy)
    @rule(room=st.sampled_from([0, 0, 40, 80]))
    def squeeze(self, room: int) -> None:
        """One step with hardly any memory: kept texts go, and the younger rows give way."""
        whole = self.engine.scheduler.memory.limit
        self.engine.scheduler.memory.limit = room * self.engine.scheduler.memory.token_bytes
        self.advance()
        self.engine.scheduler.memory.limit = whole

    @precondition(lambda self: self.engine.batch.rows)
    @rule(data=st.data(), first=st.sampled_from([2, 3, 5]), then=st.sampled_from([1, 7, 40]))
    def interrupt(self, data: st.DataObject, first: int, then: int) -> None:
        """A long prompt gives way when a part of it has been run, and is run again in other parts."""
        words = data.draw(st.lists(st.integers(3, 96), min_size=20, max_size=40), label="words")
        self.submit(data, words, data.draw(st.sampled_from([None, "prompt", "prompt"]), label="logprobs"))
        self.step(0, first, 2)
        self.squeeze(0)
        self.step(0, then, 2)

    def version(self) -> int:
        return 0 if self.drafter.learner is None else self.drafter.learner.version

    def advance(self) -> None:
        """A step, and pieces of a drafter's work, at most until another fit serves."""
        version, pieces = self.version(), self.pieces
        step(self.engine)
        while self.engine.batch.rows and pieces and self.version() == version and self.engine.batch.learn():
            pieces -= 1
        self.swapped[self.kind] += self.version() - version
        self.check_caches()
        stats, scheduled = self.engine.stats(), self.engine.scheduler
        caches = [*filter(None, (self.engine.batch.cache, scheduled.prefilling.cache))]
        checkpoints = scheduled.memory.state_bytes * sum(own.num_states - own.batch for own in caches)
        slots = sum(len(row.window_checkpoints) for own in caches for row in own.entries) * (5 + 4 + 2)  # of a half
        checkpoints += slots * scheduled.memory.token_bytes // 2
        over = stats.kv_bytes - checkpoints > scheduled.memory.limit  # for them, room is made in the next step
        assert not over or (stats.running <= 1 and not self.kept())  # alone, a row has what it takes

    def kept(self) -> list[Prefix]:
        prefixes = self.engine.scheduler.memory.prefixes
        return [] if prefixes is None else prefixes.entries

    # -- what has to be so --------------------------------------------------------------------------------------------

    def check_caches(self) -> None:
        """A cache has the tokens of its text that have been run, and no others."""
        batch = self.engine.batch
        assert batch.cache.rows == [len(row.ids) - 1 for row in batch.rows]
        assert all(prefix.cache.rows == [len(prefix.ids)] for prefix in self.kept())
        self.check_drafter()

    def check_drafter(self) -> None:
        assert self.engine.outage is None

    def check(self, case: Case) -> None:
        request, (tokens, reason) = case.request, case.expected()
        found = new_tokens(request)
        events = [event for event in case.handle if event.tokens or event.finish_reason]
        assert [token for event in events for token in event.tokens] == found and events[-1].finish_reason
        if request.finish_reason == "cancelled":
            assert request.cancelled and found == tokens[: len(found)]
        else:
            assert (found, request.finish_reason) == (tokens, reason)
        assert request.error is None or isinstance(request.error, SpecDecError)
        self.checked["answers"] += 1
        self.checked["accepted"] += request.metrics.num_accepted_draft_tokens
        if request.logprobs is not None:
            alike(request.token_logprobs, case.plain.scored[: len(found)])
        if request.prompt_logprobs and (found or request.finish_reason == "length"):
            alike(request.prompt_token_logprobs, case.plain.prompt_token_logprobs)

    def teardown(self) -> None:
        if not self.cases:
            return
        self.oracle.hits = 6
        while self.engine.busy:
            self.advance()
        for case in self.cases:
            self.check(case)
        self.engine.close()
        assert self.engine.stats().kv_bytes == 0


OUTAGES = "failures", "returns", "returns among rows"
METHODS = "bind", "begin", "propose", "candidates", "observe", "withdraw", "end"


class FailingSchedules(Schedules):
    """The drafter fails at random places, and comes back when its pause is over. outages: failures and returns."""

    outages: ClassVar = Counter[str]()

    def __init__(self, clock: Clock, kind: str, makers: Sequence[Callable[[Target], Drafter]]) -> None:
        super().__init__(kind, makers)
        self.clock, self.rng, self.every = clock, random.Random(0), 0

    @initialize(
        rows=st.integers(2, 4),
        memory=st.sampled_from([1000, 160]),
        depth=st.integers(1, 6),
        reuse=st.booleans(),
        every=st.sampled_from([3, 6, 12]),
        seed=st.integers(0, 99),
        data=st.data(),
    )
    def begin(
        self, rows: int, memory: int, depth: int, reuse: bool, every: int, seed: int, data: st.DataObject
    ) -> None:  # type: ignore[override]
        super().begin(rows, memory, depth, 0, reuse, data)
        self.rng, self.every = random.Random(seed), every
        parts = (self.drafter.ngram, self.drafter.other) if isinstance(self.drafter, JoinedDrafter) else ()
        owners = [self.drafter, *parts]
        self.wrapped = [(owner, name) for owner in owners for name in METHODS]
        for owner, name in self.wrapped:
            setattr(owner, name, functools.partial(self.call, getattr(owner, name)))

    def call(self, method: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """Call a method of the drafter; one call of so many fails, before or after its work, or drafts nonsense."""
        fails = self.every and not self.rng.randrange(self.every)
        how = self.rng.choice(["before", "after", "nonsense"]) if fails else ""
        if how == "before":
            raise RuntimeError("as told")
        result = method(*given, **more)
        if how == "nonsense" and isinstance(result, Draft):
            return Draft([[self.target.vocab_size]] * len(result.lists()), (0,))
        if how:
            raise RuntimeError("as told")
        return result

    def advance(self) -> None:
        off, failures = self.engine.outage, self.engine.batch.guard.failures
        self.clock.now += self.rng.choice([0.6, 2.0, 61.0, 61.0])
        super().advance()
        self.outages["failures"] += self.engine.batch.guard.failures - failures
        back = off is not None and self.engine.outage is None
        self.outages["returns"] += back
        self.outages["returns among rows"] += back and len(self.engine.batch.rows) > 0

    def check_drafter(self) -> None:
        outage = self.engine.outage
        assert (self.engine.drafting == "off") == (outage is not None and self.drafter.traits.drafts)
        assert outage is None or "as told" in outage.error or "outside the vocabulary" in outage.error

    def teardown(self) -> None:
        self.every = 0
        self.clock.now += 61
        runs = self.engine.busy  # else no step comes, with which it would start again
        try:
            super().teardown()
            assert not runs or self.engine.drafting != "off"
        finally:
            for owner, name in self.wrapped:
                vars(owner).pop(name)


POINTS: list[tuple[type, str]] = [  # where memory, or a file, may fail
    *((Target, name) for name in ("new_cache",)),
    *((Scheduler, name) for name in ("_longest_prefix", "_fork", "_count_hits")),
    *((PrefillBatch, name) for name in ("add", "remove")),
    *((PrefixStore, name) for name in ("longest", "take", "add")),
    *((Batch, name) for name in ("begin", "prefill", "join", "keep", "step", "end")),
]


class BrokenSteps(Schedules):
    """Steps fail at any of ``POINTS``, before or after what is done there. failed: how often at each."""

    failed: ClassVar = Counter[str]()
    rng = random.Random(0)
    place: ClassVar[str | None] = None  # where the next call fails; None: none does

    @classmethod
    def wrapped(cls, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            cls.pass_by(f"before {name}")
            result = method(*given, **named)
            cls.pass_by(f"after {name}")
            return result

        return run

    @classmethod
    def pass_by(cls, where: str) -> None:
        if where == cls.place:
            cls.place = None
            cls.failed[where] += 1
            raise MemoryError("no memory left")

    @initialize(seed=st.integers(0, 99))
    def seed(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def advance(self) -> None:
        """A step that fails ends what runs, and every other request waits still."""
        if not self.rng.randrange(3):
            type(self).place = f"{self.rng.choice(['before', 'after'])} {self.rng.choice(POINTS)[1]}"
        waiting, before = {*self.engine.scheduler.waiting}, sum(self.failed.values())
        try:
            super().advance()
        except MemoryError:
            assert not self.engine.scheduler.running
        type(self).place = None
        if sum(self.failed.values()) > before:
            going = {case.request for case in self.cases if case.request.finish_reason is None}
            assert going == {*self.engine.scheduler.waiting} == {*self.engine.requests}
            assert all(row in going or row.finish_reason for row in waiting)

    def check(self, case: Case) -> None:
        error = case.request.error
        if error is None or "no memory left" not in str(error):
            super().check(case)
            return
        events = list(case.handle)
        found = [token for event in events for token in event.tokens]
        assert events[-1].finish_reason == "error" and found == case.plain.tokens[: len(found)]


def drafters() -> list[Callable[[Target], Drafter]]:
    """Those of the matrix. Each schedule has one of its own, which knows nothing of the schedules before."""

    def bound(make: Callable[[Target], Drafter], target: Target) -> Drafter:
        torch.manual_seed(0)
        drafter = make(target)
        drafter.bind(target)
        return drafter

    return [functools.partial(bound, make) for make in EVERY.values()]


def self_taught(target: Target, kind: str, hybrid: bool = False, **shape: Any) -> Drafter:
    """A drafter with texts to learn from, whose every fit serves."""
    learner, rng = M2R2Learner(target), random.Random(len(kind))
    learner.fits.store.claim = lambda: True  # type: ignore[method-assign]  # nothing is kept
    for _ in range(16):
        prompt = [rng.randrange(3, 97) for _ in range(4)]
        learner.add([*prompt, *plain(kind, tuple(prompt), 0, 0).tokens], len(prompt))
    drafter: Drafter = M2R2Drafter(learner.fits.network, learner=learner, **shape)
    drafter = JoinedDrafter(NgramDrafter(9), drafter) if hybrid else drafter
    drafter.bind(target)
    return drafter


tokens_bytes = functools.cache(lambda kind: cache_sizes(target_of(kind)))


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What happens in long texts happens in short ones."""
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    monkeypatch.setattr(fits, "VOCABULARY", 64)
    for name, value in {"HEADROOM": 0, "SHARED": 4, "CHECKPOINT": 6, "DRAFTED": 24}.items():
        monkeypatch.setattr(scheduler, name, value)
    yield


@pytest.fixture(autouse=True)
def dropped(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Slots are dropped early, and have something wrong in them from then on. Returns how many were dropped."""
    count = Counter[str]()

    def spoil(buffer: torch.Tensor, layers: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        for layer, (begin, end) in itertools.product(layers, ranges):
            buffer[:, layer, :, begin:end] = 5.0
            count["slots"] += end - begin

    for name, value in {"FIRST": 2, "MARGIN": 4, "STEP": 2, "release": spoil}.items():
        monkeypatch.setattr(window, name, value)
    return count


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What happens in a schedule does not depend on the machine's speed."""
    made = Clock(tick=1e-3)
    for module in guard, scheduler, metrics, fits, learning, replay:
        monkeypatch.setattr(module, "time", made)
    return made


def run_schedules(
    kind: str,
    makers: Sequence[Callable[[Target], Drafter]],
    examples: int,
    chance: bool = False,
    machine: Callable[..., Schedules] = Schedules,
) -> None:
    Schedules.checked.clear()
    run_state_machine_as_test(
        functools.partial(machine, kind, makers),  # type: ignore[arg-type]
        settings=settings(
            max_examples=examples,
            stateful_step_count=16,
            deadline=None,
            derandomize=not chance,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,) if chance else (Phase.generate, Phase.shrink),  # shrinking may take minutes
        ),
    )
    if not chance:
        assert all(Schedules.checked[name] for name in ("answers", "accepted"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_schedule(kind: str, dropped: Counter[str]) -> None:
    run_schedules(kind, (), examples(kind, 12))
    assert bool(dropped["slots"]) == (kind == "native window")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_the_drafter_in_any_schedule(kind: str) -> None:
    run_schedules(kind, drafters(), examples(kind, 12))


SHAPES: list[dict[str, Any]] = [{}, {"nodes": 9}, {"hybrid": True}]


@pytest.fixture
def every_fit_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits after few tokens, each better than the last."""
    numbers = itertools.count(1)

    def better(*given: object) -> Generator[None, None, int]:
        """More right drafts than ever."""
        yield
        return next(numbers)

    monkeypatch.setattr(M2R2Learner, "_hits", better)
    for name, value in {"FIRST": 40, "EVERY": 30, "RECENT_TOKENS": 30, "AGAIN": 60, "HOLDOUT_TOKENS": 20}.items():
        monkeypatch.setattr(learning, name, value)


@pytest.mark.usefixtures("every_fit_serves")
@pytest.mark.parametrize("kind", KINDS[:3])
def test_answers_do_not_depend_on_the_fits_that_are_swapped_in(kind: str) -> None:
    Schedules.swapped.clear()
    makers = [functools.partial(self_taught, kind=kind, **shape) for shape in SHAPES]
    run_schedules(kind, makers, examples(kind, 8))
    assert Schedules.swapped[kind]


@pytest.mark.filterwarnings("ignore::specdec.DrafterWarning")
@pytest.mark.usefixtures("every_fit_serves")
@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_when_the_drafter_fails_and_comes_back(kind: str, clock: Clock) -> None:
    FailingSchedules.outages.clear()
    taught = [] if kind == "recurrent" else [functools.partial(self_taught, kind=kind, **shape) for shape in SHAPES]
    makers = [*drafters(), *taught * 4]
    failing = functools.partial(FailingSchedules, clock)
    run_schedules(kind, makers, examples(kind, 24), machine=failing)
    seen = OUTAGES if kind.startswith("native") else OUTAGES[:2]  # the slow kinds run few schedules
    assert all(FailingSchedules.outages[name] for name in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_is_lost_wherever_a_step_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target_of(kind), tokens_bytes(kind)  # before anything fails
    BrokenSteps.failed.clear()
    for owner, name in POINTS:
        owner = next(each for each in type(target_of(kind)).__mro__ if name in vars(each)) if owner is Target else owner
        monkeypatch.setattr(owner, name, BrokenSteps.wrapped(name, getattr(owner, name)))
    run_schedules(kind, (), examples(kind, 24), machine=BrokenSteps)
    assert len(BrokenSteps.failed) > 5, BrokenSteps.failed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::specdec.DrafterWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_answers_do_not_depend_on_many_random_schedules(kind: str, clock: Clock) -> None:
    run_schedules(kind, (), examples(kind, 12), chance=True)
    run_schedules(kind, drafters(), examples(kind, 12), chance=True)
    failing = functools.partial(FailingSchedules, clock)
    run_schedules(kind, drafters(), examples(kind, 12), chance=True, machine=failing)
