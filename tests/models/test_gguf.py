"""GGUF files that load as they are: headers, blocks, configs and tokenizers, of tiny files that the tests write."""

import json
import math
import os
import random
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from passes import apart
from refusals import refused
from tiny import SMALL, rough_model
from tiny_gguf import ARCHITECTURES, file_sizes, write_family, write_gguf, write_model
from torch import nn
from transformers import AutoModelForCausalLM, GgufConfig

from specdec import SpecDecoder
from specdec.base import machine
from specdec.base.errors import SpecDecError
from specdec.base.terminal import megabytes
from specdec.models import catalogue, identity, loading
from specdec.models.gguf import blocks, defaults
from specdec.models.gguf import model as gguf_model
from specdec.models.gguf import tokenizer as gguf_tokenizer
from specdec.models.gguf.blocks import (
    KINDS,
    BlockExperts,
    BlockLinear,
    Blocks,
    ExpertBlocks,
    densify,
    named_weights,
    temporarily_dense,
)
from specdec.models.gguf.file import read_header
from specdec.models.native_model import NativeModel, transformers_config
from specdec.models.tensor_file import PLAIN
from specdec.runtimes.prefill import run_tokens
from specdec.runtimes.select import make_target

WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
WIDE |= {"linear_value_head_dim": 64, "head_dim": 64}
UNSAID = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "transformers_version", "head_dim"}


def reference(path: Path, dtype: torch.dtype = torch.bfloat16):
    """What transformers makes of the file."""
    load = AutoModelForCausalLM.from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True))


@pytest.mark.parametrize(
    ("family", "older"), [*((family, False) for family in ARCHITECTURES), ("qwen3_next", True)], ids=str
)
def test_a_file_of_each_family_is_the_model_that_it_was_made_of(cache, tmp_path, family, older):
    """Config, numbers and logits, in float32; where transformers reads such files, it reads the same model."""
    source = rough_model(family, **file_sizes(family))
    path = write_family(tmp_path / "it.gguf", source, older=older)
    model, _ = loading.load(path, dtype="float32")
    given, ours = source.config.to_dict(), model.transformers().config.to_dict()
    other = {key: (ours.get(key), given[key]) for key in given if ours.get(key) != given[key]}
    kept = {"eos_token_id", "bos_token_id", "pad_token_id", "initializer_range", "layer_types", "rope_parameters"}
    assert not {key for key, (a, b) in other.items() if a != pytest.approx(b)} - kept - UNSAID, other
    expected = source.state_dict()
    for name, value in model.named_parameters():
        assert apart(value, expected[name]) < 1e-6, name
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        model.config._attn_implementation = source.config._attn_implementation
        assert apart(model(ids).logits, source(ids).logits) < 1e-4
    if family in ("gemma2", "gemma3_text"):
        for (name, value), theirs in zip(
            model.named_parameters(), reference(path, torch.float32).parameters(), strict=True
        ):
            assert torch.equal(value, theirs), name


def test_the_file_of_a_dense_granite_4_is_a_granite(cache, tmp_path):
    """llama.cpp's converter writes what a hybrid needs, too: keys by layer, and sizes of layers that are not there."""
    source = rough_model("granite", **file_sizes("granite"))
    ssm = dict.fromkeys(("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank"), 4)
    more = {f"ssm.{key}": value for key, value in ssm.items()} | {"attention.head_count_kv": [2] * 4}
    more |= {"expert_count": 0, "expert_used_count": 0, "expert_shared_feed_forward_length": 96}
    more |= {"feed_forward_length": 128}
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source, metadata=more), dtype="float32")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        assert apart(model(ids).logits, source(ids).logits) < 1e-4
    more["attention.head_count_kv"] = [2, 0, 2, 0]
    with refused(r"says that num_key_value_heads is '\[2, 0, 2, 0\]'"):
        loading.load(write_family(tmp_path / "other.gguf", source, metadata=more), dtype="float32")


