"""The report of a results folder: one self-contained HTML file with the notes, tables and charts of its results.

Charts are SVG. Needs matplotlib (the ``plot`` extra).
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from jinja2 import Environment, PackageLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from specdec import __version__
from specdec.base.files import write_atomically
from specdec.bench.cell import DRAFT_LENGTH, as_yaml, axes, short_name
from specdec.bench.plan import METHOD
from specdec.bench.results import LEAST, NAMES, Estimate, Record, Results, acceptance, interval, labels

PAGE = "report.html"  # also the name of the template
WIDTH = 4.5  # inches; the text stays readable at the width of a phone
MOST_LINES = 8
WRAP = 28  # characters in a line of a label
LINE, GAP, FOOT = 12.5, 10, 34  # points: height of a row, space between columns, height of an axis with its label
BARS, NUMBERS = 150, 92  # points: width of the bars, and of the numbers beside them
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#8f8f8f", "#8c6d31")  # Okabe and Ito
MEASURES = {  # of quality
    "agreement": "agreement with the full model",
    "rouge_l": "ROUGE-L against the full model's output",
    "nll": "NLL per token under the full model",
}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "svg.hashsalt": "specdec",  # the same results give the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS, marker=list("os^DvPX*"), linestyle=["-", "--", ":", "-."] * 2),
    "text.parse_math": False,  # a name with a dollar sign is a name
}


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib and its texts, for the HTML page.

    title: heading of the page's section. subject: what the figure is about, such as a model; may be "".
    caption: text below the figure. alt: text that replaces the figure where it cannot be seen.
    """

    title: str  # heading of the page's section
    subject: str
    caption: str  # text below the figure
    alt: str
    figure: Figure

    @property
    def svg(self) -> bytes:
        """The figure as an SVG file, whose letters are outlines: it looks the same everywhere."""
        data = io.BytesIO()
        self.figure.savefig(data, format="svg", facecolor="white", metadata={"Date": None})
        return data.getvalue()

    @property
    def pixels(self) -> int:
        """The width in CSS pixels at which the letters have their intended size."""
        return round(96 * self.figure.get_figwidth())

    @property
    def url(self) -> str:
        """The SVG file as a ``data:`` URL, for an image in HTML."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


def write_page(results: Results, folder: Path) -> Path:
    """Write the HTML page of ``results`` as ``report.html`` into ``folder`` and return its path."""
    page = Environment(loader=PackageLoader("specdec.bench", "."), autoescape=True).get_template(PAGE)
    with matplotlib.rc_context(STYLE):
        text = page.render(results=results, sections=draw_all(results), version=__version__)
    write_atomically(folder / PAGE, text.encode(errors="backslashreplace"))
    return folder / PAGE


def write_charts(results: Results, folder: Path) -> list[Path]:
    """Write each chart of ``results`` as the SVG file ``NUMBER-TITLE.svg`` into ``folder``; return the paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for number, picture in enumerate(chain(*draw_all(results).values()), start=1):
            paths.append(folder / f"{number}-{picture.title.lower().replace(' ', '-')}.svg")
            write_atomically(paths[-1], picture.svg)
    return paths


def draw_all(results: Results) -> dict[str, list[Picture]]:
    """Return the charts of the cells in ``results`` that did not fail, as {title of a section: pictures}.

    For each model these are speed, draft lengths and acceptance; quality of lossy verifiers follows. A chart without
    data is left out. Call it under ``matplotlib.rc_context(STYLE)``.
    """
    pictures = dict[str, list[Picture]]()
    for model in dict.fromkeys(record["cell"]["model"] for record in results.done):
        records = [record for record in results.done if record["cell"]["model"] == model]
        for draw in (_speed, _lengths, _acceptance):
            if (picture := draw(model, records)) is not None:
                pictures.setdefault(picture.title, []).append(picture)
    timed = [record for record in results.done if record["method"]["speedup"].get("none")]
    rated = [record for record in timed if record["method"]["quality"]]
    if not all(record["method"]["lossless"] for record in rated):
        pictures["Quality against speed"] = [_quality(rated)]
    return pictures


