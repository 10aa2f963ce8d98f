"""Frequency penalty, presence penalty and bias of logits: what plain decoding gives under them, for every drafter. And
top-p without a sort of the vocabulary, which keeps what Hugging Face's keeps.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_model
from transformers import PreTrainedModel, TopPLogitsWarper
from typer.testing import CliRunner
from zoo import EVERY, PROMPTS, new_tokens, together

from specdec import Request, SamplingParams, SpecDecError, SpecDecoder
from specdec.cli import app
from specdec.engine.depth import FixedDepth
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation import library
from specdec.speculation.sampling import RowSampler, Sampler
from specdec.speculation.warpers import Temperature, TopP

COUNT = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 0.4},
    "presence": {"presence_penalty": 1.5},
    "rewards": {"frequency_penalty": -0.3, "presence_penalty": -1.0},
    "bias": {"logit_bias": {5: 1.0, 9: -100.0, 11: 0.75}},
    "all": {"frequency_penalty": 0.2, "presence_penalty": 0.3, "logit_bias": {7: -1.0, 8: 1.0}},
}


def plainly(model: PreTrainedModel, prompt: list[int], asked: dict[str, Any]) -> list[int]:
    """Greedy decoding one token at a time, with OpenAI's formula."""
    new = list[int]()
    while len(new) < COUNT:
        logits = model(torch.tensor([prompt + new])).logits[0, -1].float()
        for token, bias in asked.get("logit_bias", {}).items():
            logits[token] += bias
        for token, count in Counter(new).items():
            logits[token] -= asked.get("frequency_penalty", 0) * count + asked.get("presence_penalty", 0)
        new.append(int(logits.argmax()))
    return new


@torch.inference_mode()
def test_rows_of_a_batch_have_their_own() -> None:
    model = tiny_model()
    target = TransformersTarget(model)
    rows = [(prompt, asked) for prompt in PROMPTS[:2] for asked in ({}, *SETTINGS.values())]
    for drafter in ("prompt-lookup", "medusa", "m2r2 (tree)"):
        samplers = [RowSampler(SamplingParams(**asked), start=len(prompt)) for prompt, asked in rows]
        requests = [Request(prompt, COUNT, sampler) for (prompt, _), sampler in zip(rows, samplers, strict=True)]
        drafting = EVERY[drafter](target)
        drafting.bind(target)
        together(target, drafting, requests, FixedDepth(3), max_rows=5)  # rows come and go
        assert [new_tokens(request) for request in requests] == [plainly(model, *row) for row in rows]


def test_a_bias_of_100_decides() -> None:
    decoder = SpecDecoder(tiny_model(), drafter="prompt-lookup")
    assert decoder.generate(PROMPTS[0], max_new_tokens=5, logit_bias={7: 100}, ignore_eos=True).token_ids == [7] * 5
    banned = {token: -100.0 for token in range(97) if token not in (3, 4)}
    drawn = decoder.generate(PROMPTS[0], max_new_tokens=30, logit_bias=banned, temperature=2.0, ignore_eos=True)
    assert set(drawn.token_ids) == {3, 4}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--logit-bias", "x=1"], "--logit-bias takes TOKEN=BIAS"),
        (["--logit-bias", "5=101"], "logit_bias.5 must be less than or equal to 100"),
        (["--presence-penalty", "3"], "presence_penalty must be less than or equal to 2"),
    ],
)
def test_the_command_takes_them_and_refuses_others(given: list[str], says: str, tmp_path: Path) -> None:
    command = ["generate", "Hi", "--model", str(save_tiny(tmp_path / "tiny")), "--max-new-tokens", "4", "--json"]
    command += ["--drafter", "prompt-lookup", "--num-speculative-tokens", "2"]
    asked = ["--logit-bias", "9=100", "--logit-bias", "10=-1", "--frequency-penalty", "0.5", "--compare"]
    found = CliRunner().invoke(app, command + asked)
    output = json.loads(found.stdout)
    assert found.exit_code == 0 and output["token_ids"] == [9] * 4 and output["compare"]["identical"]
    assert output["settings"]["logit_bias"] == {"9": 100.0, "10": -1.0}
    refused = CliRunner().invoke(app, command + given)
    assert refused.exit_code == 2 and says in refused.stderr


