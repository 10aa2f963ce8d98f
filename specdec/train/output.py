"""The output folder of a run: checks before it is used, its files, the checkpoint, and the picture of its curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from specdec.base import files, inputs
from specdec.base.errors import SpecDecError, how_to_install
from specdec.base.terminal import tell
from specdec.models import drafter_folder, source
from specdec.train.settings import TrainSettings, current, from_mapping

RECIPE, METRICS, CHECKPOINT = "train.yaml", "metrics.jsonl", "checkpoint.safetensors"
ANSWERS, STATES, LOCK = "answers.jsonl", "states", ".lock"
LENGTHS = ("minutes", "steps")  # the settings that say how long a run is
# Files that a run writes, replaces and deletes. A folder that holds them without a recipe is refused.
WRITTEN = (drafter_folder.CONFIG, drafter_folder.WEIGHTS, METRICS, CHECKPOINT, ANSWERS, STATES)


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn a write error, such as a full disk, into a SpecDecError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecDecError(
            f"cannot write {what} to '{folder}': {reason}; free some space and continue with --resume"
        ) from None


def lock_of(settings: TrainSettings) -> FileLock:
    """Held by the process that writes to the output folder."""
    return FileLock(Path(settings.output) / LOCK, timeout=0, thread_local=False)


def open_output(settings: TrainSettings, resume: bool, lock: FileLock | None = None) -> Path:
    """Create the folder, or check that it holds a run with the same settings; take the lock, if this is to write."""
    if not settings.output:
        raise SpecDecError("no output folder; give --output DIR")
    output, own = Path(settings.output), recorded(settings)
    recipe = output / RECIPE
    try:
        if not recipe.exists():
            if there := [name for name in WRITTEN if (output / name).exists()]:
                raise SpecDecError(f"'{output}' holds a '{there[0]}' that no training run wrote; give another --output")
        elif any(path not in (recipe, output / LOCK) for path in output.iterdir()):
            _check_same_run(output, own, resume)
        output.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire()
        text = yaml.safe_dump(own.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        files.write_atomically(recipe, text.encode())
    except Timeout:
        raise SpecDecError(
            f"another process trains in '{output}'; wait for its end, or end it and continue with --resume"
        ) from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SpecDecError(f"cannot use '{output}' as output folder: {error}") from None
    return output


def _check_same_run(output: Path, own: TrainSettings, resume: bool) -> None:
    kept = inputs.read_yaml(output / RECIPE)
    if kept["method"] != own.method:
        raise SpecDecError(f"'{output}' holds a run of 'specdec train {kept['method']}'; use another --output")
    earlier = from_mapping(type(own), current(kept), f"'{output / RECIPE}'")
    if not resume:
        raise SpecDecError(
            f"'{output}' holds a training run; pass --resume to continue it, also with a longer --minutes or "
            "--steps, or give another --output"
        )
    before, now = earlier.model_dump(exclude={"device"}), own.model_dump()  # a run may continue on another device
    if any(before[unit] and now[unit] and now[unit] > before[unit] for unit in LENGTHS):  # a longer run
        before = {key: value for key, value in before.items() if key not in LENGTHS}
    if differs := [f"{key} {value!r} -> {now[key]!r}" for key, value in before.items() if value != now[key]]:
        raise SpecDecError(f"cannot resume '{output}' with other settings: {', '.join(differs)}")


def recorded(settings: TrainSettings) -> TrainSettings:
    """``settings`` without local paths, because drafter folders are published."""
    names: dict[str, Any] = {"model": source.public_name(settings.model), "output": ""}
    for key in ("prompts", "text", "holdout"):
        names[key] = tuple(Path(path).name for path in getattr(settings, key))
    if settings.adapter:
        names["adapter"] = source.public_name(settings.adapter)
    for key in ("init", "drafter"):
        if value := getattr(settings, key, ""):
            names[key] = Path(value).resolve().name
    return settings.model_copy(update=names)


def draw_curves(metrics: Path, picture: Path, console: Console) -> None:
    """Write loss and agreement over training tokens, with the evaluations, as a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell(console, f"no {picture.name}: matplotlib is not installed; {how_to_install('plot')}")
        return
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines() if line.strip()]
    updates = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, agreement = figure.subplots(1, 2)
    loss.plot(*_series(updates, "loss"), linewidth=0.8)
    loss.set(xlabel="training tokens", ylabel="loss")
    for number, key in enumerate(sorted({key for line in updates for key in line if key.startswith("agree")})):
        points = _series([u for u in updates if key in u], key)
        agreement.plot(*points, linewidth=0.7, alpha=0.6, color=f"C{number}", label=f"training, {key}")
    for step in range(len(evaluations[0]["evaluation"].get("top1", ())) if evaluations else 0):
        held = [(line["tokens"], line["evaluation"]["top1"][step]) for line in evaluations]
        agreement.plot(*zip(*held, strict=True), marker="o", color=f"C{step}", label=f"held out, step {step + 1}")
    agreement.set(xlabel="training tokens", ylabel="top-1 agreement with the model")
    if agreement.get_legend_handles_labels()[0]:
        agreement.legend(fontsize=8)
    try:
        figure.savefig(picture, dpi=110)
    except OSError as error:
        picture.unlink(missing_ok=True)
        tell(console, f"no {picture.name}: {error.strerror or error}")


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [line["tokens"] for line in lines], [line[key] for line in lines]


