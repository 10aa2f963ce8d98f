"""A tiny embedded model: its GGUF file, its name, and a stand-in for what must not be called."""

import copy
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny import ROPES, rough_model, sizes_of
from tokenizers import pre_tokenizers

from specdec.models.gguf.blocks import KINDS

NAME = "tiny-test-model"
TYPES = *KINDS, "BF16"  # of the blocks of files


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(
    writer: gguf.GGUFWriter, layers: int, context: int, width: int, inner: int, heads: int, keys: int, eps: float
) -> None:
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_layer_norm_rms_eps(eps)


def add_vocabulary(writer: gguf.GGUFWriter, pre: str, tokens: list[str], merge: str) -> None:
    """Add a byte-level tokenizer with one merge; the first three tokens are control tokens."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges([merge])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_gguf(
    path: Path,
    width: int = 32,
    heads: int = 4,
    packed: gguf.GGMLQuantizationType | None = None,
    seed: int = 0,
    pre: str = "smollm",
    experts: int = 0,
) -> dict[str, np.ndarray]:
    """Write a GGUF file of a 2-layer random Llama with a byte-level tokenizer; return its float32 tensors by name.

    width: hidden size. heads: attention heads; two share keys and values. packed: type of the layers' matrices; None:
    float32. pre: how text is split. experts: if not 0, a Qwen3-MoE with this number of experts, two for each token.
    """
    size, inner, shared = width // heads, 768 if experts else width * 3 // 2, width // 2  # 768: what readers assume
    random = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    add_sizes(writer, 2, 64, width, inner, heads, heads // 2, 1e-5)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(len(tokens))
    writer.add_key_length(size)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    add_vocabulary(writer, pre, tokens, "Ċ Ċ")
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_norm": (width,), f"blk.{i}.ffn_norm": (width,)}
        shapes |= {f"blk.{i}.attn_q": (width, width), f"blk.{i}.attn_k": (shared, width)}
        shapes |= {f"blk.{i}.attn_v": (shared, width), f"blk.{i}.attn_output": (width, width)}
        each, many = ("_exps", (experts,)) if experts else ("", ())
        shapes |= {f"blk.{i}.ffn_{name}{each}": (*many, inner, width) for name in ("gate", "up")}
        shapes |= {f"blk.{i}.ffn_down{each}": (*many, width, inner)}
        if experts:
            shapes |= {f"blk.{i}.ffn_gate_inp": (experts, width)}
            shapes |= {f"blk.{i}.attn_{name}_norm": (size,) for name in "qk"}
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if packed is not None and name.startswith("blk") and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, tensor)
    finish(writer)
    return tensors


def split_gguf(path: Path, counts: list[int]) -> list[Path]:
    """Split a GGUF file into parts of ``counts`` tensors each, as llama.cpp's ``gguf-split`` does; return their paths.

    The first part has all metadata, the others have only those of the split.
    """
    reader, done = gguf.GGUFReader(path), 0
    own = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    metadata = [b"".join(part.tobytes() for part in field.parts) for field in own.values()]
    paths = [path.with_name(f"{path.stem}-{n:05}-of-{len(counts):05}.gguf") for n in range(1, len(counts) + 1)]

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 32)

    for number, (part, count) in enumerate(zip(paths, counts, strict=True)):
        tensors, infos, data = reader.tensors[done : done + count], b"", b""
        for each in tensors:
            shape = [int(n) for n in each.shape]
            numbers = len(shape), *shape, each.tensor_type, len(data)
            infos += text(each.name) + struct.pack(f"<I{len(shape)}QIQ", *numbers)
            data += padded(each.data.tobytes())
        split = [text("split.no") + struct.pack("<IH", 2, number)]
        split.append(text("split.count") + struct.pack("<IH", 2, len(counts)))
        split.append(text("split.tensors.count") + struct.pack("<Ii", 5, len(reader.tensors)))
        pairs = (metadata if number == 0 else []) + split
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + infos
        part.write_bytes(padded(header) + data)
        done += count
    assert done == len(reader.tensors)
    return paths


HALVES = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "Q3_K": [-2], "Q2_K": [-4, -2]}
HALVES |= {"TQ1_0": [-2], "TQ2_0": [-2], "MXFP4": []}  # where a block has float16 numbers, if not at its beginning only


def random_blocks(
    kind: str, shape: tuple[int, int], random: np.random.Generator, scales: tuple[float, float]
) -> np.ndarray:
    """Return a random matrix in blocks of a type, uint8 [out, bytes of a row].

    scales: range of the blocks' float16 scales, which have either sign.
    """
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = random.integers(0, 256, (shape[0], shape[1] // size, width), np.uint8)
    for at in HALVES.get(kind, [0]):
        halves = random.uniform(*scales, data.shape[:2]) * random.choice([-1, 1], data.shape[:2])
        data[..., at % width : at % width + 2] = halves.astype(np.float16)[..., None].view(np.uint8)
    if kind == "MXFP4":
        data[..., 0] = 128 + np.log2(np.maximum(random.uniform(*scales, data.shape[:2]), 2.0**-80))
    if kind == "IQ1_M":  # the first four bits of four numbers are a scale
        data[..., 49::2] = data[..., 49::2] & 15 | np.array([0, 0, 0, 0x20], np.uint8)
    return data.reshape(shape[0], -1)


WHOLE = "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"  # types that ``gguf`` quantises to
SCALES = {  # what llama.cpp's converter calls a config's fields
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
WINDOWS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_log_multiplier": "mscale_all_dim",
}
TAKEN, INNER = {"expert_used_count": "num_experts_per_tok"}, {"expert_feed_forward_length": "moe_intermediate_size"}
DELTA_RULE = {
    "attention.key_length": "head_dim",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
SHARED = {
    "expert_count": "num_experts",
    **TAKEN,
    **INNER,
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
ARCHITECTURES = {  # name, whether rows of queries and keys are in pairs, what is added to norms, metadata
    "llama": ("llama", True, 0, {"rope.dimension_count": "head_dim"}),
    "qwen2": ("qwen2", False, 0, {}),
    "qwen3": ("qwen3", False, 0, {"attention.key_length": "head_dim"}),
    "phi3": ("phi3", False, 0, {}),
    "granite": ("granite", True, 0, SCALES),
    "olmo2": ("olmo2", False, 0, {}),
    "smollm3": ("smollm3", True, 0, {}),
    "ministral3": ("mistral3", True, 0, {"attention.key_length": "head_dim"}),
    "mixtral": ("llama", True, 0, {"expert_count": "num_local_experts", **TAKEN, "rope.dimension_count": "head_dim"}),
    "olmoe": ("olmoe", False, 0, {"expert_count": "num_experts", **TAKEN}),
    "qwen3_moe": (
        "qwen3moe",
        False,
        0,
        {"expert_count": "num_experts", **TAKEN, "attention.key_length": "head_dim", **INNER},
    ),
    "gemma": ("gemma", False, 1, {"attention.key_length": "head_dim"}),
    "gemma2": ("gemma2", False, 1, WINDOWS),
    "gemma3_text": ("gemma3", False, 1, WINDOWS),
    "gemma4_text": (
        "gemma4",
        False,
        0,
        {
            "attention.sliding_window": "sliding_window",
            "attention.key_length_swa": "head_dim",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "qwen3_5_text": ("qwen35", False, 1, DELTA_RULE),
    "qwen3_next": ("qwen3next", False, 1, DELTA_RULE | SHARED),
    "qwen3_5_moe_text": ("qwen35moe", False, 1, DELTA_RULE | SHARED),
    "gpt_oss": (
        "gpt-oss",
        False,
        0,
        {"expert_count": "num_local_experts", **TAKEN, "expert_feed_forward_length": "intermediate_size"}
        | {key: WINDOWS[key] for key in ("attention.key_length", "attention.sliding_window")},
    ),
}


def add_layers(writer: gguf.GGUFWriter, config: Any) -> None:
    """Add metadata of layers that differ, and the divisors of rotary frequencies, as llama.cpp's converter does."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    shared, full = config.num_kv_shared_layers, sliding.index(False)
    size, keys = config.per_layer_config[full].head_dim, config.per_layer_config[full].num_key_value_heads
    writer.add_sliding_window_pattern(sliding)
    for length in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        length(size)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.use_double_wide_mlp:
        first = len(sliding) - shared
        _replace(
            writer, "feed_forward_length", [config.intermediate_size * (1 + (n >= first)) for n in range(len(sliding))]
        )
    if keys != config.num_key_value_heads:
        _replace(writer, "attention.head_count_kv", [config.num_key_value_heads if each else keys for each in sliding])
    rotates = int(size * config.rope_parameters["full_attention"]["partial_rotary_factor"] / 2)
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * rotates + [1e30] * (size // 2 - rotates), np.float32))


def _replace(writer: gguf.GGUFWriter, key: str, values: list[int]) -> None:
    del writer.kv_data[0][f"gemma4.{key}"]
    writer.add_array(f"gemma4.{key}", values)


def file_sizes(family: str) -> dict[str, Any]:
    """Of a model whose config a GGUF file can hold: windows and layers without rotation are in their usual order."""
    found: dict[str, Any] = sizes_of(family)
    if family == "ministral3":
        found["rope_parameters"] = ROPES[family]
    if family in ("granite", "olmo2", "smollm3", "qwen2", "olmoe"):
        found |= {"hidden_size": 128, "head_dim": 32}
    if family == "smollm3":
        found["no_rope_layer_interval"] = 4
    if family == "gemma3_text":
        found |= {"num_hidden_layers": 7, "layer_types": None}
    if family in ("gemma2", "gemma3_text"):
        found["query_pre_attn_scalar"] = 32
    if family == "gpt_oss":
        found["swiglu_limit"] = 7.0
    return found


def write_family(
    path: Path,
    model: Any,
    kind: str = "F32",
    gates: str = "",
    older: bool = False,
    joined: bool = False,
    predicts: Any = None,
    apart: bool = False,
    tensors: Mapping[str, np.ndarray] = {},
    in_blocks: Mapping[str, np.ndarray] = {},
    metadata: Mapping[str, Any] = {},
) -> Path:
    """Write a model of transformers as a GGUF file, as llama.cpp's converter does.

    kind: type of the matrices, which are quantized or, for types without a quantizer, random blocks.
    gates: type of the gates of recurrent layers and of routers. older: as older converters wrote Qwen3-Next.
    joined: whether gate and up of experts are one tensor.
    predicts: the decoder layer of a prediction layer, as a model of one layer; None: there is none.
    apart: whether the file is the companion that has only this layer.
    tensors: further tensors by name. in_blocks: the values of some of them in blocks of ``kind``.
    metadata: further metadata of the architecture: numbers, or lists of them.
    """
    config = copy.copy(model.config)
    config.allow_global_per_layer_attribute_access = True
    name, paired, more, fields = ARCHITECTURES[config.model_type]
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    count, own = config.num_hidden_layers + (predicts is not None), dict(model.named_parameters())
    names, writer = gguf.get_tensor_name_map(architecture, count), gguf.GGUFWriter(path, name)
    sizes = count, config.max_position_embeddings, config.hidden_size, config.intermediate_size
    add_sizes(writer, *sizes, config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps)
    if predicts is not None:
        writer.add_nextn_predict_layers(1)
        own = {key: value for key, value in own.items() if not (apart and ".layers." in key)}
        inside = ((key.partition("layers.0."), value) for key, value in predicts.named_parameters())
        own |= {f"model.layers.{count - 1}.{part}": value for (_, found, part), value in inside if found}
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope.get("full_attention") or rope)["rope_theta"])
    for key, field in fields.items():
        if (value := getattr(config, field)) is not None:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{name}.{key}", value)
    for key, value in metadata.items():
        (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"{name}.{key}", value)
    if name == "phi3":
        size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(size * rope["partial_rotary_factor"]))
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_pad_token_id(0)  # transformers assumes one outside a small vocabulary
    if name in ("mistral3", "gpt-oss"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        for key, field in YARN.items():
            add = writer.add_uint32 if key.startswith("original") else writer.add_float32
            if field in rope:
                add(f"{name}.rope.scaling.{key}", rope[field])
    if name == "mistral3":
        writer.add_float32(f"{name}.attention.temperature_scale", rope["llama_4_scaling_beta"])
    if name in ("qwen35", "qwen35moe", "qwen3next"):
        writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
        writer.add_full_attention_interval(2)
        writer.add_rope_dimension_count(int(config.head_dim * rope["partial_rotary_factor"]))
        if name != "qwen3next":
            writer.add_rope_dimension_sections([11, 11, 10, 0])
    if name == "gemma4":
        own |= {key: value for key, value in model.named_buffers() if key.endswith("layer_scalar")}
        add_layers(writer, config)
    vocab = config.vocab_size
    characters = [chr(point) for point in (*range(33, 127), *range(161, 173))][: vocab - 4]
    add_vocabulary(writer, "qwen2", ["<|endoftext|>", "<s>", "</s>", *characters, "AB"], "A B")
    random = np.random.default_rng(0)
    for parameter, tensor in own.items():
        where, _, leaf = parameter.rpartition(".")
        values = tensor.detach().float().numpy()
        if where.endswith("norm") and not where.endswith("linear_attn.norm"):
            values = values + np.float32(more)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(where.split(".")[-1])
        if paired and heads:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        parts = {f"{names.get_name(where)}.{leaf}": values}
        if leaf == "layer_scalar":
            parts = {f"{names.get_name(parameter)}.weight": values}
        if "linear_attn" in where:
            parts = recurrent_part(config, names, where, leaf, values, older)
        if leaf == "sinks":
            parts = {f"{names.get_name(parameter)}.weight": values}
        if where.endswith("experts"):
            turned = config.model_type == "gpt_oss"
            if turned and values.ndim == 3:
                values = values.swapaxes(1, 2)
            each = [values]
            if "gate" in leaf:
                each = [values[:, ::2], values[:, 1::2]] if turned else np.split(values, 2, 1)
            layer, keys = where.split(".")[2], ("gate", "up") if "gate" in leaf else ("down",)
            end = "bias" if leaf.endswith("bias") else "weight"
            if joined:
                keys, each = ("_".join(keys),), [np.concatenate(each, 1)]
            parts = {f"blk.{layer}.ffn_{key}_exps.{end}": part for key, part in zip(keys, each, strict=True)}
        for stored, part in parts.items():
            if part.ndim == 1 or "ffn_gate_inp" in stored or "conv1d" in stored or stored.endswith("bias"):
                writer.add_tensor(stored, np.ascontiguousarray(part))
                continue
            its = gates if gates and stored.endswith(("attn_gate.weight", "gate_exps.weight")) else kind
            whole, packed = its in WHOLE, gguf.GGMLQuantizationType[its]
            rows = part.reshape(-1, part.shape[-1])
            most = 1e-5 if its == "Q6_K" else 5e-4  # weights are then as large as those of a trained model
            blocks = gguf.quants.quantize(rows, packed) if whole else random_blocks(its, rows.shape, random, (0, most))
            writer.add_tensor(stored, blocks.reshape(*part.shape[:-1], -1), raw_dtype=packed)
    for stored, values in tensors.items():
        if stored in in_blocks:
            writer.add_tensor(stored, in_blocks[stored], raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            writer.add_tensor(stored, values)
    finish(writer)
    return path


def write_model(path: Path, architecture: str, kind: str, width: int = 32, tied: bool = False, **tensors: Any) -> Path:
    """Write a GGUF file of a 2-layer random model, all matrices of the type ``kind``.

    tensors: further tensors by name.
    """
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "vocab_size": 64}
    sizes |= {"max_position_embeddings": 64}
    if architecture == "qwen3":
        sizes["head_dim"] = 128  # what readers assume
    return write_family(path, rough_model(architecture, **sizes, tie_word_embeddings=tied), kind, tensors=tensors)


def recurrent_part(
    config: Any, names: Any, where: str, leaf: str, values: np.ndarray, older: bool
) -> dict[str, np.ndarray]:
    """Return a parameter of a recurrent layer in the order and form of a GGUF file.

    Value heads are ordered by their number at a key head, then by key head. Qwen3-Next keeps its order, but has two
    tensors for one parameter of the model (older files: one).
    """
    keys, heads, name = config.linear_num_key_heads, config.linear_num_value_heads, where.rpartition(".")[2]
    values = values.squeeze(1) if name == "conv1d" else -np.exp(values) if leaf == "A_log" else values
    before = 2 * keys * config.linear_key_head_dim if name in ("conv1d", "in_proj_qkv") else 0

    def tiled(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(keys, heads // keys, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    if name == "in_proj_qkvz" and not older:
        key, value = config.linear_key_head_dim, heads // keys * config.linear_value_head_dim
        q, k, v, z = np.split(values.reshape(keys, -1, values.shape[1]), np.cumsum([key, key, value]), 1)
        joined = {"attn_qkv": np.concatenate([each.reshape(-1, values.shape[1]) for each in (q, k, v)])}
        joined["attn_gate"] = z.reshape(-1, values.shape[1])
        return {f"blk.{where.split('.')[2]}.{key}.weight": part for key, part in joined.items()}
    if config.model_type == "qwen3_next":
        pass
    elif name == "out_proj":
        values = tiled(values.T).T
    elif name != "norm":
        values = np.concatenate((values[:before], tiled(values[before:])))
    stored = {"A_log": names.get_name(f"{where}.{leaf}"), "dt_bias": f"{names.get_name(where + '.dt_proj')}.bias"}
    return {stored.get(leaf) or f"{names.get_name(where)}.{leaf}": np.ascontiguousarray(values)}


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")
