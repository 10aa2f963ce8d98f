"""The path of an M2R2 chosen without gradients: closed-form leaps, agreement on the drafter's own states, real costs.

Candidates leap from an early exit to a stretch of later layers, or to two short ones, and from there onto the final
state. Their leaps are fitted on a sample of the teacher's states; stretches that begin at one layer share a pass. All
are ranked by the agreement of one draft, the best by chains of four on their own states. What layers, leaps and the
rest of a draft cost is measured on this machine with drafters as users run them. The largest predicted speedup wins.
Training raises agreement: ``gain`` is what it was seen to add to the log-odds, and the choice is made with it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from specdec import artifacts, measured
from specdec.costs import Costs, time_drafting, time_scoring
from specdec.decoder import SpecDecoder
from specdec.drafters.m2r2 import M2R2, M2R2Drafter, M2R2Path, rms_unit
from specdec.errors import SpecDecError
from specdec.target import Target
from specdec.terminal import tell
from specdec.train import batches as windows_of
from specdec.train.batches import Batch
from specdec.train.evaluate import standing, walk
from specdec.train.fit import Moments
from specdec.train.speed import predict
from specdec.train.states import Record, Wanted
from specdec.train.student import drafts, step_mask

FILE = "search.json"
STEPS = 4  # drafts of a chain
EVAL_TOKENS = 6_000  # held-out answer positions
LANDINGS = 8  # layers that a first leap is tried to at first; then those between, beside the best
LONGEST, SHORT = 6, 3  # most layers of a single stretch, and of the first of two
EXITS = (1, 2)  # early layers tried before the leap of the best paths; the others start from the embedding
BETWEEN = 2  # best landings whose neighbours are tried
RANKED, PAIRED = 10, 2  # paths whose chains are measured; stretches that get a second one
TIMINGS, PATIENCE = 3, 10.0  # fewest timings of each cost; seconds after which there are no more
SEVERAL = 4  # leaps, layer by layer, that are timed to find the price of one
FADE = 0.8  # agreement of a second draft over that of the first, for ranking

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Candidate:
    """A path: exit layer, stretches of later layers, and whether a last leap follows them."""

    exit_layer: int
    segments: Segments
    final_leap: bool = True

    @property
    def layers(self) -> int:
        return self.exit_layer + sum(hi - lo for lo, hi in self.segments)

    @property
    def key(self) -> str:
        stretches = " + ".join(f"{lo}-{hi - 1}" if hi - lo > 1 else f"{lo}" for lo, hi in self.segments)
        return f"exit {self.exit_layer}, {stretches}{'' if self.final_leap else ', no last leap'}"


@dataclass(frozen=True)
class PathCosts:
    """Seconds: ``score[n]`` of a pass over n tokens; of a draft: a layer, a leap, and all the rest of it.

    steady: whether each figure that these rest on was reached twice; if not, the machine was busy with something else.
    """

    score: dict[int, float]
    layer: float
    leap: float
    rest: float
    steady: bool = True

    def of(self, candidate: Candidate) -> Costs:
        leaps = len(candidate.segments) + candidate.final_leap
        draft = self.rest + candidate.layers * self.layer + leaps * self.leap
        return Costs(self.score, ((draft, draft),))


def path_costs(target: Target, vocab: Tensor | None) -> PathCosts:
    """Measure them, with untrained drafters of three shapes (seconds; values do not matter for them)."""
    half, count = target.num_layers // 2, target.num_layers
    longer = min(LONGEST, count - half)
    several = min(SEVERAL, longer)
    decoder = SpecDecoder(target.model, None, drafter="none")
    singles = tuple((half + i, half + i + 1) for i in range(several))
    drafters = []
    for segments in (singles[:1], ((half, half + longer),), singles):
        drafters.append(M2R2Drafter(M2R2(M2R2Path(0, segments, True), decoder.target, vocab), siblings=()))
        drafters[-1].bind(decoder.target)
    # In turns, and the least of each: what else the machine does must not end up in a difference.
    runs: list[list[float]] = [[] for _ in drafters]
    score: dict[int, list[float]] = {}
    start, steady = time.perf_counter(), False
    while not steady and (len(runs[0]) < TIMINGS or time.perf_counter() - start < PATIENCE):
        for times, drafter in zip(runs, drafters, strict=True):
            times.append(time_drafting(decoder.target, drafter, decoder.verifier))
        for n, seconds in time_scoring(decoder.target, 1).items():
            score.setdefault(n, []).append(seconds)
        leasts = [sorted(times)[:2] for times in (*runs, *score.values())]
        steady = len(runs[0]) >= TIMINGS and all(second <= measured.CONFIRMED * least for least, second in leasts)
    one, many, split = map(min, runs)
    layer = max(many - one, 0.0) / (longer - 1)
    leap = max(split - one - (several - 1) * layer, 0.0) / (several - 1)
    rest = max(one - layer - 2 * leap, 0.0)
    return PathCosts({n: min(s) for n, s in score.items()}, layer, leap, rest, steady)


def trained(chain: Sequence[float], gain: float) -> list[float]:
    """``chain`` with ``gain`` added to the log-odds of each draft's agreement given the ones before it."""
    out, before, reach = [], 1.0, 1.0
    for stands in chain:
        given = min(max(stands / before if before else 0.0, 1e-3), 0.999)
        reach *= 1 / (1 + (1 - given) / given * math.exp(-gain))
        out.append(reach)
        before = stands
    return out


