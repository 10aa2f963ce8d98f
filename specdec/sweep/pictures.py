"""The pictures of a report, as matplotlib figures: narrow enough for a telephone, distinguishable without colour.

Drafters differ by hatch, marker and line style first, by colour second. Every function returns None where there is
nothing to draw. Needs matplotlib (the ``plot`` extra).
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from specdec.sweep import axes
from specdec.sweep.results import NAMES, Record, baselines

WIDTH = 4.5  # inches; at a telephone's width, text of 9 points stays readable
MOST_BARS, MOST_LINES = 48, 8
LONGEST_NAME = 60  # characters of a drafter's name in a file's
INK, GREY, FAINT = "#1a1a1a", "#777777", "#d4d4d4"
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#8f8f8f", "#8c6d31")  # Okabe and Ito
# Eleven of each beside eight colours: 88 pairs before one comes again.
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "+++", "//..", "|||", "--..")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">")
LINES = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a name with a dollar sign is a name
}


@dataclass(frozen=True)
class Picture:
    """name: of the file. caption: what is seen, for the page. alt: the same in figures, for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes


class Styles:
    """One bar for each drafter and one name for each cell, the same in every picture; lines go by number."""

    def __init__(self, records: Sequence[Record], labels: Mapping[str, str]) -> None:
        self.order = list(dict.fromkeys(record["cell"]["drafter"] for record in records))
        self.labels = labels

    def names(self, records: Sequence[Record]) -> list[str]:
        return [self.labels[record["key"]] for record in records]

    def bar(self, record: Record) -> dict[str, Any]:
        n = self.order.index(record["cell"]["drafter"])
        return {"color": COLOURS[n % len(COLOURS)], "hatch": HATCHES[n % len(HATCHES)], "edgecolor": INK}


