"""``train``: prompts in, a drafter folder out; every stage goes on where a killed run stopped.

Stages: the base answers the prompts (unless they come answered), its states are computed once, what has a closed form
is fitted, then gradients take over. The base stays frozen, and only answer positions count. Everything lies in the
output folder: the drafter (``config.json``, ``model.safetensors``, the best so far), ``train.yaml``, ``metrics.jsonl``,
``checkpoint.safetensors``, ``answers.jsonl``, ``states/``. Knows no drafter: what is trained is a ``Method``.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from specdec.base import inputs
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress, stderr, tell
from specdec.engine.costs import Costs
from specdec.models import drafter_folder, generation_config, loading
from specdec.train import batches as windows_of
from specdec.train import data, states
from specdec.train import settings as settings_of
from specdec.train.answers import FILE as ANSWERS
from specdec.train.answers import Sampling, answer_prompts, encode_prompts
from specdec.train.batches import Batch, Window
from specdec.train.data import Answer
from specdec.train.files import writing
from specdec.train.method import Method, Work, lookup
from specdec.train.plot import draw_curves
from specdec.train.runtime import keep_freed_memory, training_target
from specdec.train.settings import TrainSettings
from specdec.train.speed import measure, predict
from specdec.train.world import World, join

RECIPE, METRICS, CHECKPOINT = "train.yaml", "metrics.jsonl", "checkpoint.safetensors"
# What a run writes, replaces and deletes in its output folder, which must not be somebody else's.
WRITTEN = (drafter_folder.CONFIG, drafter_folder.WEIGHTS, METRICS, CHECKPOINT, ANSWERS, "states")
Trained = tuple[dict[str, Any], dict[str, Tensor]]  # configuration and tensors of a drafter
REPORT_UPDATES = 10  # updates a line of metrics.jsonl


def train(settings: TrainSettings, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Train, write the best drafter to ``settings.output`` and return its figures on held-out answers.

    Raises SpecDecError for unusable settings, prompts, models and folders, for a full disk and for a loss that is not a
    number any more; what was computed stays, and ``resume`` goes on from it.
    """
    console = console or stderr()
    if not settings.prompts and not settings.text:
        raise SpecDecError("nothing to train on; give --prompts FILE or --text FILE")
    # What can be checked without the model comes first.
    items = data.read([Path(p) for p in settings.prompts]) if settings.prompts else []
    texts = data.read_texts([Path(p) for p in settings.text])
    held = data.read([Path(p) for p in settings.holdout]) if settings.holdout else []
    with join(str(loading.find_device(settings.device))) as world:
        if settings.rows < world.size:
            raise SpecDecError(f"{world.size} processes cannot share batches of {settings.rows} rows; raise 'rows'")
        with world.after_the_first():
            run = _prepare(settings, resume or not world.first, console, world, items, texts, held)
        return run.train(resume)


