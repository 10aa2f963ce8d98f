"""Packed files of experts, by what breaks them, and how they reach a GPU."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from specdec.base.errors import SpecDecError
from specdec.models import identity
from specdec.runtimes.experts import packed, tiers
from specdec.runtimes.experts.layers import moe_layers


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


@pytest.fixture
def folder(mixtral, tmp_path) -> Path:
    packed.pack(moe_layers(mixtral), identity.fingerprint(mixtral), tmp_path)
    return tmp_path


def test_a_packed_expert_comes_back_bit_by_bit(mixtral, folder):
    index = packed.open_index(folder)
    tier = tiers.DiskTier(folder, index)
    (slot,) = tier.slots(1)
    for row, layer in enumerate(moe_layers(mixtral)):
        for expert in range(index.num_experts):
            tier.read(row * index.num_experts + expert, slot, 0, index.stride)
            gate_up, down = index.views(slot)
            assert torch.equal(gate_up, layer.experts.gate_up_proj[expert])
            assert torch.equal(down, layer.experts.down_proj[expert])
    tier.close()


def test_a_flipped_byte_is_named(folder):
    index = packed.open_index(folder)
    with (folder / packed.BLOCKS).open("r+b") as file:
        file.seek(6 * index.stride + 100)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    tier = tiers.DiskTier(folder, index)
    (slot,) = tier.slots(1)
    tier.read(5, slot, 0, index.stride)
    with pytest.raises(SpecDecError, match="damaged: expert 2 of layer 1 does not have its checksum"):
        tier.read(6, slot, 0, index.stride)


def test_a_truncated_file_is_refused(folder):
    os.truncate(folder / packed.BLOCKS, 5000)
    with pytest.raises(SpecDecError, match=r"has 5000 bytes, its index says .* truncated"):
        packed.open_index(folder)


def test_a_file_truncated_while_it_is_read_is_named(folder):
    index = packed.open_index(folder)
    tier = tiers.DiskTier(folder, index)
    os.truncate(folder / packed.BLOCKS, index.stride + 10)
    with pytest.raises(SpecDecError, match="ends within expert 2 of layer 0"):
        tier.read(2, tier.slots(1)[0], 0, index.stride)


def test_short_reads_are_continued(folder, monkeypatch):
    index = packed.open_index(folder)
    tier, real = tiers.DiskTier(folder, index), os.preadv
    whole, short = tier.slots(2)
    tier.read(1, whole, 0, index.stride)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    tier.read(1, short, 0, index.stride)
    assert torch.equal(whole, short)


def test_without_o_direct_it_falls_back_and_says_so(folder, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    index = packed.open_index(folder)
    tier = tiers.DiskTier(folder, index)
    tier.read(0, tier.slots(1)[0], 0, index.stride)
    assert "no O_DIRECT" in tier.note and "page cache" in tier.note


def test_a_full_disk_is_one_line_and_leaves_the_old_file(mixtral, folder, monkeypatch):
    old = (folder / packed.BLOCKS).read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SpecDecError, match=r"cannot write the packed experts .* No space left on device; .* MB"):
        packed.pack(moe_layers(mixtral), "f", folder)
    assert (folder / packed.BLOCKS).read_bytes() == old and packed.open_index(folder)
    assert sorted(path.name for path in folder.iterdir()) == [packed.BLOCKS, packed.INDEX]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"format": 2}', '{"format": 1, "fingerprint": 3}'])
def test_a_broken_index_is_refused(folder, text):
    (folder / packed.INDEX).write_text(text)
    with pytest.raises(SpecDecError, match="not an index of packed experts"):
        packed.open_index(folder)


def test_an_index_with_too_few_checksums_is_refused(folder):
    data = json.loads((folder / packed.INDEX).read_text())
    (folder / packed.INDEX).write_text(json.dumps(data | {"checksums": data["checksums"][1:]}))
    with pytest.raises(SpecDecError, match="contradicts itself"):
        packed.open_index(folder)


def test_a_missing_folder_says_how_to_make_it(tmp_path):
    with pytest.raises(SpecDecError, match=r"experts.json is missing; write it with 'specdec pack-experts"):
        packed.open_index(tmp_path / "nothing")


def test_another_models_file_is_refused(folder, mixtral):
    index = packed.open_index(folder)
    with pytest.raises(SpecDecError, match="fingerprint"):
        packed.check_model(index, packed.plan(moe_layers(mixtral), "other"), folder)


class FakeCuda:
    """Stands in for ``torch.cuda``: logs what is ordered against what."""

    def __init__(self):
        self.log = []

    def is_available(self):
        return False

    def Stream(self, device):
        return FakeStream("side", self.log)

    def current_stream(self, device):
        return FakeStream("model", self.log)

    def Event(self):
        return FakeEvent(self.log)

    def stream(self, stream):
        return stream


class FakeStream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.stream}")


class FakeEvent:
    def __init__(self, log):
        self.log, self.stream = log, ""

    def record(self, stream):
        self.stream = stream.name

    def synchronize(self): ...


def test_copies_to_a_gpu_wait_for_kernels_and_kernels_for_copies(folder):
    cuda, index = FakeCuda(), packed.open_index(folder)
    tier = tiers.PinnedTier(folder, index, torch.device("cpu"), cuda)
    (slot,) = tier.slots(1)
    tier.read(3, slot, 0, index.stride)
    assert cuda.log == []  # nothing used the slot before
    tier.acquire(slot)
    tier.release(slot)
    tier.read(4, slot, 0, index.stride)
    assert cuda.log == ["model waits for side", "side waits for model"]
    index.check(4, slot)
