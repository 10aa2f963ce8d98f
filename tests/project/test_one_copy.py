"""A copy of specdec that runs with the drafters and configurations of another one says so when it is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT


def imported(folder: Path, **environment: str) -> list[str]:
    """The lines on stderr when specdec is imported in ``folder``."""
    command, own = [sys.executable, "-c", "import specdec"], os.environ | environment
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Enough of another checkout to be imported, with its own drafters."""
    for name in ("specdec/__init__.py", "specdec/base/__init__.py", "specdec/base/errors.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("drafters", "verifiers", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    return tmp_path


def test_a_checkout_beside_an_installed_copy_is_told_apart(checkout: Path, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for lines in (imported(checkout), imported(elsewhere, PYTHONPATH=str(checkout))):
        [line] = lines
        assert f"specdec is '{checkout / 'specdec'}', and has no kernels, but its drafters" in line
        assert str(ROOT / "drafters") in line and "pip install -e ." in line


def test_one_copy_says_nothing(tmp_path: Path) -> None:
    assert imported(tmp_path) == imported(ROOT) == []
    assert imported(tmp_path, PYTHONPATH=str(ROOT)) == []
