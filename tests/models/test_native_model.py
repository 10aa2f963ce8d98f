"""Models without modelling classes: modules, tables and configs are those of transformers, in every family."""

import copy
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from passes import apart
from targets import needs_native
from tiny import SMALL, rough_model, save_native, sizes_of, tiny_model
from tiny_gguf import write_family, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from specdec.base.errors import SpecDecError
from specdec.models import catalogue, families, loading
from specdec.models.config import Config, GenerationSettings
from specdec.models.gguf.blocks import BlockExperts, temporarily_dense
from specdec.models.native_model import NativeModel, as_transformers, empty_model
from specdec.runtimes.select import make_target

WAVES = {"rope_theta": 5000.0, "original_max_position_embeddings": 32}
SCALED = {
    "default": {"rope_theta": 5000.0},
    "linear": {"rope_theta": 5000.0, "factor": 4.0},
    "llama3": {**WAVES, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {**WAVES, "factor": 4.0},
    "yarn, all": {
        **WAVES,
        **{"factor": 4.0, "attention_factor": 1.2, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
    "yarn, mscale": {**WAVES, "factor": 4.0, "mscale": 1.2, "mscale_all_dim": 0.8},
}


def config_of(kind: str, **changes: object) -> Config:
    theirs = AutoConfig.for_model(kind, **{**SMALL, **sizes_of(kind), **changes})
    return Config(**theirs.to_dict())


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_tables_are_those_of_transformers(kind: str) -> None:
    rope = SCALED[kind] | {"rope_type": kind.partition(",")[0]}
    config = config_of("llama", rope_parameters=rope, max_position_embeddings=128)
    own, theirs = NativeModel(config, torch.float32), empty_model(config, torch.float32)
    [rotation] = {each for pair in families.rotations(config) for each in pair or ()}
    assert torch.equal(*(rotation.tables(model.model.rotary_emb, 128, torch.float32) for model in (own, theirs)))


def test_tables_of_an_unknown_kind_are_refused() -> None:
    config = config_of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0})
    with pytest.raises(SpecDecError, match="rotary embeddings of type 'dynamic' are not supported"):
        NativeModel(config, torch.float32).model.rotary_emb(torch.empty(0), torch.arange(4)[None])


def test_the_fields_that_every_config_of_transformers_has_are_ignored() -> None:
    assert set(PreTrainedConfig().to_dict()) <= families.IGNORED


def test_what_changes_in_a_native_model_changes_in_that_of_transformers() -> None:
    own = NativeModel(config_of("llama"), torch.float32)
    own.load_state_dict(tiny_model("llama", **sizes_of("llama")).state_dict(), assign=True)
    made = own.transformers()
    assert isinstance(made, PreTrainedModel) and as_transformers(own) is made
    assert made.generation_config.eos_token_id is None
    own.generation_config = GenerationSettings(eos_token_id=[3, 4])
    other = copy.copy(own.model.layers[1].mlp.up_proj)
    other.weight = torch.nn.Parameter(other.weight * 2, requires_grad=False)
    own.model.layers[1].mlp.up_proj = other
    own.model.norm.weight = torch.nn.Parameter(own.model.norm.weight * 2, requires_grad=False)
    again = own.transformers()
    assert again is made and made.generation_config.eos_token_id == [3, 4]
    assert made.model.layers[1].mlp.up_proj is other and made.model.norm.weight is own.model.norm.weight


def test_experts_that_become_dense_are_those_of_transformers(cache: Path, tmp_path: Path) -> None:
    source = rough_model("qwen3_moe", **sizes_of("qwen3_moe"))
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source, "Q8_0"))
    ids = torch.arange(1, 9)[None]
    expected, whole = model(ids).logits, model.transformers()
    with temporarily_dense(whole):
        assert apart(whole(ids).logits.float(), expected.float()) < 0.02
    experts = [module for module in model.modules() if isinstance(module, BlockExperts)]
    assert experts and all(values.is_meta for each in experts for values in each.own[0].parameters())  # no copy stays
    with temporarily_dense(model):
        assert apart(model(ids).logits.float(), expected.float()) < 0.02
        assert not any(isinstance(module, BlockExperts) for module in model.transformers().modules())
    assert torch.equal(model(ids).logits, expected)


WITHOUT = """
import sys
sys.modules["transformers"] = None  # an import raises
import specdec.serve.app
from specdec import SpecDecoder
decoder = SpecDecoder.from_pretrained(sys.argv[1], "auto", learn=False)
chat = [{"role": "user", "content": "Hello"}]
for how in ({}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1}):
    print(len(decoder.generate(chat, max_new_tokens=4, ignore_eos=True, **how).token_ids))
print([name for name in ("sympy", "torch._dynamo", "huggingface_hub.hf_api") if name in sys.modules])
"""


def decode_without_slow_imports(model: str | Path) -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT, str(model)], capture_output=True, text=True)
    assert run.stdout.split() == ["4", "4", "[]"], run.stderr


@needs_native
def test_a_gguf_file_is_loaded_first_and_decoded_without_slow_imports(cache: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "it.gguf", width=128, packed=gguf.GGMLQuantizationType.Q8_0)
    decode_without_slow_imports(tmp_path / "it.gguf")


@needs_native
def test_a_folder_is_loaded_again_and_decoded_without_slow_imports(cache: Path, tmp_path: Path) -> None:
    folder = save_native(tmp_path / "it", "olmoe")
    make_target(loading.load(folder)[0])  # writes config, tokenizer and packed weights, with transformers
    decode_without_slow_imports(folder)


@pytest.mark.model
def test_the_default_model_and_its_drafter_decode_without_slow_imports() -> None:
    make_target(loading.load(catalogue.DEFAULT_MODEL)[0])
    decode_without_slow_imports(catalogue.DEFAULT_MODEL)


FIRST = """
import sys
sys.modules["transformers.modeling_utils"] = None
from specdec.models import loading
from specdec.runtimes.select import make_target
print(make_target(loading.load(sys.argv[1])[0])[0].runtime)
"""


@needs_native
@pytest.mark.slow
def test_a_first_load_of_a_family_that_transformers_completes_imports_no_modelling_classes(cache, tmp_path) -> None:
    write_gguf(tmp_path / "it.gguf", width=128, packed=gguf.GGMLQuantizationType.Q8_0, experts=4)
    run = subprocess.run([sys.executable, "-c", FIRST, tmp_path / "it.gguf"], capture_output=True, text=True)
    assert run.stdout.split() == ["native"], run.stderr


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("llama", False), ("qwen3_moe", False), ("gpt_oss", False)]
)
def test_a_saved_model_has_its_weights_in_blocks(kind: str, tied: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    theirs = tiny_model(kind, **sizes_of(kind) | {"tie_word_embeddings": tied})
    model = loading.load(write_family(tmp_path / "it.gguf", theirs, "Q8_0"))[0]
    ids = torch.arange(9)[None]
    model.transformers().save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").eval()
    assert again.dtype == torch.bfloat16 and torch.equal(again(ids).logits, model(ids).logits)
    size, own = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors")), again.state_dict()
    once = {values.data_ptr(): values.nbytes for values in own.values()}
    assert size < sum(once.values()) + 20_000
