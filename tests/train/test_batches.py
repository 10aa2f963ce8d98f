"""Windows of answers in batches: each once an epoch, within the context."""

import torch
from tiny import tiny_model

from specdec.train import states
from specdec.train.batches import assemble, endless, epoch, windows
from specdec.train.data import TrainingAnswer
from specdec.train.trainer import training_target


def test_batches_cover_each_window_once_an_epoch_and_can_be_entered_anywhere() -> None:
    found = [(index, 4, 5 + index % 8) for index in range(2500)]
    taken = [window for batch in epoch(found, 32, 1, 0) for window in batch]
    missing = set(found) - set(taken)
    assert len(taken) == len(set(taken)) and len(missing) < 32
    assert epoch(found, 32, 1, 0) != epoch(found, 32, 1, 1)
    ahead = endless(found, 32, 1, 401)
    behind = endless(found, 32, 1, 0)
    for _ in range(401):
        next(behind)
    assert [next(ahead) for _ in range(200)] == [next(behind) for _ in range(200)]


def test_batches_are_full_of_positions_and_hold_little_padding() -> None:
    found = [(index, 4 + index % 50, 5 + index % 50 + 7 * index % 64) for index in range(3000)]
    sizes = [(len(batch), [end - start for _, start, end in batch]) for batch in epoch(found, 512, 1, 0)]
    room = [count * max(lengths) for count, lengths in sizes]
    assert max(room) <= 512 and min(room) >= 512 - 64
    assert sum(sum(lengths) for _, lengths in sizes) > 0.9 * sum(room)
    assert epoch([(0, 4, 70)], 32, 1, 0) == [[(0, 4, 70)]]  # a window that is larger than a batch
    assert epoch([(0, 4, 6), (1, 4, 6)], 32, 1, 0) in ([[(0, 4, 6), (1, 4, 6)]], [[(1, 4, 6), (0, 4, 6)]])


def test_windows_stay_within_the_context() -> None:
    target = training_target(tiny_model("gpt2"))  # with an embedding for each position
    answer = TrainingAnswer(tuple([5] * 4), tuple([7] * (target.context - 4)))
    wanted = states.StateSelection((), (target.num_layers,))
    records = states._records(states._make_shard(target, [answer], wanted), wanted)
    for rows in (windows(records, 64)[-1:], windows(records, 7)):
        batch = assemble(records, rows, target.device)
        assert batch.positions[batch.valid].max() == target.context - 2
        assert torch.isfinite(target.embed(batch.ids, batch.positions)).all()