def test_heads_of_which_a_part_rotates_are_those_of_the_file(cache, tmp_path):
    """As in Phi-4-mini. The self-check of a runtime compares with the model, so the model has to be right."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    source = rough_model("phi3", **(file_sizes("phi3") | {"hidden_size": 256, "rope_parameters": rope}))
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source), dtype="bfloat16")
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.75
    target, note = make_target(model)
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        run_tokens(target, target.new_cache(), [ids[0].tolist()], every=(every := []))
        right = source.bfloat16()(ids).logits
        assert apart(target.readout(every[0][None]).float(), right.float()) < 0.05, note


def test_the_window_of_a_phi3_file_is_that_of_its_model(cache, tmp_path):
    """As in Phi-3-mini-4k. Files of models without a window say 0."""
    source = rough_model("phi3", **(file_sizes("phi3") | {"sliding_window": 8}))
    model, _ = loading.load(write_family(tmp_path / "it.gguf", source), dtype="float32")
    target, note = make_target(model, "transformers")
    ids = torch.arange(5, 45)[None]
    with torch.inference_mode():
        run_tokens(target, target.new_cache(), [ids[0].tolist()], every=(every := []))
        assert apart(target.readout(every[0][None]), source(ids).logits) < 1e-4, note


UNPACKED = sorted(kind.name for kind in gguf.quants._type_traits if kind.name not in (*KINDS, *PLAIN))


@pytest.mark.parametrize("kind", [*KINDS, "IQ4_NL", "Q2_K", "TQ2_0", "BF16", "F16", "F32"])
def test_every_type_has_the_values_of_the_gguf_package(cache, tmp_path, kind, capsys):
    """A line says what it costs that some have no kernels. The fingerprint is that of dense weights."""
    tied = kind == "Q4_0"
    path = write_model(tmp_path / "it.gguf", "llama", kind, width=256, tied=tied)
    model, file = loading.load(path)[0], read_header(path)
    up, info = model.model.layers[1].mlp.up_proj, file.tensors["blk.1.ffn_up.weight"]
    assert isinstance(up, BlockLinear) == (kind in KINDS) and not any(p.requires_grad for p in model.parameters())
    stored = file.data(info).view(info.shape[0], -1).numpy()
    assert torch.equal(up.weight, torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[kind])).bfloat16())
    matrices = [each for each in file.tensors.values() if each.kind == kind]
    sizes = sum(each.nbytes for each in matrices), 2 * sum(math.prod(each.shape) for each in matrices)
    said = f"no kernels for weights of type {kind} in '{path}'; unpacked to bfloat16, they take {megabytes(sizes[1])}"
    said += f" of memory instead of {megabytes(sizes[0])}, and each token reads all"
    assert (said in capsys.readouterr().err) == (kind in UNPACKED)
    fingerprint = identity.fingerprint(model)
    densify(model)
    assert identity.fingerprint(model) == fingerprint
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


OTHERS = {kind.name for kind in gguf.GGMLQuantizationType} - {*UNPACKED, *KINDS, *PLAIN}


@pytest.mark.parametrize("kind", sorted(OTHERS)[:2])
def test_types_that_cannot_be_read_are_refused_in_one_sentence(cache, tmp_path, kind):
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    path = write_model(tmp_path / "it.gguf", "llama", "F32", width=256)
    reader = gguf.GGUFReader(path)
    tensor = next(each for each in reader.tensors if each.name == "blk.0.ffn_up.weight")
    data = path.read_bytes()
    name = b"blk.0.ffn_up.weight" + struct.pack("<IQQ", 2, *map(int, tensor.shape))
    assert data.count(name) == 1 and width // size <= 8
    place = data.index(name) + len(name)
    path.write_bytes(data[:place] + struct.pack("<I", gguf.GGMLQuantizationType[kind]) + data[place + 4 :])
    with refused(f"has tensors of type {kind}, which cannot be read; get a file of"):
        loading.load(path)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
def test_memory_is_checked_for_what_a_model_will_hold(cache, tmp_path, family, monkeypatch):
    """Also where types of blocks are unpacked; those that gates have beside others are, and experts in blocks are not
    counted: they may stay on the disk."""
    source = rough_model(family, **file_sizes(family), tie_word_embeddings=True)
    path = write_family(tmp_path / "it.gguf", source, "Q8_0", gates="Q5_0" if family == "qwen3_next" else "")
    for kinds in KINDS, ():
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "KINDS", kinds)
            model = loading.load(path)[0]
            held = {id(weight): weight for _, weight in named_weights(model)}.values()
            packed = [each for each in held if isinstance(each, Blocks)]
            tensors = [each for each in held if not isinstance(each, Blocks)]
            size = sum(each.data.nbytes for each in packed if not isinstance(each, ExpertBlocks))
            dense = 2 * sum(each.shape.numel() for each in packed)  # in the reference runtime
            for need, make in (
                (size + sum(each.nbytes for each in tensors), lambda: loading.load(path)),
                *[(dense, lambda: make_target(model, "transformers"))] * bool(packed),  # noqa: B023
            ):
                patch.setattr(machine, "available_memory", lambda: need - 1)  # noqa: B023
                with pytest.raises(SpecDecError, match=r"not enough memory for '.*it\.gguf': its weights need"):
                    make()
                patch.setattr(machine, "available_memory", lambda: need)  # noqa: B023
                make()


@pytest.mark.parametrize(("family", "kind"), [("gpt_oss", "Q8_0"), ("qwen3_moe", "F16")])
def test_experts_that_stay_in_the_file_are_those_of_the_model(cache, tmp_path, family, kind):
    """In each of its forms, and with the same fingerprint."""
    path = write_family(tmp_path / "it.gguf", rough_model(family, **file_sizes(family)), kind)
    model, dense = loading.load(path)[0], loading.load(path)[0]
    assert isinstance(model.model.layers[1].mlp.experts, BlockExperts)
    densify(dense)
    assert identity.fingerprint(model) == identity.fingerprint(dense)
    assert identity.difference(identity.samples(model), dense, "it") is None
    loaded = dict(dense.named_parameters())
    for name, value in loading.load(path, dtype="float32")[0].named_parameters():
        assert torch.equal(loaded[name], value.bfloat16()), name
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert apart(model(ids).logits.float(), dense(ids).logits.float()) < 0.02


@pytest.mark.parametrize(
    ("kind", "gates", "kept"),
    [("Q8_0", "Q8_0", "Q8_0"), ("Q5_K", "Q4_K", "Q5_K"), ("Q6_K", "Q5_K", None), ("BF16", "Q8_0", None)],
)
def test_a_matrix_of_two_tensors_stays_in_blocks_if_one_type_has_both(cache, tmp_path, kind, gates, kept, capsys):
    """The first one of recurrent layers of Qwen3-Next; its rows are those of the tensors, by key head."""
    source = rough_model("qwen3_next", **file_sizes("qwen3_next") | WIDE)
    path = write_family(tmp_path / "it.gguf", source, kind, gates)
    model, _ = loading.load(path)
    assert (f"of type {kind} with {gates}" in capsys.readouterr().err) == (kept is None)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for layer in (0, 2):
        mixer, parts = model.model.layers[layer].linear_attn, []
        assert isinstance(mixer.in_proj_qkvz, BlockLinear) == (kept is not None)
        assert kept is None or mixer.in_proj_qkvz.blocks.kind == kept
        for tensor in (tensors[f"blk.{layer}.attn_{name}.weight"] for name in ("qkv", "gate")):
            parts.append(torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16())
        pairs = [part.chunk(2) for part in torch.cat(parts).split([32, 32, 256, 256])]  # each of two key heads
        expected = torch.cat([part for head in zip(*pairs, strict=True) for part in head])
        assert torch.equal(mixer.in_proj_qkvz.weight, expected)


@pytest.mark.parametrize(("gates", "said"), [("Q5_0", False), ("IQ4_NL", True)])
def test_a_note_says_what_all_experts_take_if_there_are_no_kernels_for_some(cache, tmp_path, gates, said, capsys):
    path = write_family(tmp_path / "it.gguf", rough_model("qwen3_moe", **file_sizes("qwen3_moe")), "Q8_0", gates)
    assert isinstance(loading.load(path)[0].model.layers[0].mlp.experts, BlockExperts) != said
    found = [each for name, each in read_header(path).tensors.items() if name.endswith("exps.weight")]
    need, stored = 2 * sum(math.prod(each.shape) for each in found), sum(each.nbytes for each in found)
    note = f"of type {gates} with Q8_0 in '{path}'; unpacked to bfloat16, they take {megabytes(need)} of memory instead"
    assert (f"{note} of {megabytes(stored)}" in capsys.readouterr().err) == said


@pytest.mark.parametrize("shape", [None, (128, 32), (64, 64)])
def test_one_of_two_tensors_that_does_not_fit_is_named(cache, tmp_path, shape):
    path = write_family(tmp_path / "it.gguf", rough_model("qwen3_next", **file_sizes("qwen3_next")))
    file, name = read_header(path), "blk.2.attn_gate.weight"
    model = NativeModel(gguf_model.config_of("it", file), torch.bfloat16)
    gguf_model.check_tensors("it", file, model)
    info = file.tensors.pop(name)
    if shape:
        file.tensors[name] = replace(info, shape=shape)
    with pytest.raises(SpecDecError, match=f"1 missing or of another shape, such as '{name}'"):
        gguf_model.check_tensors("it", file, model)


def test_value_heads_that_are_not_equally_many_for_each_key_head_are_refused(cache, tmp_path):
    file = read_header(write_family(tmp_path / "it.gguf", rough_model("qwen3_next", **file_sizes("qwen3_next"))))
    file.metadata["qwen3next.ssm.group_count"] = 3
    with pytest.raises(SpecDecError, match="4 value heads for 3 key heads"):
        gguf_model.config_of("it", file)


def test_nothing_of_the_matrices_is_held_twice(cache, tmp_path):
    model, _ = loading.load(write_model(tmp_path / "it.gguf", "llama", "Q8_0"))
    assert sum(p.numel() for p in model.parameters()) == 5 * SMALL["hidden_size"]  # the norms
    with pytest.raises(SpecDecError, match="stay on the CPU"):
        model.to("meta")
    assert model.to(torch.float32).model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_blocks_become_dense_weights_for_a_while_and_come_back(cache, tmp_path):
    model, _ = loading.load(write_model(tmp_path / "it.gguf", "llama", "Q4_1"))
    before = dict(model.named_modules())
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        with temporarily_dense(model):
            assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and torch.equal(model(ids).logits, expected)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("runtime", ["torch", "transformers"])
def test_a_model_in_blocks_decodes_in_every_runtime(cache, tmp_path, runtime):
    path = write_model(tmp_path / "it.gguf", "qwen2", "Q8_0", width=128)
    model, tokenizer = loading.load(path)
    decoder = SpecDecoder(model, tokenizer, "prompt-lookup", runtime=runtime)
    out = decoder.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True)
    plain = SpecDecoder(reference(path), tokenizer, "none", runtime=runtime)
    assert out.token_ids == plain.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids


@pytest.mark.parametrize(
    ("family", "tensor", "scale", "weight"),
    [
        ("llama", "ffn_up", float("nan"), "mlp.up_proj.weight"),
        ("gpt_oss", "ffn_up_exps", float("inf"), "mlp.experts.gate_up_proj"),
    ],
)
def test_broken_scales_are_named(cache, tmp_path, family, tensor, scale, weight):
    path = write_family(tmp_path / "it.gguf", rough_model(family, **file_sizes(family)), "Q8_0")
    info = read_header(path).tensors[f"blk.1.{tensor}.weight"]
    with path.open("r+b") as file:
        file.seek(info.offset)
        file.write(struct.pack("<e", scale))
    with pytest.raises(SpecDecError, match=f"'model.layers.1.{weight}' holds NaN"):
        make_target(loading.load(path)[0])


@pytest.mark.parametrize(("call", "ends"), [("<|call|>", ["<|return|>", "<|call|>"]), ("X", ["<|return|>", "<|end|>"])])
def test_where_a_turn_has_several_messages_the_end_of_one_does_not_end_it(cache, tmp_path, call, ends):
    path = write_family(tmp_path / "it.gguf", rough_model("gpt_oss", **file_sizes("gpt_oss")))
    file = read_header(path)
    tokens, kinds = file.metadata["tokenizer.ggml.tokens"].texts, file.metadata["tokenizer.ggml.token_type"]
    for token, text in zip((1, 2, 5, 6), ("<s>", "<|return|>", "<|end|>", call), strict=True):
        tokens[token], kinds[token] = text, 3
    found = gguf_model._eos_token_ids(file)
    assert [tokens[token] for token in found if tokens[token] != "<|endoftext|>"] == ends


def test_factors_of_the_rotary_frequencies_are_used(cache, tmp_path):
    factors = np.array([1, 2, 4, 8], np.float32)
    path = write_model(tmp_path / "it.gguf", "llama", "Q8_0", **{"rope_freqs.weight": factors})
    ours = loading.load(path)[0].model.rotary_emb.inv_freq[""]
    plain = loading.load(write_model(tmp_path / "plain.gguf", "llama", "Q8_0"))[0].model.rotary_emb.inv_freq[""]
    assert torch.equal(ours, plain / torch.from_numpy(factors))


@pytest.mark.parametrize(
    ("tokens", "unknown", "expected"),
    [
        (["<|endoftext|>", "<|im_end|>"], None, [2, 0, 1]),
        (["<|endoftext|>", "<|im_end|>"], 0, [2, 1]),  # what stands for the unknown ends nothing
        (["<|fim|>", "<s>"], None, 2),
    ],
)
def test_control_tokens_known_for_it_end_a_sequence(cache, tmp_path, monkeypatch, tokens, unknown, expected):
    add = gguf.GGUFWriter.add_token_list
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda self, found: add(self, [*tokens, *found[2:]]))
    if unknown is not None:
        bos = gguf.GGUFWriter.add_bos_token_id
        monkeypatch.setattr(
            gguf.GGUFWriter, "add_bos_token_id", lambda self, token: (bos(self, token), self.add_unk_token_id(unknown))
        )
    write_gguf(tmp_path / "it.gguf")
    model, _ = loading.load(tmp_path / "it.gguf")
    assert model.generation_config.eos_token_id == expected


def change(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new, 1))


NORM = b"output_norm.weight" + struct.pack("<IQ", 1, 32)
ROTATED = b"llama.rope.dimension_count" + struct.pack("<I", 4)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: os.truncate(p, 1000), "truncated or broken .it ends within its header"),
        (lambda p: os.truncate(p, p.stat().st_size - 64), "truncated or broken .tensor '.*' ends at byte"),
        (lambda p: p.write_bytes(b"GGUF"), "ends within its header"),
        (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60)), "ends within its header"),
        (lambda p: p.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), "is of version 9"),
        (lambda p: p.write_bytes(b"PK\x03\x04" * 9), "is not a GGUF file"),
        (lambda p: change(p, b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"), "has no vocabulary"),
        (lambda p: change(p, ROTATED + b"\x08", ROTATED + b"\x06"), "says that 6 of the 8 numbers of a head rotate"),
        (lambda p: change(p, ROTATED + b"\x08", ROTATED + b"\x0c"), "says that 12 of the 8 numbers of a head rotate"),
        (lambda p: change(p, NORM + struct.pack("<I", 0), NORM + struct.pack("<I", 77)), "is of the unknown type 77"),
        (lambda p: change(p, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"), "1 missing or of another shape"),
        (lambda p: change(p, b"blk.1.attn_output.weight", b"blk.1.xttn_output.weight"), "has 1 layers, and its header"),
        (lambda p: change(p, b"llama.feed_forward_length\x04\0\0\0\x30", b"llama.feed_forward_length\x04\0\0\0\x31"),
         "do not fit its config: 6 missing or of another shape"),
        (lambda p: change(p, b"embedding_length\x04\0\0\0\x20\0\0\0", b"embedding_length\x04\0\0\0\x20\0\0\x7f"),
         "says that hidden_size is"),
        (lambda p: change(p, b"llama.attention.head_count\x04\0\0\0\x04", b"llama.attention.head_count\x04\0\0\0\x00"),
         "says that num_attention_heads is '0'"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line_and_leaves_nothing(cache, tmp_path, damage, text):
    path = tmp_path / "it.gguf"
    write_gguf(path)
    damage(path)
    with refused(text):
        loading.load(path)
    assert not list((cache.root / "models").glob("*"))


GIVEN = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GIVEN |= {"intermediate_size": 96, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "vocab_size": 97}
MORE = {"rope_theta": 5000.0, "tie_word_embeddings": True, "bos_token_id": 7, "eos_token_id": 8, "unk_token_id": 0}


@pytest.mark.parametrize("kind", defaults.OWN)
def test_configs_are_completed_as_transformers_does(kind):
    for more in ({}, MORE, {"head_dim": 32}, {"pad_token_id": None}):
        values = GIVEN | more | {"model_type": kind}
        if kind == "qwen2" and "head_dim" in more:
            continue  # it has no such field
        expected = transformers_config(values).to_dict()
        expected.pop("_name_or_path", None)
        assert json.loads(json.dumps(defaults.complete(values).to_dict())) == json.loads(json.dumps(expected))
    for more in ({"hidden_size": 66}, {"rope_scaling": {}}, {"model_type": "gemma"}):
        assert defaults.complete(GIVEN | {"model_type": kind} | more) is None


def test_a_vocabulary_is_decoded_at_first_use(tmp_path):
    path = tmp_path / "it.gguf"
    write_gguf(path)
    tokens = read_header(path).metadata["tokenizer.ggml.tokens"]
    assert "texts" not in vars(tokens) and len(tokens) == 260
    assert tokens[:3] == ["<|endoftext|>", "<s>", "</s>"] and list(tokens) == [tokens[n] for n in range(260)]
    path.write_bytes(path.read_bytes().replace(b"<|endoftext|>", b"<|endoftext|\xff", 1))
    header = read_header(path)
    with pytest.raises(SpecDecError, match=r"it.gguf.*truncated or broken \(a string in it is not UTF-8 text\)"):
        gguf_tokenizer.converted("it", header)


def test_arrays_of_a_header_are_bounded_together(tmp_path):
    """One byte of a file may become eight in memory, so many arrays are as large as one."""
    size, path = 1 << 20, tmp_path / "it.gguf"
    for count, good in ((4, True), (6, False)):
        entries = [
            struct.pack("<Q", 1) + bytes([65 + n]) + struct.pack("<IIQ", 9, 0, size) + bytes(size) for n in range(count)
        ]
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + b"".join(entries))
        if good:
            assert len(read_header(path).metadata) == count
        else:
            with pytest.raises(SpecDecError, match="arrays in it have 5242880 elements together"):
                read_header(path)


def test_tensors_without_a_place_are_refused(cache, tmp_path):
    path = write_model(tmp_path / "it.gguf", "llama", "Q8_0", **{"blk.0.attn_q.bias": np.ones(32, np.float32)})
    with refused(r"1 tensors that do not belong to a llama model .*, such as 'blk.0.attn_q.bias'"):
        loading.load(path)


def test_mutated_headers_never_crash(tmp_path):
    """A thousand headers, damaged outside the vocabulary: one line or a header, and no memory beyond the file's."""
    write_gguf(tmp_path / "it.gguf")
    whole = (tmp_path / "it.gguf").read_bytes()
    header, path, dice = read_header(tmp_path / "it.gguf"), tmp_path / "bad.gguf", random.Random(0)
    end = min(info.offset for info in header.tensors.values())
    places = [*range(4, whole.index(b"<|endoftext|>") + 64), *range(whole.index(b"tokenizer.ggml.token_type"), end)]
    numbers = [0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, end, 1 << 40]
    tracemalloc.start()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 1, 2, 5, 20))):
            at = dice.choice(places)
            if dice.random() < 0.5:
                data[at] = dice.randrange(256)
            else:
                data[at : at + 8] = struct.pack("<Q", dice.choice(numbers))
        if dice.random() < 0.1:
            del data[dice.randrange(end) :]
        path.write_bytes(data)
        try:
            read_header(path)
        except SpecDecError as error:
            assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 20 * len(whole)
    tracemalloc.stop()


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen2.5-coder-1.5b-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_a_real_model_ends_turns_and_texts(name):
    model, tokenizer = loading.load(name)
    assert model.generation_config.eos_token_id == [151645, 151643]
    assert tokenizer.convert_ids_to_tokens([151645, 151643]) == ["<|im_end|>", "<|endoftext|>"]
    assert isinstance(model.lm_head, BlockLinear) and model.lm_head.blocks.shape[0] == 151936


@pytest.mark.model
def test_the_default_model_is_the_one_that_drafters_were_trained_for():
    model, _ = loading.load(catalogue.DEFAULT_MODEL)
    assert identity.fingerprint(model) == "b3f8b9618bb000c415ea5e9a6a741835"
    assert isinstance(model.model.layers[0].self_attn.q_proj, BlockLinear)
    assert model.model.layers[0].self_attn.q_proj.blocks.rows is not None
    assert model.generation_config.eos_token_id == 2


def test_scalings_of_rotations_are_those_that_the_config_can_say() -> None:
    given: dict[str, object] = {"factor": 4.0, "original_context_length": 32, "finetuned": True}
    neutral = given | {"yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
    found = [gguf_model._scaled_rope("it", "yarn", each, {}) for each in (given, neutral)]
    assert found[0] == found[1] == {"factor": 4.0, "original_max_position_embeddings": 32, "rope_type": "yarn"}
    for more in ({"yarn_attn_factor": 1.9}, {"yarn_ext_factor": 0.5}, {"alpha": 2.0}):
        with refused(f"scales rotation in an unknown way .*{next(iter(more))}"):
            gguf_model._scaled_rope("it", "yarn", given | more, {})
