"""``--search``: the segment of an M2R2 path, by closed-form agreement and measured cost, without gradients.

Candidates project from the embedding to one segment of later layers, and from its end to the final state. Projections
are fitted on a sample of the teacher's states; segments that begin at one layer share a pass. The agreement of one
draft on held-out answers, and what drafting and scoring cost on this machine, predict a speedup; the largest wins.
Training raises agreement: the setting ``search_gain`` is added to its log-odds.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from specdec.api.decoder import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2 import M2R2Drafter
from specdec.drafters.m2r2_network import M2R2
from specdec.drafters.m2r2_path import M2R2Path
from specdec.engine.costs import Costs, measure
from specdec.models import drafter_folder
from specdec.runtimes.layer_pass import Pass
from specdec.runtimes.linear_maps import rms_unit
from specdec.runtimes.target import Target
from specdec.train import batches as windows_of
from specdec.train.batches import Batch
from specdec.train.data import Answer
from specdec.train.files import writing
from specdec.train.fit import Moments
from specdec.train.m2r2_settings import M2R2Settings
from specdec.train.method import Work
from specdec.train.speed import predict
from specdec.train.states import Record, Wanted, compute, digest
from specdec.train.student import Teacher, step_mask

FILE = "search.json"
EVAL_TOKENS = 6_000  # held-out answer positions
LONGEST = 6  # most layers of a segment
STEPS, FADE = 4, 0.8  # drafts of a chain; agreement of each over that of the draft before
Segment = tuple[int, int]
Affine = tuple[Tensor, Tensor]  # weight and bias of a projection


@dataclass(frozen=True)
class Row:
    """A candidate: layers [lo, hi), cost of a draft in plain steps, agreement of a first draft in closed form, and the
    predicted speedup after training, at ``depth`` drafts a step."""

    segment: Segment
    cost: float
    agreement: float
    speedup: float
    depth: int


def choose(settings: M2R2Settings, target: Target, work: Work) -> Segment:
    """The segment that an earlier search in the output folder chose, or that of a new one; its table is printed.

    Raises SpecDecError for a model that is too shallow, and for a full disk.
    """
    if target.num_layers < 2:
        raise SpecDecError("a model of one layer is too shallow to search; give 'segments'")
    parts = {"train": _first(work.train, settings.search_tokens), "eval": _first(work.held_out, EVAL_TOKENS)}
    vocab = 0 if work.vocab is None else len(work.vocab)
    mark = f"{work.mark} {digest([*parts['train'], *parts['eval']])} {vocab} {settings.window}"
    file, folder = work.output / FILE, work.output / "states" / "search"
    if file.exists() and (kept := drafter_folder.read_json(file))["mark"] == mark:
        lo, hi = kept["chosen"]
        return int(lo), int(hi)
    records, later = {}, tuple(range(target.num_layers // 2, target.num_layers))
    for name, part in parts.items():
        task = work.progress.add_task(f"teacher states (search, {name})", total=sum(map(len, part)))
        wanted = Wanted(later, (*later, target.num_layers))
        done = partial(work.progress.advance, task)
        records[name] = compute(folder / name, target, part, wanted, work.mark, done).records
    task = work.progress.add_task("search", total=len(later))
    found: dict[Segment, float] = {}
    search = Search(target, work.vocab, records["train"], records["eval"], settings)
    for lo in later:
        found |= search.agreement(lo)
        work.progress.advance(task)
    rows = rank(found, draft_costs(target, work.vocab), settings.search_gain)
    _show(rows, work.console)
    table = {"mark": mark, "chosen": rows[0].segment, "table": [dataclasses.asdict(row) for row in rows]}
    with writing(FILE, work.output):
        drafter_folder.replace(file, json.dumps(table, indent=1).encode())
    shutil.rmtree(folder)  # large, and of no use any more
    return rows[0].segment


class Search:
    """Closed-form projections, and the agreement of the drafts that they make. Keys, values and carries are exact."""

    def __init__(
        self,
        target: Target,
        vocab: Tensor | None,
        train: Sequence[Record],
        held_out: Sequence[Record],
        settings: M2R2Settings,
    ) -> None:
        self.target, self.count, self.settings = target, target.num_layers, settings
        self.train, self.held_out, self.teacher = train, held_out, Teacher(target, vocab)

    @torch.no_grad()
    def agreement(self, lo: int) -> dict[Segment, float]:
        """Of the first draft, for each segment that begins at layer ``lo``."""
        ends = range(lo + 1, min(lo + LONGEST, self.count) + 1)
        first = Moments([(("x", "final", "carry"), "goal")])
        for batch in self._batches(self.train, lo, ends[:0]):
            embedded = self.target.embed(batch.ids, batch.positions)
            _add(first, batch, {"x": embedded, "final": batch.before[self.count], "carry": batch.before[lo]}, lo)
        into = self._affine(first.solve(("x", "final", "carry"), "goal"))
        last = Moments([((f"x{hi}", "final"), "goal") for hi in ends])
        for batch in self._batches(self.train, lo, ends):
            states = {f"x{hi}": x for hi, x in self._run(batch, lo, ends, into).items()}
            _add(last, batch, states | {"final": batch.before[self.count]}, self.count)
        onto = {hi: self._affine(last.solve((f"x{hi}", "final"), "goal")) for hi in ends}
        hits, total = dict.fromkeys(ends, 0), 0
        for batch in self._batches(self.held_out, lo, ends):
            self.teacher.begin(batch)
            total += int(batch.valid.sum())
            for hi, x in self._run(batch, lo, ends, into).items():
                logits = self.teacher.logits(_project(onto[hi], x, batch.before[self.count]))
                hits[hi] += int((self.teacher.hits(logits) & batch.valid).sum())
        return {(lo, hi): count / max(total, 1) for hi, count in hits.items()}

    def _run(self, batch: Batch, lo: int, ends: range, into: Affine) -> dict[int, Tensor]:
        """The residual [B, T, D] at each of ``ends`` of a segment that begins at ``lo``."""
        target, taps = self.target, {hi: torch.empty(0) for hi in ends}
        x = target.embed(batch.ids, batch.positions)
        x = _project(into, x, batch.before[self.count], batch.before[lo])
        mask, cache = step_mask(batch, 1), batch.cache(self.count)
        target.layers(x, lo, ends[-1], Pass(batch.positions, mask, cache, taps))
        return taps

    def _affine(self, solved: Affine) -> Affine:
        weight, bias = (part.to(self.target.device, self.target.dtype) for part in solved)
        return weight, bias

    def _batches(self, records: Sequence[Record], lo: int, ends: range) -> Iterator[Batch]:
        """Batches with the states that segments from ``lo`` to ``ends`` need."""
        kv, hidden = range(lo, max(ends, default=lo)), (lo, self.count)
        some = [
            dataclasses.replace(r, kv={n: r.kv[n] for n in kv}, hidden={n: r.hidden[n] for n in hidden})
            for r in records
        ]
        rows, window = self.settings.rows, self.settings.window
        found = windows_of.windows(some, window)
        for start in range(0, len(found), rows):
            yield windows_of.assemble(some, found[start : start + rows], window, self.target.device)


def draft_costs(target: Target, vocab: Tensor | None) -> list[Costs]:
    """Costs of drafters whose segment has 1, 2, ... layers; the first and the last are measured (untrained)."""
    half, longest = target.num_layers // 2, min(LONGEST, target.num_layers - target.num_layers // 2)
    decoder, found = SpecDecoder(target.model, None, drafter="none"), list[Costs]()
    for length in (1, longest):
        network = M2R2(M2R2Path(0, ((half, half + length),), True), decoder.target, vocab)
        drafter = M2R2Drafter(network, siblings=())
        drafter.bind(decoder.target)
        found.append(measure(decoder.target, drafter, decoder.verifier))
    one, many = (costs.drafts[-1][1] for costs in found)
    layer = max(many - one, 0.0) / max(longest - 1, 1)
    return [Costs(found[0].score, ((one + n * layer,) * 2,)) for n in range(longest)]


def rank(agreement: dict[Segment, float], costs: Sequence[Costs], gain: float) -> list[Row]:
    """All candidates, the one of largest predicted speedup first."""
    rows = []
    for (lo, hi), share in agreement.items():
        price = costs[hi - lo - 1]
        trained = float(torch.tensor(share).clamp(1e-3, 0.999).logit().add(gain).sigmoid())
        chain = torch.tensor([trained * FADE**step for step in range(STEPS)]).cumprod(0).tolist()
        speedup, depth = predict(chain, price)
        cost = price.drafts[-1][1] / price.score[1]
        rows.append(Row((lo, hi), round(cost, 4), round(share, 4), round(speedup, 3), depth))
    return sorted(rows, key=lambda row: (-row.speedup, row.segment[1] - row.segment[0], -row.agreement))


def _add(moments: Moments, batch: Batch, parts: dict[str, Tensor], goal: int) -> None:
    """Add the valid positions of ``batch``: ``parts``, each at unit RMS, and the state to be reached."""
    rows = {name: rms_unit(part) for name, part in parts.items()} | {"goal": batch.hidden[goal]}
    moments.add({name: part[batch.valid] for name, part in rows.items()})


def _project(affine: Affine, *parts: Tensor) -> Tensor:
    return nn.functional.linear(torch.cat([rms_unit(part) for part in parts], -1), *affine)


def _first(answers: Sequence[Answer], tokens: int) -> list[Answer]:
    """The first answers, up to about so many answer tokens."""
    some, seen = list[Answer](), 0
    for answer in answers:
        if seen >= tokens:
            break
        some.append(answer)
        seen += len(answer.response_ids)
    return some


def _show(rows: Sequence[Row], console: Console, most: int = 24) -> None:
    table = Table(title="segments, closed form", title_justify="left", box=None, pad_edge=False)
    for name in ("layers", "draft cost", "agreement", "predicted", "drafts a step"):
        table.add_column(name, justify="right")
    for row in rows[:most]:
        lo, hi = row.segment
        figures: tuple[Any, ...] = (f"{row.cost:.3f}", f"{row.agreement:.3f}", f"{row.speedup:.2f}x", row.depth)
        table.add_row(f"{lo}-{hi - 1}", *map(str, figures))
    console.print(table)
