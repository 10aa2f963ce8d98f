"""LoRA adapters that are merged into a model when it is loaded: of PEFT and of GGUF files, all made by the tests."""

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from lora import PARTS, save_lora
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_gguf import finish, write_model
from torch import nn

from specdec import SpecDecError, SpecDecoder
from specdec.models import adapter as adapters
from specdec.models import identity, loading
from specdec.models.drafter_folder import check_base, describe_base
from specdec.models.gguf.blocks import BlockLinear
from specdec.models.names import adapter_place
from specdec.runtimes.native import library


@pytest.fixture
def base(cache: SimpleNamespace, tmp_path: Path) -> Path:
    """A GGUF model in blocks."""
    return write_model(tmp_path / "base.gguf", "llama", "Q4_0", 128)


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    save_lora(tmp_path / "lora", loading.load(base)[0])
    return tmp_path / "lora"


def text(model: Path | str, adapter: Path | None = None, drafter: str = "none", **how: Any) -> list[list[int]]:
    decoder = SpecDecoder.from_pretrained(model, drafter, device="cpu", adapter=adapter, **how)
    prompts = [[3, 5, 7, 3, 5, 7], [9, 4, 9, 4], [11]]
    return [row.token_ids for row in decoder.generate_batch(prompts, max_new_tokens=16, ignore_eos=True)]


