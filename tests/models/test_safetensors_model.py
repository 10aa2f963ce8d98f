"""Model folders without transformers' modelling classes: configs, weights, tokenizers and texts are those of it."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from passes import play
from refusals import refused
from safetensors.torch import load_file, save_file
from spies import noted
from targets import needs_native
from tiny import save_granite4, save_native, save_tiny_moe
from tiny_gguf import write_model
from tiny_tokenizers import special_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec.base import machine
from specdec.base.errors import SpecDecError
from specdec.models import families, identity, loading, prepare
from specdec.models.gguf.blocks import BlockExperts, densify
from specdec.models.native_model import NativeModel, as_transformers
from specdec.models.tokenizer import Tokenizer
from specdec.runtimes.native import library
from specdec.runtimes.native import target as native
from specdec.runtimes.select import make_target

MIXTURES = [kind for kind, family in families.FAMILIES.items() if family.fields >= families.EXPERTS]
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


def numbers(model: Any) -> dict[str, torch.Tensor]:
    """All parameters of a model, those of experts in a file, too."""
    own = dict(model.named_parameters())
    own |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")}
    for path, module in model.named_modules():
        if isinstance(module, BlockExperts):
            pairs = zip(*map(module.expert, range(len(module.down))), strict=True)
            named = zip(("gate_up_proj", "down_proj"), pairs, strict=True)
            own |= {f"{path}.{n}": torch.stack(each) for n, each in named}
    return own


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_model_of_a_folder_is_that_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_native(tmp_path / "it", family)
    model, tokenizer = loading.load(folder)
    expected = theirs(folder)
    assert isinstance(model, NativeModel) and isinstance(tokenizer, Tokenizer)
    own, other = numbers(model), numbers(expected)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert identity.fingerprint(model) == identity.fingerprint(expected)
    ids = torch.arange(5, 25)[None]
    if family in MIXTURES:
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=2e-2, atol=2e-2)
    else:
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert tokenizer("Hello there").input_ids == AutoTokenizer.from_pretrained(folder)("Hello there").input_ids
    if library.runs():
        target, note = make_target(model)
        assert target.runtime == "native", note


def test_a_dense_granite_4_is_a_granite(tmp_path: Path) -> None:
    """Its checkpoint has the type of the hybrids, and gate and up in one tensor."""
    folder = save_granite4(tmp_path / "it")
    model, _ = loading.load(folder)
    assert isinstance(model, NativeModel) and model.config.model_type == "granite"
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, theirs(folder)(ids).logits)
    if library.runs():
        target, note = make_target(model)
        assert target.runtime == "native", note
    wide, _ = loading.load(folder, dtype="float32")  # as training does
    assert isinstance(wide, NativeModel) and identity.fingerprint(wide) == identity.fingerprint(model)
    assert torch.allclose(wide(ids).logits, theirs(folder, torch.float32)(ids).logits, atol=1e-5)
    assert make_target(wide)[0].runtime == "torch"


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["linear_attention", "full_attention"] * 2},
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"position_embedding_type": None},
        {"attention_gate": "sigmoid"},  # unknown
    ],
)
def test_other_models_of_that_type_run_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, _ = loading.load(save_granite4(tmp_path / "it", **changes))
    assert type(model).__name__ == "GraniteMoeHybridForCausalLM"
    with pytest.raises(SpecDecError, match="is unknown to the native runtime"):
        make_target(model, "native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_another_dtype_are_made_once(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_native(tmp_path / "it", "qwen2", dtype, tie_word_embeddings=True)
    model = loading.load(folder, dtype="bfloat16")[0]
    expected = theirs(folder)
    assert isinstance(model, NativeModel) and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, expected.get_parameter(name)) for name, value in model.named_parameters())
    assert bool(model.origin.made) == (dtype != torch.bfloat16)  # type: ignore[union-attr]
    for name, matrix in model.named_parameters():
        assert matrix.dim() == 1 or model.origin.place(matrix) is not None, name  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gpt_oss"])
def test_memory_is_checked_for_what_is_made(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_native(tmp_path / "it", family, torch.float16)
    need = sum(value.nbytes for _, value in loading.load(folder, dtype="bfloat16")[0].named_parameters())
    monkeypatch.setattr(machine, "available_memory", lambda: need - 1)
    with pytest.raises(SpecDecError, match="not enough memory for"):
        loading.load(folder, dtype="bfloat16")
    monkeypatch.setattr(machine, "available_memory", lambda: need)
    loading.load(folder, dtype="bfloat16")


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


def test_so_are_other_dtypes_and_code_of_a_models_own(folder: Path) -> None:
    for given, how in ((folder, {"dtype": "float32"}), (folder, {"trust_remote_code": True})):
        assert isinstance(loading.load(given, **how)[0], PreTrainedModel)  # type: ignore[arg-type]
    assert not entries(folder)


FORMS = ["matrices", "fused", "shards"]  # an expert's matrices apart, as published models have them, or fused


def saved(path: Path, family: str, form: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    save_tiny_moe(path, family, dtype)
    if form != "matrices":
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / WEIGHTS).unlink()
        several = form == "shards"
        model.save_pretrained(path, save_original_format=several, max_shard_size="40KB" if several else "1GB")
        assert (path / WEIGHTS).exists() != several
    return path


@pytest.mark.parametrize(
    ("family", "form"), [*(("mixtral", form) for form in FORMS), ("olmoe", "matrices"), ("qwen3_next", "fused")]
)
def test_experts_stay_in_the_files_in_each_form(tmp_path: Path, family: str, form: str) -> None:
    folder = saved(tmp_path / "it", family, form)
    model, expected = loading.load(folder)[0], theirs(folder)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(model, NativeModel) and isinstance(experts, BlockExperts)
    for matrix in (*experts.gate_up[3], experts.down[3]):
        assert any(matrix.data.untyped_storage().data_ptr() == part.data_ptr() for part in model.origin.maps)
    own, other = numbers(model), numbers(expected)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    assert identity.fingerprint(model) == identity.fingerprint(expected)
    dense = as_transformers(model)
    densify(dense)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(dense(ids).logits, expected(ids).logits)


@needs_native
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_kernels_take_experts_from_the_files(tmp_path: Path, family: str) -> None:
    folder = save_native(tmp_path / "it", family)
    own, whole = (make_target(model, "native")[0] for model in (loading.load(folder)[0], theirs(folder)))
    for found, expected in zip(play(own), play(whole), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_of_another_dtype_are_rounded_as_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "it", "olmoe", "matrices", dtype)
    model, expected = loading.load(folder, dtype="bfloat16")[0], theirs(folder)
    assert isinstance(model, NativeModel)
    own, other = numbers(model), numbers(expected)
    assert all(torch.equal(own[name], other[name]) for name in other)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, BlockExperts) and {each.kind for each in experts.down} <= {"F32", "F16"}


EXPERT = "model.layers.1.block_sparse_moe.experts"
LACKING = [
    lambda t: t.pop(f"{EXPERT}.3.w1.weight"),
    lambda t: t.update({f"{EXPERT}.0.w2.weight": torch.zeros(5, 48)}),
    lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"),
]


@pytest.mark.parametrize("change", LACKING)
def test_a_mixture_that_lacks_something_is_one_line(tmp_path: Path, change: Any) -> None:
    folder = save_tiny_moe(tmp_path / "it")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with refused(r"do not fit its config.json|cannot load model"):
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


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_config_that_is_changed_in_its_place_is_read_again(folder: Path, tmp_path: Path, kind: str) -> None:
    """Though the file has its earlier size and time."""
    edit(folder, rms_norm_eps=0.25)
    place = file = folder / "config.json"
    before, after = b"0.25", b"0.75"
    if kind == "folder":
        place = folder
    else:
        place = file = write_model(tmp_path / "it.gguf", "qwen2", "Q8_0", 128, tied=True)
        before, after = (struct.pack("<f", value) for value in (loading.load(place)[0].config.rms_norm_eps, 0.75))
    assert loading.load(place)[0].config.rms_norm_eps != 0.75
    times, content = file.stat(), file.read_bytes()
    assert before in content
    with file.open("rb+") as opened:
        opened.write(content.replace(before, after, 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert loading.load(place)[0].config.rms_norm_eps == 0.75


@needs_native
def test_a_changed_config_is_checked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = noted(monkeypatch, native, "check_logits", lambda target: None)
    for _ in range(2):
        make_target(loading.load(folder)[0])
    edit(folder, rms_norm_eps=0.25)
    make_target(loading.load(folder)[0])
    assert len(checks) == 2


def test_without_a_place_for_its_entry_transformers_loads_it(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prepare, "work_folder", Mock(side_effect=OSError(30, os.strerror(30))))
    assert isinstance(loading.load(folder)[0], PreTrainedModel)
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Read-only file system; set SPECDEC_CACHE to use another folder" in said


def test_a_rotary_embedding_that_nothing_knows_is_one_sentence(tmp_path: Path) -> None:
    folder = save_native(tmp_path / "it", "qwen3")
    edit(folder, rope_parameters={"rope_type": "su", "rope_theta": 1e4})
    with refused(r"transformers cannot read the config of this qwen3 model \(KeyError: 'su'\)"):
        make_target(loading.load(folder)[0])


def test_what_the_native_runtime_refuses_runs_in_others_as_before(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = save_native(tmp_path / "it", rope_parameters=rope, max_position_embeddings=64)
    (model, _), expected = loading.load(folder), theirs(folder)
    target, note = make_target(model)
    assert target.runtime != "native" and "rotary" in note
    ids = torch.arange(5, 25)[None]
    assert torch.equal(target.model(ids).logits, expected(ids).logits)
