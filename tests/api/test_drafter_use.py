"""Drafters in use."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from scripted import Scripted
from transformers import PreTrainedModel

from specdec import SpecDecError, SpecDecoder


class Learning(Scripted):
    """A drafter whose work, a generator as in ``m2r2``, goes on when ``go_on`` is set."""

    learns = True

    def __init__(self) -> None:
        super().__init__(lambda ids, limit: [])
        self.begun, self.go_on, self.work = threading.Event(), threading.Event(), self._work()

    def learn(self) -> bool:
        return next(self.work)

    def _work(self) -> Iterator[bool]:
        self.begun.set()
        assert self.go_on.wait(60)
        while True:
            yield False


def test_a_drafter_learns_in_one_thread_at_a_time(llama: PreTrainedModel) -> None:
    drafter = Learning()
    decoder = SpecDecoder(llama, drafter=drafter, learn=True)
    with decoder.engine():
        assert drafter.begun.wait(60)
        with pytest.raises(SpecDecError, match="a generation of this SpecDecoder is still open"):
            decoder.learn()
        drafter.go_on.set()
    assert not decoder.learn()