def test_it_is_merged_in_16_bits_and_changes_the_text(base: Path, lora: Path) -> None:
    plain, model = (loading.load(base, adapter=given)[0] for given in (None, lora))
    tensors = load_file(lora / "adapter_model.safetensors")
    assert isinstance(plain.model.layers[0].self_attn.q_proj, BlockLinear)
    for path, module in model.named_modules():
        if path.endswith(PARTS):
            assert type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
            blocks = plain.get_submodule(path).blocks
            down, up = (tensors[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            wanted = blocks.dequantized() + up @ (down * 2.0)
            assert torch.allclose(module.weight.float(), wanted, rtol=2**-7, atol=1e-3)
    assert isinstance(model.model.layers[0].self_attn.k_proj, BlockLinear)
    assert text(base, lora) != text(base)


def test_it_equals_pefts_merged_model(cache: SimpleNamespace, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    own = tiny_model("llama").to(torch.bfloat16)
    given = {"r": 6, "use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}, "lora_alpha": 5}
    tensors = save_lora(tmp_path / "lora", own, **given)
    copy = tiny_model("llama").to(torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(copy, tmp_path / "lora").merge_and_unload()
    adapters.merge(own, adapters.read("it", tmp_path / "lora", own, None))
    state = theirs.state_dict()
    assert all(torch.equal(values, state[name]) for name, values in own.state_dict().items())
    assert len(own.merged_adapter.samples) == len(tensors) / 2


@pytest.mark.parametrize(
    ("recorded", "loaded", "same"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", "/models/qwen2.5-0.5b-instruct-q4_k_m.gguf", True),
        ("me/my-model", "Qwen/Qwen2.5-0.5B", False),
    ],
)
def test_another_base_by_name_is_noted(tmp_path, recorded: str, loaded: str, same: bool, capsys) -> None:
    model = tiny_model("llama")
    save_lora(tmp_path / "lora", model, base_model_name_or_path=recorded)
    model.config._name_or_path = loaded
    adapters.merge(model, adapters.read("it", tmp_path / "lora", model, None))
    assert (f"names '{recorded}' as its base model; its shapes fit '{loaded}'" in capsys.readouterr().err) != same


def test_drafted_text_is_that_of_plain_decoding_with_it(base: Path, lora: Path) -> None:
    wanted = text(base, lora)
    assert text(base, lora, "auto", learn=True) == text(base, lora, "ngram") == wanted


def test_prefixes_learned_drafters_and_packed_weights_are_its_own(base: Path, lora: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_lora(other, loading.load(base)[0], seed=1)
    slight = tmp_path / "slight"  # no sampled weight shows it
    save_lora(slight, loading.load(base)[0], size=1e-6)
    decoders = [SpecDecoder.from_pretrained(base, "none", device="cpu", adapter=a) for a in (None, lora, other, slight)]
    assert len({each.target.fingerprint for each in decoders}) == 4
    assert len({identity.numbers(each.target) for each in decoders}) == 4
    merged = decoders[1].model.merged_adapter
    assert merged.base == decoders[0].target.fingerprint and merged.name == str(lora)


def test_packed_weights_are_kept_for_each_adapter(cache: SimpleNamespace, base: Path, lora: Path, tmp_path) -> None:
    if not library.runs():
        pytest.skip("no native kernels here")
    plain, wanted = text(base), text(base, lora)
    (folder,) = (cache.root / "models").iterdir()
    files = sorted(folder.glob("weights*.packed"))
    assert len(files) == 2
    before = [file.stat().st_mtime_ns for file in files]
    assert text(base, lora) == wanted and text(base) == plain
    assert [file.stat().st_mtime_ns for file in files] == before
    for seed in (1, 2, 3):
        save_lora(tmp_path / f"lora{seed}", loading.load(base)[0], seed)
        assert text(base, tmp_path / f"lora{seed}") != wanted
    assert len(list(folder.glob("weights*.packed"))) == 3 and text(base) == plain


def test_a_drafter_of_the_base_is_offered(base: Path, lora: Path) -> None:
    plain, adapted = (SpecDecoder.from_pretrained(base, "none", device="cpu", adapter=a).target for a in (None, lora))
    of_base, own = describe_base(plain, "it"), describe_base(adapted, "it")  # type: ignore[arg-type]
    check_base({"base": of_base}, adapted, "drafter")  # type: ignore[arg-type]
    check_base({"base": own}, adapted, "drafter")  # type: ignore[arg-type]
    check_base({"base": of_base | {"fingerprint": "other precision"}}, adapted, "drafter")  # type: ignore[arg-type]
    with pytest.raises(SpecDecError, match="was trained for base weights"):
        check_base({"base": own}, plain, "drafter")  # type: ignore[arg-type]


def write_adapter(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama", **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", more.get("kind", "adapter"))
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def paired(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as a GGUF file has them."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def test_a_gguf_adapter_is_pefts(base: Path, lora: Path, tmp_path: Path) -> None:
    tensors, found = load_file(lora / "adapter_model.safetensors"), dict[str, np.ndarray]()
    names = {"self_attn.q_proj": "attn_q", "self_attn.v_proj": "attn_v", "mlp.down_proj": "ffn_down"}
    for key, values in tensors.items():
        layer, part = int(key.split(".")[4]), next(part for part in names if part in key)
        array = values.numpy()
        if "q_proj.lora_B" in key:
            array = paired(array, 4)
        end = "lora_a" if ".lora_A." in key else "lora_b"
        found[f"blk.{layer}.{names[part]}.weight.{end}"] = np.ascontiguousarray(array)
    model = loading.load(base, adapter=write_adapter(tmp_path / "lora.gguf", found))[0]
    wanted = loading.load(base, adapter=lora)[0]
    for path, module in wanted.named_modules():
        if path.endswith(PARTS):
            assert torch.equal(model.get_submodule(path).weight, module.weight)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"architecture": "qwen2"}, "is for models of the architecture 'qwen2', and this one is 'llama'"),
        ({"kind": "model"}, "is no LoRA adapter: its GGUF file is of the type 'model'"),
        ({"name": "token_embd.weight"}, "changes 'token_embd.weight', and only changes of linear layers"),
        ({"ends": ("lora_a",)}, "'blk.0.attn_q.weight' has only one of its two matrices"),
        ({"ends": ("lora_a", "lora_magnitude")}, "has the tensor 'blk.0.attn_q.weight.lora_magnitude'"),
        ({"width": 64}, "'model.layers.0.self_attn.q_proj' is 128 x 128 in the model and 128 x 64 in it"),
        ({"height": 96}, "'model.layers.0.self_attn.q_proj' is 128 x 128 in the model and 96 x 128 in it"),
        ({"height": 130}, "'model.layers.0.self_attn.q_proj' is 128 x 128 in the model and 130 x 128 in it"),
        ({"rank": 3}, "is broken: 'model.layers.0.self_attn.q_proj' has the ranks 4 and 3; get it again"),
        ({"rank": 0}, "it.gguf.*is truncated or broken"),
    ],
)
def test_a_gguf_adapter_of_another_kind_is_refused(base: Path, tmp_path, how: dict[str, Any], reason: str) -> None:
    name = how.get("name", "blk.0.attn_q.weight")
    shapes = {"lora_a": (4, how.get("width", 128)), "lora_b": (how.get("height", 128), how.get("rank", 4))}
    ends = how.get("ends", ("lora_a", "lora_b"))
    tensors = {f"{name}.{end}": np.ones(shapes.get(end, (128, 4)), np.float32) for end in ends}
    kinds = {"architecture": how.get("architecture", "llama"), "kind": how.get("kind", "adapter")}
    path = write_adapter(tmp_path / "it.gguf", tensors, **kinds)
    with refused(reason):
        loading.load(base, adapter=path)


def test_a_gguf_adapter_needs_a_gguf_model(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "it.gguf", {"blk.0.attn_q.weight.lora_a": np.ones((4, 32), np.float32)})
    with pytest.raises(SpecDecError, match="is a GGUF file, and the model is not"):
        adapters.read("it", path, tiny_model("llama"), None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, r"has use_dora=true, which is not supported; merge it"),
        ({"modules_to_save": ["lm_head"]}, r'has modules_to_save=\["lm_head"\]'),
        ({"bias": "lora_only"}, 'has bias="lora_only"'),
        ({"something_new": {"a": 1}}, "has something_new"),
        ({"init_lora_weights": "pissa"}, 'has init_lora_weights="pissa"'),
        ({"peft_type": "IA3"}, "is of the kind IA3"),
        ({"task_type": "SEQ_CLS"}, "for the task SEQ_CLS"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 10**400}, "lora_alpha is a huge number"),
        ({"lora_alpha": [8]}, r"lora_alpha is \[8\]"),
        ({"alpha_pattern": [8]}, r"alpha_pattern is \[8\]"),
        ({"alpha_pattern": 7}, "alpha_pattern is 7"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern of 'q_proj' is '8'"),
        ({"alpha_pattern": {"(a|a)*b": 8}}, r"alpha_pattern has '\(a\|a\)\*b'.*; merge it"),
        ({"peft_type": ["LORA"]}, "is of the kind"),
        ({"use_rslora": [1]}, r"use_rslora is \[1\]"),
    ],
)
def test_what_merging_would_ignore_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama")
    save_lora(tmp_path / "lora", model, **config)
    with refused(reason):
        adapters.read("it", tmp_path / "lora", model, None)


def test_alpha_patterns_are_the_ends_of_names(tmp_path: Path) -> None:
    model = tiny_model("llama")
    alphas = {"proj": 99, "1.self_attn.q_proj": 99, "layers.1.self_attn.q_proj": 12, "q_proj": 4, "down_proj": 20}
    save_lora(tmp_path / "lora", model, alpha_pattern=alphas)
    found = adapters.read("it", tmp_path / "lora", model, None)
    alpha = {path.removeprefix("model.layers."): change.scale * 4 for path, change in found.maps.items()}
    assert alpha["0.self_attn.q_proj"] == 4 and alpha["1.self_attn.q_proj"] == 99
    assert alpha["1.self_attn.v_proj"] == 8 and alpha["0.mlp.down_proj"] == 20


def test_rank_patterns_are_in_the_tensors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_lora(tmp_path / "lora", model, rank_pattern={"q_proj": 4}, r=4)
    found = adapters.read("it", tmp_path / "lora", model, None)
    assert {change.scale for change in found.maps.values()} == {2.0}
    save_lora(tmp_path / "lora", model, r=16, use_rslora=True)
    found = adapters.read("it", tmp_path / "lora", model, None)
    assert {change.scale for change in found.maps.values()} == {8 / math.sqrt(16)}


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        (lambda key: key.replace("layers.1", "layers.9"), r"changes 'model.layers.9.*', which the model does not"),
        (lambda key: key.replace("q_proj", "w_proj"), r"w_proj'.*; load the model it was made for .some/base."),
        (lambda key: key.replace("v_proj", "o_proj"), "'.*o_proj' is 32 x 32 in the model and 16 x 32 in it"),
        (lambda key: key.replace("lora_A", "lora_magnitude_vector"), "has the tensor '.*lora_magnitude_vector.weight'"),
        (lambda key: key.replace("self_attn.q_proj", "input_layernorm"), "only changes of linear layers are supported"),
        (lambda key: key.replace(".lora_B", ".lora_B" if "q_proj" in key else ".lora_A"), "has only one of its two"),
    ],
)  # fmt: skip
def test_a_wrong_base_is_refused(tmp_path: Path, rename: Any, reason: str) -> None:
    model = tiny_model("llama")
    tensors = save_lora(tmp_path / "lora", model)
    save_file({rename(key): values for key, values in tensors.items()}, tmp_path / "lora/adapter_model.safetensors")
    with refused(reason):
        adapters.merge(model, adapters.read("it", tmp_path / "lora", model, None))
    assert "merged_adapter" not in vars(model)


