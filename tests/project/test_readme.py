"""README's blocks for a fresh clone run as written, in a new clone, environment and cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pages import ROOT, blocks

OURS = ("PYTHON", "PYTEST", "VIRTUAL_ENV", "SPECDEC", "HF_", "OMP_")  # what this process has and a reader has not
SAMPLE = "test_inputs or test_files or test_serve_fuzz or test_page"  # files: two that run, two that need more


def link_dependencies(folder: Path) -> None:
    """Link what '.[test]' depends on, and nothing else, into a folder of packages. pip finds it installed.

    (To unpack it again would take longer than all the rest. ``.ci/run`` does that.)
    """
    known, missing = set[Requirement](), [Requirement("specdec-m2r2[test]")]
    while missing:
        known.add(one := missing.pop())
        try:
            found = distribution(one.name)
        except PackageNotFoundError:  # pip will install it
            continue
        for name in {file.parts[0] for file in found.files or ()} - {"..", "/", "__pycache__"}:
            if one.name != "specdec-m2r2" and not (folder / name).exists():
                (folder / name).symlink_to(str(found.locate_file(name)))
        for each in map(Requirement, found.requires or ()):
            extras = [{"extra": extra} for extra in (*one.extras, "")]
            if each not in known and (each.marker is None or any(map(each.marker.evaluate, extras))):
                missing.append(each)


@pytest.mark.slow
def test_the_blocks_for_a_fresh_clone_run_as_written(tmp_path: Path) -> None:
    """All tests are collected, and some run: all would take as long as the tests that this is one of."""
    every = [block.text for block in blocks(ROOT / "README.md")]
    get, generate, test = [text for text in every if re.search("git clone|venv", text)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    (tmp_path / "packages").mkdir()
    link_dependencies(tmp_path / "packages")
    environment |= {"SPECDEC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path / "packages")}
    environment |= {"PYTEST_ADDOPTS": f"-n 0 -rs -k '{SAMPLE}'"}

    def run(block: str, folder: Path) -> str:
        command = ["bash", "-ec", block]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    run(get.replace("REPOSITORY_URL", f"'{ROOT}'"), tmp_path)
    assert "output identical to plain decoding: yes" in run(generate, tmp_path / "specdec")
    environment["CC"] = "/bin/false"  # the kernels are there
    told = run(test, tmp_path / "specdec")
    assert "playwright is not installed" in told and "schemathesis is not installed" in told
    assert int(re.findall(r"(\d+) passed", told)[0]) > 10
