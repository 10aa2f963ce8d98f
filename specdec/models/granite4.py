"""Read dense Granite 4 models as models of the older type Granite, which compute the same.

Their checkpoints have the model type of Granite 4's hybrid models with Mamba layers, "granitemoehybrid".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from specdec.models.tensor_file import TensorInfo

# Config fields that a Granite lacks; those of Mamba layers begin with "mamba_".
OWN = {
    *("layer_types", "layers_block_type", "num_experts_per_tok", "num_local_experts", "position_embedding_type"),
    *("shared_intermediate_size", "time_step_limit"),
}
JOINED, DOWN = ".shared_mlp.input_linear.", ".shared_mlp.output_linear."


def as_granite(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for a dense Granite 4, the config fields of the model type "granite" that describe the same model.

    For any other model, return a copy of ``fields``. A model of the type "granitemoehybrid" is dense if all its layers
    have rotary attention and none has experts.
    fields: the fields of a config.json.
    """
    kinds = set(fields.get("layer_types") or fields.get("layers_block_type") or ("mamba",))
    dense = fields.get("model_type") == "granitemoehybrid" and kinds <= {"attention", "full_attention"}
    if not dense or fields.get("num_local_experts") != 0 or fields.get("position_embedding_type") != "rope":
        return dict(fields)
    rest = {key: value for key, value in fields.items() if key not in OWN and not key.startswith("mamba_")}
    return rest | {"model_type": "granite", "intermediate_size": fields.get("shared_intermediate_size", 1024)}


def renamed(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of a dense Granite 4 checkpoint by the names that a Granite checkpoint has.

    tensors: descriptions of the stored tensors by name. A Granite 4 stores the MLP's gate and up projections as one
    tensor, which becomes two descriptions of its halves. Descriptions of other checkpoints are returned as they are.
    """
    found = dict[str, TensorInfo]()
    for name, info in tensors.items():
        if JOINED in name and len(info.shape) == 2:
            shape, half = (info.shape[0] // 2, info.shape[1]), info.nbytes // 2
            for part, offset in (("gate_proj", info.offset), ("up_proj", info.offset + half)):
                matrix = replace(info, shape=shape, offset=offset, nbytes=half)
                found[name.replace(JOINED, f".mlp.{part}.")] = matrix
        else:
            found[name.replace(DOWN, ".mlp.down_proj.")] = info
    return found
