"""Write the figures of README and of the model cards from benchmark results: ``python .ci/figures.py [NAME=DIR ...]``.

DIR is an output folder of ``specdec bench`` for one model. What the pages need of it is kept in
``benchmarks/results/NAME.json``, without prompts. Then each block of a page between ``<!-- figures WHAT NAME -->`` and
``<!-- end -->`` is written anew; a test compares the blocks with the kept results. WHAT is ``methods`` (a table with a
line for each method) or the name of a method (a table with a line for each category of prompts).
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from specdec.bench.results import interval, load_results

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures (\S+) (\S+) -->\n).*?(<!-- end -->)", re.S)
KEPT = {  # of a record: entries of ``specdec.bench.cell``
    "cell": ("model", "drafter", "num_speculative_tokens", "turns", "limit", "max_new_tokens", "against"),
    "method": ("mean_acceptance_length", "speedup", "equal_to_plain", "categories"),
    "prompts": ("name", "conversations", "sha256"),
    "environment": ("date", "cpu", "threads", "load_average", "specdec", "commit", "dtype", "runtime"),
}
DEFAULT, PLAIN = "ngram+m2r2", "none"
NAMES = {"none": "plain", "hf": "model.generate"}


def keep(name: str, folder: Path) -> None:
    """Write what the pages need of benchmark results into ``benchmarks/results/NAME.json``.

    name: the NAME of the file. folder: an output folder of ``specdec bench``.
    """
    records = [
        {part: {key: record[part].get(key) for key in keys} for part, keys in KEPT.items()}
        for record in load_results(folder).done
    ]
    for record in records:
        record["cell"]["model"] = Path(record["cell"]["model"]).name  # as another machine finds it
        for some in (record["method"]["categories"] or {}).values():
            for unread in some.keys() - {"mean_acceptance_length", "speedup"}:
                del some[unread]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n")


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted(ROOT.glob("drafters/pretrained/*/*/README.md"))]


def written(page: str) -> str:
    """Return the text of a page with its blocks of figures written anew from the kept results.

    page: the text so far; a block lies between ``<!-- figures WHAT NAME -->`` and ``<!-- end -->``.
    """

    def block(found: re.Match[str]) -> str:
        records = json.loads((RESULTS / f"{found[3]}.json").read_text("utf-8"))
        lines = methods(records) if found[2] == "methods" else kinds(records, found[2])
        return found[1] + "".join(f"{line}\n" for line in [*lines, "", *about(records)]) + found[4]

    return BLOCK.sub(block, page)


def methods(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table with the speed of each method: plain decoding first, then the fastest.

    records: kept results of a benchmark, one for each method.
    """
    baselines = list(dict.fromkeys(name for record in records for name in record["method"]["speedup"]))
    yield from head("method", "mean acceptance length", *(f"x {NAMES.get(name, name)}" for name in baselines))
    first = [record for record in records if record["cell"]["drafter"] == PLAIN]
    others = [record for record in records if record["cell"]["drafter"] not in baselines]
    others.sort(key=lambda record: (-round(speedup(record), 2), record["cell"]["drafter"] != DEFAULT))
    for record in [*first, *others]:
        name, figures = record["cell"]["drafter"], record["method"]
        cells = [cell_text(figures["speedup"].get(baseline), name == DEFAULT) for baseline in baselines]
        if name == PLAIN:
            cells[baselines.index(PLAIN)] = "1.00"
        shown = {PLAIN: "plain decoding", DEFAULT: f"**`{name}`**"}.get(name, f"`{name}`")
        yield row(shown, f"{figures['mean_acceptance_length']['value']:.2f}", *cells)


def speedup(record: dict[str, Any]) -> float:
    return float(record["method"]["speedup"][PLAIN]["value"])


def kinds(records: list[dict[str, Any]], method: str) -> Iterator[str]:
    """Yield the lines of a Markdown table with the speed of one method on each category of prompts.

    records: kept results of a benchmark, one for each method. method: the method's name.
    """
    (figures,) = [record["method"] for record in records if record["cell"]["drafter"] == method]
    yield from head("prompts", "mean acceptance length", "x plain")
    for name, some in [*sorted((figures["categories"] or {}).items()), ("all", figures)]:
        if name:
            yield row(name, interval(some["mean_acceptance_length"]), interval(some["speedup"][PLAIN]))


def about(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines of text that say what a benchmark ran on which machine, and whether outputs were equal.

    records: kept results of the benchmark, one for each method.
    """
    cell, prompts, machine = (records[0][part] for part in ("cell", "prompts", "environment"))
    equal = [
        record["method"]["equal_to_plain"] for record in records if record["cell"]["drafter"] not in cell["against"]
    ]
    same = sum(each["equal"] for each in equal), sum(each["of"] for each in equal)
    outputs = "All outputs equal" if same[0] == same[1] else f"{same[0]} of {same[1]} outputs equal"
    turns = "first turns" if cell["turns"] == 1 else "conversations"
    text = (
        f"{cell['model']}, {machine['cpu']}, {machine['threads']} threads; "
        f"{prompts['conversations']} {turns} of {public(prompts['name'])}, at most {cell['max_new_tokens']} tokens, "
        f"whole calls, greedy, interleaved; medians with 95 % bootstrap intervals. {outputs} plain decoding."
    )
    yield from textwrap.wrap(text, 130, break_on_hyphens=False)


def public(prompts: str) -> str:
    return prompts.removesuffix(".jsonl").replace("_", "-")


def cell_text(estimate: Mapping[str, Any] | None, bold: bool) -> str:
    text = interval(estimate).replace("–", "-")
    value, space, bounds = text.partition(" ")
    return f"**{value}**{space}{bounds}" if bold and value else text


def head(*names: str) -> Iterator[str]:
    yield row(*names)
    yield "|" + "---|" * len(names)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        keep(name, Path(folder))
    for page in pages():
        text = page.read_text("utf-8")
        page.write_text(written(text), "utf-8")
