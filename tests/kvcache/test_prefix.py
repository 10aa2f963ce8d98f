"""Cached prefixes: a search finds what comparing all texts would, and compares few."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from spies import noted
from tiny import tiny_model
from zoo import PROMPTS, finish, plain_engine, step

from specdec import SpecDecoder
from specdec.base.sequences import common_prefix
from specdec.engine.request import Request
from specdec.kvcache import disk, prefix
from specdec.kvcache.cache import KVCache
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore
from specdec.runtimes.transformers import TransformersTarget


class Counted(KVCache):
    """A cache of one row, without entries, that can be resumed at ``stops`` (None: anywhere) and at its end."""

    asked = 0

    def __init__(self, count: int, stops: Sequence[int] | None = None) -> None:
        super().__init__(1, 1)
        self.entries[0].count, self.stops = count, stops

    def checkpoints(self, row: int) -> set[int]:
        return set(self.stops or ())

    def resumable(self, row: int, count: int) -> int:
        Counted.asked += 1
        if self.stops is None or count == self.rows[0]:
            return count
        return max((n for n in self.stops if n <= count), default=0)

    @property
    def nbytes(self) -> int:
        Counted.asked += 1
        return 100 * self.rows[0]


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_search_finds_what_comparing_all_texts_would(recurrent: bool) -> None:
    draw, store, held = random.Random(3), PrefixStore(), list[tuple[str | None, list[int]]]()
    for turn in range(1000):
        ids = [draw.choice((1, 2, 256, 70_000)) for _ in range(draw.randrange(9))]
        scope = draw.choice((None, "", "a", "b"))
        texts = [each for each in store.entries if each.scope == scope]
        alike = [common_prefix(each.ids, ids) for each in texts]
        counts = [each.cache.resumable(0, n) for each, n in zip(texts, alike, strict=True)]
        best, most, shared = store.longest(ids, scope)
        assert (most, shared) == (max(counts, default=0), max(alike, default=0))
        assert (best is None) == (most == 0)
        if best is not None:
            assert best.cache.resumable(0, common_prefix(best.ids, ids)) == most and store.entries[-1] is best
        if best is not None and turn % 7 == 0:
            assert store.take(best) is best.cache and best not in store.entries
        elif turn % 11 == 0:
            store.drop()
        else:
            stops = [n for n in range(1, len(ids)) if draw.random() < 0.3] if recurrent else None
            store.add(ids, Counted(len(ids), stops), scope)
        held = [(each.scope, each.ids) for each in store.entries]
        assert len({(scope, *ids) for scope, ids in held}) == len(held)
        assert store.nbytes == sum(each.cache.nbytes for each in store.entries)
    store.clear()
    assert (store.nbytes, store.entries, store._points, store._holders) == (0, [], [], {})


@pytest.mark.parametrize("stops", [None, [300]])
def test_a_search_compares_few_texts_and_totals_none(stops: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations with one system prompt, whose users say similar things."""
    draw, store = random.Random(0), PrefixStore()
    texts = [[*range(1000, 1300), *(draw.randrange(9) for _ in range(300))] for _ in range(1024)]
    for ids in texts:
        store.add(ids, Counted(len(ids), stops))
    compared = noted(monkeypatch, prefix, "common_prefix", lambda *given: None)
    Counted.asked = 0
    for ids in ([*texts[7][:450], 3, 3], [*range(1000, 1300), 77], [5, 6], texts[9]):
        compared.clear()
        best, most, shared = store.longest(ids)
        assert len(compared) <= 6 and (most == shared or stops)
        assert (most, shared) == (0, 0) if ids[0] == 5 else shared >= most >= 300 and best is not None
    assert store.nbytes == 100 * 600 * 1024 and Counted.asked <= 4


def looked_up(self: Any, ids: Sequence[int], *more: Any) -> int:
    """How many tokens a search is for."""
    return len(ids)


def test_a_request_that_waits_for_memory_is_not_looked_up_and_nothing_is_dropped_for_it(monkeypatch) -> None:
    monkeypatch.setattr("specdec.kvcache.cache.BLOCK", 16)
    target = TransformersTarget(tiny_model())
    engine = plain_engine(target, kv_memory=1 << 30, prefixes=PrefixStore())
    engine.submit(Request(PROMPTS[0], 1))
    step(engine)
    engine.submit(Request([9, 8, 7, *range(3, 20)], 40))
    step(engine)
    stats = engine.stats()
    engine.scheduler.memory.limit = stats.kv_bytes + 40 * engine.scheduler.memory.token_bytes
    looked = noted(monkeypatch, PrefixStore, "longest", looked_up)
    waiting = Request([*PROMPTS[0], *range(40, 80)], 2)
    engine.submit(waiting)
    steps = 0
    while engine.scheduler.waiting and steps < 10:
        step(engine)
        steps += 1
    assert steps == 10 and not looked and engine.stats().prefix_bytes == stats.prefix_bytes > 0
    finish(engine)
    assert len(looked) == 1 and waiting.metrics.num_cached_tokens == len(PROMPTS[0])


def test_the_disk_is_asked_for_more_than_there_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK", 16)
    made = SpecDecoder(tiny_model(), None, "none", runtime="transformers")
    prompt = [3 + n * n % 90 for n in range(70)]
    looked = noted(monkeypatch, PrefixDisk, "longest", looked_up)
    with made.engine(prefix_cache=tmp_path) as engine:
        for text in (prompt, [*prompt, 5], [*prompt[:40], 7], [*prompt[:40], *range(9, 40)]):
            for _ in engine.submit(made.request(text, max_new_tokens=2, ignore_eos=True)):
                pass
    assert looked == [69, 70]
