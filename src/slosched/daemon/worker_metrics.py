"""The metrics of workers, and of their processes where they run on the controller's machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Worker, WorkerState
from slosched.daemon.metric_parts import Part, Row, SteadyCounts, Table, family, table_families
from slosched.units import NS_PER_S

_LOCAL = ("127.", "localhost:", "[::1]:")

_OF_WORKERS: Table[Worker] = (
    ("worker_up", "1 while the worker is joined.", lambda w: w.state is WorkerState.JOINED),
    ("worker_gpus", "GPUs of the worker that are in use.", lambda w: len(w.gpus)),
    (
        "worker_clock_offset_seconds",
        "The worker's clock less the controller's.",
        lambda w: w.beat.clock_offset_ns / NS_PER_S,
    ),
    (
        "worker_clock_error_seconds",
        "Bound of the error of the clock's offset.",
        lambda w: w.beat.clock_error_ns / NS_PER_S,
    ),
    (
        "worker_transit_seconds",
        "Expected time from a decision to its receipt by the worker.",
        lambda w: w.transit.expected_ns / NS_PER_S,
    ),
    (
        "worker_return_seconds",
        "Expected time from the end of an inference to its report.",
        lambda w: w.returns.expected_ns / NS_PER_S,
    ),
)
_COUNTED_BY_WORKERS: Table[Worker] = (
    ("worker_lost", "Times that the worker was lost.", lambda w: w.times_lost),
    ("worker_errors", "Actions that the worker answered with an error.", lambda w: w.beat.errors),
    (
        "worker_dropped_messages",
        "Messages that the worker dropped: stale or malformed.",
        lambda w: w.beat.dropped,
    ),
)


def worker_families(scheduler: Scheduler, counts: SteadyCounts) -> Iterator[Part]:
    """Every family of workers. `counts` goes on with what a worker counts when its process is started again."""
    workers = [(str(worker.worker_id), worker) for worker in scheduler.cluster.present()]
    yield from table_families(
        GaugeMetricFamily, ("worker",), _OF_WORKERS, [((name,), worker) for name, worker in workers]
    )
    for family_name, text, total in _COUNTED_BY_WORKERS:
        yield from family(
            CounterMetricFamily,
            family_name,
            text,
            ("worker",),
            (
                ((name,), counts.grown((family_name, name), total(worker)))
                for name, worker in workers
            ),
        )
    yield from family(
        GaugeMetricFamily,
        "worker_info",
        "1; what a worker said of itself when it joined.",
        ("worker", "host", "device", "version", "pid"),
        (
            ((name, worker.host, worker.device, worker.version, str(worker.pid)), 1)
            for name, worker in workers
            if worker.pid
        ),
    )
    yield from _processes(workers, counts)


def _processes(workers: list[tuple[str, Worker]], counts: SteadyCounts) -> Iterator[Part]:
    """The processes of this machine can be looked at; a worker elsewhere has an exporter of its own."""
    cpu: list[Row] = []
    memory: list[Row] = []
    for name, worker in workers:
        if worker.pid and worker.state is WorkerState.JOINED and _is_local(worker):
            found = _process(ProcessCollector(registry=None, pid=lambda w=worker: w.pid))  # type: ignore[misc]
            if found is not None:
                cpu.append(((name,), counts.grown(("cpu", name), found[0])))
                memory.append(((name,), found[1]))
            yield None
    yield from family(
        CounterMetricFamily,
        "worker_cpu_seconds",
        "CPU time of a worker on this machine.",
        ("worker",),
        cpu,
    )
    yield from family(
        GaugeMetricFamily,
        "worker_resident_memory_bytes",
        "Resident memory of a worker on this machine.",
        ("worker",),
        memory,
    )


def _is_local(worker: Worker) -> bool:
    return worker.address.removeprefix("tcp://").startswith(_LOCAL)


def _process(collector: ProcessCollector) -> tuple[float, float] | None:
    """CPU seconds and resident bytes; None of a process that is not to be seen from here."""
    found: dict[str, Any] = {f.name: f.samples[0].value for f in collector.collect()}
    try:
        return found["process_cpu_seconds"], found["process_resident_memory_bytes"]
    except KeyError:
        return None