def _speed(model: str, records: Sequence[Record]) -> Picture | None:
    """Draw the speed of each cell and baseline of ``model`` over its first baseline; None: there are no figures.

    records: the results of the model's cells. Each setting in which they differ has a column of text beside the bars.
    """
    baseline = next(iter(records[0]["method"]["speedup"]), "")
    others = dict[str, tuple[dict[str, Any], Estimate | None]]()  # baselines of each group, by their settings
    for record in records:
        shared = {name: value for name, value in record["cell"].items() if name not in METHOD}
        for name, figures in record["baselines"].items():
            if name != baseline:
                cell = shared | {"drafter": NAMES.get(name, name)}
                others[json.dumps(cell)] = cell, figures["speedup"].get(baseline)
    known = {baseline, *(name for record in records for name in record["baselines"])}
    methods = [(r["cell"], r["method"]["speedup"].get(baseline)) for r in records if r["cell"]["drafter"] not in known]
    found = [(cell, gain) for cell, gain in (*methods, *others.values()) if gain]
    if not found:
        return None
    found.sort(key=lambda one: -one[1]["value"])
    cells = [axes(cell) for cell, _ in found]
    names = varying(cells)
    rows = [[short_name(name) for name in names], *([as_yaml(cell.get(name)) for name in names] for cell in cells)]
    wrapped = [[textwrap.fill(text, WRAP, break_on_hyphens=False) for text in row] for row in rows]
    widths = [max(map(_points, column)) + GAP for column in zip(*wrapped, strict=True)]
    heights = [max(1, *(1 + text.count("\n") for text in row)) * LINE for row in wrapped[1:]]
    places = [sum(heights[:n]) + height / 2 for n, height in enumerate(heights)]
    left, high = sum(widths) + GAP, sum(heights)
    wide, tall = left + BARS + NUMBERS, high + LINE + FOOT
    figure = Figure(figsize=(wide / 72, tall / 72))
    ax = figure.add_axes((left / wide, FOOT / tall, BARS / wide, high / tall))
    values, errors = _values_and_errors([gain for _, gain in found])
    ax.barh(places, values, 0.7 * LINE, xerr=errors, color=COLOURS[0], error_kw={"capsize": 2.5, "elinewidth": 1})
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    ax.set(xlim=(0, None), ylim=(high, 0), yticks=[])
    ax.set_xlabel(f"x {NAMES.get(baseline, baseline)}")
    for row, place in zip(wrapped, [-LINE / 2, *places], strict=True):
        for n, text in enumerate(row):
            x = sum(widths[:n]) - left
            style: Any = {"va": "center", "weight": "bold" if place < 0 else "normal", "annotation_clip": False}
            ax.annotate(text, (0, place), (x, 0), ("axes fraction", "data"), "offset points", **style)
    for (_, gain), place in zip(found, places, strict=True):
        ax.annotate(interval(gain), (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center")
    caption = (
        "Seconds per token of plain decoding over those of the method, measured beside it prompt by prompt, prefill "
        "included: medians with 95 % bootstrap intervals. The dashed line is equal speed."
    )
    alt = f"{len(found)} bars; the longest is {max(values):.2f} x"
    return Picture("Speed", model, caption.replace("plain decoding", NAMES.get(baseline, baseline), 1), alt, figure)


def varying(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the settings and options in which ``cells`` differ, the drafter and its length first.

    "drafter" is always among them. cells: the result of ``specdec.bench.cell.axes`` for each cell.
    """
    names = dict.fromkeys(name for cell in cells for name in cell)
    shown = [name for name in names if "." in name or len({as_yaml(cell[name]) for cell in cells if name in cell}) > 1]
    first = ("drafter", DRAFT_LENGTH)
    return ["drafter", *(n for n in (DRAFT_LENGTH,) if n in shown), *(n for n in shown if n not in (*first, "against"))]


def _lengths(model: str, records: Sequence[Record]) -> Picture | None:
    """Draw the speed of ``model`` against the draft length, a line for cells that differ in nothing else.

    records: the results of the model's cells. None: no line would have two fixed lengths.
    """
    lines = dict[str, dict[Any, Estimate]]()
    names = labels([record["cell"] | {DRAFT_LENGTH: "auto"} for record in records])
    for name, record in zip(names, records, strict=True):
        if gain := record["method"]["speedup"].get("none"):
            lines.setdefault(name, {})[record["cell"][DRAFT_LENGTH]] = gain
    swept = {name: gains for name, gains in lines.items() if sum(length != "auto" for length in gains) > 1}
    if not swept:
        return None
    longest = max(length for gains in swept.values() for length in gains if length != "auto")
    figure, ax = _plot(swept)
    for number, (name, gains) in enumerate(swept.items()):
        fixed = sorted(length for length in gains if length != "auto")
        style = list(STYLE["axes.prop_cycle"])[number % len(COLOURS)]
        values, errors = _values_and_errors([gains[length] for length in fixed])
        ax.errorbar(fixed, values, errors, label=_wrapped(name), capsize=2.5, elinewidth=1, **style)
        if "auto" in gains:
            values, errors = _values_and_errors([gains["auto"]])
            ax.errorbar([longest + 1.5], values, errors, capsize=2.5, elinewidth=1, **style | {"linestyle": ""})
    ticks = sorted({length for gains in swept.values() for length in gains if length != "auto"})
    auto = any("auto" in gains for gains in swept.values())
    ax.set_xticks([*ticks, *([longest + 1.5] if auto else [])], [*map(str, ticks), *(["auto"] if auto else [])])
    ax.axhline(1, color="black", linewidth=1, linestyle="--", marker="")
    ax.set(xlabel="draft length", ylabel="x plain", ylim=(0, None))
    figure.legend(loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Speed over plain decoding by draft length, with 95 % bootstrap intervals; the points at the right are auto."
    )
    return Picture("Speed by draft length", model, caption, f"Lines of {', '.join(swept)}", figure)


def _acceptance(model: str, records: Sequence[Record]) -> Picture | None:
    """Draw the share of accepted tokens by position in the draft, a line per cell; None: too few drafts.

    model: name of the model, the subject of the picture. records: the results of its cells.
    """
    names = labels([record["cell"] for record in records])
    found = {name: acceptance(record["method"]) for name, record in zip(names, records, strict=True)}
    drafted = {name: positions for name, positions in found.items() if positions}
    if not drafted:
        return None
    best = sorted(drafted, key=lambda name: -sum(share for share, _ in drafted[name]))[:MOST_LINES]
    figure, ax = _plot(best)
    for name in best:
        ax.plot(range(1, len(drafted[name]) + 1), [share for share, _ in drafted[name]], label=_wrapped(name))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(xlabel="position in the draft", ylabel="accepted", ylim=(0, 1.03))
    figure.legend(loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        f"Share of drafted tokens that were accepted, of the drafts that reach the position; positions that fewer than "
        f"{LEAST} drafts reach are left out. A table has the numbers."
    )
    if len(drafted) > len(best):
        caption += f" The {len(best)} of {len(drafted)} cells with the most accepted tokens."
    alt = "Accepted at the first position: " + ", ".join(f"{name}: {drafted[name][0][0]:.0%}" for name in best)
    return Picture("Acceptance by position", model, caption, alt, figure)


def _plot(names: Iterable[str]) -> tuple[Figure, Axes]:
    """Return a new figure and its axes, with space below for a legend of ``names``, which the caller adds."""
    lines = sum(1 + _wrapped(name).count("\n") for name in names)
    figure = Figure(figsize=(WIDTH, 2.2 + 0.17 * lines), layout="constrained")
    ax = figure.subplots()
    ax.grid(axis="y", linewidth=0.4)
    return figure, ax


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 2 * WRAP, break_on_hyphens=False)


def _points(text: str) -> float:
    """Return the width of the longest line of ``text`` in bold letters of the charts' size, in points."""
    font = FontProperties(size=STYLE["font.size"], weight="bold")
    lines = filter(None, text.split("\n"))
    return max((float(TextPath((0, 0), line, prop=font).get_extents().width) for line in lines), default=0.0)


def _quality(records: Sequence[Record]) -> Picture:
    """Draw quality against speed of lossy verifiers as points, with one panel per measure of quality.

    records: results of cells, each with figures of quality and a speedup over plain decoding.
    """
    groups: dict[str, list[Record]] = {}
    names = labels([record["cell"] | {"verifier_options": {}} for record in records])
    for name, record in sorted(
        zip(names, records, strict=True), key=lambda one: one[1]["method"]["speedup"]["none"]["value"]
    ):
        groups.setdefault(name, []).append(record)
    lines = sum(1 + _wrapped(name).count("\n") for name in groups)
    figure = Figure(figsize=(WIDTH, 2.5 * len(MEASURES) + 0.2 * lines + 0.3), layout="constrained")
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    for ax, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for name, group in groups.items():
            points = [record["method"] for record in group if record["method"]["quality"][measure]]
            xs, x_errors = _values_and_errors([method["speedup"]["none"] for method in points])
            ys, y_errors = _values_and_errors([method["quality"][measure] for method in points])
            ax.errorbar(xs, ys, y_errors, x_errors, ecolor="grey", label=_wrapped(name))
        ax.grid(linewidth=0.4)
        ax.set_title(title, loc="left")
    panels[-1].set_xlabel("speed, x plain decoding")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Quality of lossy rules against their speed: up is better, for NLL down; right is faster. A line joins "
        "cells that differ only in options of the rule. Grey crosses are 95 % intervals."
    )
    return Picture("Quality against speed", "", caption, f"Quality against speed of {'; '.join(groups)}", figure)


def _values_and_errors(estimates: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Return (values, [distances to the lower ends, distances to the upper ends]) of ``estimates``, for error bars.

    The distances are 0 for an estimate without an interval.
    """
    values = [estimate["value"] for estimate in estimates]
    bounds = [(e["value"], e["value"]) if e["low"] is None else (e["low"], e["high"]) for e in estimates]
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)]
    return values, [below, above]
