"""The base's own answers: what plain decoding gives, whatever else is in the batch, and kept when a run is killed."""

import random
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from refusals import refused
from tiny import greedy_reference, tiny_model
from training import Tokens

from specdec import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress
from specdec.train import answers
from specdec.train.answers import answer_prompts, known_answers
from specdec.train.data import Prompt, TrainingAnswer, split
from specdec.train.settings import TrainSettings

ENDS = [*range(3, 97, 12)]  # answers end early and late
GREEDY = TrainSettings(max_new_tokens=14)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_ROWS", 4)


def some_prompts(count: int = 11) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(3, 97) for _ in range(draw.randrange(1, 9))] for _ in range(count)]


def made(
    folder: Path, prompts: list[list[int]], settings: TrainSettings = GREEDY, *given: TrainingAnswer
) -> list[TrainingAnswer]:
    decoder = SpecDecoder(tiny_model("llama", eos_token_id=ENDS), Tokens(), drafter="none")
    folder.mkdir(exist_ok=True)
    file = folder / "answers.jsonl"
    items = [*given, *(Prompt((" ".join(map(str, prompt)),)) for prompt in prompts)]
    return answer_prompts(file, decoder, known_answers(file, decoder, items), settings, Progress())


def test_answers_of_a_refilled_batch_are_those_of_plain_decoding(tmp_path: Path) -> None:
    prompts = some_prompts()
    given = TrainingAnswer((1,), (2, 3))
    out = made(tmp_path, prompts, GREEDY, given)
    model = tiny_model("llama", eos_token_id=ENDS)
    assert out[0] is given
    for prompt, answer in zip(prompts, out[1:], strict=True):
        assert list(answer.response_ids) == greedy_reference(model, prompt, 14)
    assert len({len(a.response_ids) for a in out}) > 3


def test_a_share_of_the_prompts_is_answered_by_sampling_and_each_draws_for_itself(tmp_path: Path) -> None:
    prompts = some_prompts(12)
    some, other = (TrainSettings(max_new_tokens=14, sampled=0.5, temperature=5.0, seed=seed) for seed in (0, 1))
    plain, mixed = made(tmp_path / "plain", prompts), made(tmp_path / "mixed", prompts, some)
    differ = sum(a != b for a, b in zip(plain, mixed, strict=True))
    assert 3 < differ < 9
    fewer = made(tmp_path / "fewer", prompts[7:], some)
    assert fewer == mixed[7:]
    assert made(tmp_path / "other", prompts[7:], other) != fewer


def test_answers_that_are_held_out_are_sampled_as_often_as_others(tmp_path: Path) -> None:
    prompts = some_prompts(60)
    plain = made(tmp_path / "plain", prompts)
    mixed = made(tmp_path / "mixed", prompts, TrainSettings(max_new_tokens=14, sampled=0.5, temperature=5.0))
    differ = {b.prompt_ids for a, b in zip(plain, mixed, strict=True) if a != b}
    held = split(mixed, 0.4)[1]
    assert 0.2 < sum(answer.prompt_ids in differ for answer in held) / len(held) < 0.8


def test_a_killed_run_keeps_what_it_has_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts()
    whole = made(tmp_path / "whole", prompts)
    generate, asked = answers._generate, []

    def killed(decoder: SpecDecoder, left: list[tuple[int, ...]], *rest: object) -> Iterator[TrainingAnswer]:
        asked.append(len(left))
        for number, answer in enumerate(generate(decoder, left, *rest)):  # type: ignore[arg-type]
            if number == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(answers, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "parts", prompts)
    file = tmp_path / "parts" / "answers.jsonl"
    with file.open("a") as out:
        out.write('{"prompt_ids": [1, 2')  # a line that was under way
    assert made(tmp_path / "parts", prompts) == whole
    assert asked == [11, 6] and len(file.read_text().splitlines()) == 11
    with pytest.raises(SpecDecError, match="answers to other prompts"):
        made(tmp_path / "parts", prompts[1:])
    for damage, message in (("x", "answers to other prompts"), ('{"a": 1', "line 12 of"), ('{"a": 1}', "line 12 of")):
        kept = file.read_text()
        file.write_text(kept + damage + "\n")
        with pytest.raises(SpecDecError, match=message):
            made(tmp_path / "parts", prompts)
        file.write_text(kept)


def test_a_full_disk_and_a_prompt_that_is_too_long_are_clear_lines(tmp_path, monkeypatch) -> None:
    with pytest.raises(SpecDecError, match="a prompt has 200 tokens, the model's context 128"):
        made(tmp_path, [[3] * 200])

    monkeypatch.setattr(answers, "_generate", Mock(side_effect=OSError(28, "No space left on device")))
    with refused(r"cannot write answers to .*No space left on device; free some space and continue with --resume"):
        made(tmp_path, some_prompts())
