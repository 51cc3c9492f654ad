"""The metrics of GPUs: what their lanes did, what they hold, and what the driver says of them."""

from __future__ import annotations

from collections.abc import Iterator, Set

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from slosched.codes import ActionType
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu
from slosched.daemon.metric_parts import (
    OF_GPU,
    LaneTable,
    Part,
    SteadyCounts,
    Table,
    family,
    gpu_labels,
    lane_families,
    table_families,
)
from slosched.telemetry.tally import Tally
from slosched.units import NS_PER_S

_INFER, _LOAD, _EVICT = (
    int(kind) for kind in (ActionType.INFER, ActionType.LOAD_WEIGHTS, ActionType.EVICT_WEIGHTS)
)
_OF_LANES: LaneTable = (
    (
        "gpu_busy_seconds",
        "Exec time of finished inferences.",
        _INFER,
        lambda lane: lane.exec_ns / NS_PER_S,
    ),
    ("gpu_inferences", "Finished inferences (batches).", _INFER, lambda lane: lane.count),
    ("gpu_requests", "Requests aboard finished inferences.", _INFER, lambda lane: lane.requests),
    ("gpu_loads", "Weights copied to the GPU.", _LOAD, lambda lane: lane.count),
    (
        "gpu_load_seconds",
        "Time of copying weights to the GPU.",
        _LOAD,
        lambda lane: lane.exec_ns / NS_PER_S,
    ),
    ("gpu_evictions", "Weights whose pages were given back.", _EVICT, lambda lane: lane.count),
    (
        "gpu_eviction_seconds",
        "Time of giving pages back.",
        _EVICT,
        lambda lane: lane.exec_ns / NS_PER_S,
    ),
)
_OF_GPUS: Table[Gpu] = (
    (
        "gpu_outstanding_inferences",
        "Inferences sent and not reported.",
        lambda g: len(g.exec.outstanding),
    ),
    (
        "gpu_outstanding_loads",
        "Loads and evictions sent and not reported.",
        lambda g: len(g.load.outstanding),
    ),
    (
        "gpu_resident_models",
        "Model instances whose weights are on the GPU.",
        lambda g: len(g.resident),
    ),
    ("gpu_pages", "Pages for weights.", lambda g: g.pages),
    ("gpu_free_pages", "Pages that hold no weights.", lambda g: g.free_pages),
    ("gpu_page_bytes", "Size of a page.", lambda g: g.page_bytes),
)
#: Name, text, field of GpuStats, and what makes it base units.
_OF_DRIVERS: tuple[tuple[str, str, str, float], ...] = (
    ("gpu_power_watts", "Power draw.", "power_mw", 1e-3),
    (
        "gpu_sm_busy_ratio",
        "Share of the last second or less in which a kernel ran.",
        "sm_percent",
        1e-2,
    ),
    (
        "gpu_memory_busy_ratio",
        "Share of the last second or less in which memory was accessed.",
        "memory_percent",
        1e-2,
    ),
    ("gpu_memory_used_bytes", "Device memory in use.", "memory_used_bytes", 1),
    ("gpu_memory_size_bytes", "Device memory there is.", "memory_total_bytes", 1),
    ("gpu_temperature_celsius", "Temperature.", "temperature_c", 1),
    ("gpu_sm_clock_hertz", "Clock of the SMs.", "sm_clock_mhz", 1e6),
)


def gpu_families(scheduler: Scheduler, tally: Tally, hosts: Set[tuple[int, int]]) -> Iterator[Part]:
    """What the controller knows of GPUs. `hosts`: the slots of hosts that were ever there, (worker, device)."""
    gpus = [
        gpu for worker in scheduler.cluster.workers.values() for gpu in worker.gpus if not gpu.host
    ]
    # What a GPU did stays counted while its worker is away.
    seen = {(gpu.worker.worker_id, gpu.gpu_id) for gpu in gpus}
    names = sorted((seen | {(worker, gpu) for worker, gpu, _ in tally.lanes}) - hosts)
    yield None
    yield from lane_families(_OF_LANES, tally.lanes, names)
    yield from table_families(
        GaugeMetricFamily, OF_GPU, _OF_GPUS, [(gpu_labels(gpu), gpu) for gpu in gpus]
    )


def driver_families(scheduler: Scheduler, energy: SteadyCounts) -> Iterator[Part]:
    """What NVML says; what a card does not answer has no sample."""
    gpus = [
        (gpu_labels(gpu), gpu.driver.stats)
        for worker in scheduler.cluster.present()
        for gpu in worker.gpus
        if gpu.driver.stats is not None
    ]
    for name, text, field, scale in _OF_DRIVERS:
        yield from family(
            GaugeMetricFamily,
            name,
            text,
            OF_GPU,
            (
                (labels, value * scale)
                for labels, stats in gpus
                if (value := getattr(stats, field)) >= 0
            ),
        )
    yield from family(
        CounterMetricFamily,
        "gpu_energy_joules",
        "Energy that the card used.",
        OF_GPU,
        (
            (labels, energy.grown(("energy", *labels), stats.energy_mj / 1e3))
            for labels, stats in gpus
            if stats.energy_mj >= 0
        ),
    )
