"""The report of a results folder: one self-contained HTML file.

Pictures are narrow enough for a phone and distinguishable without colour: drafters differ by hatch, marker and line
style, too. Needs matplotlib (the ``plot`` extra).
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from specdec import __version__
from specdec.base.files import write_atomically
from specdec.bench.results import (
    NAMES,
    Estimate,
    Record,
    Results,
    ResultTable,
    baselines,
    speedup_of,
)

PAGE = "report.html"  # also the name of the template
SECTIONS = {  # name: title, and the text if there is no picture
    "speedup": ("Speedup", "No cell was measured together with a baseline."),
    "acceptance": ("Acceptance by position", "Nothing was drafted."),
    "quality": (
        "Quality against speed",
        "No lossy verifier was measured, so no text differs from plain decoding.",
    ),
}
ENVIRONMENT = {
    "memory_gb": "memory (GB)",
    "load_average": "load average",
    "runtime_note": "about the runtime",
    "kv_cache": "KV cache",
    "activations": "activations",
}
WIDTH = 4.5  # inches; 9-point text stays readable at the width of a phone
MOST_BARS, MOST_LINES = 48, 8
INK, GREY, FAINT = "#1a1a1a", "#777777", "#d4d4d4"
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#8f8f8f", "#8c6d31")  # Okabe and Ito
# 11 hatches or markers and 8 colours: 88 different pairs.
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "---", "+++", "//..", "|||", "--..")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">")
LINES = ("-", "--", ":", "-.")
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
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a name with a dollar sign is a name
}


def write_page(results: Results, folder: Path) -> Path:
    """Write the page into ``folder``; return its path."""
    labels = {record["key"]: label for record, label in zip(results.records, results.labels(), strict=True)}
    page = Environment(loader=PackageLoader("specdec.bench", "."), autoescape=True).get_template(PAGE)
    text = page.render(
        results=results,
        facts=_facts(results, labels),
        sections=SECTIONS,
        pictures=draw_all(results.done, labels),
        encoded=lambda png: base64.b64encode(png).decode(),
        failures=ResultTable(["cell", "error"], [[labels[r["key"]], r["error"]] for r in results.failed]),
        environment=_environment(results.done),
        version=__version__,
    )
    write_atomically(folder / PAGE, text.encode(errors="backslashreplace"))
    return folder / PAGE


def _facts(results: Results, labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The most important figures: title, value, note."""
    done, failed = len(results.done), len(results.failed)
    counts = [f"{done} of {done + failed + results.missing} cells"]
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{results.missing} not run yet"] if results.missing else []
    facts = [("measured", ", ".join(counts), "")]
    gains = [(*gain, labels[record["key"]]) for record in results.done if (gain := speedup_of(record))]
    if gains:
        baseline, value, label = max(gains, key=lambda gain: gain[1]["value"])
        bounds = "unknown" if value["low"] is None else f"{value['low']:.2f} to {value['high']:.2f}"
        facts.append(("fastest", f"{value['value']:.2f} × {baseline}", f"{label}; 95\u00a0% interval {bounds}"))
    methods = [record["method"] for record in results.done]
    compared = [m["equal_to_plain"] for m in methods if m["lossless"] and m["equal_to_plain"]]
    if compared:
        total, equal, ties, faults = (sum(c[key] for c in compared) for key in ("of", "equal", "near_ties", "faults"))
        notes = [f"{ties} differ at a near-tie of the logits"] if ties else []
        notes += [f"{faults} FAULTS"] if faults else []
        note = ", ".join(notes) or "lossless rules"
        facts.append(("same text as plain decoding", f"{equal} of {total} outputs", note))
    models = ", ".join(dict.fromkeys(record["cell"]["model"] for record in results.records))
    about = results.done[0]["environment"] if results.done else {}
    machine = [about.get("dtype"), about.get("gpu") or about.get("cpu")]
    facts.append(("model", models, ", ".join(filter(None, machine))))
    return facts


