"""The trainer: what it trains is what drafts, it learns, it resumes exactly, and it says clearly what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import importlib.resources
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from tiny_gguf import write_gguf
from training import recipe, same_drafts, searched, shaken
from typer.testing import CliRunner

from specdec import SpecDecoder
from specdec.base import files, machine
from specdec.base.errors import SpecDecError
from specdec.cli import app
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path, load_network
from specdec.engine.depth.costs import Costs
from specdec.models import drafter_folder, loading
from specdec.runtimes.fused import FAMILIES as FUSED
from specdec.runtimes.fused import FusedTarget
from specdec.runtimes.reference import ReferenceTarget
from specdec.runtimes.target import Pass, Target
from specdec.speculation.draft import Drafter, Verifier
from specdec.train import data, search, speed, states
from specdec.train.batches import assemble, epoch, stream, windows
from specdec.train.data import Prompt, TrainingAnswer
from specdec.train.evaluate import acceptance_lengths, evaluate
from specdec.train.fit import fit_projections
from specdec.train.m2r2 import M2R2Method, path_of
from specdec.train.m2r2_settings import M2R2Settings, wanted_states
from specdec.train.medusa import MedusaSettings
from specdec.train.method import lookup
from specdec.train.plot import draw_curves
from specdec.train.run import TrainingRun
from specdec.train.runtime import training_target
from specdec.train.settings import current, from_mapping, load_settings
from specdec.train.speed import predict
from specdec.train.student import Teacher, draft_steps
from specdec.train.trainer import train

PATHS = {
    "projected": M2R2Path(0, ((2, 4),), True, 4, {2: ["self_attn.q_proj", "self_attn.k_proj"], 3: ["mlp.up_proj"]}),
    "projected from 1": M2R2Path(1, ((2, 3),), True, 4, {2: ["self_attn.v_proj"]}),
    "early": M2R2Path(2, (), False, 4, {0: ["self_attn.q_proj", "mlp.down_proj"], 1: ["self_attn.o_proj"]}),
    "mixed": M2R2Path(1, ((2, 3),), True, 4, {0: ["mlp.up_proj"], 2: ["self_attn.k_proj"]}),
    "early exits": M2R2Path(3, (), False, 4, {n: ["self_attn.q_proj", "mlp.down_proj"] for n in range(3)}, (1, 2)),
    "exits on the way": M2R2Path(2, ((2, 3), (3, 4)), True, 4, {0: ["mlp.up_proj"], 2: ["mlp.up_proj"]}, (1, 3)),
}


@pytest.mark.parametrize("runtime", [training_target, ReferenceTarget])
@pytest.mark.parametrize("name", PATHS)
def test_the_student_drafts_exactly_as_the_drafter(name: str, runtime: Callable[..., Target]) -> None:
    same_drafts(runtime(tiny_model("llama")), PATHS[name])


@pytest.mark.parametrize("family", FUSED)
def test_training_has_the_reference_values_and_gradients(family: str) -> None:
    model = tiny_model(family)
    names = ["self_attn.qkv_proj" if family == "phi3" else "self_attn.k_proj", "mlp.down_proj"]
    names += ["linear_attn.in_proj_qkv", "linear_attn.in_proj_b", "linear_attn.out_proj"]
    results, every = [], ReferenceTarget(model)
    path = M2R2Path(0, ((1, 4),), True, 3, {n: [x for x in names if x in every.linears(n)] for n in (1, 2, 3)})
    for target in (ReferenceTarget(model), training_target(model)):
        network = shaken(path, target).requires_grad_(True)
        x, positions = (
            torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(3)),
            torch.arange(11).expand(2, 11),
        )
        cache = target.new_cache(2)
        y = target.layers(x, 1, 4, Pass(positions, cache.mask(1, positions), cache, adapters=network.adapters))
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in network.adapters.parameters())])
    assert isinstance(training_target(model), FusedTarget)
    for reference, direct in zip(*results, strict=True):
        torch.testing.assert_close(direct, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


# -- whole runs ---------------------------------------------------------------------------------------------------


def evaluations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["evaluation"] for line in lines if "evaluation" in line]


@pytest.mark.parametrize("path", [{}, {"exit_layer": 3, "segments": [], "final_projection": False, "draft_steps": 1}])
def test_training_brings_drafts_nearer_to_the_base_and_leaves_the_base_alone(
    answers: Path, tmp_path: Path, path: dict[str, Any]
) -> None:
    model, _ = loading.load("tiny")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    figures = train(recipe(answers, tmp_path / "out", steps=60, relative_rate=0.1, **path))
    first = evaluations(tmp_path / "out")[0]
    assert 1 - figures["overlap"][0] < 0.9 * (1 - first["overlap"][0])
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    decoder = SpecDecoder(model, None, drafter=str(tmp_path / "out"))
    plain = SpecDecoder(model, None, drafter="none")
    prompt = [5, 6, 7, 8]
    out = decoder.generate(prompt, max_new_tokens=20, num_speculative_tokens=4)
    assert out.token_ids == plain.generate(prompt, max_new_tokens=20).token_ids
    assert (tmp_path / "out" / "train.yaml").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("checkpoint", [11, None])
def test_a_killed_run_goes_on_to_exactly_the_weights_of_an_uninterrupted_one(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int | None
) -> None:
    train(recipe(answers, tmp_path / "whole"))
    step = TrainingRun._step

    def killed(run: TrainingRun, *args: Any) -> dict[str, float]:
        if run.update == checkpoint:
            run._save()
        if run.update == 17:
            raise Killed
        return step(run, *args)

    monkeypatch.setattr(TrainingRun, "_step", killed)
    with pytest.raises(Killed):
        train(recipe(answers, tmp_path / "parts"))
    monkeypatch.setattr(TrainingRun, "_step", step)
    with pytest.raises(SpecDecError, match="--resume"):
        train(recipe(answers, tmp_path / "parts"))
    with pytest.raises(SpecDecError, match="rank 4 -> 5"):
        train(recipe(answers, tmp_path / "parts", rank=5), resume=True)
    train(recipe(answers, tmp_path / "parts"), resume=True)

    whole, parts = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    reported = [json.loads(line)["update"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert reported == sorted(reported)
    assert len(evaluations(tmp_path / "parts")) == len(evaluations(tmp_path / "whole"))


def test_a_finished_run_is_prolonged_from_its_last_update(answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(answers, out, steps=20))
    first = load_file(out / "checkpoint.safetensors")
    with pytest.raises(SpecDecError, match=r"pass --resume to go on, with a longer --minutes or --steps .* prolong"):
        train(recipe(answers, out, steps=60))
    with pytest.raises(SpecDecError, match="steps 20 -> 10"):
        train(recipe(answers, out, steps=10), resume=True)
    train(recipe(answers, out, steps=60), resume=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = {line["update"]: line["rate"] for line in lines if "rate" in line}
    assert list(rates) == [10, 20, 30, 40, 50, 60]  # what was done is not done again
    assert rates[30] == pytest.approx(5.5 / 20)  # the rates warm up anew
    assert any(not torch.equal(first[key], now) for key, now in load_file(out / "checkpoint.safetensors").items())
    assert yaml.safe_load((out / "train.yaml").read_text())["steps"] == 60


@pytest.mark.parametrize("searches", [True, False])
def test_a_run_may_begin_from_a_trained_drafter_of_the_same_shape(
    answers: Path, tmp_path: Path, searches: bool
) -> None:
    first = train(recipe(answers, tmp_path / "first", steps=40, relative_rate=0.1))
    other = {
        "init": str(tmp_path / "first"),
        "segments": [],
        "search": searches,
        "rank": 7,
    }  # that drafter's path counts
    again = train(recipe(answers, tmp_path / "again", steps=2, **other))
    assert evaluations(tmp_path / "again")[0]["top1"] == first["top1"]
    assert again["score"] >= first["score"]
    config = drafter_folder.read_config(tmp_path / "again")
    assert config["path"] == drafter_folder.read_config(tmp_path / "first")["path"]
    assert (
        config["training"]["began_from"]["updates"]
        == drafter_folder.read_config(tmp_path / "first")["training"]["updates"]
    )

    config["base"] = {"fingerprint": "another"}
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecDecError, match="was trained for base weights another"):
        train(recipe(answers, tmp_path / "foreign", init=str(tmp_path / "first")))
    with pytest.raises(SpecDecError, match="does not exist"):
        train(recipe(answers, tmp_path / "missing", init=str(tmp_path / "nowhere")))
    short = from_mapping(
        MedusaSettings,
        {"prompts": [str(answers)], "output": str(tmp_path / "medusa"), "dtype": "float32", "method": "medusa"}
        | {
            "init": str(tmp_path / "again"),
            "heads": 2,
            "window": 8,
            "draft_vocab": 60,
            "steps": 1,
            "minutes": None,
        },
        "test",
    )
    with pytest.raises(SpecDecError, match=r"cannot begin a 'medusa' drafter from .*again'"):
        train(short)


def test_a_drafter_is_stored_as_asked_and_a_run_may_begin_from_8_bits(answers: Path, tmp_path: Path) -> None:
    def kinds(name: str) -> set[torch.dtype]:
        return {value.dtype for value in load_file(tmp_path / name / "model.safetensors").values()}

    first = train(recipe(answers, tmp_path / "int8", steps=40, relative_rate=0.1, storage="int8"))
    train(recipe(answers, tmp_path / "half", steps=1, storage="bfloat16"))
    assert torch.int8 in kinds("int8") and kinds("half") == {torch.bfloat16, torch.int32}
    assert kinds("int8") - {torch.int8, torch.bfloat16} == {torch.float32, torch.int32}
    train(recipe(answers, tmp_path / "again", steps=1, init=str(tmp_path / "int8")))
    assert evaluations(tmp_path / "again")[0]["score"] == pytest.approx(first["score"], abs=0.2)
    saved = load_file(tmp_path / "int8" / "checkpoint.safetensors")
    assert all(value.dtype == torch.float32 for name, value in saved.items() if name.startswith("masters/"))
    with pytest.raises(SpecDecError, match="setting 'storage' cannot be 'int4'"):
        recipe(answers, tmp_path / "odd", storage="int4")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_drafter(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Teacher.loss

    def broken(teacher: Teacher, logits: torch.Tensor) -> torch.Tensor:
        kl = loss(teacher, logits)
        teacher.calls = getattr(teacher, "calls", 0) + 1  # type: ignore[attr-defined]
        return kl * float("nan") if teacher.calls > 12 else kl  # type: ignore[attr-defined]

    monkeypatch.setattr(Teacher, "loss", broken)
    with pytest.raises(SpecDecError, match="not a number any more at update 5"):
        train(recipe(answers, tmp_path / "out"))
    assert all(t.isfinite().all() for t in drafter_folder.read_tensors(tmp_path / "out").values())
    kept = load_file(tmp_path / "out" / "checkpoint.safetensors")
    monkeypatch.setattr(Teacher, "loss", loss)
    train(recipe(answers, tmp_path / "whole", steps=5, decay=1e-9))  # the rate does not fall in so few updates
    whole = load_file(tmp_path / "whole" / "checkpoint.safetensors")
    assert {name for name in whole if name.startswith("masters/")} <= kept.keys()
    assert all(t.isfinite().all() for t in kept.values())


def test_a_run_that_makes_the_drafter_worse_than_its_closed_form_goes_back_and_lowers_its_rates(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = TrainingRun._step

    def seen(run: TrainingRun, rows: Any, rate: float) -> dict[str, float]:
        rates.append(rate)
        return step(run, rows, rate)

    monkeypatch.setattr(TrainingRun, "_step", seen)
    console = Console(file=io.StringIO(), width=300)
    train(recipe(answers, tmp_path / "out", steps=50, relative_rate=30.0, warmup=1, decay=1e-9), console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the held-out loss rose from" in said
    assert "going back to update 0, and on with learning rates 3 times lower" in said
    assert min(rates) < max(rates) / 2
    quiet = Console(file=io.StringIO(), width=300)
    train(recipe(answers, tmp_path / "calm", steps=30, relative_rate=0.02), console=quiet)
    assert "going back" not in quiet.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "phi"])
def test_rates_follow_the_size_of_the_weights(kind: str) -> None:
    sizes = []
    for factor in (1.0, 10.0):
        model = tiny_model(kind)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layers.2." in name or ".h.2." in name:
                    weight.mul_(factor)
        target = training_target(model)
        some = {"segments": [[2, 3]], "final_projection": True, "rank": 4, "prompts": ["-"], "output": "-"}
        method = M2R2Method(from_mapping(M2R2Settings, some, "test"), target)
        masters = method.build(None)
        sizes.append({name: method.size(name, p) for name, p in masters.named_parameters() if name.endswith("/up")})
    small, large = sizes
    assert small and all(large[name] == pytest.approx(10 * size) for name, size in small.items())


def test_a_full_disk_is_one_clear_line(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = files.write_atomically

    def full(path: Path, content: bytes) -> None:
        if path.name == "checkpoint.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(SpecDecError, match=r"No space left on device; .* free space and --resume"):
        train(recipe(answers, tmp_path / "out", steps=2))


def test_a_drafter_trained_on_a_gguf_file_serves_it_and_its_other_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    given, timed = speed.costs, list[str]()

    def noted(target: Target, drafter: Drafter, verifier: Verifier) -> Costs:
        timed.append(target.weight_format)
        return given(target, drafter, verifier)

    monkeypatch.setattr(speed, "costs", noted)
    files = {name: tmp_path / f"{name}.gguf" for name in ("packed", "plain", "other")}
    write_gguf(files["packed"], width=64, packed=gguf.GGMLQuantizationType.Q4_0)
    write_gguf(files["plain"], width=64)
    write_gguf(files["other"], width=64, seed=1)
    (tmp_path / "prompts.txt").write_text("\n".join(f"{n} plus {n} is" for n in range(12)))
    command = ["train", "m2r2", "--model", str(files["packed"]), "--prompts", str(tmp_path / "prompts.txt")]
    sizes = ["max_new_tokens=24", "rank=2", "draft_vocab=50", "rows=4", "window=8", "eval_fraction=0.2"]
    command += [
        "--output",
        str(tmp_path / "out"),
        "--steps",
        "2",
        *(part for each in sizes for part in ("--set", each)),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    capsys.readouterr()
    for name, says in (("packed", False), ("plain", True)):
        decoder = SpecDecoder.from_pretrained(str(files[name]), drafter=str(tmp_path / "out"))
        if name == "packed":
            assert timed == [decoder.target.weight_format]  # the blocks that users run, not what training makes of them
        assert ("another precision of that model" in capsys.readouterr().err) == says
        plain = decoder.with_drafter("none").generate("3 plus 3 is", max_new_tokens=16).token_ids
        out = decoder.generate("3 plus 3 is", max_new_tokens=16, num_speculative_tokens=2)
        assert out.token_ids == plain and out.metrics.num_draft_tokens > 0
    with pytest.raises(SpecDecError, match="differ by more than rounding"):
        SpecDecoder.from_pretrained(str(files["other"]), drafter=str(tmp_path / "out"))


def test_answers_of_another_tokenizer_or_template_are_refused_with_the_first_example() -> None:
    """A tokenizer of words: the ids of another one read as words that it would put together otherwise."""
    words = {1: "<|im_start|>", 2: "say", 3: "hello", 4: "[INST]", 5: "he", 6: "llo", 7: "<|turn|>"}

    def decode(ids: Any) -> str:
        return "".join(words[i] for i in ids)

    def encode(text: str) -> list[int]:
        ids = []
        while text:
            id = max((i for i, word in words.items() if text.startswith(word)), key=lambda i: len(words[i]))
            ids.append(id)
            text = text[len(words[id]) :]
        return ids

    def check(*prompts: tuple[int, ...], turn: str = "<|turn|>") -> None:
        data.refuse_other_tokens([Prompt(("x",)), *(TrainingAnswer(p, (2,)) for p in prompts)], decode, encode, turn)

    check()
    check((1, 2, 3, 7), (2, 3), (4, 2, 7))
    check((2, 3), (4, 2), (2,))  # in no template, most of them
    check((4, 2), (4, 3), turn="")
    check((5, 6), (2, 3))  # one is not as this tokenizer would have it: still of its vocabulary
    with pytest.raises(SpecDecError, match=r"of another tokenizer: the prompt of answer 2 reads 'hellohello' to this"):
        check((5, 6, 5, 6), (5, 6, 2))
    with pytest.raises(
        SpecDecError, match=r"another chat template: the prompt of answer 3 is '\[INST\]say', and this .*turn"
    ):
        check((2, 3, 7), (4, 2), (4, 3))


def test_a_base_too_large_for_memory_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"never read")
    weights = sum(p.numel() for p in tiny_model(vocab_size=99).parameters()) * 4
    monkeypatch.setattr(machine, "available_memory", lambda: weights - 1)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    settings = recipe(tmp_path / "prompts.jsonl", tmp_path / "out", model=str(folder), device="cpu")
    with pytest.raises(SpecDecError, match=r"not enough memory for .*: its weights need 0 MB, and 0 MB are free"):
        train(settings)
    monkeypatch.setattr(machine, "available_memory", lambda: weights)
    with pytest.raises(SpecDecError, match="safetensors file is truncated or broken"):
        train(settings)


def test_damaged_and_foreign_teacher_states_are_refused(answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(answers, out, steps=1))
    shard = out / "states" / "train" / "states-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(SpecDecError, match="truncated"):
        train(recipe(answers, out, steps=1), resume=True)
    shard.write_bytes(whole)
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[:-5]))
    with pytest.raises(SpecDecError, match="teacher states of other answers"):
        train(recipe(answers, out, steps=1), resume=True)


def test_states_are_written_shard_by_shard_and_go_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = training_target(tiny_model("llama"))
    some = [TrainingAnswer((3, 4, 5), tuple(range(6, 12 + n))) for n in range(6)]
    wanted = states.Wanted((2,), (4,))
    monkeypatch.setattr(states, "SHARD_ANSWERS", 2)
    whole = states.compute(tmp_path / "whole", target, some, wanted)
    teach, calls = states._teach, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return teach(*args)

    monkeypatch.setattr(states, "_teach", killed)
    with pytest.raises(Killed):
        states.compute(tmp_path / "parts", target, some, wanted)
    parts = states.compute(tmp_path / "parts", target, some, wanted)
    assert len(calls) == 4  # two shards, the killed one, and that one again
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.hidden[4], b.hidden[4]) and torch.equal(a.kv[2][0], b.kv[2][0])
    with pytest.raises(SpecDecError, match="other fingerprint"):
        target.fingerprint = "another model"
        states.compute(tmp_path / "parts", target, some, wanted)


# -- inputs -------------------------------------------------------------------------------------------------------


def test_lines_of_every_kind_are_read_and_broken_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl.gz"
    lines = ['{"turns": ["a", "b"]}', "", '{"prompt": "c"}', "plain", '{"prompt_ids": [1], "response_ids": [2, 3]}']
    with gzip.open(file, "wt") as out:
        out.write("\n".join(lines))
    assert data.read([file]) == [Prompt(("a", "b")), Prompt(("c",)), Prompt(("plain",)), TrainingAnswer((1,), (2, 3))]
    for broken in ('{"turns": ["a"]', '{"turns": []}', '{"prompt_ids": [1], "response_ids": [true]}', '{"text": "x"}'):
        path = tmp_path / "broken.jsonl"
        path.write_text('{"prompt": "fine"}\n' + broken + "\n")
        with pytest.raises(SpecDecError, match="line 2 of"):
            data.read([path])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SpecDecError, match="no prompts in"):
        data.read([tmp_path / "empty"])
    with pytest.raises(SpecDecError, match="cannot read"):
        data.read([tmp_path / "missing"])


def test_plain_text_becomes_pieces_that_are_trained_on_and_may_stand_alone(tmp_path: Path) -> None:
    assert [len(p) for p in data.pieces(range(1000), 300)] == [300, 300, 300, 100]
    assert data.pieces(range(317), 300)[1:] == []  # too short to learn from
    assert sum((p.prompt_ids + p.response_ids for p in data.pieces(range(600), 300)), ()) == tuple(range(600))
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {n} of a book that goes on\n" for n in range(60)))
    folder, preset = save_tiny(tmp_path / "model"), tmp_path / "preset.yaml"
    preset.write_text(
        "segments: [[2, 4]]\nfinal_projection: true\nrank: 2\ndraft_vocab: 50\nrows: 4\nwindow: 8\n"
        "text_tokens: 64\neval_fraction: 0.2\n"
    )
    command = ["train", "m2r2", "--model", str(folder), "--text", str(text), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--preset", str(preset), "--dtype", "float32", "--steps", "3"])
    assert result.exit_code == 0, result.output
    training = drafter_folder.read_config(tmp_path / "out")["training"]
    assert training["tokens_in_answers"] > 1000
    text.write_text(" \n")
    with pytest.raises(SpecDecError, match=r"text file .* is empty"):
        data.read_texts([text])


def test_held_out_prompts_are_refused_in_text_and_in_token_ids() -> None:
    held = [Prompt(("Why is the sky blue?", "second turn"))]
    data.refuse_held_out([Prompt(("second turn",)), Prompt(("Why is it?",))], held, str)
    for item in (Prompt(("Tell me:  why IS the\nsky blue?",)), TrainingAnswer((1,), (2,))):
        with pytest.raises(SpecDecError, match="prompt 1 to train on contains the held-out prompt"):
            data.refuse_held_out([item], held, lambda ids: "user why is the sky blue? assistant")


def test_a_run_on_held_out_prompts_does_not_begin(answers: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(answers.read_text().splitlines()[3])
    with pytest.raises(SpecDecError, match=r"prompt 4 to train on contains the held-out prompt .* remove it"):
        train(recipe(answers, tmp_path / "out", holdout=[str(held)]))
    assert not (tmp_path / "out" / "states").exists()
    (tmp_path / "text.txt").write_text("1 2 3 " + held_text(held) + " 4")
    with pytest.raises(SpecDecError, match="text 1 to train on contains"):
        train(recipe(answers, tmp_path / "other", prompts=[], text=[str(tmp_path / "text.txt")], holdout=[str(held)]))


def test_answers_of_a_model_with_a_larger_vocabulary_are_refused(answers: Path, tmp_path: Path) -> None:
    with answers.open("a") as file:
        file.write('\n{"prompt_ids": [5], "response_ids": [6, 97]}')  # of 97 tokens
    with pytest.raises(
        SpecDecError, match="answer 41 to train on holds token 97, but the model's vocabulary ends at 96"
    ):
        train(recipe(answers, tmp_path / "out"))


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


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.jsonl", "states/search/theirs"])
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


def held_text(path: Path) -> str:
    return " ".join(map(str, json.loads(path.read_text())["prompt_ids"]))


def test_a_setting_of_earlier_versions_is_ignored_or_has_its_new_name() -> None:
    assert current({"compile": True, "leap_rate": 1e-3, "rank": 3}) == {"rank": 3}
    assert current({"final_leap": True}) == {"final_projection": True}


def test_recipes_of_shipped_drafters_are_presets() -> None:
    recipes = sorted((importlib.resources.files("specdec.drafters") / "pretrained").glob("*/*/train.yaml"))  # type: ignore[attr-defined]
    assert recipes
    for path in recipes:
        kind = lookup(drafter_folder.read_config(path.parent)["drafter"])
        settings = load_settings(kind.settings_class, kind.name, str(path), {})
        assert settings.prompts and (settings.minutes or settings.steps)


def test_the_draft_vocabulary_is_the_most_frequent_answer_tokens_and_the_ends() -> None:
    some = [TrainingAnswer((9, 9, 9, 9), (5, 5, 5, 7, 7, 8)), TrainingAnswer((9,), (5, 6))]
    assert data.draft_vocabulary(some, 3, [2], 97).tolist() == [2, 5, 7]
    assert data.draft_vocabulary(some, 6, [2], 97).tolist() == [2, 5, 6, 7, 8, 9]
    assert len(data.draft_vocabulary(some, 500, [2], 97)) == 97


def test_batches_cover_each_window_once_an_epoch_and_can_be_entered_anywhere() -> None:
    found = [(index, 4, 5 + index % 7) for index in range(64)]
    seen = [window for batch in epoch(found, 4, 1, 0) for window in batch]
    assert sorted(seen) == found
    ahead = stream(found, 4, 1, 21)
    behind = stream(found, 4, 1, 0)
    for _ in range(21):
        next(behind)
    assert [next(ahead) for _ in range(20)] == [next(behind) for _ in range(20)]


def test_steps_along_a_window() -> None:
    hits = [[True, False, True, True, True, False], [True, True, False, True, False, False]]
    # From 0: step 1 at 0 and step 2 at 1 hold, three tokens; from 3: step 1 holds, step 2 at 4 does not; 5: no room.
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert acceptance_lengths([torch.tensor([row]) for row in hits], valid) == [3, 2]


def test_presets_load_and_settings_are_checked(tmp_path: Path) -> None:
    settings = load_settings(M2R2Settings, "m2r2", None, {"steps": 5})
    assert settings.begin == 20 and not settings.segments
    given = load_settings(M2R2Settings, "m2r2", None, {"segments": [[1, 2]]})
    assert given.segments == ((1, 2),) and not given.begin and given.layers_of is None  # not scaled to the model
    assert load_settings(M2R2Settings, "m2r2", "m2r2-paper", {"exit_layer": 2}).layers_of is None
    searching = load_settings(M2R2Settings, "m2r2", None, {"search": True})
    assert searching.search and not searching.segments
    assert not load_settings(M2R2Settings, "m2r2", "m2r2-paper", {}).segments
    own = tmp_path / "own.yaml"
    own.write_text("relative_rate: 1e-5\nsegments: [[1, 2]]\nfinal_projection: true\n")
    settings = load_settings(M2R2Settings, "m2r2", str(own), {"rank": 3, "seed": None})
    assert (settings.relative_rate, settings.segments, settings.rank) == (1e-5, ((1, 2),), 3)
    for values, message in (
        ({"relativ_rate": 1.0}, "did you mean 'relative_rate'"),
        ({"rank": "many"}, "setting 'rank' cannot be 'many'"),
        ({"rows": 0}, "setting 'rows' cannot be 0: input should be greater than 0"),
        ({"warmup": 0}, "setting 'warmup' cannot be 0"),
        ({"draft_vocab": -1}, "setting 'draft_vocab' cannot be -1: input should be greater than or equal to 0"),
        ({"clip": float("nan")}, "setting 'clip' cannot be nan"),
        ({"rows": True}, "setting 'rows' cannot be True"),
        ({"segments": [[1, "a"]]}, "setting 'segments.0.1' cannot be 'a'"),
        ({"steps": 3}, "either minutes or steps"),
    ):
        with pytest.raises(SpecDecError, match=message):
            from_mapping(M2R2Settings, values, "test")
    own.write_text("segments: [[1, 2]]\nsteps: 40\nminutes: null\n")
    longer = load_settings(M2R2Settings, "m2r2", str(own), {"minutes": 2.0})
    assert (longer.minutes, longer.steps) == (2.0, None)
    with pytest.raises(SpecDecError, match="either minutes or steps"):
        load_settings(M2R2Settings, "m2r2", str(own), {"minutes": 2.0, "steps": 3})
    with pytest.raises(SpecDecError, match="did you mean 'm2r2-paper'"):
        load_settings(M2R2Settings, "m2r2", "m2r2-papr", {})


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
    again = CliRunner().invoke(app, [*command, "--steps", "4", "--resume"])
    assert again.exit_code == 0, again.output
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["update"] == 4


def test_each_residual_runs_ahead_to_the_layer_that_its_rate_says() -> None:
    early, late = M2R2Path(6, (), False, 4, {0: ["mlp.up_proj"]}), M2R2Path(0, ((20, 24),), True, 4)
    assert early.target_layers(30) == [5, 10, 15, 20, 25, 30]
    assert dataclasses.replace(early, exits=(2,)).target_layers(30) == [
        15,
        30,
        9,
        16,
        23,
        30,
    ]  # p begins anew behind an exit
    assert late.target_layers(30) == [20, 21, 22, 23, 24, 30]
    assert M2R2Path(3, ((26, 28),), False, 4).target_layers(30) == [3, 26, 28, 30]
    for path in (*PATHS.values(), early, late):
        assert len(path.target_layers(30)) == path.num_residuals()


def test_windows_stay_within_the_context() -> None:
    target = training_target(tiny_model("gpt2"))  # with an embedding for each position
    answer = TrainingAnswer(tuple([5] * 4), tuple([7] * (target.context - 4)))
    wanted = states.Wanted((), (target.num_layers,))
    records = states._records(states._teach(target, [answer], wanted, lambda n: None), wanted)
    for rows in (windows(records, 64)[-1:], windows(records, 7)):
        batch = assemble(records, rows, 64, target.device)
        assert batch.positions[batch.valid].max() == target.context - 2
        assert torch.isfinite(target.embed(batch.ids, batch.positions)).all()


def test_alignment_brings_a_layer_before_the_exit_nearer_to_where_it_runs_ahead_to(
    answers: Path, tmp_path: Path
) -> None:
    paper = {"exit_layer": 2, "segments": [], "final_projection": False, "draft_steps": 1, "steps": 60}
    paper |= {"relative_rate": 0.1, "draft_vocab": 0}
    model, _ = loading.load("tiny")
    target, cosines = training_target(model), {}
    some = [a for a in data.read([answers]) if isinstance(a, TrainingAnswer)]
    for align in (0.0, 3.0):
        train(recipe(answers, tmp_path / f"{align}", align=align, **paper))
        folder = tmp_path / f"{align}"
        network = load_network(target, folder)
        aims = network.path.target_layers(4)
        assert aims == [2, 4]
        wanted = dataclasses.replace(wanted_states(network.path, 4), hidden=(2, 4))
        records = states._records(states._teach(target, some, wanted, lambda n: None), wanted)
        batch = assemble(records, windows(records, 8), 8, target.device)
        exits, _ = next(draft_steps(network, target, batch, 1, watched=True))
        pairs = zip(exits[-1][1], aims, strict=True)
        cosines[align] = [
            float(torch.cosine_similarity(p.detach(), batch.hidden[aim], -1)[batch.valid].mean()) for p, aim in pairs
        ]
    assert cosines[3.0][0] > cosines[0.0][0] + 0.1
    assert cosines[3.0][1] > cosines[0.0][1] - 0.01  # the exit, which KL brings there, too


def test_given_paths_scale_with_the_depth_of_the_model() -> None:
    target = ReferenceTarget(tiny_model())  # 4 layers, the paths were chosen on 30
    given = {"segments": [[20, 24]], "layers_of": 30}
    projected, paper = (
        path_of(load_settings(M2R2Settings, "m2r2", name, changes), target)
        for name, changes in (("m2r2", given), ("m2r2-paper", {}))
    )
    assert (projected.exit_layer, projected.segments) == (0, ((3, 4),))
    assert (paper.exit_layer, paper.segments) == (1, ())
    for layers, segment in ((1, (0, 1)), (2, (1, 2)), (12, (8, 10)), (24, (16, 19)), (30, (20, 24)), (60, (40, 48))):
        target.num_layers = layers
        target.linears = lambda layer: {"mlp.up_proj": (8, 8)}  # type: ignore[assignment, method-assign, return-value]
        path = path_of(load_settings(M2R2Settings, "m2r2", None, given), target)
        assert (path.exit_layer, path.segments, path.final_projection) == (0, (segment,), True)


def test_the_predicted_speedup_weighs_acceptance_against_measured_costs() -> None:
    costs = Costs({1: 10.0, 2: 11.0, 3: 12.0, 5: 14.0}, drafts=((1.0, 1.0),))
    # One draft: 1.5 tokens in 1 + 11 of 10 units; a second adds 0.4 tokens for 2 more; a third too little.
    assert predict([0.5, 0.4, 0.05], costs) == (pytest.approx(1.9 * 10 / 14), 2)
    assert predict([0.5], costs, nodes=[4]) == (1.0, 0)  # its tree costs 14 to score


# -- the layer search ---------------------------------------------------------------------------------------------


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of layers without timing."""
    score = {n: 1 + 0.02 * n for n in (1, 2, 4, 8)}
    costs = [Costs(score, ((0.1 * n, 0.1 * n),)) for n in (1, 2)]
    monkeypatch.setattr(search, "draft_costs", lambda *args: costs)


