"""Constrained decoding: what plain decoding under the same masks gives, for every drafter, and an end at the end."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from click.testing import Result
from pydantic import BaseModel, ConfigDict, Field
from refusals import refused
from scripted import Scripted, knowing, made
from servers import Replay, byte_tokenizer, serving, stand_in
from targets import target_of
from tiny import tiny_model
from tiny_tokenizers import letters
from transformers import LogitsProcessor, PreTrainedModel
from typer.testing import CliRunner
from zoo import EOS, EVERY, PROMPTS, every, finish, half, new_tokens, together, watched

from specdec import Choice, Grammar, Json, Regex, Request, SamplingParams, SpecDecError, SpecDecoder
from specdec.base.errors import ConstraintError
from specdec.cli import app
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.engine import batch, scoring
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Event
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation import constraints
from specdec.speculation.constraints import LONGEST, CompiledConstraint, Constraint, ConstraintState, compile_constraint
from specdec.speculation.drafter import Drafter
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.state import State
from specdec.verifiers.exact import ExactVerifier

pytest.importorskip("llguidance", reason="llguidance is not installed")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["north", "south"]}, "n": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}


class Way(BaseModel):
    """The same as a pydantic model."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["north", "south"]
    n: Annotated[int, Field(ge=1, le=99)]


def request(
    prompt: list[int],
    rule: CompiledConstraint | None,
    count: int = 60,
    params: SamplingParams = SamplingParams(),  # noqa: B008
    stream: int = 0,
    **more: object,
) -> Request:
    processors = [] if rule is None else [rule.state(prompt)]
    return Request(prompt, count, RowSampler(params, processors, stream), eos=frozenset([EOS]), **more)  # type: ignore[arg-type]


