"""Settings of a training run: a dataclass filled from a YAML preset and overrides. Knows nothing about running one."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from specdec import inputs
from specdec.errors import SpecDecError, did_you_mean


@dataclass(frozen=True)
class TrainSettings:
    """What decides a run of any method; written, with the method's own, to ``train.yaml`` in the output folder."""

    method: str = ""
    model: str = "smollm2-135m-instruct"
    prompts: tuple[str, ...] = ()  # files of prompts or of token-id answers
    text: tuple[str, ...] = ()  # files of plain text: the base's choice at every position, no answers needed
    text_tokens: int = 512  # of a piece of text
    holdout: tuple[str, ...] = ()  # files whose prompts must not be trained on
    output: str = ""
    dtype: str = "bfloat16"  # of the frozen base and of the student's passes; master weights are float32
    device: str = "auto"  # the first CUDA device that can compute, else the CPU
    seed: int = 0
    init: str = ""  # a trained drafter's folder to begin from; empty: from what has a closed form
    draft_vocab: int = 8192  # most frequent tokens of the answers; 0: the full vocabulary

    # Answers by the base itself, where the files hold prompts only.
    max_new_tokens: int = 256
    sampled: float = 0.0  # share of the prompts answered at ``temperature``, the others greedily
    temperature: float = 0.8
    eval_fraction: float = 0.03  # of the prompts, held out for evaluation, but
    eval_answers: int = 100  # no more than these

    # Training.
    minutes: float | None = 30.0  # of gradient training (answers and teacher states come before), or
    steps: int | None = None  # this many updates
    rows: int = 16  # windows a batch
    window: int = 64  # answer positions a window
    fit_tokens: int = 100_000  # for what is fitted in closed form
    learning_rate: float = 2e-3  # AdamW
    warmup: int = 20  # updates
    decay: float = 1.0  # last share of the run over which the rate falls linearly to zero
    clip: float = 1.0
    sharpen: float = 0.0  # share of the target's mass moved onto the base's most likely token
    checkpoint_minutes: float = 3.0
    eval_minutes: float = 10.0
    compile: bool = True  # the loss, with torch.compile

    positive: ClassVar[tuple[str, ...]] = (
        *("rows", "window", "max_new_tokens", "text_tokens", "minutes", "steps", "fit_tokens"),
        *("eval_answers", "warmup", "clip"),
    )

    def check(self) -> None:
        """Raise SpecDecError for values out of range; methods add to it."""
        if (self.minutes is None) == (self.steps is None):
            raise SpecDecError("give either minutes or steps as the length of the training")
        for key in self.positive:
            value = getattr(self, key)
            if value is not None and value <= 0:
                raise SpecDecError(f"setting '{key}' must be positive, not {value}")
        if not 0 <= self.seed <= 2**63 - 1:
            raise SpecDecError(f"setting 'seed' must be a whole number in [0, {2**63 - 1}], not {self.seed}")
        if not 0 <= self.sampled <= 1 or self.temperature <= 0:
            raise SpecDecError("setting 'sampled' must lie between 0 and 1, and 'temperature' above 0")
        if not 0 <= self.sharpen <= 1 or self.draft_vocab < 0:
            raise SpecDecError("setting 'sharpen' must lie between 0 and 1, and 'draft_vocab' not below 0")
        if not 0 < self.eval_fraction < 1 or not 0 < self.decay <= 1:
            raise SpecDecError("settings 'eval_fraction' and 'decay' must lie between 0 and 1")


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
    values.update({key: value for key, value in overrides.items() if value is not None})
    for length, other in (("steps", "minutes"), ("minutes", "steps")):
        if overrides.get(length) is not None and overrides.get(other) is None:
            values[other] = None  # the preset's
    return from_mapping(kind, values, f"preset '{preset}'")


def from_mapping(kind: type[S], values: Mapping[str, Any], where: str) -> S:
    """Settings from plain values. Raises SpecDecError for unknown keys, wrong kinds and values out of range."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise SpecDecError(f"{where} has an unknown setting '{key}'{did_you_mean(key, fields)}")
        clean[key] = _convert(value, str(fields[key].type), key, where)
    settings = kind(**clean)
    settings.check()
    return settings


def to_yaml(settings: TrainSettings) -> str:
    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    data = {key: plain(value) for key, value in dataclasses.asdict(settings).items()}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def differences(a: TrainSettings, b: TrainSettings) -> list[str]:
    """Names of the settings in which two runs differ (where they compute and where the output lies do not count)."""
    left, right = dataclasses.asdict(a), dataclasses.asdict(b)
    return [key for key in left if key not in ("output", "device") and left[key] != right[key]]


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


def _convert(value: Any, kind: str, key: str, where: str) -> Any:
    """``value`` as the annotated type. YAML 1.1 reads 1e-5 as a string and knows no tuples."""
    try:
        if value is None and "None" in kind:
            return None
        if kind.startswith("tuple[tuple"):
            return tuple((int(lo), int(hi)) for lo, hi in value)
        if kind.startswith("tuple[int"):
            return tuple(int(item) for item in value)
        if kind.startswith("tuple"):
            return tuple(str(item) for item in ([value] if isinstance(value, str) else value))
        if kind.startswith("float"):
            return float(value)
        if kind.startswith("int") and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind == "bool" and isinstance(value, bool):
            return value
        if kind == "str" and isinstance(value, str):
            return value
    except (TypeError, ValueError):
        pass
    raise SpecDecError(f"{where}: setting '{key}' cannot be {value!r}; it is a {kind}")
