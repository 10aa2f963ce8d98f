"""The config and the generation config of a model as plain values, and their JSON files. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG, GENERATION = "config.json", "generation_config.json"


class Config:
    """The config of a text model: all fields of its transformers config as attributes, defaults included.

    The constructor takes the fields as keyword arguments. Reading a field that the config lacks raises AttributeError.
    Methods and private fields are those of a transformers config, as far as this package uses them.
    """

    is_encoder_decoder = False
    architectures: list[str] | None = None
    _attn_implementation = "sdpa"
    _name_or_path = ""
    _commit_hash: str | None = None

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:  # for type checkers: which fields there are depends on the family
        raise AttributeError(f"this '{vars(self).get('model_type')}' config has no {name}")

    def get_text_config(self) -> Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class GenerationSettings:
    """The fields of a ``generation_config.json`` as attributes; a field that the file lacks reads as None."""

    eos_token_id: int | list[int] | None = None
    repetition_penalty: float | None = None

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields that are not None as {name: value}."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_config(folder: Path) -> Config:
    """Return the model config in ``folder``, read from a config.json that ``write_config`` of this module wrote.

    Raises OSError if the file is missing, and ValueError if it is no JSON.
    """
    return Config(**json.loads((folder / CONFIG).read_text("utf-8")))


def write_config(folder: Path, config: Config) -> None:
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n", "utf-8")


def write_generation(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write ``fields`` to the generation_config.json in ``folder``, without the fields that are None."""
    given = {name: value for name, value in fields.items() if value is not None}
    (folder / GENERATION).write_text(json.dumps(given, indent=1) + "\n", "utf-8")


def read_generation(folder: Path) -> GenerationSettings:
    return GenerationSettings(**json.loads((folder / GENERATION).read_text("utf-8")))
