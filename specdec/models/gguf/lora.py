"""Read LoRA adapters in GGUF files, as llama.cpp's converter writes them.

Such a file has two tensors, ``.lora_a`` and ``.lora_b``, for each adapted tensor of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.base.errors import SpecDecError
from specdec.models import families
from specdec.models.gguf.file import GGUFFile, read_header
from specdec.models.gguf.model import rows_of, tensor_names
from specdec.models.native_model import NativeModel
from specdec.models.tensor_file import PLAIN

ENDS = {".lora_a": 0, ".lora_b": 1}  # suffix of a tensor's name -> which of the two matrices it is


def read(name: str, path: Path, model: Any, file: GGUFFile) -> tuple[dict[str, tuple[Tensor, Tensor, float]], str]:
    """Read a LoRA adapter from a GGUF file; return (changes, name of the base model or "").

    The changes are {module path of a linear layer: (A [r, in], B [out, r], scale)}, A and B in float32, where r is the
    rank and scale * B @ A is to be added to the layer's weight.
    name: the adapter's name in messages. path: the adapter's GGUF file. model: the model to adapt, which is not
    changed. file: the header of the GGUF file that the model is from. Raises SpecDecError if the adapter is broken, is
    for another architecture, or changes anything but linear layers.
    """
    adapter = read_header(path, name)
    kind = tuple(adapter.metadata.get(key) for key in ("general.type", "adapter.type"))
    if kind != ("adapter", "lora"):
        raise SpecDecError(f"'{name}' is no LoRA adapter: its GGUF file is of the type {kind[0]!r}, {kind[1]!r}")
    if adapter.architecture != file.architecture:
        raise SpecDecError(
            f"adapter '{name}' is for models of the architecture '{adapter.architecture}', and this one is "
            f"'{file.architecture}'; load the model it was made for"
        )
    if "adapter.alora.invocation_tokens" in adapter.metadata:
        raise SpecDecError(f"adapter '{name}' acts after invocation tokens only, which is not supported")
    alpha = adapter.metadata.get("adapter.lora.alpha")
    if not isinstance(alpha, int | float):
        raise SpecDecError(f"adapter '{name}' is broken: it has no adapter.lora.alpha; get it again")
    parts: dict[str, dict[int, Tensor]] = {}
    for tensor, info in adapter.tensors.items():
        end = next((end for end in ENDS if tensor.endswith(end)), None)
        if end is None or info.kind not in PLAIN or len(info.shape) != 2:
            raise SpecDecError(f"adapter '{name}' has the tensor '{tensor[:60]}', and only LoRA is supported")
        values = adapter.data(info).view(PLAIN[info.kind]).view(info.shape)
        parts.setdefault(tensor.removesuffix(end), {})[ENDS[end]] = values
    whole = NativeModel(model.config, torch.bfloat16)  # in ``model``, matrices in blocks are no parameters
    parameters = {names[0]: parameter for parameter, names in tensor_names(file, whole).items() if len(names) == 1}
    found = dict[str, tuple[Tensor, Tensor, float]]()
    for tensor, pair in parts.items():
        path_of = parameters.get(tensor, "").removesuffix(".weight")
        if not path_of or "linear_attn" in path_of or ".experts" in path_of or path_of.endswith("embed_tokens"):
            raise SpecDecError(
                f"adapter '{name}' changes '{tensor[:60]}', and only changes of linear layers that the model has are "
                "supported"
            )
        if pair.keys() != {0, 1}:
            raise SpecDecError(f"adapter '{name}' is broken: '{tensor}' has only one of its two matrices; get it again")
        down, up = pair[0].float(), pair[1].float()
        family = families.FAMILIES[model.config.model_type]
        fits = len(up) == whole.get_parameter(parameters[tensor]).shape[0]  # what does not is refused as it is merged
        if family.interleaved and fits and (rows := rows_of(model.config, path_of, len(up))) is not None:
            up = up[rows.long()]  # the file has rows of queries and keys in pairs
        scale = float(alpha) / down.shape[0] if alpha else 1.0  # as llama.cpp does
        found[path_of] = down, up, scale
    base = adapter.metadata.get("general.base_model.0.name", "")
    return found, str(base)[:80]
