"""Reads and uploads of a step, on a stand-in for an accelerator, in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_reads_and_uploads_of_a_step() -> None:
    budgets = "tests/support/step_budgets.py"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "--assert=plain", budgets]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
