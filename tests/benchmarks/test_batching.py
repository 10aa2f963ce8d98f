"""Sequences side by side: the same tokens with and without drafts, and a rate of those behind the first ones."""

from __future__ import annotations

from pathlib import Path

from batching import SpecdecRows
from tiny import save_tiny


def test_rows_are_decoded_side_by_side(tmp_path: Path) -> None:
    engine = SpecdecRows()
    engine.load(str(save_tiny(tmp_path)), 1, 64, "", "prompt-lookup", 2)
    plain, drafted = (engine.side_by_side([[5, 6, 7] * 3, [8, 9]], 6, draft) for draft in (False, True))
    assert plain["tokens"] == drafted["tokens"] and [len(tokens) for tokens in plain["tokens"]] == [6, 6]
    assert plain["rate"] > 0 and drafted["rate"] > 0
