"""The search for the fastest drafter: every drafter that fits the model, then fixed draft lengths for the best one.

It measures side by side on the user's prompts, as ``specdec bench`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.base.options import Depth
from specdec.base.terminal import OnProgress
from specdec.bench.cell import Cell
from specdec.bench.run import BenchRun, Decoders
from specdec.speculation import registry

DEPTHS = (2, 3, 4, 6)  # fixed draft lengths to try
MIN_GAIN = 1.02  # over the automatic draft length, which adapts
JOINED = ("m2r2", "early-exit", "deed")  # also tried in combination with n-grams


@dataclass(frozen=True)
class TunedCell:
    """A measured setting. speedup: over plain decoding, whole calls, median over prompts."""

    cell: Cell
    speedup: float
    acceptance_length: float
    faults: int


def candidates(decoders: Decoders, base: Cell, names: list[str]) -> tuple[list[Cell], list[str]]:
    """The cells whose drafter fits the model, and why the others do not fit."""
    cells, refused = [], []
    for name in names:
        cell = base.with_settings(drafter=name)
        try:
            decoders.method(cell)
            cells.append(cell)
        except SpecDecError as error:
            refused.append(f"{name}: {error}")
    return cells, refused


def all_drafters() -> list[str]:
    """All drafters, and some combinations."""
    alone = [name for name in registry.names("drafters") if name not in ("none", "auto", "hybrid")]
    return [*alone, *(f"ngram+{name}" for name in JOINED)]


def measure(decoders: Decoders, cells: list[Cell], progress: OnProgress | None) -> list[TunedCell]:
    """Measure the cells side by side; fastest first."""
    run = BenchRun(cells, decoders, progress)
    run.execute()
    if run.interrupted:
        raise KeyboardInterrupt
    rows = []
    for cell, result in zip(cells, run.results(), strict=True):
        method: dict[str, Any] = result["method"]
        speedup, length = method["speedup"]["none"], method["mean_acceptance_length"]
        faults = (method["equal_to_plain"] or {}).get("faults") or 0
        rows.append(TunedCell(cell, speedup["value"] if speedup else 0.0, length["value"] if length else 1.0, faults))
    return sorted(rows, key=lambda row: -row.speedup)


def search(decoders: Decoders, cells: list[Cell], progress: OnProgress | None = None) -> list[TunedCell]:
    """Measure every cell at automatic draft length, then the best at fixed ones; the setting to keep comes first."""
    rows = measure(decoders, cells, progress)
    best = rows[0]
    if best.speedup > 1:
        # Only cells of one run are compared, so the automatic length runs again.
        depths: list[Depth] = ["auto", *DEPTHS]
        again = measure(decoders, [best.cell.with_settings(num_speculative_tokens=k) for k in depths], progress)
        auto = next(row for row in again if row.cell.num_speculative_tokens == "auto")
        best = again[0] if again[0].speedup >= MIN_GAIN * auto.speedup else auto
        rows = [best, *(row for row in again if row is not best), *(row for row in rows[1:])]
    return rows
