"""The search for the fastest drafter: every one that fits the model, then fixed depths for the best of them.

Measured side by side on the user's prompts, as ``specdec bench`` does. Knows nothing of command lines.
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

DEPTHS = (2, 3, 4, 6)  # fixed depths that the best drafter is tried at
ENOUGH = 1.02  # a fixed depth has to be this much faster than the automatic one, which adapts
JOINED = ("m2r2", "early-exit", "deed")  # tried behind n-grams, too, if they fit


@dataclass(frozen=True)
class TunedCell:
    """One measured setting. speedup: median over prompts, whole calls, over plain decoding."""

    cell: Cell
    speedup: float
    acceptance_length: float
    faults: int


def candidates(decoders: Decoders, base: Cell, names: list[str]) -> tuple[list[Cell], list[str]]:
    """The cells whose drafter fits the model, and why the others do not."""
    cells, refused = [], []
    for name in names:
        cell = base.but(drafter=name)
        try:
            decoders.method(cell)
            cells.append(cell)
        except SpecDecError as error:
            refused.append(f"{name}: {error}")
    return cells, refused


def every() -> list[str]:
    """All drafters, and the joined ones that are worth a try."""
    alone = [name for name in registry.names("drafters") if name not in ("none", "auto", "hybrid")]
    return [*alone, *(f"ngram+{name}" for name in JOINED)]


def measure(decoders: Decoders, cells: list[Cell], progress: OnProgress | None) -> list[TunedCell]:
    """The settings, fastest first."""
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
    """Every cell at automatic depth, then the best at fixed ones; first the one to keep."""
    rows = measure(decoders, cells, progress)
    best = rows[0]
    if best.speedup > 1:
        # In one run with the automatic depth: only what ran side by side is compared.
        depths: list[Depth] = ["auto", *DEPTHS]
        again = measure(decoders, [best.cell.but(num_speculative_tokens=k) for k in depths], progress)
        auto = next(row for row in again if row.cell.num_speculative_tokens == "auto")
        best = again[0] if again[0].speedup >= ENOUGH * auto.speedup else auto
        rows = [best, *(row for row in again if row is not best), *(row for row in rows[1:])]
    return rows
