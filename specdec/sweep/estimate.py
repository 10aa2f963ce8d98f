"""How long a sweep may take, from the size of its models and the speed of this machine's memory.

Plain decoding reads every weight once a token; so that is what a token is taken to cost, for every arm. It ignores
speedups (too long), answers that end early (too long) and prefill (too short). Knows no model from inside.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.bench.cell import HF_ARMS, Cell
from specdec.bench.prompts import load_prompts, spread
from specdec.embedded import EMBEDDED, cache_dir
from specdec.sweep.plan import loading

LOAD = 8.0  # seconds to load a model and measure its costs
HF = 1.6  # model.generate's time per token over ours
INT4 = 0.5  # time per token with int4 weights


def estimate(cells: Sequence[Cell], records: Iterable[Mapping[str, Any]], data_dir: Path | None) -> float | None:
    """Seconds for ``cells``, one after the other; None if a model's size is not known here.

    Raises SpecDecError if prompts cannot be had. records: of cells that have run already; their time per token is then
    what counts, where the model is the same.
    """
    known: dict[str, list[float]] = {}
    turns: dict[tuple[str, int | None], int] = {}
    for record in records:
        if "error" not in record:
            done = Cell.from_dict(record["cell"])
            known.setdefault(done.model, []).append(record["seconds"] / _tokens(done, turns, data_dir))
    rate = 0.0
    total = LOAD * len({loading(cell) for cell in cells})
    for cell in cells:
        tokens = _tokens(cell, turns, data_dir)
        if cell.model in known:
            total += tokens * sum(known[cell.model]) / len(known[cell.model])
            continue
        size = _bytes(cell)
        if size is None:
            return None
        rate = rate or _memory_speed()
        total += tokens * size / rate
    return total


def _tokens(cell: Cell, turns: dict[tuple[str, int | None], int], data_dir: Path | None) -> float:
    """Passes over the model, at most: new tokens of all arms, those of a batch counted once."""
    key = cell.prompts, cell.limit
    if key not in turns:
        conversations = spread(load_prompts(cell.prompts, data_dir).conversations, cell.limit)
        turns[key] = sum(len(conversation.turns) for conversation in conversations)
    arms = sum(HF if arm.partition("=")[0] in HF_ARMS else 1 for arm in {cell.drafter, *cell.against})
    return turns[key] / cell.batch_size * cell.repetitions * cell.max_new_tokens * arms


def _bytes(cell: Cell) -> float | None:
    """The size of the weights that a token reads."""
    folder = cache_dir() / "models" / cell.model if cell.model in EMBEDDED else Path(cell.model)
    files = [folder] if folder.is_file() else list(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    if not size and cell.model in EMBEDDED:  # not in the cache yet, where it will take more than its weights
        size = EMBEDDED[cell.model].disk_bytes // 2
    return size * (INT4 if cell.weights == "int4" else 1.0) or None


def _memory_speed() -> float:
    """Bytes per second that this machine reads, measured."""
    import torch  # heavy

    block, vector = torch.ones(8192, 8192, dtype=torch.bfloat16), torch.ones(8192, dtype=torch.bfloat16)
    torch.mv(block, vector)
    start = time.perf_counter()
    for _ in range(3):
        torch.mv(block, vector)
    return 3 * block.numel() * block.element_size() / (time.perf_counter() - start)
