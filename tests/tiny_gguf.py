"""A tiny embedded model: its GGUF file, its name, and a stand-in for what must not be called."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

NAME = "tiny-test-model"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A 2-layer random Llama with a byte-level vocabulary in which "\\n\\n" is one token. Returns the fp32 tensors."""
    random = np.random.default_rng(0)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    tokens = ["<|endoftext|>", "<s>", "</s>", *map(chr, printable), *(chr(256 + i) for i in range(len(rest))), "ĊĊ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.attn_norm": (32,), f"blk.{i}.ffn_norm": (32,)}
        shapes |= {f"blk.{i}.attn_q": (32, 32), f"blk.{i}.attn_k": (16, 32)}
        shapes |= {f"blk.{i}.attn_v": (16, 32), f"blk.{i}.attn_output": (32, 32)}
        shapes |= {f"blk.{i}.ffn_gate": (48, 32), f"blk.{i}.ffn_up": (48, 32), f"blk.{i}.ffn_down": (32, 48)}
    tensors = {f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def forbidden(*args, **kwargs):
    raise AssertionError("must not be called")
