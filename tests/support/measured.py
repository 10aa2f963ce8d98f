"""Results of cells as specdec bench writes them, made up: what tests of sweeps and reports need no model for."""

from __future__ import annotations

from typing import Any

from specdec.bench.cell import Cell


def estimate(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def method(name: str, speed: float, accepted: list[float], lossless: bool = True, **more: Any) -> dict[str, Any]:
    """The figures of a method that is ``speed`` times as fast as plain decoding."""
    return {
        "name": name,
        "requests": 4,
        "tokens": 128,
        "lossless": lossless,
        "tokens_per_second": estimate(30 * speed),
        "first_token_ms": estimate(90),
        "speedup": {"none": estimate(speed)},
        "mean_acceptance_length": estimate(1 + sum(accepted)),
        "acceptance_rate": sum(accepted) / len(accepted) if accepted else None,
        "acceptance_per_position": accepted,
        "mean_layers_per_token": estimate(4),
        "peak_memory_mb": 400.0,
        "equal_to_plain": {
            "equal": 4,
            "near_ties": 0 if lossless else None,
            "faults": 0 if lossless else None,
            "of": 4,
        },
        "quality": None,
        "categories": {},
    } | more


def result(cell: Cell, speed: float = 1.5, **more: Any) -> dict[str, Any]:
    """The record of ``cell``."""
    depth = cell.num_speculative_tokens if isinstance(cell.num_speculative_tokens, int) else 3
    accepted = [0.8 * 0.7**i for i in range(depth)] if cell.drafter != "none" else []
    return {
        "key": cell.key(),
        "cell": cell.as_dict(),
        "method": method(cell.drafter, speed, accepted, **more),
        "baselines": {"none": method("none", 1.0, [])},
        "prompts": {
            "name": cell.prompts,
            "licence": "",
            "sha256": "0123456789abcdef" * 4,
            "conversations": 4,
            "turns": 4,
            "skipped": [],
        },
        "environment": {"cpu": "a CPU", "threads": 2, "dtype": "float32", "gpu": None, "commit": "abc"},
        "seconds": 1.0,
        "interrupted": False,
    }
