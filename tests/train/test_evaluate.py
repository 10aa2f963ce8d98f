"""What an evaluation counts."""

import torch

from specdec.train.evaluate import acceptance_lengths, chain_figures


def test_accepted_drafts_along_a_window_are_counted_as_decoding_does() -> None:
    hits = [[True, False, True, True, True, False], [True, True, False, True, False, False]]
    # From 0: step 1 at 0 and step 2 at 1 hold, three tokens; from 3: step 1 holds, step 2 at 4 does not; 5: no room.
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert acceptance_lengths([torch.tensor([row]) for row in hits], valid) == [3, 2]


def test_answers_shorter_than_a_step_still_have_a_score() -> None:
    assert chain_figures([3, 1], [0.9, 0.8]) == {"chain": [0.5, 0.5], "score": 2.0}
    assert chain_figures([], [0.9, 0.5]) == {"chain": [0.9, 0.45], "score": 2.35}  # so that better drafters win
