"""A copy of specdec has its own drafters, verifiers and configurations, and an installed one is found on a path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pages import ROOT

FIND = """
from importlib.machinery import PathFinder
spec = PathFinder.find_spec("specdec")
for name in ("drafters", "verifiers", "configs"):
    print(PathFinder.find_spec(f"specdec.{name}", spec.submodule_search_locations).origin)
"""


def found(folder: Path, **environment: str) -> list[Path]:
    """Where a program in ``folder`` finds parts of specdec as type checkers do, without hooks of the import system."""
    command, own = [sys.executable, "-c", FIND], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def test_type_checkers_find_all_parts_of_an_editable_install(tmp_path: Path) -> None:
    assert [path.resolve() for path in found(tmp_path)] == [
        ROOT / name / "__init__.py" for name in ("drafters", "verifiers", "configs")
    ]


def test_a_checkout_that_comes_first_has_parts_of_its_own(tmp_path: Path) -> None:
    """They are not those of the installed copy."""
    for name in ("specdec", "drafters", "verifiers", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    for link in (ROOT / "specdec").iterdir():
        if link.is_symlink():
            (tmp_path / "specdec" / link.name).symlink_to(os.readlink(link))
    (tmp_path / "elsewhere").mkdir()
    paths = found(tmp_path / "elsewhere", PYTHONPATH=str(tmp_path))
    assert [path.resolve().parent.parent for path in paths] == [tmp_path.resolve()] * 3
