"""Prefixes on disk: later engines begin with them bit for bit, and no file, full disk or other process harms anyone."""

import errno
import gc
import hashlib
import os
import resource
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from servers import until
from spies import noted
from targets import needs_native
from tiny import SIZES, change_unseen, model_of, tiny_model

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError, SpecDecWarning
from specdec.engine.engine import Engine
from specdec.kvcache import disk
from specdec.kvcache.cache import KVCache
from specdec.kvcache.disk import PrefixDisk
from specdec.kvcache.prefix import PrefixStore

PROMPT = [(7 * n * n + 3) % 90 + 3 for n in range(70)]
ASK: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "CHUNK", 16)


def decoder(runtime: str = "transformers", scale: float = 1.0) -> SpecDecoder:
    native = runtime.startswith("native")
    model = tiny_model(max_position_embeddings=512, **(SIZES if native else {}))
    model.lm_head.weight.data *= scale
    how: Any = (
        {"runtime": "native", "kv_cache": "int8" if "int8" in runtime else "auto"} if native else {"runtime": runtime}
    )
    return SpecDecoder(model.bfloat16() if native else model, None, "prompt-lookup", **how)


@contextmanager
def engine_of(made: SpecDecoder, folder: Path, size: int = 1 << 30) -> Iterator[Engine]:
    with made.engine(prefix_cache=folder, prefix_cache_size=size, max_rows=4) as engine:
        yield engine


def answer(engine: Engine, made: SpecDecoder, prompt: list[int], **how: Any) -> tuple[list[int], int]:
    """The new tokens, and how many of the prompt were cached."""
    handle = engine.submit(made.request(prompt, **ASK | how))
    if engine._work is None:
        list(engine.steps())
    return [token for event in handle for token in event.tokens], handle.metrics.num_cached_tokens


def forget(engine: Engine) -> None:
    """Drop what is in memory, as a restart does."""
    while engine.scheduler.memory.prefixes.drop():
        pass


def finish(engine: Engine) -> None:
    """Wait until everything is written."""
    done, kept = threading.Event(), engine.scheduler.disk
    kept.jobs.put(done.set)
    assert done.wait(300)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def held(folder: Path) -> int:
    """Bytes of the chunks in a folder. One that the writing thread removes meanwhile has none."""
    total = 0
    for path in files(folder):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize("runtime", ["transformers", "native", "native int8"])
def test_a_later_engine_begins_with_what_an_earlier_one_ran(runtime: str, tmp_path: Path) -> None:
    made = decoder(runtime)
    prompts = [[*PROMPT[:n], 5] for n in (70, 40, 66)]
    plain = [made.with_drafter("none").generate(prompt, **ASK).token_ids for prompt in prompts]
    with engine_of(made, tmp_path) as engine:  # rows of different lengths together
        handles = [engine.submit(made.request(prompt, **ASK)) for prompt in prompts]
        assert [[t for event in handle for t in event.tokens] for handle in handles] == plain
    assert len(files(tmp_path)) >= 5
    again = decoder(runtime)
    with engine_of(again, tmp_path) as engine:
        for prompt, right in zip(prompts, plain, strict=True):
            found, cached = answer(engine, again, prompt)
            assert found == right and cached >= len(prompt) // 16 * 16 - 16
        longer = prompts[0] + plain[0] + [4, 9]  # a turn that goes on from the answer
        right = made.with_drafter("none").generate(longer, **ASK).token_ids
        assert answer(engine, again, longer)[0] == right
        stats, kept = engine.stats(), engine.scheduler.disk
    assert stats.disk_hits >= 64 and stats.disk_bytes and stats.disk_queries > stats.disk_hits
    assert kept is not None and kept.figures()["disk_bytes"] == held(tmp_path)
    with engine_of(decoder(runtime), tmp_path) as engine:
        assert answer(engine, again, longer)[1] >= 80


def test_the_text_of_a_stopped_answer_is_gone_on_with(tmp_path: Path) -> None:
    """A client stops an answer, at a token or by leaving, and sends what it has with more."""
    made, stop = decoder("native"), 3
    right = made.with_drafter("none").generate(PROMPT, **ASK).token_ids
    more = [*PROMPT, *right[:stop], 8, 8, 9]
    plain = made.with_drafter("none").generate(more, **ASK).token_ids
    with engine_of(made, tmp_path) as engine:
        left = engine.submit(made.request(PROMPT, **ASK | {"max_new_tokens": 400}))
        next(iter(left))
        left.cancel()
        cut = answer(engine, made, PROMPT, max_new_tokens=stop)[0]
        assert cut == right[:stop]
        found, cached = answer(engine, made, more)
        assert found == plain and cached >= len(PROMPT)
    with engine_of(decoder("native"), tmp_path) as engine:
        assert answer(engine, made, more)[0] == plain


