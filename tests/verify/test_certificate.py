"""The losslessness certificate: what is right passes, what is biased is caught, and the command says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sampled import AcceptsAll
from scripted import Scripted
from tiny import greedy_reference, save_tiny, tiny_model
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.speculation.sampling import Noise, SamplingParams
from specdec.verifiers.exact import ExactVerifier
from specdec.verify.certificate import Fit, Greedy, chi_square_tail, expected, fit, misfits

PROMPT = [5, 17, 9, 3, 21, 17, 9]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=24)


def drafting(ids: list[int], limit: int) -> list[tuple[int, int]]:
    return [((7 * len(ids) + i) % 24, i) for i in range(limit)]


def sampling(model, verifier, draws: int = 300, **more: int) -> Fit:
    decoder = SpecDecoder(model, drafter=Scripted(drafting), verifier=verifier)
    return fit(decoder, PROMPT, 0, draws, SamplingParams(1.0, seed=3, **more), 3)


@pytest.mark.parametrize("top_k", [0, 6])
def test_exact_sampling_fits(model, top_k: int) -> None:
    found = sampling(model, "exact", top_k=top_k)
    assert found.tokens > 1000 and found.choices == found.tokens and not misfits([found])


def test_a_rule_that_lets_drafts_through_is_caught(model) -> None:
    found = sampling(model, AcceptsAll(), 16)
    assert found.faults and misfits([found])


def test_noise_that_is_not_gumbel_is_caught(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts then have no influence, but tokens are not drawn from the model's distribution."""
    noise = Noise.__call__
    monkeypatch.setattr(Noise, "__call__", lambda self, *where: 0.8 * noise(self, *where))
    found = sampling(model, "exact", 600)
    assert not found.faults and misfits([found])


def test_tokens_of_probability_zero_are_caught_however_few(model) -> None:
    decoder = SpecDecoder(model, drafter="none")
    assert not misfits([fit(decoder, PROMPT, 0, 16, SamplingParams(1.0, top_k=2, seed=3), 3)])
    generate = decoder.generate_batch
    decoder.generate_batch = lambda prompts, **more: generate(prompts, **more | {"top_k": 0})  # forgets top-k
    found = fit(decoder, PROMPT, 0, 16, SamplingParams(1.0, top_k=2, seed=3), 3)
    assert found.impossible and misfits([found])


def test_chi_square_tail_is_the_textbook_one() -> None:
    assert chi_square_tail(16.919, 9) == pytest.approx(0.05, abs=1e-4)
    assert chi_square_tail(27.877, 9) == pytest.approx(0.001, abs=1e-5)


# --- greedy ----------------------------------------------------------------------------------------------------------


def checked(model, answer: list[int], dtype: torch.dtype = torch.float32) -> Greedy:
    decoder = SpecDecoder(model, drafter="none")
    right = greedy_reference(model, PROMPT, 12)
    check = Greedy(3, dtype == torch.float32)
    check.take(decoder, "p", PROMPT, answer, right, 12)
    return check


def test_the_tokens_of_generate_pass(model) -> None:
    right = greedy_reference(model, PROMPT, 12)
    check = checked(model, right)
    assert check.passed and (check.equal, check.argmax, check.near_ties) == (1, len(right), 0)
    assert expected(SpecDecoder(model, drafter="none"), PROMPT, 12) == right


def test_one_wrong_token_is_a_fault_with_its_place_and_gap(model) -> None:
    right = greedy_reference(model, PROMPT, 12)
    wrong = [*right[:4], (right[4] + 1) % 24 or 3, *right[5:]]
    check = checked(model, wrong)
    assert not check.passed and check.faults and check.equal == 0
    assert check.details[0].startswith(f"prompt p: token 4 is {wrong[4]}, ")


