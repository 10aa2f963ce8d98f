"""The command line, as a shell sees it: streams, exit codes, one line for bad input, Ctrl-C."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pages import ROOT
from tiny import save_tiny
from typer.testing import CliRunner

import specdec.serve.run
from specdec import cli
from specdec.base import inputs, terminal
from specdec.base.errors import SpecDecError
from specdec.cli import generate, shared, train
from specdec.cli.statistics import speedup
from specdec.engine.metrics import RequestMetrics
from specdec.models import catalogue
from specdec.speculation import registry
from specdec.speculation.draft import Draft
from specdec.train.output import WRITTEN

COMMAND = [sys.executable, "-c", "from specdec.cli import main; main()"]
FIGURES = ("tokens/s: ", "mean acceptance length: ", "acceptance rate: ", "steps: ", "prefill: ", "finish: length")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``specdec generate ARGS`` on the tiny model, in this process, with an empty cache folder."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))

    def call(*args: str, stdin: str | bytes | None = None):
        return CliRunner().invoke(cli.app, ["generate", *fixed(model), *args], input=stdin)

    return call


@pytest.fixture(scope="module")
def said(model: str) -> str:
    """The answer to "hello"."""
    return CliRunner().invoke(cli.app, ["generate", *fixed(model), "hello", "--quiet"]).stdout.removesuffix("\n")


def fixed(model: str) -> list[str]:
    return ["--model", model, "--drafter", "prompt-lookup", "--max-new-tokens", "24", "--num-speculative-tokens", "4"]


def one_line_error(result, code: int = 2) -> str:
    assert result.exit_code == code and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_stdout_has_only_the_text_and_stderr_the_figures(run, said: str) -> None:
    result = run("hello")
    assert result.exit_code == 0 and result.stdout == said + "\n" and len(said) == 24
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in FIGURES) and "float32 cpu" in line and "; drafter: prompt-lookup; " in line


def test_quiet_leaves_only_the_text(run, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result, written = run("hello", "--quiet"), list[str]()
    assert result.stderr == "" and result.stdout == said + "\n"
    monkeypatch.setattr(terminal, "write", written.append)  # which escapes control characters on a terminal
    assert run("hello", "--quiet").stdout == "" and "".join(written) == result.stdout


def test_verbose_adds_the_phases(run) -> None:
    assert re.search(r"draft time: [\d.]+ s; score time: [\d.]+ s", run("hello", "--verbose").stderr)


def test_json_is_one_object_with_everything_and_nothing_on_stderr(run, model: str) -> None:
    result = run("hello", "--json", "--seed", "3", "--stop", "\x00", "--system", "be brief")
    out = json.loads(result.stdout)
    assert result.stderr == "" and result.stdout.count("\n") == 1
    assert out["model"] == model and out["drafter"] == "prompt-lookup" and out["lossless"] is True
    assert (out["dtype"], out["device"], out["finish_reason"]) == ("float32", "cpu", "length")
    assert out["runtime"] in ("torch", "transformers") and "compare" not in out
    assert len(out["token_ids"]) == out["metrics"]["num_new_tokens"] == 24
    expected = {"max_new_tokens": 24, "num_speculative_tokens": 4, "temperature": 0.0, "seed": 3, "stop": ["\x00"]}
    assert out["settings"].items() >= (expected | {"system": "be brief", "chat": True}).items()
    assert out["metrics"]["mean_acceptance_length"] >= 1 and out["metrics"]["phases"]["score"] > 0


def test_the_prompt_may_come_from_stdin(run, said: str) -> None:
    for args, stdin in ((["-"], "hello\n"), ([], "hello"), (["-"], "\ufeffhello".encode())):
        assert run(*args, "--quiet", stdin=stdin).stdout == said + "\n"


def test_raw_and_system_change_what_the_model_reads(run) -> None:
    ways = (), ("--raw",), ("--system", "be brief")
    runs = [json.loads(run("hello", "--json", *more).stdout) for more in ways]
    counts = [each["metrics"]["num_prompt_tokens"] for each in runs]
    assert counts == [len("[user] hello\n[assistant] "), 5, len("[system] be brief\n[user] hello\n[assistant] ")]


def test_stop_ends_the_text_before_it(run, said: str) -> None:
    stops = said[9:11], said[14:17]
    out = json.loads(run("hello", "--json", "--stop", stops[1], "--stop", stops[0]).stdout)
    assert out["text"] == said[: min(said.index(stop) for stop in stops)] and out["finish_reason"] == "stop"


def test_drafters_are_joined_loaded_from_somewhere_and_take_options(run, model: str, said: str) -> None:
    joined, options = f"ngram+draft-model={model}", "ngram={nodes: 9}"
    out = json.loads(run("hello", "--json", "--drafter", joined, "--drafter-option", options).stdout)
    assert (out["drafter"], out["drafter_source"]) == ("ngram+draft-model", joined)
    assert out["drafter_options"] == {"ngram": {"nodes": 9}} and out["text"] == said
    assert out["metrics"]["mean_acceptance_length"] > 3  # the draft model is the model itself
    assert f"; drafter: ngram+draft-model (from {joined}); " in run("hello", "--drafter", joined).stderr


def test_the_number_of_drafted_tokens_is_chosen_or_fixed(run, said: str) -> None:
    fixed = json.loads(run("hello", "--json", "--num-speculative-tokens", "2").stdout)
    assert max(fixed["metrics"]["per_step_drafted"]) == 2 and fixed["settings"]["num_speculative_tokens"] == 2
    chosen = json.loads(run("hello", "--json", "--num-speculative-tokens", "auto").stdout)
    assert chosen["settings"]["num_speculative_tokens"] == "auto" and chosen["text"] == fixed["text"] == said


def test_a_drafter_that_is_never_right_is_remarked_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = json.loads(run("hello", "--json").stdout)["token_ids"]
    wrong = next(token for token in range(90) if token not in right)

    def never(self, state, limit):
        return Draft(torch.full((len(state.ids), 2), wrong), (0, 1))

    monkeypatch.setattr(registry.lookup("drafters", "prompt-lookup"), "propose", never)
    result, out = run("hello"), json.loads(run("hello", "--json").stdout)
    note = r"none of the \d+ tokens that prompt-lookup drafted was accepted: .*; 'specdec drafters' lists others, or "
    assert re.search(note + r"decode plainly \(--drafter none\)", result.stderr) and re.match(note, out["note"])
    assert json.loads(run("hello", "--json", "--drafter", "none").stdout)["note"] is None


def test_sampling_options_and_seed_reach_the_sampler(run, said: str) -> None:
    texts = [run("hello", "--temperature", "1.5", "--seed", seed).stdout for seed in ("1", "1", str(2**63 - 1))]
    assert texts[0] == texts[1] != texts[2]
    assert run("hello", "--temperature", "1.5", "--top-k", "1").stdout == said + "\n"


def test_compare_says_identical_and_the_speedup(run) -> None:
    line = run("hello", "--compare", "--num-speculative-tokens", "4").stderr.splitlines()[1]
    number = r"\d+\.\d\d"
    assert re.search(
        f"speedup over plain decoding: {number}x \\[{number}–{number}\\], median and range of 3; plain", line
    )
    assert line.endswith("output identical to plain decoding: yes")
    out = json.loads(run("hello", "--compare", "--json", "--num-speculative-tokens", "4").stdout)
    both = out["compare"]
    assert both["identical"] is True and both["fault"] is False and both["plain"]["token_ids"] == out["token_ids"]
    assert both["plain"]["metrics"]["num_draft_tokens"] == 0 < out["metrics"]["num_draft_tokens"]
    assert out["metrics"]["num_draft_tokens"] >= 16  # every turn drafts alike: none knows the text of another one
    low, high = both["speedup_range"]
    assert low <= both["speedup"] <= high and both["speedup_note"] is None


def decoded(seconds: float, drafted: int = 20) -> RequestMetrics:
    return RequestMetrics(num_new_tokens=11, num_draft_tokens=drafted, phases={"score": seconds})


def test_a_comparison_is_the_median_of_turns_with_its_range() -> None:
    ours, plain = map(decoded, (1.0, 2.0, 1.0)), map(decoded, (2.0, 2.0, 3.0))
    found = speedup(list(ours), list(plain), drafts=True)
    assert found == {"speedup": 2.0, "speedup_range": [1.0, 3.0], "speedup_note": None}


def test_a_comparison_without_drafts_claims_no_speedup(run) -> None:
    for drafted, drafts, why in ((15, True, "only 15 tokens were drafted"), (0, False, "has no drafter")):
        found = speedup([decoded(1.0, drafted)], [decoded(2.0, 0)], drafts=drafts)
        assert found["speedup"] is found["speedup_range"] is None and why in found["speedup_note"]
    said = run("hello", "--compare", "--drafter", "none").stderr
    assert "has no drafter" in said and "note:" not in said and "identical to plain decoding: yes" in said


def test_no_note_contradicts_the_measured_speedup(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestMetrics, "draft_note", "few drafts are accepted")
    faster, slower = ({"speedup": value, "speedup_range": [value] * 2, "speedup_note": None} for value in (1.5, 0.9))
    noted = {}
    for found in (faster, slower):
        monkeypatch.setattr("specdec.cli.statistics.speedup", lambda *_, found=found, **__: found)
        noted[found["speedup"]] = "drafting gained nothing" in run("hello", "--compare").stderr
    assert noted == {1.5: False, 0.9: True}


def test_compare_reports_a_wrong_output_as_a_fault(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(self, draft, chosen, p):
        return specdec.Acceptance([list(range(len(chosen[0])))], [chosen[0][-1]])

    monkeypatch.setattr(registry.lookup("verifiers", "exact"), "verify", accept_all)
    result = run("hello hello hello", "--compare")
    assert result.exit_code == 1
    assert re.search(r"identical to plain decoding: no \(first difference at token \d+: FAULT", result.stderr)


def test_without_a_shipped_drafter_ngram_drafts_and_m2r2_teaches_itself(run) -> None:
    result = run("hello", "--drafter", "auto", "--json")
    found = json.loads(result.stdout)
    assert result.stderr == "" and (found["drafter"], found["device"]) == ("ngram+m2r2", "cpu")


BAD = {
    "drafter option": (
        ["x", "--drafter-option", "continuations=0"],
        "continuations must be greater than or equal to 1; got 0",
    ),
    "drafter option without value": (["x", "--drafter-option", "depth"], "takes KEY=VALUE"),
    "drafter option that is no YAML": (["x", "--drafter-option", "a=["], "takes KEY=VALUE"),
    "no corpus": (["x", "--ngram-corpus", "none.txt"], "--ngram-corpus: 'none.txt' does not exist"),
    "no n-grams": (["x", "--drafter", "m2r2", "--keep-ngrams"], "need n-grams, such as --drafter ngram+m2r2"),
    "no draft model": (["x", "--drafter", "draft-model"], "name it: draft-model=NAME"),
    "no drafter shipped": (["x", "--drafter", "medusa"], "specdec train medusa"),
    "empty prompt": (["  "], "the prompt is empty"),
    "prompt in another encoding": ([os.fsdecode(b"\xff")], "the prompt is not UTF-8 text"),
    "max new tokens": (["x", "--max-new-tokens", "0"], "'--max-new-tokens'"),
    "device": (["x", "--device", "toaster"], "unknown device 'toaster'"),
    "prompt beyond the context": (["x" * 5000], "context of 4096"),
    "system without template": (["x", "--raw", "--system", "y"], "needs a chat template"),
    "mistyped option": (["x", "--temprature", "1"], "--temperature); see 'specdec generate --help'"),
    "several prompts": (["x", "y", "z"], "there are several prompts; give one, in quotes"),
    "two models": (["x", "y", "--model", "z"], "the model is named twice, as 'x' and with --model 'z'; leave one out"),
}


@pytest.mark.parametrize(("args", "expected"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_exit_code_2(run, args: list[str], expected: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in one_line_error(run(*args))


def test_a_model_alone_takes_its_prompt_from_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    file.write_bytes(b"GGUF")
    for model in (str(file), "smollm2-135m-instruct"):
        result = CliRunner().invoke(cli.app, ["generate", model], input="")
        assert "the prompt is empty" in one_line_error(result)


def test_stdin_that_is_no_text_is_refused(run) -> None:
    assert "not UTF-8" in one_line_error(run("-", stdin=b"\xff\xfe"))


def test_a_closed_stdin_has_no_prompt(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "sys", SimpleNamespace(stdin=None))
    assert "error: no prompt; give one" in run("-").stderr


def test_no_more_of_stdin_is_read_than_a_prompt_may_have(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LINE", 1_000_000)
    line = one_line_error(run("-", stdin=b"y" * 1_000_001))
    assert "the prompt on stdin is larger than 1 MB; shorten it" in line


def test_unknown_command_suggests_one() -> None:
    assert "Did you mean 'generate'" in one_line_error(CliRunner().invoke(cli.app, ["genrate"]))


def test_no_prompt_at_a_terminal_shows_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(SpecDecError, match='no prompt; give one, for example: specdec generate "'):
        generate._read(None)


def test_a_full_disk_and_a_full_memory_are_told_plainly(run, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/some/file")
    monkeypatch.setattr(generate, "_decode", Mock(side_effect=full))
    assert "no space left on the disk while writing '/some/file'" in one_line_error(run("x"))
    monkeypatch.setattr(generate, "_decode", Mock(side_effect=RuntimeError("x: can't allocate memory: you tried")))
    assert "out of memory" in one_line_error(run("x"))


def test_a_fault_of_ours_is_one_line_and_a_traceback_only_on_demand(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_decode", Mock(side_effect=TypeError("two\nlines")))
    line = one_line_error(run("x"), code=1)
    assert line == "error: unexpected TypeError: two lines; run with SPECDEC_DEBUG=1 for the traceback"
    assert "Traceback" in run("x", "--verbose").stderr
    monkeypatch.setenv("SPECDEC_DEBUG", "1")
    result = run("x")
    assert result.exit_code == 1 and "Traceback" in result.stderr


def test_ctrl_c_keeps_the_text_so_far_and_marks_the_figures(run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[str]()

    def write(text: str) -> None:  # text streams while the command runs
        written.append(text)
        if len(written) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "write", write)
    result, text = run("hello", "--max-new-tokens", "400"), "".join(written)
    assert result.exit_code == 130 and text.endswith("\n") and 2 <= len(text) < 400
    assert "finish: interrupted" in result.stderr and f"tokens: {len(text) - 1};" in result.stderr


INTERRUPTED_IMPORT = """
import signal, sys
from importlib.metadata import entry_points

