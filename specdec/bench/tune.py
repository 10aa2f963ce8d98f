"""The search for the fastest drafter: every drafter that fits the model, then fixed draft lengths for the best one.

It measures side by side on the user's prompts, as ``specdec bench`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.base.options import Depth
from specdec.base.terminal import OnProgress
from specdec.bench.cell import Cell
from specdec.bench.run import Decoders, Record, measure
from specdec.speculation import registry

DEPTHS = (2, 3, 4, 6)  # fixed draft lengths to try
MIN_GAIN = 1.02  # over the automatic draft length, which adapts
JOINED = ("m2r2", "early-exit", "deed")  # also tried in combination with n-grams


def all_drafters() -> list[str]:
    """All drafters, and some combinations."""
    alone = [name for name in registry.names("drafters") if name not in ("none", "auto", "hybrid")]
    return [*alone, *(f"ngram+{name}" for name in JOINED)]


def speedup(record: Record) -> float:
    """The speedup over plain decoding; 0 for a cell that failed or drafted nothing that could be timed."""
    found = record["method"]["speedup"]["none"] if "error" not in record else None
    return float(found["value"]) if found else 0.0


def search(decoders: Decoders, cells: Sequence[Cell], progress: OnProgress | None = None) -> list[Record]:
    """Measure every cell at automatic draft length, then the best at fixed ones; the setting to keep comes first."""
    records = _fastest_first(decoders, cells, progress)
    best = records[0]
    if speedup(best) > 1:
        # Only cells of one run are compared, so the automatic length runs again.
        depths: list[Depth] = ["auto", *DEPTHS]
        cell = Cell(**best["cell"])
        again = _fastest_first(decoders, [cell.with_settings(num_speculative_tokens=k) for k in depths], progress)
        auto = next(record for record in again if record["cell"]["num_speculative_tokens"] == "auto")
        best = again[0] if speedup(again[0]) >= MIN_GAIN * speedup(auto) else auto
        records = [best, *(record for record in again if record is not best), *records[1:]]
    return records


def _fastest_first(decoders: Decoders, cells: Sequence[Cell], progress: OnProgress | None) -> list[Record]:
    return sorted(measure(cells, decoders, progress), key=speedup, reverse=True)
