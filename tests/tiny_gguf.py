"""A tiny embedded model: its GGUF file, its name, and a stand-in for what must not be called."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

NAME = "tiny-test-model"


def write_gguf(
    path: Path,
    width: int = 32,
    heads: int = 4,
    packed: gguf.GGMLQuantizationType | None = None,
    seed: int = 0,
    pre: str = "smollm",
    experts: int = 0,
) -> dict[str, np.ndarray]:
    """A 2-layer random Llama with a byte-level vocabulary in which "\\n\\n" is one token. Returns the fp32 tensors.

    width: hidden size; every two of ``heads`` share keys. packed: how the layers' matrices are stored (None: in fp32).
    pre: the pre-tokenizer. experts: so many in each layer of a Qwen3-MoE instead, two for each token.
    """
    size, inner, shared = width // heads, 768 if experts else width * 3 // 2, width // 2  # 768: what readers assume
    random = np.random.default_rng(seed)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    tokens = ["<|endoftext|>", "<s>", "</s>", *map(chr, printable), *(chr(256 + i) for i in range(len(rest))), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    if experts:
        writer.add_key_length(size)
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")
