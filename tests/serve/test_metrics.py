"""Figures for Prometheus, also of a server whose drafter has failed: why, since when, and when it starts again."""

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted import Scripted
from servers import Gate, serving, tiny_decoder, until

from specdec.engine import guard
from specdec.engine.engine import EngineStats
from specdec.engine.metrics import RequestMetrics
from specdec.serve.metrics import Metrics


def test_an_aborted_request_is_counted_while_its_figures_still_grow() -> None:
    served = Metrics("model", lambda: EngineStats(0, 0, 0, None, 0, 0, 0, 0, 0, 0))
    request, count = RequestMetrics(), served.accepted_per_source
    request.add_sources(["ngram", "m2r2"])

    class Counting:
        def labels(self, *names: str) -> Any:  # meanwhile the engine's thread takes a step
            request.add_sources([f"{names[-1]} again"])
            return count.labels(*names)

    served.accepted_per_source = Counting()
    served.record_finished(request, "abort", 1.0)
    found = [
        served.registry.get_sample_value(f"{count._name}_total", each)
        for each in ({"model_name": "model", "source": "ngram"}, {"model_name": "model", "source": "m2r2"})
    ]
    assert found == [1, 1]


def test_a_request_that_never_began_has_waited_for_all_its_time_and_run_no_prompt(tmp_path: Path) -> None:
    decoder = tiny_decoder(tmp_path, Scripted(lambda ids, limit: []))
    with decoder.engine(max_rows=1) as engine, serving(decoder, engine) as server, Gate(engine):
        with pytest.raises(httpx.ReadTimeout):
            server.post("/v1/completions", {"prompt": "Name"}, timeout=2)
        until(lambda: server.figure("request_queue_time_seconds_count") == 1)
        assert server.figure("request_queue_time_seconds_sum") > 0 and server.figure("prompt_tokens_total") == 0


@pytest.mark.filterwarnings("ignore::specdec.DrafterWarning")
def test_health_and_metrics_say_why_the_drafter_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = [False]

    def script(ids: list[int], limit: int) -> list[tuple[int, int]]:
        if faulty[0]:
            raise IndexError('"as"\ntold')
        return [(ids[-1], 0)]

    monkeypatch.setattr(guard, "FIRST_PAUSE", 1000.0)
    monkeypatch.setattr(guard, "LONGEST_PAUSE", 1000.0)
    with serving(tiny_decoder(tmp_path, Scripted(script))) as server:

        def health() -> dict[str, Any]:
            return dict(server.get("/health").json())

        before = server.complete(temperature=0)
        assert before.headers["x-specdec-drafter"] == "scripted"
        assert health() == {"status": "ok", "drafter": "on"} and server.figure("spec_decode_drafter_active") == 1
        with pytest.raises(KeyError):
            server.figure("spec_decode_drafter_off_since_seconds")
        faulty[0] = True
        assert server.complete(temperature=0).json()["choices"] == before.json()["choices"]
        found = health()
        assert (found["status"], found["drafter"]) == ("ok", "off")
        outage = found["drafter_outage"]
        assert outage["error"] == 'failed (IndexError: "as" told)'
        assert time.time() - 600 < outage["since"] <= time.time() and 400 < outage["retry_in_seconds"] <= 1000
        assert server.figure("spec_decode_drafter_active") == 0
        assert server.figure("spec_decode_drafter_failures_total") == 1
        assert int(server.figure("spec_decode_drafter_off_since_seconds")) == outage["since"]
        assert 'error="failed (IndexError: \\"as\\" told)"' in server.get("/metrics").text
        assert server.complete(temperature=0).headers["x-specdec-drafter"] == "none"
        faulty[0] = False
        monkeypatch.setattr(guard.Outage, "seconds_left", 0.0)
        assert server.complete(temperature=0).json()["choices"] == before.json()["choices"]
        assert health() == {"status": "ok", "drafter": "on"} and server.figure("spec_decode_drafter_active") == 1
