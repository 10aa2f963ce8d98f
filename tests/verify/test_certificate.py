"""The losslessness certificate: what is right passes, what is biased is caught, and the command says so."""

import json
import math
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from sampled import AcceptsAll
from scripted import Scripted
from tiny import greedy_reference, save_tiny, tiny_model
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.base.options import SamplingParams
from specdec.speculation.sampling import Sampler
from specdec.verifiers.exact import ExactVerifier
from specdec.verify.certificate import Certificate, Check, expected
from specdec.verify.replay import is_near_tie

PROMPT = [5, 17, 9, 3, 21, 17, 9]
PROMPTS = [("a", PROMPT), ("b", PROMPT[2:]), ("c", PROMPT)]  # equal prompts draw different texts


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=24)


def drafting(ids: list[int], limit: int) -> list[tuple[int, int]]:
    return [((7 * len(ids) + i) % 24, i) for i in range(limit)]


def certified(model, verifier="exact", **sampling: float) -> dict[str, Check]:
    decoder = SpecDecoder(model, drafter=Scripted(drafting), verifier=verifier)
    certificate = Certificate(decoder, PROMPTS, SamplingParams(**{"temperature": 1.0} | sampling), 24, (2, 3), 2)
    certificate.run()
    faults = any(c.faults for c in certificate.checks.values())
    assert certificate.complete and certificate.result == ("FAILED" if faults else "PASSED")
    return certificate.checks


@pytest.mark.parametrize("top_k", [0, 6])
def test_exact_decoding_passes(model, top_k: int) -> None:
    checks = certified(model, top_k=top_k)
    assert set(checks) == {"greedy", "sampled", "batch", "generate"}
    for name, check in checks.items():
        count = 12 if name == "batch" else 6  # three prompts, two draft lengths; batches are greedy and sampled
        assert (check.equal, check.answers, check.details) == (count, count, []) and check.tokens > 10
        assert check.drafted > check.accepted
    assert checks["greedy"].accepted + checks["sampled"].accepted > 0 < checks["batch"].accepted  # drafts take part


def test_a_certificate_that_was_cut_short_is_not_passed(model) -> None:
    decoder = SpecDecoder(model, drafter=Scripted(drafting))
    certificate = Certificate(decoder, PROMPTS, SamplingParams(temperature=1.0), 24, (2, 3), 2)
    certificate.run()
    assert certificate.as_dict()["passed"]
    certificate.complete = False
    assert certificate.result == "PASSED" and not certificate.as_dict()["passed"]


def test_a_drafter_that_does_not_draft_proves_nothing(model) -> None:
    decoder = SpecDecoder(model, drafter=Scripted(lambda ids, limit: []))
    certificate = Certificate(decoder, PROMPTS, SamplingParams(temperature=1.0), 12, ("auto", 4), 2)
    certificate.run()
    assert certificate.complete and not any(c.faults or c.drafted for c in certificate.checks.values())
    assert certificate.result == "NOT ENOUGH DRAFTS" and not certificate.as_dict()["passed"]


def test_each_part_needs_drafts(model) -> None:
    decoder = SpecDecoder(model, drafter=Scripted(drafting))
    certificate = Certificate(decoder, PROMPTS, SamplingParams(temperature=1.0), 12, (3,), 2)
    certificate.run()
    least = min(check.drafted for check in certificate.checks.values())
    certificate.min_drafted = least
    assert certificate.result == "PASSED"
    certificate.min_drafted = least + 1
    assert certificate.result == "NOT ENOUGH DRAFTS"


def test_a_rule_that_lets_drafts_through_is_caught(model) -> None:
    assert all(check.faults for check in certified(model, AcceptsAll()).values())


def test_an_option_that_drafts_forget_is_caught(model) -> None:
    decoder = SpecDecoder(model, drafter=Scripted(drafting))
    certificate = Certificate(decoder, PROMPTS, SamplingParams(temperature=3.0, top_k=2, seed=3), 24, (3,))
    generate = decoder.generate_batch
    decoder.generate_batch = lambda prompts, **more: generate(prompts, **more | {"top_k": 0})  # type: ignore
    certificate.run()
    assert certificate.checks["sampled"].faults and not certificate.checks["greedy"].faults
    assert certificate.checks["batch"].faults


def taken(model, answer: list[int], right: list[int], count: int = 12) -> Check:
    decoder = SpecDecoder(model, drafter="none")
    output = decoder.generate(PROMPT, max_new_tokens=1)
    output.token_ids = answer
    check = Check("greedy")
    sampler = Sampler([decoder.request(PROMPT, max_new_tokens=count).sampler])
    check.take("p", PROMPT, output, right, decoder.target, sampler)
    return check


def test_one_wrong_token_is_a_fault_with_its_place_and_gap(model) -> None:
    right = greedy_reference(model, PROMPT, 12)
    assert expected(SpecDecoder(model, drafter="none"), PROMPT, 12) == right and taken(model, right, right).equal == 1
    check = taken(model, [*right[:4], (right[4] + 1) % 24 or 3, *right[5:]], right)
    assert check.faults and check.equal == 0
    assert check.details[0].startswith("prompt p: first difference at token 4: FAULT, logit gap ")


def test_an_answer_cut_short_is_a_fault(model) -> None:
    right = greedy_reference(model, PROMPT, 12)
    assert taken(model, right[:5], right).faults == taken(model, right, right[:5]).faults == 1


