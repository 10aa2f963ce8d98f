"""The phases of a generation, on a clock that only the work itself moves: every second is in exactly one phase."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from scripted import Scripted
from transformers import PreTrainedModel

from specdec.engine import metrics
from specdec.engine.depth import FixedDepth
from specdec.engine.engine import Engine
from specdec.engine.request import Request
from specdec.runtimes.transformers import TransformersTarget
from specdec.verifiers.exact import ExactVerifier


def test_the_timer_books_each_phase_and_sums_up_to_the_wall(llama: PreTrainedModel, monkeypatch) -> None:
    now = 0.0

    def clock() -> float:
        return now

    def takes(seconds: float, function):
        def run(*args, **kwargs):
            nonlocal now
            now += seconds
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(metrics.time, "perf_counter", clock)
    target, verifier = TransformersTarget(llama), ExactVerifier()
    drafter = Scripted(lambda ids, limit: [(7, 0), (8, 1), (9, 2)][:limit])
    drafter.bind(target)
    monkeypatch.setattr(drafter, "propose", takes(3.0, drafter.propose))
    monkeypatch.setattr(verifier, "verify", takes(2.0, verifier.verify))
    monkeypatch.setattr(target, "layers", takes(5.0, target.layers))
    monkeypatch.setattr(drafter, "observe", takes(1.0, drafter.observe))
    policy = FixedDepth(3)
    monkeypatch.setattr(policy, "observe", takes(0.5, policy.observe))
    monkeypatch.setattr(policy, "choose", takes(0.25, policy.choose))
    text = SimpleNamespace(push=takes(0.125, lambda token: None))
    request, engine = Request([5, 6], 10, text=text), Engine(target, drafter, verifier, policy)
    engine.submit(request)
    away = 0.0
    for _ in engine.steps():
        now, away = now + 100.0, away + 100.0  # the caller's own time is nobody's
    m = request.metrics
    rounds = m.num_spec_steps
    assert m.phases == {
        "prefill": 6.0,
        "draft": 3.0 * sum(depth > 0 for depth in m.per_step_drafted),
        "score": 5.0 * rounds,
        "accept": 2.0 * rounds,
        "commit": 1.0 * rounds,
        "detokenise": 0.125 * m.num_new_tokens,
        "overhead": 0.75 * rounds,
    }
    assert sum(m.phases.values()) == pytest.approx(now - away) == m.prefill_seconds + m.decode_seconds


def test_what_a_device_drafts_behind_the_host_is_booked_as_drafting(monkeypatch) -> None:
    """Launching takes 1 s, drafting 6 s on the device, scoring 3 s; the host waits when it reads."""
    host = device = 0.0

    class Event:
        def __init__(self) -> None:
            self.at = max(host, device)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: host)
    monkeypatch.setattr(metrics, "record_event", lambda device: Event())
    timer = metrics.PhaseTimer(torch.device("cuda"))
    for _ in range(2):
        host = max(host, device)
        timer.restart()
        timer.begin()
        host, device = host + 1, host + 6
        timer.mark("draft")
        host, device = host + 1, device + 3
        host = max(host, device)
        timer.mark("score")
        timer.mark("commit")
        assert timer.step == {"draft": 6.0, "score": 3.0, "commit": 0.0}
    assert timer.seconds == {"draft": 12.0, "score": 6.0, "commit": 0.0}