def test_the_search_chooses_the_path_of_largest_predicted_speedup_and_trains_it(
    answers: Path, tmp_path: Path, priced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(searched(answers, out))
    kept = json.loads((out / "search.json").read_text())
    assert {tuple(row["segment"]) for row in kept["table"]} == {(2, 3), (2, 4), (3, 4)}
    best = max(kept["table"], key=lambda row: row["speedup"])
    assert best["tokens"] == pytest.approx(evaluations(out)[0]["score"], abs=0.15)  # as the first evaluation finds it
    path = drafter_folder.read_config(out)["path"]
    assert path["segments"] == [kept["chosen"]] == [best["segment"]] and path["final_projection"]
    assert not (out / "states" / "search").exists()
    monkeypatch.setattr(search, "chains", None)  # nothing is searched again
    train(searched(answers, out), resume=True)


def test_by_default_the_end_of_the_path_alone_is_chosen(answers: Path, tmp_path: Path, priced: None) -> None:
    out = tmp_path / "out"
    given = {"begin": 20, "layers_of": 40, "segments": [], "search_tokens": 300, "steps": 2}  # of 4 layers: 2
    train(recipe(answers, out, **given))
    kept = json.loads((out / "search.json").read_text())
    assert {tuple(row["segment"]) for row in kept["table"]} == {(2, 3), (2, 4)}
    assert drafter_folder.read_config(out)["path"]["segments"] == [kept["chosen"]]


def test_drafts_of_the_search_are_those_of_a_network_that_training_fits(answers: Path, tmp_path: Path) -> None:
    target = training_target(tiny_model("llama", eos_token_id=None))
    some = [a for a in data.read([answers]) if isinstance(a, TrainingAnswer)]
    records = states.compute(tmp_path / "states", target, some, states.Wanted((2, 3), (2, 3, 4)))
    found = search.chains(target, None, 2, records, records, searched(answers, tmp_path / "out"))
    assert found.keys() == {(2, 3), (2, 4)}
    network = M2R2(M2R2Path(0, ((2, 4),), True), target)
    rows = windows(records, 8)
    batches = [assemble(records, rows[i : i + 4], 8, target.device) for i in range(0, len(rows), 4)]
    fit_projections(network, target, lambda: batches)
    with torch.no_grad():
        fitted = evaluate(network, target, batches)
    assert found[2, 4] == pytest.approx(fitted["chain"], abs=0.02)


def test_a_path_whose_later_drafts_fail_is_worth_what_is_accepted_of_it() -> None:
    """Cheap layers that agree in the first draft alone, against dear ones that go on: no training is assumed."""
    score = {n: 10.0 for n in (1, 2, 4, 8)}
    costs = [Costs(score, ((cost, cost),)) for cost in (0.1, 1.0)]
    chains = {(2, 3): [0.5, 0.1, 0.0, 0.0], (2, 4): [0.5, 0.4, 0.3, 0.2]}
    best, other = search.rank(chains, costs)
    assert best == search.SegmentCandidate((2, 4), 0.1, 2.4, pytest.approx(24 / 14, abs=1e-3), 4)
    assert other == search.SegmentCandidate((2, 3), 0.01, 1.6, pytest.approx(16 / 10.2, abs=1e-3), 2)


def test_the_search_measures_segments_of_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(target: Target, drafters: list[M2R2Drafter], verifier: Any) -> list[Costs]:
        assert all(drafter.shape.siblings is None for drafter in drafters)  # as users run them
        lengths = [hi - lo for drafter in drafters for lo, hi in drafter.network.path.segments]
        return [Costs({1: 10.0}, ((length + 1.0,) * 2,)) for length in lengths]

    monkeypatch.setattr(search, "measure", measured)
    costs = search.draft_costs(SpecDecoder(tiny_model("llama", num_hidden_layers=8), None, drafter="none"), None)
    assert [c.drafts[-1][1] for c in costs] == [2.0, 3.0, 4.0, 5.0]


def test_without_matplotlib_the_package_is_named_with_its_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = io.StringIO()
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "training.png", Console(file=out, width=200))
    assert "pip install 'specdec-m2r2[plot]'" in out.getvalue()