def plainly(model: PreTrainedModel, prompt: list[int], rule: CompiledConstraint, count: int = 60) -> list[int]:
    """Greedy decoding one token at a time; the mask of each is that of a new matcher."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and EOS not in ids[len(prompt) :]:
        mask = rule.state(prompt).mask(ids)
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].masked_fill(~mask, float("-inf")).argmax()))
    return ids[len(prompt) :]


def test_forced_tokens_are_drafted_before_the_drafter_is_asked() -> None:
    decoder = SpecDecoder(tiny_model(), letters(), Scripted(lambda ids, limit: []), runtime="transformers")
    output = decoder.generate([5, 6, 7], constraint=Json(SCHEMA), max_new_tokens=60)
    assert set(json.loads(output.text)) == {"kind", "n"}
    assert output.metrics.num_accepted_draft_tokens > 15
    assert output.metrics.num_accepted_draft_tokens == output.metrics.num_draft_tokens
    plain = decoder.with_drafter("none").generate([5, 6, 7], constraint=Json(SCHEMA), max_new_tokens=60)
    assert plain.token_ids == output.token_ids and not plain.metrics.num_draft_tokens


def test_tokens_drafted_beyond_the_end_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FORCED", 0)
    tokenizer, target = letters(), TransformersTarget(tiny_model())
    text = tokenizer("ab", add_special_tokens=False).input_ids
    row = request([3], made(Regex("ab")), 20)
    together(target, knowing([3, *text, EOS, EOS, 7]), [row], FixedDepth(4))
    assert row.finish_reason == "eos" and new_tokens(row) == [*text, EOS]
    assert row.metrics.num_accepted_draft_tokens == 2


def marked(text: str, tokens: list[int], rule: CompiledConstraint | None) -> tuple[State, list[int]]:
    """Where the one row stands that has read ``text`` and these new ``tokens``."""
    prompt = letters()(text).input_ids
    target, row = TransformersTarget(tiny_model()), request(prompt, rule)
    return State(target, target.new_cache(), Sampler([row.sampler]), [prompt + tokens]), prompt


def test_what_is_looked_up_ends_where_the_constraint_rules_it_out() -> None:
    tokenizer, rule = letters(), made(Regex("ab(cd|ce)f*"))
    [a, b, c, d, e, f, x] = tokenizer("abcdefx").input_ids

    def drafted(rule: CompiledConstraint | None, drafter: Drafter, text: str = "abcxabcdffx") -> list[list[int]]:
        state, _ = marked(text, [a, b], rule)
        state.row_states = [drafter.begin()]
        return drafter.propose(state, 5).paths(0)

    every = PromptLookupDrafter(2, 1, continuations=3)
    assert drafted(None, PromptLookupDrafter())[-1] == [c, d, f, f, x]
    assert drafted(rule, PromptLookupDrafter())[-1] == [c, d, f, f]
    assert drafted(rule, every, "abxbcxbe") == [[c]]  # the third of three matches
    assert [path[0] for path in drafted(None, every, "abxbcxbe") if len(path) == 1] == [x, e, c]
    assert drafted(rule, PromptLookupDrafter(), "abxab") == []
    pool = LookaheadDrafter(window=1, ngram=3)
    assert [c, x] in drafted(None, pool, "bcxbcd") and [c, x] not in drafted(rule, pool, "bcxbcd")


@pytest.mark.parametrize("inside", [False, True])
def test_how_many_tokens_may_follow(inside: bool) -> None:
    tokenizer = letters(92)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "</think>"
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    state = compile_constraint(Regex("xyz?"), tokenizer, 97, frozenset([EOS])).state([begin] if inside else [5])
    [x, y, z] = tokenizer("xyz").input_ids
    prompt = [begin] if inside else [5]
    text = [7, x, end, x, y, EOS] if inside else [begin, x, end, x, y, EOS]
    for n in range(len(text)):
        assert state.allows(prompt + text[:n], [*text[n:], z, z]) == len(text) - n
    assert state.allows(prompt + text[:1], [7, EOS, 7]) == 1  # a block of reasoning must end
    assert state.allows(prompt + text[:3], [x, x]) == 1 and state.allows(prompt + text[:3], [y]) == 0
    assert state.allows(prompt + text, [EOS]) == 0 == state.allows([*prompt, *text[:3], z], [x])
    assert not state.error_text


@pytest.mark.parametrize("runtime", ["native", pytest.param("transformers", marks=pytest.mark.slow)])
def test_what_is_drafted_is_allowed(monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    """By every drafter, in a batch and (natively) alone; but for the window of lookahead, of guesses to learn from."""
    monkeypatch.setattr(batch, "FORCED", 0)
    rule = made(Regex("[a-e]{3,9}(foo|fool)x?"))
    target = target_of(runtime)
    for name, drafter in every(target).items():
        if name in ("none", "lookahead (tree)"):
            continue
        drafter.bind(target)
        drafted, texts = watched(drafter), list[list[int]]()
        for prompts in (PROMPTS, PROMPTS[:1])[: 1 + (runtime == "native")]:
            rows = [request(prompt, rule) for prompt in prompts]
            together(target, drafter, rows, FixedDepth(4))
            texts.append(new_tokens(rows[0]))
        nodes, state = 0, rule.state(())
        for texts_before, draft in drafted:
            for b, ids in enumerate(texts_before):
                start = next(len(prompt) for prompt in PROMPTS if ids[: len(prompt)] == prompt)
                for path in draft.paths(b):
                    nodes += 1
                    assert state.allows(ids[start:], path) == len(path), name
        assert nodes or name == "prompt-lookup", name
        assert texts[0] == texts[-1], name


def test_a_chain_ends_where_its_vocabulary_has_nothing_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FORCED", 0)
    target = TransformersTarget(tiny_model())
    known = set(half(target).tolist())
    odd, even = (next(t for t in letters()("abcdefgh").input_ids if (t in known) == inside) for inside in (False, True))
    rule = made(Regex(letters().decode([even, even, odd, even])))
    for name, drafter in every(target).items():
        drafter.bind(target)
        rows = [request(prompt, rule) for prompt in PROMPTS]
        together(target, drafter, rows, FixedDepth(4))
        assert [new_tokens(row) for row in rows] == [[even, even, odd, even, EOS]] * 3, name


class Unchanged(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize("alone", [True, False])
def test_masks_are_made_along_what_is_accepted(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    """Also with another processor."""
    monkeypatch.setattr(batch, "FORCED", 0)
    model, rule = tiny_model(), made(Regex("[a-e]{3,9}(foo|fool)x?"))
    text = plainly(model, PROMPTS[0], rule)

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        right = text[len(ids) - len(PROMPTS[0]) :][:2]
        wrong = next(token for token in letters()("ab").input_ids if token not in right)
        return [(wrong, 0), *zip(right, (0, 2), strict=False), (wrong, 1)]

    row = request(PROMPTS[0], rule)
    if not alone:
        state = rule.state(PROMPTS[0])
        row = Request(PROMPTS[0], 60, RowSampler(SamplingParams(), [state, Unchanged()]), eos=frozenset([EOS]))
    constraint = row.sampler.constraint
    assert constraint is not None and row.sampler.masked_greedy == alone
    together(TransformersTarget(model), Scripted(script), [row], FixedDepth(2))
    assert new_tokens(row) == text and row.metrics.num_accepted_draft_tokens > 4
    assert all([*PROMPTS[0], *new] == [*PROMPTS[0], *text][:length] for length, new in constraint.masks)


def test_masks_are_made_while_a_device_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what it has chosen is read, which waits for it; after that, none is made."""
    monkeypatch.setattr(batch, "FORCED", 0)
    monkeypatch.setattr(scoring, "is_asynchronous", lambda device: True)
    model, rule, made_when = tiny_model(), made(Regex("[a-e]{3,9}(foo|fool)x?")), list[str]()
    text, own, read = plainly(model, PROMPTS[0], rule), ConstraintState._mask, scoring.download

    def noted(self: ConstraintState, *text: Sequence[int]) -> torch.Tensor | None:
        made_when.append("mask")
        return own(self, *text)

    def reads(*tensors: torch.Tensor) -> list[list[list[int]]]:
        made_when.append("read")
        return read(*tensors)

    monkeypatch.setattr(ConstraintState, "_mask", noted)
    monkeypatch.setattr(scoring, "download", reads)

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        made_when.append("draft")
        return [(token, place) for place, token in enumerate(text[len(ids) - len(PROMPTS[0]) :][:2])]

    row = request(PROMPTS[0], rule)
    together(TransformersTarget(model), Scripted(script), [row], FixedDepth(2))
    assert new_tokens(row) == text
    steps = " ".join(made_when).split("draft")[1:]
    assert len(steps) > 2 and all(step.split()[-1] == "read" and "mask" in step for step in steps[:-1])


