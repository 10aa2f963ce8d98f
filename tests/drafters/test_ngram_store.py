"""What n-grams keep between processes: each scope's own, private, bounded, shared, and never what must not be kept."""

from __future__ import annotations

import os
import stat
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel
from zoo import finish

from specdec import SpecDecError
from specdec.base.errors import SpecDecWarning
from specdec.cli.shared import DecoderFlags
from specdec.drafters import ngram, ngram_store
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.ngram_store import KeptTexts, forget
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.transformers import TransformersTarget
from specdec.speculation import drafter_spec
from specdec.speculation.drafter_spec import DrafterSpec
from specdec.verifiers.exact import ExactVerifier

KEY = "5e884898"


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "ngrams"


def kept(size: int = 100, scope: str | None = KEY) -> KeptTexts:
    return KeptTexts("a tokenizer", scope, size, 50)


def process(llama: PreTrainedModel, *requests: tuple[str | None, bool], **options: Any) -> list[tuple[list[int], int]]:
    """Decode a prompt for each (scope, whether it may be learned from) as a process of its own: tokens and steps."""
    target, made, found = TransformersTarget(llama), NgramDrafter(**options), []
    made.bind(target)
    engine = Engine(target, made, ExactVerifier(), FixedDepth(8))
    for scope, learn in requests:
        request = Request([5, 6, 7, 8], 24, scope=scope)
        request.learn = learn
        finish(engine, request)
        found.append((request.ids, request.metrics.num_spec_steps))
    for each in made.kept.values():
        each.save()
    return found


def test_a_later_process_drafts_from_texts_of_the_same_scope_alone(llama: PreTrainedModel, data: Path) -> None:
    [(text, steps)] = process(llama, ("a", True))
    assert not data.exists()  # it is not asked to keep them
    process(llama, ("a", False), keep=True)
    assert not data.exists()  # nobody may learn from this one
    process(llama, ("a", True), keep=True)
    (same, fewer), (other, as_many), (none, too) = process(llama, ("a", False), ("b", False), (None, False), keep=True)
    assert text == same == other == none and fewer < steps == as_many == too
    [file] = data.iterdir()
    assert os.name == "nt" or stat.S_IMODE(file.stat().st_mode) == 0o600
    assert forget() == 1 and not [*data.iterdir()]


def test_a_drafter_that_ends_has_written_what_it_keeps(llama: PreTrainedModel, data: Path) -> None:
    made = NgramDrafter(keep=True)
    made.bind(TransformersTarget(llama))
    row = made.begin()
    made._store("a")
    row.store, row.kept = made.stores["a"], made.kept["a"]
    made.end(row, [5, 6, 7], 2)
    assert not data.exists()  # it is written once a minute, and now:
    del made
    assert [*data.iterdir()]
    with pytest.raises(SpecDecError, match="without a store"):
        NgramDrafter(keep=True, store=0)


def test_the_latest_tokens_are_kept_under_a_name_without_the_key(data: Path) -> None:
    texts = kept(size=6)
    texts.add([1, 2, 3])
    texts.save()
    texts.add([4, 5])
    texts.save()
    assert kept(size=6).read().tolist() == [2, 3, -1, 4, 5, -1]
    assert kept(size=2).read().tolist() == [5, -1] and not len(kept(scope=None).read())
    [file] = data.iterdir()
    assert KEY not in file.name


def test_processes_that_share_a_file_add_to_it_and_a_deleted_one_stays_deleted(data: Path) -> None:
    one, two = kept(), kept()
    for texts, ids in ((one, [1]), (two, [2]), (one, [3])):
        texts.add(ids)
        texts.save()
    assert kept().read().tolist() == [1, -1, 2, -1, 3, -1]
    forget()
    two.save()  # nothing is new
    assert not [*data.iterdir()]


def test_saves_at_the_same_time_lose_nothing(data: Path) -> None:
    owners, together = [kept(size=1000) for _ in range(6)], threading.Barrier(6)

    def work(number: int) -> None:
        for _ in range(8):
            owners[number].add([number])
            together.wait(60)
            owners[number].save()

    threads = [threading.Thread(target=work, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(kept(size=1000).read().tolist()) == [-1] * 48 + sorted([*range(6)] * 8)


def test_a_request_whose_scope_was_dropped_is_kept_all_the_same(
    llama: PreTrainedModel, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram, "MOST_SCOPES", 2)
    made = NgramDrafter(keep=True)
    made.bind(TransformersTarget(llama))
    row = made.begin()
    row.store, row.kept = made._store("a"), made.kept["a"]
    for scope in "bc":
        made._store(scope)
    made.end(row, [5, 6, 7], 2)
    assert "a" not in made.stores and made._store("a") is not row.store
    assert made.kept["a"].read().tolist() == [5, 6, 7, -1]


@pytest.mark.parametrize(
    ("drafter", "given", "expected"),
    [
        ("ngram", ["nodes=3"], {"nodes": 3, "corpus": "texts", "keep": True}),
        ("auto", [], {"ngram": {"corpus": "texts", "keep": True}}),
        ("ngram+m2r2", ["ngram={nodes: 3}"], {"ngram": {"nodes": 3, "corpus": "texts", "keep": True}}),
    ],
)
def test_the_command_line_gives_options_to_ngrams(drafter: str, given: list[str], expected: dict[str, Any]) -> None:
    flags = DecoderFlags(drafter=drafter, drafter_option=given, ngram_corpus=Path("texts"), keep_ngrams=True)
    assert flags.keywords["drafter_options"] == expected and "keep_ngrams" not in flags.keywords


def test_options_by_name_serve_where_auto_is_ngrams_alone(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafter_spec.registry, "load_object", lambda place: lambda target: DrafterSpec.parse("ngram"))
    monkeypatch.setattr(drafter_spec.registry, "lookup", lambda kind, name: NgramDrafter)
    made = DrafterSpec().load(TransformersTarget(llama), {"ngram": {"keep": True}})
    assert isinstance(made, NgramDrafter) and made.keep


@pytest.mark.parametrize("damage", [b"", b"foreign", b"bit", b"token", b"large"])
def test_a_damaged_or_foreign_file_is_one_note_and_is_written_anew(damage: bytes, data: Path) -> None:
    texts = kept()
    texts.add([1, 2])
    texts.save()
    [file] = data.iterdir()
    good = file.read_bytes()
    token = KeptTexts("a tokenizer", KEY, 100, 2**20)
    changed = {b"bit": good[:-1] + b"\0", b"large": good + bytes(4 * ngram_store.MOST_TOKENS)}
    if damage == b"token":
        token.add([60])
        token.save()
        changed[damage] = token.path.read_bytes()
    file.write_bytes(changed.get(damage, damage))
    texts = kept()
    with pytest.warns(SpecDecWarning, match="is not used and is written anew") as noted:
        assert not len(texts.read())
        texts.add([3])
        texts.save()
    assert len(noted) == 1 and kept().read().tolist() == [3, -1]


def test_where_nothing_can_be_written_requests_succeed_with_one_note(data: Path) -> None:
    data.parent.mkdir()
    data.write_text("not a folder")
    texts = kept()
    with pytest.warns(SpecDecWarning) as noted:
        for _ in range(2):
            texts.add([1])
            texts.save()
    assert len(noted) == 1


def test_the_oldest_files_are_deleted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_store, "MOST_FILES", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n, scope in enumerate("abc"):
            texts = kept(scope=scope)
            texts.add([n])
            texts.save()
            os.utime(texts.path, (n, n))
    assert [len(kept(scope=scope).read()) for scope in "abc"] == [0, 2, 2]
