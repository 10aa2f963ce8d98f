"""The report of a folder of results: one HTML file that needs nothing else, and its pictures as PNG files beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from specdec import __version__
from specdec.base.errors import SpecDecError
from specdec.models.drafter_folder import replace
from specdec.sweep.results import Record, Results, Table, command, speedup_of

PAGE = "report.html"
SECTIONS = {  # name: title, and the text where there is no picture
    "speedup": ("Speedup", "No cell was measured beside a baseline."),
    "acceptance": ("Acceptance by position", "Nothing was drafted."),
    "quality": ("Quality against speed", "No rule that may change the output took part: there is no quality to trade."),
    "heat": ("Two axes at once", "Fewer than two axes were swept: there is no map to draw."),
}
ENVIRONMENT = {"memory_gb": "memory (GB)", "load_average": "load average", "runtime_note": "about the runtime"}
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ results.name }}: specdec report</title><style>{{ css|safe }}</style></head>
<body>
{%- macro draw(table) %}
<div class="wide"><table>
<thead><tr>{% for name in table.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.rows %}<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>
{%- else %}<td{% if table.header[loop.index0] in ("error", "value") %} class=text{% endif %}>{{ cell }}</td>{% endif %}
{%- endfor %}</tr>
{% endfor %}</tbody></table></div>
{%- endmacro %}
<header><h1>{{ results.name }}</h1>{% if results.description %}<p>{{ results.description }}</p>{% endif %}
<dl>{% for title, value, note in facts %}<div><dt>{{ title }}</dt><dd>{{ value }}<small>{{ note }}</small></dd></div>
{% endfor %}</dl>
<nav>{% for name, (title, _) in sections.items() %}<a href="#{{ name }}">{{ title }}</a> {% endfor -%}
<a href="#table">All cells</a> <a href="#environment">Environment</a> <a href="#commands">Commands</a></nav></header>
{% for name, (title, empty) in sections.items() %}<section id="{{ name }}"><h2>{{ title }}</h2>
{% for p in pictures[name] %}{% if p.title %}<h3>{{ p.title }}</h3>{% endif %}
<figure><img src="data:image/png;base64,{{ encoded(p.png) }}" alt="{{ p.alt }}">
<figcaption>{{ p.caption }}</figcaption></figure>{% else %}<p>{{ empty }}</p>{% endfor %}</section>
{% endfor %}
<section id="table"><h2>All cells</h2>{{ draw(results.table()) }}</section>
{% if failures.rows %}<section id="failures"><h2>Cells that failed</h2>{{ draw(failures) }}</section>{% endif %}
<section id="environment"><h2>Environment</h2>{{ draw(environment) }}</section>
<section id="commands"><h2>Commands</h2>
{% if results.command %}<p>Everything:</p><pre>{{ results.command }}</pre>{% endif %}
<details open><summary>One cell at a time</summary><pre>{{ commands }}</pre></details></section>
<footer>specdec {{ version }}</footer>
</body></html>
"""
CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; padding-top: .6rem; border-top: 2px solid #1a1a1a; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p { margin: .3rem 0 .6rem; max-width: 42rem; }
nav { margin: 1rem 0; font-size: .9rem; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #1a1a1a; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .5rem 1.5rem; margin: 1rem 0; }
dl div { border-left: 3px solid #1a1a1a; padding-left: .6rem; }
dt { font-size: .8rem; color: #444; } dd { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
dd small { font-size: .8rem; color: #444; display: block; }
figure { margin: .5rem 0 1.5rem; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; align-items: flex-start; }
figure img { display: block; width: 36rem; max-width: 100%; height: auto; }
figcaption { flex: 1 1 14rem; max-width: 36rem; font-size: .85rem; color: #333; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #ccc; vertical-align: top; }
thead th { border-bottom: 2px solid #1a1a1a; white-space: nowrap; } tbody th { font-weight: 600; }
tbody th { position: sticky; left: 0; background: #fff; }
td { white-space: nowrap; } td.text { white-space: normal; min-width: 14rem; }
pre { background: #f4f4f4; padding: .6rem .8rem; overflow-x: auto; font-size: .8rem; line-height: 1.4; }
details summary { cursor: pointer; margin: .5rem 0; }
footer { margin-top: 3rem; font-size: .8rem; color: #444; }
@media print { .wide, pre { overflow: visible; white-space: pre-wrap; } td, thead th { white-space: normal; } }
"""


def write_page(results: Results, folder: Path) -> Path:
    """Write the page and its pictures into ``folder``; return the page's path. Raises SpecDecError if it cannot."""
    try:
        from specdec.sweep.pictures import draw_all
    except ImportError:
        raise SpecDecError(
            "the page needs matplotlib; pip install 'specdec-m2r2[plot]', or use --format csv, markdown or json"
        ) from None
    labels = {record["key"]: label for record, label in zip(results.records, results.labels(), strict=True)}
    drawn = draw_all(results.done, labels)
    for picture in (picture for pictures in drawn.values() for picture in pictures):
        replace(folder / f"{picture.name}.png", picture.png)
    page = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            results=results,
            css=CSS,
            facts=_facts(results, labels),
            sections=SECTIONS,
            pictures=drawn,
            encoded=lambda png: base64.b64encode(png).decode(),
            failures=Table(["cell", "error"], [[labels[r["key"]], r["error"]] for r in results.failed]),
            environment=_environment(results.done),
            commands="\n".join(f"# {labels[r['key']]}\n{command(r['cell'])}" for r in results.records),
            version=__version__,
        )
    )
    replace(folder / PAGE, page.encode(errors="backslashreplace"))
    return folder / PAGE


def _facts(results: Results, labels: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The most important figures: title, value and note."""
    done, failed = len(results.done), len(results.failed)
    counts = [f"{done} of {done + failed + results.missing} cells"]
    counts += [f"{failed} failed"] if failed else []
    counts += [f"{results.missing} not run yet"] if results.missing else []
    facts = [("measured", ", ".join(counts), "")]
    ranked = [
        (gain[1]["value"], labels[record["key"]], gain) for record in results.done if (gain := speedup_of(record))
    ]
    if ranked:
        _, label, (name, value) = max(ranked, key=lambda item: item[0])
        facts.append(("fastest", f"{value['value']:.2f} × {name}", f"{label}; 95 % interval {_range(value)}"))
    facts += _equal(results.done)
    first = results.done[0] if results.done else results.records[0]
    models = list(dict.fromkeys(r["cell"]["model"] for r in results.records))
    about = first.get("environment", {})
    machine = [about.get(key) for key in ("dtype", "gpu" if about.get("gpu") else "cpu") if about.get(key)]
    facts.append(("model", ", ".join(models), ", ".join(machine)))
    return facts


def _range(value: Mapping[str, Any]) -> str:
    return "unknown" if value.get("low") is None else f"{value['low']:.2f} to {value['high']:.2f}"


def _equal(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """How many outputs of lossless rules were those of plain decoding."""
    found = [
        r["method"]["equal_to_plain"] for r in records if r["method"]["lossless"] and r["method"]["equal_to_plain"]
    ]
    if not found:
        return []
    total, equal, ties, faults = (sum(f.get(k) or 0 for f in found) for k in ("of", "equal", "near_ties", "faults"))
    notes = [f"{ties} differ at a near-tie of the logits"] if ties else []
    notes += [f"{faults} FAULTS"] if faults else []
    return [("same text as plain decoding", f"{equal} of {total} outputs", ", ".join(notes) or "lossless rules")]


def _environment(records: Sequence[Record]) -> Table:
    """One row a fact; what differs between cells shows all its values, numbers as a range."""
    facts: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record["environment"].items():
            facts.setdefault(name, [])
            if value not in (None, "", *facts[name]):
                facts[name].append(value)
        prompts = record["prompts"]
        what = f"{prompts['name']}: {prompts['conversations']} conversations, {prompts['turns']} turns"
        what += f", {len(prompts['skipped'])} skipped" if prompts["skipped"] else ""
        what += f", sha256 {prompts['sha256'][:12]}" if prompts.get("sha256") else ""
        what += f" ({prompts['licence']})" if prompts.get("licence") else ""
        facts.setdefault("prompts", [])
        if what not in facts["prompts"]:
            facts["prompts"].append(what)
    rows = [[ENVIRONMENT.get(name, name), _span(values)] for name, values in facts.items() if values]
    return Table(["fact", "value"], rows)


def _span(values: Sequence[Any]) -> str:
    if len(values) > 2 and (all(isinstance(v, int | float) for v in values) or all(map(_date, values))):
        return f"{min(values)} to {max(values)}"
    return "; ".join(map(str, values))


def _date(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value) is not None
