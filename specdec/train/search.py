"""The choice of the segment of an M2R2 path, by closed-form acceptance and measured cost, without gradients.

Candidates project from the embedding to one segment of later layers, and from its end to the final state. They begin
at layer ``begin``. Projections are fitted on a sample of teacher
states. Each candidate drafts along held-out answers; its acceptance and the costs on this machine predict a speedup
(``predict_speedup``). The largest speedup wins.
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
from specdec.base.ridge import Sums
from specdec.drafters.m2r2 import M2R2Drafter
from specdec.drafters.m2r2_network import M2R2, narrow_mlp
from specdec.drafters.m2r2_path import M2R2Path
from specdec.engine.measure import Timings, measure
from specdec.models import drafter_folder
from specdec.runtimes.narrow import strengths
from specdec.runtimes.target import Target
from specdec.train.batches import TrainingBatch, by_length
from specdec.train.data import TrainingAnswer
from specdec.train.evaluate import acceptance_lengths, chain_figures, predict_speedup
from specdec.train.m2r2_settings import M2R2Settings, path_states
from specdec.train.method import RunContext
from specdec.train.output import STATES, writing
from specdec.train.states import AnswerStates, StateSelection, compute_states
from specdec.train.student import Teacher, draft_steps, exact_carry, fit_projection

FILE, NEURONS = "search.json", "neurons.json"
EVAL_TOKENS = 4_000  # held-out answer positions
NEURON_TOKENS = 4_000  # answer positions that neurons are chosen on
LONGEST = 9  # layers of the longest segment
STEPS = 4  # drafts per step
SHOWN = 24  # rows of the printed table
Segment = tuple[int, int]


@dataclass(frozen=True)
class SegmentCandidate:
    """A candidate.

    segment: layers [lo, hi).
    cost: of a further draft, relative to a plain step.
    tokens: mean acceptance length with ``STEPS`` drafts, in closed form.
    speedup: predicted, at ``depth`` drafts per step.
    """

    segment: Segment
    cost: float
    tokens: float
    speedup: float
    depth: int


def choose_segment(settings: M2R2Settings, target: Target, context: RunContext) -> Segment:
    """The segment in the output folder's ``search.json``, or that of a new search, whose table is printed.

    Raises SpecDecError for a model of one layer, and for a full disk.
    """
    if target.num_layers < 2:
        raise SpecDecError("a model of one layer is too shallow to search; give 'segments'")
    file, folder = context.output / FILE, context.output / STATES / "search"
    if file.exists():
        lo, hi = drafter_folder.read_json(file)["chosen"]
        return int(lo), int(hi)
    depth = target.num_layers
    start = min(round(settings.begin * depth / (settings.layers_of or depth)), depth - 1)
    later = range(start, min(start + LONGEST, depth))
    teacher, records = context.decoder.target, list[list[AnswerStates]]()
    wanted = StateSelection((*later,), tuple(sorted({*later, later[-1] + 1, depth})))
    for name, answers, tokens in (
        ("train", context.train, settings.search_tokens),
        ("eval", context.held_out, EVAL_TOKENS),
    ):
        part = _first(answers, tokens)
        given = part, wanted, context.progress, f"search, {name}"
        records.append(compute_states(folder / name, teacher, *given))
    found = acceptance_chains(target, context.vocab, start, records[0], records[1], settings)
    rows = rank(found, draft_costs(context.decoder, context.vocab))
    _show(rows, context.console)
    table = {"chosen": rows[0].segment, "table": [asdict(row) for row in rows]}
    with writing(FILE, context.output):
        files.write_atomically(file, json.dumps(table, indent=1).encode())
    shutil.rmtree(folder)  # large, and not needed any more
    return rows[0].segment


@torch.no_grad()
def choose_neurons(path: M2R2Path, target: Target, context: RunContext) -> dict[int, Tensor]:
    """By narrow layer, the neurons that add most to the residual in answers, rising; kept in ``neurons.json``.

    Raises SpecDecError for MLPs that have not so many, and for a full disk.
    """
    file, folder, layers = context.output / NEURONS, context.output / STATES / "neurons", path.narrow_layers
    if not file.exists():
        for layer in layers:
            narrow_mlp(target, layer, path.neurons)
        some, wanted = _first(context.train, NEURON_TOKENS), StateSelection((), tuple(layers))
        records = compute_states(folder, context.decoder.target, some, wanted, context.progress, "neurons")
        found, kind = dict[str, list[int]](), str(target.model.config.get_text_config().model_type)
        for layer in layers:
            h = torch.cat([record.hidden[layer] for record in records]).to(target.device, target.dtype)  # (n, D)
            strongest = strengths(target.block(layer), kind, h).topk(path.neurons).indices
            found[str(layer)] = strongest.sort().values.tolist()
        with writing(NEURONS, context.output):
            files.write_atomically(file, json.dumps(found).encode())
        shutil.rmtree(folder)
    stored = drafter_folder.read_json(file)
    return {layer: torch.tensor(stored[str(layer)], dtype=torch.int32) for layer in layers}


@torch.no_grad()
def acceptance_chains(
    target: Target,
    vocab: Tensor | None,
    lo: int,
    train: Sequence[AnswerStates],
    held_out: Sequence[AnswerStates],
    settings: M2R2Settings,
) -> dict[Segment, list[float]]:
    """P(the first 1 .. ``STEPS`` drafts are all accepted), in closed form, for each segment that begins at ``lo``."""
    segments = [(lo, hi) for hi in range(lo + 1, min(lo + LONGEST, target.num_layers) + 1)]
    networks = [M2R2(M2R2Path(0, (each,), True), target, vocab).to(target.device, target.dtype) for each in segments]
    longest = networks[-1]

    fit_projection(longest, target, _batches(target, longest.path, train, settings), 0)
    fits = [Sums(2 * target.hidden_size, target.hidden_size) for _ in segments]
    for batch in _batches(target, longest.path, train, settings):  # all segments share the passes of the longest
        exits, _ = next(draft_steps(longest, target, batch, 1, watched=True))
        ends = exits[0][1][1:-1]  # of each segment, [B, T, D]
        for network, x, sums in zip(networks, ends, fits, strict=True):
            features = network.features(1, x, exact_carry(network, batch))
            sums.add(features[batch.valid], batch.hidden[target.num_layers][batch.valid])
    for network, sums in zip(networks, fits, strict=True):
        network.projections[0].load_state_dict(longest.projections[0].state_dict())
        sums.fit(network.projections[1])
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
    target: Target, path: M2R2Path, records: Sequence[AnswerStates], settings: M2R2Settings
) -> Iterator[TrainingBatch]:
    """Batches with the states that ``path`` needs."""
    wanted = path_states(path, target.num_layers)
    some = [
        replace(
            r,
            kv={n: both for n, both in r.kv.items() if n in wanted.kv},
            hidden={n: r.hidden[n] for n in wanted.hidden},
        )
        for r in records
    ]
    return by_length(some, settings.rows, settings.window, target.device, target.dtype)


def draft_costs(decoder: SpecDecoder, vocab: Tensor | None) -> list[Timings]:
    """Timings of untrained drafters whose segment has 1, 2, ... layers, in the runtime of ``decoder``.

    The shortest and the longest segment are timed; the others are interpolated.
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
    more = [max(b - a, 0.0) for a, b in zip(short, long, strict=True)]  # for the first draft and each further one
    return [replace(fewest, drafts=((short[0] + share * more[0], short[1] + share * more[1]),)) for share in shares]


def rank(chains: dict[Segment, list[float]], costs: Sequence[Timings]) -> list[SegmentCandidate]:
    """All candidates, largest predicted speedup first."""
    rows = []
    for (lo, hi), chain in chains.items():
        price = costs[hi - lo - 1]
        speedup, depth = predict_speedup(chain, price)
        cost = price.drafts[-1][1] / price.score[1]
        rows.append(SegmentCandidate((lo, hi), round(cost, 4), round(1 + sum(chain), 3), round(speedup, 3), depth))
    return sorted(rows, key=lambda row: (-row.speedup, -row.tokens))


def _first(answers: Sequence[TrainingAnswer], tokens: int) -> list[TrainingAnswer]:
    """The first answers, up to about ``tokens`` answer tokens."""
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