@pytest.mark.parametrize(
    ("prompt", "reasons"),
    [
        ("a<think>", "inside"),
        ("a", "may"),
        ("a<think>b</think>ccccc", "may"),
        ("a<think></think>", "not"),
        ("a<think>b<bos>c", "may"),
    ],
)
def test_a_constraint_begins_after_a_block_of_reasoning(prompt: str, reasons: str) -> None:
    tokenizer = letters(92)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "{{ messages[0].content.split('</think>')[-1] }}"
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    rule = compile_constraint(Regex("xy"), tokenizer, 97, frozenset([EOS]))
    ids, xy = tokenizer(prompt).input_ids, tokenizer("xy").input_ids
    state = rule.state(ids)
    first = state.mask(ids)
    if reasons == "inside":
        assert int(first.sum()) == 96 and not first[EOS]
    else:
        assert first.nonzero()[:, 0].tolist() == sorted([xy[0]] + [begin] * (reasons == "may"))
    block = {"inside": [5, xy[0], end], "may": [begin, 5, xy[0], end], "not": []}[reasons]
    assert all(int(state.mask(ids, block[:n]).sum()) == 96 for n in range(1, len(block)))  # type: ignore[union-attr]
    assert state.forced(ids + block, 9) == [*xy, EOS]
    target = TransformersTarget(tiny_model())
    row = Request(ids, 100, RowSampler(SamplingParams(), [state]), eos=frozenset([EOS]))
    together(target, EVERY["prompt-lookup"](target), [row], FixedDepth(4))
    new = new_tokens(row)
    answer = new[new.index(end) + 1 :] if reasons != "not" and end in new else new
    assert answer == [*xy, EOS] if row.finish_reason == "eos" else reasons != "not"


def reasoning(pattern: str) -> tuple[CompiledConstraint, list[int]]:
    """A constraint for a model that reasons, and the ids of the tokens around its reasoning."""
    tokenizer = letters(92)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = "</think>"
    rule = compile_constraint(Regex(pattern), tokenizer, 97, frozenset([EOS]))
    return rule, tokenizer.convert_tokens_to_ids(["<think>", "</think>"])


