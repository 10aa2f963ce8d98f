"""Whole runs of training: they learn, resume exactly, and say clearly what is wrong."""

import io
import itertools
import json
import math
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import yaml
from lora import save_lora
from refusals import refused
from rich.console import Console
from safetensors.torch import load_file
from tiny import save_granite4, save_native, save_tiny, tiny_model
from tiny_gguf import write_gguf
from training import Killed, Tokens, checkpoint_of, evaluations, recipe
from typer.testing import CliRunner

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.cli import app
from specdec.models import drafter_folder, loading
from specdec.runtimes.native import library
from specdec.train import data, trainer
from specdec.train.data import TrainingAnswer
from specdec.train.m2r2 import M2R2Method
from specdec.train.medusa import MedusaSettings
from specdec.train.progress import RunProgress
from specdec.train.run import TrainingRun, mean_figures
from specdec.train.settings import from_mapping
from specdec.train.student import Teacher
from specdec.train.trainer import train


@pytest.mark.parametrize("path", [{}, {"exit_layer": 3, "segments": [], "final_projection": False, "draft_steps": 1}])
def test_training_brings_drafts_nearer_to_the_base_and_leaves_the_base_alone(answers, tmp_path, path) -> None:
    model, _ = loading.load("tiny")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    train(recipe(answers, tmp_path / "out", steps=80, relative_rate=0.1, **path))
    first, last = evaluations(tmp_path / "out")
    assert 1 - last["overlap"][0] < 0.9 * (1 - first["overlap"][0])
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    decoder = SpecDecoder(model, None, drafter=str(tmp_path / "out"))
    plain = SpecDecoder(model, None, drafter="none")
    prompt = [5, 6, 7, 8]
    out = decoder.generate(prompt, max_new_tokens=20, num_speculative_tokens=4)
    assert out.token_ids == plain.generate(prompt, max_new_tokens=20).token_ids
    assert (tmp_path / "out" / "train.yaml").exists()


