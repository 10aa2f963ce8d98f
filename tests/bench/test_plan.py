"""specdec sweep: files are checked, every cell is kept as it ends, and nothing is measured twice."""

import errno
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from measured import result
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.api.prompts import encode
from specdec.base.errors import SpecDecError
from specdec.base.files import shipped_configs
from specdec.bench.cell import Cell
from specdec.bench.plan import groups, load_plan
from specdec.bench.run import failure_record
from specdec.bench.store import RECORDS, Store

GRID = """
drafter:
  none:
  prompt-lookup: {continuations: [1, 3]}
  early-exit: {exit_layer: 2}
num_speculative_tokens: [2, 4]
max_new_tokens: 12
"""
CELLS = 1 + 2 * (2 + 1)  # plain decoding has no draft to be 2 or 4 tokens long


@pytest.fixture
def write(tmp_path: Path):
    def call(text: str) -> Path:
        (tmp_path / "sweep.yaml").write_text(text)
        return tmp_path / "sweep.yaml"

    return call


@pytest.fixture
def grid(write, folder: Path, tmp_path: Path) -> Path:
    """The sweep file of ``GRID`` on the tiny model."""
    (tmp_path / "prompts.txt").write_text("abcabcabcabc\nhello hello hello\none two one two\n")
    return write(f"model: {folder}\nprompts: {tmp_path / 'prompts.txt'}\n{GRID}")


