"""A copy of specdec has its own drafters, verifiers and configurations, and an installed one is found on a path."""

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


def test_type_checkers_find_all_parts_of_an_editable_install(tmp_path: Path) -> None:
    """They follow paths, not hooks of the import system. The parts are links that any checkout has to its own."""
    done = subprocess.run([sys.executable, "-c", FIND], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("drafters", "verifiers", "configs")
    assert [Path(line).resolve() for line in done.stdout.splitlines()] == [ROOT / n / "__init__.py" for n in names]
    assert [os.readlink(ROOT / "specdec" / name) for name in names] == [f"../{name}" for name in names]
