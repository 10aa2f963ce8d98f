"""Mixtures loaded without their experts: the same model, the same tokens, a fraction of the memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import greedy_reference, save_tiny_moe
from tiny_gguf import forbidden
from transformers import AutoModelForCausalLM, MixtralConfig

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.models import checkpoint, identity, loading
from specdec.runtimes.experts import packed, tiers
from specdec.runtimes.experts.layers import moe_layers
from specdec.runtimes.experts.offload import ExpertOptions

PROMPT, COUNT = [5, 9, 11, 3, 7, 20, 31], 24
FORMS = ["matrices", "fused", "shards"]  # an expert's matrices apart, as published models have them, or fused


def saved(path: Path, kind: str, form: str) -> Path:
    """A float32 mixture on disk."""
    save_tiny_moe(path, kind)
    if form != "matrices":
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / "model.safetensors").unlink()
        several = form == "shards"
        model.save_pretrained(path, save_original_format=several, max_shard_size="40KB" if several else "1GB")
        assert (path / "model.safetensors").exists() != several
    return path


@pytest.fixture(
    scope="module",
    params=[(kind, form) for kind in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe") for form in FORMS],
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


@contextmanager
def unread() -> Iterator[None]:
    """Meanwhile no expert is read from a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Span, "numbers", forbidden)
        yield


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_model_loaded_without_its_experts_is_the_same_model(folder, dtype):
    whole, left = loading.load(folder, dtype=dtype)[0], loading.load(folder, dtype=dtype, experts=False)[0]
    own, found = dict(whole.named_parameters()), dict(left.named_parameters())
    assert own.keys() == found.keys()
    for name, value in own.items():
        assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype)
        assert found[name].is_meta == (".experts." in name)
        assert found[name].is_meta or torch.equal(found[name], value)
    for a, b in zip(moe_layers(whole), moe_layers(left), strict=True):
        for expert, (gate_up, down) in enumerate(zip(a.experts.gate_up_proj, a.experts.down_proj, strict=True)):
            parts = torch.empty_like(gate_up), torch.empty_like(down)
            b.read(expert, *parts)
            assert torch.equal(parts[0], gate_up) and torch.equal(parts[1], down)
    assert identity.fingerprint(left) == identity.fingerprint(whole)
    assert left.config.to_dict() == whole.config.to_dict()
    assert left.generation_config.to_dict() == whole.generation_config.to_dict()


def test_tokens_are_those_of_the_model_in_memory(folder, tmp_path):
    whole, left = loading.load(folder)[0], loading.load(folder, experts=False)[0]
    index = packed.pack(moe_layers(left), identity.fingerprint(left), tmp_path)
    assert index == packed.pack(moe_layers(whole), identity.fingerprint(whole), tmp_path / "whole")
    with unread():
        decoder = SpecDecoder(left, None, "none", experts=ExpertOptions(2 / 6, "residual", tmp_path))
        assert decoder.generate(PROMPT, max_new_tokens=COUNT).token_ids == greedy_reference(whole, PROMPT, COUNT)
        decoder.close()


def test_closed_it_is_without_experts_again(mixtral, tmp_path):
    options = ExpertOptions(0.5, folder=tmp_path)
    packed.pack(moe_layers(model := loading.load(mixtral, experts=False)[0]), identity.fingerprint(model), tmp_path)
    decoder = SpecDecoder.from_pretrained(mixtral, "none", experts=options)
    model, mark = decoder.model, decoder.target.fingerprint
    own = decoder.generate(PROMPT, max_new_tokens=COUNT).token_ids
    decoder.close()
    assert all(p.is_meta for name, p in model.named_parameters() if ".experts." in name)
    with pytest.raises(SpecDecError, match="was loaded without its experts"):
        model(torch.tensor([PROMPT]))
    again = SpecDecoder(model, None, "none", experts=options)
    assert again.target.fingerprint == mark and again.generate(PROMPT, max_new_tokens=COUNT).token_ids == own
    again.close()


def test_a_packed_file_of_a_model_that_differs_in_one_expert_only_is_refused(mixtral, tmp_path):
    model = loading.load(mixtral, experts=False)[0]
    packed.pack(moe_layers(model), identity.fingerprint(model), tmp_path)
    name = "model.layers.2.block_sparse_moe.experts.5.w2.weight"
    edit(mixtral, lambda tensors: tensors[name].mul_(1.5))
    with pytest.raises(SpecDecError, match=r"those of a model with fingerprint .* pack this model, or load that one"):
        SpecDecoder.from_pretrained(mixtral, "none", experts=ExpertOptions(0.5, folder=tmp_path))


def unsampled(tensors) -> None:
    """Change one number, which no fingerprint looks at."""
    tensors["model.layers.2.block_sparse_moe.experts.5.w2.weight"][7, 3] += 0.5


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/experts"


def packed_number(folder: Path) -> float:
    """What ``unsampled`` changes, as it is packed."""
    index = packed.open_index(folder)
    tier, memory = tiers.DiskTier(folder, index), tiers.aligned(1, index.stride)[0]
    tier.read(2 * 6 + 5, memory, 0, index.stride)
    tier.close()
    return float(index.views(memory)[1][7, 3])


def test_an_edit_that_the_fingerprint_does_not_see_is_packed_anew(mixtral, cache, capsys):
    def number() -> float:
        SpecDecoder.from_pretrained(mixtral, "none", experts=ExpertOptions(0.5)).close()
        (folder,) = cache.iterdir()  # the old one does not stay
        return packed_number(folder)

    before, mark = number(), identity.fingerprint(loading.load(mixtral)[0])
    said = capsys.readouterr().err
    assert f"Packing the experts of {mixtral} (0 MB) into {cache}" in said and "once" in said
    number()
    assert "Packing" not in capsys.readouterr().err
    edit(mixtral, unsampled)
    assert identity.fingerprint(loading.load(mixtral)[0]) == mark
    assert number() == before + 0.5


