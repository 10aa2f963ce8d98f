"""The draft vocabulary follows the texts of the rows: what a new token costs, and whose tokens a row drafts."""

import random
from typing import Any

import pytest
import torch
from targets import target_of

from specdec.drafters.vocabulary import Context, DraftVocabulary
from specdec.runtimes import target as targets
from specdec.runtimes.native import library
from specdec.speculation.sampling import RowSampler, Sampler, SamplingParams
from specdec.speculation.state import State


def follow(vocabulary: DraftVocabulary, contexts: list[Context], texts: list[list[int]]) -> None:
    target = vocabulary.target
    vocabulary.follow(State(target, target.new_cache(), Sampler([RowSampler(SamplingParams())]), texts), contexts)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("runtime", ["transformers", "native"])
@torch.inference_mode()
def test_a_new_token_costs_its_own_row_however_many_there_are(runtime: str, rows: int, monkeypatch: Any) -> None:
    target, read, packed = target_of(runtime), list[int](), list[int]()
    given = targets.weight_rows
    monkeypatch.setattr(targets, "weight_rows", lambda head, index: read.append(len(index)) or given(head, index))
    vocabulary = DraftVocabulary(target, torch.arange(3, 13, dtype=torch.int32))
    if runtime == "native":
        lib = library.load()
        pack = lib.specdec_pack_rounded
        monkeypatch.setattr(lib, "specdec_pack_rounded", lambda *args: packed.append(args[1]) or pack(*args))
    contexts, texts = [Context() for _ in range(rows)], [[5] for _ in range(rows)]
    x = torch.randn(1, 2, target.hidden_size, generator=torch.Generator().manual_seed(0)).to(target.dtype)
    vocabulary.logits(x)
    read.clear()
    packed.clear()
    for number in range(13, 93):
        texts[number % rows].append(number)
        follow(vocabulary, contexts, texts)
        logits = vocabulary.logits(x.expand(rows, -1, -1))
        assert vocabulary.tokens is not None and logits.shape[-1] == len(vocabulary.tokens) == number - 2
        assert vocabulary.forbidden is None or int((~vocabulary.forbidden).sum()) == len(vocabulary.columns)
    assert read == [1] * 80
    if runtime == "native":  # whole tiles of 16 rows; twice as much memory for 65 rows
        assert len(packed) == 80 and sorted(packed)[-2:] == [16, 65]
    vocabulary.forbidden = None
    whole = target.readout(x, target.reduced_head(torch.tensor([*vocabulary.columns])))
    assert torch.equal(vocabulary.logits(x)[..., 10:], whole)


@torch.inference_mode()
def test_a_row_alone_drafts_no_token_of_another_text() -> None:
    target = target_of("transformers")
    vocabulary = DraftVocabulary(target, torch.arange(3, 13, dtype=torch.int32))
    contexts = [Context(), Context()]
    follow(vocabulary, contexts, [[20, 21], [30]])
    assert [*vocabulary.columns] == [20, 21, 30]
    follow(vocabulary, contexts[1:], [[30, 31]])
    assert [*vocabulary.columns] == [30, 31] and vocabulary.forbidden is None
    assert vocabulary.added_head is not None
    memory = vocabulary.added_head.memory
    follow(vocabulary, [Context()], [[5]])
    assert [*vocabulary.columns] == [] and len(vocabulary.heads) == 1
    assert torch.equal(vocabulary.tokens, vocabulary.trained)  # type: ignore[arg-type]
    follow(vocabulary, [Context()], [[40]])
    assert [*vocabulary.columns] == [40] and vocabulary.added_head.memory is memory  # with which drafts are captured
    x = torch.randn(1, 2, target.hidden_size)
    whole = target.readout(x, target.reduced_head(torch.tensor([40])))
    torch.testing.assert_close(vocabulary.logits(x)[..., 10:], whole)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_each_row_drafts_the_tokens_of_its_own_text_as_rows_come_and_go(seed: int) -> None:
    target, rng = target_of("transformers"), random.Random(seed)
    vocabulary, rows = (
        DraftVocabulary(target, torch.arange(3, 13, dtype=torch.int32)),
        list[tuple[Context, list[int]]](),
    )
    for _ in range(150):
        if not rows or (len(rows) < 4 and rng.random() < 0.15):
            rows.append((Context(), [rng.randrange(3, 97)]))
        elif rng.random() < 0.1 and len(rows) > 1:
            rows.pop(rng.randrange(len(rows)))
        for _, text in rows:
            text += rng.choices(range(3, 97), k=rng.choice([0, 0, 1, 2]))
        follow(vocabulary, [context for context, _ in rows], [text for _, text in rows])
        assert vocabulary.tokens is not None
        added = vocabulary.tokens[10:].tolist()
        assert added == [*vocabulary.columns]
        for b, (_, text) in enumerate(rows):
            seen = {token for token in text if token >= 13}
            forbidden = [False] * len(added) if vocabulary.forbidden is None else vocabulary.forbidden[b].tolist()
            assert {token for token, no in zip(added, forbidden, strict=True) if not no} == seen
