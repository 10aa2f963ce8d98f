"""Packed weights move to large pages between requests, and keep their content."""

import gc
import mmap
import sys
from pathlib import Path

import pytest
import torch

from specdec.runtimes.native import library, pages

pytestmark = pytest.mark.skipif(not library.runs(), reason="no native kernels here")


@pytest.fixture(autouse=True)
def moving(monkeypatch: pytest.MonkeyPatch) -> pages._Moving:
    """Forget the memory of other tests."""
    own = pages._Moving()
    monkeypatch.setattr(pages, "_moving", own)
    return own


def collapsing(monkeypatch: pytest.MonkeyPatch, answer: int) -> list[int]:
    """Let the system answer ``answer`` to each request for a large page; return the addresses that were asked for."""
    asked: list[int] = []

    class Library:
        def specdec_collapse(self, at: int) -> int:
            asked.append(at)
            return answer

    monkeypatch.setattr(library, "load", Library)
    return asked


def settled() -> int:
    """Settle until nothing is left to do; return the number of calls."""
    calls = 1
    while pages.settle():
        calls += 1
        assert calls < 1000
    return calls


def test_memory_begins_at_a_large_page_and_keeps_its_content() -> None:
    memory = pages.allocate(2 * pages.PAGE + 100)
    assert memory.numel() == 2 * pages.PAGE + 100 and memory.data_ptr() % pages.PAGE == 0
    assert pages.fill(memory) in (False, True)
    memory[:] = torch.arange(memory.numel()) % 251
    settled()
    assert torch.equal(memory, (torch.arange(memory.numel()) % 251).to(torch.uint8))


def test_each_whole_page_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = collapsing(monkeypatch, 1)
    memory = pages.allocate(3 * pages.PAGE + 100)
    assert settled() < 1000
    assert asked == [memory.data_ptr() + i * pages.PAGE for i in range(3)]
    assert not pages.settle() and len(asked) == 3


def test_views_keep_memory_that_waits_and_freed_memory_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = collapsing(monkeypatch, 1)
    kept, freed = pages.allocate(pages.PAGE), pages.allocate(pages.PAGE)
    view = kept[10:20]
    at = kept.data_ptr()
    del kept, freed
    gc.collect()
    settled()
    assert asked == [at] and view.numel() == 10


def test_a_system_without_large_pages_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = collapsing(monkeypatch, 0)
    memory = pages.allocate(100 * pages.PAGE)
    settled()
    assert len(asked) == pages.MOST_FAILURES and memory.numel()
    more = pages.allocate(pages.PAGE)
    assert not pages.settle() and len(asked) == pages.MOST_FAILURES and more.numel()


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="no native kernels here")
def test_memory_that_nothing_was_written_to_gets_no_pages() -> None:
    memory = pages.allocate(64 * pages.PAGE)
    memory[: pages.PAGE] = 1
    before = resident()
    settled()
    assert resident() - before < 32 * pages.PAGE and memory.numel()