def test_in_bfloat16_a_near_tie_passes_and_what_follows_is_checked() -> None:
    model = tiny_model("llama", vocab_size=24).to(torch.bfloat16)
    head = model.get_output_embeddings().weight
    right = greedy_reference(model, PROMPT, 2)
    with torch.no_grad():
        head[20] = head[right[0]]  # a twin: the same logit
    check = taken(model, [20], right[:1], 1)
    assert (check.near_ties, check.faults, check.equal) == (1, 0, 0)
    worst = int(model(torch.tensor([[*PROMPT, 20]])).logits[0, -1].float().argmin())
    check = taken(model, [20, worst], right, 2)
    assert check.faults and check.details[0].startswith(f"prompt p: token 1 is {worst}, ")


def test_a_token_whose_distance_cannot_be_told_is_a_fault(model) -> None:
    assert not is_near_tie(SpecDecoder(model, drafter="none").target, PROMPT, [3], math.nan)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(folder: str):
    def call(*args: str):
        fixed = ["--model", folder, "--drafter", "prompt-lookup", "--limit", "2", "--max-new-tokens", "20"]
        return CliRunner().invoke(cli.app, ["verify", *fixed, *args])

    return call


def test_a_lossless_decoder_gets_its_certificate(run, tmp_path: Path) -> None:
    result = run("--num-speculative-tokens", "4", "--output", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    page, last = result.stdout.rsplit("\n", 2)[0], result.stdout.splitlines()[-1]
    assert page.startswith("Losslessness: PASSED") and "prompt-lookup" in page
    data = json.loads(last)
    assert data == json.loads((tmp_path / "out/certificate.json").read_text())
    assert (tmp_path / "out/certificate.txt").read_text().strip() == page.strip()
    checks = [(c["name"], c["equal"], c["answers"]) for c in data["checks"]]
    # With the automatic length, and with the forced one.
    assert checks == [("greedy", 4, 4), ("sampled", 4, 4), ("batch", 8, 8), ("model.generate", 4, 4)]
    assert data["passed"] and data["complete"] and data["environment"]["threads"]
    assert data["num_speculative_tokens"] == ["auto", 4] and all(c["drafted"] >= 32 for c in data["checks"])
    for fact in ("model", "fingerprint", "drafter", "specdec", "load_average"):
        assert f"\n{fact}: {data[fact]}\n" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_writes_what_it_has(run, tmp_path: Path, monkeypatch, number: int) -> None:
    take = Check.take

    def interrupted(check: Check, *given: object) -> None:
        take(check, *given)  # type: ignore[arg-type]
        signal.raise_signal(number)

    monkeypatch.setattr(Check, "take", interrupted)
    monkeypatch.setattr(sys, "argv", ["specdec", "verify", "caf\udce9"])  # a path that is no text
    page = Certificate.page
    monkeypatch.setattr(Certificate, "page", lambda *given: page(*given) + "\ncaf\udce9")
    monkeypatch.setattr("specdec.cli.verify.terminal.write", lambda text: None)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        result = run("--output", str(tmp_path / "out"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130 and "so far (cut short)" in (tmp_path / "out/certificate.txt").read_text()
    data = json.loads((tmp_path / "out/certificate.json").read_text())
    assert not data["complete"] and "caf\udce9" in data["command"] and data["checks"][0]["answers"] == 1


def test_a_drafter_that_never_drafts_is_refused(folder: str) -> None:
    fixed = ["--model", folder, "--drafter", "none", "--limit", "2", "--max-new-tokens", "8"]
    result = CliRunner().invoke(cli.app, ["verify", *fixed])
    assert result.exit_code == 1 and result.stdout.startswith("Losslessness: NOT ENOUGH DRAFTS\n")
    assert "Each part needs 32 drafted tokens; with fewer it proves nothing." in result.stdout


def test_a_model_with_penalties_and_the_default_drafter_get_theirs(folder: str, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "generation_config.json").write_text('{"repetition_penalty": 1.5, "suppress_tokens": [3, 4, 5]}')
    result = CliRunner().invoke(cli.app, ["verify", "--model", str(copied), "--limit", "1", "--max-new-tokens", "40"])
    assert result.exit_code == 0, result.output
    assert "Losslessness: PASSED" in result.output


def test_bfloat16_has_near_ties_at_most(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    result = run("--dtype", "bfloat16", "--json")
    data = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and data["near_tie"] == 0.5 and len(data["checks"]) == 3
    assert all(c["equal"] + c["near_ties"] == c["answers"] for c in data["checks"])


def test_a_biased_rule_fails_with_exit_code_1(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExactVerifier, "verify", AcceptsAll().verify)
    result = run("--num-speculative-tokens", "3")
    assert result.exit_code == 1 and "Losslessness: FAILED" in result.stdout and "FAULT, greedy, " in result.stdout


def test_a_prompt_that_does_not_fit_is_named_before_any_is_answered(run, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("short\n" + "long " * 2000 + "\n")
    (line,) = run("--prompts", str(prompts)).stderr.splitlines()
    assert line.startswith("error: prompt '2' cannot be answered: the prompt has ")


def test_penalties_are_not_compared_with_generate(model) -> None:
    checks = certified(model, repetition_penalty=1.3)
    assert "generate" not in checks and not any(check.faults for check in checks.values())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--num-speculative-tokens", "x"], "must be 'auto' or a number >= 1; got 'x'"),
        (["--temperature", "0"], "--temperature"),
        (["--seed", "-1"], "seed must be greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_line(run, args: list[str], words: str) -> None:
    result = run(*args)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and words in line
