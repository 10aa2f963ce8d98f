"""Made-up results of cells in the format of ``specdec bench``, for tests of sweeps and reports without a model."""

import json
from typing import Any

from specdec.bench.cell import Cell


def one_line_error(result: Any) -> str:
    """Return the single line on stderr of a command that failed with exit code 2."""
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: "), result.output
    return line


def side_by_side(stdout: str) -> dict[str, Any]:
    """Return the methods, and the entries that they share, of one group that ``specdec bench --json`` has printed."""
    records = json.loads(stdout.splitlines()[-1])["records"]
    settings = ("drafter", "drafter_options", "num_speculative_tokens")
    methods = [{key: record["cell"][key] for key in settings} | record["method"] for record in records]
    shared = ("prompts", "environment", "pass_ms", "seconds", "interrupted")
    return {"methods": methods} | {key: records[0][key] for key in shared}


def estimate(value: float, spread: float = 0.1) -> dict[str, float]:
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def method(name: str, speed: float, accepted: list[float], lossless: bool = True, **more: Any) -> dict[str, Any]:
    """Return FIGURES (see ``specdec.bench.cell``) of a method that is ``speed`` times as fast as plain decoding.

    accepted: share of accepted tokens by position in the draft. more: entries that replace others.
    """
    return {
        "name": name,
        "requests": 4,
        "tokens": 128,
        "lossless": lossless,
        "engine": None,
        "tokens_per_second": estimate(30 * speed),
        "first_token_ms": estimate(90),
        "prefill_ms": estimate(80),
        "decode_ms_per_token": estimate(33 / speed),
        "latency_ms": {what: {"p50": 30.0, "p99": 40.0} for what in ("token", "first_token", "step")},
        "speedup": {"none": estimate(speed)},
        "worst": {"none": 0.9 * speed},
        "mean_acceptance_length": estimate(1 + sum(accepted)),
        "acceptance_rate": sum(accepted) / len(accepted) if accepted else None,
        "acceptance_per_position": accepted,
        "drafts_per_position": [round(100 * 0.7**i) for i in range(len(accepted))],
        "phase_ms_per_step": {"score": 25.0},
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
    """Return a record of ``cell``. more: as in ``method``."""
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
        "environment": {
            "cpu": "a CPU",
            "threads": 2,
            "dtype": "float32",
            "gpu": None,
            "specdec": "0.1.0",
            "commit": "abc",
            "torch": "2.9",
            "transformers": "5.24",
            "python": "3.11",
            "system": "Linux",
            "runtime": "torch",
            "device": "cpu",
            "activations": "as computed",
            "kv_cache": "as computed",
            "load_average": 0.25,
        },
        "pass_ms": {"specdec": {"1": 30.0, "2": 31.0}},
        "seconds": 1.0,
        "interrupted": False,
    }
