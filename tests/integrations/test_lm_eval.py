"""lm-eval's figures on tasks of local data are those of its own ``hf`` model, in the library and against the server."""

import json
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from servers import NAME, serving
from spies import noted
from tiny import save_tiny, tiny_model
from tiny_tokenizers import letters

from specdec import Engine, SpecDecError, SpecDecoder

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


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
    from lm_eval import simple_evaluate  # takes seconds
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_defaults=False)  # lm-eval's own tasks are thousands of files
    found = simple_evaluate(model=model, tasks=tasks, task_manager=own, bootstrap_iters=0, log_samples=True, **more)
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
    own = SpecDecLM(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="transformers"), batch_size=3, max_length=40)
    other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=40, device="cpu")
    check(evaluated(own, tasks), evaluated(other, tasks))
    with pytest.raises(SpecDecError, match="no room for a prompt"):
        own.generate_until([type("Instance", (), {"args": ("a", {"max_gen_toks": 40})})])


def test_the_model_is_registered_and_takes_what_a_decoder_takes(tasks: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    arguments = {"pretrained": str(folder), "drafter": "prompt-lookup", "verifier": "typical", "batch_size": 2}
    from lm_eval.api.registry import get_model

    import specdec.integrations.lm_eval  # noqa: F401

    model = get_model("specdec")(**arguments)
    assert model.decoder.drafter.name == "prompt-lookup" and not model.decoder.verifier.lossless
    with pytest.MonkeyPatch.context() as patch:
        rows = noted(patch, Engine, "_step", lambda engine: engine.scheduler.running)
        found = evaluated("specdec", tasks[2:], model_args=arguments)
    assert found["until"] and max(rows) == 2  # six prompts, two at a time


def test_options_of_tasks_are_kept_or_refused() -> None:
    from specdec.integrations.lm_eval import _options

    def read(**given: Any) -> dict[str, Any]:
        return {name: value for name, value in _options(given, 9).items() if name != "stop"}

    assert read() == read(num_beams=1, no_repeat_ngram_size=0) == {"temperature": 0.0, "max_new_tokens": 9}
    assert read(do_sample=True, top_p=0.9) == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 9}
    assert read(temperature=0.5, max_completion_tokens=5) == {"temperature": 0.5, "max_new_tokens": 5}
    with pytest.raises(SpecDecError, match="specdec cannot generate with num_beams=4"):
        read(num_beams=4)


@pytest.mark.slow
def test_the_module_is_the_command_and_hides_no_other_model() -> None:
    """In a process of its own: lm-eval registers its models as it looks for the first one."""
    code = """
import runpy, sys, types
sys.modules["lm_eval.__main__"] = types.SimpleNamespace(cli_evaluate=lambda: print("command"))
runpy.run_module("specdec.integrations.lm_eval", run_name="__main__")
from lm_eval.api.registry import get_model as of
print(of("specdec").__name__, of("dummy").__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["command", "SpecDecLM", "DummyLM"], result.stderr[-2000:]


@pytest.mark.slow
def test_local_completions_against_the_server(tasks: list[dict[str, Any]], tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(), letters()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with serving(SpecDecoder(model, tokenizer, "prompt-lookup", runtime="transformers")) as server:
        arguments = {"model": NAME, "base_url": f"{server.url}/v1/completions", "max_length": 120, "max_retries": 1}
        arguments |= {"tokenizer": str(tmp_path / "tokenizer"), "tokenizer_backend": "huggingface"}
        found = evaluated("local-completions", tasks, model_args=arguments, batch_size=3)
    other = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=120, device="cpu")
    check(found, evaluated(other, tasks))
