"""Settings as pydantic models, whose errors are one sentence: ``NAME must be DESCRIPTION; got VALUE``.

A field's description completes the sentence. Knows no setting.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.options import shown


class Settings(BaseModel):
    """Immutable settings. Raises SpecDecError for an unknown name, a wrong type and a value out of range."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SpecDecError(self._sentence(error.errors()[0], values)) from None

    @classmethod
    def _sentence(cls, error: Any, values: dict[str, Any]) -> str:
        name = str(error["loc"][0])
        if name not in cls.model_fields:
            known = list(cls.model_fields)
            return f"unknown setting '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}"
        choices = error.get("ctx", {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
        near = did_you_mean(str(error["input"]), filter(None, choices))
        return f"{name} must be {cls.model_fields[name].description}{near}; got {shown(values[name])}"
