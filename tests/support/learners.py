"""M2R2 that teaches itself after few tokens, from texts of a tiny model."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from zoo import finish

from specdec.drafters import m2r2_fits, m2r2_learning
from specdec.drafters.m2r2_learning import Learner
from specdec.drafters.m2r2_replay import Text
from specdec.drafters.none import NoDrafter
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.target import Target
from specdec.verifiers.exact import ExactVerifier

NEW = Text(list(range(3, 40)), 4)  # 33 tokens that the model has not chosen


def learn_soon(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Fits after few tokens, kept in ``folder``."""
    monkeypatch.setenv("SPECDEC_CACHE", str(folder / "cache"))
    monkeypatch.setattr(m2r2_fits, "RIDGE", 1.0)
    for name, value in {"FIRST": 60, "EVERY": 40, "RECENT": 50, "HELD": 60}.items():
        monkeypatch.setattr(m2r2_learning, name, value)


def texts(target: Target, count: int, length: int = 24, seed: int = 0) -> list[Text]:
    """Greedy texts after random prompts."""
    engine = Engine(target, NoDrafter(), ExactVerifier(), FixedDepth(0))
    rng = random.Random(seed)
    rows = [Request([rng.randrange(3, target.vocab_size) for _ in range(4)], length) for _ in range(count)]
    finish(engine, *rows)
    return [Text(row.ids, 4) for row in rows]


def read(learner: Learner, given: Iterable[Text]) -> None:
    """Let it learn from each of the texts, and end its work."""
    for text in given:
        learner.add(text.ids, text.start)
        while learner.work():
            pass


def taught(target: Target, count: int = 24, seed: int = 0) -> Learner:
    learner = Learner(target)
    read(learner, texts(target, count, seed=seed))
    return learner


def ended(target: Target, count: int = 24) -> Learner:
    """One whose process has ended: what it learned is kept, and others may go on."""
    learner = taught(target, count)
    learner.save()
    learner.fits.store.release()
    return learner
