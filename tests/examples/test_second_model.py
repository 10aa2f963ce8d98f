"""The recipes under examples/ on tiny models."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from pages import ROOT
from tiny import save_tiny

from specdec import SpecDecoder

RECIPE = runpy.run_path(str(ROOT / "examples" / "second_model.py"))


def test_a_few_layers_of_a_model_become_its_draft_model(tmp_path: Path) -> None:
    folder, prompts, output = save_tiny(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "small"
    prompts.write_text("".join(f"question {n}\n" for n in range(8)))
    command = f"--model {folder} --prompts {prompts} --output {output} --minutes 0.03 --layers".split()
    RECIPE["main"]([*command, "0,3"])
    decoder = SpecDecoder.from_pretrained(str(folder), drafter=f"draft-model={output}", dtype="float32")
    assert decoder.drafter.draft_target.num_layers == 2  # type: ignore[attr-defined]
    plain = decoder.with_drafter("none").generate("hello", max_new_tokens=16)
    out = decoder.generate("hello", max_new_tokens=16, num_speculative_tokens=3)
    assert out.token_ids == plain.token_ids and out.metrics.num_draft_tokens > 0
    with pytest.raises(SystemExit):
        RECIPE["main"]([*command, "0,4"])  # there are layers 0 to 3
