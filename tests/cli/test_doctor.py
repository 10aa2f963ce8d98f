"""``specdec doctor``: every line that a bug report needs, also where something is missing."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from typer.testing import CliRunner

from specdec import cli
from specdec.base.errors import SpecDecError
from specdec.cli import doctor
from specdec.models import catalogue
from specdec.runtimes.native import library


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_json_holds_what_the_lines_print_and_neither_a_secret(empty_cache: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("SPECDEC_API_KEY", "SPECDEC_SOMETHING", "OMP_TOKEN", "HF_TOKEN", "CUDA_VISIBLE_DEVICES_KEY"):
        monkeypatch.setenv(name, f"secret-of-{name}")
    lines = CliRunner().invoke(cli.app, ["doctor"]).stdout
    printed = yaml.safe_load(lines)
    assert not printed["cache"]["exists"] and printed["cache"]["free_bytes"] > 0
    assert printed["variables"]["OMP_NUM_THREADS"] == "1"
    (empty_cache / "models").mkdir(parents=True)
    (empty_cache / "models" / "file").write_bytes(b"12345")
    (empty_cache / "models" / "link").symlink_to(empty_cache / "models" / "file")
    data = CliRunner().invoke(cli.app, ["doctor", "--json"]).stdout
    report = json.loads(data)
    assert "secret-of" not in lines + data
    assert not [name for name in doctor.VARIABLES if re.search("KEY|TOKEN|PASS|SECRET|AUTH", name)]
    assert report["versions"]["torch"] and report["versions"]["specdec-m2r2"]
    assert report["cache"]["folder"] == str(empty_cache) and report["cache"]["bytes"] == 5
    assert report["cache"]["free_bytes"] > 0
    assert report["models"] == dict.fromkeys(catalogue.EMBEDDED, False)
    assert set(report["shipped_drafters"]["m2r2"]) == {*catalogue.EMBEDDED} - {"gemma3-270m"}
    assert report["threads"]["used"] >= 1 and report["device"]["name"]
    assert report["kernels"]["usable"] == library.runs()


def test_kernels_that_are_missing_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "load", Mock(side_effect=SpecDecError("the native kernels are not built")))
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_native.so")
    reason = "the native kernels are not built"
    assert doctor._kernels() == {"built": False, "usable": False, "reason": reason, "instructions": ""}


def test_cpu_features_are_those_that_the_kernels_use(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f amx_tile amx_bf16\n")
    assert doctor._features(cpuinfo) == ["avx2", "avx512f", "amx_bf16"]
    cpuinfo.write_text("Features\t: fp asimd asimddp i8mm\n")
    assert doctor._features(cpuinfo) == ["asimddp", "i8mm"]
    assert doctor._features(tmp_path / "none") == []
