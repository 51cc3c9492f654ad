"""/metrics: what the controller counted and what it knows now, in Prometheus' text format.

Everything is counted in one place, the controller, so the numbers are right with any number of workers and
clients. telemetry/tally.py counts; this module names the counts when it is scraped. Units are Prometheus'
base units; a `model` is an architecture and never one of its instances, of which there may be 10,000. The
table of all metrics is in docs/operating.md, which a test holds to what is served.

A scrape is rendered in small parts (metric_parts.py), and the event loop has its turn in between: with 300
GPUs the whole takes a tenth of a second, and requests must not wait for it. So a scrape is not a snapshot;
a counter further down may be a little younger.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from slosched import clock
from slosched.codes import REJECTIONS, ActionType, Code
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import ModelState, RequestState
from slosched.daemon.cascade_metrics import cascade_families
from slosched.daemon.function_metrics import function_families
from slosched.daemon.gpu_metrics import driver_families, gpu_families
from slosched.daemon.http import Answer, Handler, Request
from slosched.daemon.in_slices import Slice
from slosched.daemon.metric_parts import (
    PART_STEPS,
    Part,
    SteadyCounts,
    buckets,
    counter,
    cut,
    family,
    gauge,
    label,
    text_of,
)
from slosched.daemon.worker_metrics import worker_families
from slosched.telemetry.tally import Recent, Tally
from slosched.units import NS_PER_S
from slosched.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ControllerCollector(Collector):
    """All metrics of one controller. `bad_messages` and `rows_dropped` are read when asked."""

    def __init__(
        self,
        scheduler: Scheduler,
        tally: Tally,
        recent: Recent,
        *,
        bad_messages: Callable[[], int] = lambda: 0,
        rows_dropped: Callable[[], int] = lambda: 0,
        now_ns: Callable[[], int] = clock.now_ns,
    ) -> None:
        self._scheduler = scheduler
        self._tally = tally
        self._recent = recent
        self._bad_messages = bad_messages
        self._rows_dropped = rows_dropped
        self._now_ns = now_ns
        self._process = ProcessCollector(registry=None)
        self._counts = SteadyCounts()
        self._hosts: set[tuple[int, int]] = set()  # (worker, device), also of workers that are away

    def collect(self) -> Iterator[Metric]:
        """The families whole, for a registry of prometheus_client's."""
        whole: Metric | None = None
        for part in self.parts():
            if part is None:
                continue
            if whole is not None and whole.name == part.name:
                whole.samples.extend(part.samples)
                continue
            if whole is not None:
                yield whole
            whole = part
        if whole is not None:
            yield whole

    async def render(self) -> bytes:
        """The text of a scrape. After each slice of time the event loop runs whatever else is due."""
        texts: list[bytes] = []
        before = ""
        slice_ = Slice(self._now_ns)
        for part in self.parts():
            if part is not None:
                texts.append(text_of(part, first=part.name != before))
                before = part.name
            if slice_.is_over():
                await slice_.rest()
        return b"".join(texts)

    def parts(self) -> Iterator[Part]:
        """Every family, in one part or in several that follow each other."""
        scheduler = self._scheduler
        yield from self._requests()
        yield from self._waiting()
        yield from self._predictions()
        yield from gpu_families(scheduler, self._tally, self._hosts_seen())
        yield from driver_families(scheduler, self._counts)
        yield from worker_families(scheduler, self._counts)
        yield from self._models()
        yield from cascade_families(scheduler, self._tally.cascades)
        yield from function_families(scheduler, self._tally, self._hosts)
        yield from self._controller()

    def _hosts_seen(self) -> Set[tuple[int, int]]:
        for worker in self._scheduler.cluster.workers.values():
            self._hosts.update((worker.worker_id, gpu.gpu_id) for gpu in worker.gpus if gpu.host)
        return self._hosts

    # ------------------------------------------------------------------------------ requests

    def _requests(self) -> Iterator[Part]:
        scheduler, tally = self._scheduler, self._tally
        offered, in_time, by_code = scheduler.arrived, tally.in_time, dict(scheduler.by_code)
        refused = tally.refused_at_arrival
        yield counter("requests_offered", "Requests that arrived and were valid.", offered)
        yield counter(
            "requests_admitted", "Offered requests not refused on arrival.", offered - refused
        )
        always = (Code.OK, Code.CANCELLED, *REJECTIONS)
        yield counter(
            "requests_invalid",
            "Requests that could not be taken; not among the offered.",
            scheduler.invalid,
        )
        yield counter(
            "requests_refused_at_door",
            "Requests refused since the controller's core was short; not among the offered.",
            scheduler.door.refused,
        )
        answers = {int(code): 0 for code in always} | by_code
        yield from family(
            CounterMetricFamily,
            "requests_answered",
            "Answered requests by code.",
            ("code",),
            (((label(code),), n) for code, n in sorted(answers.items())),
        )
        yield from family(
            CounterMetricFamily,
            "requests_rejected",
            "Requests that the controller decided not to serve, by reason.",
            ("reason",),
            (((label(code),), by_code.get(code, 0)) for code in REJECTIONS),
        )
        yield counter("requests_in_time", "Requests served within their deadline.", in_time)
        satisfaction = self._recent.satisfaction()
        yield from family(
            GaugeMetricFamily,
            "satisfaction_ratio",
            "Share in time of what was answered in the last minute; absent when nothing was.",
            (),
            [] if satisfaction is None else [((), satisfaction)],
        )
        for outcome, histogram in (("served", tally.served), ("not_served", tally.unserved)):
            latency = HistogramMetricFamily(
                "slosched_request_latency_seconds",
                "Arrival to answer, at the controller.",
                labels=["outcome"],
            )
            latency.add_metric([outcome], *buckets(histogram, NS_PER_S))
            yield from cut(latency)

    def _waiting(self) -> Iterator[Part]:
        scheduler = self._scheduler
        now_ns, running = self._now_ns(), 0
        unanswered = scheduler.arrived - scheduler.answered
        looked = 0
        for action in list(scheduler.cluster.actions.values()):
            running += sum(r.state is RequestState.IN_FLIGHT for r in action.requests)
            looked += 1 + len(action.requests)
            if looked >= PART_STEPS:
                looked = 0
                yield None
        oldest_ns = now_ns
        for place, client in enumerate(list(scheduler.clients.values()), 1):
            # In the order of their arrival, so the first is the oldest.
            for request in client.requests.values():
                oldest_ns = min(oldest_ns, request.arrival_ns)
                break
            if place % PART_STEPS == 0:
                yield None
        yield gauge("requests_in_flight", "Requests aboard actions sent to workers.", running)
        yield gauge(
            "requests_queued", "Requests that wait for an action.", max(0, unanswered - running)
        )
        yield gauge(
            "oldest_unanswered_seconds",
            "Age of the oldest request that has no answer.",
            (now_ns - oldest_ns) / NS_PER_S,
        )
        yield gauge("clients", "Clients connected.", len(scheduler.clients))

    def _predictions(self) -> Iterator[Part]:
        tally = self._tally
        for name, text, histogram, unit in (
            (
                "exec_prediction_error_seconds",
                "Actual less predicted duration of an inference.",
                tally.exec_errors,
                NS_PER_S,
            ),
            (
                "completion_prediction_error_seconds",
                "Actual less predicted end of an inference.",
                tally.completion_errors,
                NS_PER_S,
            ),
            ("batch_size_requests", "Requests aboard a finished inference.", tally.batch_sizes, 1),
        ):
            counts, total = buckets(histogram, unit)
            yield from cut(
                HistogramMetricFamily(f"slosched_{name}", text, buckets=counts, sum_value=total)
            )
        yield from family(
            CounterMetricFamily,
            "actions_failed",
            "Actions that a worker did not do, by reason.",
            ("action", "reason"),
            (
                ((ActionType(kind).name.lower(), label(code)), n)
                for (kind, code), n in sorted(tally.failures.items())
            ),
        )

    # -------------------------------------------------------------------------------- models

    def _models(self) -> Iterator[Part]:
        """One walk over the instances, summed by architecture."""
        counted = self._tally.models
        instances: Counter[tuple[str, str]] = Counter()
        sums: dict[str, list[int]] = {}
        for place, model in enumerate(list(self._scheduler.cluster.models.values()), 1):
            if model.function is not None:
                continue
            state: ModelState = model.state
            instances[model.name, state.name.lower()] += 1
            totals = sums.get(model.name)
            if totals is None:
                totals = sums[model.name] = [0, 0, 0, 0]
            answered = counted.get(model.model_id)
            if answered is not None:
                totals[0] += answered[0]
                totals[1] += answered[1]
            totals[2] += model.queued
            totals[3] += len(model.resident_on)
            if place % PART_STEPS == 0:
                yield None
        for place, (kind, name, text) in enumerate(_OF_MODELS):
            yield from family(
                kind,
                name,
                text,
                ("model",),
                (((model,), totals[place]) for model, totals in sums.items()),
            )
        yield from family(
            GaugeMetricFamily,
            "model_instances",
            "Model instances, by what they are ready for.",
            ("model", "state"),
            instances.items(),
        )

    # ----------------------------------------------------------------------------- controller

    def _controller(self) -> Iterator[Part]:
        scheduler = self._scheduler
        config = scheduler.cluster.config
        yield gauge("ready", "1 while at least one GPU can be given work.", scheduler.ready())
        yield gauge("draining", "1 once the controller was told to end.", scheduler.draining)
        yield counter(
            "bad_messages",
            "Messages that could not be read, of clients and workers.",
            self._bad_messages(),
        )
        yield counter(
            "log_rows_dropped",
            "Rows of the logs that the disk did not take in time.",
            self._rows_dropped(),
        )
        yield from family(
            GaugeMetricFamily,
            "controller_info",
            "1; which policy runs.",
            ("policy", "fidelity", "version"),
            [((config.policy, config.fidelity, __version__), 1)],
        )
        yield from self._process.collect()


def metrics_routes(collector: ControllerCollector) -> dict[str, Handler]:
    """/metrics."""

    async def metrics(_: Request) -> Answer:
        return Answer(200, CONTENT_TYPE, await collector.render())

    return {"/metrics": metrics}


_OF_MODELS: tuple[tuple[type[CounterMetricFamily | GaugeMetricFamily], str, str], ...] = (
    (CounterMetricFamily, "model_requests_answered", "Answered requests of the architecture."),
    (CounterMetricFamily, "model_requests_in_time", "Requests of it served within their deadline."),
    (GaugeMetricFamily, "model_requests_queued", "Requests that wait for an action."),
    (GaugeMetricFamily, "model_resident", "Copies of weights on GPUs, over all instances."),
)