def _environment(records: Sequence[Record]) -> ResultTable:
    """One row per fact, with all its values; more than two numbers or dates become a range."""
    facts: dict[str, list[Any]] = {}
    for record in records:
        for name, value in {**record["environment"], "prompts": _prompts(record["prompts"])}.items():
            if value not in (None, "", *facts.setdefault(name, [])):
                facts[name].append(value)
    rows = []
    for name, values in facts.items():
        text = "; ".join(map(str, values))
        if len(values) > 2 and (name == "date" or all(isinstance(value, int | float) for value in values)):
            text = f"{min(values)} to {max(values)}"
        rows += [[ENVIRONMENT.get(name, name), text]] if values else []
    return ResultTable(["fact", "value"], rows)


def _prompts(about: Mapping[str, Any]) -> str:
    skipped, sha256 = len(about["skipped"]), about.get("sha256")
    parts = [f"{about['name']}: {about['conversations']} conversations", f"{about['turns']} turns"]
    parts += [f"{skipped} skipped"] if skipped else []
    parts += [f"sha256 {sha256[:12]}"] if sha256 else []
    return ", ".join(parts) + (f" ({about['licence']})" if about.get("licence") else "")


# Pictures.


@dataclass(frozen=True)
class Picture:
    """A PNG picture. caption, alt: texts for the page."""

    title: str
    caption: str
    alt: str
    png: bytes


def draw_all(records: Sequence[Record], labels: Mapping[str, str]) -> dict[str, list[Picture]]:
    """The pictures of records without errors, by section. labels: names of cells by key."""
    over = baselines(records)
    with rc_context(STYLE):
        return {
            "speedup": [picture for name in over for picture in _speedup(records, name, labels)],
            "acceptance": list(_acceptance(records, labels)),
            "quality": [picture for name in over[:1] for picture in _quality(records, name)],
        }


def bar_style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}


def line_style(number: int) -> dict[str, Any]:
    style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number % len(LINES)]}
    return style | {"color": COLOURS[number % len(COLOURS)], "markeredgecolor": INK, "markeredgewidth": 0.7}


def _speedup(records: Sequence[Record], baseline: str, labels: Mapping[str, str]) -> Iterator[Picture]:
    """Horizontal bars with 95 % intervals."""
    chosen = _best(_measured(records, baseline), lambda r: _gain(r, baseline)["value"], MOST_BARS)
    if not chosen:
        return
    drafters = _drafters(records)
    names = [textwrap.fill(_short(labels[record["key"]], 72), 26) for record in chosen]
    lines = sum(max(1.0, 0.8 * (1 + name.count("\n"))) for name in names)
    figure = Figure(figsize=(WIDTH, 0.9 + 0.27 * lines), layout="constrained")
    ax = figure.subplots()
    for y, record in enumerate(chosen):
        (value,), errors = _values_and_errors([_gain(record, baseline)])
        style = bar_style(drafters.index(record["cell"]["drafter"]))
        bar = ax.barh(y, value, 0.72, xerr=errors, edgecolor=INK, error_kw={"linewidth": 1.6, "capsize": 4}, **style)
        ax.bar_label(bar, [f"{value:.2f}"], padding=4)
    ax.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
    ax.set_yticks(range(len(chosen)), names)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(chosen) - 0.4, -0.6)
    ax.margins(x=0.12)
    ax.set_xlabel(f"seconds per token of {_name(baseline)} / ours")
    caption = (
        f"Speed over {_name(baseline)}, measured beside it prompt by prompt, prefill included. Bars are medians, the "
        "lines on them 95 % bootstrap intervals; the dashed line is equal speed. "
        f"At most {MOST_BARS} cells are drawn, each drafter's best first."
    )
    best = max(_gain(record, baseline)["value"] for record in chosen)
    alt = f"Bars of {len(chosen)} cells; the longest is {best:.2f} x"
    yield _picture(figure, f"Over {_name(baseline)}", caption, alt)


