"""Translate recurrent layers (gated delta rule) of GGUF files: metadata, and tensors that a converter has changed.

A GGUF file has the value heads of Qwen3.5 in another order than the model: the first value head of every key head, then
the second one, and so on. Value heads are rows of most matrices, whose blocks stay as they are and are indexed by row.
They are columns of the output projection, which a runtime reads in the file's order.
The input projection of Qwen3-Next (in_proj_qkvz: queries, keys, values and gates, key head by key head) is two tensors
in newer files: queries, keys and values of all heads (in_proj_qkv), and gates of all heads (in_proj_z). Older files
have one tensor, as the model has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError


def complete(name: str, values: dict[str, Any]) -> None:
    """Replace GGUF metadata of recurrent layers in ``values``, in place, by the fields of a transformers config.

    name: the model's name in messages.
    values: config fields by name. "num_hidden_layers" is required; "linear_num_value_heads" and "linear_num_key_heads"
        default to 1. Two entries of GGUF metadata are replaced: "linear_values" (int, number of values of all value
        heads together; default 0) by "linear_value_head_dim", and "full_attention_interval" (int; default 4: layers 3,
        7, .. have attention, the last of each 4) by "layer_types".

    Raises SpecDecError for values that do not fit each other.
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
    """Return the module paths of in_proj_qkv and in_proj_z for the path of a Qwen3-Next module in_proj_qkvz.

    A GGUF file may store the weight of in_proj_qkvz as two tensors that are named by these paths. Returns () for the
    path of any other module.
    """
    whole, joined, _ = path.partition("_qkvz")
    return (f"{whole}_qkv", f"{whole}_z") if joined else ()


def tensor_rows(config: Any) -> tuple[int, int]:
    """Return (rows of in_proj_qkv, rows of in_proj_z), the two tensors of a recurrent layer's input projection.

    config: the config of a Qwen3-Next.
    """
    values = config.linear_num_value_heads * config.linear_value_head_dim
    return 2 * config.linear_num_key_heads * config.linear_key_head_dim + values, values


def rows_of_two(config: Any) -> Tensor:
    """Return, for each row of Qwen3-Next's input projection in_proj_qkvz, the index of its row in a GGUF file.

    The index counts through the file's two tensors in_proj_qkv and in_proj_z, one below the other. config: the model's
    config. The result is int64 [rows].
    """
    heads, (first, values) = config.linear_num_key_heads, tensor_rows(config)
    keys = (first - values) // 2
    parts = torch.arange(first + values).split([keys, keys, values, values])
    return torch.cat([part.view(heads, -1) for part in parts], 1).flatten()


def value_heads(config: Any, size: int) -> Tensor:
    """Return, for each row of the value heads in the model's order, the index of its row in a GGUF file's order.

    The file has the first value head of every key head, then the second one of every key head, and so on.
    config: the config of a model with recurrent layers (gated delta rule). size: number of rows of a value head in the
    matrix. The result is int64 [value heads * size].
    """
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    heads = torch.arange(values).view(values // keys, keys).t().flatten()
    return (heads[:, None] * size + torch.arange(size)).flatten()


def rows_of(config: Any, path: str, leaf: str) -> Tensor | None:
    """Return, for each row of a recurrent layer's parameter in the model, the index of its row in the GGUF file.

    config: the model's config. path: the module's path, such as "model.layers.0.linear_attn.in_proj_qkv". leaf: the
    parameter's name in the module, such as "weight". The result is int64 [rows], or None if the rows of this parameter
    are in the same order, or it belongs to no recurrent layer.
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
    """Return, for each column of a module's matrix in a GGUF file, the index of its column in the model, int64 [in].

    config: the model's config. path: the module's path, such as "model.layers.0.linear_attn.out_proj". Returns None if
    the columns of this matrix are in the same order.
    """
    if not path.endswith("linear_attn.out_proj"):
        return None
    return value_heads(config, config.linear_value_head_dim).argsort()


def restored(path: str, leaf: str, values: Tensor) -> Tensor:
    """Return a recurrent layer's parameter of a GGUF file with the changes of llama.cpp's converter undone.

    Rows and columns are not reordered here. path: the module's path. leaf: the parameter's name in the module. values:
    the values in the file. For "A_log" the file has -exp(A_log); the weight of conv1d lacks its middle dimension of
    size 1. Other parameters are returned as they are.
    """
    if leaf == "A_log":
        return (-values.float()).log()
    return values[:, None] if path.endswith("linear_attn.conv1d") else values
