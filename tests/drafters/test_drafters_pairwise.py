"""Every drafter beside everything that changes how tokens are chosen, reported or ended: plain decoding's texts.

Any two settings meet in a case (``pairwise``). The default drafter runs on both runtimes. Depths and
sources are scripted, so that every source drafts; a drafter that fails fails the test.
"""

import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import targets
from learners import learn_soon
from policies import alternating
from scripted import OnlyOddAfterEven, made
from targets import QUICK
from tiny_tokenizers import letters
from zoo import CHAINS, EOS, EVERY, TREES, alike, finish, m2r2, medusa, new_tokens, step

from specdec import Regex, SpecDecoder
from specdec.api.text import Detokenizer
from specdec.drafters.auto import auto
from specdec.drafters.joined import JoinedDrafter
from specdec.drafters.m2r2.learning import M2R2Learner
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import AutoDepth, FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.logprobs import TokenLogprob
from specdec.engine.request import Request
from specdec.kvcache.prefix import PrefixStore
from specdec.models import drafter_folder
from specdec.runtimes.target import Target, TokenCosts
from specdec.speculation.drafter import Drafter, DrafterWarning
from specdec.speculation.sampling import RowSampler, SamplingParams
from specdec.verifiers.exact import ExactVerifier

CHAINED = tuple(name for name in CHAINS if name != "none")
TREED = tuple(name for name in EVERY if name not in CHAINS)
PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9, 10, 11, 12, 13, 14, 15], [3], [20, 21, 20, 21, 20], [40, 50, 60, 40, 50]]
ARRIVALS, CANCELLED = (0, 0, 2, 3, 5), 2  # steps before which rows come; the row that is cancelled later
COUNT, TOP = 12, 2  # new tokens; log-probabilities of others
PENALTIES: dict[str, dict[str, Any]] = {  # one by one: test_sampling
    "none": {},
    "penalties": {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1},
    "bias": {"logit_bias": {7: 2.0, 21: -3.0, 96: 1.0}},
    "processor": {},
}
SETTINGS: dict[str, Sequence[Any]] = {
    "rows": ("one", "four", "come and go"),
    "temperature": (0.0, 0.9),
    "penalty": tuple(PENALTIES),
    "constraint": (False, True),
    "reported": ("tokens", "logprobs", "echo"),
    "stop": (False, True),
    "n": (1, 2),
}


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few cases in which any two values of two factors meet."""
    names = list(factors)
    twos = list(itertools.combinations(names, 2))
    missing = {frozenset(((a, x), (b, y))) for a, b in twos for x, y in itertools.product(factors[a], factors[b])}
    order, cases = sorted(missing, key=lambda pair: sorted(map(str, pair))), list[dict[str, Any]]()
    for pair in order:
        if pair not in missing:
            continue
        case = dict(pair)
        for name in names:
            if name not in case:
                new = [sum(frozenset((one, (name, x))) in missing for one in case.items()) for x in factors[name]]
                case[name] = factors[name][new.index(max(new))]
        missing -= set(map(frozenset, itertools.combinations(case.items(), 2)))
        cases.append({name: case[name] for name in names})
    return cases


def test_any_two_values_meet() -> None:
    factors = {"drafter": TREED, **SETTINGS}
    cases = pairwise(factors)
    for a, b in itertools.combinations(factors, 2):
        assert {(case[a], case[b]) for case in cases} == set(itertools.product(factors[a], factors[b]))
    assert len(cases) < 1.1 * len(TREED) * len(PENALTIES)


target_of = functools.cache(targets.target_of)
pattern = functools.cache(lambda: made(Regex("([a-e]{3,9}(north|nothing) )*!")))
tokenizer = functools.cache(letters)


def sampler(prompt: list[int], stream: int, case: Mapping[str, Any]) -> RowSampler:
    params = SamplingParams(temperature=case["temperature"], seed=3, **PENALTIES[case["penalty"]])
    processors = [OnlyOddAfterEven()] if case["penalty"] == "processor" else []
    rule = [pattern().state(prompt)] if case["constraint"] else []
    return RowSampler(params, [*processors, *rule], stream, start=len(prompt))


class Plain(NamedTuple):
    """What plain decoding of one row makes of a prompt."""

    tokens: list[int]
    reason: str | None
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob]


def plain(runtime: str, prompt: list[int], stream: int, case: Mapping[str, Any]) -> Plain:
    how = tuple((name, case[name]) for name in ("temperature", "penalty", "constraint"))
    return _plain(runtime, tuple(prompt), stream, how)


@functools.cache
def _plain(runtime: str, prompt: tuple[int, ...], stream: int, how: Any) -> Plain:
    case = dict(how) | {"reported": "echo"}
    request = request_of(list(prompt), stream, case, None)
    engine = Engine(target_of(runtime), NoDrafter(), ExactVerifier(), FixedDepth(0))
    finish(engine, request)
    assert request.error is None or case["constraint"]
    return Plain(new_tokens(request), request.finish_reason, request.token_logprobs, request.prompt_token_logprobs)


def stopped(found: Plain) -> tuple[str | None, Plain]:
    """A string in the text, and the text up to it."""
    words = [token for token in found.tokens[4:] if token > EOS][:2]
    if not words:
        return None, found
    stop = tokenizer().decode(words)
    text = Detokenizer(tokenizer(), [stop])
    end = next(count for count, token in enumerate(found.tokens, start=1) if text.push(token) == "stop")
    return stop, found._replace(tokens=found.tokens[:end], reason="stop")


def request_of(prompt: list[int], stream: int, case: Mapping[str, Any], stop: str | None) -> Request:
    return Request(
        prompt,
        COUNT,
        eos=frozenset([EOS]) if case["constraint"] else frozenset(),
        sampler=sampler(prompt, stream, case),
        text=None if stop is None else Detokenizer(tokenizer(), [stop]),
        logprobs=None if case["reported"] == "tokens" else TOP,
        prompt_logprobs=case["reported"] == "echo",
    )


def check(target: Target, drafter: Drafter, case: Mapping[str, Any], seed: int) -> Counter[str]:
    """Run a case, and compare each row with plain decoding; return what was drafted and accepted."""
    runtime, many = case.get("runtime", "transformers"), {"one": 1, "four": 4, "come and go": 5}[case["rows"]]
    later = case["rows"] == "come and go"
    rows = list[tuple[int, Request, Plain]]()
    for number, prompt in enumerate(PROMPTS[:many]):
        for stream in range(case["n"]):
            expected, stop = plain(runtime, prompt, stream, case), None
            if case["stop"]:
                stop, expected = stopped(expected)
            rows.append((number, request_of(prompt, stream, case, stop), expected))
    policy = alternating(drafter, seed)
    with Engine(
        target, drafter, ExactVerifier(), policy, max_rows=3 if later else 16, prefixes=PrefixStore() if later else None
    ) as engine:
        for turn in itertools.count():
            for number, request, _ in rows:
                if (ARRIVALS[number] if later else 0) == turn:
                    handle = engine.submit(request)
                if later and number == CANCELLED and turn == ARRIVALS[number] + 3:
                    request.cancelled = True
            if not engine.busy and turn > max(ARRIVALS):
                break
            step(engine)
        assert engine.drafting == ("on" if drafter.traits.drafts else "none") and handle is not None
    found = Counter[str]()
    for number, request, expected in rows:
        tokens = new_tokens(request)
        if later and number == CANCELLED and request.finish_reason == "cancelled":
            assert tokens == expected.tokens[: len(tokens)]
        else:
            assert (tokens, request.finish_reason) == (expected.tokens, expected.reason)
        if request.logprobs is not None:
            alike(request.token_logprobs, expected.logprobs[: len(tokens)])
        if request.prompt_logprobs and tokens:
            alike(request.prompt_token_logprobs, expected.prompt_logprobs)
        found["drafted"] += request.metrics.num_draft_tokens
        found["accepted"] += request.metrics.num_accepted_draft_tokens
    return found


@pytest.fixture(autouse=True)
def failures_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DrafterWarning)
        yield


@pytest.fixture(scope="module")
def default_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drafter]:
    """The default drafter of a runtime's model, with an ``m2r2`` that is fitted to its texts and shipped."""

    @functools.cache
    def make(runtime: str) -> Drafter:
        target, folder = target_of(runtime), tmp_path_factory.mktemp(runtime)
        with pytest.MonkeyPatch.context() as patched:
            learn_soon(patched, folder)
            learner = M2R2Learner(target)
            for prompt, stream in itertools.product(PROMPTS, range(3)):
                case = {"temperature": 0.9 * (stream > 0), "penalty": "none", "constraint": False}
                learner.add([*prompt, *plain(runtime, prompt, stream, case).tokens], len(prompt))
            while learner.work():
                pass
            network, base = learner.fits.network, drafter_folder.describe_base(target, "tiny")
            assert learner.fits.version
            config = {"drafter": "m2r2", "path": network.path.to_json(), "base": base}
            drafter_folder.write(folder, config, network.state_dict())
            patched.setattr(drafter_folder, "_shipped", lambda drafter: iter([(folder, base)]))
            drafter = auto(target).load(target, {})
        drafter.bind(target)
        assert drafter.traits.label == "ngram+m2r2" and drafter.learner is None
        return drafter

    return make


