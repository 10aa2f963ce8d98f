"""On a CUDA device, where there is one: what stand-ins on a CPU cannot show. Skipped elsewhere."""

import gc
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from sampled import AcceptsAll, fit, small
from tiny import save_tiny, tiny_model
from training import checkpoint_of
from typer.testing import CliRunner

from specdec import SpecDecoder
from specdec.cli import app
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.layer_skip import LayerSkipDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.runtimes.torch import static_cache
from specdec.runtimes.torch.graphs import CapturedTarget
from specdec.runtimes.transformers import TransformersTarget

DEVICE = torch.device("cuda:0")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device at most")
ROWS = 12  # tokens


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    return model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("runtime", ["transformers", "torch"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "mixtral", "qwen3_next"])
def test_every_drafter_returns_the_models_own_tokens(runtime: str, family: str) -> None:
    model = tiny_model(family).to(DEVICE)
    expected = [generated(model, prompt, ROWS) for prompt in zoo.PROMPTS]
    decoder = SpecDecoder(model, drafter="none", runtime=runtime)
    assert decoder.target.runtime == runtime
    for name, drafter in zoo.every(decoder.target).items():
        if not name.startswith("draft-model"):  # the second model of those is on the CPU
            for _ in range(2):  # what was recorded, and again
                made = decoder.with_drafter(drafter).generate_batch(zoo.PROMPTS, max_new_tokens=ROWS)
                assert [each.token_ids for each in made] == expected, name


def test_a_second_model_drafts() -> None:
    model = tiny_model("llama").to(DEVICE)
    drafter = DraftModelDrafter(TransformersTarget(tiny_model("llama").to(DEVICE)))
    decoder = SpecDecoder(model, drafter=drafter)
    out = decoder.generate(zoo.PROMPTS[0], max_new_tokens=ROWS, num_speculative_tokens=3)
    assert out.token_ids == generated(model, zoo.PROMPTS[0], ROWS)
    assert out.metrics.draft_acceptance_rate > 0.7


def test_sampling_follows_the_model_and_a_liar_is_caught() -> None:
    target = TransformersTarget(small("llama").to(DEVICE))
    p = {name: fit(target, drafter) for name, drafter in zoo.every(target).items() if "draft-model" not in name}
    assert min(p.values()) > 1e-4 > fit(target, LayerSkipDrafter([1]), verifier=AcceptsAll()), p


def test_in_bfloat16_every_other_token_is_a_near_tie(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    command = ["verify", "--model", str(folder), "--drafter", "prompt-lookup", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [*command, "--device", "cuda", "--runtime", "torch"])
    assert result.exit_code == 0, result.output


@torch.inference_mode()
def test_captured_passes_are_few_and_their_cache_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SpecDecoder(tiny_model("llama").to(DEVICE), drafter=PromptLookupDrafter())
    target = decoder.target
    assert isinstance(target, CapturedTarget) and target.static is not None
    target.captured_functions.clear()
    for rows in (1, 2, 3, 1):
        decoder.generate_batch(zoo.PROMPTS[:rows], max_new_tokens=ROWS)
    assert 0 < len(target.captured_functions) <= 24
    monkeypatch.setattr(static_cache, "KEPT", 0)
    decoder.generate(zoo.PROMPTS[0], max_new_tokens=ROWS)
    gc.collect()
    assert target.static.whole is None


def test_the_benchmark_runs(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    command = ["bench", "--model", str(folder), "--drafters", "hf,none,prompt-lookup", "--device", "cuda"]
    result = CliRunner().invoke(app, [*command, "--prompts", str(tmp_path / "prompts.txt"), "--limit", "2"])
    assert result.exit_code == 0, result.output


@several
def test_the_second_device_records_its_own_passes() -> None:
    model = tiny_model("llama").to("cuda:1")
    decoder = SpecDecoder(model, drafter=PromptLookupDrafter())
    assert decoder.target.runtime == "torch"
    for _ in range(2):
        out = decoder.generate(zoo.PROMPTS[0], max_new_tokens=ROWS)
        assert out.token_ids == generated(model, zoo.PROMPTS[0], ROWS)


SMALL = "draft_vocab: 50\nrows: 4\nwindow: 8\nmax_new_tokens: 12\neval_fraction: 0.2\n"
OWN = {
    "m2r2": "segments: [[2, 4]]\nfinal_projection: true\nrank: 2\n",
    "medusa": "",
    "deed": "exits: [1, 2, 3]\n",
    "mixture-of-depths": "",
}


def training(method: str, tmp_path: Path, *more: str) -> list[str]:
    if not (tmp_path / "model").exists():
        save_tiny(tmp_path / "model")
    draw, prompts = random.Random(0), tmp_path / "prompts.txt"
    prompts.write_text("".join(f"question {draw.randrange(1000)}\n" for _ in range(24)))
    preset = tmp_path / "preset.yaml"
    preset.write_text(OWN[method] + SMALL)
    command = ["train", method, "--model", str(tmp_path / "model"), "--prompts", str(prompts)]
    return [*command, "--preset", str(preset), "--device", "cuda", *more]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", OWN)
def test_what_is_trained_there_drafts(method: str, dtype: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = training(method, tmp_path, "--dtype", dtype)
    result = CliRunner().invoke(app, [*command, "--output", str(output), "--steps", "20"])
    assert result.exit_code == 0, result.output
    tensors = load_file(output / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values() if tensor.is_floating_point())
    given = str(tmp_path / "model"), {"dtype": "float32", "device": "cuda"}
    decoders = (SpecDecoder.from_pretrained(given[0], drafter, **given[1]) for drafter in (str(output), "none"))
    drafted, plain = (each.generate("hello", max_new_tokens=24, num_speculative_tokens=2) for each in decoders)
    assert drafted.token_ids == plain.token_ids and drafted.metrics.num_draft_tokens


def launched(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "specdec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@several
def test_two_devices_train_the_weights_of_one(tmp_path: Path) -> None:
    for processes in (1, 2):
        command = training("m2r2", tmp_path, "--dtype", "float32", "--steps", "12")
        run = launched(processes, [*command, "--output", str(tmp_path / str(processes))])
        assert run.returncode == 0, run.stderr
    one, two = (checkpoint_of(tmp_path / str(n)) for n in (1, 2))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-2, atol=1e-4)