class Interrupt:
    @staticmethod
    def find_spec(name, *more):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
sys.argv[1:] = ["generate", "hello"]
[command] = entry_points(group="console_scripts", name="specdec")
command.load()()
"""


@pytest.mark.parametrize("name", ["typer", "torch"])
def test_ctrl_c_while_modules_are_imported_prints_nothing(name: str) -> None:
    code = INTERRUPTED_IMPORT.format(name=name)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("saved", [[], ["answers.jsonl", "states"], ["answers.jsonl", "checkpoint.pt"]])
def test_ctrl_c_in_train_says_what_is_saved_and_how_to_go_on(saved: list[str], tmp_path, monkeypatch) -> None:
    def interrupted(name: str) -> None:
        for each in saved:
            (output / each).touch()
        raise KeyboardInterrupt

    output = tmp_path / "it"
    output.mkdir()
    monkeypatch.setattr(train, "check_model", interrupted)  # the first thing that it does
    command = ["train", "medusa", "--model", "it", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["specdec", *command])
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 130 and set(saved) <= train.SAVED.keys() <= {*WRITTEN}
    line = " ".join(done.stderr.split())
    keeps = ", ".join(train.SAVED[name] for name in saved)
    again = f"specdec train medusa --model it --output {output}"
    before = f"interrupted before anything was saved; start again with: {again}"
    assert line == (f"interrupted; '{output}' keeps {keeps}; continue with: {again} --resume" if saved else before)


@pytest.mark.parametrize("key", ["prompts", "holdout", "evaluation"])
@pytest.mark.parametrize("value", ["5", "{a: b}", "[1, 2]"])
@pytest.mark.parametrize("where", ["--set", "preset"])
def test_a_number_as_the_prompts_to_train_on_is_one_line(key: str, value: str, where: str, tmp_path: Path) -> None:
    (preset := tmp_path / "mine.yaml").write_text(f"{key}: {value}\n")
    (prompts := tmp_path / "prompts.txt").write_text("one\n")
    given = ["--set", f"{key}={value}"] if where == "--set" else ["--preset", str(preset)]
    given += [] if key == "prompts" else ["--prompts", str(prompts)]
    result = CliRunner().invoke(cli.app, ["train", "medusa", "--output", str(tmp_path / "out"), *given])
    assert f"error: '{key}' must be the name of a file or of a prompt set" in one_line_error(result)


class Latin1(io.TextIOWrapper):
    """Standard output that is no UTF-8, as ``terminal.guard_streams`` leaves it."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="latin-1", errors="backslashreplace")


