"""``specdec models``: what is in the cache with its size, getting a model ahead of time, and deleting one."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_gguf import NAME, write_gguf
from typer.testing import CliRunner

from specdec import cli
from specdec.models import hub, loading, prepare
from specdec.models.gguf.file import read_header
from specdec.speculation import registry


def models(*args: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli.app, ["models", *args])
    assert done.exit_code == code, done.output
    return done.output


def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(models("--json"))}


def size(*paths: Path) -> int:
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def test_a_pulled_model_is_there_once_until_it_is_removed(cache: SimpleNamespace) -> None:
    assert not rows()[NAME]["cached"]
    for _ in range(2):
        assert str(cache.folder) in models("pull", NAME)
    assert cache.downloads == 1 and rows()[NAME]["cached"]
    loading.load(NAME)
    assert cache.downloads == 1
    took = size(cache.folder)
    assert f"deleted {NAME} ({took / 1e6:.1f} MB)" in models("rm", NAME)
    assert not cache.folder.exists() and not rows()[NAME]["cached"]
    assert f"error: '{NAME}' is not in specdec's cache; see 'specdec models'\n" == models("rm", NAME, code=2)


def test_an_interrupted_download_is_removed_too(cache: SimpleNamespace, published: SimpleNamespace) -> None:
    part = cache.root / "specdec-work" / f"{NAME}-{published.entry.sha256[:16]}.part"
    part.parent.mkdir(parents=True)
    (part.parent / "specdec.txt").touch()
    part.write_bytes(b"1" * 2_000_000)
    assert "(2.0 MB)" in models("rm", NAME) and not part.exists()


def test_a_folder_that_specdec_did_not_make_stays(cache: SimpleNamespace) -> None:
    cache.folder.mkdir(parents=True)
    models("rm", NAME, code=2)
    assert cache.folder.exists()


def test_a_file_of_the_users_own_is_prepared_and_stays(cache: SimpleNamespace, tmp_path: Path) -> None:
    write_gguf(tmp_path / "own.gguf")
    models("pull", str(tmp_path / "own.gguf"))
    row = rows()[str(tmp_path / "own.gguf")]
    assert row["cached_bytes"] == size(Path(row["where"])) < size(tmp_path / "own.gguf")
    models("rm", os.path.relpath(tmp_path / "own.gguf"))
    assert not Path(row["where"]).exists() and (tmp_path / "own.gguf").exists()


def test_a_file_of_a_repository_is_removed_beside_the_others(cache: SimpleNamespace, tmp_path, monkeypatch) -> None:
    root = tmp_path / "hub/models--org--some-model"
    (root / "blobs").mkdir(parents=True)
    (root / "snapshots/1234").mkdir(parents=True)
    for number, name in enumerate(("a.gguf", "b.gguf")):
        write_gguf(root / "blobs" / str(number), seed=number)
        (root / "snapshots/1234" / name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **more: str(root / "snapshots/1234"))
    models("pull", "org/some-model:a.gguf")
    row = rows()["org/some-model:a.gguf"]
    assert row["cached_bytes"] == size(Path(row["where"]), root / "blobs/0")
    assert "is not in specdec's cache" in models("rm", "org/some-model:b.gguf", code=2)
    models("rm", "org/some-model:a.gguf")
    left = [path.name for path in sorted(root.rglob("*")) if not path.is_dir()]
    assert left == ["1", "b.gguf"] and not Path(row["where"]).exists()


@pytest.mark.parametrize("command", ["pull", "rm"])
def test_an_unknown_model_is_one_line_with_a_suggestion(cache: SimpleNamespace, command: str) -> None:
    models("pull", NAME)
    error = models(command, f"{NAME}x", code=2)
    assert error.startswith("error: ") and f"did you mean '{NAME}'" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("specdec chat --model tiny", {NAME}),
        ("specdec chat tiny", {NAME}),
        ("specdec models rm tiny", {NAME}),
        ("specdec models p", {"pull"}),
        ("specdec generate --drafter ngram+m2", {"ngram+m2r2", "ngram+m2r2-paper"}),
        ("specdec bench --drafters none,ngram+m2", {"none,ngram+m2r2", "none,ngram+m2r2-paper"}),
        ("specdec generate --verifier t", {"typical"}),
        ("specdec chat --runtime na", {"native"}),
        ("specdec train m2r2 --preset m2r2-", {"m2r2-paper"}),
        ("specdec sweep qu", {"quick"}),
        ("specdec bench --prompts spec", {"spec-bench", "specific.jsonl"}),
        ("specdec verify --prompts spec", {"spec-bench", "specific.jsonl"}),
        ("specdec chat --model /", None),
    ],
)
def test_commands_and_names_of_models_and_drafters_are_completed(
    cache: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, expected: set[str] | None
) -> None:
    write_gguf(tmp_path / "own.gguf")
    prepare.prepare_gguf("it", read_header(tmp_path / "own.gguf"))
    monkeypatch.chdir(tmp_path)
    Path("specific.jsonl").touch()
    env = {"_SPECDEC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = CliRunner().invoke(cli.app, [], env=env, prog_name="specdec")
    assert set(result.output.split()) == ({str(tmp_path / "own.gguf")} if expected is None else expected)


def test_help_lists_installed_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"drafters": {"oracle": "elsewhere:Oracle"}, "verifiers": {}}
    monkeypatch.setattr(registry, "outside", installed.__getitem__)
    assert "Installed plug-ins: oracle (drafter)" in CliRunner().invoke(cli.app, ["--help"]).output
    installed["drafters"] = {}
    assert "plug-ins" not in CliRunner().invoke(cli.app, ["--help"]).output


def test_a_shell_is_told_how_to_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    assert "complete -o default" in CliRunner().invoke(cli.app, ["--show-completion", "bash"]).output
