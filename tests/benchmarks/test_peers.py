"""Other engines in a benchmark: each in a process of its own, named with version and settings, refused in one line."""

import importlib.util
import json
import os
from pathlib import Path
from textwrap import dedent

import other_engines
import peers
import pytest
from measured import one_line_error, side_by_side
from peers import PEERS, Peer, Process
from typer.testing import CliRunner

from specdec import cli
from specdec.base.errors import SpecDecError
from specdec.bench import cell, methods
from specdec.models import loading

NEW = 6


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are methods until the test ends."""
    for name in PEERS:
        monkeypatch.setitem(cell.EXTERNAL_METHODS, name, cell.EXTERNAL_METHODS["hf"])
    other_engines.register()


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A process runs an engine that counts up from the prompt's last token, by twos after the first; installed as
    llama.cpp."""
    code = """
    import os

    class Scripted:
        def load(self, path, threads, context, mode, source, depth):
            self.size = int(os.environ.get("SIZE", 512))
            print("libraries print, too")
            return {"version": "scripted 1.0", "threads": threads, "context": context, "depth": depth}

        def generate(self, ids, count, put):
            if "BREAK" in os.environ:
                raise RuntimeError("out of\\n luck")
            if "DIE" in os.environ:
                os._exit(3)
            last, more = ids[-1], put([(ids[-1] + 1) % self.size])
            while more:
                last += 2
                more = put([last % self.size, (last + 1) % self.size])

        def passes(self, sizes):
            return {str(n): n / 1000 for n in sizes}
    """
    (tmp_path / "scripted.py").write_text(dedent(code))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    engine = "scripted:Scripted"
    monkeypatch.setitem(PEERS, "llama.cpp", Peer(engine, "json", "llama-cpp-python", ("config.json",)))
    other_engines.register()
    return engine


@pytest.fixture
def bench(folder: Path, tmp_path: Path):
    """Run ``specdec bench ARGS`` on the tiny model in this process."""
    (tmp_path / "prompts.txt").write_text("hello hello\none two one two\n")

    def call(*args: str):
        fixed = ["--model", str(folder), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", str(NEW)]
        return CliRunner().invoke(cli.app, ["bench", *fixed, *args])

    return call


@pytest.mark.usefixtures("scripted")
def test_another_engine_runs_beside_ours_and_is_named(bench, tmp_path: Path, monkeypatch) -> None:
    result = bench("--drafters", "llama.cpp,prompt-lookup@3", "--json", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    summary = side_by_side(result.stdout)
    plain, other, lookup = summary["methods"]
    assert [plain["name"], other["name"], lookup["name"]] == ["none", "llama.cpp", "prompt-lookup@3"]
    assert other["engine"]["version"] == "scripted 1.0" and other["engine"]["depth"] is None
    assert plain["engine"] is None and lookup["num_speculative_tokens"] == 3
    assert f"llama.cpp: scripted 1.0, threads {other['engine']['threads']}" in result.stdout
    # Passes first, of each engine that can be asked.
    assert summary["pass_ms"]["llama.cpp"] == {str(n): n for n in methods.PASSES}
    assert set(summary["pass_ms"]) == {"specdec", "llama.cpp"}
    assert set(summary["pass_ms"]["specdec"]) == {str(n) for n in methods.PASSES}
    assert "ms of a pass over" in result.stdout
    # Tokens are its own: other ones are no fault, and the count holds.
    assert other["tokens"] == 2 * NEW and other["equal_to_plain"]["faults"] is None
    assert other["equal_to_plain"]["of"] == 2 and other["peak_memory_mb"] > 1
    assert set(lookup["speedup"]) == {"none", "llama.cpp"}
    for method in summary["methods"]:
        for what in ("token", "first_token", "step"):
            assert 0 < method["latency_ms"][what]["p50"] <= method["latency_ms"][what]["p99"]
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    (row, _) = (row for row in rows if row["method"] == "llama.cpp")
    assert row["first_tokens"] == 1 and len(row["arrivals"]) == 1 + 3  # the third pair is cut at the limit
    monkeypatch.delitem(cell.EXTERNAL_METHODS, "llama.cpp")  # a report needs no engine
    report = CliRunner().invoke(cli.app, ["report", str(tmp_path / "out"), "--format", "markdown"])
    assert "x llama.cpp" in report.stdout, report.output + repr(report.exception)


def test_an_answer_ends_after_the_end_of_sequence(scripted: str) -> None:
    process = Process(scripted)
    process.ask("load", path="", threads=1, context=8, mode="", source="", depth=None)
    made = process.ask("generate", ids=[7], count=20, eos=[11])
    assert made["tokens"] == [8, 9, 10, 11] and made["first"] == 1 and len(made["arrivals"]) == 3
    assert made["arrivals"] == sorted(made["arrivals"]) and made["arrivals"][-1] <= made["seconds"]
    child = process.child
    del process
    assert child.poll() is not None  # it does not outlive the benchmark


@pytest.mark.parametrize(("variable", "words"), [("BREAK", "Scripted: RuntimeError: out of luck"), ("DIE", "code 3")])
def test_an_engine_that_fails_is_one_line(bench, scripted: str, monkeypatch, variable: str, words: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert words in bench("--drafters", "none,llama.cpp").stderr.splitlines()[-1]


@pytest.mark.usefixtures("scripted")
def test_a_prompt_beyond_the_context_of_an_engine_fails_its_cell_only(bench) -> None:
    result = bench("--drafters", "llama.cpp", "--drafter-option", "llama.cpp.context=12")
    assert result.exit_code == 1 and "llama.cpp.context=" in result.stdout and "] none: " in result.stderr


def test_an_engine_that_is_not_installed_is_refused_first(bench, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    other_engines.register()
    monkeypatch.setattr(loading, "load", None)
    line = one_line_error(bench("--drafters", "none,llama.cpp"))
    assert "'llama.cpp' is not installed" in line and "pip install llama-cpp-python" in line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--drafters", "llama.cpp", "--drafter-option", "llama.cpp.lookup=2"], "lookup"),
        (["--drafters", "llama.cpp-draft-model"], "llama.cpp-draft-model=FILE"),
    ],
)
@pytest.mark.usefixtures("scripted")
def test_bad_input_is_one_line(bench, args: list[str], words: str) -> None:
    assert words in one_line_error(bench(*args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--temperature", "1"], "is measured greedily"),
        (["--batch-size", "2"], "one prompt at a time"),
        (["--drafter-option", "llama.cpp.context=0"], "context must be"),
    ],
)
@pytest.mark.usefixtures("scripted")
def test_what_an_engine_cannot_do_fails_its_cell(bench, args: list[str], words: str) -> None:
    result = bench("--drafters", "llama.cpp", *args)
    assert result.exit_code and words in result.stderr


def test_a_model_that_an_engine_does_not_read_is_refused(folder: Path) -> None:
    with pytest.raises(SpecDecError, match=r"'llama.cpp' reads a GGUF file, and the model is none"):
        peers.readable("llama.cpp", folder)
    assert other_engines.model_file("ORG/NAME") is None and other_engines.model_file(str(folder)) == folder


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.mode != "draft-model"])
def test_real_engines_answer_where_they_are_installed(bench, name: str) -> None:
    if importlib.util.find_spec(PEERS[name].module) is None:
        pytest.skip(f"{PEERS[name].package} is not installed")
    result = bench("--model", "smollm2-135m-instruct", "--drafters", f"none,{name}", "--json")
    assert result.exit_code == 0, result.output
    other = side_by_side(result.stdout)["methods"][1]
    assert other["engine"]["version"].startswith(PEERS[name].package) and other["tokens"] > 2
