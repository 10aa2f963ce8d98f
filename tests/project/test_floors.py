"""A folder is a floor: imports point down, and never in a circle; tests stand where their subject does.

Imports for type checking and in functions count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ROOT

PLACES = {"specdec": "specdec", "drafters": "specdec.drafters", "verifiers": "specdec.verifiers"}
FLOORS = [
    {"base", "reference"},
    {"models", "kvcache"},
    {"runtimes"},
    {"speculation"},
    {"drafters", "verifiers"},
    {"engine"},
    {"api"},
    {"serve", "train", "bench", "verify", "integrations"},
    {"cli", "__main__"},
]
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
FACE = "specdec"  # __init__.py, which hands on the public names


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in PLACES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *file.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that ``name`` imports, wherever in the file it does."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in known or base in known:
                    yield inner if inner in known else base


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, file, known)) - {name} for name, file in known.items() if name != FACE}


def floor(name: str) -> int:
    return FLOOR[name.split(".")[1]]


def test_every_module_stands_on_a_floor(arrows: dict[str, set[str]]) -> None:
    assert not [name for name in arrows if name.split(".")[1] not in FLOOR]
    assert len(arrows) > 100 and any(floor(name) == len(FLOORS) - 1 for name in arrows)


def test_imports_point_down(arrows: dict[str, set[str]]) -> None:
    up = [(a, b) for a, below in arrows.items() for b in below if b != FACE and floor(b) > floor(a)]
    assert not up


def test_imports_never_run_in_a_circle(arrows: dict[str, set[str]]) -> None:
    order, open_ = set[str](), list[str]()

    def visit(name: str) -> None:
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in order:
            open_.append(name)
            for below in sorted(arrows[name] - {FACE}):
                visit(below)
            open_.pop()
            order.add(name)

    for name in arrows:
        visit(name)


def test_the_reference_shares_no_code_with_the_engine(arrows: dict[str, set[str]]) -> None:
    """Else a fault could be in both."""
    assert not arrows["specdec.reference"]
    assert not [name for name, below in arrows.items() if "specdec.reference" in below]


def test_an_arrow_that_points_up_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "below.py"
    file.write_text("def f():\n    from specdec.cli import app\nif TYPE_CHECKING:\n    from specdec import api\n")
    known = {"specdec.cli": file, "specdec.api": file, "specdec.base.below": file}
    assert set(imported("specdec.base.below", file, known)) == {"specdec.cli", "specdec.api"}


def subject(test: Path) -> bool:
    """Whether a test module (relative to ``tests``) is named after what it tests.

    ``tests/engine/test_scheduler_x.py`` tests ``specdec/engine/scheduler.py``; a name may be the folder's own, too.
    """
    folders = [root / test.parent for root in (ROOT, ROOT / "specdec")]
    known = {test.parent.name, *(path.stem for folder in folders for path in folder.glob("*"))} - {"__init__"}
    name = test.stem.removeprefix("test_")
    return any(name == one or name.startswith(f"{one}_") for one in known)


def test_tests_are_named_after_their_subject() -> None:
    """``project`` and the tests on a GPU are of the whole."""
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(tests) > 80
    assert not [str(path) for path in tests if path.parts[0] not in ("project", "test_gpu.py") and not subject(path)]
    assert subject(Path("engine/test_scheduler_threads.py")) and not subject(Path("engine/test_arrivals.py"))
