"""Recurrent layers in GGUF files: their metadata, and the tensors that a converter changes.

A GGUF file has the value heads of Qwen3.5 in another order: the first value heads of all key heads, then the second
ones. Value heads are rows of most matrices, whose blocks stay as they are and are indexed by row. They are columns of
the output projection, which a runtime reads in the file's order.
The input projection of Qwen3-Next (in_proj_qkvz: key head by key head, queries, keys, values and gates) is two tensors
in a file: queries, keys and values of all heads (in_proj_qkv), and gates of all heads (in_proj_z). Older files have one
tensor, as in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError


def complete(name: str, values: dict[str, Any]) -> None:
    """Replace GGUF metadata in ``values``, in place, by the fields of a transformers config that follow from them.

    name: the model's name in the SpecDecError that is raised for impossible values.
    """
    heads = values.get("linear_num_value_heads") or 1
    values["linear_value_head_dim"] = values.pop("linear_values", 0) // heads
    if heads % (keys := values.get("linear_num_key_heads") or 1):
        raise SpecDecError(f"cannot load model '{name}': its GGUF file has {heads} value heads for {keys} key heads")
    interval = values.pop("full_attention_interval", 4)
    if values["num_hidden_layers"] < 1 or not 0 < interval <= values["num_hidden_layers"]:
        raise SpecDecError(f"cannot load model '{name}': its GGUF file has no layer with attention")
    kinds = ["linear_attention"] * (interval - 1) + ["full_attention"]
    values["layer_types"] = [kinds[layer % interval] for layer in range(values["num_hidden_layers"])]


def tensors_of(path: str) -> tuple[str, ...]:
    """Return the two module paths of Qwen3.5 that together have the weight of Qwen3-Next's module ``path``.

    An empty tuple: the module has one tensor of its own.
    """
    whole, joined, _ = path.partition("_qkvz")
    return (f"{whole}_qkv", f"{whole}_z") if joined else ()


def tensor_rows(config: Any) -> tuple[int, int]:
    """Return the numbers of rows of the two tensors of Qwen3-Next's input projection: in_proj_qkv and in_proj_z."""
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return 2 * config.linear_num_key_heads * config.linear_key_head_dim + values, values


def rows_of_two(config: Any) -> Tensor:
    """Return, for each row of Qwen3-Next's input projection, its row in the two tensors of a file put together.

    int64 [rows]; the tensors are those of ``tensor_rows``, one below the other.
    """
    heads, (first, values) = config.linear_num_key_heads, tensor_rows(config)
    keys = (first - values) // 2
    parts = torch.arange(first + values).split([keys, keys, values, values])
    return torch.cat([part.view(heads, -1) for part in parts], 1).flatten()


def value_heads(config: Any, size: int) -> Tensor:
    """Return, for each row of the model's value heads, its row in a file, int64 [heads * size].

    size: rows per value head.
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    heads = torch.arange(values).view(values // keys, keys).t().flatten()
    return (heads[:, None] * size + torch.arange(size)).flatten()


def rows_of(config: Any, path: str, leaf: str) -> Tensor | None:
    """Return, for each row of the parameter ``leaf`` of the module ``path``, its row in the file's tensor.

    int64 [rows]; None: the rows are in the same order.
    """
    layer, _, name = path.rpartition("linear_attn")
    if not layer or name in (".norm", ".out_proj"):
        return None
    if leaf in ("A_log", "dt_bias") or name in (".in_proj_a", ".in_proj_b"):
        return value_heads(config, 1)
    found = value_heads(config, config.linear_value_head_dim)
    before = 0 if name == ".in_proj_z" else 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat((torch.arange(before), before + found))


def columns_of(config: Any, path: str) -> Tensor | None:
    """Return, for each column of the file's tensor of the module ``path``, its column in the model's matrix.

    int64 [in]; None: the columns are in the same order.
    """
    if not path.endswith("linear_attn.out_proj"):
        return None
    return value_heads(config, config.linear_value_head_dim).argsort()


def restored(path: str, leaf: str, values: Tensor) -> Tensor:
    """Convert the ``values`` of a GGUF tensor to those of the parameter ``leaf`` (A_log, conv1d) of module ``path``."""
    if leaf == "A_log":
        return (-values.float()).log()
    return values[:, None] if path.endswith("linear_attn.conv1d") else values