@pytest.fixture
def sweep(grid: Path, tmp_path: Path):
    """Run ``specdec sweep FILE ARGS`` in this process."""

    def call(*args: str, file: object = grid, output: str = "out"):
        return CliRunner().invoke(cli.app, ["sweep", str(file), "--output", str(tmp_path / output), *args])

    return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Cells take no time; how often each was measured."""
    runs: Counter = Counter()

    def measure(cells: list[Cell], *more: object):
        for cell in cells:
            runs[cell.key()] += 1
            yield result(cell)

    monkeypatch.setattr("specdec.bench.launch.measure", measure)
    return runs


def one_line_error(outcome) -> str:
    line = outcome.stderr.splitlines()[-1]
    assert outcome.exit_code == 2 and line.startswith("error: "), outcome.output
    return line


def test_bench_takes_methods_and_sweep_takes_a_file(sweep) -> None:
    bench, sweeps = (CliRunner().invoke(cli.app, [name, "--help"]).stdout for name in ("bench", "sweep"))
    assert "--drafters" in bench and "FILE KEY" not in bench and "KEY=VALUE,..." not in bench
    assert "--drafters" not in sweeps and "FILE" in sweeps and "KEY=VALUE,..." in sweeps
    error = one_line_error(CliRunner().invoke(cli.app, ["bench", "my.yaml"]))
    assert "run it with: specdec sweep my.yaml" in error
    assert CliRunner().invoke(cli.app, ["sweep"]).exit_code == 2


def points(plan, *names: str) -> list[tuple]:
    return [tuple(cell.as_dict()[name] for name in names) for cell in plan.cells]


def test_lists_are_axes_and_options_belong_to_their_drafter(write) -> None:
    plan = load_plan(write(GRID))
    assert points(plan, "drafter", "drafter_options", "num_speculative_tokens") == [
        ("none", {}, "auto"),
        ("prompt-lookup", {"continuations": 1}, 2),
        ("prompt-lookup", {"continuations": 1}, 4),
        ("prompt-lookup", {"continuations": 3}, 2),
        ("prompt-lookup", {"continuations": 3}, 4),
        ("early-exit", {"exit_layer": 2}, 2),
        ("early-exit", {"exit_layer": 2}, 4),
    ]
    assert len({cell.key() for cell in plan.cells}) == CELLS


def test_conditions_drop_cells(write) -> None:
    text = "model: [a, b]\ntemperature: [0, 0.7]\ndrafter: [none, prompt-lookup]\n"
    text += "exclude:\n  - {drafter: prompt-lookup, temperature: 0.7, model: b}\n"
    plan = load_plan(write(text))
    assert Counter(points(plan, "model")) == {("a",): 4, ("b",): 3}
    assert ("b", "prompt-lookup", 0.7) not in points(plan, "model", "drafter", "temperature")
    found = groups(plan.cells)
    models = [group[0].model for group in found]
    assert models == sorted(models) and len(found) == 4  # one load each, and plain decoding once per temperature


def test_entries_of_exclude_may_overlap(write) -> None:
    text = "temperature: [0, 0.7]\ndrafter: [none, prompt-lookup]\n"
    plan = load_plan(write(text + "exclude: [{drafter: none}, {drafter: none, temperature: 0.7}]\n"))
    assert points(plan, "drafter", "temperature") == [("prompt-lookup", 0.0), ("prompt-lookup", 0.7)]


def test_a_change_may_remove_what_exclude_names(sweep, write) -> None:
    file = write(f"{GRID}exclude:\n  - {{drafter: prompt-lookup, drafter.prompt-lookup.continuations: 3}}\n")
    outcome = sweep("--dry-run", "drafter=none,early-exit", file=file)
    assert "3 cells, 3 to do" in outcome.stderr, outcome.output
    file.write_text(f"{GRID}exclude:\n  - {{drafte: prompt-lookup}}\n")
    for args in ([], ["limit=2"]):
        assert "no cell: drafte (did you mean 'drafter'?)" in one_line_error(sweep("--dry-run", *args, file=file))


def test_the_command_line_goes_over_the_file(write) -> None:
    changes = ["drafter.early-exit.exit_layer=1,2,3", "num_speculative_tokens=5", "limit=2", "name=mine"]
    plan = load_plan(write(GRID), changes)
    assert plan.name == "mine" and set(points(plan, "limit")) == {(2,)}
    assert [c.drafter_options["exit_layer"] for c in plan.cells if c.drafter == "early-exit"] == [1, 2, 3]
    plan = load_plan(write(GRID), ["drafter=prompt-lookup"])  # a selection keeps its options
    assert {c.drafter for c in plan.cells} == {"prompt-lookup"} and len(plan.cells) == 4
    text = "drafter: m2r2\nverifier: {exact: , confident: {exit_threshold: [0.5, 0.9]}}\n"
    cells = load_plan(write(text), ["verifier=confident"]).cells
    assert [c.verifier_options for c in cells] == [{"exit_threshold": 0.5}, {"exit_threshold": 0.9}]
    plan = load_plan(write(f"{GRID}resources:\n"), ["resources.cpus=2"])
    assert plan.resources.cpus == 2


def test_settings_of_the_command_line_alone_are_a_plan() -> None:
    joined = "ngram+draft-model=x.y"
    overrides = [f"drafter.{joined}.ngram.nodes=4,8"]
    plan = load_plan({"drafter": ["none", "m2r2@3", joined]}, overrides)
    assert plan.name == "benchmark" and points(plan, "drafter", "num_speculative_tokens", "drafter_options") == [
        ("none", "auto", {}),
        ("m2r2", 3, {}),
        (joined, "auto", {"ngram": {"nodes": 4}}),
        (joined, "auto", {"ngram": {"nodes": 8}}),
    ]


def test_shipped_sweeps_are_what_they_say() -> None:
    plans = {name: load_plan(path) for name, path in shipped_configs("sweeps").items()}
    assert set(plans) == {"quick", "paper", "dynamic"}
    paper = plans["paper"].cells
    assert {c.prompts for c in paper} == {"mt-bench", "koala", "self-instruct", "wizardlm"}
    others = {"none", "m2r2", "m2r2-paper", "medusa", "lookahead", "deed", "layer-skip", "prompt-lookup"}
    assert {c.drafter for c in paper} == others and {c.verifier for c in paper} == {"exact"}
    two = load_plan(shipped_configs("sweeps")["paper"], ["model=big", "drafter=none,draft-model"])
    assert {c.drafter for c in two.cells} == {"none", "draft-model"}
    assert {c.verifier for c in plans["dynamic"].cells} == {"confident", "typical"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("drafters: m2r2\n", "unknown key 'drafters' in a benchmark file (did you mean 'drafter'?)"),
        ("\nmax_new_tokens: many\n", "max_new_tokens must be a valid integer; got 'many'"),
        ("temperature: [0, -1]\n", "temperature must be greater than or equal to 0"),
        ("drafter:\n  none:\n  promt-lookup:\n", "did you mean 'prompt-lookup'"),
        ("drafter:\n  prompt-lookup:\n    ngrams: 3\n", "ngrams"),
        ("drafter: hff\n", "did you mean 'hf'"),
        ("verifier: exakt\n", "did you mean 'exact'"),
        ("limit: []\n", "the sweep would have no cell"),
        ("drafter: {}\n", "the sweep would have no cell"),
        ("drafter:\n", "'drafter' takes names, or a mapping of names to options; got nothing"),
        ("drafter: [none, {ngram: {nodes: 8}}]\n", "'drafter' takes names, or a mapping of names to options; got {"),
        ("verifier: [[exact]]\n", "'verifier' takes names, or a mapping of names to options; got ['exact']"),
        ("drafter: none\nexclude:\n  - {drafter: none}\n", "has no cell: exclude drops them all"),
        ("drafter: none\nexclude:\n  - {drafter: nome}\n", "matches no cell: {'drafter': ['nome']}"),
        ("exclude:\n  - {limits: 2}\nlimit: 2\n", "did you mean 'limit'"),
        ("resources: {cpu: 2}\n", "did you mean 'cpus'"),
        ("resources: {cpus: 0}\n", "cpus must be greater than 0"),
        ("against: [non]\n", "did you mean 'none'"),
        ("seed: [1, 2\n", "cannot read benchmark file"),
        ("seed: !!python/object/apply:os.getcwd []\n", "cannot read benchmark file"),
        ("- drafter\n", "must be a mapping"),
        ("", "is empty"),
    ],
)
def test_a_bad_file_is_one_line_with_its_name(sweep, write, tmp_path: Path, text: str, words: str) -> None:
    error = one_line_error(sweep(file=write(text)))
    assert words in error and "sweep.yaml'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("limt=3", "did you mean 'limit'"),
        ("limit", "write KEY=VALUE,VALUE"),
        ("limit=", "gives no value"),
        ("limit=few", "'limit=few': limit must be"),
        ("drafter.early-exi.exit_layer=2", "did you mean 'early-exit'"),
        ("drafter.early-exit.exit_layr=2", "exit_lay"),
        ("drafter=[none]", "'drafter' takes names"),
        ("drafter.early-exit.exit_layer=2 drafter.early-exit.exit_layer.x=2", "'exit_layer' must be a mapping"),
    ],
)
def test_a_bad_override_is_one_line(sweep, change: str, words: str) -> None:
    assert words in one_line_error(sweep(*change.split()))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["prompts=nowhere.jsonl"], "no prompt file 'nowhere.jsonl'"),
        (
            ["--resume", "seed=1,2,3,4,5,6,7,8,9,0", "limit=" + ",".join(map(str, range(1, 2000)))],
            "has more than 10,000 cells",
        ),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(sweep, tmp_path: Path, args: list[str], words: str) -> None:
    assert words in one_line_error(sweep(*args)) and not (tmp_path / "out").exists()


def test_an_unknown_file_names_the_shipped_ones(sweep) -> None:
    assert "did you mean 'quick'" in one_line_error(sweep(file="quik"))


def test_a_dry_run_prints_the_plan_and_writes_nothing(sweep, tmp_path: Path) -> None:
    outcome = sweep("--dry-run")
    assert outcome.exit_code == 0 and not (tmp_path / "out").exists()
    assert len(outcome.stdout.splitlines()) == 1 + CELLS and outcome.stdout.count("to do") == CELLS
    assert f"{CELLS} cells, {CELLS} to do" in outcome.stderr
    outcome = sweep("--dry-run", "drafter=none,early-exit@5", "drafter.early-exit@5.exit_layer=1,3")
    assert "3 cells, 3 to do" in outcome.stderr and "early-exit@5 exit_layer=1\t" in outcome.stdout


def test_a_sweep_measures_what_the_decoder_does(sweep, folder: Path, tmp_path: Path) -> None:
    """Everything but the clock's figures is what SpecDecoder says of the same prompts, alone."""
    outcome = sweep()
    assert outcome.exit_code == 0, outcome.output
    records = [json.loads(line) for line in (tmp_path / "out" / RECORDS).read_text().splitlines()]
    assert len(records) == CELLS and outcome.stderr.count(" x plain (") == CELLS
    requests = [json.loads(line)["method"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert set(Counter(requests).values()) == {3} and len(requests) == 3 * CELLS  # plain decoding is measured once
    base = SpecDecoder.from_pretrained(str(folder), "none")
    prompts = [encode(base.tokenizer, line) for line in (tmp_path / "prompts.txt").read_text().splitlines()]
    for record in records:
        cell, method = record["cell"], record["method"]
        decoder = base.with_drafter(cell["drafter"], cell["drafter_options"])
        depth = 2 if cell["drafter"] == "none" else cell["num_speculative_tokens"]
        outs = [decoder.generate(p, max_new_tokens=12, num_speculative_tokens=depth) for p in prompts]
        accepted = [n for out in outs for n in out.metrics.per_step_accepted]
        assert method["acceptance_histogram"] == [accepted.count(n) for n in range(max(accepted) + 1)]
        assert method["tokens"] == 36 and method["equal_to_plain"] == {"equal": 3, "near_ties": 0, "faults": 0, "of": 3}
        assert record["baselines"]["none"]["tokens"] == 36 and not record["interrupted"]
    lengths = {r["cell"]["drafter"]: r["method"]["mean_acceptance_length"]["value"] for r in records}
    assert lengths["none"] == 1 < lengths["prompt-lookup"]


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(sweep, tmp_path: Path) -> None:
    args = ["drafter=none,medusa,prompt-lookup", "num_speculative_tokens=2", "limit=1"]
    args += ["drafter.prompt-lookup.continuations=1"]
    outcome = sweep(*args)  # no medusa drafter is shipped for the tiny model
    assert outcome.exit_code == 1 and "2 of 3 cells are done, 1 failed; continue with: " in outcome.stderr
    records = Store(tmp_path / "out").records()
    (broken,) = [record for record in records.values() if "error" in record]
    assert broken["cell"]["drafter"] == "medusa" and "train one" in broken["error"] and len(records) == 3
    again = sweep(*args, "--resume")
    assert "2 of 3 cells are done already" in again.stderr and "[3/3] medusa@2: failed" in again.stderr
    lines = (tmp_path / "out" / RECORDS).read_text().splitlines()
    assert len(lines) == 4 and Counter(json.loads(line)["key"] for line in lines)[broken["key"]] == 2
    only = sweep("drafter=medusa", "limit=1", output="none")
    assert "every cell failed; the first: " in one_line_error(only)


def test_an_unforeseen_error_is_recorded_in_one_line() -> None:
    cell = Cell(drafter="none")
    assert failure_record(cell, RuntimeError("a\nb"), 1.0)["error"] == "unexpected RuntimeError: a b"
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory: 3")
    assert failure_record(cell, full, 1.0)["error"] == "out of memory"
    assert failure_record(cell, SpecDecError("as it is"), 1.0)["error"] == "as it is"


def test_a_file_cut_anywhere_resumes_to_the_same_cells(sweep, counted: Counter, tmp_path: Path) -> None:
    """Whatever a killed process has written is a beginning of the file that a whole run writes."""
    assert sweep().exit_code == 0
    path = tmp_path / "out" / RECORDS
    whole, planned = path.read_bytes(), set(counted)
    dice = random.Random(11)
    for at in [0, 1, len(whole) - 1, whole.index(b"\n") + 1, *(dice.randrange(len(whole)) for _ in range(8))]:
        path.write_bytes(whole[:at])
        kept = {json.loads(line)["key"] for line in whole[:at].split(b"\n")[:-1]}
        counted.clear()
        outcome = sweep("--resume")
        assert outcome.exit_code == 0, outcome.output
        assert set(counted) == planned - kept and set(counted.values()) <= {1}  # no more and no less
        assert Store(tmp_path / "out").records().keys() == planned
        assert len(path.read_text().splitlines()) == CELLS


def test_a_full_disk_ends_a_sweep_that_can_go_on(sweep, counted: Counter, tmp_path: Path, monkeypatch) -> None:
    real, calls = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # the plan was the first
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on the disk" in one_line_error(sweep())
    assert len(Store(tmp_path / "out").records()) == 3
    with (tmp_path / "out" / RECORDS).open("a") as file:
        file.write('{"key": "half')
    assert sweep("--resume").exit_code == 0 and len(Store(tmp_path / "out").records()) == CELLS


def test_a_sweep_does_not_go_on_with_other_prompts(sweep, counted: Counter, tmp_path: Path) -> None:
    assert sweep().exit_code == 0 and sweep("--resume").exit_code == 0
    before = (tmp_path / "out" / RECORDS).read_bytes()
    (tmp_path / "prompts.txt").write_text("another text\n")
    assert "holds results for other prompts" in one_line_error(sweep("--resume"))
    assert (tmp_path / "out" / RECORDS).read_bytes() == before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("drafter: &x {none: *x}", "it is nested too deeply"),
        ("description: [&a [1], *a, *a]", "'description' must be a text"),
        ("name: {a: 1}", "'name' must be a text"),
    ],
)
def test_a_file_of_nested_values_is_refused(write, sweep, text: str, says: str) -> None:
    assert says in one_line_error(sweep("--dry-run", file=write(text + "\n")))


