"""Windowed layers hold what a window sees, and no text, turn, fork or file depends on what they do not hold."""

import copy
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from spies import noted
from targets import needs_native
from tiny import SIZES, greedy_reference, model_of, tiny_model
from zoo import EVERY, finish, new_tokens, plain_engine, run, step

from specdec import SpecDecoder
from specdec.base.errors import SpecDecWarning
from specdec.engine import batch, scheduler
from specdec.engine.request import Request
from specdec.kvcache import cache as cache_module
from specdec.kvcache import disk, window
from specdec.kvcache.cache import KVCache
from specdec.kvcache.prefix import PrefixStore
from specdec.runtimes.native.target import NativeTarget
from specdec.speculation.sampling import RowSampler, SamplingParams

WINDOW, FIRST, MARGIN, STEP = 24, 4, 16, 8
PAGE = 4096


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slots are dropped early, and have something wrong in them from then on. Returns how many at a time."""
    found = list[int]()

    def spoil(buffer: torch.Tensor, layers: Sequence[int], ranges: Sequence[tuple[int, int]]) -> None:
        for layer in layers:
            for begin, end in ranges:
                buffer[:, layer, :, begin:end] = 5.0
                found.append(end - begin)

    for name, value in {"FIRST": FIRST, "MARGIN": MARGIN, "STEP": STEP, "release": spoil}.items():
        monkeypatch.setattr(window, name, value)
    monkeypatch.setattr(cache_module, "BLOCK", 16)
    monkeypatch.setattr(scheduler, "SHARED", 4)
    return found


def model(family: str = "gemma3_text") -> Any:
    return model_of(family, sliding_window=WINDOW, max_position_embeddings=512)


def words(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 97) for _ in range(count)]


# -- which slots ------------------------------------------------------------------------------------------------------


def test_what_is_dropped_is_outside_every_window(small: list[int]) -> None:
    draw = random.Random(1)
    for _ in range(500):
        count, gone = 0, tuple[window.Range, ...]()
        checkpoints = frozenset[int]()
        while count < 400:
            count += draw.choice((1, 3, 40, 90))
            before, gone = gone, window.outside(count, WINDOW, checkpoints, gone)
            slots = {slot for begin, end in gone for slot in range(begin, end)}
            assert slots >= {slot for begin, end in before for slot in range(begin, end)}
            assert len(slots) == sum(end - begin for begin, end in gone)  # none twice
            for end in (count, *checkpoints):
                assert not slots & {*range(end - WINDOW - MARGIN, end), *range(FIRST)}
            kept = count - len(slots)
            assert kept <= (1 + len(checkpoints)) * (WINDOW + MARGIN + STEP) + FIRST
            held = {slot for begin, end in window.held(gone, count) for slot in range(begin, end)}
            assert held == {*range(count)} - slots
            right = [n for n in range(count + 1) if not slots & {*range(max(n - WINDOW, 0), n)}]
            for wanted in range(0, count + 1, 7):
                assert window.resumable(wanted, WINDOW, gone) == max(n for n in right if n <= wanted)
            if draw.random() < 0.3:
                checkpoints = window.thinned((*checkpoints, count))
                assert count in checkpoints and len(checkpoints) <= window.MAX_CHECKPOINTS


def test_far_checkpoints_and_the_last_one_stay() -> None:
    found = frozenset[int]()
    for count in range(1000, 33000, 1000):
        found = window.thinned((*found, count))
    first, *_, last = sorted(found)
    assert last == 32000 and first < 28000 and len(found) == window.MAX_CHECKPOINTS


# -- the cache --------------------------------------------------------------------------------------------------------


BUFFERS = [range(4)], [[0, 2], [1, 3]], [[0, 3], [1, 2]]  # layers that share one, by their heads
HEADS = [(1, 2), (2, 3)]


def write(cache: KVCache, rows: Sequence[Sequence[int]]) -> None:
    """Write tokens as a runtime does that fills the slots itself; each key spells out its token."""
    starts = cache.rows
    cache.claim(0, 4, [len(row) for row in rows], HEADS[: len(cache.names)], torch.float)
    for entries, start, row in zip(cache.entries, starts, rows, strict=True):
        for name in cache.names:
            for part, sign in enumerate((1, -1)):
                own = entries.buffers[name][part, :, :, start : start + len(row)]
                own[:] = sign * torch.tensor(row, dtype=torch.float)[:, None]


def check(cache: KVCache, row: int, text: list[int]) -> None:
    """Every layer has what the next token sees, wherever the row says that a text may go on."""
    own = cache.entries[row]
    assert own.count == len(text)
    for count in {cache.resumable(row, n) for n in range(0, len(text) + 1, 5)} | cache.checkpoints(row) | {len(text)}:
        for layer in range(4):
            keys, values = (values[:count, 0, 0].tolist() for values in cache.of_layer(layer, row).values())
            first = max(count - WINDOW, 0) if layer in (0, 2) else 0
            assert keys[first:] == text[first:count] and values[first:] == [-token for token in text[first:count]]


@pytest.mark.parametrize("limit", [0, 2000])
@pytest.mark.parametrize("layers", BUFFERS)
def test_rows_that_grow_fork_share_and_go_lose_nothing_that_is_seen(limit: int, layers: Any, small: list[int]) -> None:
    draw, dropped, widths = random.Random(5), 0, [count * size for count, size in HEADS]
    for _ in range(25):
        cache = KVCache(4, 0, "cpu", False, layers, (), None, limit, WINDOW, [0, 2], widths)
        texts, references = list[list[int]](), list[tuple[KVCache, list[list[int]]]]()
        for _ in range(60):
            act = draw.choice(
                ("new", "grow", "grow", "grow", "fork", "checkpoint", "reference", "forget", "take", "go")
            )
            if act == "new" and len(texts) < 3:
                cache.join(KVCache(4, 1, "cpu", False, layers, (), None, limit, WINDOW, [0, 2], widths))
                texts.append([])
            elif act == "grow" and texts:
                rows = [[draw.randrange(100, 900) for _ in range(draw.choice((1, 3, 60)))] for _ in texts]
                write(cache, rows)
                paths = [sorted(draw.sample(range(len(row)), draw.randrange(len(row) + 1))) for row in rows]
                cache.commit(paths)
                for text, row, path in zip(texts, rows, paths, strict=True):
                    text += [row[at] for at in path]
                cache.evict()
            elif act == "fork" and texts:
                row = draw.randrange(len(texts))
                count = cache.resumable(row, draw.randrange(len(texts[row]) + 1))
                if count:
                    cache.join(cache.copy(row, count))
                    texts.append(texts[row][:count])
            elif act == "checkpoint" and texts:
                cache.checkpoint(draw.randrange(len(texts)))
            elif act == "reference" and texts:
                references.append((cache.reference(), [[*text] for text in texts]))
            elif act == "forget" and references:
                references.pop(draw.randrange(len(references)))
            elif act == "take" and texts:  # as a text that is kept and then gone on with
                row = draw.randrange(len(texts))
                kept = cache.take_compact(row)
                cache.select([n for n in range(len(texts)) if n != row])
                cache.join(kept)
                texts.append(texts.pop(row))
            elif act == "go" and texts:
                row = draw.randrange(len(texts))
                cache.select([n for n in range(len(texts)) if n != row])
                texts.pop(row)
            counted = cache.token_bytes * sum(cache.capacities(cache.rows))
            assert abs(counted - cache.nbytes) < 1
            for shared, own in ((cache, texts), *references):
                for row, text in enumerate(own):
                    if text:
                        check(shared, row, text)
        dropped += sum(small)
    assert dropped


def test_what_a_reference_held_is_released_after_it(small: list[int]) -> None:
    cache = KVCache(4, 1, layers=[range(4)], limit=2000, window=WINDOW, windowed=[0, 2])
    write(cache, [words(1, 100)])
    cache.commit([range(100)])
    kept = cache.reference()
    cache.evict()
    assert not sum(small)
    del kept
    write(cache, [words(2, STEP)])
    cache.commit([range(STEP)])
    cache.evict()
    assert sum(small) >= 2 * (100 - WINDOW - MARGIN - STEP - FIRST)


# -- texts ------------------------------------------------------------------------------------------------------------

PROMPTS = [words(1, 150), words(2, 60), words(3, 3)]
COUNT, SAMPLED = 60, {"temperature": 1.0, "seed": 3}


@needs_native
@pytest.mark.parametrize(
    ("family", "int8"), [("gemma3_text", False), ("gemma3_text", True), ("gemma4_text", False), ("gemma4_text", True)]
)
def test_texts_of_several_windows_are_those_of_a_cache_that_keeps_all(
    family: str, int8: bool, small: list[int], monkeypatch
) -> None:
    target = NativeTarget(model(family), kv_cache="int8" if int8 else "auto")
    with monkeypatch.context() as whole:
        whole.setattr(KVCache, "evict", lambda cache: None)
        expected = run(target, EVERY["none"](target), PROMPTS, COUNT, eos=None, **SAMPLED)[0]
        greedy = run(target, EVERY["none"](target), PROMPTS, COUNT, eos=None)[0]
    assert not small and all(len({*text}) > 20 for text in expected)
    for name in ("prompt-lookup", "layer-skip", "draft-model", "m2r2: projection", "m2r2 (tree)", "ngram+m2r2 (tree)"):
        assert run(target, EVERY[name](target), PROMPTS, COUNT, eos=None, **SAMPLED)[0] == expected, name
        assert small, name
        assert run(target, EVERY[name](target), PROMPTS, COUNT, eos=None)[0] == greedy, name
        small.clear()


@needs_native
def test_texts_of_several_windows_are_those_of_transformers(small: list[int]) -> None:
    own = tiny_model("gemma3_text", sliding_window=WINDOW, max_position_embeddings=512, **SIZES)
    own = own.bfloat16()
    prompts, target = [PROMPTS[0], words(11, 100), words(12, 130)], NativeTarget(own)
    expected = [greedy_reference(copy.deepcopy(own).float(), prompt, 40) for prompt in prompts]
    for name in ("m2r2 (tree)", "prompt-lookup"):
        assert run(target, EVERY[name](target), prompts, 40, eos=None)[0] == expected and small


# -- turns and forks --------------------------------------------------------------------------------------------------


def sampler(prompt: list[int]) -> RowSampler:
    return RowSampler(SamplingParams(1.0, seed=3), start=len(prompt))


def ask(engine: Any, prompt: list[int], count: int = 40) -> tuple[list[int], int]:
    """Return the new tokens, and how many of the prompt were cached."""
    request = Request(prompt, count, sampler(prompt))
    engine.submit(request)
    finish(engine)
    return new_tokens(request), request.metrics.num_cached_tokens


@needs_native
def test_a_second_turn_and_a_fork_go_on_from_what_is_held(small: list[int], monkeypatch) -> None:
    target, prompt = NativeTarget(model()), words(4, 200)
    parts = noted(monkeypatch, batch, "run_tokens", lambda target, cache, rows, *more: sum(map(len, rows)))

    def fresh(text: list[int]) -> list[int]:
        with monkeypatch.context() as whole:
            whole.setattr(KVCache, "evict", lambda cache: None)
            return ask(plain_engine(target), text)[0]

    for cut in (0, 5, MARGIN - 1, 40):  # how much of the answer the next turn leaves out: 40 is all of it
        engine = plain_engine(target, prefixes=PrefixStore())
        answer, _ = ask(engine, prompt)
        text = [*prompt, *answer][: 240 - cut]
        more = [*text, 7, 8, 9]
        right = fresh(more)
        parts.clear()
        assert ask(engine, more) == (right, min(len(text), 239)) and sum(parts) == len(more) - min(len(text), 239)
    engine = plain_engine(target, prefixes=PrefixStore())
    ask(engine, prompt)
    found = list[int]()
    for last in (11, 12, 13):  # the first knows not where to go on, the second knows where others do
        other = [*prompt[:120], last, *words(last, 60)]
        answer, cached = ask(engine, other)
        assert answer == fresh(other)
        found.append(cached)
    assert found[0] < 120 - WINDOW and found[1:] == [120, 120], found


@needs_native
def test_a_fork_of_a_running_row_is_its_own(small: list[int], monkeypatch) -> None:
    target, prompt = NativeTarget(model()), words(5, 200)
    engine = plain_engine(target, prefixes=PrefixStore())
    more = [*prompt, 9, 9]
    first, second = Request(prompt, 100, sampler(prompt)), Request(more, 60, sampler(more))
    engine.submit(first)
    for _ in range(4):
        step(engine)
    engine.submit(second)
    finish(engine)
    assert second.metrics.num_cached_tokens == 200 and small
    with monkeypatch.context() as whole:
        whole.setattr(KVCache, "evict", lambda cache: None)
        for request in (first, second):
            assert new_tokens(request) == ask(plain_engine(target), request.prompt, request.max_new_tokens)[0]


# -- on disk ----------------------------------------------------------------------------------------------------------

CHUNK = 16


def answer(made: SpecDecoder, folder: Path, *prompts: list[int]) -> list[tuple[list[int], int]]:
    """The new tokens of each prompt, and how many of it were cached, in an engine of their own."""
    found = []
    with made.engine(prefix_cache=folder) as engine:
        for prompt in prompts:
            handle = engine.submit(made.request(prompt, max_new_tokens=40, ignore_eos=True, temperature=1.0, seed=3))
            tokens = [token for event in handle for token in event.tokens]
            found.append((tokens, handle.metrics.num_cached_tokens))
    return found


@pytest.fixture
def decoder(request: Any, small: list[int], monkeypatch: pytest.MonkeyPatch) -> SpecDecoder:
    monkeypatch.setattr(disk, "CHUNK", CHUNK)
    return SpecDecoder(model(getattr(request, "param", "gemma3_text")), None, "none", runtime="native")


@needs_native
@pytest.mark.parametrize(
    "decoder", ["gemma3_text", "mistral", "gemma4_text"], indirect=True
)  # all layers, or all of a buffer, have a window in the latter ones
def test_a_later_process_goes_on_with_what_was_held(decoder: SpecDecoder, tmp_path: Path) -> None:
    prompt = words(6, 200)
    [(first, _)] = answer(decoder, tmp_path, prompt)
    files = {path.stem: path for path in tmp_path.glob("*.safetensors")}
    assert 239 // CHUNK + 2 <= len(files) < 239 // CHUNK + 10  # not the windows of all chunks
    for text in ([*prompt, *first, 7, 8], [*prompt, 7, 8], [*prompt, *first[:-9], 4]):
        shared = len(text) - (2 if text[-1] == 8 else 1)
        [(expected, _)] = answer(decoder, tmp_path / f"none {len(text)}", text)
        [(found, cached)] = answer(decoder, tmp_path, text)
        assert found == expected and shared - 2 * CHUNK < cached <= shared
    early = [*prompt[:120], 5]
    [(expected, _), (found, cached)] = [*answer(decoder, tmp_path / "early", early), *answer(decoder, tmp_path, early)]
    assert found == expected and cached == 0  # its windows have been dropped


@needs_native
def test_a_text_with_a_damaged_window_is_run_again(decoder: SpecDecoder, tmp_path: Path) -> None:
    prompt = words(7, 200)
    [(right, _)] = answer(decoder, tmp_path, prompt)
    with decoder.engine(prefix_cache=tmp_path) as engine:
        names = engine.scheduler.disk._there(prompt[:-1], None)
        assert engine.scheduler.disk.longest(prompt[:120], None) == 0  # the windows there have been dropped
    assert len(names) == 199 // CHUNK
    path = tmp_path / (disk._window(names[-1]) + disk.SUFFIX)
    data = path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.warns(SpecDecWarning, match="is damaged and is removed"):
        [(found, cached)] = answer(decoder, tmp_path, prompt)
    assert found == right and cached == 0  # the chunks before have no whole window
    assert answer(decoder, tmp_path, prompt) == [(right, 192)]  # it has been written again


@needs_native
def test_a_text_that_waits_for_the_disk_is_written_as_it_was(decoder: SpecDecoder, tmp_path: Path, monkeypatch) -> None:
    """Its row goes on meanwhile, in the same memory, and drops slots that are still to be written."""
    prompt, go, read = words(8, 200), threading.Event(), KVCache.read_window

    def slow(cache: KVCache, *place: int) -> dict[str, torch.Tensor]:
        assert go.wait(300)
        return read(cache, *place)

    monkeypatch.setattr(KVCache, "read_window", slow)
    monkeypatch.setattr(window, "MAX_CHECKPOINTS", 1)  # none of the row holds what is written
    with decoder.engine(prefix_cache=tmp_path) as engine:
        for text in (prompt, [*prompt, 5, *words(9, 150)]):
            for _ in engine.submit(decoder.request(text, max_new_tokens=1, ignore_eos=True)):
                pass
        go.set()
    monkeypatch.setattr(KVCache, "read_window", read)
    [(expected, _)] = answer(decoder, tmp_path / "none", [*prompt, 7])
    [(found, cached)] = answer(decoder, tmp_path, [*prompt, 7])
    assert found == expected and cached == 192


# -- memory -----------------------------------------------------------------------------------------------------------


def resident(tensor: torch.Tensor) -> int:
    """Return the bytes of the pages of a contiguous tensor that are in memory."""
    begin, end = tensor.data_ptr() // PAGE, -(-(tensor.data_ptr() + tensor.nbytes) // PAGE)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(8 * begin)
        entries = torch.frombuffer(bytearray(file.read(8 * (end - begin))), dtype=torch.int64)
    return int((entries < 0).sum()) * PAGE


@needs_native
@pytest.mark.parametrize("int8", [False, True])
def test_windowed_layers_take_the_memory_of_their_window(int8: bool) -> None:
    """Of a running row, of a kept text, and of its copy, as the limits of memory count it."""
    own = tiny_model(
        "gemma3_text",
        sliding_window=64,
        max_position_embeddings=8192,
        hidden_size=64,
        intermediate_size=96,
        head_dim=64,
    )
    target = NativeTarget(own.bfloat16(), kv_cache="int8" if int8 else "auto")
    engine = plain_engine(target, prefixes=PrefixStore())
    engine.submit(Request(words(1, 3000), 6))
    step(engine)
    while not engine.batch.rows:
        step(engine)
    [row], prompt = engine.batch.rows, words(1, 3000)
    while len(row.new_tokens) and row.finish_reason is None:
        check_memory(engine.batch.cache, 3000, 1)
        step(engine)
    store = engine.scheduler.memory.prefixes
    [text] = store.entries
    check_memory(text.cache, 3000, 2)
    assert engine.stats().kv_bytes == store.nbytes == text.cache.nbytes
    check_memory(text.cache.copy(0, 3000 - 40), 2960, 2)
    engine.submit(Request([*prompt, 5], 2))
    finish(engine)
    [text] = [each for each in store.entries if 5 in each.ids[3000:3001]]
    check_memory(text.cache, 3000, 3)


@needs_native
def test_a_row_that_decodes_gives_back_memory_step_by_step() -> None:
    own = tiny_model(
        "gemma3_text",
        sliding_window=64,
        max_position_embeddings=8192,
        hidden_size=64,
        intermediate_size=96,
        head_dim=256,
    )
    engine = plain_engine(NativeTarget(own.bfloat16()))
    request = Request(words(1, 5), 600)
    engine.submit(request)
    for _ in range(540):
        step(engine)
    check_memory(engine.batch.cache, engine.batch.cache.rows[0], 1)
    assert request.finish_reason is None


def check_memory(cache: KVCache, count: int, windows: int) -> None:
    """Full layers (1, 3) take ``count`` slots, and windowed ones (0, 2) those of some windows."""
    [data], each = cache.data, cache.token_bytes // 4
    heads = data.shape[2]
    taken = [sum(resident(part[layer]) for part in data) for layer in range(4)]
    slots = windows * (64 + window.MARGIN + window.STEP) + window.FIRST
    assert count * each <= taken[1] <= (count + 64) * each + 2 * heads * 2 * PAGE
    assert taken[0] <= slots * each + (windows + 1) * 2 * heads * 2 * PAGE, (taken, slots * each)
    assert sum(taken) - 4 * (windows + 2) * 2 * heads * PAGE <= cache.nbytes
    assert cache.nbytes <= 2 * (count + cache_module.BLOCK + slots + 2 * cache_module.BLOCK) * each


@needs_native
def test_rows_run_together_that_would_not_fit_with_all_slots(small: list[int]) -> None:
    target = NativeTarget(model())
    engine = plain_engine(target, kv_memory=1 << 40)
    token = engine.scheduler.memory.token_bytes
    engine.scheduler.memory.limit = 600 * token  # three rows would take 768 slots; half of the layers drop most
    requests = [Request(words(seed, 200), 40) for seed in range(3)]
    for request in requests:
        engine.submit(request)
    most = 0
    while engine.busy:
        step(engine)
        most = max(most, engine.scheduler.running)
        assert engine.stats().kv_bytes <= 600 * token
    assert most == 3 and engine.stats().preemptions == 0