@pytest.mark.parametrize(("checkpoint", "dtype"), [(5, "float32"), (5, "bfloat16"), (None, "float32")])
def test_a_killed_run_goes_on_to_exactly_the_weights_of_an_uninterrupted_one(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int | None, dtype: str
) -> None:
    """In bfloat16, it goes on with the weights as they were when they were last rounded, too."""
    given = partial(recipe, answers, steps=10, dtype=dtype)
    train(given(tmp_path / "whole"))
    step = TrainingRun._step

    def killed(run: TrainingRun, *args: Any) -> dict[str, float]:
        if run.update == checkpoint:
            run._save()
        if run.update == 7:
            raise Killed
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", killed)
    with pytest.raises(Killed):
        train(given(tmp_path / "parts"))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"seconds": 1')  # as if it had been writing just then
    monkeypatch.setattr(TrainingRun, "_step", step)
    with pytest.raises(SpecDecError, match="--resume"):
        train(given(tmp_path / "parts"))
    with pytest.raises(SpecDecError, match="rank 4 -> 5"):
        train(given(tmp_path / "parts", rank=5), resume=True)
    train(given(tmp_path / "parts"), resume=True)

    whole, parts = (checkpoint_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(evaluations(tmp_path / "parts")) == len(evaluations(tmp_path / "whole"))


def test_evaluations_on_the_way_change_no_weights(answers: Path, tmp_path: Path) -> None:
    """They read the weights rounded anew, at times that depend on the machine; updates between do not."""
    found = []
    for minutes in (999.0, 0.0):
        out = tmp_path / str(minutes)
        train(recipe(answers, out, steps=10, dtype="bfloat16", eval_minutes=minutes))
        found.append(checkpoint_of(out))
    assert len(evaluations(tmp_path / "0.0")) > len(evaluations(tmp_path / "999.0"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_writes_a_checkpoint_and_goes_on_to_the_same_weights(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    train(recipe(answers, tmp_path / "whole", steps=10))
    step, before = TrainingRun._step, signal.getsignal(number)

    def stopped(run: TrainingRun, *args: Any) -> dict[str, float]:
        if run.update == 4:
            os.kill(os.getpid(), number)
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", stopped)
    settings = recipe(answers, tmp_path / "parts", steps=10)
    with pytest.raises(KeyboardInterrupt):
        train(settings)
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["update"] == 5  # the update has ended
    monkeypatch.undo()
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: (tiny_model("llama", eos_token_id=None), Tokens()))
    train(settings, resume=True)
    for name, tensor in checkpoint_of(tmp_path / "whole").items():
        assert torch.equal(tensor, checkpoint_of(tmp_path / "parts")[name]), name


def test_the_whole_time_is_known_before_and_all_parts_count(answers: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    train(recipe(answers, tmp_path / "out", steps=10), console=Console(file=shown, width=200), preset="mine")
    (line,) = [line for line in shown.getvalue().splitlines() if line.startswith("training m2r2 with preset mine")]
    assert "takes about" in line and "gradients" in line and "(10 updates)" in line
    progress = RunProgress(Console(quiet=True))
    progress.plan({"answers": 10, "states": 20, "fit": 0, "gradients": 30})
    for part, done, whole in (("answers", 5, 5), ("states", 5, 20), ("gradients", 10, 60)):
        progress.advance(progress.add_task(part, total=10, part=part), done)
        assert progress.tasks[0].completed == whole


def test_a_card_stands_beside_the_drafter(answers: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines = [line | {"category": ("code", "math")[number % 2]} for number, line in enumerate(lines)]
    answers.write_text("\n".join(map(json.dumps, lines)))
    train(recipe(answers, tmp_path / "out", steps=2, eval_fraction=0.3))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("# m2r2 for ") and str(tmp_path) not in card
    assert (
        "--preset train.yaml --prompts answers.jsonl --output DIR" in card and "licence" in card and "## Data" in card
    )
    assert "| code (" in card and "| math (" in card and card.count("mean acceptance length") == 3


def test_given_answers_are_evaluated_by_category_and_not_trained_on(answers: Path, tmp_path: Path) -> None:
    lines, tests = answers.read_text().splitlines(), tmp_path / "tests.jsonl"
    kinds = [json.loads(line) | {"category": kind} for line, kind in zip(lines, ("code", "code", "math"), strict=False)]
    tests.write_text("\n".join(map(json.dumps, kinds)))
    answers.write_text("\n".join(lines[3:]))
    out = tmp_path / "out"
    figures = train(recipe(answers, out, steps=2, evaluation=[str(tests)]))
    assert figures["positions"] == sum(len(each["response_ids"]) for each in kinds)
    index = json.loads((out / "states/train/index.json").read_text())
    assert sum(shard["answers"] for shard in index["shards"]) == len(lines) - 3
    assert not (out / "evaluation.jsonl").exists()  # all have answers
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert next(row["kinds"] for row in rows if "evaluation" in row).keys() == {"code (2)", "math (1)"}
    assert "evaluation:\n- tests.jsonl" in (out / "train.yaml").read_text()
    with pytest.raises(SpecDecError, match="prompt 1 to train on contains the held-out prompt"):
        train(recipe(answers, tmp_path / "same", evaluation=[str(answers)]))
    tests.write_text(json.dumps(kinds[0] | {"response_ids": [5]}))
    with pytest.raises(SpecDecError, match="or to evaluate on, are empty or too long"):
        train(recipe(answers, tmp_path / "short", evaluation=[str(tests)]))


def test_an_evaluation_is_made_once_and_by_category_for_an_export_alone(answers, tmp_path, monkeypatch) -> None:
    tests, out = tmp_path / "tests.jsonl", tmp_path / "out"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    kinds = [line | {"category": kind} for line, kind in zip(lines, ("code", "math"), strict=False)]
    tests.write_text("\n".join(map(json.dumps, kinds)))
    answers.write_text("\n".join(map(json.dumps, lines[2:])))
    evaluate, scores = M2R2Method.evaluate, iter([2.0, 5.0, 5.0, 1.0, 3.0, 5.0, 5.0])  # all, and then the two kinds
    monkeypatch.setattr(M2R2Method, "evaluate", lambda *given: evaluate(*given) | {"score": next(scores)})
    settings = recipe(answers, out, steps=2, evaluation=[str(tests)], eval_minutes=0)
    train(settings)
    train(settings, resume=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [(row["update"], row["evaluation"]["score"], "kinds" in row) for row in rows if "evaluation" in row]
    assert found == [(0, 2.0, True), (1, 1.0, False), (2, 3.0, True)]


def test_more_processes_than_windows_are_refused(answers: Path, tmp_path: Path, monkeypatch) -> None:
    many = SimpleNamespace(num_processes=10_000, is_main_process=True)
    monkeypatch.setattr(trainer, "TrainingRun", lambda *given: TrainingRun(*given[:-1], many))
    with refused("10000 processes cannot share [0-9]+ windows of answers; give more prompts"):
        train(recipe(answers, tmp_path / "out"))


def test_prompts_to_evaluate_on_are_answered_apart_and_spread_over_their_file(answers: Path, tmp_path: Path) -> None:
    tests, out = tmp_path / "tests.jsonl", tmp_path / "out"
    lines = [{"prompt": f"{40 + number} 7", "category": str(number % 2)} for number in range(12)]
    tests.write_text("\n".join(map(json.dumps, lines)))
    settings = recipe(answers, out, steps=2, evaluation=[str(tests)], eval_answers=4, max_new_tokens=9)
    train(settings)
    made = [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]
    assert {tuple(each["prompt_ids"]) for each in made} == {(40 + number, 7) for number in (0, 3, 6, 9)}
    assert not (out / "answers.jsonl").exists()
    before = evaluations(out)
    train(settings.model_copy(update={"steps": 3}), resume=True)
    assert evaluations(out)[0] == before[0] and len(made) == 4


def test_means_of_figures_leave_out_batches_without_a_position() -> None:
    figures = [{"agree": 0.5, "agree2": math.nan}, {"agree": 1.0, "agree2": 0.25}]
    assert mean_figures(figures) == {"agree": 0.75, "agree2": 0.25}
    assert mean_figures(figures[:1]) == {"agree": 0.5}


def test_a_second_process_that_resumes_a_run_is_refused_and_changes_nothing(answers, tmp_path, monkeypatch) -> None:
    out, step, said = tmp_path / "out", TrainingRun._step, list[str]()

    def beside(run: TrainingRun, *args: Any) -> dict[str, float]:
        if run.update == 3:
            run._save()
            before = (out / "train.yaml").read_bytes()
            with pytest.raises(SpecDecError) as refused:
                train(recipe(answers, out, steps=8), resume=True)
            assert (out / "train.yaml").read_bytes() == before
            said.append(str(refused.value))
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", beside)
    train(recipe(answers, out, steps=5))
    assert said == [f"another process trains in '{out}'; wait for its end, or end it and continue with --resume"]
    monkeypatch.setattr(TrainingRun, "_step", step)
    train(recipe(answers, out, steps=8), resume=True)


def test_a_finished_run_is_prolonged_from_its_last_update(answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(answers, out, steps=10))
    first = checkpoint_of(out)
    with pytest.raises(SpecDecError, match=r"pass --resume to continue it, also with a longer --minutes or --steps"):
        train(recipe(answers, out, steps=20))
    with pytest.raises(SpecDecError, match="steps 10 -> 5"):
        train(recipe(answers, out, steps=5), resume=True)
    train(recipe(answers, out, steps=20), resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {line["update"]: line["rate"] for line in lines if "rate" in line}
    assert list(rates) == [10, 20]  # what was done is not done again
    assert any(not torch.equal(first[key], now) for key, now in checkpoint_of(out).items())
    assert yaml.safe_load((out / "train.yaml").read_text())["steps"] == 20


def test_a_run_may_begin_from_a_trained_drafter_of_the_same_shape(answers: Path, tmp_path: Path) -> None:
    first = train(recipe(answers, tmp_path / "first", steps=20, relative_rate=0.1))
    # That drafter's path and vocabulary count.
    other = {"init": str(tmp_path / "first"), "segments": [], "rank": 7, "draft_vocab": 20}
    again = train(recipe(answers, tmp_path / "again", steps=2, **other))
    assert evaluations(tmp_path / "again")[0]["top1"] == first["top1"]
    assert again["score"] >= first["score"]
    vocabularies = [drafter_folder.read_tensors(tmp_path / name)["draft_vocab"] for name in ("first", "again")]
    assert torch.equal(*vocabularies)
    before, config = (drafter_folder.read_config(tmp_path / name) for name in ("first", "again"))
    assert config["path"] == before["path"]
    assert config["training"]["began_from"]["updates"] == before["training"]["updates"]

    config["base"] = {"fingerprint": "another"}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    said = io.StringIO()
    foreign = train(recipe(answers, tmp_path / "foreign", steps=2, **other), console=Console(file=said, width=400))
    assert f"'{tmp_path / 'first'}' was trained for another model, not for this model; it is only" in said.getvalue()
    assert evaluations(tmp_path / "foreign")[0]["top1"] == first["top1"] and foreign["score"] >= first["score"]
    with pytest.raises(SpecDecError, match="does not exist"):
        train(recipe(answers, tmp_path / "missing", init=str(tmp_path / "nowhere")))
    values = {"prompts": [str(answers)], "output": str(tmp_path / "medusa"), "method": "medusa", "dtype": "float32"}
    values |= {"init": str(tmp_path / "again"), "heads": 2, "window": 8, "steps": 1, "minutes": None}
    with pytest.raises(SpecDecError, match=r"cannot begin a 'medusa' drafter from .*again'"):
        train(from_mapping(MedusaSettings, values, "test"))


def test_a_drafter_is_stored_as_asked_and_a_run_may_begin_from_8_bits(answers: Path, tmp_path: Path) -> None:
    def kinds(name: str) -> set[torch.dtype]:
        return {value.dtype for value in load_file(tmp_path / name / "model.safetensors").values()}

    first = train(recipe(answers, tmp_path / "int8", steps=20, relative_rate=0.1, storage="int8"))
    train(recipe(answers, tmp_path / "half", steps=1, storage="bfloat16"))
    assert torch.int8 in kinds("int8") and kinds("half") == {torch.bfloat16, torch.int32}
    assert kinds("int8") - {torch.int8, torch.bfloat16} == {torch.float32, torch.int32}
    train(recipe(answers, tmp_path / "again", steps=1, init=str(tmp_path / "int8")))
    assert evaluations(tmp_path / "again")[0]["score"] == pytest.approx(first["score"], abs=0.2)
    assert all(value.dtype == torch.float32 for value in checkpoint_of(tmp_path / "int8").values())
    with pytest.raises(SpecDecError, match=r"storage must be .*; got 'int4'"):
        recipe(answers, tmp_path / "odd", storage="int4")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_drafter(answers, tmp_path, monkeypatch) -> None:
    compare, calls = Teacher.compare, itertools.count(1)

    def broken(*given: Any) -> tuple[torch.Tensor, float, torch.Tensor]:
        loss, *rest = compare(*given)
        return (loss * float("nan") if next(calls) > 12 else loss, *rest)

    monkeypatch.setattr(Teacher, "compare", broken)
    with pytest.raises(SpecDecError, match="the loss is not finite at update 6"):
        train(recipe(answers, tmp_path / "out"))
    assert all(t.isfinite().all() for t in drafter_folder.read_tensors(tmp_path / "out").values())
    assert all(t.isfinite().all() for t in checkpoint_of(tmp_path / "out").values())


def test_a_drafter_trained_on_a_gguf_file_serves_it_and_its_other_precisions(tmp_path, monkeypatch, capsys) -> None:
    """In the dtype that this CPU multiplies faster; what it learns from is what the blocks compute."""
    opened, dtypes = trainer.training_target, list[torch.dtype]()
    monkeypatch.setattr(trainer, "float32_is_faster", lambda: True)
    monkeypatch.setattr(trainer, "training_target", lambda model: dtypes.append(model.dtype) or opened(model))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    files = {name: tmp_path / f"{name}.gguf" for name in ("packed", "plain", "other")}
    write_gguf(files["packed"], width=64, packed=gguf.GGMLQuantizationType.Q4_0)
    write_gguf(files["plain"], width=64)
    write_gguf(files["other"], width=64, seed=1)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{n} plus {n} is" for n in range(12)))
    command = ["train", "m2r2", "--model", str(files["packed"]), "--prompts", str(tmp_path / "prompts.txt")]
    sizes = ["max_new_tokens=24", "rank=2", "draft_vocab=50", "rows=4", "window=8", "eval_fraction=0.2"]
    command += ["--output", str(tmp_path / "out"), "--steps", "2", *(f"--set={each}" for each in sizes)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(trainer, "float32_is_faster", lambda: False)  # another timing changes nothing in this run
    again = CliRunner().invoke(app, [*command, "--resume"])
    assert again.exit_code == 0, again.output
    assert dtypes == [torch.float32] * 2
    assert load_file(tmp_path / "out" / "model.safetensors")["projections.0.weight"].dtype == torch.bfloat16
    capsys.readouterr()
    for name, says in (("packed", False), ("plain", True)):
        decoder = SpecDecoder.from_pretrained(str(files[name]), drafter=str(tmp_path / "out"))
        assert ("another precision of that model" in capsys.readouterr().err) == says
        plain = decoder.with_drafter("none").generate("3 plus 3 is", max_new_tokens=16).token_ids
        out = decoder.generate("3 plus 3 is", max_new_tokens=16, num_speculative_tokens=2)
        assert out.token_ids == plain and out.metrics.num_draft_tokens > 0
    with pytest.raises(SpecDecError, match="differ by more than rounding"):
        SpecDecoder.from_pretrained(str(files["other"]), drafter=str(tmp_path / "out"))


def test_nothing_that_is_published_names_a_path_of_this_machine(answers: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "bases/my-base", tmp_path / "out"
    base.mkdir(parents=True)
    (base / "config.json").write_text('{"_name_or_path": "' + str(base) + '"}')
    train(recipe(answers, tmp_path / "first", steps=2))
    (tmp_path / "held.jsonl").write_text('{"prompt_ids": [3, 3, 3], "response_ids": [4]}\n')
    more = {"model": str(base), "init": str(tmp_path / "first"), "holdout": [str(tmp_path / "held.jsonl")]}
    train(recipe(answers, out, steps=2, **more))
    config, recorded = (out / "config.json").read_text(), (out / "train.yaml").read_text()
    assert str(tmp_path) not in config + recorded
    assert json.loads(config)["base"]["name"] == "my-base" and "model: my-base\n" in recorded
    assert "- answers.jsonl\n" in recorded and "init: first\n" in recorded
    train(recipe(answers, out, steps=2, **more), resume=True)
    with pytest.raises(SpecDecError, match=r"cannot resume .* with other settings: model 'my-base' -> 'other'"):
        train(recipe(answers, out, steps=2, **more | {"model": "other"}), resume=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.jsonl", "states/theirs"])
def test_an_output_folder_with_foreign_files_is_refused(answers: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("theirs")
    with pytest.raises(SpecDecError, match=r"that no training run wrote; give another --output"):
        train(recipe(answers, out))
    assert (out / name).read_text() == "theirs" and not (out / "train.yaml").exists()


def test_a_run_that_failed_before_it_computed_anything_does_not_block_its_folder(answers: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecDecError, match="does not fit a model of 4 layers"):
        train(recipe(answers, tmp_path / "out", segments=[[3, 9]]))
    train(recipe(answers, tmp_path / "out", steps=1))
    with pytest.raises(SpecDecError, match="holds a training run"):
        train(recipe(answers, tmp_path / "out", steps=1))


def test_the_command_answers_prompts_trains_and_leaves_a_drafter(tmp_path: Path) -> None:
    folder, prompts, output = save_tiny(tmp_path / "model"), tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("".join(f"question {n}\n" for n in range(24)))
    preset = tmp_path / "preset.yaml"
    preset.write_text(
        "segments: [[2, 4]]\nfinal_projection: true\nrank: 2\ndraft_vocab: 50\nrows: 4\nwindow: 8\n"
        "max_new_tokens: 12\neval_fraction: 0.2\n"
    )
    command = ["train", "m2r2", "--model", str(folder), "--prompts", str(prompts), "--output", str(output)]
    command += ["--preset", str(preset), "--dtype", "float32", "--set", "draft_steps=1"]
    result = CliRunner().invoke(app, [*command, "--steps", "3"])
    assert result.exit_code == 0, result.output
    made = data.read([output / "answers.jsonl"])
    assert len(made) == 24 and all(isinstance(a, TrainingAnswer) and len(a.response_ids) == 12 for a in made)
    decoder = SpecDecoder.from_pretrained(str(folder), drafter=str(output), dtype="float32")
    plain = SpecDecoder.from_pretrained(str(folder), drafter="none", dtype="float32")
    assert decoder.generate("hello", max_new_tokens=16).text == plain.generate("hello", max_new_tokens=16).text
    adapted, adapter = tmp_path / "adapted", str(tmp_path / "lora")
    save_lora(tmp_path / "lora", loading.load(folder)[0])
    result = CliRunner().invoke(app, [*command, "--steps", "2", "--output", str(adapted), "--adapter", adapter])
    assert result.exit_code == 0, result.output
    kept = (adapted / "config.json").read_text() + (adapted / "train.yaml").read_text()
    assert str(tmp_path) not in kept and ' with lora"' in kept
    with pytest.raises(SpecDecError, match="was trained for base weights"):
        SpecDecoder.from_pretrained(str(folder), drafter=str(adapted), dtype="float32")
    each = [SpecDecoder.from_pretrained(folder, d, dtype="float32", adapter=adapter) for d in ("none", str(adapted))]
    texts = [decoder.generate("hello", max_new_tokens=16).text for decoder in each]
    assert texts[0] == texts[1] != plain.generate("hello", max_new_tokens=16).text
    again = CliRunner().invoke(app, [*command, "--steps", "4", "--resume"])
    assert again.exit_code == 0, again.output
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 4


@pytest.mark.parametrize(
    ("method", "kind", "refused"),
    [
        ("m2r2", "qwen3_5_text", ""),
        ("m2r2", "lfm2", ""),
        ("m2r2", "granitemoehybrid", ""),  # a dense one, which is read as another family in all dtypes
        ("m2r2-paper", "qwen3_5_text", "layer 0 is recurrent, and training runs through layers with attention only"),
        ("m2r2", "falcon_h1", "all layers of this model are recurrent"),
    ],
)
def test_a_model_with_recurrent_layers_trains_on_its_attention_layers(
    tmp_path: Path, method: str, kind: str, refused: str
) -> None:
    """With the preset; what cannot be trained is refused before the model answers prompts."""
    folder, output, native = tmp_path / "model", tmp_path / "out", kind in ("granitemoehybrid", "qwen3_5_text")
    if kind == "granitemoehybrid":
        save_granite4(folder)
    else:
        save_native(folder, kind, torch.bfloat16 if native else torch.float32)
    (tmp_path / "prompts.txt").write_text("\n".join(f"What is {n} and {n}?" for n in range(9)))
    given = f"--model {folder} --prompts {tmp_path / 'prompts.txt'} --output {output} --steps 2"
    more = "--set max_new_tokens=8 --set eval_fraction=0.3 --set rows=2 --set window=8 --set minutes=null"
    done = CliRunner().invoke(app, ["train", method, *given.split(), *more.split()])
    if refused:
        assert done.exit_code == 2 and refused in " ".join(done.stderr.split())
        assert not (output / "answers.jsonl").exists()
        return
    assert done.exit_code == 0, done.output
    assert drafter_folder.read_config(output)["path"]["segments"] == [[3, 4]]
    plain, decoder = (SpecDecoder.from_pretrained(str(folder), drafter=name) for name in ("none", str(output)))
    out = decoder.generate("What is 3?", max_new_tokens=20, num_speculative_tokens=3, ignore_eos=True)
    assert decoder.target.runtime == (("native" if library.runs() else "torch") if native else "transformers")
    assert out.token_ids == plain.generate("What is 3?", max_new_tokens=20, ignore_eos=True).token_ids
    assert out.metrics.num_draft_tokens > 0


def test_a_prolonged_run_keeps_the_best_drafter_so_far(answers: Path, tmp_path: Path, monkeypatch) -> None:
    """Also that of its last evaluation, which stays in the metrics."""
    out, scores = tmp_path / "out", iter([1.0, 3.0, 2.0])
    evaluate = M2R2Method.evaluate
    monkeypatch.setattr(
        M2R2Method,
        "evaluate",
        lambda *given: evaluate(*given) | {"score": next(scores)},  # type: ignore[no-any-return]
    )
    train(recipe(answers, out, steps=2))
    best = (out / "model.safetensors").read_bytes()
    train(recipe(answers, out, steps=4), resume=True)
    assert (out / "model.safetensors").read_bytes() == best
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["evaluation"]["score"] for line in lines if "evaluation" in line] == [1.0, 3.0, 2.0]