def _line(number: int) -> dict[str, Any]:
    """The style of a line with markers."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.7}
    return {"color": colour, "marker": marker, "linestyle": LINES[number % len(LINES)], "markersize": 6} | edge


def draw_all(records: Sequence[Record], labels: Mapping[str, str]) -> dict[str, list[Picture]]:
    """The pictures of these records (of cells that did not fail), by section. labels: names of cells by key."""
    styles = Styles(records, labels)
    with rc_context(STYLE):
        return {
            "speedup": _some([_speedup(records, name, styles) for name in baselines(records)]),
            "acceptance": _some([_acceptance(records, styles)]),
            "quality": _some([_quality(records, styles)]),
            "heat": _some(_heat_maps(records)),
        }


def _some(pictures: Sequence[Picture | None]) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _speedup(records: Sequence[Record], baseline: str, styles: Styles) -> Picture | None:
    """Horizontal bars with 95 % intervals."""
    chosen = [r for r in records if r["method"]["speedup"].get(baseline) and r["cell"]["drafter"] != baseline]
    if not chosen:
        return None
    cut = len(chosen) > MOST_BARS
    if cut:
        chosen = sorted(chosen, key=lambda r: -r["method"]["speedup"][baseline]["value"])[:MOST_BARS]
    names = styles.names(chosen)
    ticks = [textwrap.fill(_short(name, 72), 26) for name in names]
    lines = sum(max(1.0, 0.8 * (1 + tick.count("\n"))) for tick in ticks)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * lines), layout="constrained")
    ax = figure.subplots()
    for y, record in enumerate(chosen):
        value, low, high = _bounds(record["method"]["speedup"][baseline])
        ax.barh(y, value, height=0.72, linewidth=0.8, **styles.bar(record))
        ax.plot([low, high], [y, y], color=INK, linewidth=1.6, marker="|", markersize=8)
        place, white = (max(value, high), y), {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.annotate(f"{value:.2f}", place, (5, 0), textcoords="offset points", va="center", bbox=white, zorder=3)
    ax.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    ax.set_yticks(range(len(chosen)), ticks)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(chosen) - 0.4, -0.6)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.08)
    ax.set_xlabel(f"seconds per token of {_name(baseline)} / ours")
    best = max(chosen, key=lambda r: r["method"]["speedup"][baseline]["value"])
    caption = (
        f"Speed over {_name(baseline)}, measured beside it prompt by prompt, prefill included. Bars are medians, the "
        "lines on them 95 % bootstrap intervals; the dashed line is equal speed."
    )
    if cut:
        caption += f" Only the fastest {MOST_BARS} are drawn."
    alt = f"Bars of {len(chosen)} cells; the fastest is {names[chosen.index(best)]} with " + _words(
        best["method"]["speedup"][baseline]
    )
    return _picture(figure, f"speedup-over-{_file(baseline)}", f"Over {_name(baseline)}", caption, alt)


def _acceptance(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Lines: the share of drafts that deep whose token was accepted, by position."""
    chosen = [r for r in records if r["method"].get("acceptance_per_position")]
    if not chosen:
        return None
    cut = len(chosen) > MOST_LINES
    if cut:  # the best of each drafter first
        ranked = sorted(chosen, key=lambda r: -r["method"]["mean_acceptance_length"]["value"])
        first = {r["cell"]["drafter"]: r for r in reversed(ranked)}
        rest = [r for r in ranked if r not in first.values()]
        keep = [*first.values(), *rest][:MOST_LINES]
        chosen = [r for r in chosen if r in keep]
    names = styles.names(chosen)
    figure = Figure(figsize=(WIDTH, 3.0 + 0.2 * len(chosen)), layout="constrained")
    ax = figure.subplots()
    for number, (record, name) in enumerate(zip(chosen, names, strict=True)):
        shares = record["method"]["acceptance_per_position"]
        ax.plot(range(1, len(shares) + 1), shares, linewidth=1.5, label=name, **_line(number))
    longest = max(len(r["method"]["acceptance_per_position"]) for r in chosen)
    ax.set_xticks(range(1, longest + 1, 1 + longest // 13))
    ax.set_ylim(0, 1.03)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_xlabel("position in the draft")
    ax.set_ylabel("accepted")
    figure.legend(loc="outside lower left", frameon=False, ncols=1, handlelength=3.5)
    caption = "Of the drafts that reached a position, the share whose token there was accepted."
    if cut:
        caption += f" Only {MOST_LINES} cells are drawn, each drafter's best first."
    firsts = ", ".join(
        f"{name}: {r['method']['acceptance_per_position'][0]:.0%}" for r, name in zip(chosen, names, strict=True)
    )
    return _picture(figure, "acceptance", "", caption, f"Accepted at the first position: {firsts}")


def _quality(records: Sequence[Record], styles: Styles) -> Picture | None:
    """Points: what a lossy rule gives up against what it gains, one panel for each measure of quality."""
    chosen = [r for r in records if r["method"].get("quality") and baselines([r])]
    measures = {
        "agreement": "agreement with the full model",
        "rouge_l": "ROUGE-L against its output",
        "nll": "NLL per token under it",
    }
    measures = {key: name for key, name in measures.items() if any(r["method"]["quality"].get(key) for r in chosen)}
    if not chosen or not measures or all(r["method"]["lossless"] for r in chosen):
        return None
    baseline = baselines(chosen)[0]
    chosen = [r for r in chosen if r["method"]["speedup"].get(baseline)]
    groups: dict[str, list[Record]] = {}
    for record in chosen:
        cell = record["cell"]
        groups.setdefault(f"{cell['drafter']}, {cell['verifier']}", []).append(record)
    figure = Figure(figsize=(WIDTH, 2.5 * len(measures) + 0.2 * len(groups) + 0.3), layout="constrained")
    panels = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (key, title) in zip(panels, measures.items(), strict=True):
        for number, (name, group) in enumerate(groups.items()):
            points = sorted(
                (_bounds(r["method"]["speedup"][baseline]), _bounds(r["method"]["quality"][key]))
                for r in group
                if r["method"]["quality"].get(key)
            )
            if not points:
                continue
            for x, y in points:
                ax.plot([x[1], x[2]], [y[0], y[0]], color=GREY, linewidth=1.3, zorder=1.5)
                ax.plot([x[0], x[0]], [y[1], y[2]], color=GREY, linewidth=1.3, zorder=1.5)
            xs, ys = [x[0] for x, _ in points], [y[0] for _, y in points]
            ax.plot(xs, ys, linewidth=1.1, label=name, **_line(number))
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        ax.grid(color=FAINT, linewidth=0.4)
        ax.set_title(title, loc="left")
    panels[-1].set_xlabel(f"speed, x {_name(baseline)}")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "What a rule that may change the output gives up (down, or for NLL up) for what it gains (to the right); a "
        "line joins the settings of one drafter and rule. Grey crosses are 95 % intervals."
    )
    spans = "; ".join(
        f"{name}: {min(v):.2f} to {max(v):.2f}"
        for name, group in groups.items()
        if (
            v := [
                r["method"]["quality"]["agreement"]["value"] for r in group if r["method"]["quality"].get("agreement")
            ]
        )
    )
    return _picture(figure, "quality", "", caption, f"Agreement with the full model: {spans}")


def _heat_maps(records: Sequence[Record]) -> list[Picture | None]:
    """Speedups over two swept axes: of all cells (drafter and the widest setting), and of each drafter's own."""
    over = baselines(records)
    if not over:
        return []
    chosen = [r for r in records if r["method"]["speedup"].get(over[0]) and r["cell"]["drafter"] not in over[:1]]
    settings = [name for name in axes.varying([r["cell"] for r in chosen]) if "." not in name and name != "drafter"]
    out = []
    drafters = list(dict.fromkeys(r["cell"]["drafter"] for r in chosen))
    widest = max(settings, key=lambda name: len(_values(chosen, name)), default=None)
    if widest and len(drafters) > 1:
        out.append(_heat(chosen, over[0], "drafter", widest, "heat-drafters", ""))
    for drafter in drafters:
        own = [r for r in chosen if r["cell"]["drafter"] == drafter]
        differing = axes.varying([r["cell"] for r in own])
        pair = sorted(differing, key=lambda name: -len(_values(own, name)))[:2]
        if len(pair) == 2 and min(len(_values(own, name)) for name in pair) > 1:
            out.append(_heat(own, over[0], pair[0], pair[1], f"heat-{_file(drafter)}", drafter))
    return out


def _heat(records: Sequence[Record], baseline: str, down: str, across: str, name: str, of: str) -> Picture | None:
    rows, columns = _values(records, down), _values(records, across)
    found: dict[tuple[int, int], list[float]] = {}
    for record in records:
        point = axes.values(record["cell"])
        if down in point and across in point:
            place = rows.index(point[down]), columns.index(point[across])
            found.setdefault(place, []).append(record["method"]["speedup"][baseline]["value"])
    if len(found) < 3:
        return None
    figure = Figure(figsize=(WIDTH, 1.0 + 0.34 * len(rows)), layout="constrained")
    ax = figure.subplots()
    grid = {place: median(values) for place, values in found.items()}
    low, high = min(grid.values()), max(grid.values())
    shade = colormaps["Blues"]  # light to dark: the same order in grey
    for (y, x), value in grid.items():
        depth = 0.08 + 0.8 * ((value - low) / (high - low) if high > low else 0.5)
        ax.fill([x - 0.5, x + 0.5, x + 0.5, x - 0.5], [y - 0.5, y - 0.5, y + 0.5, y + 0.5], color=shade(depth))
        ink, weight = "white" if depth > 0.55 else INK, "bold" if value == high else "normal"
        ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontweight=weight)
    ax.set_xticks(range(len(columns)), [_short(axes.flow(v), 16) or "default" for v in columns])
    ax.set_yticks(range(len(rows)), [_short(axes.flow(v)) or "default" for v in rows])
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xlabel(axes.short(across))
    ax.set_ylabel(axes.short(down))
    caption = f"Speed over {_name(baseline)}; darker is faster, the fastest in bold."
    if any(len(values) > 1 for values in found.values()):
        caption += " Where several cells share a field, it is their median."
    place = max(grid, key=lambda place: grid[place])
    alt = (
        f"{len(grid)} fields; the fastest is {axes.short(down)} {axes.flow(rows[place[0]])}, "
        f"{axes.short(across)} {axes.flow(columns[place[1]])} with {grid[place]:.2f} x"
    )
    return _picture(figure, name, of or f"{axes.short(down)} and {axes.short(across)}", caption, alt)


