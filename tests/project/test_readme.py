"""README's figures are those of the kept results; the extra that it names is enough to run the tests."""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from measured import estimate, result
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT

from specdec.bench.cell import Cell
from specdec.bench.plan import Plan
from specdec.bench.store import Store

TESTS = ROOT / "tests"


def needed(distribution: str) -> set[str]:
    """The names of all distributions that one with its extras needs."""
    known, missing = set[Requirement](), [Requirement(distribution)]
    while missing:
        known.add(one := missing.pop())
        try:
            found = map(Requirement, requires(one.name) or ())
        except PackageNotFoundError:  # of another system
            continue
        extras = [{"extra": extra} for extra in (*one.extras, "")]
        for each in found:
            if each not in known and (each.marker is None or any(map(each.marker.evaluate, extras))):
                missing.append(each)
    return {canonicalize_name(one.name) for one in known}


def imported(file: Path) -> Iterator[str]:
    """The packages that a file imports wherever it is imported itself."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


def test_every_test_can_be_imported_with_the_extra_for_tests() -> None:
    assert "pip install -e '.[test]' && python -m pytest" in (ROOT / "README.md").read_text("utf-8")
    enough, places = needed("specdec-m2r2[test]"), packages_distributions()
    own = {path.stem for folder in ("tests/support", "benchmarks") for path in (ROOT / folder).glob("*.py")}
    found = {name for file in TESTS.rglob("*.py") for name in imported(file)} - own - sys.stdlib_module_names
    assert {"pytest", "torch", "specdec", "hypothesis"} <= found
    assert not [name for name in found if enough.isdisjoint(map(canonicalize_name, places[name]))]


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / ".ci/figures.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_figures_of_all_pages_are_those_of_the_kept_results(figures) -> None:
    texts = {page: page.read_text("utf-8") for page in figures.pages()}
    assert sum(len(figures.BLOCK.findall(text)) for text in texts.values()) >= 2
    assert not [page for page, text in texts.items() if figures.written(text) != text], "run: python .ci/figures.py"


def test_results_are_kept_and_shown_in_one_step(figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "kept")
    names = {"none": 1.0, "ngram": 1.25, "ngram+m2r2": 1.5}
    cells = {name: Cell(model="a/model.gguf", drafter=name, turns=1) for name in names}
    by_kind = {"math": {"mean_acceptance_length": estimate(2), "speedup": {"none": estimate(1.2)}}}
    store = Store(tmp_path / "run")
    with store.opened(
        Plan("mine", "", tuple(cells.values())), "specdec bench", prompts={"own": [{"turns": ["secret"]}]}
    ):
        for name, speed in names.items():
            store.append(result(cells[name], speed, categories=by_kind))
    figures.keep("mine", store.folder)
    assert "secret" not in (tmp_path / "kept/mine.json").read_text()
    table = figures.written("<!-- figures methods mine -->\nold\n<!-- end -->\n").splitlines()
    assert table[3].startswith("| plain decoding | 1.00 | 1.00 |") and "old" not in table
    assert table[4].startswith("| **`ngram+m2r2`** |") and table[5].startswith("| `ngram` |")
    kinds = figures.written("<!-- figures ngram+m2r2 mine -->\n<!-- end -->")
    assert "| math | 2.00 [1.80–2.20] | 1.20 [1.08–1.32] |" in kinds and "All outputs equal plain decoding." in kinds
