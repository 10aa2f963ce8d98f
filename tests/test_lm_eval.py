"""lm-eval's figures on tasks of local data are those of its own ``hf`` model, in the library and against the server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from serving import NAME, serving
from test_constraints import letters

from specdec import SpecDecError, SpecDecoder

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> list[dict[str, Any]]:
    rng, lines = random.Random(1), []
    for _ in range(6):
        texts = ["".join(rng.choices("abcdefgh !", k=rng.randrange(2, 12))) for _ in range(4)]
        lines.append({"question": f"q{texts[0]}", "choices": [f"x{text}" for text in texts[1:]], "gold": 1})
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question * 9}}"}
    until = {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    options = {"until": ["b"], "max_gen_toks": 8}
    return [
        data | choice | {"task": "choice", "doc_to_text": "{{question}}"},
        data | rolling | {"task": "rolling", "metric_list": [{"metric": "word_perplexity"}]},
        data | until | {"task": "until", "doc_to_text": "{{question}}", "generation_kwargs": options},
    ]


def evaluated(model: Any, tasks: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True, **more)
    return {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()} | {
        "results": {
            (task, name): value
            for task, values in found["results"].items()
            for name, value in values.items()
            if isinstance(value, float)
        }
    }


def numbers(value: Any) -> list[Any]:
    """Everything in nested lists, in order."""
    return [each for item in value for each in numbers(item)] if isinstance(value, list | tuple) else [value]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["results"] == pytest.approx(expected["results"], rel=1e-5) and found["results"]
    for task in expected.keys() - {"results"}:
        for mine, other in zip(numbers(found[task]), numbers(expected[task]), strict=True):
            assert mine == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other)


def test_figures_equal_those_of_the_hf_model(tasks: list[dict[str, Any]]) -> None:
    from lm_eval.models.huggingface import HFLM

    from specdec.integrations.lm_eval import SpecDecLM

    model, tokenizer = tiny_model(), letters()
    own = SpecDecLM(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="reference"), batch_size=3, max_length=40)
    other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=40, device="cpu")
    check(evaluated(own, tasks), evaluated(other, tasks))
    with pytest.raises(SpecDecError, match="no place for a prompt"):
        own.generate_until([type("Instance", (), {"args": ("a", {"max_gen_toks": 40})})])


def test_local_completions_against_the_server(tasks: list[dict[str, Any]], tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(), letters()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="reference")) as server:
        arguments = {"model": NAME, "base_url": f"{server.url}/v1/completions", "max_length": 120, "max_retries": 1}
        arguments |= {"tokenizer": str(tmp_path / "tokenizer"), "tokenizer_backend": "huggingface"}
        found = evaluated("local-completions", tasks, model_args=arguments, batch_size=3)
    other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=120, device="cpu")
    check(found, evaluated(other, tasks))