def _acceptance(records: Sequence[Record], labels: Mapping[str, str]) -> Iterator[Picture]:
    """Lines: share of accepted tokens by position in the draft."""
    drafted = [r for r in records if r["method"].get("acceptance_per_position")]
    chosen = _best(drafted, lambda r: r["method"]["mean_acceptance_length"]["value"], MOST_LINES)
    if not chosen:
        return
    shares = {labels[r["key"]]: r["method"]["acceptance_per_position"] for r in chosen}
    figure = Figure(figsize=(WIDTH, 3.0 + 0.2 * len(chosen)), layout="constrained")
    ax = figure.subplots()
    for number, (name, values) in enumerate(shares.items()):
        ax.plot(range(1, len(values) + 1), values, label=name, **line_style(number))
    longest = max(map(len, shares.values()))
    ax.set_xticks(range(1, longest + 1, 1 + longest // 13))
    ax.set_ylim(0, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="y", color=FAINT, linewidth=0.6)
    ax.set_xlabel("position in the draft")
    ax.set_ylabel("accepted")
    figure.legend(loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Share of accepted tokens at each position, over the drafts that reach it. "
        f"At most {MOST_LINES} cells are drawn, each drafter's best first."
    )
    alt = "Accepted at the first position: " + ", ".join(f"{name}: {v[0]:.0%}" for name, v in shares.items())
    yield _picture(figure, "", caption, alt)


def _quality(records: Sequence[Record], baseline: str) -> Iterator[Picture]:
    """Points: quality against speed of lossy rules, one panel per measure."""
    rated = [r for r in _measured(records, baseline) if r["method"].get("quality")]
    if all(r["method"]["lossless"] for r in rated):
        return
    rated.sort(key=lambda r: _gain(r, baseline)["value"])
    groups: dict[str, list[Record]] = {}
    for record in rated:
        groups.setdefault(f"{record['cell']['drafter']}, {record['cell']['verifier']}", []).append(record)
    figure = Figure(figsize=(WIDTH, 2.5 * len(MEASURES) + 0.2 * len(groups) + 0.3), layout="constrained")
    panels = figure.subplots(len(MEASURES), 1, sharex=True)
    for ax, (measure, title) in zip(panels, MEASURES.items(), strict=True):
        for number, (name, group) in enumerate(groups.items()):
            points = [r for r in group if r["method"]["quality"].get(measure)]
            xs, x_errors = _values_and_errors([_gain(r, baseline) for r in points])
            ys, y_errors = _values_and_errors([r["method"]["quality"][measure] for r in points])
            ax.errorbar(xs, ys, y_errors, x_errors, ecolor=GREY, label=name, **line_style(number))
        ax.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
        ax.grid(color=FAINT, linewidth=0.4)
        ax.set_title(title, loc="left")
    panels[-1].set_xlabel(f"speed, x {_name(baseline)}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, handlelength=3.5)
    caption = (
        "Quality of lossy rules against their speed: up is better, for NLL down; right is faster. A line joins the "
        "settings of one drafter and rule. Grey crosses are 95 % intervals."
    )
    yield _picture(figure, "", caption, f"Quality against speed of {'; '.join(groups)}")


def _drafters(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["cell"]["drafter"] for record in records))


def _gain(record: Record, baseline: str) -> Estimate:
    found: Estimate = record["method"]["speedup"][baseline]
    return found


def _measured(records: Sequence[Record], baseline: str) -> list[Record]:
    """The records that have a speedup over the baseline."""
    return [r for r in records if r["method"]["speedup"].get(baseline) and r["cell"]["drafter"] != baseline]


def _best(records: Sequence[Record], value: Callable[[Record], float], most: int) -> list[Record]:
    """At most ``most`` records, each drafter's best first, in the given order."""
    ranked = sorted(records, key=value, reverse=True)
    first = list({record["cell"]["drafter"]: record for record in reversed(ranked)}.values())
    kept = [*first, *(record for record in ranked if record not in first)][:most]
    return [record for record in records if record in kept]


def _values_and_errors(estimates: Sequence[Estimate]) -> tuple[list[float], list[list[float]]]:
    """Values, and the distances to the lower and upper ends of their intervals; 0 without an interval."""
    values = [e["value"] for e in estimates]
    below = [0.0 if e["low"] is None else max(e["value"] - e["low"], 0.0) for e in estimates]
    above = [0.0 if e["high"] is None else max(e["high"] - e["value"], 0.0) for e in estimates]
    return values, [below, above]


def _name(baseline: str) -> str:
    return {"none": "plain decoding"}.get(baseline, NAMES.get(baseline, baseline))


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _picture(figure: Figure, title: str, caption: str, alt: str) -> Picture:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    return Picture(title, caption, alt, data.getvalue())
