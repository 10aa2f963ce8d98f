"""specdec bench: what it prints is what it measured, prompt sets come checked, bad input is one line."""

import gzip
import hashlib
import json
import re
import shutil
import signal
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import one_line_error, side_by_side
from refusals import refused
from tiny import greedy_reference, save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from specdec import SpecDecoder, cli
from specdec.api.prompts import encode
from specdec.base.errors import SpecDecError
from specdec.bench import figures, methods, prompts
from specdec.bench.cell import Cell
from specdec.bench.figures import BenchRequest
from specdec.bench.prompts import PROMPT_SETS, PromptSource, evenly_spaced, load_prompts
from specdec.bench.results import Results
from specdec.bench.run import BenchRun, Decoders, measure
from specdec.runtimes.prefill import PASS_TOKENS
from specdec.speculation.drafter import DrafterWarning

CONVERSATIONS = [
    {"id": "chat", "category": "talk", "turns": ["abcabcabc", "and then abcabc"]},
    {"id": "hello", "category": "talk", "turns": ["hello hello hello"]},
    {"id": "count", "category": "lists", "turns": ["one two one two one two"]},
]
NEW = 16


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in CONVERSATIONS))
    return path


@pytest.fixture
def bench(folder: Path, file: Path):
    """Run ``specdec bench ARGS`` on the tiny model in this process."""

    def call(*args: str, drafters: str = "none,prompt-lookup"):
        fixed = ["--model", str(folder), "--prompts", str(file), "--max-new-tokens", str(NEW)]
        fixed += ["--num-speculative-tokens", "3", "--drafters", drafters]
        return CliRunner().invoke(cli.app, ["bench", *fixed, *args])

    return call


@pytest.fixture
def cell(folder: Path, file: Path):
    """A cell on the tiny model."""

    def make(**settings: object) -> Cell:
        fixed = {"model": str(folder), "prompts": str(file), "max_new_tokens": NEW, "num_speculative_tokens": 3}
        return Cell(**fixed | settings)  # type: ignore[arg-type]

    return make


def measured(result) -> dict:
    assert result.exit_code == 0, result.output
    return side_by_side(result.stdout)


METHODS = "hf,hf-lookup,none,prompt-lookup,early-exit"


