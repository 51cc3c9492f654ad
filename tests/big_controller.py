"""A controller's state of any size, made without a cluster: for what must stay cheap when it is large."""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu, Instance, ModelState, Worker, WorkerState
from slosched.messages import GpuStats, Span
from slosched.telemetry.tally import Tally

T0 = 1_600_000_000_000_000_000
MS = 1_000_000


def big_controller(
    *, gpus: int, instances: int, architectures: int = 61
) -> tuple[Scheduler, Tally]:
    """`gpus` workers of one GPU each, with a driver's word; every instance and GPU was used once."""
    scheduler = Scheduler(SchedulerConfig(), worker_count=gpus, incarnation=1, version="test")
    tally = Tally()
    cluster = scheduler.cluster
    for index in range(gpus):
        worker = Worker(
            index,
            f"10.0.0.{index}:12345",
            WorkerState.JOINED,
            index + 1,
            f"host{index}",
            100,
            "emulated",
        )
        gpu = Gpu(index, 0, worker, 512, 512, 1 << 24)
        gpu.driver.stats = GpuStats(
            gpu_id=0,
            name="card",
            uuid="",
            driver="",
            sm_percent=50,
            memory_percent=20,
            memory_used_bytes=1 << 30,
            memory_total_bytes=1 << 34,
            power_mw=250_000,
            energy_mj=10**6,
            temperature_c=60,
            sm_clock_mhz=1380,
            memory_clock_mhz=1000,
            throttle_reasons=0,
        )
        worker.gpus.append(gpu)
        cluster.workers[index] = worker
        cluster.gpus[index] = gpu
        for kind in (ActionType.INFER, ActionType.LOAD_WEIGHTS, ActionType.EVICT_WEIGHTS):
            tally.add_action(
                ActionRecord(
                    1,
                    kind,
                    0,
                    index,
                    0,
                    0,
                    4,
                    T0,
                    6 * MS,
                    T0,
                    T0 + 6 * MS,
                    T0 + 7 * MS,
                    T0 + 7 * MS,
                    0,
                    1,
                    exec=Span(T0, T0 + 6 * MS, 6 * MS),
                )
            )
    for index in range(instances):
        model = Instance(
            index, f"net{index % architectures}", index // architectures, ModelState.LOADED
        )
        cluster.models[index] = model
        tally.add_request(
            RequestRecord(
                index, 1, 0, index, 0, "", 1.0, 9 * MS, T0, T0 + 5 * MS, True, 1, 1, False
            )
        )
    return scheduler, tally