MASTERS, SLOTS = "masters/", "optimizer/"  # prefixes of tensor names


def write_checkpoint(
    output: Path, masters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: dict[str, Any]
) -> None:
    """Replace the checkpoint. state: JSON values that are stored with the tensors."""
    tensors = {f"{MASTERS}{name}": parameter.detach() for name, parameter in masters.items()}
    for index, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"{SLOTS}{index}/{key}": torch.as_tensor(value) for key, value in slot.items()}
    contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    with writing("a checkpoint", output):
        files.write_atomically(output / CHECKPOINT, save(contiguous, {"state": json.dumps(state)}))


@torch.no_grad()
def restore_checkpoint(output: Path, masters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """Restore tensors and return the state. Raises SpecDecError for a damaged file and another run's file."""
    path = output / CHECKPOINT
    slots: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads((file.metadata() or {})["state"])
            for name, parameter in masters.items():
                parameter.copy_(file.get_tensor(f"{MASTERS}{name}"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                if key.startswith(SLOTS):
                    _, index, name = key.split("/")
                    slots.setdefault(int(index), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise SpecDecError(f"'{path}' is not a checkpoint of this run ({error}); delete it to start anew") from None
    return state


def rewind_metrics(output: Path, update: int) -> None:
    """Remove metrics after ``update``, the update of the checkpoint, and an unfinished last line."""
    path, kept = output / METRICS, ""
    with writing("metrics", output):
        for line in path.read_text("utf-8", "replace").splitlines(True) if path.exists() else ():
            try:
                if not line.endswith("\n") or json.loads(line)["update"] > update:
                    break
            except (ValueError, KeyError, TypeError):  # the run was killed as it wrote this line
                break
            kept += line
        files.write_atomically(path, kept.encode())


class BestParameters:
    """A copy of the parameters with the lowest held-out loss so far.

    start: held-out loss before the first update.
    least, update: lowest held-out loss, and its update.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], start: float, update: int = 0) -> None:
        self.parameters, self.start = parameters, start
        self.keep(start, update)

    def keep(self, loss: float, update: int) -> None:
        """Keep the current parameters as the best."""
        self.least, self.update = loss, update
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    def put_back(self) -> None:
        copy_values(self.values, self.parameters)


@torch.no_grad()
def copy_values(source: Mapping[str, Any], onto: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in onto.items():
        parameter.copy_(source[name])
