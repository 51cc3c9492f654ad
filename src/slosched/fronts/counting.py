"""What the gateway did, for Prometheus: requests by model, status and token, bytes, latencies, gauges.

Labels are of a bounded number: models and tokens that exist, and what comes beyond that is counted together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from slosched.telemetry.histogram import Histogram
from slosched.units import NS_PER_MS, NS_PER_S

#: Combinations of labels; the others share one.
MOST_LABELS = 4096
_OTHER = ("other", "other", "other")
#: Statuses of requests beside those of errors.
OK, LATE, CANCELLED = "ok", "late", "cancelled"
_BOUNDS_NS = tuple(
    round(ms * NS_PER_MS)
    for ms in (1, 2.5, 5, 10, 25, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000, 10_000)
)


class Counting:
    """Counts since the start."""

    def __init__(self) -> None:
        self._ended: dict[tuple[str, str, str], int] = {}
        self._latency: dict[str, Histogram] = {}
        self.input_bytes = self.output_bytes = self.rows = 0

    def ended(self, model: str, status: str, token: str) -> None:
        """A request has its end. `model` is empty where the client named none that exists."""
        key = (model, status, token)
        if key not in self._ended and len(self._ended) >= MOST_LABELS:
            key = _OTHER
        self._ended[key] = self._ended.get(key, 0) + 1

    def answered(self, model: str, latency_ns: int) -> None:
        """A request was answered with outputs after `latency_ns` here."""
        histogram = self._latency.get(model)
        if histogram is None:
            if len(self._latency) >= MOST_LABELS:
                model = _OTHER[0]
            histogram = self._latency.setdefault(model, Histogram(_BOUNDS_NS))
        histogram.add(latency_ns)

    def families(
        self, gauges: Sequence[tuple[str, str, float]], seen: Callable[[str], bool]
    ) -> Iterable[Metric]:
        """All families, of models only those `seen`; `gauges` are further ones: name, help, value."""
        labels = ("model", "status", "token")
        requests = CounterMetricFamily(
            "slosched_gateway_requests",
            "Inferences that ended, by model and status.",
            labels=labels,
        )
        for values, count in sorted(self._ended.items()):
            if values[0] in ("", _OTHER[0]) or seen(values[0]):
                requests.add_metric(values, count)
        yield requests
        for name, text, value in (
            ("rows", "Rows of these inferences that the controller answered.", self.rows),
            ("input_bytes", "Bytes of inputs of inferences.", self.input_bytes),
            ("output_bytes", "Bytes of outputs of inferences.", self.output_bytes),
        ):
            yield CounterMetricFamily(f"slosched_gateway_{name}", text, value=value)
        latency = HistogramMetricFamily(
            "slosched_gateway_latency_seconds",
            "From the read request to its answer, of those that were answered with outputs.",
            labels=("model",),
        )
        for model, histogram in sorted(self._latency.items()):
            if model == _OTHER[0] or seen(model):
                latency.add_metric((model,), *_buckets(histogram))
        yield latency
        for gauge, text, now in gauges:
            yield GaugeMetricFamily(f"slosched_gateway_{gauge}", text, value=now)

    def text(self, gauges: Sequence[tuple[str, str, float]], seen: Callable[[str], bool]) -> bytes:
        """All of it in Prometheus' text format, and what the process uses."""
        registry = CollectorRegistry()
        registry.register(_Families(list(self.families(gauges, seen))))
        ProcessCollector(registry=registry)
        return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    cumulative: list[tuple[str, float]] = []
    reached = 0
    names = [*(str(bound / NS_PER_S) for bound in histogram.bounds), "+Inf"]
    for name, count in zip(names, histogram.counts, strict=True):
        reached += count
        cumulative.append((name, reached))
    return cumulative, histogram.total / NS_PER_S