def landings(num_layers: int) -> list[int]:
    """The layers that first leaps are tried to at first: of the later half, at most ``LANDINGS``."""
    half = range(num_layers // 2, num_layers)
    step = -(-len(half) // LANDINGS)
    return list(half)[::step]


def wanted(num_layers: int) -> Wanted:
    """The teacher states a search needs."""
    later = tuple(range(num_layers // 2, num_layers))
    return Wanted(later, (*(e for e in EXITS if e < later[0]), *later, num_layers))


class Search:
    """One search. ``run`` returns the chosen candidate; results are kept in ``folder`` as they come.

    train, held_out: records with the states of ``wanted``. vocab: the draft vocabulary. gain: see above. mark: what the
    results depend on; kept ones of another mark are not used.
    """

    def __init__(
        self,
        target: Target,
        vocab: Tensor | None,
        train: Sequence[Record],
        held_out: Sequence[Record],
        rows: int,
        window: int,
        gain: float,
        folder: Path,
        mark: str,
    ) -> None:
        if target.num_layers < 4:
            raise SpecDecError(f"a model of {target.num_layers} layers is too shallow to search; give 'segments'")
        self.target, self.vocab, self.train, self.held_out = target, vocab, train, held_out
        self.rows, self.window, self.gain, self.file = rows, window, gain, folder / FILE
        self.count = target.num_layers
        own = None if vocab is None else vocab.long()
        self.head = None if own is None else target.reduced_head(own)
        self.place = None
        if own is not None:
            self.place = torch.full((target.vocab_size,), -1, dtype=torch.long, device=target.device)
            self.place[own] = torch.arange(len(own), device=target.device)
        self.fitted: dict[tuple[int, Segments, int], tuple[Tensor, Tensor]] = {}  # exit, stretches so far, goal
        self.first: dict[str, float] = {}  # agreement of one draft, by candidate
        self.chains: dict[str, dict[str, list[float]]] = {}  # agreement by step and chain
        self.seen: dict[str, Candidate] = {}
        self.mark = mark
        kept = self._kept()
        if kept:
            self.costs = PathCosts(**kept["costs"] | {"score": {int(n): s for n, s in kept["costs"]["score"].items()}})
            self.first, self.chains = kept["first"], kept["chains"]
        else:
            self.costs = path_costs(target, vocab)

    # -- the search ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, progress: Callable[[float, str], None] = lambda share, text: None) -> Candidate:
        """Choose a path. ``progress`` is told the share done and what is under way."""
        starts = landings(self.count)
        progress(0.0, "first leaps")
        for index, lo in enumerate(starts):
            self._rank(0, (), lo, range(lo + 1, min(lo + LONGEST, self.count) + 1))
            progress(0.3 * (index + 1) / len(starts), f"stretches from layer {lo}")
        for start in list(dict.fromkeys(c.segments[0][0] for c in self._best(lambda c: True)))[:BETWEEN]:
            for lo in (start - 1, start + 1):
                if starts[0] <= lo < self.count:
                    self._rank(0, (), lo, range(lo + 1, min(lo + LONGEST, self.count) + 1))
                    progress(0.4, f"stretches from layer {lo}")
        best = self._best(lambda c: len(c.segments) == 1 and c.final_leap and c.layers <= SHORT)[:PAIRED]
        for index, base in enumerate(best):
            (lo, hi), step = base.segments[0], max((self.count - starts[0]) // 6, 1)
            for later in range(hi, self.count, step):
                self._rank(0, ((lo, hi),), later, range(later + 1, min(later + 2, self.count) + 1))
            for sooner in range(lo - 1, starts[0] - 1, -step):
                self._rank(0, ((sooner, min(sooner + 2, lo)),), lo, [hi])
            progress(0.4 + 0.3 * (index + 1) / PAIRED, f"second stretch beside {base.key}")
        ranked = self._best(lambda c: True)[:RANKED]
        for index, candidate in enumerate(ranked):
            self._chain(candidate)
            progress(0.7 + 0.2 * (index + 1) / len(ranked), candidate.key)
        for candidate in self._best(lambda c: c.key in self.chains)[:2]:
            for exit_layer in EXITS:
                if exit_layer < starts[0]:
                    deeper = dataclasses.replace(candidate, exit_layer=exit_layer)
                    self.seen[deeper.key] = deeper
                    self._chain(deeper)
        chosen = self._best(lambda c: c.key in self.chains)[0]
        self._write(chosen)
        progress(1.0, chosen.key)
        return chosen

    def speedup(self, candidate: Candidate, gain: float) -> tuple[float, int]:
        """Predicted (speedup, depth), from the measured chain or, before that, from one draft's agreement."""
        key = candidate.key
        if key in self.chains:
            chain = self.chains[key]["chain"]
        else:
            a = self.first[key]
            chain = [a * (a * FADE) ** step for step in range(STEPS)]
        return predict(trained(chain, gain), self.costs.of(candidate))

    def _best(self, which: Callable[[Candidate], bool]) -> list[Candidate]:
        found = [c for c in self.seen.values() if which(c)]
        return sorted(found, key=lambda c: (-self.speedup(c, self.gain)[0], c.layers, c.key))

    def _rank(self, exit_layer: int, prefix: Segments, lo: int, his: Iterable[int]) -> None:
        """One draft's agreement of the paths that go on from ``prefix`` to [lo, hi), for each of ``his``."""
        ends = [Candidate(exit_layer, (*prefix, (lo, hi))) for hi in his]
        ends += [dataclasses.replace(c, final_leap=False) for c in ends if c.segments[-1][1] == self.count]
        self.seen |= {c.key: c for c in ends}
        if all(c.key in self.first for c in ends):
            return
        for candidate in ends:
            self._leaps(candidate, [c.segments[-1][1] for c in ends])
        right, total = dict.fromkeys((c.key for c in ends), 0), 0
        for batch in self._batches(self.held_out, ends[-1], EVAL_TOKENS):
            states = self._ends(exit_layer, prefix, lo, [c.segments[-1][1] for c in ends], batch)
            total += int(batch.valid.sum())
            for c in ends:
                x = states[c.segments[-1][1]]
                if c.final_leap:
                    x = self._leap(exit_layer, c.segments, self.count, x, batch)
                right[c.key] += int((self._hits(x, batch) & batch.valid).sum())
        self.first |= {key: round(n / total, 4) for key, n in right.items()}
        self._write()

    def _chain(self, candidate: Candidate) -> None:
        """Agreement by step, and how far chains stand, on the drafter's own states."""
        if candidate.key in self.chains:
            return
        self._leaps(candidate, [candidate.segments[-1][1]])
        path = M2R2Path(candidate.exit_layer, candidate.segments, candidate.final_leap)
        network = M2R2(path, self.target, self.vocab).to(self.target.device)
        for index, leap in enumerate(network.leaps):
            assert isinstance(leap, nn.Linear)
            goal = path.segments[index][0] if index < len(path.segments) else self.count
            weight, bias = self.fitted[path.exit_layer, path.segments[:index], goal]
            leap.weight.copy_(weight)
            leap.bias.copy_(bias)
        network.to(self.target.dtype)
        right, valid_count, lengths = [0] * STEPS, [0] * STEPS, []
        for batch in self._batches(self.held_out, candidate, EVAL_TOKENS):
            hits = []
            for step, (final, valid) in enumerate(drafts(network, self.target, batch, STEPS)):
                hit = self._hits(final, batch) & valid
                right[step], valid_count[step] = right[step] + int(hit.sum()), valid_count[step] + int(valid.sum())
                hits.append(hit)
            for row, n in zip(torch.stack(hits, 1).tolist(), batch.valid.sum(1).tolist(), strict=True):
                lengths += walk(row, n)
        agreement = [round(r / max(n, 1), 4) for r, n in zip(right, valid_count, strict=True)]
        self.first[candidate.key] = agreement[0]
        self.chains[candidate.key] = {"agreement": agreement, "chain": standing(lengths, STEPS)}
        self._write()

    # -- closed forms -------------------------------------------------------------------------------------------

    def _leaps(self, candidate: Candidate, ends: list[int]) -> None:
        """Fit what ``candidate`` needs and is not fitted yet; the last leaps of all ``ends`` of its last stretch."""
        exit_layer, segments = candidate.exit_layer, candidate.segments
        for index, (lo, _) in enumerate(segments):
            if (exit_layer, segments[:index], lo) in self.fitted:
                continue
            if index:
                start, end = segments[index - 1]
                self._fit(exit_layer, segments[: index - 1], start, {end: [lo]})
            else:  # several landings at once cost less than one after another
                goals = {lo, *(landings(self.count) if not exit_layer else [])}
                self._fit(exit_layer, (), None, {0: sorted(g for g in goals if (exit_layer, (), g) not in self.fitted)})
        if candidate.final_leap and (exit_layer, segments, self.count) not in self.fitted:
            self._fit(exit_layer, segments[:-1], segments[-1][0], {hi: [self.count] for hi in ends})

    def _fit(self, exit_layer: int, prefix: Segments, lo: int | None, goals: dict[int, list[int]]) -> None:
        """Fit the leaps to ``goals[hi]`` from the ends of stretch [lo, hi) after ``prefix``; lo None: the exit."""
        problems = {
            (hi, goal): ([f"x{hi}", "final", *([] if goal == self.count else [f"carry{goal}"])], f"goal{goal}")
            for hi, several in goals.items()
            for goal in several
        }
        moments = Moments(problems.values())
        reach = Candidate(exit_layer, prefix if lo is None else (*prefix, (lo, max(goals))))
        landed = {goal for _, goal in problems}
        for batch in self._batches(self.train, reach, None, landed):
            ends = self._ends(exit_layer, prefix, lo, list(goals), batch)
            parts = {f"x{hi}": rms_unit(x) for hi, x in ends.items()}
            parts |= {"final": rms_unit(batch.before[self.count])}
            parts |= {f"carry{goal}": rms_unit(batch.before[goal]) for goal in landed if goal != self.count}
            parts |= {f"goal{goal}": batch.hidden[goal] for goal in landed}
            moments.add({name: part[batch.valid] for name, part in parts.items()})
        for (hi, goal), problem in problems.items():
            segments = prefix if lo is None else (*prefix, (lo, hi))
            weight, bias = moments.solve(*problem)
            self.fitted[exit_layer, segments, goal] = weight.to(self.target.device), bias.to(self.target.device)

    def _ends(
        self, exit_layer: int, prefix: Segments, lo: int | None, his: list[int], batch: Batch
    ) -> dict[int, Tensor]:
        """The residual [B, T, D] at the ends ``his`` of the last stretch, in step 1 (exact keys, values and carry)."""
        target = self.target
        x = batch.hidden[exit_layer] if exit_layer else target.embed(batch.ids, batch.positions)
        if lo is None:
            return {his[0]: x}
        cache, mask, taps = batch.cache(self.count), step_mask(batch, 1), {hi: x for hi in his}
        stretches = (*prefix, (lo, max(his)))
        for index, (start, end) in enumerate(stretches):
            x = self._leap(exit_layer, stretches[:index], start, x, batch)
            last = index == len(prefix)
            x = target.layers(x, start, end, batch.positions, mask, cache, taps if last else None)
        return taps

    def _leap(self, exit_layer: int, segments: Segments, goal: int, x: Tensor, batch: Batch) -> Tensor:
        """As ``M2R2.leap``, with exact carries."""
        carries = [batch.before[self.count]] + ([] if goal == self.count else [batch.before[goal]])
        features = torch.cat([rms_unit(part) for part in (x, *carries)], -1)
        weight, bias = (part.to(x.dtype) for part in self.fitted[exit_layer, segments, goal])
        return nn.functional.linear(features, weight, bias)

    def _hits(self, final: Tensor, batch: Batch) -> Tensor:
        best = batch.best if self.place is None else self.place[batch.best]
        return self.target.readout(final, self.head).argmax(-1) == best

    def _batches(
        self, records: Sequence[Record], reach: Candidate, tokens: int | None, goals: Iterable[int] = ()
    ) -> Iterator[Batch]:
        """Batches of the first ``tokens`` answer positions (None: all), with the states for ``reach`` and ``goals``."""
        kv = [layer for lo, hi in reach.segments for layer in range(lo, hi)]
        hidden = {
            self.count,
            *goals,
            *(lo for lo, _ in reach.segments),
            *([reach.exit_layer] if reach.exit_layer else []),
        }
        some = [
            dataclasses.replace(r, kv={k: r.kv[k] for k in kv}, hidden={k: r.hidden[k] for k in sorted(hidden)})
            for r in records
        ]
        seen = 0
        found = windows_of.windows(some, self.window)
        for start in range(0, len(found), self.rows):
            if tokens is not None and seen >= tokens:
                return
            batch = windows_of.assemble(some, found[start : start + self.rows], self.window, self.target.device)
            seen += int(batch.valid.sum())
            yield batch

    # -- what it keeps ------------------------------------------------------------------------------------------

    def _kept(self) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = json.loads(self.file.read_text("utf-8"))
            return kept if kept["mark"] == self.mark else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _write(self, chosen: Candidate | None = None) -> None:
        costs = dataclasses.asdict(self.costs)
        data: dict[str, Any] = {"mark": self.mark, "costs": costs, "first": self.first, "chains": self.chains}
        if chosen is not None:
            data["chosen"] = dataclasses.asdict(chosen)
            data["table"] = self.rows_of_table()
        try:
            artifacts.replace(self.file, json.dumps(data, indent=1).encode())
        except OSError as error:
            raise SpecDecError(
                f"cannot write '{self.file}': {error.strerror or error}; free space and --resume"
            ) from None

    def rows_of_table(self) -> list[dict[str, Any]]:
        """Candidates with measured chains first, then the others, each best first."""
        plain = self.costs.score[1]
        rows = []
        for candidate in sorted(self._best(lambda c: True), key=lambda c: c.key not in self.chains):
            measured = self.chains.get(candidate.key, {})
            fitted, later = (self.speedup(candidate, gain) for gain in (0.0, self.gain))
            rows.append(
                {
                    "path": candidate.key,
                    "draft_cost": round(self.costs.of(candidate).drafts[-1][1] / plain, 4),
                    "agreement": measured.get("agreement", [self.first[candidate.key]]),
                    "tokens_per_round": round(1 + sum(measured["chain"]), 3) if measured else None,
                    "speedup": round(fitted[0], 3),
                    "speedup_trained": round(later[0], 3),
                    "depth": later[1],
                }
            )
        return rows


def chosen_before(folder: Path, mark: str) -> Candidate | None:
    """What an earlier search in ``folder`` chose under the same mark."""
    try:
        kept = json.loads((folder / FILE).read_text("utf-8"))
        found = kept["chosen"]
        segments = tuple((int(lo), int(hi)) for lo, hi in found["segments"])
        same = kept["mark"] == mark
        return Candidate(int(found["exit_layer"]), segments, bool(found["final_leap"])) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def show(rows: Sequence[dict[str, Any]], costs: PathCosts, console: Console, most: int = 24) -> None:
    """Print the best ``most`` candidates, and what the costs rest on."""
    table = Table(title="paths, closed form only", title_justify="left", box=None, pad_edge=False)
    for name in ("path", "cost", "agreement 1-4", "tokens", "now", "trained", "at"):
        table.add_column(name, justify="left" if name in ("path", "agreement 1-4") else "right")
    for row in rows[:most]:
        table.add_row(
            row["path"],
            f"{row['draft_cost']:.3f}",
            " ".join(f"{a:.2f}" for a in row["agreement"]),
            "" if row["tokens_per_round"] is None else f"{row['tokens_per_round']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_trained']:.2f}x",
            str(row["depth"]),
        )
    console.print(table)
    parts = ("layer", costs.layer), ("leap", costs.leap), ("all else", costs.rest)
    tell(
        console,
        "cost: of a draft, in plain steps; tokens: a round of four drafts; now, trained: predicted speedups, the "
        f"second at so many drafts. Measured: plain decoding {1e3 * costs.score[1]:.2f} ms a token; of a draft, "
        + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in parts),
    )
    if not costs.steady:
        tell(
            console,
            "the machine was too busy for these costs to be trusted, nor is the choice: search again, in another "
            "--output, when nothing else runs",
        )