def test_a_shared_output_head_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    size = {"A": (4, 32), "B": (97, 4)}
    save_lora(tmp_path / "lora", model)
    tensors = {f"base_model.model.lm_head.lora_{part}.weight": torch.ones(size[part]) for part in "AB"}
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(SpecDecError, match="the output head, which shares its weights with the embedding"):
        adapters.merge(model, adapters.read("it", tmp_path / "lora", model, None))


def test_pefts_copy_of_an_output_head_is_named(tmp_path: Path) -> None:
    """PEFT saves the weight of the base model beside the changes of an embedding or output head."""
    model = tiny_model("llama", tie_word_embeddings=False)
    tensors = save_lora(tmp_path / "lora", model)
    tensors["base_model.model.lm_head.base_layer.weight"] = torch.ones(97, 32)
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    with pytest.raises(SpecDecError, match=r"a whole weight for 'lm_head' .* save_embedding_layers=False, or merge it"):
        adapters.read("it", tmp_path / "lora", model, None)


def test_a_missing_adapter_is_known_before_anything_is_loaded(tmp_path: Path, lora: Path) -> None:
    os.truncate(lora / "adapter_model.safetensors", 100)
    with pytest.raises(SpecDecError, match="cannot read adapter"):
        adapters.read("it", lora, tiny_model("llama"), None)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(SpecDecError, match=r"adapter_model.safetensors is missing; weights are read from safetensors"):
        adapter_place(str(lora))
    (tmp_path / "it.txt").write_text("text")
    for name, reason in (("a b", "there is no adapter"), (str(tmp_path / "it.txt"), "not a GGUF")):
        with pytest.raises(SpecDecError, match=reason):
            adapter_place(name)