def test_what_is_printed_is_what_was_measured(bench, folder: Path, file: Path, tmp_path: Path) -> None:
    more = "--repetitions", "2", "--output", str(tmp_path / "out"), "--json"
    result = bench(*more, "--drafter-option", "early-exit.exit_layer=2", drafters=METHODS)
    summary, names = measured(result), ["hf", "hf-lookup@3", "none", "prompt-lookup@3", "early-exit@3 exit_layer=2"]
    records = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    assert [record["method"] | record["cell"] for record in records] == [
        record["cell"] | method for record, method in zip(records, summary["methods"], strict=True)
    ]
    requests = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    turns = [requests[i : i + len(names)] for i in range(0, len(requests), len(names))]
    assert len(turns) == 2 * 4 and [method["name"] for method in summary["methods"]] == names
    # Side by side: A B C, then C A B ...
    order = [request["method"] for request in turns[0]]
    assert sorted(order) == sorted(names)
    for turn in turns:
        assert [request["method"] for request in turn] == order
        order = [order[-1], *order[:-1]]

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = SpecDecoder.from_pretrained(str(folder), "none").tokenizer
    right = {}  # what model.generate says, by conversation and turn
    for conversation in CONVERSATIONS:
        chat: list[dict[str, str]] = []
        for number, turn in enumerate(conversation["turns"]):
            chat.append({"role": "user", "content": turn})
            answer = greedy_reference(model, encode(tokenizer, chat), NEW)
            right[conversation["id"], number] = answer
            chat.append({"role": "assistant", "content": tokenizer.decode(answer)})
    for request in requests:  # raw ids, of every method and every turn
        (row,) = request["rows"]
        assert row["token_ids"] == right[row["id"], request["turn"]] and row["equality"] == "equal"
        assert 0 < request["first_token_seconds"] < request["seconds"] and request["first_tokens"] == 1

    own = {name: [r for turn in turns for r in turn if r["method"] == name] for name in names}
    for method in summary["methods"]:
        mine, plain, hf = own[method["name"]], own["none"], own["hf"]
        seconds = {id(r): r["seconds"] / len(r["rows"][0]["token_ids"]) for r in (*mine, *plain, *hf)}
        assert (method["requests"], method["tokens"]) == (8, 8 * NEW)
        assert method["lossless"] and method["quality"] is None
        assert method["equal_to_plain"] == {"equal": 8, "near_ties": 0, "faults": 0, "of": 8}
        close(method["tokens_per_second"], statistics.median(NEW / r["seconds"] for r in mine))
        close(method["first_token_ms"], statistics.median(1e3 * r["first_token_seconds"] for r in mine))
        for what, found in {
            "token": [1e3 * r["seconds"] / NEW for r in mine],
            "first_token": [1e3 * r["first_token_seconds"] for r in mine],
            "step": [1e3 * (b - a) for r in mine for a, b in pairwise(r["arrivals"])],
        }.items():
            right_ones = dict(zip(("p50", "p99"), np.percentile(found, (50, 99)), strict=True))
            assert method["latency_ms"][what] == pytest.approx(right_ones, abs=2e-3)
        later = [1e3 * (r["seconds"] - r["first_token_seconds"]) / (NEW - 1) for r in mine]
        close(method["decode_ms_per_token"], statistics.median(later))
        for label, others in (("none", plain), ("hf", hf)):
            gains = [seconds[id(b)] / seconds[id(a)] for a, b in zip(mine, others, strict=True)]
            close(method["speedup"][label], statistics.median(gains))
            of_prompts = [statistics.median(gains[n::4]) for n in range(4)]  # of two repetitions
            assert method["worst"][label] == pytest.approx(min(of_prompts))
        metrics = [r["rows"][0]["metrics"] for r in mine if "metrics" in r["rows"][0]]
        assert set(method["categories"]) == {"talk", "lists"} and method["categories"]["talk"]["requests"] == 6
        if method["name"].startswith("hf"):
            assert not metrics and method["mean_acceptance_length"] is None and method["phase_ms_per_step"] == {}
            continue
        drafted = [n for m in metrics for n in m["per_step_drafted"]]
        accepted = [n for m in metrics for n in m["per_step_accepted"]]
        close(method["mean_acceptance_length"], 1 + sum(accepted) / len(accepted))
        close(method["prefill_ms"], statistics.median(1e3 * m["prefill_seconds"] for m in metrics))
        assert method["acceptance_per_position"] == pytest.approx(
            [
                sum(a > i for a in accepted) / offered
                for i in range(max(drafted))
                if (offered := sum(d > i for d in drafted))
            ]
        )
        for phase, ms in method["phase_ms_per_step"].items():
            assert ms == pytest.approx(1e3 * sum(m["phases"][phase] for m in metrics) / len(accepted))
        assert {"draft", "score", "accept", "commit"} <= set(method["phase_ms_per_step"])
    lookup = summary["methods"][3]
    assert lookup["mean_acceptance_length"]["value"] > 1 and lookup["acceptance_rate"] > 0  # it does speculate

    prints = hashlib.sha256(file.read_bytes()).hexdigest()
    assert summary["prompts"]["sha256"] == prints and summary["prompts"]["turns"] == 4
    assert summary["environment"]["threads"] and summary["environment"]["dtype"] == "float32"
    assert all(name in result.stdout for name in names) and "8 of 8" in result.stdout


def close(estimate: dict, value: float) -> None:
    """``estimate`` is ``value``, inside an interval."""
    assert estimate["value"] == pytest.approx(value)
    assert estimate["low"] <= estimate["value"] + 1e-9 and estimate["value"] <= estimate["high"] + 1e-9


def test_what_a_method_remembers_is_its_own_and_of_one_repetition(cell) -> None:
    """An answer that was decoded before would be drafted whole."""
    made: list[BenchRequest] = []
    both = [cell(drafter="ngram", repetitions=2, num_speculative_tokens=depth) for depth in (4, 5)]
    run = BenchRun(both, Decoders(), record=made.append)
    run.execute()
    steps: dict[tuple[str, int], list[int]] = {}
    for request in made:
        steps.setdefault((request.method, request.repetition), []).extend(
            metrics.num_spec_steps for metrics in request.reply.metrics
        )
    for method in ("ngram@4", "ngram@5"):
        assert steps[method, 0] == steps[method, 1] and max(steps[method, 0]) > NEW // 5
    made.clear()  # another group, with the same drafter and prompts
    BenchRun([cell(drafter="ngram", num_speculative_tokens=4, seed=1)], run.decoders, record=made.append).execute()
    later = [m.num_spec_steps for r in made if r.method == "ngram@4" for m in r.reply.metrics]
    assert later == steps["ngram@4", 0]