def test_scopes_and_models_have_prefixes_of_their_own(tmp_path: Path) -> None:
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        answer(engine, made, PROMPT, scope="a")
    for other, scope, cached in ((made, "a", True), (made, "b", False), (decoder(scale=2.0), "a", False)):
        with engine_of(other, tmp_path) as engine:
            assert bool(answer(engine, other, PROMPT, scope=scope)[1]) == cached


def test_every_scope_has_chunks_of_its_own(tmp_path: Path) -> None:
    """The default owner's, and those of named ones, keep their names from version to version."""
    kept = PrefixDisk(tmp_path, 1 << 20, "model")
    try:
        names = {scope: next(kept._names(range(16), scope)) for scope in (None, "", "\n", "a", "ÿ")}
        assert len({*names.values()}) == len(names)
        ids = np.arange(16, dtype=np.int64).tobytes()
        for scope, text in (None, ""), ("a", "a"):
            assert names[scope] == hashlib.sha256(f"model\n{disk.LAYOUT} 16\n{text}\n".encode() + ids).hexdigest()
    finally:
        kept.close()


@pytest.mark.parametrize("how", ["flipped", "cut", "renamed", "gone"])
def test_a_damaged_file_is_skipped_and_replaced(how: str, tmp_path: Path) -> None:
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        right, _ = answer(engine, made, PROMPT)
    by_age = sorted(files(tmp_path), key=lambda path: path.stat().st_mtime_ns)  # the first chunk was used last
    path, other = by_age[-2], by_age[-1]
    data = path.read_bytes()
    if how == "renamed":
        path.write_bytes(other.read_bytes())
    elif how != "gone":
        flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        path.write_bytes(flipped if how == "flipped" else data[:-20])
    with engine_of(made, tmp_path) as engine:
        if how == "gone":
            path.unlink()
        with pytest.warns(SpecDecWarning, match="is damaged and is removed") as said:
            found, cached = answer(engine, made, PROMPT)
    assert found == right and cached == 16 and len(said) == 1
    with engine_of(made, tmp_path) as engine:
        assert answer(engine, made, PROMPT) == (right, 64)


def test_a_chunk_that_made_room_since_it_was_found_is_no_damage(tmp_path, monkeypatch) -> None:
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        right, _ = answer(engine, made, PROMPT)
    with engine_of(made, tmp_path) as engine, warnings.catch_warnings():
        warnings.simplefilter("error", SpecDecWarning)
        kept, found = engine.scheduler.disk, list[list[str]]()

        def late(ids: list[int], scope: str | None) -> list[str]:
            found.append(PrefixDisk._there(kept, ids, scope))
            if len(found) == 1:  # what is to be read
                kept.sizes.pop(found[-1][-1])
            return found[-1]

        monkeypatch.setattr(kept, "_there", late)
        assert answer(engine, made, PROMPT) == (right, 48) and 4 in map(len, found)


def test_the_limit_is_kept_and_what_is_used_stays(tmp_path: Path) -> None:
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        answer(engine, made, PROMPT[:18], max_new_tokens=2)
    one = files(tmp_path)[0].stat().st_size
    limit = 6 * one + one // 2
    (tmp_path / "note.txt").write_text("not a chunk")
    with engine_of(made, tmp_path, limit) as engine:
        for turn in range(12):
            other = [turn + 3, *PROMPT[:35]]
            answer(engine, made, other, max_new_tokens=1)
            forget(engine)
            assert answer(engine, made, PROMPT[:18], max_new_tokens=1)[1] == 16
            assert held(tmp_path) <= limit
    assert len(files(tmp_path)) == 6 and (tmp_path / "note.txt").exists()
    with engine_of(made, tmp_path, 2 * one):  # a smaller limit at the next start
        assert len(files(tmp_path)) == 2


