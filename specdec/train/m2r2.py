"""Training of M2R2: a path (searched or given), leaps in closed form, then gradients for leaps and adapters.

The loss is distillation on the drafter's own states, as many steps ahead as it will draft from them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from specdec import artifacts
from specdec.drafters.m2r2 import M2R2, M2R2Path
from specdec.errors import SpecDecError
from specdec.target import Target
from specdec.terminal import tell
from specdec.train import search
from specdec.train.batches import Batch
from specdec.train.data import Answer
from specdec.train.evaluate import evaluate
from specdec.train.fit import fit_leaps
from specdec.train.method import Method, Work
from specdec.train.settings import TrainSettings
from specdec.train.states import Wanted, compute, digest
from specdec.train.student import Judge, passages


@dataclass(frozen=True)
class M2R2Settings(TrainSettings):
    """The path of the accelerated residual, and what it learns from. With ``init`` that drafter's path counts."""

    search: bool = False  # choose exit layer and segments by measured cost and closed-form agreement; or give them:
    exit_layer: int = 0
    segments: tuple[tuple[int, int], ...] = ()
    final_leap: bool = False
    exits: tuple[int, ...] = ()  # layers behind which a token may leave before the end of the path
    layers_of: int | None = None  # depth of the model these layers were chosen on: scaled to others; None: as they are
    rank: int = 64
    adapt: tuple[str, ...] = ()  # linear maps with adapters; empty: all of the segments' layers
    draft_steps: int = 2  # of its own drafts the student learns from
    leap_rate: float = 6e-4  # learning rate of the leaps; ``learning_rate`` is the adapters'
    focus: float = 1.0  # weight of a later step where the drafter's earlier steps had already gone wrong
    align: float = 0.0  # weight of 1 - cos(p[k], h[R k]), summed over the layers k of the path

    search_tokens: int = 12_000  # answer tokens that the search fits leaps on
    search_gain: float = 1.25  # what training is taken to add to the log-odds of agreement; so much it was seen to

    positive: ClassVar[tuple[str, ...]] = (*TrainSettings.positive, "draft_steps", "rank", "search_tokens")

    def check(self) -> None:
        super().check()
        if self.search and (self.segments or self.exit_layer or self.exits):
            raise SpecDecError(
                "setting 'search' excludes 'segments', 'exit_layer' and 'exits'; set search=false to give a path"
            )
        if not (self.search or self.segments or self.exit_layer or self.init):
            raise SpecDecError("give 'segments' or 'exit_layer', or set search=true")