def test_an_answer_cut_short_is_a_fault(model) -> None:
    right = greedy_reference(model, PROMPT, 12)
    check = checked(model, right[:5])
    assert not check.passed and "ends after 5 of 12" in check.details[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_whose_distance_cannot_be_told_is_a_fault(dtype: torch.dtype) -> None:
    model = tiny_model("llama", vocab_size=24).to(dtype)
    right = greedy_reference(model, PROMPT, 12)
    decoder, check = SpecDecoder(model, drafter="none"), Greedy(3, False)
    model.get_output_embeddings().weight.data[9] = torch.nan  # the model's own answer is broken, too
    check.take(decoder, "p", PROMPT, right, right, 12)
    assert not check.passed and check.faults == len(right) and "nan below the best" in check.details[0]
    assert misfits([Fit(0, 1, 4, 4, 0, 0, torch.nan, torch.nan)])


def test_in_bfloat16_a_near_tie_passes_and_a_fault_does_not() -> None:
    model = tiny_model("llama", vocab_size=24).to(torch.bfloat16)
    head = model.get_output_embeddings().weight
    right = greedy_reference(model, PROMPT, 12)
    with torch.no_grad():
        head[20] = head[right[0]]  # a twin: the same logit
    decoder = SpecDecoder(model, drafter="none")
    check = Greedy(3, strict=False)
    check.take(decoder, "p", PROMPT, [20], right, 1)
    assert check.passed and check.equal == 0
    gaps = model(torch.tensor([PROMPT])).logits[0, -1].float()
    check.take(decoder, "p", PROMPT, [int(gaps.argmin())], right, 1)
    assert not check.passed and check.largest_gap > 0.5


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(folder: str, tmp_path: Path):
    def call(*args: str):
        fixed = ["--model", folder, "--drafter", "prompt-lookup", "--limit", "2", "--max-new-tokens", "20"]
        return CliRunner().invoke(cli.app, ["verify", *fixed, "--draws", "24", "--positions", "0,3", *args])

    return call


def test_a_lossless_decoder_gets_its_certificate(run, tmp_path: Path) -> None:
    result = run("--depths", "1,4,auto", "--output", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    page, last = result.stdout.rsplit("\n", 2)[0], result.stdout.splitlines()[-1]
    assert page.startswith("Losslessness: PASSED") and "prompt-lookup" in page
    data = json.loads(last)
    assert data == json.loads((tmp_path / "out/certificate.json").read_text())
    assert (tmp_path / "out/certificate.txt").read_text().strip() == page.strip()
    assert [(c["depth"], c["equal"], c["answers"]) for c in data["greedy"]] == [(1, 2, 2), (4, 2, 2), ("auto", 2, 2)]
    assert [(f["position"], f["draws"]) for f in data["sampling"]] == [(0, 24), (3, 24)]
    assert data["passed"] and data["complete"] and data["environment"]["threads"]


def test_default_positions_are_those_that_the_first_answer_reaches(folder: str) -> None:
    fixed = ["--model", folder, "--drafter", "prompt-lookup", "--limit", "1", "--depths", "2", "--draws", "8", "--json"]
    for tokens, positions in ((16, [0]), (17, [0, 16])):
        result = CliRunner().invoke(cli.app, ["verify", *fixed, "--max-new-tokens", str(tokens)])
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout.splitlines()[-1])
        assert data["complete"] and [fit["position"] for fit in data["sampling"]] == positions


def test_positions_behind_every_answer_are_refused_before_loading(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpecDecoder, "from_pretrained", None)
    assert "position 20 lies behind" in run("--positions", "0,20").stderr


def test_a_model_with_penalties_and_the_default_drafter_get_theirs(folder: str, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "generation_config.json").write_text('{"repetition_penalty": 1.5, "suppress_tokens": [3, 4, 5]}')
    arguments = ["--limit", "1", "--max-new-tokens", "12", "--draws", "24", "--positions", "0", "--depths", "3"]
    result = CliRunner().invoke(cli.app, ["verify", "--model", str(copied), *arguments])
    assert result.exit_code == 0, result.output
    assert "Losslessness: PASSED" in result.output


def test_bfloat16_is_replayed(run) -> None:
    result = run("--dtype", "bfloat16", "--draws", "0", "--json")
    data = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and data["near_tie"] == 0.5 and data["sampling"] == []
    assert all(c["argmax"] + c["near_ties"] == c["tokens"] for c in data["greedy"])


def test_a_biased_rule_fails_with_exit_code_1(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExactVerifier, "verify", AcceptsAll().verify)
    result = run("--depths", "3", "--draws", "0")
    assert result.exit_code == 1 and "Losslessness: FAILED" in result.stdout and "FAULT at depth 3" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--depths", "1,x"], "--depths must be 'auto' or a number >= 1; got 'x'"),
        (["--positions", "-1"], "--positions takes comma-separated numbers"),
        (["--temperature", "0"], "--temperature"),
        (["--verifier", "exakt"], "did you mean 'exact'"),
        (["--drafter", "prompt-lokup"], "did you mean 'prompt-lookup'"),
        (["--prompts", "nowhere.jsonl"], "no prompt file 'nowhere.jsonl'"),
        (["--positions", "999"], "position 999"),
        (["--positions", "20"], "position 20 lies behind answers of 20 tokens"),
        (["--seed", "-1"], "seed must be a whole number"),
    ],
)
def test_bad_input_is_one_line(run, args: list[str], words: str) -> None:
    result = run(*args)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and words in line
