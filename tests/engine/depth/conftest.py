"""Times of steps count as they are reported."""

import pytest

from specdec.engine.depth import AutoDepth

OBSERVE = AutoDepth.observe


@pytest.fixture(autouse=True)
def by_the_clock(scripted_costs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoDepth, "observe", OBSERVE)
