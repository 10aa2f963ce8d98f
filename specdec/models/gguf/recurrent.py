"""Recurrent layers in GGUF files: their metadata, and the tensors that a converter changes.

Value heads lie in another order there: the first ones of all key heads come before the second ones. As they are rows of
most matrices, blocks stay as they are. They are columns of the last one, which a runtime reads in the file's order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError


def complete(name: str, values: dict[str, Any]) -> None:
    """Make fields of a config from numbers of the metadata that are none."""
    heads, size = values.get("linear_num_value_heads") or 1, values.get("head_dim") or 1
    values["linear_value_head_dim"] = values.pop("linear_values", 0) // heads
    values["partial_rotary_factor"] = values.pop("rotated", size) / size
    values["num_hidden_layers"] -= values.pop("nextn_layers", 0)
    interval = values.pop("full_attention_interval", 4)
    if values["num_hidden_layers"] < 1 or not 0 < interval <= values["num_hidden_layers"]:
        raise SpecDecError(f"cannot load model '{name}': its GGUF file has no layer with attention")
    kinds = ["linear_attention"] * (interval - 1) + ["full_attention"]
    values["layer_types"] = [kinds[layer % interval] for layer in range(values["num_hidden_layers"])]


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
