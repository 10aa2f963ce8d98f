"""Packed weights on disk: the same results as without, whatever happens to the files, the disk and other processes."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import pytest
import torch
from passes import next_logits
from spies import noted
from targets import needs_native
from tiny import save_native
from tiny_gguf import write_model
from torch import Tensor
from typer.testing import CliRunner
from zoo import m2r2

from specdec import SpecDecoder, cli
from specdec.base.errors import SpecDecError
from specdec.models import identity, loading
from specdec.runtimes.native import linear, packed_file
from specdec.runtimes.native import target as native
from specdec.runtimes.native.packed_file import END, Damaged, PackedFile
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.select import make_target
from specdec.runtimes.target import Target

pytestmark = needs_native


@pytest.fixture(autouse=True)
def fresh_notes() -> Iterator[None]:
    yield
    packed_file.note.cache_clear()


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's file or, where the test wants it, folder; its cache is empty."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    if getattr(request, "param", "file") == "folder":
        return save_native(tmp_path / "it", "qwen2")
    return write_model(tmp_path / "it.gguf", "qwen2", "Q8_0", 128, tied=True)


either = pytest.mark.parametrize("path", ["file", "folder"], indirect=True)


def weights_of(path: Path) -> Path:
    return path / "model.safetensors" if path.is_dir() else path


def load(path: Path, **how: Any) -> NativeTarget:
    target = make_target(loading.load(path)[0], **how)[0]
    return target


@torch.inference_mode()
def logits(target: Target) -> Tensor:
    return next_logits(target, target.new_cache(), torch.arange(9)[None] * 7 % target.vocab_size)


def kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob("cache/models/*/*.packed"))


def forbid(monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> None:
    """These must not be called."""
    for place, name in functions:
        monkeypatch.setattr(place, name, Mock(side_effect=AssertionError))


CHECKSUM = 0x46541EDA1E5ADB84  # of the bytes 0 to 255
PACKING = (linear, "_block_tiles"), (linear, "_tiles"), (native, "check_logits"), (identity, "sample")


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2", "Q8_0"), ("llama", "Q4_0"), ("qwen3", "MXFP4"), ("phi3", "BF16")]
)
def test_later_loads_read_what_the_first_one_packed(tmp_path, monkeypatch, capsys, family, kind):
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    path = write_model(tmp_path / "it.gguf", family, kind, 128)
    plain, first = load(path, packed=False), None
    assert not kept(path)
    first = load(path)
    assert len(kept(path)) == 1 and kept(path)[0].stat().st_mode & 0o777 == 0o644
    with monkeypatch.context() as patch:
        if kind != "BF16":  # norms and embeddings are tensors: llama's queries and keys are, too, in another order
            forbid(patch, *PACKING[:3])
        second = load(path)
    assert plain.fingerprint == first.fingerprint == second.fingerprint
    assert plain.logit_difference == first.logit_difference == second.logit_difference
    assert plain.weight_format == second.weight_format and plain.bytes_read == second.bytes_read
    assert torch.equal(logits(plain), logits(first)) and torch.equal(logits(plain), logits(second))
    assert not capsys.readouterr().err and not [*path.parent.rglob("*.part")]


def test_a_later_load_reads_no_matrix_of_the_models_file(path, monkeypatch):
    expected = logits(load(path))
    model = loading.load(path)[0]
    for module in model.modules():
        if hasattr(module, "blocks") and module is not model.model.embed_tokens:
            monkeypatch.setattr(type(module.blocks), "dequantized", None)
            monkeypatch.setattr(type(module.blocks), "at", None)
            break
    assert torch.equal(logits(make_target(model)[0]), expected)


def test_other_weights_in_a_model_are_packed_and_not_those_of_its_file(path):
    load(path)
    model = loading.load(path)[0]
    up, down = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    up.blocks, down.blocks = down.blocks, up.blocks
    changed = make_target(model)[0]
    assert changed.fingerprint != load(path).fingerprint
    assert torch.equal(logits(changed), logits(make_target(model, packed=False)[0]))


@either
def test_other_settings_use_the_file_as_far_as_they_can(path):
    load(path)
    for how in {"weights": "int4"}, {"weights": "dense"}, {"kv_cache": "int8"}:
        assert torch.equal(logits(load(path, **how)), logits(load(path, packed=False, **how)))
    assert len(kept(path)) == 1


def other_weights(path: Path) -> None:
    """The same file with other numbers."""
    with path.open("rb+") as file:
        file.seek(-64, 2)
        file.write(bytes(range(64)))


@either
@pytest.mark.parametrize("how", ["in its place", "renamed"])
def test_another_file_of_the_same_name_size_and_time_is_packed_again(path, tmp_path, how, capsys):
    file = weights_of(path)
    before, times = logits(load(path)), file.stat()
    if how == "renamed":
        other_weights(Path(shutil.copy(file, tmp_path / "other")))
        (tmp_path / "other").replace(file)
    else:
        other_weights(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = logits(load(path))
    assert torch.equal(found, logits(load(path, packed=False))) and not torch.equal(found, before)
    what = "the model's file has changed" if path.is_dir() else "the files of the model have changed"
    assert f"made again: {what}" in capsys.readouterr().err.replace("\n", " ")
    assert torch.equal(logits(load(path)), found) and not capsys.readouterr().err


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_data(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def flip_index(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-END.size - 9] ^= 1
    file.write_bytes(data)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A file whose index was changed by someone who knows the format."""

    def edit(file: Path) -> None:
        data = file.read_bytes()
        _, length, _ = END.unpack(data[-END.size :])
        begin = len(data) - END.size - length
        index = json.loads(data[begin : begin + length])
        change(index)
        text = torch.frombuffer(bytearray(json.dumps(index).encode()), dtype=torch.uint8)
        end = END.pack(packed_file.MAGIC, len(text), packed_file._checksum(text))
        file.write_bytes(data[:begin] + text.numpy().tobytes() + end)

    return edit


