"""The report of a results folder: one self-contained HTML file, and its pictures as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from specdec import __version__
from specdec.base.errors import SpecDecError
from specdec.base.files import write_atomically
from specdec.sweep.results import Record, Results, ResultTable, command, speedup_of

PAGE = "report.html"  # also the name of the template
SECTIONS = {  # name: title, and the text if there is no picture
    "speedup": ("Speedup", "No cell was measured beside a baseline."),
    "acceptance": ("Acceptance by position", "Nothing was drafted."),
    "quality": ("Quality against speed", "No lossy rule took part: there is no quality to trade."),
    "heat": ("Two axes at once", "Fewer than two axes were swept: there is no map to draw."),
}
ENVIRONMENT = {
    "memory_gb": "memory (GB)",
    "load_average": "load average",
    "runtime_note": "about the runtime",
    "kv_cache": "KV cache",
    "activations": "activations",
}


def write_page(results: Results, folder: Path) -> Path:
    """Write the page and its pictures into ``folder``; return the path. Raises SpecDecError without matplotlib."""
    try:
        from specdec.sweep.pictures import draw_all
    except ImportError:
        raise SpecDecError(
            "the page needs matplotlib; pip install 'specdec-m2r2[plot]', or use --format csv, markdown or json"
        ) from None
    labels = {record["key"]: label for record, label in zip(results.records, results.labels(), strict=True)}
    drawn = draw_all(results.done, labels)
    for picture in (picture for pictures in drawn.values() for picture in pictures):
        write_atomically(folder / f"{picture.name}.png", picture.png)
    page = Environment(loader=PackageLoader("specdec.sweep", "."), autoescape=True).get_template(PAGE)
    text = page.render(
        results=results,
        facts=_facts(results, labels),
        sections=SECTIONS,
        pictures=drawn,
        encoded=lambda png: base64.b64encode(png).decode(),
        failures=ResultTable(["cell", "error"], [[labels[r["key"]], r["error"]] for r in results.failed]),
        environment=_environment(results.done),
        commands="\n".join(f"# {labels[r['key']]}\n{command(r['cell'])}" for r in results.records),
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
