"""How long a run will take, before it starts, and how far it is: over answers, states, fit and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TimeElapsedColumn

from specdec.base.terminal import Progress, duration
from specdec.bench.pass_times import time_scoring
from specdec.runtimes.target import Target
from specdec.train.answers import MAX_ROWS
from specdec.train.data import TrainingAnswer
from specdec.train.settings import TrainSettings

UPDATE_PASSES = 3  # passes of the whole model that an update takes, about, per position


class RunProgress(Progress):
    """Bars of what a run is doing now and, after ``plan``, of the whole run.

    A task that is added with ``part=NAME`` counts for that part of the plan.
    A part is a stage of the run: "answers", "states", "fit" (closed-form regression) or "gradients".
    console: where the bars are shown.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(BarColumn(), TimeElapsedColumn(), console=console)
        self.seconds: dict[str, float] = {}
        self.whole: TaskID | None = None

    def plan(self, seconds: Mapping[str, float]) -> None:
        """Show a bar of the whole run. seconds: part -> its expected duration in seconds, in the order of the parts."""
        self.seconds = dict(seconds)
        self.whole = self.add_task("whole run", total=sum(seconds.values()))

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance the task ``task_id`` by ``advance`` units, and the bar of the whole run with it."""
        super().advance(task_id, advance)
        part, names = self._tasks[task_id].fields.get("part"), list(self.seconds)
        if self.whole is None or part not in names:
            return
        tasks = [task for task in self.tasks if task.fields.get("part") == part]
        share = sum(task.completed for task in tasks) / max(sum(task.total or 0 for task in tasks), 1)
        done = sum(self.seconds[name] for name in names[: names.index(part)]) + share * self.seconds[part]
        left = duration(sum(self.seconds.values()) - done)
        self.update(self.whole, completed=done, description=f"whole run, {left} left")


def expected_seconds(
    settings: TrainSettings, known: Sequence[TrainingAnswer], decoding: Target, training: Target
) -> dict[str, float]:
    """Return {part: expected seconds} of a run, from timed passes, if answers are as long as they may be.

    The parts are "answers" (generating them), "states" (of the base model), "fit" (closed-form regression) and
    "gradients".
    settings: the run's settings; ``steps`` or ``minutes`` decide about "gradients".
    known: the answers; those of prompts that have none yet are empty. decoding: the runtime that answers and computes
    states. training: the runtime that computes gradients.
    """
    left = [answer for answer in known if not answer.response_ids]
    new = settings.max_new_tokens * len(left)
    lengths = [len(answer.response_ids) or settings.max_new_tokens for answer in known]
    rows = min(MAX_ROWS, max(len(left), 8), decoding.context // 2)
    decode, learn = (time_scoring(each, 2, [rows])[rows] for each in (decoding, training))
    waves = math.ceil(len(left) / rows) * settings.max_new_tokens
    tokens = sum(len(answer.prompt_ids) for answer in known) + sum(lengths)
    positions = min(settings.fit_tokens, sum(lengths))
    update = UPDATE_PASSES * settings.rows * settings.window * learn / rows
    return {
        "answers": decode * max(waves, new / rows) + sum(len(answer.prompt_ids) for answer in left) * decode / rows,
        "states": tokens * decode / rows,
        "fit": 0.0 if settings.init else positions * learn / rows,
        "gradients": update * settings.steps if settings.steps else 60 * (settings.minutes or 0.0),
    }


def describe(seconds: Mapping[str, float], settings: Any, preset: str) -> str:
    """Return one line about the expected durations of a run. seconds: the result of ``expected_seconds``.

    settings: those of the run. preset: where they come from, a name or a file.
    """
    parts = ", ".join(f"{name} {duration(each)}" for name, each in seconds.items() if each)
    how = f" ({settings.steps} updates)" if settings.steps else ""
    return (
        f"training {settings.method} with preset {preset} takes about {duration(sum(seconds.values()))}: {parts}{how}"
    )
