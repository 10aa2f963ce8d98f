"""Rows with buffers of their own: what joins, leaves or grows copies no other row."""

from __future__ import annotations

import pytest
import torch

from specdec.kvcache.cache import KVCache
from specdec.kvcache.rows import RowCache


def entries(tokens: list[int]) -> torch.Tensor:
    """Keys [1, T, 2] of a row that spell out its tokens."""
    return torch.tensor(tokens, dtype=torch.float)[None, :, None].expand(1, -1, 2)


def write(cache: RowCache, rows: list[list[int]]) -> None:
    """As a runtime that fills the slots itself, with another number of tokens for each row."""
    starts = list(cache.rows)
    cache.claim_each(0, 3, [len(row) for row in rows], 1, 2, torch.float)
    for data, start, row in zip(cache.data, starts, rows, strict=True):
        assert data is not None
        data[0, :, :, start : start + len(row)] = entries(row)
        data[1, :, :, start : start + len(row)] = -entries(row)


def contents(cache: RowCache, row: int) -> list[int]:
    data = cache.data[row]
    assert data is not None and torch.equal(data[0], -data[1]) and torch.equal(data[0, 0], data[0, 2])
    return data[0, 1, 0, : cache.rows[row], 0].int().tolist()


def test_rows_have_as_many_tokens_as_they_have() -> None:
    cache = RowCache(3, 2, block=4)
    write(cache, [[1, 2, 3], [4]])
    cache.commit([[0, 1, 2], [0]])
    write(cache, [[5], [6, 7, 8]])
    assert cache.lengths == [6] * 3
    cache.commit([[0], [0, 2]])
    assert cache.rows == [4, 3] and contents(cache, 0) == [1, 2, 3, 5] and contents(cache, 1) == [4, 6, 8]


def test_a_row_that_comes_goes_or_grows_copies_no_other_row() -> None:
    cache, guest = RowCache(3, 2, block=4), RowCache(3, block=4)
    write(cache, [[1, 2, 3], [4]])
    cache.commit([[0, 1, 2], [0]])
    write(guest, [[9, 8]])
    guest.commit([[0, 1]])
    begins = [data.data_ptr() for data in (*cache.data, *guest.data) if data is not None]
    cache.join(guest)
    cache.select([2, 0])
    assert [data.data_ptr() for data in cache.data if data is not None] == [begins[2], begins[0]]
    write(cache, [[7], [5, 6]])
    cache.commit([[0], [0, 1]])  # the second has outgrown its buffer
    assert contents(cache, 0) == [9, 8, 7] and contents(cache, 1) == [1, 2, 3, 5, 6]
    assert cache.data[0] is not None and cache.data[0].data_ptr() == begins[2]


@pytest.mark.parametrize("kind", [RowCache, KVCache])
def test_a_row_is_copied_as_far_as_it_is_shared_and_joins_rows_without_entries(kind: type[KVCache]) -> None:
    cache = kind(3, 2, block=4)
    for tokens, paths in (([[1, 2, 3], [4, 5, 6]], [[0, 1, 2], [0]]), ([[7, 8], [9, 10]], [[0], [0, 1]])):
        cache.register(0, torch.tensor(cache.rows)[:, None] + torch.arange(len(tokens[0])))
        for layer in range(3):
            new = torch.stack([entries(row) for row in tokens])
            cache.append(layer, new, -new)
        cache.commit(paths)
    assert cache.token_bytes == 2 * 3 * 2 * 4
    joined = kind(3, 1, block=4)
    joined.join(cache.copy(1, 2))
    joined.join(kind(3, 1, block=4))
    joined.join(cache.take(0))
    assert joined.rows == [0, 2, 0, 4]
    step = torch.tensor(joined.rows)[:, None]
    mask = joined.register(0, step)
    new = torch.tensor([11.0, 12.0, 13.0, 14.0])[:, None, None, None].expand(-1, 1, 1, 2)
    seen = [joined.append(layer, new, -new)[0] for layer in range(3)]
    visible = mask.bool_mask()
    assert visible is not None
    for row, expected in enumerate(([11], [4, 9, 12], [13], [1, 2, 3, 7, 14])):
        for keys in seen:
            assert keys[row, 0, visible[row, 0, 0], 0].int().tolist() == expected


def test_masks_of_rows_with_trees_and_windows() -> None:
    cache = RowCache(1, 2)
    cache.rows, cache.committed, cache.lengths = [3, 1], 3, [3]
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    mask = cache.register(0, torch.tensor([[3, 4, 4], [1, 2, 2]]), tree)
    full, near = mask.bool_mask(), mask.bool_mask(2)
    assert full is not None and near is not None
    assert full[0, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    assert full[1, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]
    assert near[0, 0].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert near[1, 0].int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0]]
    chain = cache.register(0, torch.tensor([[3, 4, 1, 2, 3]]), counts=[2, 3])
    assert chain.causal and chain.tree(1, None) is None
    ragged = cache.register(0, torch.tensor([[3, 1, 2, 2]]), counts=[1, 3], trees=[None, tree])
    found = ragged.tree(1, 1)
    assert not ragged.causal and found is not None and found.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
