"""The cache folder, atomic writing, and the YAML files of the package. Imports nothing heavy."""

from __future__ import annotations

import importlib.resources
import os
import tempfile
from pathlib import Path

from specdec.base.errors import SpecDecError, did_you_mean


def cache_dir() -> Path:
    """``$SPECDEC_CACHE``, else ``$XDG_CACHE_HOME/specdec``, else ``~/.cache/specdec``. It may not exist."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "specdec"


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to a temporary file beside ``path``, flush it, and rename it to ``path``."""
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


def shipped_configs(kind: str) -> dict[str, Path]:
    """The package's YAML files of a kind, "sweeps" or "train", by name."""
    folder = Path(str(importlib.resources.files("specdec.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(kind: str, name: str, what: str) -> Path:
    """The file ``name``, or the package's file of that name. Raises SpecDecError, which names ``what``, for neither."""
    known = shipped_configs(kind)
    if Path(name).is_file():
        return Path(name)
    if name not in known:
        raise SpecDecError(f"no {what} '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}, or a YAML file")
    return known[name]
