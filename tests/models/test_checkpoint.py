"""Mixtures whose experts stay in the checkpoint: the same model, the same logits, a fraction of the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_moe
from tiny_gguf import forbidden
from transformers import AutoModelForCausalLM, MixtralConfig

from specdec.base.errors import SpecDecError
from specdec.models import identity, loading
from specdec.runtimes.native import library

PROMPT = [5, 9, 11, 3, 7, 20, 31]
FORMS = ["matrices", "fused", "shards"]  # an expert's matrices apart, as published models have them, or fused


def saved(path: Path, kind: str, form: str) -> Path:
    """A float32 mixture on disk."""
    save_tiny_moe(path, kind, torch.float32)
    if form != "matrices":
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / "model.safetensors").unlink()
        several = form == "shards"
        model.save_pretrained(path, save_original_format=several, max_shard_size="40KB" if several else "1GB")
        assert (path / "model.safetensors").exists() != several
    return path


@pytest.fixture(
    scope="module",
    params=[(kind, form) for kind in ("mixtral", "olmoe", "qwen3_moe") for form in FORMS],
    ids="-".join,
)
def folder(request, tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"), *request.param)


@pytest.fixture
def mixtral(tmp_path) -> Path:
    return saved(tmp_path / "mixtral", "mixtral", "matrices")


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_loaded_without_its_experts_is_the_same_model(folder, dtype):
    whole, left = loading.load(folder, dtype=dtype)[0], loading.load(folder, dtype=dtype, experts=False)[0]
    own, found = dict(whole.named_parameters()), dict(left.named_parameters())
    assert own.keys() == found.keys()
    for name, value in own.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert found[name].is_meta == (".experts." in name)
        assert found[name].is_meta or torch.equal(found[name], value)
    for layer, other in zip(whole.model.layers, left.model.layers, strict=True):
        own, stored = layer.mlp.experts, other.mlp.experts
        for expert, pair in enumerate(zip(own.gate_up_proj, own.down_proj, strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(stored.read(expert), pair, strict=True))
    ids = torch.tensor([PROMPT])
    torch.testing.assert_close(left(ids).logits, whole(ids).logits, rtol=2e-2, atol=2e-2)
    assert identity.fingerprint(left) == identity.fingerprint(whole)
    assert left.config.to_dict() == whole.config.to_dict()
    assert left.generation_config.to_dict() == whole.generation_config.to_dict()


EXPERT = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}.3.w1.weight"), f"lacks a part of '{EXPERT}.gate_up_proj', or has it in several"),
        (lambda t: t.update({f"{EXPERT}.0.w2.weight": torch.zeros(5, 48)}), "lacks a part of .*down_proj"),
        (
            lambda t: [t.pop(f"{EXPERT}.5.w{i}.weight") for i in (1, 2, 3)],
            "do not fit its config.json: 2 missing or of",
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)], "do not fit its config.json: 2 missing or"),
        (lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"), "do not fit its config.json: 1 missing"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_one_line(mixtral, change, message):
    edit(mixtral, change)
    with pytest.raises(SpecDecError, match=message) as error:
        loading.load(mixtral, experts=False)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_ends_early_is_one_line(mixtral):
    model = loading.load(mixtral, experts=False)[0]
    os.truncate(mixtral / "model.safetensors", 30_000)
    with pytest.raises(SpecDecError, match="is truncated: it ends within its weights"):
        model(torch.tensor([PROMPT]))
    with pytest.raises(SpecDecError, match="a safetensors file is truncated or broken"):
        loading.load(mixtral, experts=False)
    (mixtral / "model.safetensors").unlink()
    with pytest.raises(SpecDecError, match=r"cannot read weights in .* No such file"):
        model(torch.tensor([PROMPT]))
    with pytest.raises(SpecDecError, match="Weights are read from safetensors only"):
        loading.load(mixtral, experts=False)


def test_experts_held_in_a_way_not_known_are_loaded_with_the_rest(mixtral):
    edit(mixtral, lambda tensors: tensors.update({"own.scale": torch.ones(1, dtype=torch.uint8)}))
    model = loading.load(mixtral, experts=False)[0]
    assert not any(p.is_meta for p in model.parameters())
    assert model(torch.tensor([PROMPT])).logits.isfinite().all()


def test_from_the_cache_of_hugging_face(mixtral, tmp_path, monkeypatch):
    repository, commit = tmp_path / "hf/models--some--one", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(mixtral, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("socket.socket.connect", forbidden)
    model = loading.load("some/one", experts=False)[0]
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    assert identity.fingerprint(model) == identity.fingerprint(loading.load(mixtral)[0])


# -- memory -----------------------------------------------------------------------------------------------------------

PEAKS = """
import json, sys
from pathlib import Path
from specdec import SpecDecoder
from specdec.models import loading

large, small = map(Path, sys.argv[1:])

def answer(**given):
    decoder = SpecDecoder.from_pretrained(large, "none", **given)
    print(decoder.generate(list(range(3, 60)), max_new_tokens=8).token_ids)

def peak(**given):
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    answer(**given)
    return status("VmHWM") - start

def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])

loading.load(small)  # what it needs is imported
print(json.dumps([peak(expert_cache=0.25), peak()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not library.runs(), reason="no native kernels here")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_experts_are_never_in_memory_all_at_once(mixtral, tmp_path):
    large = shutil.copytree(mixtral, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    config = MixtralConfig.from_pretrained(mixtral, hidden_size=512, intermediate_size=1024, num_local_experts=16)
    config.update({"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 8, "dtype": torch.bfloat16})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    rest = sum(p.nbytes for p in model.parameters()) - experts
    model.save_pretrained(large, max_shard_size="60MB")
    command = [sys.executable, "-c", PEAKS, large, mixtral]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    ours, own, peaks = map(json.loads, run.stdout.splitlines())
    paged, whole = (peak - rest for peak in peaks)
    assert ours == own
    assert whole > experts > 250e6  # the measure sees them
    assert paged < 0.7 * experts  # a quarter of them, those of a layer for the prompt, and what computing takes