def test_a_full_disk_ends_the_writing_and_not_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "write_atomically", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    made = decoder()
    right = made.generate(PROMPT, **ASK).token_ids
    with pytest.warns(SpecDecWarning, match="nothing more is written") as said, engine_of(made, tmp_path) as engine:
        for turn in range(3):
            assert answer(engine, made, [*PROMPT, turn + 3])[0] and answer(engine, made, PROMPT)[0] == right
    assert len(said) == 1 and not files(tmp_path)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing more can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_cannot_be_opened_stays(tmp_path: Path) -> None:
    """A process at its limit of open files says nothing about the files."""
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        right, _ = answer(engine, made, PROMPT)
    before = files(tmp_path)
    with engine_of(made, tmp_path) as engine:
        with no_descriptors(), pytest.warns(SpecDecWarning, match="cannot be read.*: Too many open files"):
            assert answer(engine, made, PROMPT) == (right, 0)
        forget(engine)
        assert answer(engine, made, PROMPT) == (right, 64)
    with engine_of(made, tmp_path) as engine:
        with no_descriptors():  # what cannot be written now is written later
            assert answer(engine, made, [9, *PROMPT])[1] == 0
            finish(engine)
        assert files(tmp_path) == before
        answer(engine, made, [9, *PROMPT])
    assert len(files(tmp_path)) > len(before)


def test_a_text_larger_than_the_limit_keeps_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, and is not written again and again."""
    written = noted(monkeypatch, disk, "write_atomically", lambda path, data: path)
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        answer(engine, made, PROMPT[:18], max_new_tokens=2)
    one = files(tmp_path)[0].stat().st_size
    long, known = [*PROMPT, *PROMPT[:30]], list[int]()
    for _ in range(3):
        with engine_of(made, tmp_path, 4 * one + one // 2) as engine:
            known.append(answer(engine, made, long, max_new_tokens=1)[1])
    assert known == [16, 64, 64] and len(written) == len(set(written)) == 4


def test_a_text_is_read_for_the_disk_in_the_writing_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is slow, its row goes on with the same buffer, and what waits is bounded."""
    go, readers, read = threading.Event(), set[str](), KVCache.read

    def slow(cache: KVCache, *place: int) -> dict[str, torch.Tensor]:
        readers.add(threading.current_thread().name)
        assert go.wait(300)
        return read(cache, *place)

    monkeypatch.setattr(KVCache, "read", slow)
    made = decoder("native")
    with engine_of(made, tmp_path) as engine:
        kept = engine.scheduler.disk
        right, _ = answer(engine, made, PROMPT)
        waits = kept.pending
        longer = [*PROMPT, *right, 5]
        more, cached = answer(engine, made, longer)  # it takes the buffer of the text that is still to be written
        assert cached == len(PROMPT) + 11 and waits > 0
        monkeypatch.setattr(disk, "MAX_PENDING", kept.pending)
        before = kept.pending
        answer(engine, made, [7, *PROMPT])
        assert kept.pending == before
        go.set()
    assert readers == {"specdec prefix cache"}
    with engine_of(made, tmp_path) as engine:
        assert answer(engine, made, PROMPT) == (right, 64)
        assert answer(engine, made, [*longer, *more, 4])[1] >= 80
        assert answer(engine, made, longer)[0] == more
        assert answer(engine, made, [7, *PROMPT])[1] == 0


