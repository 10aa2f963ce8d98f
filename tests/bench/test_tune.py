"""``specdec tune drafter``: what is fastest is told, kept for this model on this machine, and used by generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora import save_lora
from measured import result
from typer.testing import CliRunner

from specdec import cli
from specdec.api.tuned import Tuned, load_tuned, save_tuned, tuned_path
from specdec.base.errors import SpecDecError
from specdec.bench import tune as search
from specdec.bench.run import failure_record
from specdec.models import loading

PROMPTS = [{"turns": ["one two three one two", "and again"]}, {"turns": ["two one two one two one"]}]


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch):
    """Run ``specdec ARGS`` on the tiny model in this process, with a cache folder of its own."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))

    def call(*args: str):
        args = tuple(str(file) if arg == "PROMPTS" else arg for arg in args)
        return CliRunner().invoke(cli.app, [*args, "--model", str(folder)])

    return call


@pytest.fixture
def speeds(monkeypatch) -> dict[str, float]:
    """The speedups at automatic depth, by drafter, in place of measurements; 3 tokens a step are faster by 0.2."""
    found: dict[str, float] = {}

    def measure(cells, decoders, progress):
        for cell in cells:
            try:
                decoders.check(cell)
                gain = found[cell.drafter] + 0.2 * (cell.num_speculative_tokens == 3)
                yield result(cell, gain)
            except SpecDecError as error:
                yield failure_record(cell, error, 0.0)

    monkeypatch.setattr(search, "measure", measure)
    return found


def test_the_fastest_is_kept_and_generate_uses_it(run, speeds) -> None:
    speeds |= {"lookahead": 1.3, "prompt-lookup": 1.1}
    arguments = ("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "prompt-lookup,medusa,lookahead")
    outcome = run(*arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "left out: medusa: no medusa drafter is shipped" in " ".join(outcome.stderr.split())
    lines = [line.split("\t") for line in outcome.stdout.splitlines()]
    assert lines[1][0] == "lookahead depth=3" and lines[-1][0] == "prompt-lookup" and len(lines) == 1 + 5 + 1
    used = json.loads(run("generate", "one two", "--max-new-tokens", "4", "--json").stdout)
    assert used["drafter"] == "lookahead" and used["settings"]["num_speculative_tokens"] == 3
    named = json.loads(run("generate", "one two", "--max-new-tokens", "4", "--json", "--drafter", "none").stdout)
    assert named["drafter"] == "none" and named["settings"]["num_speculative_tokens"] == "auto"


def test_a_model_with_an_adapter_has_settings_of_its_own_else_those_of_the_model(run, folder, speeds, tmp_path) -> None:
    speeds |= {"lookahead": 1.3, "prompt-lookup": 1.5}
    save_lora(tmp_path / "lora", loading.load(folder)[0])
    adapted = ("generate", "one two", "--max-new-tokens", "4", "--json", "--adapter", str(tmp_path / "lora"))
    assert run("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "lookahead").exit_code == 0
    given = json.loads(run(*adapted).stdout)
    assert given["drafter"] == "lookahead" and given["adapter"] == "lora"
    assert "adapter: lora" in run(*(word for word in adapted if word != "--json")).stderr
    tune = ("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "prompt-lookup", *adapted[-2:])
    outcome = run(*tune)
    assert outcome.exit_code == 0, outcome.output
    assert json.loads(run(*adapted).stdout)["drafter"] == "prompt-lookup"
    assert json.loads(run(*adapted[:-2]).stdout)["drafter"] == "lookahead"


def test_without_a_faster_drafter_plain_decoding_is_kept(run, folder: Path, speeds) -> None:
    speeds["lookahead"] = 0.98
    assert run("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "lookahead").exit_code == 0
    kept = load_tuned(tuned_path(str(folder), "auto", "cpu", "auto", "auto"))
    assert kept is not None and kept.drafter == "none"


def test_an_output_that_differs_keeps_nothing(run, folder: Path, monkeypatch) -> None:
    faults = {"equal": 1, "near_ties": 0, "faults": 2, "of": 3}
    monkeypatch.setattr(search, "measure", lambda cells, *more: [result(cells[0], 0.9, equal_to_plain=faults)])
    outcome = run("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "lookahead")
    assert outcome.exit_code != 0 and load_tuned(tuned_path(str(folder), "auto", "cpu", "auto", "auto")) is None


def test_tuning_measures_real_decoding(run) -> None:
    result = run(
        *("tune", "drafter", "--prompts", "PROMPTS", "--drafters", "prompt-lookup,lookahead", "--max-new-tokens", "6")
    )
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    assert {row[0].split()[0] for row in rows} == {"prompt-lookup", "lookahead"}


def test_settings_are_kept_per_model_and_planted_files_are_data(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    path, tuned = tuned_path("a", "auto", "cpu", "auto", "auto"), Tuned("m2r2", 4, 1.5, "8 of own")
    assert load_tuned(path) is None
    save_tuned(path, tuned)
    assert load_tuned(path) == tuned and load_tuned(tuned_path("a", "auto", "cpu", "auto", "int4")) is None
    for text in ("", "[]", '{"drafter": "m2r2"}', json.dumps({**vars(tuned), "num_speculative_tokens": -3})):
        path.write_text(text)
        assert load_tuned(path) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(SpecDecError, match="cannot write the setting"):
        save_tuned(tuned_path("a", "auto", "cpu", "auto", "auto"), tuned)
