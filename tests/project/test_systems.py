"""Commands and a server run with what Windows and macOS have of Python, shown on Linux (``systems.py``)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow  # every command


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_package_runs_with_what_another_system_has(system: str, tmp_path: Path) -> None:
    script = ROOT / "tests/support/systems.py"
    environment = os.environ | {"SPECDEC_CACHE": str(tmp_path), "SPECDEC_DEBUG": "1"}
    done = subprocess.run([sys.executable, str(script), system], env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stdout[-3000:] + done.stderr[-3000:]
