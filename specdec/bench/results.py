"""The results of a benchmark as tables and as text.

A record is the result of one cell (``specdec.bench.cell`` describes it), or {"key", "cell", "error", "seconds"} for a
cell that failed.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically
from specdec.bench.cell import DRAFT_LENGTH, GROUPS, as_yaml, method_label, short_name
from specdec.bench.store import Store

LEAST = 30  # drafts that reach a position, from which its acceptance is shown
LATEX = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "\n": " "}
    | {c: f"\\{c}" for c in "&%$#_{}"}
)
NAMES = {"none": "plain", "hf": "model.generate"}  # of baselines, in tables
Record = Mapping[str, Any]
Estimate = Mapping[str, Any]  # {"value", "low", "high"}; the bounds may be None


# Differences of cells (``Cell.as_dict()``).


def labels(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label for each cell (``Cell.as_dict()``), such as ``m2r2@4 tokens=64``.

    A label is ``method_label`` and the other settings in which the cells of the same drafter differ.
    """
    drafters = {cell["drafter"] for cell in cells}
    differing = {name: other_axes([cell for cell in cells if cell["drafter"] == name]) for name in drafters}
    return [
        " ".join(
            [
                method_label(cell),
                *(f"{short_name(name)}={as_yaml(cell.get(name))}" for name in differing[cell["drafter"]]),
            ]
        )
        for cell in cells
    ]


