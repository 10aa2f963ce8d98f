"""``specdec learn``: ahead of time, what was learned, and what becomes of it."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from learners import learn_soon
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.api import priming
from specdec.drafters.m2r2 import learned
from specdec.models import drafter_folder


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is imported is not searched for decoders that nobody holds any more."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def quickly(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Little is learned from, and little is measured."""
    learn_soon(monkeypatch, folder)
    monkeypatch.setattr(priming, "HOLDOUT_QUESTIONS", 1)
    monkeypatch.setattr(priming, "HOLDOUT_TOKENS", 8)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quickly(monkeypatch, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", context=512)


def run(*args: str, code: int = 0) -> tuple[str, str]:
    gc.collect()  # decoders of earlier commands, which would be other processes
    result = CliRunner().invoke(cli.app, ["learn", *args])
    assert result.exit_code == code, result.output
    return result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a model, ``tiny``, and what was learned for it; and what the command said."""
    place = tmp_path_factory.mktemp("lesson")
    (place / "prompts.txt").write_text("one two three\nfour five six\n")
    model = str(save_tiny(place / "tiny", context=512))
    with pytest.MonkeyPatch.context() as patched:
        quickly(patched, place)
        assert "nothing was learned yet" in run("status")[1]
        how = "--minutes", "0.03", "--prompts", str(place / "prompts.txt"), "--runtime", "transformers"
        return place, run(model, *how)[1]


@pytest.fixture
def taught(lesson: tuple[Path, str], tmp_path: Path) -> Path:
    """The model, for which a drafter was taught."""
    shutil.copytree(lesson[0] / "cache", tmp_path / "cache")
    return lesson[0] / "tiny"


def test_a_drafter_is_taught_ahead_of_time_shown_exported_and_forgotten(lesson, taught, tmp_path) -> None:
    folder, said = taught, lesson[1]
    assert "tokens; mean acceptance length on held-out questions: " in said and "learned from 0 tokens" not in said
    [kept] = json.loads(run("status", "--json")[0])
    assert kept["tokens"] >= 60 and kept["fits"] >= 1 and kept["agreement"] and Path(kept["model"]) == folder
    row = run("status")[0].splitlines()[1].split("\t")
    assert row[0] == str(folder) and row[1] == f"{kept['tokens']:,}" and row[3].endswith(" %")
    run("export", str(tmp_path / "out"), "--model", str(folder))
    decoder = SpecDecoder.from_pretrained(folder, str(tmp_path / "out"), runtime="transformers")
    assert decoder.drafter.learner is None
    again = decoder.with_drafter("m2r2")
    prompt, how = [5, 6, 7], {"max_new_tokens": 40, "num_speculative_tokens": 4}
    exported, own = (each.generate(prompt, **how).metrics for each in (decoder, again))  # type: ignore[arg-type]
    # How long it learned depends on the machine, and files are rounded: drafts may differ in near ties.
    assert abs(exported.mean_acceptance_length - own.mean_acceptance_length) < 1 and sum(own.per_step_drafted) > 0
    assert "nothing was learned for 'another'" in run("reset", "another", code=2)[1]
    assert "forgot what was learned for 1 model" in run("reset", str(folder))[1]
    assert not learned.all_progress()


@pytest.mark.slow
def test_a_fine_tune_begins_with_what_its_base_model_learned(taught: Path, tmp_path: Path) -> None:
    folder, tuned, other = taught, tmp_path / "tuned", save_tiny(tmp_path / "other", context=512, num_hidden_layers=9)
    shutil.copytree(folder, tuned)
    weights = load_file(tuned / "model.safetensors")
    weights["model.norm.weight"] *= 1.25
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    how = ["--minutes", "0.03", "--runtime", "transformers"]
    assert f"nothing was learned for '{other}'" in run(str(tuned), "--base", str(other), *how, code=2)[1]
    assert f"'{folder}' has another shape than '{other}'" in run(str(other), "--base", str(folder), *how, code=2)[1]
    [before] = json.loads(run("status", "--json")[0])
    run(str(tuned), "--base", str(folder), "--minutes", "0.01", "--runtime", "transformers")
    kept = {Path(each["model"]): each for each in json.loads(run("status", "--json")[0])}
    assert kept[tuned]["tokens"] >= min(before["tokens"], learned.PRIOR) and kept[tuned]["fits"] >= before["fits"]
    assert f"'{tuned}' has learned already" in run(str(tuned), "--base", str(folder), *how, code=2)[1]


@pytest.mark.usefixtures("taught")
def test_the_sums_of_a_base_model_count_as_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "PRIOR", 40)
    [(path, before)] = learned.all_progress()
    store = learned.Store("another model", "path")
    learned.begin_from(store, path, "tuned")
    assert before is not None and before.tokens > 40 and before.fits
    whole, part = load_file(path), load_file(store.path)
    assert torch.allclose(part["sums.1.0"], whole["sums.1.0"] * 40 / before.tokens)
    assert torch.equal(part["fit.1"], whole["fit.1"]) and torch.equal(part["counts"], whole["counts"])
    found = learned.read_progress(store.path)
    assert found is not None and (found.tokens, found.fitted, found.based, found.fits) == (40, 40, 40, before.fits)


def test_a_trained_drafter_does_not_learn_and_how_to_train_it_is_said(taught: Path, tmp_path, monkeypatch) -> None:
    folder, out = taught, tmp_path / "out"
    run("export", str(out), "--model", str(folder))
    base = drafter_folder.read_config(out)["base"]
    monkeypatch.setattr(drafter_folder, "_shipped", lambda drafter: iter([(out, base)]))
    said = run(str(folder), "--runtime", "transformers", code=2)[1]
    assert f"specdec train m2r2 --model {folder} --prompts FILE --output DIR --set init={out}" in said


def test_a_file_that_cannot_be_read_is_named_and_can_be_removed() -> None:
    learned.folder().mkdir(parents=True)
    (learned.folder() / "abc.safetensors").write_bytes(b"nothing")
    assert "cannot be used; 'specdec learn reset' removes it" in run("status")[0]
    run("reset")
    assert not list(learned.folder().glob("*.safetensors"))


def kept(name: str, **more: str) -> None:
    """What was learned for a model of that name."""
    store = learned.Store(f"{name} {more}", "path")
    assert store.claim()
    store.save(learned.Progress(name, **more), {"counts": torch.zeros(2)})
    store.release()


def test_models_are_told_apart_by_their_whole_path_and_adapter() -> None:
    kept("/a/final")
    kept("/b/final")
    kept("/b/final", adapter="/adapters/mine")
    names = {line.split("\t")[0] for line in run("status")[0].splitlines()[1:]}
    assert names == {"/a/final", "/b/final", "/b/final with mine"}
    assert "nothing was learned for 'final'" in run("reset", "final", code=2)[1]
    assert "1 model" in run("reset", "/a/final")[1]
    assert [each["model"] for each in json.loads(run("status", "--json")[0])] == ["/b/final"] * 2


def test_learning_beside_another_process_is_refused_in_one_sentence(folder: Path) -> None:
    first = SpecDecoder.from_pretrained(folder, "m2r2", runtime="transformers")
    first.drafter.learner.claim()
    said = run(str(folder), "--minutes", "0.01", "--runtime", "transformers", code=2)[1]
    assert f"another process learns for '{folder}', and only one keeps what it learns; end it" in said
    assert "learned from" not in said


def test_nothing_to_export(folder: Path, tmp_path: Path) -> None:
    assert f"nothing that drafts was learned for '{folder}' yet" in run(
        "export", str(tmp_path / "out"), "--model", str(folder), code=2
    )[1].replace("\n", " ")


def test_generate_learns_after_the_text_where_told_to(folder: Path) -> None:
    runner = CliRunner()
    ask = ["generate", "one two", "--model", str(folder), "--runtime", "transformers"]
    ask += ["--max-new-tokens", "30", "--json"]
    assert runner.invoke(cli.app, ask).exit_code == 0
    assert not learned.all_progress()
    for number in range(3):
        gc.collect()
        assert runner.invoke(cli.app, [*ask, "--seed", str(number), "--learn"]).exit_code == 0
    [(_, progress)] = learned.all_progress()
    assert progress is not None and progress.texts >= 2 and progress.tokens > 0
