"""M2R2 drafters that learn after few tokens, from texts of a tiny model."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from zoo import finish

from specdec.drafters.m2r2 import fits, learning
from specdec.drafters.m2r2.learning import M2R2Learner
from specdec.drafters.m2r2.replay import Text
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.target import Target
from specdec.verifiers.exact import ExactVerifier

NEW = Text(list(range(3, 40)), 4)  # 33 tokens that the model has not chosen


def learn_soon(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let M2R2 fit its projections after few tokens, and store what it learns in ``folder``."""
    monkeypatch.setenv("SPECDEC_CACHE", str(folder / "cache"))
    monkeypatch.setattr(fits, "RIDGE", 1.0)
    for name, value in {"FIRST": 60, "EVERY": 40, "RECENT_TOKENS": 50, "HOLDOUT_TOKENS": 60}.items():
        monkeypatch.setattr(learning, name, value)


def texts(target: Target, count: int, length: int = 24, seed: int = 0) -> list[Text]:
    """Return ``count`` texts: random prompts of 4 tokens with greedy answers of ``length`` tokens by ``target``."""
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0))
    rng = random.Random(seed)
    rows = [Request([rng.randrange(3, target.vocab_size) for _ in range(4)], length) for _ in range(count)]
    finish(engine, *rows)
    return [Text(row.ids, 4) for row in rows]


def read(learner: M2R2Learner, given: Iterable[Text]) -> None:
    """Let ``learner`` learn from each of the texts, until it has no more work to do."""
    for text in given:
        learner.add(text.ids, text.start)
        while learner.work():
            pass


def taught(target: Target, count: int = 24, seed: int = 0) -> M2R2Learner:
    learner = M2R2Learner(target)
    read(learner, texts(target, count, seed=seed))
    return learner


def ended(target: Target, count: int = 24) -> M2R2Learner:
    """Return a learner that has saved what it learned from ``count`` texts and released its file."""
    learner = taught(target, count)
    learner.save()
    learner.fits.store.release()
    return learner
