"""The segment of an M2R2 path, by closed-form acceptance and measured cost, without gradients.

Candidates project from the embedding to one segment of later layers, and from its end to the final state. They begin
at layer ``begin`` (two thirds up, in the preset) or, with ``--search``, anywhere in the upper half. Projections are
fitted on a sample of the teacher's states. Each candidate drafts on its own states along held-out answers. How many
drafts are accepted, and what drafting and scoring cost on this machine, predict a speedup as every evaluation does
(``predict``); the largest wins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specdec.api.decoder import SpecDecoder
from specdec.base import files
from specdec.base.errors import SpecDecError
from specdec.drafters.m2r2 import M2R2Drafter
from specdec.drafters.m2r2_network import M2R2
from specdec.drafters.m2r2_path import M2R2Path
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.measure import measure
from specdec.models import drafter_folder
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch, in_order
from specdec.train.data import TrainingAnswer
from specdec.train.evaluate import acceptance_lengths, chain_figures
from specdec.train.fit import Ridge, fit_projection
from specdec.train.m2r2_settings import M2R2Settings, wanted_states
from specdec.train.method import Work
from specdec.train.output import STATES, writing
from specdec.train.speed import predict
from specdec.train.states import Record, Wanted, compute
from specdec.train.student import Teacher, draft_steps, exact_carry

FILE = "search.json"
EVAL_TOKENS = 4_000  # held-out answer positions
LONGEST = 9  # most layers of a segment
STEPS = 4  # drafts of a chain
SHOWN = 24  # rows of the table that is printed
Segment = tuple[int, int]


@dataclass(frozen=True)
class SegmentCandidate:
    """A candidate: layers [lo, hi), cost of a further draft in plain steps, mean acceptance length of ``STEPS`` drafts
    in closed form, and the speedup that this predicts, at ``depth`` drafts a step."""

    segment: Segment
    cost: float
    tokens: float
    speedup: float
    depth: int


def choose(settings: M2R2Settings, target: Target, work: Work) -> Segment:
    """The segment that an earlier search in the output folder chose, or that of a new one; its table is printed.

    Raises SpecDecError for a model that is too shallow, and for a full disk.
    """
    if target.num_layers < 2:
        raise SpecDecError("a model of one layer is too shallow to search; give 'segments'")
    file, folder = work.output / FILE, work.output / STATES / "search"
    if file.exists():
        lo, hi = drafter_folder.read_json(file)["chosen"]
        return int(lo), int(hi)
    depth = target.num_layers
    if settings.search:
        starts = range(depth // 2, depth)
    else:
        start = min(round(settings.begin * depth / (settings.layers_of or depth)), depth - 1)
        starts = range(start, start + 1)
    later = range(starts[0], min(starts[-1] + LONGEST, depth))
    wanted, records = Wanted((*later,), tuple(sorted({*later, later[-1] + 1, depth}))), []
    for name, answers, tokens in (
        ("train", work.train, settings.search_tokens),
        ("eval", work.held_out, EVAL_TOKENS),
    ):
        part = _first(answers, tokens)
        records.append(compute(folder / name, target, part, wanted, work.progress, f"search, {name}"))
    task = work.progress.add_task("search", total=len(starts), unit="layers")
    found: dict[Segment, list[float]] = {}
    for lo in starts:
        found |= chains(target, work.vocab, lo, records[0], records[1], settings)
        work.progress.advance(task)
    rows = rank(found, draft_costs(work.decoder, work.vocab))
    _show(rows, work.console)
    table = {"chosen": rows[0].segment, "table": [asdict(row) for row in rows]}
    with writing(FILE, work.output):
        files.write_atomically(file, json.dumps(table, indent=1).encode())
    shutil.rmtree(folder)  # large, and of no use any more
    return rows[0].segment


@torch.no_grad()
def chains(
    target: Target,
    vocab: Tensor | None,
    lo: int,
    train: Sequence[Record],
    held_out: Sequence[Record],
    settings: M2R2Settings,
) -> dict[Segment, list[float]]:
    """P(the first 1 .. ``STEPS`` drafts are all accepted), in closed form, for each segment that begins at ``lo``."""
    segments = [(lo, hi) for hi in range(lo + 1, min(lo + LONGEST, target.num_layers) + 1)]
    networks = [M2R2(M2R2Path(0, (each,), True), target, vocab).to(target.device, target.dtype) for each in segments]
    longest = networks[-1]

    fit_projection(longest, target, _batches(target, longest.path, train, settings), 0)
    fits = [Ridge() for _ in segments]
    for batch in _batches(target, longest.path, train, settings):  # all share the passes of the longest
        exits, _ = next(draft_steps(longest, target, batch, 1, watched=True))
        for network, x, ridge in zip(networks, exits[0][1][1:-1], fits, strict=True):  # the end of each: [B, T, D]
            features = network.features(1, x, exact_carry(network, batch))
            ridge.add(features[batch.valid], batch.hidden[target.num_layers][batch.valid])
    for network, ridge in zip(networks, fits, strict=True):
        network.projections[0].load_state_dict(longest.projections[0].state_dict())
        ridge.solve_into(network.projections[1])
    teacher, lengths = Teacher(target, vocab), [list[int]() for _ in segments]
    for batch in _batches(target, longest.path, held_out, settings):
        teacher.begin(batch)
        known = teacher.known(batch)
        for network, found in zip(networks, lengths, strict=True):
            drafts = draft_steps(network, target, batch, STEPS)
            hits = [teacher.hits(teacher.logits(exits[-1][0])) & known & valid for exits, valid in drafts]
            found += acceptance_lengths(hits, batch.valid)
    return {each: chain_figures(found, STEPS)["chain"] for each, found in zip(segments, lengths, strict=True)}


def _batches(
    target: Target, path: M2R2Path, records: Sequence[Record], settings: M2R2Settings
) -> Iterator[TrainingBatch]:
    """Batches with the states that ``path`` needs."""
    wanted = wanted_states(path, target.num_layers)
    some = [
        replace(
            r,
            kv={n: both for n, both in r.kv.items() if n in wanted.kv},
            mixed={n: x for n, x in r.mixed.items() if n in wanted.kv},
            hidden={n: r.hidden[n] for n in wanted.hidden},
        )
        for r in records
    ]
    return in_order(some, settings.rows, settings.window, target.device)


def draft_costs(decoder: SpecDecoder, vocab: Tensor | None) -> list[Costs]:
    """Costs of untrained drafters whose segment has 1, 2, ... layers, in the runtime of ``decoder``.

    Drafting is timed with the fewest and with the most; each layer between them costs the same.
    """
    target, half = decoder.target, decoder.target.num_layers // 2
    most = min(LONGEST, target.num_layers - half)
    paths = [M2R2Path(0, ((half, half + length),), True) for length in (1, most)]
    ends = [M2R2Drafter(M2R2(path, target, vocab)) for path in paths]
    for drafter in ends:
        drafter.bind(target)
    fewest, longest = measure(target, ends, decoder.verifier)
    [short], [long] = fewest.drafts, longest.drafts
    shares = [(length - 1) / max(most - 1, 1) for length in range(1, most + 1)]
    more = [max(b - a, 0.0) for a, b in zip(short, long, strict=True)]  # of the first draft, of each further one
    return [replace(fewest, drafts=((short[0] + share * more[0], short[1] + share * more[1]),)) for share in shares]


def rank(chains: dict[Segment, list[float]], costs: Sequence[Costs]) -> list[SegmentCandidate]:
    """All candidates, the one of largest predicted speedup first."""
    rows = []
    for (lo, hi), chain in chains.items():
        price = costs[hi - lo - 1]
        speedup, depth = predict(chain, price)
        cost = price.drafts[-1][1] / price.score[1]
        rows.append(SegmentCandidate((lo, hi), round(cost, 4), round(1 + sum(chain), 3), round(speedup, 3), depth))
    return sorted(rows, key=lambda row: (-row.speedup, -row.tokens))


def _first(answers: Sequence[TrainingAnswer], tokens: int) -> list[TrainingAnswer]:
    """The first answers, up to about so many answer tokens."""
    some, seen = list[TrainingAnswer](), 0
    for answer in answers:
        if seen >= tokens:
            break
        some.append(answer)
        seen += len(answer.response_ids)
    return some


def _show(rows: Sequence[SegmentCandidate], console: Console) -> None:
    table = Table(title="segments, closed form", title_justify="left", box=None, pad_edge=False)
    for name in ("layers", "draft cost", "tokens a step", "predicted", "drafts a step"):
        table.add_column(name, justify="right")
    for row in rows[:SHOWN]:
        lo, hi = row.segment
        table.add_row(f"{lo}-{hi - 1}", f"{row.cost:.3f}", f"{row.tokens:.2f}", f"{row.speedup:.2f}x", str(row.depth))
    console.print(table)
