"""Windows of answers in batches: each once an epoch, within the context."""

import torch
from tiny import tiny_model

from specdec.train import states
from specdec.train.batches import assemble, endless, epoch, windows
from specdec.train.data import TrainingAnswer
from specdec.train.trainer import training_target


def test_batches_cover_each_window_once_an_epoch_and_can_be_entered_anywhere() -> None:
    found = [(index, 4, 5 + index % 8) for index in range(2500)]
    epochs = [epoch(found, 4, 8, 1, number) for number in range(2)]
    for batches in epochs:
        taken = [window for batch in batches for window in batch]
        assert len(taken) == len(set(taken)) and len(set(found) - set(taken)) < 4
    assert {window for batches in epochs for batch in batches for window in batch} == set(found)
    assert epochs[0] != epochs[1]
    ahead = endless(found, 4, 8, 1, 401)
    behind = endless(found, 4, 8, 1, 0)
    for _ in range(401):
        next(behind)
    assert [next(ahead) for _ in range(200)] == [next(behind) for _ in range(200)]


def test_batches_are_full_of_positions_and_hold_little_padding() -> None:
    found = [(index, 4 + index % 50, 5 + index % 50 + 7 * index % 64) for index in range(3000)]
    sizes = [(len(batch), [end - start for _, start, end in batch]) for batch in epoch(found, 8, 64, 1, 0)]
    room = [count * max(lengths) for count, lengths in sizes]
    assert max(room) <= 512 and all(8 <= count <= 32 for count, _ in sizes)
    assert sum(sum(lengths) for _, lengths in sizes) > 0.9 * sum(room)


def test_a_few_windows_are_one_batch_and_many_short_ones_are_several() -> None:
    few = [(0, 4, 6), (1, 4, 6)]
    assert [sorted(batch) for batch in epoch(few, 8, 64, 1, 0)] == [few]
    many = [(index, 4, 6) for index in range(100)]
    assert [len(batch) for batch in epoch(many, 8, 64, 1, 0) if len(batch) < 32] == []
    assert epoch(many[:40], 8, 64, 1, 0) != epoch(many[:40], 8, 64, 1, 2)


def test_windows_stay_within_the_context() -> None:
    target = training_target(tiny_model("gpt2"))  # with an embedding for each position
    answer = TrainingAnswer(tuple([5] * 4), tuple([7] * (target.context - 4)))
    wanted = states.StateSelection((), (target.num_layers,))
    records = states._records(states._make_shard(target, [answer], wanted), wanted)
    for rows in (windows(records, 64)[-1:], windows(records, 7)):
        batch = assemble(records, rows, target.device)
        assert batch.positions[batch.valid].max() == target.context - 2
        assert torch.isfinite(target.embed(batch.ids, batch.positions)).all()
