"""Recurrent layers in GGUF files: their metadata, and the tensors that a converter changes.

Value heads of Qwen3.5 lie in another order there: the first ones of all key heads come before the second ones. As they
are rows of most matrices, blocks stay as they are. They are columns of the last one, which a runtime reads in the
file's order. The first matrix of Qwen3-Next, with all parts of a key head before the next head's, is two tensors there:
queries, keys and values of all heads, and the gates of all heads. In older files it is one, as in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError


def complete(name: str, values: dict[str, Any]) -> None:
    """Make fields of a config from numbers of the metadata that are none."""
    heads = values.get("linear_num_value_heads") or 1
    values["linear_value_head_dim"] = values.pop("linear_values", 0) // heads
    if heads % (keys := values.get("linear_num_key_heads") or 1):
        raise SpecDecError(f"cannot load model '{name}': its GGUF file has {heads} value heads for {keys} key heads")
    values["num_hidden_layers"] -= values.pop("nextn_layers", 0)
    interval = values.pop("full_attention_interval", 4)
    if values["num_hidden_layers"] < 1 or not 0 < interval <= values["num_hidden_layers"]:
        raise SpecDecError(f"cannot load model '{name}': its GGUF file has no layer with attention")
    kinds = ["linear_attention"] * (interval - 1) + ["full_attention"]
    values["layer_types"] = [kinds[layer % interval] for layer in range(values["num_hidden_layers"])]


def tensors_of(path: str) -> tuple[str, ...]:
    """The modules of Qwen3.5 that have the tensors of a module of Qwen3-Next; none: it has one of its own."""
    whole, joined, _ = path.partition("_qkvz")
    return (f"{whole}_qkv", f"{whole}_z") if joined else ()


def tensor_rows(config: Any) -> tuple[int, int]:
    """The rows of the two tensors of the first matrix of Qwen3-Next."""
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return 2 * config.linear_num_key_heads * config.linear_key_head_dim + values, values


def rows_of_two(config: Any) -> Tensor:
    """The row of these two tensors, one below the other, for each row of that matrix."""
    heads, (first, values) = config.linear_num_key_heads, tensor_rows(config)
    keys = (first - values) // 2
    parts = torch.arange(first + values).split([keys, keys, values, values])
    return torch.cat([part.view(heads, -1) for part in parts], 1).flatten()


def value_heads(config: Any, size: int) -> Tensor:
    """The place in a file of each row that belongs to value heads, ``size`` rows a head."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    heads = torch.arange(values).view(values // keys, keys).t().flatten()
    return (heads[:, None] * size + torch.arange(size)).flatten()


def rows_of(config: Any, path: str, leaf: str) -> Tensor | None:
    """The row of the file's tensor for each row of a parameter; None: the same."""
    layer, _, name = path.rpartition("linear_attn")
    if not layer or name in (".norm", ".out_proj"):
        return None
    if leaf in ("A_log", "dt_bias") or name in (".in_proj_a", ".in_proj_b"):
        return value_heads(config, 1)
    found = value_heads(config, config.linear_value_head_dim)
    before = 0 if name == ".in_proj_z" else 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat((torch.arange(before), before + found))


def columns_of(config: Any, path: str) -> Tensor | None:
    """The column of a matrix that each column of the file's is; None: the same."""
    if not path.endswith("linear_attn.out_proj"):
        return None
    return value_heads(config, config.linear_value_head_dim).argsort()


def restored(path: str, leaf: str, values: Tensor) -> Tensor:
    """A parameter of a recurrent layer from what the converter made of it."""
    if leaf == "A_log":
        return (-values.float()).log()
    return values[:, None] if path.endswith("linear_attn.conv1d") else values