def test_json_is_json_in_every_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out := Latin1())
    shared.print_json({"text": "é, 字, 😀, \udce9"})
    out.flush()
    assert json.loads(out.buffer.getvalue()) == {"text": "é, 字, 😀, \udce9"}  # type: ignore[attr-defined]


def test_json_files_may_name_a_path_that_is_no_text(tmp_path: Path) -> None:
    shared.write_json(tmp_path / "it.json", {"path": "caf\udce9, é"})
    assert json.loads((tmp_path / "it.json").read_text("utf-8")) == {"path": "caf\udce9, é"}


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("failing", "code", "error"),
    [
        ("stderr", 0, ""),
        ("stderr closed", 0, ""),
        ("stdout", 2, f"error: cannot write to stdout: {FULL}"),
        ("stdout closed", 2, "error: stdout is closed, so the output is lost; leave it open, or redirect it to a file"),
        ("stdout without a reader", 1, ""),
    ],
)
def test_statistics_that_cannot_be_written_cost_nothing_and_an_answer_is_an_error(
    model: str, said: str, monkeypatch: pytest.MonkeyPatch, failing: str, code: int, error: str
) -> None:
    streams: dict[str, Any] = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    name, _, how = failing.partition(" ")
    with open("/dev/full", "w") as full:
        streams[name] = None if how == "closed" else full
        if how == "without a reader":
            read, write = os.pipe()
            os.close(read)
            streams[name] = os.fdopen(write, "w")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["specdec", "generate", *fixed(model), "hello"])
            for stream, value in streams.items():
                patched.setattr(sys, stream, value)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        with suppress(OSError):
            full.close()
    assert ended.value.code == code
    if name == "stderr":
        assert streams["stdout"].getvalue() == said + "\n"
    else:
        assert streams["stderr"].getvalue().splitlines()[-1:] == ([error] if error else [])