def test_a_folder_belongs_to_one_sweep(sweep, counted: Counter, tmp_path: Path) -> None:
    assert sweep().exit_code == 0
    assert "holds these results already (7 of 7 cells); go on with --resume" in one_line_error(sweep())
    assert "holds other results ('sweep', 7 cells; this plan has 9" in one_line_error(
        sweep("drafter=none,early-exit", "seed=1,2,3", "--resume")
    )
    before, done = (tmp_path / "out" / RECORDS).read_bytes(), counted.total()
    assert sweep("--resume").exit_code == 0 and counted.total() == done  # nothing to do
    assert (tmp_path / "out" / RECORDS).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("mine")
    assert "is not empty and holds no results" in one_line_error(sweep(output="other"))
    (tmp_path / "file").write_text("")
    for output in ("file", "file/out"):
        assert "cannot write to" in one_line_error(sweep(output=output))


def test_two_sweeps_do_not_write_into_one_folder(sweep, counted: Counter, grid: Path, tmp_path: Path) -> None:
    plan = load_plan(grid)
    with Store(tmp_path / "out").opened(plan, ""):
        assert "another process is writing into" in one_line_error(sweep())


def test_a_broken_line_is_told_with_its_number(sweep, counted: Counter, tmp_path: Path) -> None:
    assert sweep().exit_code == 0
    path = tmp_path / "out" / RECORDS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    assert "line 2 of " in one_line_error(sweep("--resume"))


