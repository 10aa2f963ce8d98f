"""Gradient training of one drafter: updates, evaluations, metrics and exports, from a checkpoint or from the start."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TimeElapsedColumn
from torch import Tensor, nn

from specdec.api.decoder import SpecDecoder
from specdec.base import devices
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress, status, tell
from specdec.engine.measure import Timings
from specdec.models import drafter_folder, source
from specdec.train import batches, output
from specdec.train.batches import TrainingBatch, Window
from specdec.train.evaluate import measure_costs, predict_speedup, speedup_text
from specdec.train.method import TrainingMethod
from specdec.train.output import CHECKPOINT, LENGTHS, METRICS, RECIPE, BestParameters, copy_values, draw_curves, writing
from specdec.train.states import AnswerStates
from specdec.train.world import ProcessGroup

REPORT_UPDATES = 10  # updates per line of metrics.jsonl and per check of the held-out loss
MARGIN = 1.05  # a held-out loss above this multiple of that at the start makes the run go back
LOWER = 3  # divisor of the learning rates after the run has gone back
STATE = "update", "tokens", "seconds", "best", "sizes", "lowered", "warmed"  # of a run, in its checkpoint


class TrainingRun:
    """The gradient training of one drafter. Only the first process evaluates and writes."""

    def __init__(
        self,
        method: TrainingMethod[Any],
        vocab: Tensor | None,
        train: Sequence[AnswerStates],
        held_out: Sequence[AnswerStates],
        output: Path,
        decoder: SpecDecoder,
        console: Console,
        world: ProcessGroup,
    ) -> None:
        self.method, self.settings, self.target = method, method.settings, method.target
        self.output, self.console, self.world = output, console, world
        self.decoder: SpecDecoder | None = decoder  # until the first evaluation frees it
        torch.manual_seed(self.settings.seed)  # the masters' first values
        self.masters = method.build(vocab).to(self.target.device)  # float32
        self.network = copy.deepcopy(self.masters).to(self.target.dtype)  # what runs
        self.records, self.held_out = train, held_out
        self.windows = batches.windows(train, self.settings.window)
        self.parameters = {n: p for n, p in self.masters.named_parameters() if p.requires_grad}
        self.running = {n: p for n, p in self.network.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [{"params": [p]} for p in self.parameters.values()], betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.sizes: list[float] = []  # scale of each parameter; learning rates are shares of it
        self.init = drafter_folder.read_config(Path(self.settings.init)) if self.settings.init else None
        self.costs: Timings | None = None  # measured at the first evaluation
        self.speedup: float | None = None  # of the last evaluation
        self.update, self.tokens, self.seconds, self.best = 0, 0, 0.0, -math.inf
        self.lowered, self.warmed = 1.0, 0  # factor on all rates; update of the last warmup

    def train(self, resume: bool) -> dict[str, Any]:
        """Train to the end of the schedule and return the figures of the best drafter."""
        if resume and (self.output / CHECKPOINT).exists():
            self._restore()
        else:
            self._start()
        settings, earlier, start = self.settings, self.seconds, time.monotonic()
        saved = evaluated = start
        with progress_bars(self.console) as progress:
            task, recent = progress.add_task("training", total=1000), list[dict[str, float]]()
            for epoch, rows in batches.endless(self.windows, settings.rows, settings.seed, self.update):
                now = time.monotonic()
                self.seconds = earlier + now - start
                done = self.world.broadcast(self._done())
                if done >= 1:
                    break
                figures = self._step(rows, self._rate(done))
                if not math.isfinite(figures["loss"] + figures["gradient"]):  # the update was skipped
                    if self.update > self.warmed:
                        self._go_back(math.inf)
                        continue
                    with self.world.first_process_first():
                        self._save()
                        self._evaluate()
                    raise self._diverged()
                recent.append(figures)
                if self.update % REPORT_UPDATES == 0:
                    means = {key: round(fmean(each[key] for each in recent), 5) for key in figures}
                    self._log({"update": self.update, "epoch": epoch, "tokens": self.tokens, **means})
                    progress.update(
                        task, completed=1000 * done, description=f"training: {self._progress_text(means, done)}"
                    )
                    recent.clear()
                    self._check_held_out_loss()
                if now - saved > 60 * settings.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()
                if now - evaluated > 60 * settings.eval_minutes:
                    self._evaluate()
                    evaluated = time.monotonic()
        with self.world.first_process_first():
            self._save()
            self._evaluate()
            if self.world.first:
                draw_curves(self.output / METRICS, self.output / "training.png", self.console)
            best: dict[str, Any] = drafter_folder.read_config(self.output)["training"]["held_out"]
        return best

    def _start(self) -> None:
        """Start from a trained drafter, or from closed-form fits."""
        if self.world.first:
            (self.output / METRICS).unlink(missing_ok=True)  # left by a run without a checkpoint
        if self.init is not None:
            self._begin_from(self.init, self.method.read_parameters(Path(self.settings.init)))
        elif self.world.first:
            total = min(self.settings.fit_tokens, count_positions(self.windows))
            self.method.fit(self.network, lambda: self._shown("closed-form fit", self._fit_batches(), total))
            copy_values(self.running, self.parameters)
        self._evaluate()
        self.world.broadcast_tensors([p.detach() for p in self.parameters.values()])
        copy_values(self.parameters, self.running)
        self.sizes = [self.method.parameter_scale(name, parameter) for name, parameter in self.parameters.items()]
        self.good = BestParameters(self.parameters, self._held_out_loss())

    def _begin_from(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
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
        seen = 0
        for rows in batches.epoch(self.windows, self.settings.rows, self.settings.seed, 0):
            batch = self._batch(self.records, rows)
            yield batch
            seen += int(batch.valid.sum())
            if seen >= self.settings.fit_tokens:
                return

    def _shown(self, what: str, found: Iterable[TrainingBatch], total: int) -> Iterator[TrainingBatch]:
        """Yield ``found`` and show the progress in answer tokens."""
        with progress_bars(self.console) as progress:
            task = progress.add_task(what, total=total, unit="tokens")
            for batch in found:
                yield batch
                progress.advance(task, int(batch.valid.sum()))

    # -- an update ----------------------------------------------------------------------------------------------

    def _done(self) -> float:
        """The finished share of the schedule."""
        if self.settings.steps is not None:
            return self.update / self.settings.steps
        return self.seconds / (60 * self.settings.minutes)

    def _length(self) -> list[float | None]:
        """The length of the schedule, for the checkpoint: minutes or steps."""
        return [getattr(self.settings, unit) for unit in LENGTHS]

    def _rate(self, done: float) -> float:
        """The factor on all learning rates: warmup, then linear decay."""
        warm = (self.update - self.warmed + 1) / self.settings.warmup
        return self.lowered * min(1.0, warm, (1 - done) / self.settings.decay)

    def _held_out_loss(self) -> float:
        """The loss on a fixed batch of held-out windows."""
        settings = self.settings
        rows = batches.epoch(batches.windows(self.held_out, settings.window), settings.rows, settings.seed, 0)[0]
        batch = self._batch(self.held_out, rows)
        loss, _ = self.method.loss(self.network, batch)
        return self.world.broadcast(float(loss.detach()))

    def _check_held_out_loss(self) -> None:
        """Go back if the drafter has become worse than at the start."""
        loss = self._held_out_loss()
        if not loss <= MARGIN * self.good.start:
            self._go_back(loss)
        elif loss < self.good.least:
            self.good.keep(loss, self.update)

    def _go_back(self, loss: float) -> None:
        """Return to the parameters with the lowest held-out loss, and continue with lower rates."""
        self.good.put_back()
        copy_values(self.parameters, self.running)
        self.optimizer.state.clear()
        self.lowered, self.warmed = self.lowered / LOWER, self.update
        why = f"the held-out loss rose from {self.good.start:.3f} at the start to {loss:.3f}"
        if not math.isfinite(loss):
            why = "the loss is not finite"
        back = f"going back to update {self.good.update}, with learning rates {LOWER} times lower"
        tell(self.console, f"update {self.update}: {why}; {back}")

    def _progress_text(self, means: dict[str, float], done: float) -> str:
        """The state of the run, for the progress bar."""
        speed, left = self.tokens / max(self.seconds, 1e-6), (1 - done) / max(done, 1e-6) * self.seconds
        speedup = f", {self.speedup:.2f}x" if self.speedup else ""
        figures = f"loss {means['loss']:.3f}, agreement {means['agree']:.3f}{speedup}"
        return f"{speed:.0f} tokens/s, {figures}, {left / 60:.0f} min left"

    def _batch(self, records: Sequence[AnswerStates], rows: Sequence[Window]) -> TrainingBatch:
        return batches.assemble(records, rows, self.settings.window, self.target.device, self.target.dtype)

    def _step(self, rows: Sequence[Window], rate: float) -> dict[str, float]:
        """One update on this process's rows of a batch. An update that is not finite is skipped."""
        rows = rows[self.world.rank :: self.world.size]
        batch = self._batch(self.records, rows)
        loss, figures = self.method.loss(self.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in self.parameters.items():
            gradient, self.running[name].grad = self.running[name].grad, None
            parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.float()
        figures |= {"loss": float(loss.detach())}
        figures, count = self._average(figures, float(batch.valid.sum()))
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        figures |= {"gradient": float(norm), "rate": rate}
        if math.isfinite(figures["loss"] + figures["gradient"]):
            for group, size in zip(self.optimizer.param_groups, self.sizes, strict=True):
                group["lr"] = self.settings.relative_rate * size * rate
            self.optimizer.step()
            copy_values(self.parameters, self.running)
            self.update, self.tokens = self.update + 1, self.tokens + int(count)
        return figures

    def _average(self, figures: dict[str, float], count: float) -> tuple[dict[str, float], float]:
        """Average gradients and figures over the processes, and sum the tokens."""
        if self.world.size == 1:
            return figures, count
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        values = gradients[0].new_tensor(list(figures.values()))
        (*means, values), total = self.world.weighted_mean([*gradients, values], count)
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)
        return dict(zip(figures, values.tolist(), strict=True)), total

    def _diverged(self) -> SpecDecError:
        return SpecDecError(
            f"the loss is not finite at update {self.update}; '{self.output}' keeps the best drafter so far: continue "
            f"from it with --set init={self.output} and a lower relative_rate in another --output"
        )

    # -- what it writes -----------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate on held-out answers, and export the drafter if it is the best so far."""
        decoder, self.decoder = self.decoder, None  # frees its memory
        if not self.world.first:
            return
        place = self.target.device, self.target.dtype
        held_out = batches.by_length(self.held_out, self.settings.rows, self.settings.window, *place)
        total = count_positions(batches.windows(self.held_out, self.settings.window))
        with torch.no_grad():
            figures = self.method.evaluate(self.network, self._shown("evaluation", held_out, total))
        if "chain" in figures:
            figures |= self._predicted(figures, decoder)
        self._log({"update": self.update, "tokens": self.tokens, "evaluation": figures})
        tell(
            self.console,
            f"update {self.update}, {self.tokens} tokens, {self.seconds / 60:.1f} min: "
            f"{self.method.describe(figures)}{speedup_text(figures)}",
        )
        if figures["score"] > self.best:
            self.best = figures["score"]
            self._export(figures)

    def _predicted(self, figures: dict[str, Any], decoder: SpecDecoder | None) -> dict[str, Any]:
        if decoder is not None:
            if not (self.output / drafter_folder.CONFIG).exists():
                self._export(figures)  # the costs of the exported drafter are measured
            with status("measuring what drafting costs", quiet=self.console.quiet):
                self.costs = measure_costs(decoder, self.output)
        assert self.costs is not None
        speedup, depth = predict_speedup(figures["chain"], self.costs, figures.get("nodes"))
        self.speedup = round(speedup, 3)
        plain = self.costs.score[1]
        return {"speedup": self.speedup, "depth": depth, "draft_cost": round(self.costs.drafts[-1][1] / plain, 4)}

    def _export(self, figures: dict[str, Any]) -> None:
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
        drafter_folder.write(self.output, config, self.method.tensors(self.masters), storage)

    def _log(self, line: dict[str, Any]) -> None:
        if self.world.first:
            with writing("metrics", self.output), (self.output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"seconds": round(self.seconds, 1), **line}) + "\n")

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.parameters.values()):
            raise self._diverged()
        if self.world.first:
            state = {name: getattr(self, name) for name in STATE}
            state |= {"start": self.good.start, "length": self._length()}
            output.write_checkpoint(self.output, self.parameters, self.optimizer, state)

    def _restore(self) -> None:
        state = output.restore_checkpoint(self.output, self.parameters, self.optimizer)
        for name in STATE:
            setattr(self, name, state[name])
        if state.get("length", self._length()) != self._length():
            self.warmed = self.update  # the rates warm up again
        copy_values(self.parameters, self.running)
        self.good = BestParameters(self.parameters, state["start"], self.update)
        if self.world.first:
            output.rewind_metrics(self.output, self.update)


def count_positions(windows: Iterable[Window]) -> int:
    return sum(end - start for _, start, end in windows)


def progress_bars(console: Console) -> Progress:
    return Progress(BarColumn(), TimeElapsedColumn(), console=console)