def other_axes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings in which these cells (``Cell.as_dict()``) differ and which ``method_label`` does not show."""
    settings = [name for name in cells[0] if name != DRAFT_LENGTH and not name.startswith(GROUPS)]
    return [name for name in settings if any(cell.get(name) != cells[0][name] for cell in cells)]


# Tables.


@dataclass(frozen=True)
class ResultTable:
    """A table: its title, its column names (``header``), and its rows, each with a text per column."""

    title: str
    header: list[str]
    rows: list[list[str]]


def make_table(title: str, rows: Sequence[Mapping[str, str]]) -> ResultTable:
    """Make a table called ``title`` of rows {column: text}.

    Columns that are empty in all rows are left out; the column "error" is the last.
    """
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "error")
    used = [name for name in names if any(row.get(name) for row in rows)]
    return ResultTable(title, used, [[row.get(name, "") for name in used] for row in rows])


@dataclass(frozen=True)
class Results:
    """The results of one benchmark.

    name, description: those of the plan. commands: the command lines that measured it.
    records: one per cell that has run, in the order of the plan; ``done`` and ``failed`` are those without and with an
    error. missing: number of cells that have not run.
    settings: the plan's settings as YAML.
    prompts: name of each prompt set -> its conversations, {"id", "category", "turns"}.
    """

    name: str
    description: str
    commands: Sequence[str]
    records: Sequence[Record]
    missing: int = 0
    settings: str = ""
    prompts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if "error" not in record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if "error" in record]

    def faults(self) -> list[str]:
        """Return what has outputs that must equal those of plain decoding and do not, as ``m2r2@4 (1 of 12)``."""
        found = []
        for label, record in zip(labels([record["cell"] for record in self.done]), self.done, strict=True):
            equal = record["method"]["equal_to_plain"] or {}
            if equal.get("faults"):
                found.append(f"{label} ({equal['faults']} of {equal['of']})")
        return found

    def table(self) -> ResultTable:
        """Return the main table: a row per cell with its most important figures or its error."""
        rows = []
        for label, record in zip(labels([record["cell"] for record in self.records]), self.records, strict=True):
            figures = {"error": record["error"]} if "error" in record else _figures(record["method"])
            rows.append({"cell": label} | figures)
        return make_table("All cells", rows)

    def tables(self) -> list[ResultTable]:
        """Return the main table and, of the cells that did not fail, those of ``TABLES`` and of the costs of passes."""
        names = labels([record["cell"] for record in self.done])
        methods = list(zip(names, (record["method"] for record in self.done), strict=True))
        tables = [
            make_table(title, [{first: name} | figures(method) for name, method in methods])
            for title, (first, figures) in TABLES.items()
        ]
        return [self.table(), *(table for table in [*tables, self._passes()] if table.rows and len(table.header) > 1)]

    def _passes(self) -> ResultTable:
        """Return a table of the milliseconds of forward passes over 1, 2, 4, ... tokens, and their ratio to one token.

        It has a row for each model, way of loading and engine.
        """
        found = dict[tuple[str, ...], dict[str, str]]()
        for record in self.done:
            cell, about = record["cell"], record["environment"]
            for engine, costs in record["pass_ms"].items():
                key = (cell["model"], about["runtime"], about["dtype"], cell.get("weights", "auto"), engine)
                one = costs.get("1") or 1.0
                shown = {f"{n} tokens": f"{ms:.1f} ({ms / one:.2f} x)" for n, ms in costs.items()}
                found.setdefault(key, {"ms of a pass over": " ".join(key)} | shown)
        return make_table("Costs of passes", list(found.values()))

    def notes(self) -> list[str]:
        """Return lines of text: counts of cells, settings, load averages, engines, and skipped prompts."""
        lines = [f"{len(self.done)} of {len(self.records) + self.missing} cells"]
        lines[0] += f", {len(self.failed)} failed" * bool(self.failed)
        lines[0] += f", {self.missing} not run yet" * bool(self.missing)
        for record in self.done:
            lines += _settings(record)
            failed = record.get("failed_baselines", {})  # older results lack it
            lines += [f"{NAMES.get(name, name)} failed: {error}" for name, error in failed.items()]
            if stopped := record.get("stopped"):
                lines.append(f"cut short: {stopped}")
        if loads := [load for record in self.done if (load := record["environment"].get("load_average")) is not None]:
            lines.append(f"load average of the machine when a group began: {min(loads)} to {max(loads)}")
        for method in (method for record in self.done for method in (record["method"], *record["baselines"].values())):
            if method["engine"]:
                about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in method["engine"].items())
                lines.append(f"{method['name']}: {about.removeprefix('version ')}")
        lines += [f"skipped {what}" for record in self.done for what in record["prompts"]["skipped"]]
        return list(dict.fromkeys(lines))


def _settings(record: Record) -> list[str]:
    """Return three lines of text: the model and the machine; versions; the prompts and how they were answered.

    record: the result of one cell.
    """
    cell, about, prompts = (record[key] for key in ("cell", "environment", "prompts"))
    skipped = f", {len(prompts['skipped'])} skipped" if prompts["skipped"] else ""
    licence = f" ({prompts['licence']})" if prompts["licence"] else ""
    formats = {"activations": "activations", "kv_cache": "KV cache"}
    held = "".join(f", {name} in {about[key]}" for key, name in formats.items() if about[key] != "as computed")
    times = f"{cell['repetitions']} repetition{'s' * (cell['repetitions'] > 1)}"
    how = "greedy" if cell["temperature"] == 0 else f"temperature {cell['temperature']:g}"
    names = "specdec", "commit", "torch", "transformers", "python", "system"
    versions = [f"{name} {about[name]}" for name in names if about[name] is not None]
    return [
        f"{cell['model']}, {about['dtype']}, {about['runtime']} runtime on {about['device']}{held}, "
        f"{about['threads']} threads, {about['gpu'] if about['device'].startswith('cuda') else about['cpu']}",
        ", ".join(versions),
        f"{prompts['conversations']} conversations of {prompts['name']}{licence}, sha256 {prompts['sha256'][:12]}"
        f"{skipped}, {how}, at most "
        f"{cell['max_new_tokens']} tokens, batch of {cell['batch_size']}, {times}, "
        f"{record['seconds']:.0f} s{' (interrupted)' if record['interrupted'] else ''}",
    ]


def _figures(method: Mapping[str, Any]) -> dict[str, str]:
    """Return a row {column: text} of the main table. method: the figures of a method, as ``summarize`` returns them."""
    rate, first, quality = method["acceptance_rate"], method["first_token_ms"], method["quality"] or {}
    return {
        "tok/s": interval(method["tokens_per_second"], ".1f"),
        **{f"x {NAMES.get(name, name)}": interval(speedup) for name, speedup in method["speedup"].items()},
        "acceptance length": interval(method["mean_acceptance_length"]),
        "accepted": "" if rate is None else f"{rate:.0%}",
        "first token": "" if first is None else f"{first['value']:.0f} ms",
        "equal to plain": equality(method),
        "agreement": interval(quality.get("agreement"), ".3f"),
        "NLL": interval(quality.get("nll"), ".3f"),
        "ROUGE-L": interval(quality.get("rouge_l"), ".3f"),
        "layers/token": interval(method["mean_layers_per_token"], ".1f") if quality else "",
    }


def _by_category(method: Mapping[str, Any]) -> dict[str, str]:
    named = {kind: figures for kind, figures in method["categories"].items() if kind}
    return {kind: _over_plain(figures) for kind, figures in (named | {"all": method}).items()}


def _over_plain(figures: Mapping[str, Any]) -> str:
    """Return the speedup over plain decoding and that of the worst prompt, such as ``2.10 (1.05)``; "" without one.

    figures: those of a method, or of one category of prompts (``figures.summarize``). Only its mappings "speedup" and
        "worst" are read, at the key "none", which stands for plain decoding.
    """
    speedup = figures["speedup"].get("none")
    return f"{speedup['value']:.2f} ({figures['worst']['none']:.2f})" if speedup else ""


def _phases(method: Mapping[str, Any]) -> dict[str, str]:
    prefill, decode, memory = (method[name] for name in ("prefill_ms", "decode_ms_per_token", "peak_memory_mb"))
    return {
        "prefill ms": f"{prefill['value']:.0f}" if prefill else "",
        "decode ms/token": f"{decode['value']:.1f}" if decode else "",
        **{f"{phase} ms/step": f"{spent:.1f}" for phase, spent in method["phase_ms_per_step"].items()},
        "MB": "" if memory is None else f"{memory:.0f}",
    }


def _percentiles(method: Mapping[str, Any]) -> dict[str, str]:
    columns = {"token": "P50, P99: ms/token", "first_token": "ms to first token", "step": "ms/step"}
    found = {column: method["latency_ms"][what] for what, column in columns.items()}
    return {column: f"{one['p50']:.1f}, {one['p99']:.1f}" if one else "" for column, one in found.items()}


def acceptance(method: Mapping[str, Any]) -> list[tuple[float, int]]:
    """Return (share, number of drafts) for each position in a draft that at least ``LEAST`` drafts reach.

    The share is that of the drafts in which this token and all tokens before it were accepted, among the drafts that
    are long enough to have this position; it is not conditional on the tokens before being accepted. The number is how
    many such drafts there were.

    method: the figures of a method. Older results lack the numbers of drafts: all positions are then returned, with
        ``LEAST`` in place of the number.
    """
    shares = method["acceptance_per_position"]
    counts = method.get("drafts_per_position") or [LEAST] * len(shares)
    return [(share, count) for share, count in zip(shares, counts, strict=True) if count >= LEAST]


def _positions(method: Mapping[str, Any]) -> dict[str, str]:
    found = enumerate(acceptance(method), start=1)
    return {str(position): f"{share:.2f} of {count}" for position, (share, count) in found}


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, str]]]] = {  # title -> (first column, figures)
    "Speed by category": ("x plain (the worst prompt)", _by_category),
    "Acceptance by position": ("accepted at position", _positions),
    "Time by phase": ("method", _phases),
    "Latency": ("method", _percentiles),
}


def load_results(folder: Path) -> Results:
    """Read the results in the output folder of a benchmark. Raises SpecDecError if it holds none."""
    store = Store(folder)
    if not store.manifest.is_file():
        raise SpecDecError(f"there are no results in '{folder}'; give the output folder of a benchmark")
    manifest, found = store.read_manifest(), store.records()
    ordered = [found[key] for key in manifest["cells"] if key in found]
    if not ordered:
        raise SpecDecError(f"'{folder}' holds no results yet: no cell has ended")
    name, description, settings = (str(manifest.get(key, "")) for key in ("name", "description", "settings"))
    commands = manifest.get("commands") or [str(manifest.get("command", ""))]
    missing = len(manifest["cells"]) - len(ordered)
    return Results(name, description, commands, ordered, missing, settings, manifest.get("prompts", {}))


# Display.


def outcome(record: Record) -> str:
    """Return the result in ``record`` in a few words: its error, or its tokens per second and its first speedup."""
    if "error" in record:
        return f"failed: {record['error']}"
    method = record["method"]
    rate = method["tokens_per_second"]
    what = f"{rate['value']:.1f} tok/s" if rate else "nothing to time"
    gains = [f", {gain['value']:.2f} x {NAMES.get(name, name)}" for name, gain in method["speedup"].items() if gain]
    return what + "".join(gains[:1])


def interval(estimate: Estimate | None, form: str = ".2f") -> str:
    """Return an estimate with its interval as text, such as ``2.41 [2.30–2.55]``; "" for None.

    form: format of each number.
    """
    if estimate is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:{form}}"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}–{estimate['high']:{form}}]"


def equality(method: Mapping[str, Any]) -> str:
    """Return how many outputs equal plain decoding as text, such as ``11 of 12 (1 near-tie)``.

    It is ``sampled`` if none could be compared.

    method: the figures of a method, as ``figures.summarize`` returns them.
    """
    found = method["equal_to_plain"]
    if not found:
        return "sampled"
    notes = [f"{found[key]} {name}" for key, name in (("near_ties", "near-tie"), ("faults", "FAULT")) if found[key]]
    notes += [] if method["lossless"] else ["lossy"]
    return f"{found['equal']} of {found['of']}" + (f" ({', '.join(notes)})" if notes else "")


# Export.


def as_markdown(results: Results) -> str:
    """Return the name, the notes and all tables of ``results`` as Markdown."""
    parts = [f"# {results.name}\n", f"{results.description}\n" if results.description else ""]
    parts += ["".join(f"- {line}\n" for line in results.notes()), *map(_markdown, results.tables())]
    return "\n".join(filter(None, parts))


def as_latex(results: Results) -> str:
    """Return all tables of ``results`` as LaTeX, for the package booktabs."""
    return "\n".join(map(_latex, results.tables()))


def write_csv(results: Results, folder: Path) -> list[Path]:
    """Write each table of ``results`` as a CSV file, named after its title, into ``folder``; return the paths."""
    paths = []
    for table in results.tables():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
        paths.append(folder / f"{table.title.lower().replace(' ', '-')}.csv")
        write_atomically(paths[-1], text.getvalue().encode(errors="backslashreplace"))
    return paths


def _latex(table: ResultTable) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(LATEX) for cell in cells) + " \\\\\n"

    body = "".join(map(line, table.rows))
    columns = "l" + "r" * (len(table.header) - 1)
    begin = f"% {table.title}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
    return f"{begin}{line(table.header)}\\midrule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def _markdown(table: ResultTable) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.header) + "|" + "---|" * len(table.header) + "\n" + "".join(map(line, table.rows))
