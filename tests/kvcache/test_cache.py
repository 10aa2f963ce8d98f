"""The cache keeps what was committed, in order, whatever was appended and dropped in between."""

from __future__ import annotations

import pytest
import torch

from specdec.kvcache import cache as cache_module
from specdec.kvcache.cache import KVCache


def entries(tokens: list[list[int]]) -> torch.Tensor:
    """Keys [B, 1, T, 2] that spell out their token."""
    return torch.tensor(tokens, dtype=torch.float)[:, None, :, None].expand(-1, 1, -1, 2)


def fill(cache: KVCache, tokens: list[list[int]], lo: int = 0, hi: int = 3) -> None:
    positions = torch.tensor(cache.rows)[:, None] + torch.arange(len(tokens[0]))
    cache.register(lo, positions)
    for layer in range(lo, hi):
        cache.append(layer, entries(tokens), -entries(tokens))


def contents(cache: KVCache, layer: int, row: int) -> list[int]:
    keys, values = cache.keys[layer], cache.values[layer]
    assert keys is not None and values is not None and torch.equal(keys, -values)
    return keys[row, 0, : cache.rows[row], 0].int().tolist()


def test_trim_touches_only_its_layers_and_never_committed_slots() -> None:
    cache = KVCache(3, 1, block=4)
    fill(cache, [[1, 2, 3]])
    cache.commit([[0, 1, 2]])
    fill(cache, [[7, 8]], 1, 2)
    assert cache.lengths == [3, 5, 3]
    cache.trim(2, 1, 2)
    assert cache.lengths == [3, 3, 3]
    with pytest.raises(ValueError, match="uncommitted"):
        cache.trim(1)


def test_keep_compacts_a_tree_path_and_growth_keeps_contents() -> None:
    cache = KVCache(3, 1, block=2)
    expected: list[int] = []
    for step in range(5):
        tokens = [10 * step + i for i in range(4)]
        fill(cache, [tokens])
        cache.commit([[0, 3]])
        expected += [tokens[0], tokens[3]]
    for layer in range(3):
        assert contents(cache, layer, 0) == expected


def test_ragged_rows_are_left_packed_and_their_holes_are_hidden() -> None:
    cache = KVCache(3, 2, block=4)
    fill(cache, [[1, 2, 3], [4, 5, 6]])
    cache.commit([[0, 1, 2], [0]])
    fill(cache, [[7, 8], [9, 10]])
    cache.commit([[0], [0, 1]])
    assert contents(cache, 2, 0) == [1, 2, 3, 7] and contents(cache, 2, 1) == [4, 9, 10]
    visible = cache.register(0, torch.tensor([[4], [3]])).bool_mask()
    assert visible is not None
    assert visible[:, 0, 0].tolist() == [[True] * 5, [True, True, True, False, True]]
    cache.select([1])
    assert cache.committed == 3 and contents(cache, 0, 0) == [4, 9, 10]


def test_mask_follows_tree_and_window() -> None:
    cache = KVCache(1, 1, block=8)
    fill(cache, [[1, 2, 3]], 0, 1)
    cache.commit([[0, 1, 2]])
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    mask = cache.register(0, torch.tensor([[3, 4, 4]]), tree)
    full, near = mask.bool_mask(), mask.bool_mask(2)
    assert full is not None and near is not None
    assert full[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    assert near[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 1]]


def test_a_single_token_after_an_even_batch_needs_no_mask_until_the_window_bites() -> None:
    cache = KVCache(1, 1)
    fill(cache, [[1, 2, 3]], 0, 1)
    cache.commit([[0, 1, 2]])
    mask = cache.register(0, torch.tensor([[3]]))
    assert mask.bool_mask() is None and mask.bool_mask(4) is None and mask.bool_mask(3) is not None


