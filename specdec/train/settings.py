"""Settings of a training run, from a YAML preset and overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.base.files import find_config
from specdec.base.settings import Settings

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Files = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class TrainSettings(Settings):
    """The settings that all training methods share; a method's own class adds to them.

    The comment beside each field explains it. A run writes its settings to ``train.yaml`` in the output folder.
    replaces: {setting: {other setting: value}}; when the first is given as an override, the preset's value of the other
    is replaced by this value.
    """

    model_config = ConfigDict(strict=False)  # YAML has lists for tuples, and text for 1e-5
    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {"steps": {"minutes": None}, "minutes": {"steps": None}}

    method: str = ""  # the training method's name
    model: str = "smollm2-135m-instruct"  # the base model: a name, a folder or a hub id
    adapter: str | None = None  # a LoRA adapter to merge into the model; None: no adapter
    prompts: Files = ()  # files of prompts or of token-id answers
    holdout: Files = ()  # files whose prompts must not be trained on
    output: str = ""  # output folder
    dtype: str = "auto"  # of the base model and the running copy (``trainer.open_target``); masters are float32
    storage: Literal["auto", "bfloat16", "int8"] = "auto"  # of the drafter's file; auto: bfloat16, or float32 as dtype
    device: str = "auto"  # auto: the first usable CUDA device, else the CPU
    seed: int = Field(0, ge=0, le=2**63 - 1)
    init: str = ""  # folder of a trained drafter to start from; empty: start with a closed-form regression
    draft_vocab: int = Field(8192, ge=0)  # size; 0: the full vocabulary. With ``init``, the vocabulary is that of init

    # Answers of the base model to prompts without answers.
    max_new_tokens: Positive = 256
    sampled: Share = 0.0  # share of prompts whose answers are sampled at ``temperature``; the rest is greedy
    temperature: PositiveFloat = 0.8
    eval_fraction: float = Field(0.03, gt=0, lt=1)  # share of prompts for evaluation
    eval_answers: Positive = 100  # largest number of answers for evaluation

    # Training. Its length is given in minutes or in steps; the other is None.
    minutes: PositiveFloat | None = 30.0  # of gradient training, without the time for answers and states
    steps: Positive | None = None  # number of updates
    rows: Positive = 16  # windows per batch
    window: Positive = 64  # answer positions per window
    fit_tokens: Positive = 100_000  # answer tokens for closed-form regression
    relative_rate: PositiveFloat = 0.05  # AdamW's learning rate as a share of a parameter's scale (``parameter_scale``)
    warmup: Positive = 20  # updates
    decay: float = Field(1.0, gt=0, le=1)  # last share of the run, in which the learning rate falls linearly to zero
    clip: PositiveFloat = 1.0  # largest norm of the gradient
    sharpen: Share = 0.0  # share of the target probability that moves to the base model's most likely token
    checkpoint_minutes: float = 3.0  # between checkpoints
    eval_minutes: float = 10.0  # between evaluations

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
    """Return the settings of a preset, with ``overrides`` in place of its values.

    kind: the settings class of the training method ``method``.
    preset: a name in ``configs/train`` or a YAML file; None: the preset named like the method.
    overrides: setting -> value; an entry with the value None is ignored.
    Raises SpecDecError for unknown presets and keys and for invalid values.
    """
    preset = preset or method
    values = dict(read_preset(preset))
    if values.setdefault("method", method) != method:
        raise SpecDecError(f"preset '{preset}' is for 'specdec train {values['method']}'")
    given = {key: value for key, value in overrides.items() if value is not None}
    for key, others in kind.replaces.items():
        if given.get(key):
            values |= others
    return from_mapping(kind, values | given, f"preset '{preset}'")


def from_mapping(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Return a settings object of class ``kind`` with ``values``.

    Raises SpecDecError, beginning with ``where``, for unknown keys and invalid values.
    """
    try:
        return kind(**{str(key): value for key, value in values.items()})
    except SpecDecError as error:
        raise SpecDecError(f"{where}: {error}") from None


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings in a preset: a name in ``configs/train`` or a YAML file. Raises SpecDecError."""
    path = find_config("train", name, "training preset")
    data = inputs.read_yaml(path, "training preset ")
    if not isinstance(data, dict):
        raise SpecDecError(f"training preset '{path}' is not a mapping of settings")
    return data