def _values(records: Sequence[Record], axis: str) -> list[Any]:
    """The values of an axis among these records; numbers in order, the rest as they come."""
    taken: list[Any] = []
    for record in records:
        point = axes.values(record["cell"])
        if axis in point and point[axis] not in taken:
            taken.append(point[axis])
    if all(isinstance(value, int | float) for value in taken):
        return sorted(taken)
    return taken


def _bounds(estimate: Mapping[str, Any]) -> tuple[float, float, float]:
    value = estimate["value"]
    low, high = estimate.get("low"), estimate.get("high")
    return value, value if low is None else low, value if high is None else high


def _words(estimate: Mapping[str, Any]) -> str:
    value, low, high = _bounds(estimate)
    return f"{value:.2f} x (95 % interval {low:.2f} to {high:.2f})"


def _name(baseline: str) -> str:
    return {"none": "plain decoding"}.get(baseline, NAMES.get(baseline, baseline))


def _file(name: str) -> str:
    """``name`` as part of a file's name; one that is changed for it gets a mark, so that no two become one."""
    safe = re.sub(r"[^A-Za-z0-9+-]", "-", name)[:LONGEST_NAME]
    mark = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:6]
    return safe if safe == name else f"{safe}-{mark}"


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _picture(figure: Figure, name: str, title: str, caption: str, alt: str) -> Picture:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    return Picture(name, title, caption, alt, data.getvalue())