def test_a_token_that_the_model_lacks_is_refused_on_every_way_in() -> None:
    decoder = SpecDecoder(tiny_model(), drafter="none")
    with pytest.raises(SpecDecError, match="logit_bias has token ids outside the model's vocabulary of 97"):
        decoder.generate(PROMPTS[0], logit_bias={97: 1})
    with decoder.engine() as engine, pytest.raises(SpecDecError, match="logit_bias has token ids outside"):
        engine.submit(Request([5], 3, RowSampler(SamplingParams(logit_bias={10**6: 1}))))
    assert decoder.generate(PROMPTS[0], max_new_tokens=3, logit_bias={96: 1}).token_ids


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0, 30.0])  # from flat to peaked
@pytest.mark.parametrize("size", [1, 7, 32, 517])
def test_top_p_keeps_what_transformers_keeps(top_p: float, scale: float, size: int) -> None:
    scores = scale * torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    ours = TopP(top_p)(None, scores)  # type: ignore[arg-type]
    assert torch.equal(ours, TopPLogitsWarper(top_p)(None, scores))  # type: ignore[arg-type]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_top_p_of_a_large_vocabulary_is_the_smallest_set(top_p: float, scale: float) -> None:
    scores = scale * torch.randn(4, 50_003, generator=torch.Generator().manual_seed(1))
    scores[1] = scores[1].round()  # many equal ones
    scores[2, ::3] = float("-inf")
    scores[3] += 1e4
    for own, kept in zip(scores, TopP(top_p)(None, scores).isfinite(), strict=True):  # type: ignore[arg-type]
        p = own.double().softmax(-1)
        last = p[kept].min()
        assert torch.equal(kept, p >= last)
        assert p[kept].sum() >= top_p - 1e-6 and p[p > last].sum() < top_p + 1e-6


def test_top_p_leaves_logits_that_are_not_finite_to_the_choice() -> None:
    for wrong in (float("nan"), float("inf")):
        scores = torch.randn(1, 100)
        scores[0, 40] = wrong
        assert not TopP(0.5)(None, scores)[0, 40].isfinite()  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [True, False])
def test_equal_tokens_stay_or_leave_together(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(library, "load", lambda: None)
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, -4.0, float("-inf")]])
    kept = TopP(0.9)(None, scores).isfinite()  # type: ignore[arg-type]
    assert kept.tolist() == [[True, True, True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 31, 32, 1000, 50_003])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (0, 0.9), (0, 0.9999), (1, 1.0), (20, 0.8), (700, 0.99), (2000, 0.5)]
)
def test_a_token_drawn_at_once_is_that_of_the_processors(
    dtype: torch.dtype, size: int, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat, peaked and tied logits; drawn by the compiled function, by parts of it, and in PyTorch."""
    row = RowSampler(SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, seed=3))
    scale = torch.tensor([0.1, 1.0, 3.0, 3.0, 12.0]).repeat(4)[:, None]
    logits = (scale * torch.randn(20, size, generator=torch.Generator().manual_seed(2)) + 3).to(dtype)
    logits[3::5] = logits[3::5].round()
    logits[4, ::2] = float("-inf")
    logits[19] = float("-inf")
    sampler, at = Sampler([row]), [[*range(100, 120)]]
    drawn = sampler.draw(logits[None], tuple, at)
    assert drawn.unique().numel() > (size > 31 and top_k != 1) and drawn[0, 19] == -1
    assert torch.equal(drawn, sampler.choose(sampler.scores(logits[None], tuple), at))
    monkeypatch.setattr(library, "load", lambda: None)
    noisy = sampler.draw(logits[None], tuple, at)
    assert (noisy == drawn).float().mean() >= 0.9  # PyTorch's sums of probabilities differ at the edge of top-p


def test_a_draw_from_logits_that_are_not_finite_is_none() -> None:
    for wrong in (float("nan"), float("inf")):
        logits = torch.randn(1, 1, 100)
        logits[0, 0, 40] = wrong
        for params in ({}, {"top_p": 0.5}, {"top_k": 5}):
            row = RowSampler(SamplingParams(temperature=0.7, **params))
            assert Sampler([row]).draw(logits, tuple, [[7]]).tolist() == [[-1]]


def test_a_row_without_possible_tokens_stays_so() -> None:
    nothing = torch.full((1, 8), float("-inf"))
    assert torch.equal(TopP(0.5)(None, nothing), nothing)  # type: ignore[arg-type]


def test_rows_with_warpers_of_their_own_share_none() -> None:
    cold, hot = [Temperature(0.5)], [Temperature(2.0)]
    logits = torch.randn(4, 2, 9)
    rows = [RowSampler(SamplingParams(temperature=1.0), warpers=own) for own in (cold, hot, None, cold)]
    scores = Sampler(rows).scores(logits, list)
    for found, given, factor in zip(scores, logits, (0.5, 2.0, 1.0, 0.5), strict=True):
        assert torch.allclose(found, given / factor)


def test_processors_see_the_text_of_each_position_whatever_was_drafted_before() -> None:
    seen, rng = list[list[int]](), random.Random(0)

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores

    row, text = RowSampler(SamplingParams(), [note]), [rng.randrange(9) for _ in range(700)]
    for _ in range(40):
        for _ in range(5):
            draft = [rng.randrange(9) for _ in range(rng.randrange(100))]
            row.process(torch.zeros(1, 9), before := (*text, *draft), None)
            assert seen[-1] == list(before)
        if rng.random() < 0.1:
            text = [rng.randrange(9) for _ in range(rng.randrange(900))]  # a sampler that is used again
        text += [rng.randrange(9) for _ in range(rng.randrange(4))]
