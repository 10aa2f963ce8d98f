"""Runs cells one after the other in this process; what fails is recorded, and the rest goes on.

Launchers take cells and yield one record for each as it ends. Interrupting one loses the cells under way, no others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.bench.cell import Cell, Progress
from specdec.bench.run import Decoders, run_cell
from specdec.models.catalogue import one_line

Watch = Callable[[Cell, int, int, int], None]  # a cell under way; requests done, requests in all, tokens so far


def locally(cells: Sequence[Cell], data_dir: Path | None, watch: Watch) -> Generator[dict[str, Any]]:
    """Measure ``cells`` here, in order. A model stays loaded until a cell needs another."""
    decoders = Decoders(data_dir)
    for cell in cells:
        watch(cell, 0, 0, 0)
        yield measure(cell, decoders, lambda done, total, tokens, cell=cell: watch(cell, done, total, tokens))  # type: ignore[misc]


def measure(cell: Cell, decoders: Decoders, progress: Progress) -> dict[str, Any]:
    """The result of a cell, or a record of why there is none; never raises but for an interrupt."""
    start = time.perf_counter()
    try:
        result = run_cell(cell, decoders, progress)
        json.dumps(result, allow_nan=False)  # a figure that is none is a failure of this cell alone
        return result
    except Exception as error:
        return failed(cell, error, time.perf_counter() - start)


def failed(cell: Cell, error: BaseException, seconds: float) -> dict[str, Any]:
    """The record of a cell that failed: its error in one line."""
    kind, text = type(error).__name__, one_line(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in text:
        text = "out of memory"
    elif not isinstance(error, SpecDecError):
        text = f"unexpected {kind}: {text}"
    return {"key": cell.key(), "cell": cell.as_dict(), "error": text, "seconds": seconds}