def test_rows_come_and_go_in_the_room_of_one_buffer() -> None:
    def write(cache: KVCache, tokens: list[list[int]]) -> None:
        """As a runtime that fills reserved slots itself."""
        cache.register(0, torch.tensor(cache.rows)[:, None] + torch.arange(len(tokens[0])))
        start, end = cache.claim(0, 3, len(tokens[0]), 1, 2, torch.float), cache.lengths[0]
        for keys, values in zip(cache.keys, cache.values, strict=True):
            assert keys is not None and values is not None and keys[0].is_contiguous()
            keys[:, :, start:end], values[:, :, start:end] = entries(tokens), -entries(tokens)

    cache, guests = KVCache(3, 4, block=4), KVCache(3, 2, block=4)
    write(cache, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    cache.commit([[0, 1, 2], [0], [0, 1], [0]])
    room = cache.buffer
    cache.select([0, 3])  # the last takes the place of one that ended
    assert [contents(cache, 1, b) for b in range(2)] == [[1, 2, 3], [10]] and cache.buffer is room
    write(guests, [[13, 14], [15, 16]])
    guests.commit([[0, 1], [0]])
    cache.join(guests)
    assert cache.buffer is room and cache.rows == [3, 1, 2, 1]
    write(cache, [[17], [18], [19], [20]])
    cache.commit([[0]] * 4)
    expected = [[1, 2, 3, 17], [10, 18], [13, 14, 19], [15, 20]]
    for layer in range(3):
        assert [contents(cache, layer, b) for b in range(4)] == expected
    visible = cache.register(0, torch.tensor([[4], [2], [3], [2]])).bool_mask()
    assert visible is not None and visible[:, 0, 0].sum(-1).tolist() == [5, 3, 4, 3]
    cache.select([2, 1, 0])  # rows that come from where others go
    cache.join(guests)  # too many for the room
    assert [contents(cache, 2, b) for b in range(5)] == [expected[2], expected[1], expected[0], [13, 14], [15]]


def test_rows_join_from_a_cache_whose_entries_lie_in_separate_buffers() -> None:
    cache, guests = KVCache(3, 2, block=4), KVCache(3, 1, block=4)
    cache.claim(0, 3, 0, 1, 2, torch.float)  # one buffer for all layers
    fill(cache, [[1, 2], [3, 4]])
    cache.commit([[0, 1], [0]])
    fill(guests, [[5, 6, 7]])
    guests.commit([[0, 1, 2]])
    cache.join(guests)
    fill(cache, [[8, 9]] * 3)
    cache.commit([[1], [0], [0, 1]])
    for layer in range(3):
        assert [contents(cache, layer, b) for b in range(3)] == [[1, 2, 9], [3, 8], [5, 6, 7, 8, 9]]


@pytest.mark.parametrize("one_piece", [False, True])
def test_buffers_begin_with_the_room_that_is_expected(one_piece: bool) -> None:
    cache = KVCache(num_layers=2, batch=1, block=4)
    cache.expected = [10]

    def add(count: int) -> int:
        if one_piece:
            cache.claim(0, 2, count, 1, 8, torch.float32)
        else:
            for layer in range(2):
                cache.append(layer, torch.ones(1, 1, count, 8), torch.ones(1, 1, count, 8))
        keys = cache.keys[0]
        assert keys is not None and keys.data_ptr() % 64 == 0
        return keys.data_ptr()

    first = add(3)
    assert cache.keys[0].shape[2] == 12 and not cache.keys[0][:, :, 3:].any()  # type: ignore[union-attr]
    assert add(9) == first  # not moved
    add(1)
    assert cache.keys[0].shape[2] == 16  # type: ignore[union-attr]


def test_no_more_is_taken_ahead_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_EXPECTED", 2 * 2 * 3 * 64 * 8)  # eight slots of two layers and three rows
    cache = KVCache(num_layers=2, batch=3, block=4)
    cache.expected = [10_000_000] * 3
    cache.claim(0, 2, 3, 1, 16, torch.float32)
    assert cache.keys[0] is not None and cache.keys[0].shape[2] == 8