class Counted(list[int]):
    """Token ids that count how many of them are read."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.read += len(self)
        return super().__iter__()


@pytest.mark.parametrize("where", ["answer", "block", "behind a block"])
def test_a_query_reads_no_more_tokens_of_a_long_text(where: str) -> None:
    """Once a query has seen it: nodes of drafts, what is forced, and what is allowed."""
    rule, (begin, end) = reasoning("[a-z]*")
    [letter] = letters()("a").input_ids
    counts = []
    for length in (1000, 30_000):
        block = {"answer": [], "block": [begin], "behind a block": [begin, 7, end]}[where]
        prompt = [5, 6]
        state, ids = rule.state(prompt), Counted([*prompt, *block, *[letter] * length])
        expected = state.mask(ids)
        assert expected is not None
        ids.read = 0
        for step in range(3):
            for depth in range(9):
                mask = state.mask(ids, [letter] * depth)
                assert mask is not None and torch.equal(mask, expected)
                scores = state.masked(ids, torch.zeros(1, 97))
                assert torch.equal(scores.isfinite()[0], expected)
            assert state.forced(ids, 16) == [] and state.allows(ids, [letter] * 5) == 5
            assert state.error(ids) is None
            ids.extend([letter] * step)
        counts.append(ids.read)
    assert counts[0] == counts[1] < 64 * 1000


@pytest.mark.parametrize("seed", range(6))
def test_a_query_answers_as_a_new_matcher_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For texts that grow, with drafts that are rejected, break the constraint, or end a block of reasoning."""
    monkeypatch.setattr(constraints, "TAIL", 7)
    rng, (rule, (begin, end)) = random.Random(seed), reasoning("([a-c]{2,9}xyz)*")
    letter_ids = letters()("abcxyz").input_ids
    prompt = [[5, 6], [5, begin], [5, begin, end], [begin, 6, 6]][seed % 4]
    state, ids = rule.state(prompt), list(prompt)
    while len(ids) < 90:
        for _ in range(4):
            drafted = rng.choices([*letter_ids, end, EOS], [4, 4, 4, 2, 2, 2, 1, 1], k=rng.randint(0, 6))
            fresh = rule.state(prompt)
            expected, mask = fresh.mask([*ids, *drafted]), state.mask(ids, drafted)
            assert (mask is None) == (expected is None)
            assert mask is None or expected is None or torch.equal(mask, expected)
            assert state.allows(ids, drafted) == rule.state(prompt).allows(ids, drafted)
            assert state.forced(ids, 5) == rule.state(prompt).forced(ids, 5)
        for _ in range(rng.randint(1, 6)):
            allowed = rule.state(prompt).mask(ids)
            assert allowed is not None
            right = [token for token in (begin, *letter_ids) if allowed[token]]
            ids.append(end if len(ids) > 40 and end not in ids[len(prompt) :] and allowed[end] else rng.choice(right))
    assert not state.error_text


