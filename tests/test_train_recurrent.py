"""A drafter is trained on a model with recurrent layers, on its own answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_train import Tokens, recipe, train

from specdec import SpecDecError, SpecDecoder
from specdec.models import loading
from specdec.train.run import Run


class Killed(BaseException):
    pass


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers of a small hybrid, which ``loading.load`` returns."""
    model, draw, lines = tiny_model("qwen3_5_text", eos_token_id=None), random.Random(0), []
    for _ in range(24):
        prompt = [draw.randrange(3, 97) for _ in range(4)]
        out = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
        lines.append(json.dumps({"prompt_ids": prompt, "response_ids": out[len(prompt) :]}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (model, Tokens()))
    return tmp_path / "answers.jsonl"


def test_m2r2_is_trained_drafts_and_resumes(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path: dict[str, Any] = {"segments": [[3, 4]], "search": False, "steps": 24}
    train(recipe(answers, tmp_path / "whole", **path))
    step = Run._step

    def killed(run: Run, *args: Any) -> dict[str, float]:
        if run.update == 9:
            run._save()
        if run.update == 15:
            raise Killed
        return step(run, *args)

    monkeypatch.setattr(Run, "_step", killed)
    with pytest.raises(Killed):
        train(recipe(answers, tmp_path / "parts", **path))
    monkeypatch.setattr(Run, "_step", step)
    train(recipe(answers, tmp_path / "parts", **path), resume=True)
    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)

    model, _ = loading.load("hybrid")
    decoder, plain = (SpecDecoder(model, None, drafter=drafter) for drafter in (str(tmp_path / "whole"), "none"))
    drafted = accepted = 0
    for line in answers.read_text().splitlines()[:8]:
        prompt = json.loads(line)["prompt_ids"]
        out = decoder.generate(prompt, max_new_tokens=16, num_speculative_tokens=2)
        assert out.token_ids == plain.generate(prompt, max_new_tokens=16).token_ids
        drafted += out.metrics.num_draft_tokens
        accepted += out.metrics.num_accepted_draft_tokens
    assert accepted > 0.1 * drafted > 0  # one of 97 by chance


def test_a_path_through_recurrent_layers_is_refused_by_training(answers: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecDecError, match="layer 2 is recurrent"):
        train(recipe(answers, tmp_path / "out", segments=[[2, 4]], search=False))
