"""Commands and a server run with what Windows has of Python, shown on Linux (``systems.py``)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT


@pytest.mark.slow  # every command
def test_the_package_runs_with_what_another_system_has(tmp_path: Path) -> None:
    environment = os.environ | {"SPECDEC_CACHE": str(tmp_path), "SPECDEC_DEBUG": "1"}
    command = [sys.executable, str(ROOT / "tests/support/systems.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("done\n"), done.stdout[-3000:] + done.stderr[-3000:]
