"""Trained drafters on disk: a folder with ``config.json`` and ``model.safetensors``.

Files are data: JSON and safetensors only. A folder names its drafter (``format``) and the base model it was trained
for by a fingerprint of that model's weights. Knows nothing about any particular drafter.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specdec.errors import SpecDecError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``. Raises SpecDecError if it is missing, broken or not a drafter's."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise SpecDecError(f"drafter folder '{folder}' does not exist")
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SpecDecError(f"'{folder}' is no drafter folder: {CONFIG} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SpecDecError(f"cannot read '{path}': {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("drafter"), str):
        raise SpecDecError(f"'{path}' does not describe a specdec drafter (no 'drafter' entry)")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The folder's tensors. Raises SpecDecError if the file is missing, truncated or not safetensors."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise SpecDecError(f"'{folder}' is no complete drafter folder: {WEIGHTS} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise SpecDecError(f"'{path}' is truncated or no safetensors file ({error}); copy or train it again") from None


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a drafter folder; each file appears whole or not at all. Raises SpecDecError if the disk refuses."""
    text = json.dumps(config, indent=2) + "\n"
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in ((WEIGHTS, save(contiguous)), (CONFIG, text.encode())):
            replace(folder / name, data)
    except OSError as error:
        raise SpecDecError(f"cannot write the drafter to '{folder}': {error.strerror or error}") from None


def replace(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` atomically (a temporary file beside it, flushed, then renamed)."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def shipped(drafter: str, fingerprint: str) -> Path | None:
    """The folder of a drafter of that kind shipped in the package for the base with that fingerprint, if any."""
    root = Path(str(importlib.resources.files("specdec.drafters"))) / "pretrained"
    for path in sorted(root.glob(f"{drafter}/*/{CONFIG}")):
        if read_config(path.parent).get("base", {}).get("fingerprint") == fingerprint:
            return path.parent
    return None


def check_base(config: dict[str, Any], fingerprint: str, where: str) -> None:
    """Raise SpecDecError if the drafter of ``config`` was trained for other base weights."""
    trained = config.get("base", {}).get("fingerprint")
    if trained != fingerprint:
        raise SpecDecError(
            f"drafter '{where}' was trained for base weights {trained}, but the loaded model's are {fingerprint}; "
            "train one for this model with 'specdec train' or load the model it belongs to"
        )
