"""Model folders without transformers' modelling classes: configs, weights, tokenizers and texts are those of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_native, save_tiny_moe
from tiny_tokenizers import special_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.models import families, identity, loading, prepare
from specdec.models.native_model import NativeModel
from specdec.models.tokenizer import Tokenizer
from specdec.runtimes.native import library
from specdec.runtimes.select import make_target

DENSE = [kind for kind, family in families.FAMILIES.items() if not family.fields >= families.EXPERTS]
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_native(tmp_path / "it")


def entries(folder: Path) -> list[Path]:
    return [*folder.parent.glob("cache/models/*")]


def theirs(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def edit(folder: Path, name: str = "config.json", **fields: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("family", DENSE)
def test_the_model_of_a_folder_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_native(tmp_path / "it", family)
    model, tokenizer = loading.load(folder)
    expected = theirs(folder)
    assert isinstance(model, NativeModel) and isinstance(tokenizer, Tokenizer)
    own, other = model.state_dict(), expected.state_dict()
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert identity.fingerprint(model) == identity.fingerprint(expected)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert tokenizer("Hello there").input_ids == AutoTokenizer.from_pretrained(folder)("Hello there").input_ids
    if library.runs():
        target, note = make_target(model)
        assert target.runtime == "native", note


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_are_made_once(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_native(tmp_path / "it", "qwen2", dtype, tie_word_embeddings=True)
    model = loading.load(folder, dtype="bfloat16")[0]
    expected = theirs(folder)
    assert isinstance(model, NativeModel) and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in model.named_parameters())
    assert bool(model.origin.made) == (dtype != torch.bfloat16)  # type: ignore[union-attr]
    for name, matrix in model.named_parameters():
        assert matrix.dim() == 1 or model.origin.place(matrix) is not None, name  # type: ignore[union-attr]


def test_texts_are_the_same_on_either_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts() -> list[str]:
        decoder = SpecDecoder.from_pretrained(folder, "prompt-lookup")
        assert isinstance(decoder.model, kind)
        options = {"max_new_tokens": 24, "ignore_eos": True}
        greedy = decoder.generate("abc abc ab", **options)
        return [greedy.text, decoder.generate("abc", temperature=0.8, seed=3, **options).text]

    kind: type = NativeModel
    first, again = texts(), texts()
    monkeypatch.setattr("specdec.models.safetensors_model.is_supported", lambda *given: False)
    kind = PreTrainedModel
    assert first == again == texts()


def test_the_weights_of_several_files_are_found_and_those_of_no_parameter_are_not_read(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, places = sorted(tensors), dict[str, str]()
    for part in range(3):
        own = {name: tensors[name] for name in names[part::3]}
        own |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if part == 1 else {}
        save_file(own, folder / f"model-{part}.safetensors", {"format": "pt"})
        places |= dict.fromkeys(own, f"model-{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    model = loading.load(folder)[0]
    assert isinstance(model, NativeModel) and len(model.origin.paths) == 3  # type: ignore[union-attr]
    assert all(torch.equal(value, tensors[name]) for name, value in model.named_parameters())


def other_head(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit(folder, tie_word_embeddings=True)


def several_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder, "tokenizer_config.json", chat_template=[{"name": "default", "template": "a"}] * 2)


def joins_words(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", clean_up_tokenization_spaces=True)


UNUSUAL = [other_head, several_templates, joins_words]


@pytest.mark.parametrize("change", UNUSUAL)
def test_what_is_unusual_is_loaded_by_transformers(folder: Path, change: Any) -> None:
    change(folder)
    model, tokenizer = loading.load(folder)
    expected = theirs(folder)
    assert (isinstance(model, PreTrainedModel) and not isinstance(tokenizer, Tokenizer)) or change is other_head
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in model.named_parameters())


def test_so_are_mixtures_other_dtypes_and_code_of_a_models_own(folder: Path, tmp_path: Path) -> None:
    for given, how in ((folder, {"dtype": "float32"}), (folder, {"trust_remote_code": True})):
        assert isinstance(loading.load(given, **how)[0], PreTrainedModel)  # type: ignore[arg-type]
    assert isinstance(loading.load(save_tiny_moe(tmp_path / "mixture"))[0], PreTrainedModel)
    assert not entries(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    tensors, name = load_file(folder / WEIGHTS), "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        SpecDecError, match=f"do not fit its config.json: 1 missing or of another shape, such as '{name}'"
    ):
        loading.load(folder)


def test_a_changed_config_or_tokenizer_is_read_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loading.load(folder)
    edit(folder, rms_norm_eps=0.25)
    shutil.copy(folder / WEIGHTS, folder.parent / "same")
    assert loading.load(folder)[0].config.rms_norm_eps == 0.25
    special_tokenizer("joined").save_pretrained(folder)
    assert loading.load(folder)[1].eos_token == "<|end|>"
    assert capsys.readouterr().err.replace("\n", " ").count("the files of the model have changed") == 2
    assert len(entries(folder)) == 1


@pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")
def test_a_changed_config_is_checked_again(folder: Path) -> None:
    first = make_target(loading.load(folder)[0])[0]
    edit(folder, rms_norm_eps=0.25)
    again = make_target(loading.load(folder)[0])[0]
    assert first.logit_difference != again.logit_difference  # type: ignore[attr-defined]


def test_without_a_place_for_its_entry_transformers_loads_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*given: Any) -> Any:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(prepare, "work_folder", refuse)
    assert isinstance(loading.load(folder)[0], PreTrainedModel)
    assert "Read-only file system; set SPECDEC_CACHE to use another folder" in capsys.readouterr().err.replace(
        "\n", " "
    )


WITHOUT = """
import sys
sys.modules["transformers"] = None  # an import raises
from specdec import SpecDecoder
decoder = SpecDecoder.from_pretrained(sys.argv[1], learn=False)
print(len(decoder.generate([{"role": "user", "content": "Hello"}], max_new_tokens=4, ignore_eos=True).token_ids))
"""


@pytest.mark.skipif(not library.runs(), reason="there are no native kernels here")
def test_later_processes_import_no_transformers(folder: Path) -> None:
    SpecDecoder.from_pretrained(folder, "none")
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(folder)], capture_output=True, text=True)
    assert run.stdout == "4\n", run.stderr


def test_what_the_native_runtime_refuses_runs_in_others_as_before(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = save_native(tmp_path / "it", rope_parameters=rope, max_position_embeddings=64)
    (model, _), expected = loading.load(folder), theirs(folder)
    target, note = make_target(model)
    assert target.runtime != "native" and "rotary" in note
    ids = torch.arange(5, 25)[None]
    assert torch.equal(target.model(ids).logits, expected(ids).logits)
