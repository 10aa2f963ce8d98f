"""The cache folder and the data folder: where they are, what they hold, and how former data gets there."""

from __future__ import annotations

import errno
import re
import stat
import sys
import warnings
from pathlib import Path

import pytest
from pages import ROOT

from specdec.base import files
from specdec.base.errors import SpecDecWarning

FORMER = ("learned/a.safetensors", "ngram/own-1.ids", "tuned/b.json", "chat_history")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SPECDEC_CACHE", "SPECDEC_DATA", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files._move_former.cache_clear()
    return tmp_path / "home"


def fill(cache: Path) -> None:
    for name in (*FORMER, "ngram/shipped-1.ids", "models/m/model.gguf"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text(name)


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


@pytest.mark.parametrize("how", ["the platform's", "SPECDEC_CACHE", "both"])
@pytest.mark.parametrize("other_disk", [False, True])
def test_former_data_are_moved_once(home: Path, monkeypatch: pytest.MonkeyPatch, how: str, other_disk: bool) -> None:
    if how != "the platform's":
        monkeypatch.setenv("SPECDEC_CACHE", str(home / "cache"))
    if how == "both":
        monkeypatch.setenv("SPECDEC_DATA", str(home / "data"))
    if other_disk:

        def refuse(self: Path, target: Path) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(Path, "rename", refuse)
    cache = files.cache_dir()
    fill(cache)
    data = files.data_dir()
    assert {name: (data / name).read_text() for name in FORMER} == {name: name for name in FORMER}
    assert not any((cache / name).exists() for name in FORMER)
    assert (cache / "ngram/shipped-1.ids").exists() and (cache / "models/m/model.gguf").exists()
    assert {path.name for path in data.iterdir()} == {*files.DATA, ".moving.lock"}
    assert not [path for path in data.rglob(".*") if path.name != ".moving.lock"]


def test_former_data_never_replace_newer_ones(home: Path) -> None:
    fill(files.cache_dir())
    data = home / ".local/share/specdec"
    (data / "tuned").mkdir(parents=True)
    (data / "tuned/b.json").write_text("newer")
    assert files.data_dir() == data
    assert (data / "tuned/b.json").read_text() == "newer" and (data / "learned/a.safetensors").exists()
    assert (files.cache_dir() / "tuned/b.json").read_text() == "tuned/b.json"


def test_former_data_are_not_moved_to_a_folder_that_is_named_for_one_run(home: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    fill(files.cache_dir())
    monkeypatch.setenv("SPECDEC_DATA", str(home / "once"))
    with pytest.warns(SpecDecWarning, match=r"chat_history and learned and .* are not used: move them to '.*once'"):
        assert files.data_dir() == home / "once"
    assert not (home / "once").exists() and (files.cache_dir() / FORMER[0]).exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files.data_dir()  # said once


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_lost(home: Path) -> None:
    fill(files.cache_dir())
    (home / ".local").write_text("a file")
    with pytest.warns(SpecDecWarning, match="cannot move what an earlier version kept in .*move it there"):
        files.data_dir()
    assert all((files.cache_dir() / name).exists() for name in FORMER)


def test_a_cache_at_its_former_place_is_still_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows, whose convention is another one."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *args, **how: home / "Library/Caches/specdec")
    assert files.cache_dir() == home / "Library/Caches/specdec"
    (home / ".cache/specdec").mkdir(parents=True)
    assert files.cache_dir() == home / ".cache/specdec"


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
    # The history is made by make_data_folder, texts for n-grams by earlier versions.
    assert named["data_dir"] == {*files.DATA} - {"chat_history", "ngram"}