SLOW = [pytest.param("transformers", marks=pytest.mark.slow)] * (QUICK == "native")


@pytest.mark.parametrize("runtime", [QUICK, *SLOW])
def test_the_default_drafter(runtime: str, default_of: Callable[[str], Drafter]) -> None:
    drafter, found = default_of(runtime), Counter[str]()
    for number, case in enumerate(pairwise(SETTINGS)):
        found += check(target_of(runtime), drafter, case | {"runtime": runtime}, number)
    assert found["drafted"] > found["accepted"] > 100


@pytest.mark.parametrize("names", [TREED, pytest.param(CHAINED, marks=pytest.mark.slow)], ids=["trees", "chains"])
def test_each_other_drafter(names: Sequence[str]) -> None:
    target, found = target_of(QUICK), dict.fromkeys(names, 0)
    made = {name: EVERY[name](target) for name in names}
    for drafter in made.values():
        drafter.bind(target)
    for number, case in enumerate(pairwise({"drafter": names, **SETTINGS})):
        drafted = check(target, made[case["drafter"]], case | {"runtime": QUICK}, number)["drafted"]
        found[case["drafter"]] += drafted
    assert all(found.values())


def test_each_drafter_under_the_draft_policy() -> None:
    """The policy that people run chooses what is drafted, and learns from it."""
    plain = SpecDecoder(target_of(QUICK).model, drafter="none", runtime=QUICK)
    expected = [out.token_ids for out in plain.generate_batch(PROMPTS[:4], max_new_tokens=40)]
    for name, make in EVERY.items():
        decoder = plain.with_drafter(make(plain.target))
        assert decoder.generate(PROMPTS[0], max_new_tokens=40).token_ids == expected[0], name
        assert [out.token_ids for out in decoder.generate_batch(PROMPTS[:4], max_new_tokens=40)] == expected, name


