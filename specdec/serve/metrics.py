"""``/metrics`` for Prometheus, under vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specdec.engine.engine import EngineStats
from specdec.engine.metrics import RequestMetrics

FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """Counters and histograms of one server; ``stats`` are the engine's figures of the moment."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        label = {"model_name": model}

        def counter(name: str, help: str, *labels: str) -> Any:
            made = Counter(f"vllm:{name}", help, ["model_name", *labels], registry=self.registry)
            return made if labels else made.labels(**label)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Any:
            made = Histogram(f"vllm:{name}", help, ["model_name"], registry=self.registry, buckets=buckets)
            return made.labels(**label)

        self.model = model
        self.prompt = counter("prompt_tokens", "Prompt tokens of requests.")
        self.generated = counter("generation_tokens", "New tokens.")
        self.drafts = counter("spec_decode_num_drafts", "Steps that could draft.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self.position = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafted tokens by their place in the draft.",
            "position",
        )
        self.finished = counter("request_success", "Finished requests by reason.", "finished_reason")
        self.first = histogram("time_to_first_token_seconds", "Time to the first token.", FIRST)
        self.between = histogram("inter_token_latency_seconds", "Time between two deliveries of tokens.", BETWEEN)
        self.whole = histogram("e2e_request_latency_seconds", "Time of a request.", WHOLE)
        self.queue = histogram("request_queue_time_seconds", "Time until a request is admitted.", WHOLE)
        self.registry.register(_Engine(label, stats))

    def came(self, tokens: int, seconds: float, first: bool) -> None:
        """Tokens of a request have come, ``seconds`` after the last ones."""
        self.generated.inc(tokens)
        (self.first if first else self.between).observe(seconds)

    def ended(self, metrics: RequestMetrics, reason: str, seconds: float) -> None:
        """A request is over; ``reason`` is OpenAI's, or "abort"."""
        self.prompt.inc(metrics.num_prompt_tokens)
        self.drafts.inc(metrics.num_spec_steps)
        self.drafted.inc(metrics.num_draft_tokens)
        self.accepted.inc(metrics.num_accepted_draft_tokens)
        for place in range(max(metrics.per_step_accepted, default=0)):
            count = sum(accepted > place for accepted in metrics.per_step_accepted)
            self.position.labels(self.model, str(place)).inc(count)
        self.finished.labels(self.model, reason).inc()
        self.whole.observe(seconds)
        self.queue.observe(metrics.queue_seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """The engine's own figures, read when somebody looks."""

    def __init__(self, label: dict[str, str], stats: Callable[[], EngineStats]) -> None:
        self.label, self.stats = label, stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        gauges = {
            "num_requests_running": ("Requests that are being decoded.", stats.running),
            "num_requests_waiting": ("Requests that wait.", stats.waiting),
            "spec_decode_drafter_active": (
                "1: the drafter drafts; 0: there is none, or it has failed.",
                stats.drafter == "on",
            ),
            "kv_cache_usage_perc": ("Share of the memory for keys and values that is in use.", stats.kv_usage),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens that were looked up.", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens that were not computed again.", stats.prefix_hits),
            "spec_decode_drafter_failures": ("How often the drafter has failed.", stats.drafter_failures),
            "num_preemptions": ("Requests that gave way and are computed again.", stats.preemptions),
        }
        kinds = ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters))
        for kind, figures in kinds:
            for name, (help, value) in figures.items():
                family = kind(f"vllm:{name}", help, labels=list(self.label))
                family.add_metric(list(self.label.values()), value)
                yield family
