"""``dtype="fastest"``: of the dtypes that hold the weights exactly the one that timings name, else the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from specdec import SpecDecError, SpecDecoder, measured
from specdec.experts.offload import ExpertOptions

PROMPT = "hello"


@pytest.fixture(params=["bfloat16", "float16"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, request.param))
    model.save_pretrained(path)
    return path


def timed(monkeypatch: pytest.MonkeyPatch, wide: float | None) -> list[str]:
    """Have float32 take so many times as long as another dtype (None: nobody can tell); what was timed."""
    seen: list[str] = []

    def seconds(what: str, ways: Mapping[str, Callable[[], object]]) -> dict[str, float] | None:
        if not what.startswith("dtype"):
            return None
        for way, run in ways.items():
            run()
            seen.append(way)
        return None if wide is None else {way: wide if way.startswith("float32") else 1.0 for way in ways}

    monkeypatch.setattr(measured, "seconds", seconds)
    return seen


@pytest.mark.parametrize(("wide", "chosen"), [(0.5, "float32"), (0.99, "own"), (2.0, "own"), (None, "own")])
def test_the_fastest_dtype_is_the_base(
    folder: Path, wide: float | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SpecDecoder.from_pretrained(str(folder), "prompt-lookup")
    name = str(own.target.dtype).removeprefix("torch.")
    seen = timed(monkeypatch, wide)
    decoder = SpecDecoder.from_pretrained(str(folder), "prompt-lookup", dtype="fastest")
    assert seen == [f"{name} 1", f"{name} 5", "float32 1", "float32 5"]
    assert str(decoder.target.dtype) == f"torch.{chosen.replace('own', name)}"
    assert decoder.target.num_layers == own.target.num_layers and decoder.target.fingerprint == own.target.fingerprint
    assert decoder.target.chosen.startswith(chosen.replace("own", name))
    named = SpecDecoder.from_pretrained(str(folder), "none", dtype=str(decoder.target.dtype))
    assert decoder.generate(PROMPT).token_ids == named.generate(PROMPT).token_ids


def test_where_there_is_nothing_to_choose_nothing_is_timed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = timed(monkeypatch, 0.5)
    wide = SpecDecoder.from_pretrained(str(save_tiny(tmp_path / "wide")), "none", dtype="fastest")
    assert wide.target.dtype == torch.float32 and "nothing else to choose" in wide.target.chosen and not seen
    with pytest.raises(SpecDecError, match="dtype stays the checkpoint's"):
        SpecDecoder.from_pretrained(str(folder), "none", dtype="fastest", experts=ExpertOptions(cache=0.5))


def test_a_misspelt_one_is_told_of_all_there_are(folder: Path) -> None:
    with pytest.raises(SpecDecError, match=r"did you mean 'fastest'.*known: auto, fastest, "):
        SpecDecoder.from_pretrained(str(folder), "none", dtype="fastst")
