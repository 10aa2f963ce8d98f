"""The report of a results folder: one self-contained HTML file with the notes, tables and pictures of its results.

Needs matplotlib (the ``plot`` extra).
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specdec import __version__
from specdec.base.files import write_atomically
from specdec.bench.cell import method_label
from specdec.bench.results import NAMES, Estimate, Record, Results

PAGE = "report.html"  # also the name of the template
WIDTH = 4.5  # inches; 9-point text stays readable at the width of a phone
MOST_LINES = 8
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#8f8f8f", "#8c6d31")  # Okabe and Ito
MEASURES = {  # of quality
    "agreement": "agreement with the full model",
    "rouge_l": "ROUGE-L against the full model's output",
    "nll": "NLL per token under the full model",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS, marker=list("os^DvPX*"), linestyle=["-", "--", ":", "-."] * 2),
    "text.parse_math": False,  # a name with a dollar sign is a name
}


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib and its texts, for the HTML page."""

    title: str
    caption: str
    alt: str  # text that replaces the figure where it cannot be seen
    figure: Figure

    @property
    def png(self) -> str:
        """The figure as a PNG file, in base64."""
        data = io.BytesIO()
        self.figure.savefig(data, format="png", dpi=220, facecolor="white", metadata={"Software": None})
        return base64.b64encode(data.getvalue()).decode()


def write_page(results: Results, folder: Path) -> Path:
    """Write the HTML page of ``results`` into ``folder`` and return its path."""
    page = Environment(loader=PackageLoader("specdec.bench", "."), autoescape=True).get_template(PAGE)
    with matplotlib.rc_context(STYLE):
        text = page.render(results=results, pictures=draw_all(results), version=__version__)
    write_atomically(folder / PAGE, text.encode(errors="backslashreplace"))
    return folder / PAGE


def draw_all(results: Results) -> list[Picture]:
    """Draw the pictures of the cells that did not fail: speedup per baseline, acceptance, quality of lossy verifiers.

    A picture without data is left out.
    """
    cells = [cell for cell in zip(results.labels(), results.records, strict=True) if "error" not in cell[1]]
    baselines = dict.fromkeys(name for _, record in cells for name in record["method"]["speedup"])
    pictures = []
    for baseline in baselines:
        timed = [(name, record) for name, record in cells if record["method"]["speedup"].get(baseline)]
        if others := [(name, record) for name, record in timed if record["cell"]["drafter"] != baseline]:
            pictures.append(_speedup(others, baseline))
    if drafted := [(name, record) for name, record in cells if record["method"]["acceptance_per_position"]]:
        pictures.append(_acceptance(drafted))
    timed = [(name, record) for name, record in cells if record["method"]["speedup"].get("none")]
    rated = [record for _, record in timed if record["method"]["quality"]]
    if not all(record["method"]["lossless"] for record in rated):
        pictures.append(_quality(rated))
    return pictures


def _speedup(cells: Sequence[tuple[str, Record]], baseline: str) -> Picture:
    """Draw the speedup of each cell (label, record) over ``baseline`` as horizontal bars with 95 % intervals."""
    names = [textwrap.fill(textwrap.shorten(name, 72, placeholder="…"), 26) for name, _ in cells]
    lines = sum(max(1.0, 0.8 * (1 + name.count("\n"))) for name in names)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * lines), layout="constrained")
    ax = figure.subplots()
    values, errors = _values_and_errors([record["method"]["speedup"][baseline] for _, record in cells])
    bars = ax.barh(range(len(cells)), values, xerr=errors, color=COLOURS[0], error_kw={"capsize": 4})
    ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=4)
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    ax.set_yticks(range(len(cells)), names)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    over = {"none": "plain decoding"}.get(baseline, NAMES.get(baseline, baseline))
    ax.set_xlabel(f"seconds per token of {over} / ours")
    caption = (
        f"Speed over {over}, measured beside it prompt by prompt, prefill included. Bars are medians, the lines on "
        "them 95 % bootstrap intervals; the dashed line is equal speed."
    )
    return Picture(f"Speed over {over}", caption, f"{len(cells)} bars; the longest is {max(values):.2f} x", figure)


def _acceptance(cells: Sequence[tuple[str, Record]]) -> Picture:
    """Draw, as a line per cell (label, record), the share of accepted tokens by position in the draft."""
    chosen = sorted(cells, key=lambda cell: -cell[1]["method"]["mean_acceptance_length"]["value"])[:MOST_LINES]
    shares = {name: record["method"]["acceptance_per_position"] for name, record in chosen}
    figure = Figure(figsize=(WIDTH, 3.0 + 0.2 * len(chosen)), layout="constrained")
    ax = figure.subplots()
    for name, values in shares.items():
        ax.plot(range(1, len(values) + 1), values, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="y", linewidth=0.4)
    ax.set_xlabel("position in the draft")
    ax.set_ylabel("accepted")
    figure.legend(loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Share of accepted tokens at each position, over the drafts that reach it, of at most "
        f"{MOST_LINES} cells, those with the largest acceptance length."
    )
    alt = "Accepted at the first position: " + ", ".join(f"{name}: {v[0]:.0%}" for name, v in shares.items())
    return Picture("Acceptance by position", caption, alt, figure)


def _quality(records: Sequence[Record]) -> Picture:
    """Draw quality against speed of lossy verifiers as points, with one panel per measure of quality."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["method"]["speedup"]["none"]["value"]):
        cell = record["cell"]
        groups.setdefault(method_label(cell | {"verifier_options": {}}), []).append(record)
    figure = Figure(figsize=(WIDTH, 2.5 * len(MEASURES) + 0.2 * len(groups) + 0.3), layout="constrained")
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    for ax, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for name, group in groups.items():
            points = [record["method"] for record in group if record["method"]["quality"][measure]]
            xs, x_errors = _values_and_errors([method["speedup"]["none"] for method in points])
            ys, y_errors = _values_and_errors([method["quality"][measure] for method in points])
            ax.errorbar(xs, ys, y_errors, x_errors, ecolor="grey", label=name)
        ax.grid(linewidth=0.4)
        ax.set_title(title, loc="left")
    panels[-1].set_xlabel("speed, x plain decoding")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Quality of lossy rules against their speed: up is better, for NLL down; right is faster. A line joins the "
        "settings of one drafter and rule. Grey crosses are 95 % intervals."
    )
    return Picture("Quality against speed", caption, f"Quality against speed of {'; '.join(groups)}", figure)


def _values_and_errors(estimates: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Return (values, [distances to the lower ends, distances to the upper ends]); 0 without an interval."""
    values = [estimate["value"] for estimate in estimates]
    bounds = [(e["value"], e["value"]) if e["low"] is None else (e["low"], e["high"]) for e in estimates]
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)]
    return values, [below, above]
