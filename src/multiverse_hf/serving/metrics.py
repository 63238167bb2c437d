"""Metrics for Prometheus, under vLLM's names where it has them, with the prefix ``multiverse:``."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from multiverse_hf.modeling.handles import MultiverseResult
from multiverse_hf.modeling.state import BranchEvent

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
PARALLELISM = (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16)


# name -> key of MultiverseEngine.memory, help
_GAUGES = {
    "num_requests_running": ("num_running", "answers being written"),
    "num_requests_waiting": ("num_waiting", "answers that wait for room"),
    "num_branches_running": ("num_branches", "branches being written"),
}
_COUNTERS = {
    "num_preemptions": ("num_preemptions", "answers that gave up their memory and were read again"),
    "num_steps": ("num_steps", "steps of the engine"),
}


class EngineCollector(Collector):
    """Reads the engine when it is asked."""

    def __init__(self, engine: Any, num_active: Callable[[], int]) -> None:
        self.engine, self.num_active = engine, num_active

    def collect(self) -> Iterator[Metric]:
        """Return the metrics of this moment."""
        memory = self.engine.memory()
        for name, (key, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"multiverse:{name}", text, memory[key])
        for name, (key, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"multiverse:{name}", text, memory[key])
        usage = memory["used_tokens"] / memory["capacity_tokens"]
        yield GaugeMetricFamily("multiverse:kv_cache_usage_perc", "share of the cache in use, 1 for all", usage)
        yield GaugeMetricFamily("multiverse:num_answers_active", "answers taken and not ended", self.num_active())


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": ""}

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"multiverse:{name}", text, labels, **named)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"multiverse:{name}", text, (), buckets=buckets, **named)

        self.requests = counter("http_requests", "requests by path and status", ("path", "status"))
        self.success = counter("request_success", "answers by why they ended", ("finished_reason",))
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "tokens of answers")
        self.forks = counter("forks", "blocks of answers")
        self.cancelled = counter("request_cancelled", "answers whose client went away or that were stopped")
        self.first_token = histogram("time_to_first_token_seconds", "from the request to an answer's first token")
        self.between_tokens = histogram("inter_token_latency_seconds", "between two steps of an answer")
        self.whole = histogram("e2e_request_latency_seconds", "from the request to the end of an answer")
        self.parallelism = histogram("parallelism", "# parallel of answers: tokens over length", PARALLELISM)
        self.draining = Gauge("multiverse:draining", "1 once the server is told to stop", **named)

    def watch(self, engine: Any, num_active: Callable[[], int]) -> None:
        """Show the state of an engine among the metrics."""
        self.registry.register(EngineCollector(engine, num_active))

    def text(self) -> bytes:
        """Return the metrics in Prometheus's format."""
        return generate_latest(self.registry)

    def timer(self, begun: float, num_answers: int) -> "Timer":
        """Return what times the answers of a request that came at ``begun``, of :func:`time.monotonic`."""
        return Timer(self, begun, num_answers)


class Timer:
    """Times the answers of a request."""

    def __init__(self, metrics: Metrics, begun: float, num_answers: int) -> None:
        self.metrics, self.begun, self.num_left = metrics, begun, num_answers
        self._last: dict[int, float] = {}  # by answer, when its last token came

    def note(self, number: int, events: list[BranchEvent]) -> None:
        """Note that events of an answer came."""
        if not any(event.kind == "token" for event in events):
            return
        now = time.monotonic()
        if number in self._last:
            self.metrics.between_tokens.observe(now - self._last[number])
        else:
            self.metrics.first_token.observe(now - self.begun)
        self._last[number] = now

    def end(self, result: MultiverseResult, finish_reason: str) -> None:
        """Note that an answer ended."""
        metrics, stats = self.metrics, result.stats
        metrics.success.labels(finish_reason).inc()
        metrics.prompt_tokens.inc(len(result.prompt_ids))
        metrics.generation_tokens.inc(stats.num_tokens)
        metrics.forks.inc(stats.num_forks)
        metrics.parallelism.observe(stats.parallelism)
        metrics.whole.observe(time.monotonic() - self.begun)
        self.num_left -= 1

    def close(self) -> None:
        """Note that nobody waits any longer for the answers that have not ended."""
        self.metrics.cancelled.inc(self.num_left)
