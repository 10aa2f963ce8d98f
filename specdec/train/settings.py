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

    A run writes its settings to ``train.yaml`` in the output folder.

    replaces: {setting: {other setting: value}}; when the first is given as an override, the preset's value of the other
        is replaced by this value.
    method: name of the training method.
    model: the base model: a name, a folder or a hub id.
    adapter: a LoRA adapter to merge into the model; None: no adapter.
    prompts: files of prompts or of answers in token ids, or names of prompt sets (``data.read``).
    holdout: files or prompt sets whose prompts must not be trained on.
    output: the output folder.
    dtype: of the base model, and of the copy of the drafter that gradients are computed in; "auto": chosen by
        ``trainer.open_target``. The trained parameters themselves are float32.
    storage: dtype of the drafter's file; "auto": bfloat16, or float32 if that is ``dtype``.
    device: where to train; "auto": the first usable CUDA device, else the CPU.
    seed: of the initial weights, the order of the data and sampled answers.
    init: folder of a trained drafter to start from; "": start with a closed-form regression.
    draft_vocab: number of tokens that the drafter can draft; 0: all. With ``init``, they are those of that drafter.

    Answers of the base model to prompts that have none:
    max_new_tokens: maximum length of an answer, in tokens.
    sampled: share of the prompts whose answers are sampled; other answers are greedy.
    temperature: of sampled answers.
    evaluation: files or prompt sets to evaluate on, as ``prompts``; (): a share of ``prompts`` is held out.
    eval_fraction: that share.
    eval_answers: maximum number of answers for evaluation.

    Training, whose length is given in minutes or in steps; the other is None:
    minutes: of gradient training, without the time for answers and stored states.
    steps: number of updates of the parameters.
    rows: number of windows in a batch, if all are of full length; shorter ones fill the same room.
    window: length of a window, a range of consecutive positions of one answer.
    fit_tokens: number of answer tokens for closed-form regression.
    relative_rate: AdamW's learning rate as a share of a parameter's scale (``TrainingMethod.parameter_scale``).
    warmup: number of updates in which the learning rate rises linearly.
    decay: last share of the run, in which the learning rate falls linearly to zero.
    clip: maximum norm of the gradient.
    sharpen: share of the target probability that moves to the base model's most likely token.
    checkpoint_minutes, eval_minutes: time between two checkpoints, and between two evaluations.
    """

    model_config = ConfigDict(strict=False)  # YAML has lists for tuples, and text for 1e-5
    replaces: ClassVar[Mapping[str, Mapping[str, Any]]] = {"steps": {"minutes": None}, "minutes": {"steps": None}}

    method: str = ""
    model: str = "smollm2-135m-instruct"
    adapter: str | None = None
    prompts: Files = ()
    holdout: Files = ()
    output: str = ""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    storage: Literal["auto", "bfloat16", "int8"] = "auto"
    device: str = "auto"
    seed: int = Field(0, ge=0, le=2**63 - 1)
    init: str = ""
    draft_vocab: int = Field(8192, ge=0)

    max_new_tokens: Positive = 256
    sampled: Share = 0.0
    temperature: PositiveFloat = 0.8
    evaluation: Files = ()
    eval_fraction: float = Field(0.03, gt=0, lt=1)
    eval_answers: Positive = 100

    minutes: PositiveFloat | None = 30.0
    steps: Positive | None = None
    rows: Positive = 16
    window: Positive = 64
    fit_tokens: Positive = 100_000
    relative_rate: PositiveFloat = 0.05
    warmup: Positive = 20
    decay: float = Field(1.0, gt=0, le=1)
    clip: PositiveFloat = 1.0
    sharpen: Share = 0.0
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
    """Return the settings in a preset, as the file has them: {setting: value}, not validated.

    name: a name in ``configs/train``, or the path of a YAML file. Raises SpecDecError if there is no such preset, or
    the file is no mapping.
    """
    path = find_config("train", name, "training preset")
    data = inputs.read_yaml(path, "training preset ")
    if not isinstance(data, dict):
        raise SpecDecError(f"training preset '{path}' is not a mapping of settings")
    return data
