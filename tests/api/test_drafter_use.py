"""Drafters in use."""

import threading
from collections.abc import Iterator

import pytest
from scripted import Scripted
from transformers import PreTrainedModel

from specdec import Learner, SpecDecError, SpecDecoder


class Learning(Learner):
    """A learner whose work, a generator as in ``m2r2``, goes on when ``go_on`` is set."""

    version = 0

    def __init__(self) -> None:
        self.begun, self.go_on, self.pieces = threading.Event(), threading.Event(), self._work()

    def work(self) -> bool:
        return next(self.pieces)

    def claim(self) -> None:
        pass

    save = claim

    def _work(self) -> Iterator[bool]:
        self.begun.set()
        assert self.go_on.wait(60)
        while True:
            yield False


def test_a_drafter_learns_in_one_thread_at_a_time(llama: PreTrainedModel) -> None:
    drafter, learner = Scripted(lambda ids, limit: []), Learning()
    drafter.learner = learner
    decoder = SpecDecoder(llama, drafter=drafter, learn=True)
    with decoder.engine():
        assert learner.begun.wait(60)
        with pytest.raises(SpecDecError, match="a generation of this SpecDecoder is still open"):
            decoder.learn()
        learner.go_on.set()
    assert not decoder.learn()
