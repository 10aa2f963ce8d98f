"""Settings of a training run: a pydantic model filled from a YAML preset and overrides."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from specdec.base import inputs
from specdec.base.errors import SpecDecError, did_you_mean
from specdec.base.settings import short_repr

DROPPED = ("compile", "learning_rate", "leap_rate", "search_gain")  # of earlier versions; those rates were absolute
RENAMED = {"final_leap": "final_projection"}
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Files = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class TrainSettings(BaseModel):
    """What decides a run of any method; written, with the method's own, to ``train.yaml`` in the output folder.

    replaces: for a setting that is given, what becomes of the preset's settings that exclude it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {"steps": {"minutes": None}, "minutes": {"steps": None}}

    method: str = ""
    model: str = "smollm2-135m-instruct"
    prompts: Files = ()  # files of prompts or of token-id answers
    text: Files = ()  # files of plain text: the base's choice at every position, no answers needed
    text_tokens: Positive = 512  # of a piece of text
    holdout: Files = ()  # files whose prompts must not be trained on
    output: str = ""
    dtype: str = "bfloat16"  # of the frozen base and of the student's passes; master weights are float32
    storage: Literal["auto", "bfloat16", "int8"] = "auto"  # of the drafter's file; auto: the dtype
    device: str = "auto"  # the first CUDA device that can compute, else the CPU
    seed: int = Field(0, ge=0, le=2**63 - 1)
    init: str = ""  # a trained drafter's folder to begin from; empty: from what has a closed form
    draft_vocab: int = Field(8192, ge=0)  # most frequent tokens of the answers; 0: the full vocabulary

    # Answers by the base itself, where the files hold prompts only.
    max_new_tokens: Positive = 256
    sampled: Share = 0.0  # share of the prompts answered at ``temperature``, the others greedily
    temperature: PositiveFloat = 0.8
    eval_fraction: float = Field(0.03, gt=0, lt=1)  # of the prompts, held out for evaluation, but
    eval_answers: Positive = 100  # no more than these

    # Training.
    minutes: PositiveFloat | None = 30.0  # of gradient training (answers and teacher states come before), or
    steps: Positive | None = None  # this many updates
    rows: Positive = 16  # windows a batch
    window: Positive = 64  # answer positions a window
    fit_tokens: Positive = 100_000  # for what is fitted in closed form
    relative_rate: PositiveFloat = (
        0.05  # learning rate of AdamW, as a share of a parameter's size (``TrainingMethod.size``)
    )
    warmup: Positive = 20  # updates
    decay: float = Field(1.0, gt=0, le=1)  # last share of the run over which the rate falls linearly to zero
    clip: PositiveFloat = 1.0
    sharpen: Share = 0.0  # share of the target's mass moved onto the base's most likely token
    checkpoint_minutes: float = 3.0
    eval_minutes: float = 10.0

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("it does not take true or false")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps as the length of the training")
        return self


S = TypeVar("S", bound=TrainSettings)


def load_settings(kind: type[S], method: str, preset: str | None, overrides: Mapping[str, Any]) -> S:
    """The preset (a name of ``configs/train`` or a YAML file; None: the method's name) with ``overrides`` on top.

    kind: the method's settings class. Overrides that are None are not given. Raises SpecDecError for unknown presets
    and keys and for values of the wrong kind.
    """
    preset = preset or method
    values = dict(_preset(preset))
    if values.setdefault("method", method) != method:
        raise SpecDecError(f"preset '{preset}' is for 'specdec train {values['method']}'")
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, others in kind.replaces.items():
        if given.get(key):
            values |= others
    return from_mapping(kind, current(values) | given, f"preset '{preset}'")


def current(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without settings that only earlier versions had, and with today's names of the others."""
    return {RENAMED.get(key, key): value for key, value in recipe.items() if key not in DROPPED}


def from_mapping(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Settings from plain values. Raises SpecDecError for unknown keys, wrong kinds and values out of range."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        key, reason = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            raise SpecDecError(
                f"{where} has an unknown setting '{key}'{did_you_mean(key, kind.model_fields)}"
            ) from None
        if not key:
            raise SpecDecError(f"{where}: {reason}") from None
        reason = reason[0].lower() + reason[1:]
        raise SpecDecError(f"{where}: setting '{key}' cannot be {short_repr(found['input'])}: {reason}") from None


def _preset(name: str) -> dict[str, Any]:
    folder = importlib.resources.files("specdec.configs") / "train"
    path: Any = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        raise SpecDecError(
            f"no training preset '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}, or a YAML file"
        )
    try:
        data = inputs.read_yaml(path)
    except (OSError, ValueError) as error:
        raise SpecDecError(f"cannot read training preset '{path}': {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise SpecDecError(f"training preset '{path}' is not a mapping of settings")
    return data