def test_a_drafter_that_fails_is_a_method_that_fails(cell, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("as told")

    monkeypatch.setattr("specdec.drafters.prompt_lookup.PromptLookupDrafter.propose", broken)
    with pytest.warns(DrafterWarning, match="as told"):
        plain, failed = measure([cell(drafter="none"), cell(drafter="prompt-lookup")], Decoders())
    assert "as told" in failed["error"] and plain["method"]["tokens"] > 0


def test_a_batch_counts_each_row_up_to_its_own_end(cell) -> None:
    decoders = Decoders()
    run = BenchRun([cell(drafter="hf", batch_size=3), cell(drafter="prompt-lookup", batch_size=3)], decoders)
    rows = [encode(run.base.tokenizer, text) for text in ("one", "a longer prompt, padded by nobody", "abc")]
    whole = [greedy_reference(run.base.model, row, NEW) for row in rows]
    run.base.model.generation_config.eos_token_id = whole[0][4]  # the first row ends early
    decoders._loaded.clear()
    ends = [row.index(whole[0][4]) + 1 if whole[0][4] in row else NEW for row in whole]
    right = [row[:end] for row, end in zip(whole, ends, strict=True)]
    for drafter in ("hf", "none", "prompt-lookup"):
        assert decoders.method(cell(drafter=drafter, batch_size=3)).reply(rows, NEW, 0).tokens == right
    assert len(right[0]) <= 5 and max(map(len, right)) == NEW


def test_a_batch_of_several_categories_counts_in_none(cell) -> None:
    for size, expected in ((2, {"talk", "lists"}), (3, {""})):  # two of "talk", then one of "lists"
        [found] = measure([cell(drafter="none", batch_size=size, turns=1)], Decoders())
        assert set(found["method"]["categories"]) == expected


def test_the_first_delivery_is_counted_as_it_came(cell) -> None:
    """The last part of a long prompt runs a step after a short prompt has got its first token."""
    decoder = SpecDecoder.from_pretrained(cell().model, "none")
    reply = methods.OwnMethod(decoder, cell(drafter="none")).reply([[5, 6, 7], [8] * (PASS_TOKENS + 5)], 4, 0)
    assert [len(row) for row in reply.tokens] == [4, 4] and reply.first_tokens == 1 and len(reply.arrivals) == 4


def test_prompt_lookup_of_generate_answers_one_prompt_at_a_time(cell) -> None:
    decoders, lookup = Decoders(), cell(drafter="hf-lookup")
    with pytest.raises(SpecDecError, match="one prompt at a time"):
        decoders.method(lookup.with_settings(batch_size=2))
    before = decoders.base(lookup).model.generation_config.to_dict()
    assert len(decoders.method(lookup).reply([[5, 6, 7, 5, 6]], NEW, 0).tokens[0]) == NEW
    assert decoders.base(lookup).model.generation_config.to_dict() == before


def test_peak_memory_is_that_of_the_method_at_work() -> None:
    with methods.PeakMemory(torch.device("cpu")) as idle:
        pass
    with methods.PeakMemory(torch.device("cpu")) as busy:
        torch.ones(60_000_000)  # 240 MB
    with methods.PeakMemory(torch.device("cpu")) as after:
        pass
    if idle.mb is None or busy.mb is None or after.mb is None:
        pytest.skip("this system does not tell")
    assert busy.mb - idle.mb > 200 and busy.mb - after.mb > 200


def test_sampled_outputs_are_those_of_plain_decoding_and_turns_limits_conversations(bench) -> None:
    summary = measured(bench("--temperature", "0.9", "--turns", "1", "--json"))
    assert all(method["equal_to_plain"]["equal"] == method["equal_to_plain"]["of"] > 0 for method in summary["methods"])
    assert summary["methods"][0]["requests"] == summary["prompts"]["turns"] == 3


LOSSY = {"verifier": "confident", "verifier_options": {"exit_threshold": 0.0}}


def test_a_lossy_rule_is_compared_with_the_full_model_and_named(cell, folder: Path, monkeypatch) -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    made, decoders, lossy = list[BenchRequest](), Decoders(), cell(drafter="early-exit", **LOSSY)
    (result,) = measure([lossy], decoders, record=made.append)
    table = Results("", "", "", [result]).table()
    assert "ROUGE-L" in table.header and "(lossy)" in " ".join(table.rows[0])
    monkeypatch.setattr("specdec.bench.figures.importlib.util.find_spec", lambda name: None)
    (refused,) = measure([lossy], decoders)
    assert "rouge-score; run pip install" in refused["error"]
    plain, lossy = result["baselines"]["none"], result["method"]
    assert plain["lossless"] and not lossy["lossless"]
    assert lossy["equal_to_plain"]["faults"] is None and lossy["equal_to_plain"]["equal"] < 4
    assert plain["quality"]["agreement"]["value"] == plain["quality"]["rouge_l"]["value"] == 1
    assert lossy["mean_layers_per_token"]["value"] < plain["mean_layers_per_token"]["value"] == 4
    assert lossy["quality"]["rouge_l"]["value"] < 1

    model, agreed, nll, count = AutoModelForCausalLM.from_pretrained(folder), 0, 0.0, 0
    for request in made:
        if request.method.startswith("early-exit"):
            prompt, answer = request.prompts[0], torch.tensor(request.reply.tokens[0])
            logits = model(torch.tensor([prompt + answer.tolist()])).logits[0, len(prompt) - 1 : -1].detach()
            agreed += int((logits.argmax(-1) == answer).sum())
            nll += float(torch.nn.functional.cross_entropy(logits, answer, reduction="sum"))
            count += len(answer)
    assert lossy["quality"]["agreement"]["value"] == agreed / count < 1
    assert lossy["quality"]["nll"]["value"] == pytest.approx(nll / count, rel=1e-4)
    assert lossy["quality"]["nll"]["value"] > plain["quality"]["nll"]["value"]


def test_what_does_not_fit_the_context_is_told_and_left_out(file: Path, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", context=64)
    fixed = ["bench", "--model", str(small), "--drafters", "prompt-lookup", "--num-speculative-tokens", "2"]
    result = CliRunner().invoke(cli.app, [*fixed, "--prompts", str(file), "--max-new-tokens", "8", "--json"])
    summary = measured(result)
    assert summary["methods"][0]["requests"] == 3 and len(summary["prompts"]["skipped"]) == 1
    assert "skipped chat, turn 2: " in result.stdout and "context of 64" in result.stdout
    (tmp_path / "long.txt").write_text("x" * 80)
    result = CliRunner().invoke(cli.app, [*fixed, "--prompts", str(tmp_path / "long.txt")])
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and "nothing was measured" in line and "context of 64" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("calls", "kept"), [(5, 2), (2, 0)])
def test_an_interrupt_keeps_what_was_measured(bench, tmp_path, monkeypatch, calls: int, kept: int, number: int) -> None:
    reply, count = methods.OwnMethod.reply, 0

    def interrupted(*args: object):
        nonlocal count
        count += 1
        if count > 2 + calls:  # two warm up
            signal.raise_signal(number)
        return reply(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(methods.OwnMethod, "reply", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        result = bench("--output", str(tmp_path / "out"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 130
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 2 * (calls // 2)
    if kept:
        record = json.loads((tmp_path / "out/cells.jsonl").read_text().splitlines()[0])
        assert record["interrupted"] and record["method"]["requests"] == kept and "(interrupted)" in result.stdout
        assert (record["prompts"]["conversations"], record["prompts"]["turns"]) == (1, 2)


def test_an_error_late_in_a_run_keeps_what_was_measured(bench, tmp_path: Path, monkeypatch) -> None:
    reply, count = methods.OwnMethod.reply, 0

    def broken(method: methods.OwnMethod, prompts: list[list[int]], new: int, seed: int, scope: str):
        nonlocal count
        count += ", none, " in scope
        if count > 2:
            raise IndexError("as told")
        return reply(method, prompts, new, seed, scope)

    monkeypatch.setattr(methods.OwnMethod, "reply", broken)
    result = bench("--output", str(tmp_path / "out"))
    assert result.exit_code == 1 and "cut short: unexpected IndexError: as told" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    assert [record["interrupted"] for record in records] == [True, True]
    assert [record["method"]["requests"] for record in records] == [2, 2]
    monkeypatch.undo()
    assert bench("--output", str(tmp_path / "out"), "--resume").exit_code == 0


def test_a_log_that_cannot_be_written_costs_a_line(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("specdec.bench.store.REQUESTS", "/dev/full")
    result = bench("--output", str(tmp_path / "out"))
    assert result.exit_code == 0 and len((tmp_path / "out/cells.jsonl").read_text().splitlines()) == 2
    (line,) = (line for line in result.stderr.splitlines() if "/dev/full" in line)
    assert "No space left on device; the run goes on" in line


def test_half_a_line_of_a_killed_run_is_cut_from_the_log(bench, tmp_path: Path) -> None:
    args = "--output", str(tmp_path / "out"), "--resume"
    assert bench(*args, "--limit", "1").exit_code == 0
    log = tmp_path / "out/results.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + whole[: len(whole) // 5])
    (tmp_path / "out/cells.jsonl").unlink()
    assert bench(*args, "--limit", "1").exit_code == 0
    assert all(json.loads(line)["rows"] for line in log.read_bytes().splitlines())


def test_a_tree_is_accepted_by_its_depth(cell) -> None:
    made: list[BenchRequest] = []
    tree = cell(drafter="prompt-lookup", drafter_options={"continuations": 3})
    (result,) = measure([tree], Decoders(), record=made.append)
    metrics = [m for request in made if request.method != "none" for m in request.reply.metrics]
    depths = sum(sum(m.per_step_drafted) for m in metrics)
    assert sum(m.num_draft_tokens for m in metrics) > depths
    assert result["method"]["acceptance_rate"] == sum(m.num_accepted_draft_tokens for m in metrics) / depths


def wrong(reply):
    """``reply`` of a method, with another first token."""

    def call(*args: object):
        made = reply(*args)
        made.tokens[0][0] ^= 1
        return made

    return call


def test_a_wrong_output_of_an_exact_drafter_is_a_fault_and_exit_code_1(bench, tmp_path: Path, monkeypatch) -> None:
    reply = methods.OwnMethod.reply

    def call(method: methods.OwnMethod, *args: object):
        how = wrong(reply) if method.decoder.drafter.traits.label == "prompt-lookup" else reply
        return how(method, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(methods.OwnMethod, "reply", call)
    args = "--output", str(tmp_path / "out")
    result = bench(*args)
    assert result.exit_code == 1 and "(4 FAULT)" in result.stdout
    assert "FAULT: outputs of prompt-lookup@3 (4 of 4) differ from plain decoding" in result.stderr
    assert len((tmp_path / "out/cells.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("against", [("none",), ("hf",)])
@pytest.mark.parametrize("rounded", ["activations", "kv_cache", "weight_format", ""])
def test_model_generate_is_at_fault_only_with_the_same_arithmetic(cell, monkeypatch, against, rounded: str) -> None:
    monkeypatch.setattr(methods.HFMethod, "reply", wrong(methods.HFMethod.reply))
    decoders, own = Decoders(), cell(drafter="hf" if "none" in against else "prompt-lookup", against=against)
    if rounded:
        setattr(decoders.base(own).target, rounded, "8 bits, rounded")
    (result,) = measure([own], decoders)
    expected = {"equal": 0, "near_ties": None if rounded else 0, "faults": None if rounded else 4, "of": 4}
    assert result["method"]["equal_to_plain"] == expected


def test_intervals_are_those_of_a_bootstrap_over_conversations() -> None:
    random = np.random.default_rng(7)
    clusters = np.repeat(np.arange(9), 3)
    values = random.lognormal(0, 0.3, 27) + clusters / 5
    found = figures.median(list(values), list(clusters))
    draws = []
    for _ in range(4000):
        chosen = random.integers(0, 9, 9)
        draws.append(np.median(np.concatenate([values[clusters == c] for c in chosen])))
    assert found["value"] == pytest.approx(np.median(values))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.percentile(draws, (2.5, 97.5))), abs=0.08)
    pooled = figures.ratio([3, 1, 4], [2, 1, 1], [0, 1, 2])
    assert pooled["value"] == 2 and 1 <= pooled["low"] < 2 < pooled["high"] <= 4
    assert figures.median([1.0, 3.0], [0, 0]) == {"value": 2, "low": None, "high": None}  # one conversation: no spread
    assert figures.median([], []) is None and figures.ratio([1], [0], [0]) is None


def test_every_method_continues_with_the_plain_answer(cell, monkeypatch) -> None:
    """Even where a method's own answer was another: what comes next is measured on the same prompt."""
    made: list[BenchRequest] = []
    run = BenchRun([cell(drafter="hf", temperature=1.5)], Decoders(), record=made.append)
    run.execute()
    chat = [request for request in made if request.conversations[0].id == "chat"]
    first = {r.method: r.reply.tokens[0] for r in chat if r.turn == 0}
    second = {r.method: r.prompts[0] for r in chat if r.turn == 1}
    assert first["none"] != first["hf"]
    answer = run.base.tokenizer.decode(first["none"])
    texts = ("abcabcabc", answer, "and then abcabc")
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    assert second["none"] == second["hf"] == encode(run.base.tokenizer, messages)


def test_a_failed_baseline_is_told_and_the_others_keep_their_figures(bench, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 3")

    monkeypatch.setattr(methods.HFMethod, "reply", full)
    args = ["--output", str(tmp_path / "out"), "--resume"]
    result = bench(*args, drafters="none,hf,prompt-lookup")
    assert result.exit_code == 1 and "model.generate failed: out of memory" in result.stdout
    records = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    kept = {record["cell"]["drafter"]: record for record in records if "error" not in record}
    assert [*kept] == ["none", "prompt-lookup"] and len(records) == 3
    for record in kept.values():
        assert [*record["method"]["speedup"]] == [*record["baselines"]] == ["none"]
        assert record["failed_baselines"] == {"hf": "out of memory"}
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {line["method"]: len(line["cells"]) for line in lines} == {"none": 3, "prompt-lookup@3": 1}
    monkeypatch.undo()
    again = bench(*args, drafters="none,hf,prompt-lookup")  # measures all cells that lack a baseline
    assert again.exit_code == 0 and "x model.generate" in again.stdout


def test_our_own_set_is_there_and_a_limit_spreads_over_it() -> None:
    assert {c.category for c in load_prompts("work").conversations} == {"code", "rewriting", "agent"}
    own = load_prompts("own")
    assert len({c.id for c in own.conversations}) == len(own.conversations) >= 20 and not own.licence
    assert {len(c.turns) for c in own.conversations} == {1, 2}
    few = evenly_spaced(own.conversations, 6)
    assert len(few) == 6 and len({c.category for c in few}) >= 4


def test_a_named_set_is_looked_for_in_the_data_folder_first(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_DATA", str(tmp_path))
    line = json.dumps({"question_id": 81, "category": "writing", "turns": ["one", "two"]})
    for kept in (tmp_path / "mt_bench.jsonl", tmp_path / "mt-bench.jsonl"):
        kept.write_text(line + "\n")
        found = load_prompts(str(kept))
        assert [c.turns for c in found.conversations] == [("one", "two")] and found.conversations[0].id == "81"
        assert found.name == kept.name and not found.licence  # it may be another text of that name
        assert load_prompts("mt-bench").licence.startswith("Apache-2.0")
    result = bench("--prompts", "mt-bench", "--json")
    assert measured(result)["prompts"]["licence"].startswith("Apache-2.0")
    assert result.stderr.count("Apache-2.0") == 1  # told once


@pytest.mark.parametrize(
    ("name", "record", "turns"),
    [
        ("gsm8k", {"question": "How many?", "answer": "4"}, "How many?"),
        ("humaneval", {"task_id": "HumanEval/0", "prompt": "def f():\n"}, prompts.CODE + "def f():\n```"),
        ("koala", {"id": "koala_1", "prompt": "Sing."}, "Sing."),
        (
            "self-instruct",
            {"instruction": "Translate.", "instances": [{"input": "Guten Tag"}]},
            "Translate.\n\nGuten Tag",
        ),
        ("self-instruct", {"instruction": "Breathe.", "instances": [{"input": ""}]}, "Breathe."),
        ("wizardlm", {"idx": 3, "Skill": "Math", "Instruction": "Add."}, "Add."),
    ],
)
def test_public_files_are_read_as_published(tmp_path: Path, name: str, record: dict, turns: str) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    found = load_prompts(str(tmp_path / f"{name}.jsonl"))
    assert found.conversations[0].turns == (turns,)


@pytest.fixture
def served(tmp_path: Path, monkeypatch) -> Iterator[dict[str, bytes]]:
    """A public home on this machine, an empty cache and no data folder: what it serves, by path."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECDEC_DATA", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    url = f"http://127.0.0.1:{server.server_port}"
    data = gzip.compress(b'{"task_id": "HumanEval/0", "prompt": "def f():"}\n', mtime=0)
    files["/HumanEval.jsonl.gz"] = data
    real = PROMPT_SETS["humaneval"]
    url, checksum = f"{url}/HumanEval.jsonl.gz", hashlib.sha256(data).hexdigest()
    pinned = PromptSource(real.page, real.licence, url, checksum, real.turns)
    monkeypatch.setitem(PROMPT_SETS, "humaneval", pinned)
    yield files
    server.shutdown()
    server.server_close()


def test_a_set_is_fetched_once_and_checked(served: dict[str, bytes], tmp_path: Path) -> None:
    path = "/HumanEval.jsonl.gz"
    good, served[path] = served[path], b"something else"
    with pytest.raises(SpecDecError, match="checksum mismatch"):  # the first download is not trusted
        load_prompts("humaneval")
    assert not list((tmp_path / "cache").rglob("*.*"))
    served[path] = good
    first = load_prompts("humaneval")
    assert first.sha256 == hashlib.sha256(good).hexdigest()
    served[path] = b"something else"
    assert load_prompts("humaneval") == first
    (cached,) = (tmp_path / "cache/prompts").iterdir()
    cached.write_bytes(b"broken on the disk")
    with pytest.raises(SpecDecError, match="checksum mismatch"):
        load_prompts("humaneval")
    served[path] = good
    assert load_prompts("humaneval") == first and cached.read_bytes() == good


def test_a_set_that_cannot_be_had_says_where_it_is(served: dict[str, bytes]) -> None:
    served.clear()
    with refused(r"'humaneval' cannot be downloaded .*'humaneval.jsonl', or put it into .*https://"):
        load_prompts("humaneval")
    for name in ("koala", "self-instruct", "wizardlm"):
        with pytest.raises(SpecDecError, match=rf"'{name}' is not downloaded: .*checksum; .*put it into .*https://"):
            load_prompts(name)


def test_whatever_is_downloaded_has_a_revision_and_a_checksum() -> None:
    assert set(PROMPT_SETS) == {"mt-bench", "koala", "self-instruct", "wizardlm", "spec-bench", "humaneval", "gsm8k"}
    for home in PROMPT_SETS.values():
        assert home.licence and home.page.startswith("https://") and (home.url is None) == (home.sha256 is None)
        assert home.url is None or re.search(r"^https://.*/[0-9a-f]{40}/", home.url)
        assert home.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", home.sha256)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"turns": ["a"]}\n{"turns": \n', "line 2 of "),
        ('\n{"turns": []}\n', "line 2 of "),
        ('{"turns": ["a", " "]}\n', "line 1 of "),
        ('{"question": "not of ours"}\n', "has no usable 'turns' or 'prompt'"),
        ('{"turns": [1]}\n', "has no usable 'turns' or 'prompt'"),
    ],
)
def test_a_broken_prompt_file_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(SpecDecError, match=words):
        load_prompts(str(tmp_path / "bad.jsonl"))


def test_the_default_drafter_is_measured_and_penalties_of_a_model_are_no_faults(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "model")
    (copied / "generation_config.json").write_text('{"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}')
    arguments = ["--model", str(copied), "--max-new-tokens", "12", "--limit", "1", "--turns", "1", "--json"]
    made = measured(CliRunner().invoke(cli.app, ["bench", *arguments]))["methods"]
    assert {method["drafter"] for method in made} == {"hf", "none", "prompt-lookup", "auto"}
    assert all(method["equal_to_plain"]["equal"] == method["equal_to_plain"]["of"] for method in made)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--drafters", ","], "--drafters names none"),
        (["--drafters", "prompt-lokup"], "did you mean 'prompt-lookup'"),
        (["--drafters", "hf-looku"], "unknown method 'hf-looku' (did you mean 'hf-lookup'?)"),
        (["--drafters", "hf-lookup=MODEL"], "takes no source"),
        (["--drafter-option", "prompt-lookup.ngrams=3"], "ngrams"),
        (["--prompts", "mt_bench"], "did you mean 'mt-bench'"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_bad_input_is_one_line(bench, args: list[str], words: str) -> None:
    assert words in one_line_error(bench(*args))
