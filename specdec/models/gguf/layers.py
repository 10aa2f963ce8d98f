"""Translate the GGUF metadata of Gemma 4, whose layers differ, into fields of a transformers config.

Some of these metadata are arrays with a value for each layer.
"""

from __future__ import annotations

from typing import Any

import torch

from specdec.base.errors import SpecDecError
from specdec.models.gguf.file import GGUFFile

ROPE_FACTORS = "rope_freqs.weight"
TABLE = "per_layer_token_embd.weight"
STILL = 1e20  # a rotary frequency that is divided by more does not rotate
# Entries of ``values`` that are no fields of a config, or that a field for single layers replaces.
RAW = "sliding", "global_head_dim", "rotated", "rotated_sliding", "rope_local_base_freq", "rope_theta"
EXPERTS = "num_experts", "num_experts_per_tok", "moe_intermediate_size"


def fields(name: str, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of Gemma 4's transformers config that describe single layers, from the GGUF file's metadata.

    These are ``layer_types``, ``use_double_wide_mlp``, ``per_layer_config``, ``attention_k_eq_v``, ``rope_parameters``
    and, if the file has embeddings for each layer, ``vocab_size_per_layer_input``.

    name: the model's name in messages.
    file: the GGUF file, of which the tensors' names and shapes and the rotary divisors are read.
    values: the config's other fields by name, and raw metadata of the file that are no fields of a config, such as
        "sliding" (``RAW``, ``EXPERTS``). It is changed in place: the raw metadata are removed, and fields that are
        lists with a value for each layer become one number: ``intermediate_size`` that of the first layer,
        ``num_key_value_heads`` that of sliding-window layers.

    Raises SpecDecError for impossible metadata, and for mixtures of experts, which are not supported.
    """
    raw = {key: values.pop(key, None) for key in (*RAW, *EXPERTS)}
    if raw["num_experts"]:
        raise SpecDecError(
            f"cannot load model '{name}': GGUF files of Gemma 4 mixtures (26B-A4B) are not supported, since their "
            "experts stand beside an MLP; get the safetensors files"
        )
    count: Any = values.get("num_hidden_layers")
    shared = values.get("num_kv_shared_layers", 0)
    sliding, size, head = raw["sliding"], raw["global_head_dim"], values.get("head_dim")
    inner = _each(values.get("intermediate_size"), count)
    keys = _each(values.get("num_key_value_heads"), count)
    known = isinstance(sliding, list) and len(sliding) == len(inner) == len(keys) == count and count > 0
    if not known or not {*map(type, sliding)} <= {bool} or type(shared) is not int or not 0 <= shared < count:
        raise SpecDecError(f"cannot load model '{name}': its GGUF file does not say what its layers are")
    first, full = count - shared, [n for n in range(count) if not sliding[n]]
    wide = inner[-1] != inner[0]
    alike = len({keys[n] for n in full}) <= 1 and len({keys[n] for n in range(count) if sliding[n]}) <= 1
    if not alike or inner != [inner[0] * (1 + (wide and n >= first)) for n in range(count)]:
        raise SpecDecError(f"cannot load model '{name}': layers of one kind have different sizes in its GGUF file")
    if raw["rotated"] not in (None, size) or raw["rotated_sliding"] not in (None, head):
        raise SpecDecError(f"cannot load model '{name}': only a part of each head rotates, which is unknown in Gemma 4")
    values |= {
        "intermediate_size": inner[0],
        "num_key_value_heads": next((keys[n] for n in range(count) if sliding[n]), 0),
    }
    full_rope = {"rope_type": "proportional", "partial_rotary_factor": _rotating(name, file)}
    found: dict[str, Any] = {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
        "use_double_wide_mlp": wide,
        "per_layer_config": {n: {"head_dim": size, "num_key_value_heads": keys[n]} for n in full},
        "attention_k_eq_v": any(f"blk.{n}.attn_v.weight" not in file.tensors for n in full if n < first),
        "rope_parameters": {
            "full_attention": full_rope | {"rope_theta": raw["rope_theta"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": raw["rope_local_base_freq"]},
        },
    }
    if TABLE in file.tensors:
        found["vocab_size_per_layer_input"] = file.tensors[TABLE].shape[0]
    return found


def unused(config: Any) -> set[str]:
    """Return names of tensors, such as "blk.20.attn_k.weight", that a GGUF file may have and that no layer reads.

    They are the key and value projections of layers that read the keys and values of other layers (Gemma 4).

    config: the model's config; without such layers, the result is empty.
    """
    count, shared = config.num_hidden_layers, getattr(config, "num_kv_shared_layers", None) or 0
    parts = "attn_k", "attn_v", "attn_k_norm"
    return {f"blk.{layer}.{part}.weight" for layer in range(count - shared, count) for part in parts}


def _each(value: Any, count: Any) -> list[int]:
    """Return a metadata value as a list of positive ints below 2^20; []: it is anything else. Both are untrusted.

    value: one int for all layers, which is repeated, or a list of any length, which is returned. count: number of
    layers.
    """
    found = value if isinstance(value, list) else [value] * (count if type(count) is int and 0 < count < 1 << 14 else 0)
    return found if all(type(each) is int and 0 < each < 1 << 20 for each in found) else []


def _rotating(name: str, file: GGUFFile) -> float:
    """Return the fraction of an attention head that rotates in layers with full attention.

    The file's tensor "rope_freqs.weight" has a divisor for each rotary frequency: 1, or a huge number, which stops
    rotation. The result is the share of ones, in (0, 1]. Raises SpecDecError if the tensor has other divisors or is
    missing.

    name: the model's name in messages. file: the GGUF file.
    """
    info = file.tensors.get(ROPE_FACTORS)
    divisors = torch.empty(0) if info is None or info.kind != "F32" else file.data(info).view(torch.float32)
    rotates = divisors == 1
    count = int(rotates.sum())
    if not count or not bool(rotates[:count].all()) or not bool((divisors[count:] > STILL).all()):
        raise SpecDecError(f"cannot load model '{name}': its GGUF file divides rotary frequencies in an unknown way")
    return count / len(divisors)
