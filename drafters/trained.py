"""Where a trained drafter comes from: a folder, or the package, which ships some for known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.speculation.draft import Drafter


def command(training: str, target: Target) -> str:
    """How to train a drafter for the target's model."""
    return f"{training} --model {target.model.config._name_or_path or 'MODEL'} --prompts FILE --output DIR"


def find(drafter: type[Drafter], target: Target, source: str | None) -> Path:
    """The folder ``source``, or the drafter shipped for the target's weights. Raises SpecDecError if there is none."""
    folder = drafter_folder.shipped(drafter.name, target.fingerprint) if source is None else Path(source)
    if folder is None:
        raise SpecDecError(
            f"no {drafter.name} drafter is shipped for this model; train one: "
            f"{command(str(drafter.training), target)}, then pass --drafter DIR"
        )
    return folder


def read_config(folder: Path, kind: str, target: Target) -> dict[str, Any]:
    """A folder's config.json. Raises SpecDecError unless it is a ``kind`` drafter for the target's weights."""
    config = drafter_folder.read_config(folder)
    if config["drafter"] != kind:
        raise SpecDecError(f"'{folder}' holds a '{config['drafter']}' drafter, not a {kind} one")
    drafter_folder.check_base(config, target.fingerprint, str(folder))
    return config
