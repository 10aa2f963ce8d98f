"""The cache folder and the data folder: where they are, and what they hold."""

import re
import stat
import sys
from pathlib import Path

import pytest
from pages import ROOT

from specdec.base import files


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SPECDEC_CACHE", "SPECDEC_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have other folders")
def test_data_are_in_the_platforms_folder_of_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.cache_dir() == home / ".cache/specdec" and files.data_dir() == home / ".local/share/specdec"
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    assert files.data_dir() == home / "data/specdec"


def test_variables_name_the_folders_and_one_alone_holds_both(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(home / "c"))
    assert files.cache_dir() == home / "c" and files.data_dir() == home / "c/data"
    monkeypatch.setenv("SPECDEC_DATA", str(home / "d"))
    assert files.cache_dir() == home / "c" and files.data_dir() == home / "d"


def test_others_cannot_enter_the_data_folder(home: Path) -> None:
    made = files.make_data_folder("learned")
    assert made == files.data_dir() / "learned" and made.is_dir()
    assert stat.S_IMODE(files.data_dir().stat().st_mode) == 0o700


@pytest.mark.parametrize(("title", "listed"), [("The cache folder", files.CACHE), ("The data folder", files.DATA)])
def test_the_tables_in_the_docs_list_all_that_there_is(title: str, listed: dict[str, str]) -> None:
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w-]+)/?` \| (.*) \|$", section, re.M))
    assert rows == listed


def test_every_place_in_the_sources_is_listed() -> None:
    named = {"cache_dir": set[str](), "data_dir": set[str](), "make_data_folder": set[str]()}
    for path in (path for folder in ("specdec", "drafters") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        for function, name in re.findall(r"\b(cache_dir|data_dir)\(\) / f?\"([\w-]+)", text):
            named[function].add(name)
    assert named["cache_dir"] == {*files.CACHE} - {"specdec-work"} | {"data"}  # the former has a constant
    assert named["data_dir"] == {*files.DATA} - {"chat_history"}  # which make_data_folder makes