def test_as_a_logits_processor_it_takes_any_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of several beams, which differ early."""
    monkeypatch.setattr(constraints, "TAIL", 2)
    a, b, c, x = letters()("abcx").input_ids
    state = made(Regex("a{9}x|b{9}c")).state([5])
    for _ in range(2):
        for letter, last in ((a, x), (b, c)):
            for count in (9, 5):
                found = state(torch.tensor([[5, *[letter] * count]]), torch.zeros(1, 97))
                assert found.isfinite().nonzero()[:, 1].tolist() == [last if count == 9 else letter]


@pytest.mark.parametrize(
    ("constraint", "why"),
    [
        (Json({"type": "nope"}), "Invalid type"),
        (Json({"enum": []}), "Unsatisfiable"),
        (Json("{"), "JSON schema cannot be used"),
        (Json("[1]"), "not a JSON object"),
        (Json({"enum": ["x" * LONGEST]}), "shorten it"),
        (Json({1: {2}}), "not JSON"),
        (Regex("^((a|aa){1000}){1000}$"), "too many expressions constructed$"),
        (Grammar('start: "abc" end\nend: "d" end'), "cannot be used: "),
        (Json('{"enum": [NaN]}'), "NaN is not JSON$"),
        (Json('{"a":' * 9000 + "1" + "}" * 9000), "nested too deeply"),
        (Regex("("), "unclosed group"),
        (Grammar("start: start"), "it allows no text$"),
        (Grammar("start: missing"), "grammar cannot be used"),
        (Choice([]), "list of texts"),
    ],
)
def test_a_bad_constraint_is_refused_in_one_line(constraint: Constraint, why: str) -> None:
    with refused(why) as found:
        made(constraint)
    assert len(str(found.value)) < 400


@pytest.mark.parametrize("constraint", [Choice(["abc"]), Json({"const": "x" * 3000}), Regex("a{50}b?")])
def test_a_text_that_is_forced_from_its_beginning_is_allowed(constraint: Constraint) -> None:
    state = made(constraint).state([3])
    assert len(state.forced([3], 4000)) >= 3 and state.error([3]) is None


@pytest.mark.parametrize("pattern", ["(a{1,1000}){1,1000}", "(.*a){60}.*", "[ab]*a[ab]{40}", "(((a*)*)*b*)*!"])
def test_what_ruins_other_regular_expressions_is_bounded(pattern: str) -> None:
    state = made(Regex(pattern)).state([3])
    text = letters()("a" * 30, add_special_tokens=False).input_ids
    assert state.allows([3], text) == 30 or state.error_text


def test_a_constraint_that_fails_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = tiny_model(), made(Json(SCHEMA))
    bad, good = request(PROMPTS[0], rule), request(PROMPTS[1], rule)
    failing, go_to = bad.sampler.constraint, ConstraintState._go_to

    def fails(self: ConstraintState, ids: Sequence[int], drafted: Sequence[int], begin: int) -> bool:
        if self is failing and len(ids) + len(drafted) - begin > 4:
            raise ValueError("too complex")
        return go_to(self, ids, drafted, begin)

    monkeypatch.setattr(ConstraintState, "_go_to", fails)
    target = TransformersTarget(model)
    engine = Engine(target, EVERY["prompt-lookup"](target), ExactVerifier(), FixedDepth(4))
    finish(engine, bad, good)
    assert bad.finish_reason == "error" and "too complex" in str(bad.error)
    assert good.finish_reason == "eos" and new_tokens(good) == plainly(model, PROMPTS[1], rule)


def test_what_cannot_keep_a_constraint_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(SpecDecError, match="fast tokenizer"):
        SpecDecoder(model, None, "none").generate([5], constraint=Regex("a"))
    with pytest.raises(SpecDecError, match="ignore_eos"):
        SpecDecoder(model, letters(), "none").generate([5], constraint=Regex("a"), ignore_eos=True)
    lossy = SpecDecoder(model, letters(), "early-exit", verifier="confident")
    with pytest.raises(SpecDecError, match="without scoring"):
        lossy.generate([5], constraint=Regex("a"))


def test_the_command_takes_a_schema(tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / "schema.json"
    letters().save_pretrained(model)
    tiny_model().save_pretrained(model)

    def ran(schema: str) -> Result:
        file.write_text(schema)
        given = ["--model", str(model), "--drafter", "prompt-lookup", "--max-new-tokens", "60", "--quiet"]
        return CliRunner().invoke(app, ["generate", *given, "--json-schema", str(file), "hello"])

    good, bad = ran(json.dumps(SCHEMA)), ran('{"enum": []}')
    assert set(json.loads(good.stdout)) == {"kind", "n"}
    assert bad.exit_code == 2 and "cannot be used" in bad.stderr


def test_the_server_keeps_response_formats_and_refuses_bad_ones() -> None:
    tokenizer = letters()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    decoder = SpecDecoder(tiny_model(), tokenizer, "prompt-lookup", runtime="transformers")
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    with serving(decoder) as server:
        found = server.chat(max_tokens=60, n=2, seed=3, response_format=schema).json()
        bad = server.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": []}}})
        unnamed = server.chat(response_format={"type": "json_schema"})
        words = server.chat(response_format="json")
    for choice in found["choices"]:
        assert set(json.loads(choice["message"]["content"])) == {"kind", "n"} and choice["finish_reason"] == "stop"
    assert bad.status_code == unnamed.status_code == words.status_code == 400
    assert words.json()["error"]["param"] == "response_format"
    assert bad.json()["error"]["param"] == "response_format" and "Unsatisfiable" in bad.json()["error"]["message"]


def test_a_constraint_that_cannot_be_kept_is_an_error_of_the_client() -> None:
    error = ConstraintError("the constraint cannot be kept")
    script = [Event([65], depths=[0]), Event(finish_reason="error", error=error)]
    with serving(stand_in(byte_tokenizer()), Replay(lambda request: script)) as server:
        found = server.chat()
    assert found.status_code == 400 and found.json()["error"]["message"] == "the constraint cannot be kept"


def test_a_pydantic_model_is_a_schema(llama: PreTrainedModel) -> None:
    decoder = SpecDecoder(llama, letters(), "prompt-lookup", runtime="transformers")
    asked = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3}
    text = decoder.generate([5, 6, 7], constraint=Json(Way), **asked).text
    assert Way.model_validate_json(text)
    assert text == decoder.generate([5, 6, 7], constraint=Json(Way.model_json_schema()), **asked).text
