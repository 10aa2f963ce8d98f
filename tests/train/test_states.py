"""Teacher states: they are those of each answer alone, need the room that was announced, and show how far they are."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from targets import needs_native
from tiny import model_of, tiny_model
from training import Killed, recipe

from specdec.base.errors import SpecDecError
from specdec.base.terminal import Progress
from specdec.runtimes.native.target import NativeTarget
from specdec.runtimes.target import Target
from specdec.runtimes.torch.target import TorchTarget
from specdec.runtimes.transformers import TransformersTarget
from specdec.train import states
from specdec.train.data import TrainingAnswer
from specdec.train.trainer import train, training_target

WANTED = states.StateSelection((0, 2), (1, 4))


def some_answers(common: int) -> list[TrainingAnswer]:
    """Answers of many lengths, whose prompts begin with ``common`` tokens and end with others."""
    generator = torch.Generator().manual_seed(common)
    draw = lambda count: tuple(torch.randint(3, 97, (count,), generator=generator).tolist())  # noqa: E731
    begin = draw(common)
    return [TrainingAnswer((*begin, 3 + n, *draw(4 * n % 7)), draw(5 + 13 * n % 80)) for n in range(9)]


def alone(target: Target, answer: TrainingAnswer) -> dict[str, torch.Tensor]:
    """What a pass over the one answer gives."""
    ids = torch.tensor([answer.prompt_ids + answer.response_ids])
    cache, taps = target.new_cache(), {layer: torch.empty(0) for layer in WANTED.hidden}
    with torch.inference_mode():
        logits = target.readout(states.whole_pass(target, ids, cache, taps))[0]
    kept = slice(states.first_stored(len(answer.prompt_ids)), len(answer) - 1)
    found = {"best": logits[kept].argmax(-1).int(), "log_z": logits[kept].float().logsumexp(-1)}
    for layer in WANTED.kv:
        for name, part in cache.of_layer(layer, 0).items():
            found[f"{name}{layer}"] = part[: len(answer)]
    return found | {f"hidden{layer}": taps[layer][0, kept] for layer in WANTED.hidden}


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("native", marks=needs_native)])
def test_states_are_those_of_each_answer_alone(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = NativeTarget(model_of("llama")) if kind == "native" else training_target(tiny_model(kind))
    assert kind == "native" or isinstance(target, TransformersTarget if kind == "gpt2" else TorchTarget)
    answers = some_answers(3)
    monkeypatch.setattr(states, "PASS_TOKENS", 200)  # several passes, of several answers each
    monkeypatch.setattr(states, "READOUT_ROWS", 50)
    monkeypatch.setattr(states, "SHARD_TOKENS", 200)
    for answer, record in zip(
        answers, states.compute_states(tmp_path, target, answers, WANTED, Progress(), "train"), strict=True
    ):
        expected = alone(target, answer)
        found = {"best": record.best, "log_z": record.log_z}
        found |= {
            f"{name}{layer}": part for layer, both in record.kv.items() for name, part in zip("kv", both, strict=True)
        }
        found |= {f"hidden{layer}": x for layer, x in record.hidden.items()}
        assert record.ids.tolist() == [*answer.prompt_ids, *answer.response_ids] and found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )


def test_damaged_and_foreign_teacher_states_are_refused(answers: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(recipe(answers, out, steps=1))
    shard = out / "states" / "train" / "states-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(SpecDecError, match="truncated"):
        train(recipe(answers, out, steps=1), resume=True)
    shard.write_bytes(whole)
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join(lines[:-5]))
    with pytest.raises(SpecDecError, match="teacher states of other answers"):
        train(recipe(answers, out, steps=1), resume=True)


def test_states_are_written_shard_by_shard_and_go_on_after_a_kill(tmp_path, monkeypatch) -> None:
    target = training_target(tiny_model("llama"))
    some = [TrainingAnswer((3, 4, 5), tuple(range(6, 12 + n))) for n in range(6)]
    wanted = states.StateSelection((2,), (4,))
    monkeypatch.setattr(states, "SHARD_TOKENS", 16)  # of answers of 9, 10, 11 ... tokens: two a shard
    whole = states.compute_states(tmp_path / "whole", target, some, wanted, Progress(), "train")
    teach, calls = states._make_shard, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return teach(*args)

    monkeypatch.setattr(states, "_make_shard", killed)
    with pytest.raises(Killed):
        states.compute_states(tmp_path / "parts", target, some, wanted, Progress(), "train")
    parts = states.compute_states(tmp_path / "parts", target, some, wanted, Progress(), "train")
    assert len(calls) == 4  # two shards, the killed one, and that one again
    index = json.loads((tmp_path / "parts/index.json").read_text())
    assert [shard["answers"] for shard in index["shards"]] == [2, 2, 2]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.hidden[4], b.hidden[4]) and torch.equal(a.kv[2][0], b.kv[2][0])
    monkeypatch.setattr(states, "SHARD_TOKENS", 5)  # an earlier version had larger shards
    for left in (2, 3):
        (tmp_path / "parts/index.json").write_text(json.dumps(index | {"shards": index["shards"][:left]}))
        parts = states.compute_states(tmp_path / "parts", target, some, wanted, Progress(), "train")
        index = json.loads((tmp_path / "parts/index.json").read_text())
        assert [shard["answers"] for shard in index["shards"]] == [2, 2, 1, 1]
        for a, b in zip(whole, parts, strict=True):
            assert a.ids.tolist() == b.ids.tolist()
            torch.testing.assert_close(a.hidden[4], b.hidden[4], rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecDecError, match="other fingerprint"):
        target.fingerprint = "another model"
        states.compute_states(tmp_path / "parts", target, some, wanted, Progress(), "train")


def test_a_full_disk_leaves_no_part_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(states, "save_file", full)
    target, some = training_target(tiny_model("llama")), [TrainingAnswer((3, 4, 5), (6, 7))]
    with pytest.raises(SpecDecError, match="No space left on device; free some space"):
        states.compute_states(tmp_path, target, some, WANTED, Progress(), "train")
    assert not list(tmp_path.iterdir())