@pytest.mark.slow
def test_a_real_local_ray_with_two_workers_measures_the_same_cells(sweep, grid: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    grid.write_text(grid.read_text() + "resources: {cpus: 1}\n")
    changes = ["drafter=prompt-lookup,medusa", "repetitions=3"]
    outcome = sweep(*changes, "--launcher", "ray", output="ray")
    assert outcome.exit_code == 1, outcome.output  # medusa fails to load: in its cells alone
    records = Store(tmp_path / "ray").records()
    assert "4 of 6 cells are done, 2 failed" in outcome.stderr and len(records) == 6
    good = {key: record for key, record in records.items() if "error" not in record}
    told = [json.loads(line)["cells"] for line in (tmp_path / "ray" / "results.jsonl").read_text().splitlines()]
    assert {key for cells in told for key in cells} == set(good)
    assert len({record["worker"] for record in good.values()}) == 2
    assert {r["cell"]["drafter"] for r in records.values() if "error" in r} == {"medusa"}
    sweep(*changes, output="here")
    for key, record in Store(tmp_path / "here").records().items():
        if "error" in record:
            assert records[key]["error"] == record["error"]
            continue
        for figure in ("tokens", "equal_to_plain", "acceptance_histogram", "mean_acceptance_length"):
            assert good[key]["method"][figure] == record["method"][figure]
    resumed = sweep(*changes, "--resume", output="ray")  # begun there, ended here
    assert "4 of 6 cells are done already" in resumed.stderr


def test_no_ray_is_one_line(sweep, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        error = one_line_error(sweep("--launcher", "ray"))
        assert f"no Ray cluster at '{address}'" in error and "check RAY_ADDRESS" in error
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install -e '.[ray]'" in one_line_error(sweep("--launcher", "ray"))
