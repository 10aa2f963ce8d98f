"""Finding and loading models, from a cache, folders and files that the tests write; no network."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_gguf import NAME, forbidden
from torch import nn
from transformers import AutoConfig

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, hub, identity, loading, prepare, source
from specdec.runtimes.select import make_target


@pytest.fixture
def folder(cache, tmp_path) -> Path:
    """A model folder: tiny random Llama, tokenizer of the fake embedded model."""
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    for path in prepare.prepare_embedded(NAME).glob("*token*"):
        shutil.copy(path, tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)]
)
def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(folder, given, expected):
    model, _ = loading.load(str(folder), dtype=given)
    assert model.dtype == expected
    assert model.config._attn_implementation == "sdpa"


def test_attention_falls_back_to_eager_where_sdpa_would_be_wrong(folder):
    tiny_model("gemma2").save_pretrained(folder)
    assert loading.load(folder)[0].config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name_or_path": "smolm2-135m-instruct"}, r"did you mean 'smollm2-135m-instruct'\?"),
        ({"name_or_path": "SmolLM2-135M-Instruct"}, r"did you mean 'smollm2-135m-instruct'\?"),
        ({"name_or_path": "someone/some-model"}, "not in the Hugging Face cache"),
        ({"name_or_path": "some model"}, "unknown model 'some model': .*; give an embedded model"),
        ({"name_or_path": ""}, "unknown model ''"),
        ({"name_or_path": "./nowhere"}, "no file or folder './nowhere'"),
        ({"name_or_path": "nowhere.gguf"}, "no file or folder 'nowhere.gguf'"),
        ({"name_or_path": __file__}, "is not a GGUF file"),
        ({"dtype": "bfloat17"}, r"unknown dtype 'bfloat17' \(did you mean 'bfloat16'\?\); known: auto, float32"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"device": "gpu"}, "unknown device 'gpu'; known: auto, cpu, cuda"),
        ({"device": "meta"}, "cannot compute in float32 on device 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is missing"),
        ({"revision": "v1"}, "a revision .* needs a Hugging Face id"),
    ],
)
def test_what_cannot_be_loaded_gets_one_line(monkeypatch, arguments, text):
    monkeypatch.setattr(source, "prepare_embedded", forbidden)  # nothing is downloaded before the arguments are checked
    with refused(text):
        loading.load(**{"name_or_path": catalogue.DEFAULT_MODEL, **arguments})


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without(key):
    return lambda folder: edit(folder, lambda tensors: tensors.pop(key))


def shortened(key):
    return lambda folder: edit(folder, lambda tensors: tensors.update({key: tensors[key][:5].clone()}))


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def foreign_code(folder):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (no_config, "config.json is missing, and there is no GGUF file"),
        (no_tokenizer, "has no usable tokenizer"),
        (pickled, "Weights are read from safetensors only"),
        (foreign_code, "pass trust_remote_code only if you trust"),
        (without(WEIGHT), f"do not fit its config.json: 1 missing or of another shape, such as '{WEIGHT}'"),
        (shortened(WEIGHT), "do not fit its config.json: 1 missing or of another shape"),
        (lambda f: os.truncate(f / "model.safetensors", 3000), "a safetensors file is truncated or broken"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: (f / "config.json").write_text('{"drafter": "m2r2"}'), "Unrecognized model"),
        (lambda f: AutoConfig.for_model("t5", d_model=8).save_pretrained(f), "is an encoder-decoder model"),
        (lambda f: AutoConfig.for_model("vit").save_pretrained(f), "AutoModelForCausalLM"),
    ],
)
def test_a_folder_that_cannot_be_loaded_gets_one_line(folder, damage, text):
    damage(folder)
    with refused(text):
        loading.load(folder)


def test_a_hugging_face_id_loads_from_its_cache_without_network(folder, tmp_path, monkeypatch):
    repository, commit = tmp_path / "hf/models--some--one", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("socket.socket.connect", forbidden)
    expected = identity.fingerprint(loading.load(folder)[0])
    assert identity.fingerprint(loading.load("some/one")[0]) == expected
    with pytest.raises(SpecDecError, match="'some/other' is not in the Hugging Face cache"):
        loading.load("some/other")


def test_weights_of_a_repository_come_once_the_config_is_wanted(folder, monkeypatch):
    def fetch(repository, revision, allow_patterns, **more):
        asked.append((repository, revision, "model*.safetensors" in allow_patterns))
        return str(folder)

    asked = []
    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(SpecDecError, match="not this one"):
        loading.load("some/one", revision="v1", check=Mock(side_effect=SpecDecError("not this one")))
    assert asked == [("some/one", "v1", False)]
    assert loading.load("some/one", revision="v1")[0].config._commit_hash == folder.name
    assert asked[1:] == [("some/one", "v1", False)]  # the weights are there
    (folder / "model.safetensors").rename(folder / "later")
    with pytest.raises(SpecDecError):
        loading.load("some/one", revision="v1")
    assert asked[2:] == [("some/one", "v1", False), ("some/one", folder.name, True)]


MISSING = RepositoryNotFoundError("404", response=Mock())
FILE, BY_HAND = "some/one:it.gguf", r"get https://huggingface.co/some/one/resolve/v1/it.gguf by hand and"


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "some/smolm2-135m",
            MISSING,
            r"unknown model 'some/smolm2-135m': .* no such folder or Hugging.* \(did you mean",
        ),
        ("some/one", None, r"if it holds GGUF files, name one of them: 'some/one:NAME'"),
        (FILE, MISSING, "unknown model 'some/one'"),
        (FILE, RevisionNotFoundError("404", response=Mock()), "'some/one' has no revision 'v1'"),
        (FILE, LocalEntryNotFoundError("no\nnetwork"), BY_HAND),
        (FILE, OSError("disk\nfull"), r"cannot download model 'some/one' \(disk full\)"),
        (FILE, None, r"'some/one' has no file 'it.gguf'"),
    ],
)
def test_what_a_repository_does_not_have_is_one_line(monkeypatch, tmp_path, name, error, text):
    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=error, return_value=str(tmp_path)))
    with refused(text):
        loading.load(name, revision="v1")


def test_a_public_name_is_never_a_path(tmp_path, monkeypatch):
    inside = tmp_path / f"models--org--name/snapshots/{'0' * 40}"
    for folder in (tmp_path / "mine", inside):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine")
    names = {".": "mine", str(tmp_path / "mine"): "mine", str(inside): "org/name"}
    names |= dict.fromkeys(("org/name", catalogue.DEFAULT_MODEL))
    assert {name: source.public_name(name) for name in names} == {name: told or name for name, told in names.items()}
    assert source.public_name("org/name", str(tmp_path / "mine")) == "org/name with mine"


@pytest.mark.parametrize("runtime", ["auto", "torch", "transformers"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(folder, runtime, value):
    model = loading.load(folder, dtype="float32" if runtime == "transformers" else "bfloat16")[0]
    model.model.layers[2].mlp.up_proj.weight[3, 5] = value
    with refused(r"the weights of '.*' are broken: 'model.layers.2.mlp.up_proj.weight' holds NaN"):
        make_target(model, runtime)


def test_logits_that_overflow_are_the_dtypes_fault(folder):
    model = loading.load(folder, dtype="float16")[0]
    model.lm_head.weight.mul_(1e5)
    with pytest.raises(SpecDecError, match=r"gives NaN or infinite logits in float16; load it in bfloat16 or float32"):
        make_target(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_fingerprint_does_not_depend_on_the_dtype(family):
    model = tiny_model(family, initializer_range=1e-5)  # many values that float16 holds with few bits only
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    fingerprint = identity.fingerprint(model)
    assert len(fingerprint) == 32
    dtypes = torch.bfloat16, torch.float32, torch.float16
    assert {identity.fingerprint(model.to(dtype)) for dtype in dtypes} == {fingerprint}


def test_fingerprint_does_not_depend_on_where_the_weights_lie():
    model = tiny_model("llama", tie_word_embeddings=True)
    fingerprint = identity.fingerprint(model)
    attention = model.model.layers[2].self_attn
    fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight]).T.contiguous().T  # and another memory order
    attention.q_proj.weight = nn.Parameter(fused[:32], requires_grad=False)
    attention.k_proj.weight = nn.Parameter(fused[32:], requires_grad=False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)  # tied no longer
    model.spare_head = model.lm_head  # a second name
    assert identity.fingerprint(model) == fingerprint


@pytest.mark.parametrize("change", ["scale", "swap", "rename", "layers"])
def test_fingerprint_tells_weights_apart(change):
    model = tiny_model("llama")
    fingerprint = identity.fingerprint(model)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    if change == "scale":
        first.up_proj.weight[-1].mul_(1.02)
    elif change == "swap":
        first.up_proj, second.up_proj = second.up_proj, first.up_proj
    elif change == "rename":
        first.upper_proj = first.up_proj  # keeps its place in the order of names
        del first.up_proj
    else:
        del model.model.layers[-1]
    assert identity.fingerprint(model) != fingerprint
