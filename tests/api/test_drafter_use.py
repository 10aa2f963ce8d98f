"""Drafters in use."""

import os
import threading
from collections.abc import Iterator

import pytest
from scripted import Scripted
from transformers import PreTrainedModel

from specdec import Learner, SpecDecError, SpecDecoder
from specdec.api import drafter_use


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


def test_an_interrupted_wait_for_a_learner_leaves_the_drafter_free(llama: PreTrainedModel, monkeypatch) -> None:
    class Interrupted:
        def __enter__(self) -> None:
            raise KeyboardInterrupt

        def __exit__(self, *error: object) -> None: ...

    decoder = SpecDecoder(llama, drafter="prompt-lookup")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(drafter_use, "work_lock", Interrupted())
        decoder.generate([5, 6], max_new_tokens=2)
    assert len(decoder.generate([5, 6], max_new_tokens=2).token_ids) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_learner_that_it_does_not_have() -> None:
    begun, done = threading.Event(), threading.Event()

    def learn() -> None:
        with drafter_use.work_lock:
            begun.set()
            done.wait(0.3)

    thread = threading.Thread(target=learn)
    thread.start()
    assert begun.wait(60)
    if not (child := os.fork()):
        os._exit(0 if drafter_use.work_lock.acquire(timeout=1) else 1)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