def entry(place: int, value: object) -> Callable[[Path], None]:
    """Change a number of the largest entry."""

    def change(index: dict[str, Any]) -> None:
        name = max(index["entries"], key=lambda name: index["entries"][name][2])
        index["entries"][name][place] = value

    return rewrite(change)


DEFECTS = {
    "cut": cut,
    "data": flip_data,
    "index": flip_index,
    "older": lambda file: file.write_bytes(file.read_bytes()[: -END.size] + END.pack(b"specdec packed 0", 0, 0)),
    "huge index": lambda file: file.write_bytes(
        file.read_bytes()[: -END.size] + END.pack(packed_file.MAGIC, 1 << 60, 0)
    ),
    "beyond the end": entry(1, 1 << 40),
    "larger": entry(2, 1 << 50),
    "another kind": entry(0, 3),
    "kernels": rewrite(lambda index: index["key"].update(kernels="0")),
    "no key": rewrite(lambda index: index.update(key=None)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_file_that_cannot_be_used_is_made_again(path, capsys, defect):
    expected = logits(load(path))
    [file] = kept(path)
    DEFECTS[defect](file)
    assert torch.equal(logits(load(path)), expected)
    assert capsys.readouterr().err.replace("\n", " ").count("are made again: ") == 1
    assert torch.equal(logits(load(path)), expected) and not capsys.readouterr().err


def test_a_check_that_is_no_number_is_not_trusted(path, monkeypatch):
    load(path)
    rewrite(lambda index: index.update(notes=dict.fromkeys(index["notes"], "nan")))(kept(path)[0])
    runs = noted(monkeypatch, native, "check_logits", lambda target: None)
    load(path)
    assert len(runs) == 1


def test_a_model_that_fails_its_check_is_not_kept(path, monkeypatch):
    monkeypatch.setattr(native, "check_logits", Mock(side_effect=SpecDecError("the native runtime gives other logits")))
    assert make_target(loading.load(path)[0])[0].runtime != "native"
    assert not kept(path) and not [*path.parent.rglob("*.part")]


def full(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 0))


def fills_up(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    def write(file: BinaryIO, entries: list[tuple[torch.Tensor, int]]) -> None:
        own(file, entries[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    own = packed_file._write
    monkeypatch.setattr(packed_file, "_write", write)


def read_only(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(packed_file, "locked", Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS))))


@either
@pytest.mark.parametrize("problem", [full, fills_up, read_only])
def test_without_a_place_weights_are_packed_in_memory(path, monkeypatch, capsys, problem):
    loading.load(path)  # its config and tokenizer are there
    problem(monkeypatch, path)
    for _ in range(2):
        target = load(path)
    assert torch.equal(logits(target), logits(load(path, packed=False)))
    assert capsys.readouterr().err.replace("\n", " ").count("cannot be kept in ") == 1
    assert not kept(path) and not [*path.parent.rglob("*.part")]


def test_an_interrupted_write_leaves_nothing(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(native, "check_logits", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(path)
    assert not kept(path) and not [*path.parent.rglob("*.part")]
    load(path)
    assert kept(path)


@either
def test_a_file_that_changes_while_it_is_packed_is_not_kept(path, monkeypatch, capsys):
    noted(monkeypatch, native, "check_logits", lambda target: weights_of(path).touch())
    load(path)
    assert not kept(path) and "has changed meanwhile" in capsys.readouterr().err.replace("\n", " ")


PACK = """
import sys
from specdec.models import loading
from specdec.runtimes.native import linear
from specdec.runtimes.select import make_target
packed, own = [], (linear._block_tiles, linear._dense_tiles)
linear._block_tiles = lambda *given: packed.append(1) or own[0](*given)
linear._dense_tiles = lambda *given: packed.append(1) or own[1](*given)
model = loading.load(sys.argv[1])[0]
print("ready", flush=True)
sys.stdin.readline()
make_target(model)
print(len(packed))
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["file", "folder"], indirect=True)
def test_of_two_processes_that_pack_at_once_one_writes_and_the_other_reads(path):
    loading.load(path)  # its config and tokenizer are there
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", PACK, str(path)], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = sorted(int(process.communicate(timeout=300)[0]) for process in processes)
    assert counts[0] == 0 < counts[1]
    assert len(kept(path)) == 1 and not [*path.parent.rglob("*.part")]


def drafts(path: Path) -> list[Path]:
    return [file for file in kept(path) if file.name.startswith("drafts-")]


def drafted(path: Path, scale: float = 1.0, **how: Any) -> tuple[list[int], list[int]]:
    """New tokens, and those of a step, with a drafter whose adapters have some values."""
    decoder = SpecDecoder.from_pretrained(str(path), "none", **how)
    drafter = m2r2(decoder.target, 0, ((0, 2),), True, False)
    with torch.no_grad():
        for factors in drafter.network.adapters.parameters():
            factors.mul_(scale)
    prompt = [5, 6, 7, 5, 6]
    out = decoder.with_drafter(drafter).generate(prompt, max_new_tokens=24, ignore_eos=True, num_speculative_tokens=4)
    return out.token_ids, out.metrics.per_step_accepted


def test_later_processes_read_the_merged_layers_and_the_head_of_a_drafter(path, monkeypatch, capsys):
    plain = drafted(path, packed=False)
    assert drafted(path) == plain and len(drafts(path)) == 2
    packed = noted(monkeypatch, linear, "_tiles", lambda weight, *more: (*weight.shape,))
    assert drafted(path) == plain
    projections, added = packed[:2], packed[2:]  # the latter: heads for tokens of the text
    assert projections == [(128, 384), (128, 256)] and all(rows < 16 for rows, _ in added)
    assert not capsys.readouterr().err


def test_another_drafter_has_files_of_its_own_and_the_oldest_go(path):
    for scale in range(5):
        assert drafted(path, scale) == drafted(path, scale, packed=False)
    assert len(drafts(path)) == packed_file.MOST_DRAFTS


@pytest.mark.parametrize("defect", ["cut", "data", "larger", "another kind", "kernels"])
def test_a_damaged_file_of_a_drafter_is_made_again(path, capsys, defect):
    expected = drafted(path)
    for file in drafts(path):
        DEFECTS[defect](file)
    assert drafted(path) == expected
    assert capsys.readouterr().err.replace("\n", " ").count("are made again: ") >= 1
    packed_file.note.cache_clear()
    assert drafted(path) == expected and not capsys.readouterr().err


def test_a_drafter_that_is_trained_further_is_not_kept(path):
    decoder = SpecDecoder.from_pretrained(str(path), "none")
    network = m2r2(decoder.target, 0, ((0, 2),), True, False).network
    network.freeze(decoder.target)
    assert not network.adapters.lasting


@either
def test_models_shows_the_size_of_packed_weights_and_removes_them(path):
    def command(*args: str) -> str:
        done = CliRunner().invoke(cli.app, args)
        assert done.exit_code == 0, done.output
        return done.output

    generate = "generate", "AB", "--model", str(path), "--max-new-tokens", "2", "--drafter", "none"
    command(*generate, "--no-packed")
    assert not kept(path)
    command(*generate)
    [file] = kept(path)
    row = next(row for row in json.loads(command("models", "--json")) if row["name"] == str(path))
    assert row["packed_bytes"] == file.stat().st_size > 0
    command("models", "rm", str(path))
    assert not file.parent.exists() and path.exists()


def test_what_is_no_file_is_not_waited_for(path, capsys):
    load(path)
    [file] = kept(path)
    file.unlink()
    os.mkfifo(file)
    load(path)
    assert file.is_file() and "made again: it is no file" in capsys.readouterr().err.replace("\n", " ")


def test_entries_of_any_size_come_back(tmp_path, kernels, monkeypatch):
    monkeypatch.setattr(packed_file, "CHUNK", 10_000)
    given = {str(size): torch.randint(256, (size,), dtype=torch.uint8) for size in (0, 1, 63, 64, 5000, 9000, 70_001)}
    file = PackedFile(tmp_path / "it.packed", {"file": [1]}, 0)
    file.open()
    for name, data in given.items():
        kind, written = file.add(name, 2, data)
        assert kind == 2 and written is data
    file.notes["a"] = 1
    file.finish()
    again = PackedFile(tmp_path / "it.packed", {"file": [1]}, 0)
    again.open()
    assert not again.writes and again.notes == {"a": 1} and again.find("none", {2: 1}) is None
    for name, data in given.items():
        found = again.find(name, {2: len(data)})
        assert found is not None and torch.equal(found[1], data) and found[1].data_ptr() % 64 == 0
        with pytest.raises(Damaged):
            again.find(name, {2: len(data) + 1})


def test_a_checksum_finds_every_change(kernels):
    data = torch.randint(256, ((1 << 20) * 2 + 77,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = packed_file._checksum(data)
    for place in (0, 8, 63, 64, 1 << 20, len(data) - 1):
        changed = data.clone()
        changed[place] ^= 128
        assert packed_file._checksum(changed) != own
    parts = packed_file._checksum(data[: 1 << 20]), packed_file._checksum(data[1 << 20 :], 1 << 20)
    assert sum(parts) % (1 << 64) == own
    swapped = data.clone()
    swapped[:64], swapped[64:128] = data[64:128], data[:64]
    assert packed_file._checksum(swapped) != own and packed_file._checksum(data[:-1]) != own


def test_the_checksum_is_the_same_in_every_build(kernels):
    """A file is packed by one and read by another."""
    assert packed_file._checksum(torch.arange(256).to(torch.uint8)) == CHECKSUM
