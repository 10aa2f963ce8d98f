"""Gradient training of one drafter: updates, evaluations, metrics and exports, from a checkpoint or from the start.

All processes of a run read the same batches. Each process trains on its share of the rows, and gradients are averaged.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn

from specdec.base import devices
from specdec.base.errors import SpecDecError
from specdec.base.interrupts import interrupting
from specdec.base.terminal import Progress, tell
from specdec.models import drafter_folder, source
from specdec.train import batches
from specdec.train.batches import TrainingBatch, Window
from specdec.train.card import write_card
from specdec.train.method import TrainingMethod
from specdec.train.output import CHECKPOINT, METRICS, RECIPE, read_checkpoint, recorded, write_checkpoint, writing
from specdec.train.states import AnswerStates

REPORT_UPDATES = 10  # updates per line of metrics.jsonl
REFRESH_UPDATES = 16  # updates between two calls of ``TrainingMethod.refresh``
STOP = 2.0  # stands for the finished share of the schedule where the run is stopped
STATE = "update", "tokens", "seconds", "best", "logged", "refreshed", "evaluated"  # what a checkpoint stores of a run


class TrainingRun:
    """The gradient training of one drafter by ``method``, in one of the processes. Only the first one writes.

    An update is one step of the optimizer, on one batch of windows (ranges of positions of answers). The schedule is
    the wanted number of updates or minutes. The masters are the trained parameters in float32; the network is their
    running copy in the dtype of the base model. An evaluation computes figures on held-out answers; the best drafter by
    their ``score`` is exported: written to the output folder.

    method: has the settings and the base model, and makes the network.
    vocab: the draft vocabulary, token ids int32 [V']; None: the full vocabulary.
    train, held_out: the base model's states of the answers to train on and to evaluate on. kinds: categories of the
    prompts of ``held_out``, "" where unknown.
    output: the output folder. progress: shows how far it is. processes: the group of processes that train together.
    """

    def __init__(
        self,
        method: TrainingMethod[Any],
        vocab: Tensor | None,
        train: Sequence[AnswerStates],
        held_out: Sequence[AnswerStates],
        kinds: Sequence[str],
        output: Path,
        progress: Progress,
        processes: PartialState,
    ) -> None:
        self.method = method
        self.settings = method.settings
        self.target = method.target
        self.output = output
        self.progress = progress
        self.processes = processes
        torch.manual_seed(self.settings.seed)  # for the initial values of the master weights
        self.masters = method.build(vocab).to(self.target.device)  # float32
        self.network = copy.deepcopy(self.masters).to(self.target.dtype)  # the running copy
        self.records = train
        self.held_out = held_out
        self.kinds = kinds
        self.windows = batches.windows(train, self.settings.window)
        if len(self.windows) < processes.num_processes:
            raise SpecDecError(
                f"{processes.num_processes} processes cannot share {len(self.windows)} windows of answers; give more "
                "prompts, lower 'window', or use fewer processes"
            )
        self.parameters = {n: p for n, p in self.masters.named_parameters() if p.requires_grad}
        self.running = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [{"params": [p]} for p in self.parameters.values()], betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.init = drafter_folder.read_config(Path(self.settings.init)) if self.settings.init else None
        self.update = 0  # finished updates
        self.tokens = 0  # answer positions trained on
        self.seconds = 0.0  # of training, over all runs of this folder
        self.best = -math.inf  # the best score so far
        self.logged = 0  # length of metrics.jsonl in bytes
        self.refreshed = dict[str, Tensor]()  # values of the running copy at the last refresh
        self.evaluated = -1  # the update of the latest evaluation
        self.stopped = False  # whether Ctrl-C or SIGTERM asked it to end after the update

    def train(self, resume: bool) -> dict[str, Any]:
        """Train to the end of the schedule and return the evaluation figures of the best drafter.

        The best one has the largest ``score`` on held-out answers. The figures are those of the method's ``evaluate``,
        by name: "score" is always there, and by default "top1" and "overlap" (``train.evaluate.evaluate``).

        resume: whether to continue from the checkpoint in the output folder, if there is one; False: begin anew.
        At Ctrl-C and SIGTERM the run ends after the update: it writes a checkpoint and raises KeyboardInterrupt.
        Raises SpecDecError if the loss becomes NaN or infinite; the best drafter so far stays in the folder.
        """
        if resume and (self.output / CHECKPOINT).exists():
            self._restore()
        else:
            self._start()
        with interrupting(self._stop, ended=True):
            self._update_until_the_end()
        if self.stopped:
            self._save()
            raise KeyboardInterrupt
        self._finish()
        best: dict[str, Any] = drafter_folder.read_config(self.output)["training"]["held_out"]
        return best

    def _stop(self) -> None:
        self.stopped = True

    def _update_until_the_end(self) -> None:
        """Update until the schedule ends or ``_stop`` was called, with checkpoints and evaluations on the way.

        Sets ``stopped`` in all processes if the first one was stopped. Raises SpecDecError if the loss is not finite.
        """
        settings, earlier, start = self.settings, self.seconds, time.monotonic()
        saved = evaluated = start
        task, shown = self.progress.add_task("gradients", total=1000, part="gradients"), 0.0
        recent = list[dict[str, float]]()
        for epoch, rows in batches.endless(self.windows, settings.rows, settings.window, settings.seed, self.update):
            now = time.monotonic()
            self.seconds = earlier + now - start
            # The first process decides, because all of them must end after the same update.
            done = float(broadcast(torch.tensor(STOP if self.stopped else self._done(), device=self.target.device)))
            if done >= 1:
                self.stopped = done == STOP
                return
            figures = self._step(rows, self._rate(done))
            if not math.isfinite(figures["loss"] + figures["gradient"]):  # the update was skipped
                self._finish()
                raise SpecDecError(
                    f"the loss is not finite at update {self.update}; '{self.output}' keeps the best drafter so far: "
                    f"continue from it with --set init={self.output} and a lower relative_rate in another --output"
                )
            recent.append(figures)
            if self.update % REPORT_UPDATES == 0:
                means = mean_figures(recent)
                self._log({"update": self.update, "epoch": epoch, "tokens": self.tokens, **means})
                self.progress.update(task, description=f"gradients: {self._progress_text(means, done)}")
                self.progress.advance(task, 1000 * done - shown)
                shown = 1000 * done
                recent.clear()
            if now - saved > 60 * settings.checkpoint_minutes:
                self._save()
                saved = time.monotonic()
            if now - evaluated > 60 * settings.eval_minutes:
                self._evaluate()
                self._save()  # with the best score, so that a resumed run keeps the best drafter
                saved = evaluated = time.monotonic()

    def _start(self) -> None:
        """Initialize the masters (float32) and the running copy, from a drafter or by closed-form regression.

        The drafter is the one in the folder ``settings.init``; without one, the method's ``fit`` does the regression.
        It then calls ``_evaluate``, which writes the figures to metrics.jsonl and exports the drafter, and sets the
        learning rate of each parameter.
        """
        first = self.processes.is_main_process
        if first:
            (self.output / METRICS).unlink(missing_ok=True)  # left by a run without a checkpoint
        if self.init is not None:
            self._begin_from(self.init, self.method.read_parameters(Path(self.settings.init)))
        elif first:
            total = min(self.settings.fit_tokens, count_positions(self.windows))
            self.method.fit(self.network, lambda: self._show("closed-form fit", self._fit_batches(), total, "fit"))
            copy_values(self.running, self.parameters)
        self._evaluate()
        for (name, parameter), group in zip(self.parameters.items(), self.optimizer.param_groups, strict=True):
            broadcast(parameter.detach())
            group["initial_lr"] = self.settings.relative_rate * self.method.parameter_scale(name, parameter)
        copy_values(self.parameters, self.running)
        self._refresh()  # in all processes from the same values

    def _finish(self) -> None:
        with self.processes.main_process_first():
            self._save()
            if self.evaluated != self.update:
                self._evaluate()
                self._save()

    def _begin_from(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Copy the tensors of the trained drafter ``init`` to the masters and to the running copy.

        config: its ``config.json``. tensors: parameter name -> values.
        Raises SpecDecError if the drafter is of another kind or a tensor is missing or of another shape.
        """
        kind = self.method.config(self.network)["drafter"]
        odd = [n for n, p in self.parameters.items() if n not in tensors or tensors[n].shape != p.shape]
        if odd or config["drafter"] != kind:
            what = f"its '{odd[0]}' is missing or of another shape" if odd else f"it is a '{config['drafter']}' one"
            raise SpecDecError(
                f"cannot begin a '{kind}' drafter from '{self.settings.init}': {what}; train without init, or with the "
                f"settings in its {RECIPE}"
            )
        copy_values(tensors, self.parameters)
        copy_values(self.parameters, self.running)

    def _fit_batches(self) -> Iterable[TrainingBatch]:
        """Yield batches for closed-form regression, until they hold ``fit_tokens`` valid positions."""
        seen = 0
        for rows in batches.epoch(self.windows, self.settings.rows, self.settings.window, self.settings.seed, 0):
            batch = self._batch(self.records, rows)
            yield batch
            seen += int(batch.valid.sum())
            if seen >= self.settings.fit_tokens:
                return

    def _show(self, what: str, source: Iterable[TrainingBatch], total: int, part: str = "") -> Iterator[TrainingBatch]:
        """Yield the batches of ``source`` unchanged; show a bar called ``what`` over ``total`` tokens meanwhile.

        part: the part of the run (see ``RunProgress``) for which the tokens count; "": for none.
        """
        task = self.progress.add_task(what, total=total, unit="tokens", part=part)
        for batch in source:
            yield batch
            self.progress.advance(task, int(batch.valid.sum()))
        self.progress.remove_task(task)

    # -- an update ----------------------------------------------------------------------------------------------

    def _done(self) -> float:
        """Return the finished share of the schedule, by updates or by time: 0 at the start, 1 or more at the end."""
        if self.settings.steps is not None:
            return self.update / self.settings.steps
        return self.seconds / (60 * self.settings.minutes)

    def _rate(self, done: float) -> float:
        """Return the factor on learning rates, 0 to 1: warm-up, then linear decay.

        done: finished share of the schedule, 0 to 1.
        """
        return min(1.0, (self.update + 1) / self.settings.warmup, (1 - done) / self.settings.decay)

    def _progress_text(self, means: dict[str, float], done: float) -> str:
        """Return the state of the run as text for the progress bar: speed, loss, agreement and time left.

        means: figure -> its mean over the latest updates; has "loss" and "agree". done: finished share of the schedule,
        0 to 1.
        """
        speed, left = self.tokens / max(self.seconds, 1e-6), (1 - done) / max(done, 1e-6) * self.seconds
        figures = f"loss {means['loss']:.3f}, agreement {means['agree']:.3f}"
        return f"{speed:.0f} tokens/s, {figures}, {left / 60:.0f} min left"

    def _batch(self, records: Sequence[AnswerStates], rows: Sequence[Window]) -> TrainingBatch:
        return batches.assemble(records, rows, self.target.device, self.target.dtype)

    def _step(self, rows: Sequence[Window], rate: float) -> dict[str, float]:
        """Make one update, on this process's share of the windows ``rows``; skip it if the loss is not finite.

        rate: factor on the learning rates, 0 to 1. Returns the figures of the method, averaged over all processes, with
        "loss", "gradient" (norm) and "rate".
        """
        batch = self._batch(self.records, rows[self.processes.process_index :: self.processes.num_processes])
        loss, figures = self.method.loss(self.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        figures, count = self._average(figures | {"loss": float(loss.detach())}, batch.valid.sum())
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        figures |= {"gradient": float(norm), "rate": rate}
        if math.isfinite(figures["loss"] + figures["gradient"]):
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            self.optimizer.step()
            copy_values(self.parameters, self.running)
            self.update, self.tokens = self.update + 1, self.tokens + count
            if self.update % REFRESH_UPDATES == 0:
                self._refresh()
        return figures

    def _refresh(self) -> None:
        """Call ``TrainingMethod.refresh``, and keep the values that it reads for the checkpoint."""
        if self.method.refreshes:
            self.method.refresh(self.network)
            self.refreshed = {name: parameter.detach().clone() for name, parameter in self.running.items()}

    def _refresh_from(self, values: Mapping[str, Tensor]) -> None:
        """Refresh from earlier ``values`` of the running copy (``refreshed``), which then has the present ones again.

        {}: there are none, and nothing is refreshed.
        """
        if values:
            copy_values(values, self.running)
            self._refresh()
        copy_values(self.parameters, self.running)

    def _average(self, figures: dict[str, float], count: Tensor) -> tuple[dict[str, float], int]:
        """Move the running copy's gradients to the master weights, the float32 parameters that the optimizer updates.

        Gradients are averaged over all processes, each weighted by its number of valid positions. ``grad`` of the
        masters is set, ``grad`` of the running copy becomes None. All processes must call this together.
        figures: name -> value in this process. count: this process's number of valid positions, a scalar tensor.
        Returns the figures, averaged likewise, and the number of valid positions of all processes together.
        """
        total = reduce(count, "sum")
        share = count / total
        for name, parameter in self.parameters.items():
            gradient, self.running[name].grad = self.running[name].grad, None
            own = torch.zeros_like(parameter) if gradient is None else gradient.float()
            parameter.grad = reduce(own * share, "sum")
        means = reduce(torch.tensor(list(figures.values()), device=share.device) * share, "sum")
        return dict(zip(figures, means.tolist(), strict=True)), int(total)

    # -- what it writes -----------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate on held-out answers, log the figures, and export the drafter if it is the best so far.

        Sets ``best`` and ``evaluated``. Only the first process evaluates. Later updates are those of a run without this
        evaluation, whose time depends on a clock.
        """
        before = self.refreshed
        self._refresh()
        self.evaluated = self.update
        if self.processes.is_main_process:
            self._report()
        self._refresh_from(before)

    def _report(self) -> None:
        """Evaluate the running copy, log the figures, and export it if it is the best so far.

        The figures of each kind of prompts are computed for an export alone.
        """
        figures = self._figures(self.held_out)
        better = figures["score"] > self.best
        kinds = self._by_kind() if better else {}
        scores = {"kinds": {kind: each["score"] for kind, each in kinds.items()}} if kinds else {}
        self._log({"update": self.update, "tokens": self.tokens, "evaluation": figures, **scores})
        tell(
            self.progress.console,
            f"update {self.update}, {self.tokens} tokens, {self.seconds / 60:.1f} min: {self.method.describe(figures)}",
        )
        if better:
            self.best = figures["score"]
            self._export(figures, kinds)

    def _by_kind(self) -> dict[str, dict[str, Any]]:
        """Evaluate on the held-out answers of each kind: {"KIND (number of answers)": figures}, {} for a single one."""
        by_kind = dict[str, list[AnswerStates]]()
        for record, kind in zip(self.held_out, self.kinds, strict=True):
            by_kind.setdefault(kind or "other", []).append(record)
        return {
            f"{kind} ({len(some)})": self._figures(some)
            for kind, some in sorted(by_kind.items())
            if len(by_kind) > 1 and batches.windows(some, self.settings.window)
        }

    @torch.no_grad()
    def _figures(self, records: Sequence[AnswerStates]) -> dict[str, Any]:
        """Evaluate the running copy on the answers ``records`` and return the figures of the method's ``evaluate``."""
        settings, target = self.settings, self.target
        found = batches.by_length(records, settings.rows, settings.window, target.device, target.dtype)
        total = count_positions(batches.windows(records, settings.window))
        return self.method.evaluate(self.network, self._show("evaluation", found, total))

    def _export(self, figures: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> None:
        """Write the drafter and its model card to the output folder, in place of earlier ones.

        figures: what ``_figures`` returned for all held-out answers. kinds: the same for each category of prompts.
        """
        target = self.target
        base = drafter_folder.describe_base(target, source.public_name(self.settings.model, self.settings.adapter))
        training = {
            "answers": len(self.records),
            "tokens_in_answers": count_positions(self.windows),
            "tokens_seen": self.tokens,
            "updates": self.update,
            "minutes": round(self.seconds / 60, 1),
            "machine": devices.device_name(target.device),
            "recipe": RECIPE,
            "held_out": figures,
        }
        if self.init is not None:
            training["began_from"] = self.init.get("training", {})
        config = {"version": 1, "base": base, **self.method.config(self.network), "training": training}
        storage: str = self.settings.storage
        if storage == "auto":
            storage = "float32" if self.settings.dtype == "float32" else "bfloat16"
        drafter_folder.write(self.output, config, self.masters.state_dict(), storage)
        with writing("the model card", self.output):
            lines = {kind: self.method.describe(each) for kind, each in kinds.items()}
            write_card(self.output, config, recorded(self.settings), self.method.describe(figures), lines)

    def _log(self, line: dict[str, Any]) -> None:
        if self.processes.is_main_process:
            with writing("metrics", self.output), (self.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(self.seconds, 1), **line}) + "\n")
                self.logged = file.tell()

    def _save(self) -> None:
        if self.processes.is_main_process:
            state: dict[str, Any] = {name: getattr(self, name) for name in STATE}
            state["masters"] = {name: parameter.detach() for name, parameter in self.parameters.items()}
            write_checkpoint(self.output, state | {"optimizer": self.optimizer.state_dict()})

    def _restore(self) -> None:
        state = read_checkpoint(self.output, self.parameters, self.optimizer)
        for name in STATE:
            setattr(self, name, state.get(name, getattr(self, name)))  # checkpoints of earlier versions lack some
        if (self.output / drafter_folder.CONFIG).exists():  # a drafter that was exported after the checkpoint
            exported = drafter_folder.read_config(self.output)["training"]["held_out"]["score"]
            self.best = max(self.best, exported)
        if self.processes.is_main_process and (self.output / METRICS).exists():
            with writing("metrics", self.output):
                os.truncate(self.output / METRICS, self.logged)  # lines after the checkpoint are written again
        self._refresh_from(self.refreshed)


@torch.no_grad()
def copy_values(source: Mapping[str, Any], destination: Mapping[str, nn.Parameter]) -> None:
    """Overwrite each parameter of ``destination`` with the values of the same name in ``source``, cast to its dtype."""
    for name, parameter in destination.items():
        parameter.copy_(source[name])


def mean_figures(recent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure, rounded, without NaN: a batch may have no position for a late draft step."""
    known = {key: [each[key] for each in recent if not math.isnan(each[key])] for key in recent[0]}
    return {key: round(fmean(values), 5) for key, values in known.items() if values}


def count_positions(windows: Iterable[Window]) -> int:
    """Return the number of positions in ``windows`` of answers."""
    return sum(end - start for _, start, end in windows)
