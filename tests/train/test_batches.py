"""Windows of answers in batches: each once an epoch, within the context."""

import torch
from tiny import tiny_model

from specdec.train import states
from specdec.train.batches import assemble, endless, epoch, windows
from specdec.train.data import TrainingAnswer
from specdec.train.trainer import training_target


def test_batches_cover_each_window_once_an_epoch_and_can_be_entered_anywhere() -> None:
    found = [(index, 4, 5 + index % 7) for index in range(64)]
    seen = [window for batch in epoch(found, 4, 1, 0) for window in batch]
    assert sorted(seen) == found
    ahead = endless(found, 4, 1, 21)
    behind = endless(found, 4, 1, 0)
    for _ in range(21):
        next(behind)
    assert [next(ahead) for _ in range(20)] == [next(behind) for _ in range(20)]


def test_windows_stay_within_the_context() -> None:
    target = training_target(tiny_model("gpt2"))  # with an embedding for each position
    answer = TrainingAnswer(tuple([5] * 4), tuple([7] * (target.context - 4)))
    wanted = states.StateSelection((), (target.num_layers,))
    records = states._records(states._make_shard(target, [answer], wanted), wanted)
    for rows in (windows(records, 64)[-1:], windows(records, 7)):
        batch = assemble(records, rows, 64, target.device)
        assert batch.positions[batch.valid].max() == target.context - 2
        assert torch.isfinite(target.embed(batch.ids, batch.positions)).all()
