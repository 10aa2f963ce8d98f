"""Figures for Prometheus."""

from typing import Any

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
