"""The curves of a training run, from its metrics. Needs matplotlib (the ``plot`` extra)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.base.terminal import tell


def draw_curves(metrics: Path, picture: Path, console: Console) -> None:
    """Write loss and agreement over training tokens, with the evaluations, as a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        tell(console, f"no {picture.name}: matplotlib is not installed (pip install 'specdec-m2r2[plot]')")
        return
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines() if line.strip()]
    updates = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "evaluation" in line]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, agreement = figure.subplots(1, 2)
    loss.plot(*_series(updates, "loss"), linewidth=0.8)
    loss.set(xlabel="training tokens", ylabel="loss")
    for number, key in enumerate(sorted({key for line in updates for key in line if key.startswith("agree")})):
        points = _series([u for u in updates if key in u], key)
        agreement.plot(*points, linewidth=0.7, alpha=0.6, color=f"C{number}", label=f"training, {key}")
    for step in range(len(evaluations[0]["evaluation"].get("top1", ())) if evaluations else 0):
        held = [(line["tokens"], line["evaluation"]["top1"][step]) for line in evaluations]
        agreement.plot(*zip(*held, strict=True), marker="o", color=f"C{step}", label=f"held out, step {step + 1}")
    agreement.set(xlabel="training tokens", ylabel="top-1 agreement with the model")
    if agreement.get_legend_handles_labels()[0]:
        agreement.legend(fontsize=8)
    try:
        figure.savefig(picture, dpi=110)
    except OSError as error:
        picture.unlink(missing_ok=True)
        tell(console, f"no {picture.name}: {error.strerror or error}")


def _series(lines: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [line["tokens"] for line in lines], [line[key] for line in lines]
