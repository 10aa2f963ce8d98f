"""The headers of safetensors files, and what tensors are called there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open

from specdec.models import packed
from specdec.models.tensor_file import PLAIN, TensorFile, TensorInfo

# Names of the tensors of a multimodal checkpoint's text model, in the text model alone.
TEXT_NAMES = {r"^language_model\.lm_head\.": "lm_head.", r"^(model\.)?language_model\.(model\.)?": "model."}


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data in a safetensors file, and its header. Raises SafetensorError for a broken file."""
    with safe_open(path, framework="numpy"):  # raises for a broken file; for torch it would map the whole file
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries: dict[str, Any] = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return 8 + size, entries


def numbers_in(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds; of types that may be packed up to eight a byte.

    Raises SafetensorError for a broken file.
    """
    found = dict[str, int]()
    for name, entry in header(path)[1].items():
        begin, end = entry["data_offsets"]
        whole = entry["dtype"] in PLAIN or entry["dtype"] == "I64"
        found[name] = math.prod(entry["shape"]) if whole else 8 * (end - begin)
    return found


def read_header(paths: Iterable[Path]) -> TensorFile:
    """The tensors of safetensors files. Raises SafetensorError for a broken file."""
    every, tensors = tuple(paths), dict[str, TensorInfo]()
    state = packed.stamp(every)
    for part, path in enumerate(every):
        begin, entries = header(path)
        for name, entry in entries.items():
            first, end = entry["data_offsets"]
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin + first, end - first, part)
    return TensorFile(every, state, tensors)
