"""A drafter is trained on a model with recurrent layers, on its own answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import HYBRIDS, model_of, tiny_model
from training import Killed, Tokens, checkpoint_of, recipe, same_drafts, searched

from specdec import SpecDecError, SpecDecoder
from specdec.drafters.m2r2 import M2R2Path
from specdec.models import loading
from specdec.runtimes.native import library
from specdec.train import batches
from specdec.train.run import TrainingRun
from specdec.train.trainer import train, training_target


@pytest.fixture(params=["qwen3_5_text", pytest.param("lfm2", marks=pytest.mark.slow)])
def answers(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers of a small hybrid, which ``loading.load`` returns."""
    model, draw, lines = tiny_model(request.param, eos_token_id=None), random.Random(0), []
    for _ in range(24):
        prompt = [draw.randrange(3, 97) for _ in range(4)]
        out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
        lines.append(json.dumps({"prompt_ids": prompt, "response_ids": out[len(prompt) :]}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (model, Tokens()))
    return tmp_path / "answers.jsonl"


@pytest.mark.parametrize("family", HYBRIDS)
def test_the_student_drafts_exactly_as_the_drafter(family: str) -> None:
    target = training_target(tiny_model(family))
    names = {layer: list(target.linears(layer)) for layer in range(4)}
    same_drafts(target, M2R2Path(0, ((1, 4),), True, 4, {layer: names[layer] for layer in (1, 2, 3)}))
    same_drafts(target, M2R2Path(1, ((1, 3), (3, 4)), True, 4, {layer: names[layer] for layer in (1, 3)}, (3,)))
    if family != "mamba2":  # it has no early layer
        early = {n: [name for name in names[n] if "k_proj" not in name and "v_proj" not in name] for n in range(2)}
        same_drafts(target, M2R2Path(2, (), False, 4, early))


def test_m2r2_is_trained_drafts_and_resumes(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path: dict[str, Any] = {"segments": [[2, 4]], "steps": 24}  # a recurrent layer, and one with attention
    train(recipe(answers, tmp_path / "whole", **path))
    step = TrainingRun._step

    def killed(run: TrainingRun, *args: Any) -> dict[str, float]:
        if run.update == 9:
            run._save()
        if run.update == 15:
            raise Killed
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", killed)
    with pytest.raises(Killed):
        train(recipe(answers, tmp_path / "parts", **path))
    monkeypatch.setattr(TrainingRun, "_step", step)
    train(recipe(answers, tmp_path / "parts", **path), resume=True)
    whole, parts = (checkpoint_of(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)

    drafts_well(answers, tmp_path / "whole")


@pytest.mark.skipif(not library.runs(), reason="no native kernels here")
@pytest.mark.parametrize("answers", ["qwen3_5_text"], indirect=True)
def test_m2r2_is_trained_on_states_of_the_kernels(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hybrid: a path of recurrent layers alone, and one that begins with one."""
    model = model_of("qwen3_5_text", eos_token_id=None)
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (model, Tokens()))
    for number, segment in enumerate(([2, 3], [0, 3])):
        out = tmp_path / f"out {number}"
        train(recipe(answers, out, segments=[segment], steps=4, dtype="bfloat16"))
        assert SpecDecoder(model, None, drafter=str(out)).target.runtime == "native"
        with safe_open(next(out.glob("states/train/*.safetensors")), "pt") as stored:
            layers = {layer for layer in range(*segment) if layer % 2 == 0}
            assert {f"m.{layer}" for layer in layers} <= {*stored.keys()}


def drafts_well(answers: Path, trained: Path) -> None:
    """The drafter is accepted above chance, and the output is that of plain decoding."""
    model, _ = loading.load("hybrid")
    decoder, plain = (SpecDecoder(model, None, drafter=drafter) for drafter in (str(trained), "none"))
    drafted = accepted = 0
    for line in answers.read_text().splitlines()[:8]:
        prompt = json.loads(line)["prompt_ids"]
        out = decoder.generate(prompt, max_new_tokens=16, num_speculative_tokens=2)
        assert out.token_ids == plain.generate(prompt, max_new_tokens=16).token_ids
        drafted += out.metrics.num_draft_tokens
        accepted += out.metrics.num_accepted_draft_tokens
    assert accepted > 0.1 * drafted > 0  # one of 97 by chance


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["qwen3_5_text"], indirect=True)
def test_the_search_compares_segments_of_recurrent_layers(answers: Path, tmp_path: Path) -> None:
    train(searched(answers, tmp_path / "out", steps=24))
    table = json.loads((tmp_path / "out/search.json").read_text())["table"]
    assert sorted(row["segment"] for row in table) == [[2, 3], [2, 4], [3, 4]]
    drafts_well(answers, tmp_path / "out")


@pytest.mark.parametrize("answers", ["qwen3_5_text"], indirect=True)
def test_states_that_do_not_fit_into_memory_are_refused(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "free_memory", lambda device: 1000)
    with pytest.raises(SpecDecError, match=r"layer 2 stores its state at 4 x 8 positions.*smaller 'rows' or 'window'"):
        train(recipe(answers, tmp_path / "out"))
