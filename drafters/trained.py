"""Where a trained drafter comes from: a folder, or the package, which ships some for known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter


def find(drafter: type[Drafter], target: Target, source: str | None) -> Path:
    """The folder ``source``, or the drafter shipped for the target's weights. Raises SpecDecError if there is none."""
    folder = drafter_folder.shipped(drafter.name, target) if source is None else Path(source)
    if folder is None:
        raise drafter.not_shipped(target.model.config._name_or_path)
    return folder


def read_config(folder: Path, kind: str, target: Target) -> dict[str, Any]:
    """A folder's config.json. Raises SpecDecError unless it is a ``kind`` drafter for the target's model."""
    config = drafter_folder.read_config(folder)
    if config["drafter"] != kind:
        raise SpecDecError(f"'{drafter_folder.called(folder)}' holds a '{config['drafter']}' drafter, not a {kind} one")
    drafter_folder.check_base(config, target, drafter_folder.called(folder))
    return config