def test_output_that_is_written_at_the_end_of_a_process_is_an_error_too() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert (done.returncode, done.stderr) == (2, f"error: cannot write to stdout: {FULL}\n".encode())


def test_help_imports_nothing_heavy_and_every_command_shows_an_example() -> None:
    names = ["generate", "models", "drafters", "train", "bench", "verify", "sweep", "report"]
    commands = [[], *([name] for name in names), ["train", "m2r2"]]
    script = """
import json, sys
from specdec.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["specdec", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        print("exit", end.code or 0)
print([module for module in ("torch", "transformers", "numpy") if module in sys.modules])
"""
    command = [sys.executable, "-c", script, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    *pages, heavy = done.stdout.split("exit 0\n")
    assert len(pages) == len(commands) and heavy == "[]\n", done.stdout + done.stderr
    assert all("Example: specdec " in page for page in pages)


HEAVY_LATER = """
import sys
for name in ("torch", "numpy", "transformers"):
    sys.modules[name] = None  # an import raises
from specdec.cli import app
for line in sys.stdin.read().splitlines():
    try:
        app(line.split())
    except SystemExit as end:
        print(end.code)
"""
MISTAKES = {
    "generate Hi --model ./none.gguf": "there is no file or folder './none.gguf'",
    "generate Hi --model smollm2-135m-instrukt": "unknown model 'smollm2-135m-instrukt' (did you mean",
    "generate Hi --revision main": "a revision ('main') needs a Hugging Face id",
    "generate Hi --drafter m2r3": "unknown drafter 'm2r3' (did you mean 'm2r2'?)",
    "generate Hi --drafter ngram+": "no drafter is named in 'ngram+'",
    "generate Hi --verifier exakt": "unknown verifier 'exakt' (did you mean 'exact'?)",
    "generate Hi --dtype float23": "unknown dtype 'float23' (did you mean 'float32'?)",
    "generate Hi --temperature -1": "temperature must be",
    "generate Hi --num-speculative-tokens 0": "--num-speculative-tokens must be 'auto' or a number >= 1; got '0'",
    "generate Hi --json-schema none.json": "--json-schema: none.json cannot be read",
    "generate Hi --json-schema no.json": "--json-schema: no.json is not JSON",
    "generate Hi --json-schema deep.json": "--json-schema: deep.json is not JSON: nested too deeply",
    "generate Hi --adapter ./none": "there is no adapter './none'",
    "bench --adapter ./none": "there is no adapter './none'",
    "bench --prompts empty.txt": "prompt file 'empty.txt' is empty",
    "verify --adapter ./none": "there is no adapter './none'",
    "verify --prompts none.jsonl": "there is no prompt file 'none.jsonl'",
    "train medusa --prompts a --output b --adapter ./none": "there is no adapter './none'",
    "learn export out --adapter ./none": "there is no adapter './none'",
    "generate Hi --drafter ./none": "drafter folder './none' does not exist",
    "generate Hi --drafter .": "'.' is no drafter folder: config.json is missing",
    "chat ./none": "there is no file or folder './none'",
    "serve ./none": "there is no file or folder './none'",
    "verify ./none": "there is no file or folder './none'",
    "learn --model ./none": "there is no file or folder './none'",
    "learn smollm2-135m-instruct --prompts none.jsonl": "there is no prompt file 'none.jsonl'",
    "learn smollm2-135m-instruct --adapter ./none": "there is no adapter './none'",
    "models pull ./none": "there is no file or folder './none'",
    "models pull": "no model is named",
    "models pull x --model y": "the model is named twice, as 'x' and with --model 'y'",
    "train medusa ./none --prompts a --output b": "there is no file or folder './none'",
    "train medusa --prompts none.jsonl --output b": "there is no prompt file 'none.jsonl'",
    "train m2r2-paper --output b": "nothing to train on; give --prompts, a file or the name of a prompt set",
    "serve --cors a.example": "--cors takes an origin",
    "bench --model ./none": "there is no file or folder './none'",
    "learn export out --model ./none": "there is no file or folder './none'",
}


def test_mistakes_in_names_and_paths_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    run = subprocess.run(
        [sys.executable, "-c", HEAVY_LATER], input="\n".join(MISTAKES), capture_output=True, text=True, cwd=tmp_path
    )
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(MISTAKES) and run.stdout.split() == ["2"] * len(MISTAKES), run.stderr
    for (command, expected), line in zip(MISTAKES.items(), lines, strict=True):
        assert line.startswith(f"error: {expected}"), command


def test_version_and_bare_call() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"specdec {specdec.__version__}\n"
    bare = CliRunner().invoke(cli.app, [])
    assert bare.exit_code == 0 and "generate" in bare.stdout


def test_models_lists_the_embedded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    header, *rows = CliRunner().invoke(cli.app, ["models"]).stdout.splitlines()
    columns = "name", "licence", "download", "on disk", "packed", "cached", "drafters", "where"
    assert tuple(header.split("\t")) == columns
    assert rows[0].split("\t")[:6] == ["smollm2-135m-instruct", "Apache-2.0", "93 MB", "102 MB", "-", "no"]
    assert [row.split("\t")[0] for row in rows] == list(catalogue.EMBEDDED)
    row, *_ = json.loads(CliRunner().invoke(cli.app, ["models", "--json"]).stdout)
    assert row["name"] == "smollm2-135m-instruct" and row["cached"] is False
    assert "m2r2" in row["drafters"]


def test_the_readme_and_the_command_agree_on_sizes() -> None:
    entry, readme = catalogue.EMBEDDED[catalogue.DEFAULT_MODEL], ROOT / "README.md"
    assert f"({entry.download_bytes / 1e6:.0f} MB, once)" in readme.read_text("utf-8")


def test_drafters_lists_summaries_training_and_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("some-model", "another-model"):
        folder = tmp_path / "pretrained" / "m2r2" / model
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(catalogue.importlib.resources, "files", lambda package: tmp_path)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(cli.app, ["drafters", "--json"]).stdout)}
    assert rows["m2r2"]["training"] == "specdec train m2r2"
    assert rows["m2r2"]["shipped_for"] == ["another-model", "some-model"]
    assert rows["prompt-lookup"]["training"] is None and rows["prompt-lookup"]["shipped_for"] == []
    assert rows["none"]["summary"] == registry.lookup("drafters", "none").summary
    table = CliRunner().invoke(cli.app, ["drafters"]).stdout
    assert "prompt-lookup\t" in table and "\tnot needed\t-" in table and "\tanother-model, some-model" in table


@pytest.mark.parametrize(
    ("source", "why"), [(None, "No module named 'plug_in'"), ("1 +", "invalid syntax"), ("x", "'x'")]
)
def test_a_broken_plug_in_does_not_hide_the_other_drafters(
    source: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "plug_in.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
    broken = SimpleNamespace(name="broken", value="plug_in:Drafter")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    monkeypatch.setattr(registry, "outside", registry.outside.__wrapped__)  # read again
    table = CliRunner().invoke(cli.app, ["drafters"]).stdout
    assert "cannot be loaded: " in table and why in table and "prompt-lookup\t" in table


@pytest.mark.parametrize("key", [[], ["--api-key", "abc"]])
def test_a_server_for_the_pages_of_all_origins_says_so_without_a_key(key: list[str], model: str, monkeypatch) -> None:
    """Also on the address of this machine: its browsers call it for any page."""
    monkeypatch.setattr(specdec.serve.run, "serve", lambda *what: None)
    done = CliRunner().invoke(cli.app, ["serve", model, "--port", "0", "--cors", "*", *key])
    assert done.exit_code == 0 and ("any web page can use this server" in " ".join(done.stderr.split())) == (not key)