def _prepare(
    settings: TrainSettings,
    resume: bool,
    console: Console,
    world: World,
    items: Sequence[Answer | data.Prompt],
    texts: Sequence[str],
    held: Sequence[Answer | data.Prompt],
) -> Run:
    """Everything that comes before gradients; what an earlier run, or the first process, has done is read."""
    output = _open_output(settings, resume)
    keep_freed_memory()
    model, tokenizer = loading.load(settings.model, dtype=settings.dtype, device=world.device)
    target = training_target(model)
    mark = loading.fingerprint(model)
    begin = read_drafter(settings.init, mark) if settings.init else None
    method = lookup(settings.method)(settings, target)
    data.refuse_foreign(items, target.vocab_size)
    data.refuse_held_out(items, held, tokenizer.decode)
    data.refuse_held_out([data.Prompt((text,)) for text in texts], held, tokenizer.decode, "text")
    with _progress(console) as progress:
        prompts = encode_prompts(tokenizer, items, settings.model)
        sampling = Sampling(settings.sampled, settings.temperature, settings.seed)
        answers = answer_prompts(output, model, tokenizer, prompts, settings.max_new_tokens, sampling, progress)
        usable = [a for a in answers if len(a) <= target.context and len(a.response_ids) > 1]
        plain = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        read = [p for ids in plain for p in data.pieces(ids, min(settings.text_tokens, target.context))]
        train, held_out = data.split(usable or read, settings.eval_fraction)  # answers are what is to be drafted
        train, held_out = train + (read if usable else []), held_out[: settings.eval_answers]
        random.Random(settings.seed).shuffle(train)
        vocab = None
        if settings.draft_vocab:
            ends = sorted(generation_config.ends(model, tokenizer))
            vocab = data.draft_vocabulary(train, settings.draft_vocab, ends, target.vocab_size).to(target.device)
        method.prepare(Work(output, train, held_out, vocab, mark, console, progress))
        store = {}
        for name, part in (("eval", held_out), ("train", train)):
            task = progress.add_task(f"teacher states ({name})", total=sum(map(len, part)))
            folder = output / "states" / name
            store[name] = states.compute(folder, target, part, method.wanted(), mark, partial(progress.advance, task))
    run = Run(method, vocab, store["train"].records, store["eval"].records, output, console, world)
    run.base = {
        "fingerprint": mark,
        "name": loading.own_name(settings.model),
        "model_type": model.config.model_type,
        "num_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
    }
    run.begin = begin
    return run


