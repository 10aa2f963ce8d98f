"""Read the headers of safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from specdec.models import packed
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo

# Names of the text model's tensors in a multimodal checkpoint (patterns), and in a text checkpoint.
TEXT_NAMES = {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."}


def read_header(paths: Iterable[Path]) -> TensorFile:
    """Return the descriptions of all tensors in the safetensors files ``paths``, which belong to one model.

    Reads no tensor data. Raises SafetensorError for a broken file, and OSError for a missing one.
    """
    every, tensors = tuple(paths), dict[str, TensorInfo]()
    state = packed.stamp(every)
    for part, path in enumerate(every):
        with safe_open(path, framework="numpy"):  # raises for a broken file; for torch it would map the whole file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries: dict[str, Any] = json.loads(file.read(size))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), first, end - first, part)
    return TensorFile(every, state, tensors)


def numbers_in(paths: Iterable[Path]) -> dict[str, int]:
    """Return {tensor name: number of its values} for the safetensors files ``paths``.

    For types in which a byte may pack several values, the number is an upper bound: eight values for each byte. Raises
    SafetensorError for a broken file.
    """
    infos = read_header(paths).tensors
    return {
        name: math.prod(info.shape) if info.kind in PLAIN or info.kind == "I64" else 8 * info.nbytes
        for name, info in infos.items()
    }