def test_a_folder_that_may_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS)))
    made = decoder()
    with engine_of(made, tmp_path) as engine:
        right, _ = answer(engine, made, PROMPT)
    before = [(path, path.stat().st_mtime_ns) for path in files(tmp_path)]
    for place, name in ((FileLock, "acquire"), (disk, "write_atomically"), (Path, "unlink")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(disk.os, "utime", refuse)
    with (
        pytest.warns(SpecDecWarning, match="nothing more is written.*: Read-only") as said,
        engine_of(made, tmp_path) as engine,
    ):
        assert answer(engine, made, PROMPT) == (right, 64)
        assert len(answer(engine, made, [9, *PROMPT])[0]) == 12
    assert len(said) == 1 and before == [(path, path.stat().st_mtime_ns) for path in files(tmp_path)]


@pytest.mark.parametrize("started", [True, False])
def test_an_engine_that_is_dropped_ends_its_cache(started: bool, tmp_path: Path) -> None:
    made = decoder()
    kept = PrefixDisk(tmp_path, 1 << 20, "x")
    writer = kept.thread
    engine = made.stepped_engine(prefixes=PrefixStore(), disk=kept)
    del kept
    if started:
        engine.start()
    assert len(answer(engine, made, PROMPT)[0]) == 12
    work = engine._work
    del engine
    for _ in range(300):
        gc.collect()
        if work is None or not work.running:
            break
        work.join(1)
    gc.collect()
    writer.join(300)
    assert not writer.is_alive() and len(files(tmp_path)) == 5
    PrefixDisk(tmp_path, 1 << 20, "x").close()


@pytest.mark.parametrize("ignored", [True, False])
def test_an_error_of_any_kind_ends_writing_and_no_thread(tmp_path, monkeypatch, ignored: bool) -> None:
    """Also where its warning is an error."""
    made = decoder()
    monkeypatch.setattr(threading, "excepthook", lambda *what: None)
    with warnings.catch_warnings(record=ignored) as said, engine_of(made, tmp_path) as engine:
        warnings.simplefilter("always" if ignored else "error", SpecDecWarning)
        with monkeypatch.context() as patch:
            broken = Mock(side_effect=RuntimeError("out of memory\non the device"))
            patch.setattr(KVCache, "read", broken)
            assert len(answer(engine, made, PROMPT)[0]) == 12
            until(lambda: broken.called)
            if ignored:
                finish(engine)
        assert len(answer(engine, made, [9, *PROMPT])[0]) == 12
    assert not files(tmp_path)
    if said is not None:
        [warning] = [str(each.message) for each in said if issubclass(each.category, SpecDecWarning)]
        assert warning.endswith(": out of memory on the device")
    PrefixDisk(tmp_path, 1 << 20, "x").close()


def test_a_model_with_other_weights_and_the_same_fingerprint_has_its_own_prefixes(tmp_path: Path) -> None:
    made, other = decoder(), decoder()
    with engine_of(made, tmp_path) as engine:
        answer(engine, made, PROMPT)
    change_unseen(other.model)
    assert other.target.fingerprint == made.target.fingerprint
    with engine_of(other, tmp_path) as engine:
        assert answer(engine, other, PROMPT)[1] == 0
    with engine_of(made, tmp_path) as engine:
        assert answer(engine, made, PROMPT)[1] == 64


def test_one_process_has_a_folder(tmp_path: Path) -> None:
    made = decoder()
    with engine_of(made, tmp_path), pytest.raises(SpecDecError, match="is in use by another process"):
        PrefixDisk(tmp_path, 1 << 20, "x")
    left = tmp_path / f".{'0' * 64}.safetensors.abc"
    left.write_bytes(b"x")
    PrefixDisk(tmp_path, 1 << 20, "x").close()
    assert not left.exists()


@needs_native
def test_keys_of_two_sizes_are_on_disk_with_their_chunks(tmp_path: Path) -> None:
    """In layers that read the keys of others, there are none."""
    made = SpecDecoder(model_of("gemma4_text"), None, "prompt-lookup", runtime="native")
    prompt = [*PROMPT[:70], 5]
    plain = made.with_drafter("none").generate(prompt, **ASK).token_ids
    for known in (0, 64):
        with engine_of(made, tmp_path) as engine:
            assert answer(engine, made, prompt) == (plain, known)


@pytest.mark.parametrize(("family", "runtime"), [("qwen3_next", "transformers"), ("qwen3_5_text", "native")])
def test_recurrent_states_are_on_disk_with_their_chunks(family: str, runtime: str, tmp_path: Path) -> None:
    model = model_of(family) if runtime == "native" else tiny_model(family)
    made = SpecDecoder(model, None, "prompt-lookup", runtime=runtime)
    prompts = [[*PROMPT[:n], 5] for n in (70, 40, 66)]
    plain = [made.with_drafter("none").generate(prompt, **ASK).token_ids for prompt in prompts]
    with engine_of(made, tmp_path) as engine:
        assert [answer(engine, made, prompt)[0] for prompt in prompts] == plain
    with engine_of(made, tmp_path) as engine:  # rows of different lengths together
        handles = [engine.submit(made.request(prompt, **ASK)) for prompt in prompts]
        assert [[t for event in handle for t in event.tokens] for handle in handles] == plain
    longer, known = prompts[0] + plain[0] + [4, 9], [64, 32, 64]
    with engine_of(made, tmp_path) as engine:
        assert [answer(engine, made, prompt) for prompt in prompts] == [*zip(plain, known, strict=True)]
    with engine_of(made, tmp_path) as engine:
        right = made.with_drafter("none").generate(longer, **ASK).token_ids
        assert answer(engine, made, longer) == (right, 64)
        cached = engine.scheduler.disk
        states = [*cached.folder.glob(f"{disk._states([*cached._names(PROMPT, None)][3])}.*")]
    states[0].write_bytes(b"")  # the text begins where there are states before it
    with engine_of(made, tmp_path) as engine, pytest.warns(SpecDecWarning, match="is damaged and is removed"):
        assert answer(engine, made, prompts[0]) == (plain[0], 32)