class Run:
    """Gradient training of one drafter, with its checkpoints, evaluations and metrics."""

    def __init__(
        self,
        method: Method,
        vocab: Tensor | None,
        train: Sequence[states.Record],
        held_out: Sequence[states.Record],
        output: Path,
        console: Console,
        world: World,
    ) -> None:
        settings, target = method.settings, method.target
        self.world = world
        torch.manual_seed(settings.seed)  # the masters' first values
        self.method, self.settings, self.target, self.output, self.console = method, settings, target, output, console
        self.base: dict[str, Any] = {}
        self.begin: Trained | None = None  # the drafter to begin from
        self.masters = method.build(vocab).to(target.device)  # float32
        self.network = copy.deepcopy(self.masters).to(target.dtype)  # what runs
        self.records, self.held_out = train, held_out
        self.windows = windows_of.windows(train, settings.window)
        self.parameters = {n: p for n, p in self.masters.named_parameters() if p.requires_grad}
        groups = method.groups(self.masters)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.costs: Costs | None = None  # measured at the first evaluation
        self.speedup: float | None = None  # of the last evaluation
        self.update, self.tokens, self.seconds, self.best = 0, 0, 0.0, -math.inf

    # -- the run ------------------------------------------------------------------------------------------------

    def train(self, resume: bool) -> dict[str, Any]:
        """From the checkpoint, a trained drafter or what has a closed form, to the end of the schedule."""
        if resume and (self.output / CHECKPOINT).exists():
            self._restore()
        else:
            if self.world.first:  # a run that was killed before its first checkpoint begins anew
                (self.output / METRICS).unlink(missing_ok=True)
            if self.begin is not None:
                self._begin_from(self.begin)
            elif self.world.first:
                self.method.fit(self.network, self._fit_batches)
                with torch.no_grad():
                    for name, parameter in self._running().items():
                        self.parameters[name].copy_(parameter)
            self._evaluate()
            self.world.copy([p.detach() for p in self.parameters.values()])
            self._refresh()
        settings, earlier, start = self.settings, self.seconds, time.monotonic()
        saved = evaluated = start
        text = ""  # how it goes
        sums: dict[str, float] = {}
        with _progress(self.console) as progress:
            task = progress.add_task("training", total=1000)
            stream = windows_of.stream(self.windows, settings.rows, settings.seed, self.update)
            for epoch, rows in stream:
                now = time.monotonic()
                self.seconds = earlier + now - start
                done = self.world.share(self._done())
                if done >= 1:
                    break
                figures = self._step(rows, self._rate(done))
                if not math.isfinite(figures["loss"] + figures["gradient"]):  # the update was left out
                    with self.world.after_the_first():
                        self._save()
                        self._evaluate()
                    raise self._lost()
                for key, value in figures.items():
                    sums[key] = sums.get(key, 0.0) + value
                if self.update % REPORT_UPDATES == 0:
                    means = {key: round(value / REPORT_UPDATES, 5) for key, value in sums.items()}
                    self._log({"update": self.update, "epoch": epoch, "tokens": self.tokens, **means})
                    speed = self.tokens / max(self.seconds, 1e-6)
                    left = (1 - done) / max(done, 1e-6) * self.seconds
                    text = f"{speed:.0f} tokens/s, loss {means['loss']:.3f}, agreement {means['agree']:.3f}"
                    text += f", {self.speedup:.2f}x" if self.speedup else ""
                    text += f", {left / 60:.0f} min left"
                    progress.update(task, completed=1000 * done, description=f"training: {text}")
                    sums = {}
                if now - saved > 60 * settings.checkpoint_minutes:
                    self._save()
                    saved = time.monotonic()
                if now - evaluated > 60 * settings.eval_minutes:
                    self._evaluate()
                    evaluated = time.monotonic()
        with self.world.after_the_first():
            self._save()
            self._evaluate()
            if self.world.first:
                draw_curves(self.output / METRICS, self.output / "training.png", self.console)
            best: dict[str, Any] = drafter_folder.read_config(self.output)["training"]["held_out"]
        return best

    def _lost(self) -> SpecDecError:
        return SpecDecError(
            f"the loss is not a number any more at update {self.update}; '{self.output}' keeps the drafter as it was "
            f"until then: go on from it with --set init={self.output} and a lower learning_rate in another --output"
        )

    def _done(self) -> float:
        if self.settings.steps is not None:
            return self.update / self.settings.steps
        assert self.settings.minutes is not None
        return self.seconds / (60 * self.settings.minutes)

    def _rate(self, done: float) -> float:
        """The factor on all learning rates: warmup, constant, linear decay."""
        return min(1.0, (self.update + 1) / self.settings.warmup, (1 - done) / self.settings.decay)

    def _step(self, rows: Sequence[Window], rate: float) -> dict[str, float]:
        """One update on one batch, of which each process takes its share of rows."""
        rows = rows[self.world.rank :: self.world.size]
        batch = windows_of.assemble(self.records, rows, self.settings.window, self.target.device)
        loss, figures = self.method.loss(self.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        working = self._running()
        for name, parameter in self.parameters.items():
            gradient, working[name].grad = working[name].grad, None
            parameter.grad = None if gradient is None else gradient.float()
        count = float(batch.valid.sum())
        figures |= {"loss": float(loss.detach())}
        if self.world.size > 1:
            figures, count = self._together(figures, count)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        figures |= {"gradient": float(norm), "rate": rate}
        if math.isfinite(figures["loss"] + figures["gradient"]):
            for group, full in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = full * rate
            self.optimizer.step()
            self._refresh()
            self.update, self.tokens = self.update + 1, self.tokens + int(count)
        return figures

    def _together(self, figures: dict[str, float], count: float) -> tuple[dict[str, float], float]:
        """From the gradients, figures and tokens of this process's share to those of the whole batch."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters.values()]
        values = gradients[0].new_tensor(list(figures.values()))
        (*gradients, values), total = self.world.mean([*gradients, values], count)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return dict(zip(figures, values.tolist(), strict=True)), total

    def _running(self) -> dict[str, nn.Parameter]:
        """The trained parameters of the running copy, named as the masters' are."""
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _begin_from(self, drafter: Trained) -> None:
        config, tensors = drafter
        kind = self.method.config(self.network)["drafter"]
        odd = [n for n, p in self.parameters.items() if n not in tensors or tensors[n].shape != p.shape]
        if odd or config["drafter"] != kind:
            what = f"its '{odd[0]}' is missing or of another shape" if odd else f"it is a '{config['drafter']}' one"
            raise SpecDecError(
                f"cannot begin a '{kind}' drafter from '{self.settings.init}': {what}; train without init, or with the "
                f"settings in its {RECIPE}"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """The running copy follows the masters."""
        for name, parameter in self._running().items():
            parameter.copy_(self.parameters[name])

    def _fit_batches(self) -> Iterable[Batch]:
        seen = 0
        for rows in windows_of.epoch(self.windows, self.settings.rows, self.settings.seed, 0):
            batch = windows_of.assemble(self.records, rows, self.settings.window, self.target.device)
            yield batch
            seen += int(batch.valid.sum())
            if seen >= self.settings.fit_tokens:
                return

    # -- what it writes -----------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measure on held-out answers; keep the drafter if it is the best so far. Only the first process does."""
        if not self.world.first:
            return
        rows, width = self.settings.rows, self.settings.window
        chosen = sorted(windows_of.windows(self.held_out, width), key=lambda w: w[2])
        groups = (chosen[i : i + rows] for i in range(0, len(chosen), rows))
        with torch.no_grad():
            figures = self.method.evaluate(
                self.network, (windows_of.assemble(self.held_out, g, width, self.target.device) for g in groups)
            )
        if "chain" in figures:
            figures |= self._speedup(figures)
        self._log({"update": self.update, "tokens": self.tokens, "evaluation": figures})
        tell(
            self.console,
            f"update {self.update}, {self.tokens} tokens, {self.seconds / 60:.1f} min: "
            f"{self.method.describe(figures)}{speedup_text(figures)}",
        )
        if figures["score"] > self.best:
            self.best = figures["score"]
            self._export(figures)

    def _speedup(self, figures: dict[str, Any]) -> dict[str, Any]:
        if self.costs is None:
            if not (self.output / drafter_folder.CONFIG).exists():
                self._export(figures)  # the first: its drafter is what can be measured
            self.costs = measure(self.target.model, self.output)
        speedup, depth = predict(figures["chain"], self.costs, figures.get("nodes"))
        self.speedup = round(speedup, 3)
        plain = self.costs.score[1]
        return {"speedup": self.speedup, "depth": depth, "draft_cost": round(self.costs.drafts[-1][1] / plain, 4)}

    def _export(self, figures: dict[str, Any]) -> None:
        training: dict[str, Any] = {
            "answers": len(self.records),
            "tokens_in_answers": sum(end - start for _, start, end in self.windows),
            "tokens_seen": self.tokens,
            "updates": self.update,
            "minutes": round(self.seconds / 60, 1),
            "recipe": RECIPE,
            "held_out": figures,
        }
        if self.begin is not None:
            training["began_from"] = self.begin[0].get("training", {})
        config = {"version": 1, "base": self.base, **self.method.config(self.network), "training": training}
        dtype = torch.bfloat16 if self.target.dtype == torch.bfloat16 else torch.float32
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.method.tensors(self.masters).items()}
        drafter_folder.write(self.output, config, tensors)

    def _log(self, line: dict[str, Any]) -> None:
        if not self.world.first:
            return
        with writing("metrics", self.output), (self.output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": round(self.seconds, 1), **line}) + "\n")

    def _save(self) -> None:
        """Everything that the rest of the run depends on, in one file that is replaced as a whole."""
        if not all(bool(p.isfinite().all()) for p in self.parameters.values()):
            raise self._lost()
        if not self.world.first:
            return
        tensors = {f"masters/{name}": p.detach() for name, p in self.parameters.items()}
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in slot.items()}
        state = {"update": self.update, "tokens": self.tokens, "seconds": self.seconds, "best": self.best}
        contiguous = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        with writing("a checkpoint", self.output):
            drafter_folder.replace(self.output / CHECKPOINT, save(contiguous, {"state": json.dumps(state)}))

    def _restore(self) -> None:
        path = self.output / CHECKPOINT
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads((file.metadata() or {})["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(tensors[f"masters/{name}"])
            slots: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith("optimizer/"):
                    _, index, name = key.split("/")
                    slots.setdefault(int(index), {})[name] = tensor
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})
            self.update, self.tokens = int(state["update"]), int(state["tokens"])
            self.seconds, self.best = float(state["seconds"]), float(state["best"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise SpecDecError(f"'{path}' is not a checkpoint of this run ({error}); delete it to start anew") from None
        self._refresh()
        if self.world.first:
            self._rewind()

    def _rewind(self) -> None:
        """Cut off the metrics that followed the checkpoint: that will be done again."""
        path, kept = self.output / METRICS, ""
        try:
            for line in path.read_text("utf-8").splitlines(keepends=True) if path.exists() else ():
                if not line.endswith("\n") or json.loads(line)["update"] > self.update:
                    break
                kept += line
        except (ValueError, KeyError, TypeError):
            pass  # the run was killed as it wrote this line
        except OSError as error:
            raise SpecDecError(f"cannot read '{path}': {error.strerror or error}") from None
        with writing("metrics", self.output):
            drafter_folder.replace(path, kept.encode())


def speedup_text(figures: dict[str, Any]) -> str:
    """The predicted speedup for people, or nothing."""
    if "speedup" not in figures:
        return ""
    if not figures["depth"]:
        return "; predicted slower than plain decoding here"
    return f"; predicted {figures['speedup']:.2f}x here at {figures['depth']} drafts a step"


def read_drafter(folder: str, mark: str) -> Trained:
    """A trained drafter's configuration and tensors. Raises SpecDecError if it is not one, or of another base."""
    config = drafter_folder.read_config(Path(folder))
    drafter_folder.check_base(config, mark, folder)
    return config, drafter_folder.read_tensors(Path(folder))


def _open_output(settings: TrainSettings, resume: bool) -> Path:
    """Make the folder, or check that it holds a run with the same settings. An empty one does not count."""
    if not settings.output:
        raise SpecDecError("no output folder; give --output DIR")
    output = Path(settings.output)
    recipe = output / RECIPE
    try:
        if recipe.exists() and any(path != recipe for path in output.iterdir()):
            kept = inputs.read_yaml(recipe)
            if kept["method"] != settings.method:
                raise SpecDecError(f"'{output}' holds a run of 'specdec train {kept['method']}'; use another --output")
            earlier = settings_of.from_mapping(type(settings), kept, f"'{recipe}'")
            if not resume:
                raise SpecDecError(f"'{output}' holds a training run; pass --resume to go on, or another --output")
            pair = _recorded(earlier), _recorded(settings)
            if differs := settings_of.differences(*pair):
                detail = ", ".join(f"{k} {getattr(pair[0], k)!r} -> {getattr(pair[1], k)!r}" for k in differs)
                raise SpecDecError(f"cannot resume '{output}' with other settings: {detail}")
        if not recipe.exists() and (there := [name for name in WRITTEN if (output / name).exists()]):
            raise SpecDecError(f"'{output}' holds a '{there[0]}' that no training run wrote; give another --output")
        output.mkdir(parents=True, exist_ok=True)
        drafter_folder.replace(recipe, settings_of.to_yaml(_recorded(settings)).encode())
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise SpecDecError(f"cannot use '{output}' as output folder: {error}") from None
    return output


def _recorded(settings: TrainSettings) -> TrainSettings:
    """``settings`` without paths of this machine: who publishes a drafter's folder publishes them."""
    called: dict[str, Any] = {"model": loading.own_name(settings.model), "output": ""}
    for key in ("prompts", "text", "holdout"):
        called[key] = tuple(Path(path).name for path in getattr(settings, key))
    for key in ("init", "drafter"):
        if value := getattr(settings, key, ""):
            called[key] = Path(value).resolve().name
    return settings.model_copy(update=called)


def _progress(console: Console) -> Progress:
    return Progress(BarColumn(), TimeElapsedColumn(), console=console)
