"""Decoding and training keep their tensors on one device, shown without a GPU (``elsewhere.py``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import ROOT

pytestmark = [
    pytest.mark.slow,  # every drafter and every trainer
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="stands on the inside of PyTorch 2.13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]


@pytest.mark.parametrize("what", ["decode", "train"])
def test_nothing_mixes_tensors_of_two_devices(what: str, tmp_path: Path) -> None:
    script = ROOT / "tests/support/elsewhere.py"
    environment = os.environ | {"SPECDEC_CACHE": str(tmp_path), "SPECDEC_DEBUG": "1"}
    done = subprocess.run([sys.executable, str(script), what], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
