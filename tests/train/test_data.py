"""What is trained on: files of every kind, their tokens, held-out prompts, the draft vocabulary."""

import gzip
from pathlib import Path

import pytest
from refusals import refused
from training import recipe

from specdec.base.errors import SpecDecError
from specdec.train import data
from specdec.train.data import Prompt, TrainingAnswer
from specdec.train.trainer import train


def test_lines_of_every_kind_are_read_and_broken_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl.gz"
    lines = ['{"turns": ["a", "b"]}', "", '{"prompt": "c"}', "plain", '{"prompt_ids": [1], "response_ids": [2, 3]}']
    with gzip.open(file, "wt") as out:
        out.write("\n".join(lines))
    assert data.read([file]) == [Prompt(("a", "b")), Prompt(("c",)), Prompt(("plain",)), TrainingAnswer((1,), (2, 3))]
    for broken in ('{"turns": ["a"]', '{"turns": []}', '{"prompt_ids": [1], "response_ids": [true]}', '{"text": "x"}'):
        path = tmp_path / "broken.jsonl"
        path.write_text('{"prompt": "fine"}\n' + broken + "\n")
        with pytest.raises(SpecDecError, match="line 2 of"):
            data.read([path])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SpecDecError, match="no prompts in"):
        data.read([tmp_path / "empty"])
    with pytest.raises(SpecDecError, match=r"there is no prompt file .*give a file or one of own, "):
        data.read([tmp_path / "missing"])
    with pytest.raises(SpecDecError, match="nothing to train on; give --prompts"):
        data.read([])


def test_prompt_sets_are_read_by_name_and_prompts_keep_their_kind(tmp_path: Path) -> None:
    own = data.read(["own"])
    assert len(own) > 20 and all(isinstance(item, Prompt) and item.kind for item in own)
    file = tmp_path / "kinds.jsonl"
    file.write_text('{"prompt": "a", "category": "math"}\n{"prompt_ids": [1], "response_ids": [2], "category": "code"}')
    assert [item.kind for item in data.read([file])] == ["math", "code"]


def test_held_out_prompts_are_refused_in_text_and_in_token_ids() -> None:
    held = [Prompt(("Why is the sky blue?", "second turn"))]
    chat = "user\nWhy is the sky blue?\nassistant\n"  # without its special tokens
    reading = (lambda text: [*chat.replace("Why is the sky blue?", text).encode()]), (lambda ids: bytes(ids).decode())
    answer = TrainingAnswer(tuple(chat.encode()), (2,))
    data.check_holdout([Prompt(("second turn",)), Prompt(("Why is it?",))], [*held, answer], *reading)
    for item in (Prompt(("Tell me:  why IS the\nsky blue?",)), answer):
        with pytest.raises(SpecDecError, match="prompt 1 to train on contains the held-out prompt"):
            data.check_holdout([item], held, *reading)
    with pytest.raises(SpecDecError, match="prompt 1 to train on contains the held-out prompt 'user why is the sky"):
        data.check_holdout([Prompt(("why is  the Sky blue?",))], [answer], *reading)


def test_a_run_on_held_out_prompts_does_not_begin(answers: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(answers.read_text().splitlines()[3])
    with pytest.raises(SpecDecError, match=r"prompt 4 to train on contains the held-out prompt .* remove it"):
        train(recipe(answers, tmp_path / "out", holdout=[str(held)]))
    assert not (tmp_path / "out" / "states").exists()


def test_answers_of_a_model_with_a_larger_vocabulary_are_refused(answers: Path, tmp_path: Path) -> None:
    with answers.open("a") as file:
        file.write('\n{"prompt_ids": [5], "response_ids": [6, 97]}')  # of 97 tokens
    with refused("answer 41 to train on holds token 97, but the model's vocabulary ends at 96"):
        train(recipe(answers, tmp_path / "out"))


def test_the_draft_vocabulary_is_the_most_frequent_answer_tokens_and_the_ends() -> None:
    some = [TrainingAnswer((9, 9, 9, 9), (5, 5, 5, 7, 7, 8)), TrainingAnswer((9,), (5, 6))]
    assert data.draft_vocabulary(some, 3, [2], 97) == [2, 5, 7]
    assert data.draft_vocabulary(some, 6, [2], 97) == [2, 5, 6, 7, 8, 9]
    assert len(data.draft_vocabulary(some, 500, [2], 97)) == 97
