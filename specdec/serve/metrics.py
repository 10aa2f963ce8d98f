"""``/metrics`` for Prometheus, with vLLM's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specdec.engine.engine import EngineStats
from specdec.engine.metrics import RequestMetrics

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
E2E_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """The Prometheus counters and histograms of one server, in ``registry``, which ``/metrics`` prints.

    model: the model's name, a label of all figures. stats: returns the engine's current figures.
    """

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
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests.")
        self.generation_tokens = counter("generation_tokens", "New tokens.")
        self.drafts = counter("spec_decode_num_drafts", "Steps of requests that a drafter serves.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Accepted drafted tokens.")
        self.accepted_per_position = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Accepted drafted tokens by their position in the draft.",
            "position",
        )
        self.drafted_steps = counter("spec_decode_num_drafted_steps", "Steps that scored drafted tokens.")
        self.saved = counter(
            "spec_decode_saved_seconds", "Estimated seconds that drafting saved against plain decoding."
        )
        self.accepted_per_source = counter(
            "spec_decode_num_accepted_tokens_per_source",
            "Accepted drafted tokens by the drafter that proposed them.",
            "source",
        )
        self.notes = counter("spec_decode_notes", "Requests for which little was drafted, by reason.", "reason")
        self.finished = counter("request_success", "Finished requests by reason.", "finished_reason")
        self.ttft = histogram("time_to_first_token_seconds", "Time to the first token.", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Time between two steps with new tokens.", ITL_BUCKETS)
        self.e2e_latency = histogram("e2e_request_latency_seconds", "Time of a request.", E2E_BUCKETS)
        self.queue_time = histogram("request_queue_time_seconds", "Time in the queue.", E2E_BUCKETS)
        self.key_requests = counter("key_requests", "Finished choices by the name of their key.", "key")
        self.key_tokens = counter("key_tokens", "Tokens of prompts and answers by the name of their key.", "key")
        self.registry.register(_EngineCollector(label, stats))

    def record_tokens(self, tokens: int, seconds: float, first: bool) -> None:
        """Count new tokens of a choice. tokens: their number. first: whether they are its first ones.

        seconds: time since the choice's last tokens, or since its submission if these are the first.
        """
        self.generation_tokens.inc(tokens)
        (self.ttft if first else self.itl).observe(seconds)

    def record_finished(self, metrics: RequestMetrics, reason: str, seconds: float, began: bool = True) -> None:
        """Count a finished choice. metrics: the engine's figures of it. seconds: time since its submission.

        reason: OpenAI's finish reason, or "abort". began: whether it has left the queue.
        """
        self.prompt_tokens.inc(metrics.num_prompt_tokens * began)
        self.drafts.inc(metrics.num_spec_steps)
        self.drafted.inc(metrics.num_draft_tokens)
        self.accepted.inc(metrics.num_accepted_draft_tokens)
        self.drafted_steps.inc(metrics.num_drafted_steps)
        self.saved.inc(max(metrics.draft_saved_seconds, 0.0))
        for source, count in metrics.accepted_by_source.copy().items():  # a cancelled request may take one more step
            self.accepted_per_source.labels(self.model, source).inc(count)
        if (note := metrics.draft_note) is not None:
            self.notes.labels(self.model, note.partition(":")[0]).inc()
        for position in range(max(metrics.per_step_accepted, default=0)):
            count = sum(accepted > position for accepted in metrics.per_step_accepted)
            self.accepted_per_position.labels(self.model, str(position)).inc(count)
        self.finished.labels(self.model, reason).inc()
        self.e2e_latency.observe(seconds)
        self.queue_time.observe(metrics.queue_seconds if began else seconds)

    def record_key(self, name: str, choices: int, tokens: int) -> None:
        """Count ``choices`` answers and ``tokens`` prompt and new tokens for the API key called ``name``."""
        self.key_requests.labels(self.model, name).inc(choices)
        self.key_tokens.labels(self.model, name).inc(tokens)


class _EngineCollector(Collector):
    """Prometheus collector that reads the engine's figures at each scrape. stats: returns them. label: their labels."""

    def __init__(self, label: dict[str, str], stats: Callable[[], EngineStats]) -> None:
        self.label, self.stats = label, stats

    def collect(self) -> Iterator[Metric]:
        stats, labels = self.stats(), list(self.label)
        for kind, name, help, value in (
            (GaugeMetricFamily, "num_requests_running", "Requests being decoded.", stats.running),
            (GaugeMetricFamily, "num_requests_waiting", "Requests in the queue.", stats.waiting),
            (GaugeMetricFamily, "spec_decode_drafter_active", "1 if the drafter is on, else 0.", stats.drafter == "on"),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Used share of the KV cache, from 0 to 1.", stats.kv_usage),
            (CounterMetricFamily, "prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            (CounterMetricFamily, "prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            (GaugeMetricFamily, "prefix_cache_bytes", "Bytes of cached prefixes in memory.", stats.prefix_bytes),
            (CounterMetricFamily, "prefix_cache_saved_seconds", "Estimated seconds saved.", stats.saved_seconds),
            (CounterMetricFamily, "external_prefix_cache_queries", "Tokens looked up on disk.", stats.disk_queries),
            (CounterMetricFamily, "external_prefix_cache_hits", "Prompt tokens read from disk.", stats.disk_hits),
            (GaugeMetricFamily, "external_prefix_cache_bytes", "Bytes of prefixes on disk.", stats.disk_bytes),
            (CounterMetricFamily, "spec_decode_drafter_failures", "Failures of the drafter.", stats.drafter_failures),
            (CounterMetricFamily, "num_preemptions", "Preempted requests.", stats.preemptions),
        ):
            family = kind(f"vllm:{name}", help, labels=labels)
            family.add_metric(list(self.label.values()), value)
            yield family
        if (outage := stats.outage) is not None:
            why = GaugeMetricFamily(
                "vllm:spec_decode_drafter_off_since_seconds",
                "Unix time at which the drafter failed, while it is off; the label error says why.",
                labels=[*labels, "error"],
            )
            why.add_metric([*self.label.values(), outage.error], outage.since)
            yield why
