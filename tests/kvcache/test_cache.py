"""The cache keeps what was committed, in order, whatever was appended and dropped in between."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.kvcache import cache as cache_module
from specdec.kvcache.cache import KVCache
from specdec.kvcache.mask import Chunk


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BLOCK", 4)


def entries(tokens: list[list[int]]) -> torch.Tensor:
    """Keys [B, 1, T, 2] that spell out their token."""
    return torch.tensor(tokens, dtype=torch.float)[:, None, :, None].expand(-1, 1, -1, 2)


def fill(cache: KVCache, tokens: list[list[int]], lo: int = 0, hi: int = 3) -> None:
    positions = torch.tensor(cache.rows)[:, None] + torch.arange(len(tokens[0]))
    cache.register(lo, positions)
    for layer in range(lo, hi):
        cache.append(layer, entries(tokens), -entries(tokens))


def contents(cache: KVCache, layer: int, row: int) -> list[int]:
    found = cache.of_layer(layer, row)
    assert torch.equal(found["k"], -found["v"])
    return found["k"][: cache.rows[row], 0, 0].int().tolist()


def test_trim_touches_only_its_layers_and_never_committed_slots() -> None:
    cache = KVCache(3, 1)
    fill(cache, [[1, 2, 3]])
    cache.commit([[0, 1, 2]])
    fill(cache, [[7, 8]], 1, 2)
    assert cache.lengths == [3, 5, 3]
    cache.trim(2, 1, 2)
    assert cache.lengths == [3, 3, 3]
    with pytest.raises(ValueError, match="uncommitted"):
        cache.trim(1)


def test_a_single_token_after_an_even_batch_needs_no_mask_until_the_window_bites() -> None:
    cache = KVCache(1, 1)
    fill(cache, [[1, 2, 3]], 0, 1)
    cache.commit([[0, 1, 2]])
    mask = cache.register(0, torch.tensor([[3]]))
    assert mask.bool_mask() is None and mask.bool_mask(4) is None and mask.bool_mask(3) is not None


def test_entries_with_gradients_are_seen_by_autograd() -> None:
    cache = KVCache(1, 1)
    fill(cache, [[1, 2]], 0, 1)
    k = entries([[3]]).clone().requires_grad_()
    keys, _ = cache.append(0, k, k)
    keys.sum().backward()
    assert k.grad is not None and k.grad.abs().sum() > 0


def write(cache: KVCache, rows: list[list[int]]) -> None:
    """As a runtime that fills the slots itself, with another number of tokens for each row."""
    starts = cache.rows
    cache.claim(0, 3, [len(row) for row in rows], [(1, 2)], torch.float)
    for data, start, row in zip(cache.data, starts, rows, strict=True):
        data[0, :, :, start : start + len(row)] = entries([row])[0]
        data[1, :, :, start : start + len(row)] = -entries([row])[0]


def rows_of(batch: int) -> KVCache:
    """A cache whose rows have one buffer for all layers."""
    return KVCache(3, batch, layers=[range(3)])


def test_a_row_that_comes_goes_or_grows_copies_no_other_row() -> None:
    cache, guest = rows_of(2), rows_of(1)
    write(cache, [[1, 2, 3], [4]])
    cache.commit([[0, 1, 2], [0]])
    write(guest, [[9, 8]])
    guest.commit([[0, 1]])
    begins = [data.data_ptr() for data in (*cache.data, *guest.data)]
    cache.join(guest)
    cache.select([2, 0])
    assert [data.data_ptr() for data in cache.data] == [begins[2], begins[0]]
    write(cache, [[7], [5, 6]])
    cache.commit([[0], [0, 1]])  # the second has outgrown its buffer
    assert contents(cache, 1, 0) == [9, 8, 7] and contents(cache, 1, 1) == [1, 2, 3, 5, 6]
    assert cache.data[0].data_ptr() == begins[2]


@pytest.mark.parametrize("layers", [None, [range(3)]])
def test_a_row_is_copied_as_far_as_it_is_shared_and_joins_rows_without_entries(layers: list[range] | None) -> None:
    cache = KVCache(3, 2, layers=layers)
    fill(cache, [[1, 2, 3], [4, 5, 6]])
    cache.commit([[0, 1, 2], [0]])
    fill(cache, [[7, 8], [9, 10]])
    cache.commit([[0], [0, 1]])
    assert cache.token_bytes == 2 * 3 * 2 * 4
    joined = KVCache(3, 1, layers=layers)
    joined.join(cache.copy(1, 2))
    joined.join(KVCache(3, 1, layers=layers))
    joined.join(cache.take(0))
    assert joined.rows == [0, 2, 0, 4]
    mask, new = joined.register(0, torch.tensor(joined.rows)[:, None]), entries([[11], [12], [13], [14]])
    seen, visible = [joined.append(layer, new, -new)[0] for layer in range(3)], mask.bool_mask()
    for row, expected in enumerate(([11], [4, 9, 12], [13], [1, 2, 3, 7, 14])):
        for keys in seen:
            assert keys[row, 0, visible[row, 0, 0], 0].int().tolist() == expected


def test_masks_of_rows_with_trees_and_windows() -> None:
    cache = KVCache(1, 2)
    fill(cache, [[1, 2, 3], [4, 5, 6]], 0, 1)
    cache.commit([[0, 1, 2], [0]])
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    mask = cache.register(0, torch.tensor([[3, 4, 4], [1, 2, 2]]), tree)
    full, near = mask.bool_mask(), mask.bool_mask(2)
    assert full is not None and near is not None
    assert full[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    assert full[1, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]
    assert near[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert near[1, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]
    chain = cache.register(0, torch.tensor([[3, 4, 1, 2, 3]]), counts=[2, 3])
    assert chain.chains and chain.tree(1, None) is None
    ragged = cache.register(0, torch.tensor([[3, 1, 2, 2]]), counts=[1, 3], trees=[None, tree])
    found = ragged.tree(1, 1)
    assert not ragged.chains and found is not None and found.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_chunk_and_a_window_of_one_size_have_masks_of_their_own() -> None:
    assert Chunk(2) != 2 and Chunk(2) != 2 and Chunk(2) == Chunk(2) and len({2, Chunk(2), Chunk(2)}) == 2
    positions = torch.arange(4)[None]
    for sizes in (2, Chunk(2)), (Chunk(2), 2):
        mask, found = KVCache(1).register(0, positions), {}
        for size in sizes:
            seen = mask.bool_mask(size)
            assert seen is not None
            found[type(size)] = seen[0, 0].int().tolist()
        assert found[int] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
        assert found[Chunk] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("layers", [None, [range(2)]])
def test_buffers_begin_with_the_room_that_is_expected(layers: list[range] | None) -> None:
    cache = KVCache(2, 1, layers=layers)
    cache.expect([10])

    def add(count: int) -> int:
        for layer in range(2):
            cache.append(layer, torch.ones(1, 1, count, 8), torch.ones(1, 1, count, 8))
        first = next(iter(cache.entries[0].buffers.values()))
        assert first.data_ptr() % 64 == 0
        return first.data_ptr()

    first = add(3)
    assert cache.entries[0].slots == 12
    assert not any(buffer[..., 3:, :].any() for buffer in cache.entries[0].buffers.values())
    assert add(9) == first  # not moved
    add(1)
    assert cache.entries[0].slots == 16


@pytest.mark.parametrize("layers", [None, [range(2)]])
def test_a_row_of_a_known_limit_grows_in_place_and_holds_what_it_has_filled(layers: list[range] | None) -> None:
    cache, size = KVCache(2, 1, layers=layers, limit=1 << 20), 64
    begin = resident()

    def add(count: int) -> list[int]:
        for layer in range(2):
            cache.append(layer, torch.ones(1, 4, count, size), torch.ones(1, 4, count, size))
        cache.commit([range(count)])
        return [buffer.data_ptr() for buffer in cache.entries[0].buffers.values()]

    first = add(3)
    assert cache.nbytes == 4 * cache.token_bytes and cache.token_bytes == 2 * 2 * 4 * size * 4
    for end in (400, 401, 5000):
        assert add(end - cache.committed) == first
        assert cache.nbytes == -(-end // 4) * 4 * cache.token_bytes
    assert cache.capacities([5001]) == [5004]
    assert resident() - begin < cache.nbytes + (8 << 20) < 32 << 20
    assert all(buffer.nbytes > 1 << 30 for buffer in cache.entries[0].buffers.values())


def resident() -> int:
    """Return the bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def test_a_row_begins_without_a_reserve_where_there_are_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, zeros = list[int](), cache_module.zeros

    def refused(shape: tuple[int, ...], *kind: Any) -> torch.Tensor:
        sizes.append(shape[-2])
        if shape[-2] > 1000:
            raise OSError("no addresses")
        return zeros(shape, *kind)

    monkeypatch.setattr(cache_module, "zeros", refused)
    cache = KVCache(3, 1, layers=[range(3)], limit=1 << 20)
    for token in range(13):
        fill(cache, [[token]])
        cache.commit([[0]])
    assert contents(cache, 1, 0) == [*range(13)]
    assert sizes == [(1 << 20) + 4, 4, (1 << 20) + 4, 8, (1 << 20) + 4, 12, (1 << 20) + 4, 16]
    copied = cache.copy(0, 9)
    assert contents(copied, 2, 0) == [*range(9)] and copied.entries[0].held == cache_module.PAGE


def test_a_kept_text_shares_the_buffers_and_holds_only_its_tokens() -> None:
    cache = KVCache(3, 2, layers=[range(3)], limit=100)
    cache.expect([60, 60])
    fill(cache, [[*range(20)], [*range(20, 40)]])
    cache.commit([range(20), range(20)])
    assert [row.held for row in cache.entries] == [60, 60]
    kept = cache.take_compact(1)
    assert kept.data[0].data_ptr() == cache.data[1].data_ptr() and kept.entries[0].held == 32
    kept.expect([48])
    fill(kept, [[*range(40, 60)]])
    kept.commit([range(20)])
    assert contents(kept, 2, 0) == [*range(20, 60)] and kept.entries[0].held == 48
    assert contents(cache, 2, 1) == [*range(20, 40)]