def test_an_edit_in_memory_is_packed_anew(mixtral, cache):
    model, marks = loading.load(mixtral)[0], []
    for _ in range(2):
        own = greedy_reference(model, PROMPT, COUNT)
        decoder = SpecDecoder(model, None, "none", experts=ExpertOptions(0.5))
        assert decoder.generate(PROMPT, max_new_tokens=COUNT).token_ids == own
        marks.append(packed_number(decoder.target.experts.folder))
        decoder.close()
        moe_layers(model)[2].experts.down_proj[5, 7, 3] += 0.5
    assert marks[1] == marks[0] + 0.5


def test_a_folder_packed_before_an_edit_is_refused_and_one_of_a_copy_is_taken(mixtral, tmp_path):
    model, options = loading.load(mixtral, experts=False)[0], ExpertOptions(0.5, folder=tmp_path / "packed")
    packed.pack(moe_layers(model), identity.fingerprint(model), options.folder)
    copied = Path(shutil.copytree(mixtral, tmp_path / "copy"))
    SpecDecoder.from_pretrained(copied, "none", experts=options).close()
    layers = moe_layers(loading.load(copied, experts=False)[0])
    assert packed.open_index(options.folder).source == packed.origin(layers).state  # compared once
    edit(mixtral, unsampled)
    with pytest.raises(SpecDecError, match=r"not those of the loaded model: expert 5 of layer 2 differs; pack"):
        SpecDecoder.from_pretrained(mixtral, "none", experts=options)


def test_what_is_refused_is_refused_before_anything_is_packed(mixtral, cache, monkeypatch, capsys):
    for options in (ExpertOptions(0.1), ExpertOptions(0.5, "m2r2")):
        with pytest.raises(SpecDecError, match=r"holds 0 experts|no expert predictor"):
            SpecDecoder.from_pretrained(mixtral, "none", experts=options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=99_999))
    with pytest.raises(SpecDecError, match=r"^not enough disk space in .* MB needed for the packed experts, 0 MB free"):
        SpecDecoder.from_pretrained(mixtral, "none", experts=ExpertOptions(0.5))
    assert not list(cache.rglob("*experts*"))


def test_a_foreign_index_is_left_alone(mixtral, tmp_path):
    model = loading.load(mixtral, experts=False)[0]
    (tmp_path / packed.INDEX).write_text('["theirs"]')
    with pytest.raises(SpecDecError, match=r"experts.json' was not made by specdec; move it away"):
        packed.pack(moe_layers(model), identity.fingerprint(model), tmp_path)
    assert (tmp_path / packed.INDEX).read_text() == '["theirs"]'


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


def test_a_checkpoint_that_ends_early_is_one_line(mixtral, tmp_path):
    model = loading.load(mixtral, experts=False)[0]
    os.truncate(mixtral / "model.safetensors", 30_000)
    with pytest.raises(SpecDecError, match="is truncated: it ends within its weights"):
        packed.pack(moe_layers(model), "f", tmp_path)
    with pytest.raises(SpecDecError, match="a safetensors file is truncated or broken"):
        loading.load(mixtral, experts=False)
    (mixtral / "model.safetensors").unlink()
    with pytest.raises(SpecDecError, match=r"cannot read weights in .* No such file"):
        packed.pack(moe_layers(model), "f", tmp_path)
    with pytest.raises(SpecDecError, match="Weights are read from safetensors only"):
        loading.load(mixtral, experts=False)
    assert not list(tmp_path.glob("*experts*"))


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
    assert moe_layers(model)[0].experts.gate_up_proj.is_meta
    assert identity.fingerprint(model) == identity.fingerprint(loading.load(mixtral)[0])


# -- memory -----------------------------------------------------------------------------------------------------------

PEAKS = """
import json, sys
from pathlib import Path
from specdec import SpecDecoder
from specdec.models import identity, loading
from specdec.runtimes.experts import packed, tiers
from specdec.runtimes.experts.layers import moe_layers
from specdec.runtimes.experts.offload import ExpertOptions

large, small, folder = map(Path, sys.argv[1:])

def pack():
    model, _ = loading.load(large, experts=False)
    packed.pack(moe_layers(model), identity.fingerprint(model), folder)

def offloaded():
    answer(SpecDecoder.from_pretrained(large, "none", experts=ExpertOptions(0.25, "residual", folder)))

def whole():
    answer(SpecDecoder.from_pretrained(large, "none", runtime="reference"))

def answer(decoder):
    print(decoder.generate(list(range(3, 60)), max_new_tokens=8).token_ids)

def peak(work):
    Path("/proc/self/clear_refs").write_text("5")
    start = status("VmRSS")
    work()
    return status("VmHWM") - start

def status(name):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])

loading.load(small)  # what it needs is imported
print(json.dumps([peak(pack), peak(offloaded), peak(whole)]))
"""


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
    command = [sys.executable, "-c", PEAKS, large, mixtral, tmp_path / "packed"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    ours, own, peaks = map(json.loads, run.stdout.splitlines())
    pack, offloaded, whole = (peak - rest for peak in peaks)
    assert ours == own
    assert whole > experts > 250e6  # the measure sees them
    assert pack < experts / 8 and offloaded < experts / 2  # a quarter of them, and what computing takes
