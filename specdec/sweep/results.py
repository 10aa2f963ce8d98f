"""What a folder of results holds, whoever wrote it (``specdec sweep`` or ``specdec bench``), as tables and as text.

A record is what ``specdec.bench.cell`` describes, or {"key", "cell", "error"}. Knows no pictures and no HTML.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.bench.cell import Cell
from specdec.bench.show import estimate
from specdec.errors import SpecDecError
from specdec.sweep import axes
from specdec.sweep.store import MANIFEST, Store

BENCH = "bench.json"
NAMES = {"none": "plain", "hf": "model.generate"}  # of baselines, for people
Record = Mapping[str, Any]
Estimate = Mapping[str, Any]  # {"value", "low", "high"}; the bounds may be None


@dataclass(frozen=True)
class Results:
    """A folder's records in the order of the plan. missing: cells that have not run."""

    name: str
    description: str
    command: str
    records: Sequence[Record]
    missing: int = 0

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if "error" not in record]

    @property
    def failed(self) -> list[Record]:
        return [record for record in self.records if "error" in record]


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)


def load_results(folder: Path) -> Results:
    """Read the folder of a sweep or of a benchmark. Raises SpecDecError if it is neither or nothing has ended yet."""
    if not folder.is_dir():
        raise SpecDecError(f"there is no folder '{folder}'; give the output folder of a sweep or a benchmark")
    if (folder / MANIFEST).is_file():
        store = Store(folder)
        manifest, found = store.read_manifest(), store.records()
        ordered = [found[key] for key in manifest["cells"] if key in found]
        results = Results(
            manifest["name"],
            str(manifest.get("description", "")),
            str(manifest.get("command", "")),
            ordered,
            len(manifest["cells"]) - len(ordered),
        )
    elif (folder / BENCH).is_file():
        results = _benchmark(folder / BENCH)
    else:
        raise SpecDecError(f"'{folder}' holds no results: there is neither {MANIFEST} nor {BENCH} in it")
    if not results.records:
        raise SpecDecError(f"'{folder}' holds no results yet: no cell has ended")
    return results


def _benchmark(path: Path) -> Results:
    """A benchmark's summary as records, one an arm."""
    try:
        summary = json.loads(path.read_text("utf-8"))
        shared = {key: summary[key] for key in ("prompts", "environment", "seconds")}
        records = []
        for arm in summary["arms"]:
            own = {name: arm[name] for name in ("drafter", "drafter_options")}
            cell = Cell.from_dict(summary["configuration"] | own)
            records.append({"key": cell.key(), "cell": cell.as_dict(), "arm": arm, "against": {}, **shared})
        return Results("benchmark", "", str(summary["command"]), records)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SpecDecError(f"cannot read '{path}': {error!r}; it is no summary of 'specdec bench'") from None


# For people.


def speedup_of(record: Record, baseline: str | None = None) -> tuple[str, Estimate] | None:
    """A baseline's name and the speedup over it; without ``baseline``, over the first that there is one for."""
    for name, value in record["arm"]["speedup"].items():
        if value is not None and baseline in (None, name):
            return NAMES.get(name, name), value
    return None


def baselines(records: Sequence[Record]) -> list[str]:
    """Every baseline that some record has a speedup over."""
    return list(dict.fromkeys(n for r in records for n, value in r["arm"]["speedup"].items() if value is not None))


def equality(record: Record) -> str:
    """Whether the output was that of plain decoding: ``12 of 12``, with what differed."""
    found = record["arm"].get("equal_to_plain")
    if not found:
        return ""
    notes = [f"{found[key]} {name}" for key, name in (("near_ties", "near-tie"), ("faults", "FAULT")) if found.get(key)]
    return f"{found['equal']} of {found['of']}" + (f" ({', '.join(notes)})" if notes else "")


def table(records: Sequence[Record]) -> Table:
    """What most people want to know of each cell, columns that are empty left out."""
    good = [record for record in records if "error" not in record]
    over = baselines(good)
    header = ["cell", "tok/s", *(f"x {NAMES.get(name, name)}" for name in over)]
    header += [
        "tokens/round",
        "accepted",
        "first token",
        "equal to plain",
        "agreement",
        "NLL",
        "ROUGE-L",
        "layers/token",
        "error",
    ]
    rows = []
    for label, record in zip(axes.labels([r["cell"] for r in records]), records, strict=True):
        if "error" in record:
            rows.append([label, *[""] * (len(header) - 2), record["error"]])
            continue
        arm = record["arm"]
        rate, first = arm.get("acceptance_rate"), arm.get("first_token_ms")
        quality = arm.get("quality") or {}
        rows.append(
            [
                label,
                estimate(arm["tokens_per_second"], ".1f"),
                *(estimate(arm["speedup"].get(name)) for name in over),
                estimate(arm.get("mean_acceptance_length")),
                "" if rate is None else f"{rate:.0%}",
                "" if first is None else f"{first['value']:.0f} ms",
                equality(record),
                estimate(quality.get("agreement"), ".3f"),
                estimate(quality.get("nll"), ".3f"),
                estimate(quality.get("rouge_l"), ".3f"),
                estimate(arm.get("mean_layers_per_token"), ".1f") if quality else "",
                "",
            ]
        )
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return Table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def command(cell: Mapping[str, Any]) -> str:
    """The ``specdec bench`` that measures one cell, with what differs from the defaults."""
    defaults = Cell().as_dict()
    drafter = cell["drafter"]
    arms = [*(name for name in cell["against"] if name not in ("none", drafter)), drafter]
    words = ["specdec", "bench", "--drafters", ",".join(arms)]
    for path, value in axes.flat("", cell["drafter_options"]).items():
        words += ["--drafter-option", f"{drafter}.{path}={axes.flow(value)}"]
    for path, value in axes.flat("", cell["verifier_options"]).items():
        words += ["--verifier-option", f"{path}={axes.flow(value)}"]
    for name, value in cell.items():
        if name not in ("drafter", "drafter_options", "verifier_options", "against") and value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


# For programs.


def render(results: Results, form: str) -> str:
    """The results as "csv" (every setting and figure), "markdown" (the table) or "json" (everything)."""
    if form == "json":
        return json.dumps(dataclasses.asdict(results), ensure_ascii=False, indent=1) + "\n"
    if form == "markdown":
        return _markdown(table(results.records))
    return _csv(results.records)


def _markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    return line(table.header) + "|" + "---|" * len(table.header) + "\n" + "".join(map(line, table.rows))


def _csv(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        row: dict[str, Any] = {"key": record["key"]}
        row |= {name: axes.flow(value) for name, value in record["cell"].items()}
        if "error" in record:
            row["error"] = record["error"]
        else:
            row |= _figures(record["arm"])
        row["seconds"] = record.get("seconds")
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _figures(arm: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An arm's figures as flat columns: an estimate is three of them."""
    out: dict[str, Any] = {}
    for name, value in arm.items():
        if name in ("name", "drafter", "drafter_options", "categories"):
            continue
        if isinstance(value, Mapping) and set(value) == {"value", "low", "high"}:
            bounds = {f"{prefix}{name}_{bound}": value[bound] for bound in ("low", "high")}
            out |= {f"{prefix}{name}": value["value"], **bounds}
        elif isinstance(value, Mapping):
            out |= _figures(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            out[f"{prefix}{name}"] = " ".join(f"{item:.4g}" for item in value)
        else:
            out[f"{prefix}{name}"] = value
    return out