DEPTHS = (0, None, 2)  # of a row: it does not draft, drafts as the policy says, or at most two tokens deep
PRICED: dict[str, Callable[[Target], Drafter]] = {  # by prices, where a drafter can be
    "ngram": lambda target: NgramDrafter(),
    "m2r2": lambda target: m2r2(target, 0, ((1, 2), (3, 4)), True, False),
    "ngram+m2r2": lambda target: JoinedDrafter(NgramDrafter(), m2r2(target, 0, ((1, 2), (3, 4)), True, False)),
    "medusa": lambda target: medusa(target),
    "ngram+medusa": lambda target: JoinedDrafter(NgramDrafter(), medusa(target)),
    "ngram+draft-model": TREES["ngram+draft-model"],
    "ngram+dspark": TREES["ngram+dspark"],
    **{name: CHAINS[name] for name in ("m2r2-paper", "eagle3", "dspark", "mtp", "draft-model", "layer-skip")},
}
FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"penalty": "penalties"},
    {"constraint": True},
    {"reported": "logprobs"},
    {"constraint": True, "temperature": 0.9},
]


def check_rows(target: Target, drafter: Drafter, features: Sequence[Mapping[str, Any]]) -> Counter[int | None]:
    """Run a row of each of ``DEPTHS`` in every order, under the policy that people run; count what each drafts."""
    drafted = Counter[int | None]()
    usual = {"temperature": 0.0, "penalty": "none", "constraint": False, "reported": "tokens"}
    for order in itertools.permutations(DEPTHS):
        engine, rows = Engine(target, drafter, ExactVerifier(), AutoDepth.of(drafter, TokenCosts(0.02))), []
        for prompt, depth, own in zip(PROMPTS, order, features, strict=False):
            request = request_of(prompt, 0, case := usual | dict(own), None)
            request.num_speculative_tokens = depth
            rows.append((request, plain(QUICK, prompt, 0, case)))
        finish(engine, *(request for request, _ in rows))
        assert engine.drafting == "on", (order, engine.outage)
        for request, expected in rows:
            assert (new_tokens(request), request.finish_reason) == (expected.tokens, expected.reason)
            drafted[request.num_speculative_tokens] += sum(request.metrics.per_step_drafted)
            if request.num_speculative_tokens is not None and not request.sampler.constraint:
                assert max(request.metrics.per_step_drafted) <= request.num_speculative_tokens
    return drafted


@pytest.mark.parametrize("name", ["default", *PRICED])
def test_rows_that_draft_stand_beside_others_in_any_order(name: str, default_of: Callable[[str], Drafter]) -> None:
    target = target_of(QUICK)
    drafter = default_of(QUICK) if name == "default" else PRICED[name](target)
    if name != "default":
        drafter.bind(target)
    drafted = Counter[int | None]()
    mixed = [FEATURES[number:] + FEATURES[:number] for number in range(len(FEATURES))]
    alike = [[own] * len(DEPTHS) for own in FEATURES]
    for features in [*alike, *mixed] if name == "default" else [alike[0], mixed[1]]:
        drafted += check_rows(target, drafter, features)
    assert drafted[None] > 0 and drafted[2] > 0
