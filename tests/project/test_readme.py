"""The extra that README names is enough to run the tests: what needs more is skipped."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT

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