class M2R2Method(Method):
    """KL to the base at each of the drafter's own steps, the mean of its exits, and optionally the rate's alignment.

    That is, of every residual of the path, with the state of the base that it runs ahead to (``M2R2Path.aims``).
    """

    name: ClassVar[str] = "m2r2"
    settings_class: ClassVar[type[TrainSettings]] = M2R2Settings
    settings: M2R2Settings

    def __init__(self, settings: M2R2Settings, target: Target) -> None:
        super().__init__(settings, target)
        self.searches = settings.search and not settings.init
        if settings.init:
            self.path = M2R2Path.from_json(artifacts.read_config(Path(settings.init)).get("path", {}))
        elif not settings.search:
            self.path = path_of(settings, target)

    def prepare(self, work: Work) -> None:
        if self.searches:
            found = choose_path(self.settings, self.target, work)
            settings = dataclasses.replace(
                self.settings,
                exit_layer=found.exit_layer,
                segments=found.segments,
                final_leap=found.final_leap,
                layers_of=None,
            )
            self.path = path_of(settings, self.target)

    def wanted(self) -> Wanted:
        wanted = wanted_states(self.path, self.target.num_layers)
        aims = self.path.aims(self.target.num_layers) if self.settings.align else ()
        return dataclasses.replace(wanted, hidden=tuple(sorted({*wanted.hidden, *aims})))

    def build(self, vocab: Tensor | None) -> M2R2:
        self.judge = Judge(self.target, vocab, self.settings.sharpen, compiled=self.compiled)
        return M2R2(self.path, self.target, vocab)

    def groups(self, masters: nn.Module) -> list[dict[str, Any]]:
        named = dict(masters.named_parameters())
        leaps = [p for name, p in named.items() if name.startswith("leaps")]
        adapters = [p for name, p in named.items() if name.startswith("adapters")]
        rates = ((leaps, self.settings.leap_rate), (adapters, self.settings.learning_rate))
        return [{"params": params, "lr": rate} for params, rate in rates if params]

    def fit(self, network: nn.Module, batches: Callable[[], Iterable[Batch]]) -> None:
        assert isinstance(network, M2R2)
        fit_leaps(network, self.target, batches)

    def loss(self, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        assert isinstance(network, M2R2)
        settings, judge, target = self.settings, self.judge, self.target
        judge.begin(batch)
        count = batch.valid.sum()
        loss = torch.zeros((), device=target.device)
        figures: dict[str, float] = {}
        right = torch.empty(0)
        aims = self.path.aims(target.num_layers)
        watched = settings.align > 0
        for s, (exits, valid) in enumerate(passages(network, target, batch, settings.draft_steps, watched)):
            weight, reached = valid.float(), valid
            if s:
                reached = torch.cat((torch.zeros_like(right[:, :1]), right[:, :-1]), 1)
                weight = weight * torch.where(reached, 1.0, settings.focus)
            for exit, (final, _) in enumerate(exits):
                logits = judge.logits(final)
                kl, top = judge.loss(logits)
                loss = loss + (kl * weight).sum() / (count * len(exits))
                agree = judge.hits(logits, top, judge.best)[valid].float().mean()
                figures[figure_name(self.path, s, exit)] = float(agree)
                right = judge.hits(logits, top, judge.next) & reached  # of the last exit, in the end
            for p, aim in zip(exits[-1][1], aims, strict=True) if watched else ():
                away = 1 - torch.cosine_similarity(p.float(), batch.hidden[aim].float(), -1)
                loss = loss + settings.align * (away * weight).sum() / count
        return loss, figures

    def evaluate(self, network: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
        assert isinstance(network, M2R2)
        return evaluate(network, self.target, batches)

    @staticmethod
    def describe(figures: dict[str, Any]) -> str:
        chain = ", ".join(f"{x:.3f}" for x in figures["top1"])
        exits = ", ".join(f"{x:.3f}" for x in figures.get("exits", ()))
        sooner = f"; at the exits before, {exits}" if exits else ""
        return (
            f"{figures['score']:.2f} tokens a round of {len(figures['top1'])} drafts (agreement {chain}{sooner}; "
            f"1 - TV {figures['overlap'][0]:.3f})"
        )

    def config(self, network: nn.Module) -> dict[str, Any]:
        return {"drafter": "m2r2", "path": self.path.to_json()}


def choose_path(settings: M2R2Settings, target: Target, work: Work) -> search.Candidate:
    """The path an earlier search in the output folder chose, or that of a new one; its table is printed."""
    limits = {"train": settings.search_tokens, "eval": search.EVAL_TOKENS}
    parts = {"train": _first(work.train, limits["train"]), "eval": _first(work.held_out, limits["eval"])}
    vocab = 0 if work.vocab is None else len(work.vocab)
    mark = f"{work.mark} {digest([*parts['train'], *parts['eval']])} {vocab} {settings.window}"
    if (before := search.chosen_before(work.output, mark)) is not None:
        return before
    records = {}
    folder = work.output / "states" / "search"
    for name, part in parts.items():
        task = work.progress.add_task(f"teacher states (search, {name})", total=sum(map(len, part)))
        wanted = search.wanted(target.num_layers)
        done = partial(work.progress.advance, task)
        records[name] = compute(folder / name, target, part, wanted, work.mark, done).records
    task = work.progress.add_task("search", total=1.0)
    looking = search.Search(
        target,
        work.vocab,
        records["train"],
        records["eval"],
        settings.rows,
        settings.window,
        settings.search_gain,
        work.output,
        mark,
    )
    found = looking.run(lambda share, text: work.progress.update(task, completed=share, description=f"search: {text}"))
    search.show(looking.rows_of_table(), looking.costs, work.console)
    tell(work.console, f"chosen: {found.key}")
    shutil.rmtree(folder)  # large, and of no use any more
    return found


def _first(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first answers, up to about so many answer tokens."""
    some, seen = [], 0
    for answer in answers:
        if seen >= tokens:
            break
        some.append(answer)
        seen += len(answer.response_ids)
    return some


def path_of(settings: M2R2Settings, target: Target) -> M2R2Path:
    """The settings' path, with adapters on the later layers' maps, or on the early ones' where there are no later.

    Early layers read the slow residual's keys and values, so theirs are not adapted: p owns none.
    """
    adapters: dict[int, list[str]] = {}
    early, scale = not settings.segments, target.num_layers / (settings.layers_of or target.num_layers)
    exit_layer = round(settings.exit_layer * scale) or min(settings.exit_layer, 1)
    ends = [(round(lo * scale), round(hi * scale)) for lo, hi in settings.segments]
    segments = tuple((lo, max(hi, lo + 1)) for lo, hi in ends)
    stops = dict(zip((hi for _, hi in settings.segments), (hi for _, hi in segments), strict=True))
    exits = tuple(stops.get(layer) or round(layer * scale) for layer in settings.exits)
    path = M2R2Path(exit_layer, segments, settings.final_leap, settings.rank, {}, exits)
    path.check(target.num_layers)
    for lo, hi in segments or ((0, exit_layer),):
        for layer in range(lo, hi):
            names = list(target.linears(layer))
            if settings.adapt:
                names = [n for n in names if n in settings.adapt or n.rpartition(".")[2] in settings.adapt]
            if early:
                names = [n for n in names if not any(key in n for key in ("k_proj", "v_proj", "c_attn", "key_value"))]
            adapters[layer] = names
    if not any(adapters.values()) and not settings.final_leap:
        raise SpecDecError("setting 'adapt' names no linear map of this model, so there is nothing to train")
    return dataclasses.replace(path, adapters=adapters)


def figure_name(path: M2R2Path, step: int, exit: int) -> str:
    """What the agreement of a step at an exit is called: agree, agree2, ...; before the last one, agree@LAYER."""
    base = "agree" if step == 0 else f"agree{step + 1}"
    return f"{base}@{path.exits[exit]}" if exit < len(path.exits) else base


def wanted_states(path: M2R2Path, num_layers: int) -> Wanted:
    """The teacher states that training a path needs."""
    kv = [layer for lo, hi in path.segments for layer in range(lo, hi)]
    hidden = {*(lo for lo, _ in path.segments), num_layers}
    if path.adapts_early:
        kv += range(path.exit_layer)
        hidden |= {lo for lo, _ in path.shared if lo}
    else:
        hidden |= {hi for _, hi in path.shared}
    return Wanted(tuple(sorted(kv)), tuple(sorted(hidden)))