def test_an_adapter_of_the_hub_is_downloaded(fake: type[FakeHub], base: Path, lora: Path) -> None:
    fake.repositories["org/lora"] = {path.name: path.read_bytes() for path in lora.iterdir()}
    fake.repositories["org/lora"]["model.safetensors"] = b""
    assert text(base, "org/lora") == text(base, lora)  # type: ignore[arg-type]
    assert {*fake.fetched} == {"adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(SpecDecError, match="unknown adapter 'org/none'"):
        loading.load(base, adapter="org/none")


def test_a_model_of_transformers_gets_it_too(lora: Path, base: Path) -> None:
    """In every runtime, also with weights in fewer bits."""
    wanted = text(base, lora, runtime="transformers")
    assert wanted != text(base, runtime="transformers")
    both = [text(base, lora, runtime=runtime, dtype="float32") for runtime in ("torch", "transformers")]
    assert both[0] == both[1]
    if library.runs():
        assert text(base, lora, weights="int8") == text(base, lora, "ngram", weights="int8")


def test_a_server_names_it(base: Path, lora: Path) -> None:
    fastapi = pytest.importorskip("fastapi.testclient", reason="fastapi is not installed")
    from specdec.serve.app import make_app
    from specdec.serve.settings import ServerSettings

    decoder = SpecDecoder.from_pretrained(base, "none", device="cpu", adapter=lora)
    with decoder.engine(max_rows=1) as engine:
        client = fastapi.TestClient(make_app(decoder, engine, ServerSettings(name="it")), "http://127.0.0.1")
        (model,) = client.get("/v1/models").json()["data"]
        assert model["adapter"] == "lora" and model["id"] == "it"
