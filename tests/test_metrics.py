"""/metrics: what is said, that it is exact, and that a scrape of a large controller comes in small parts."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from big_controller import big_controller
from scheduler_rig import MS, T0, Rig
from slosched.codes import ActionType, Code
from slosched.core.scheduler.interface import ActionDone, RequestDone
from slosched.daemon.http import Answer, Request
from slosched.daemon.in_slices import SLICE_NS
from slosched.daemon.metric_parts import PART_SAMPLES
from slosched.daemon.metrics import (
    CONTENT_TYPE,
    ControllerCollector,
    metrics_routes,
)
from slosched.messages import NO_BEAT, GpuStats, ModelInfo
from slosched.telemetry.tally import Recent, Tally

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: bytes) -> Samples:
    """Every sample by name and labels. Raises if a family or a sample is there twice."""
    samples: Samples = {}
    names = []
    for family in text_string_to_metric_families(text.decode()):
        names.append(family.name)
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, key
            samples[key] = sample.value
    assert len(names) == len(set(names))
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"slosched_{name}", frozenset(labels.items())]


def scrape(collector: ControllerCollector) -> Samples:
    return parsed(asyncio.run(collector.render()))


def fed(rig: Rig) -> Tally:
    tally = Tally()
    for effect in rig.effects:
        if isinstance(effect, RequestDone):
            tally.add_request(effect.record)
        elif isinstance(effect, ActionDone):
            tally.add_action(effect.record)
    return tally


def collector_of(rig: Rig) -> ControllerCollector:
    tally = fed(rig)
    return ControllerCollector(rig.scheduler, tally, Recent(tally), now_ns=lambda: rig.now_ns)


@pytest.fixture
def served() -> tuple[Rig, ModelInfo]:
    """One GPU; a request served in time, and one refused on arrival."""
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=100)
    rig.step(10)
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 13 * MS
    rig.finish(infer, begin_ms=10.5)
    rig.step()
    rig.infer(model, slo_ms=0.5)
    rig.step(14)
    return rig, model


def test_requests_are_counted_as_the_records_say(served: tuple[Rig, ModelInfo]) -> None:
    rig, model = served
    samples = scrape(collector_of(rig))
    records = rig.records()
    assert [r.code for r in records] == [Code.OK, Code.COULD_NOT_START_IN_TIME]
    assert value(samples, "requests_offered_total") == 2
    assert value(samples, "requests_admitted_total") == 1
    assert value(samples, "requests_in_time_total") == 1
    assert value(samples, "requests_answered_total", code="ok") == 1
    assert value(samples, "requests_rejected_total", reason="could_not_start_in_time") == 1
    assert value(samples, "requests_rejected_total", reason="timed_out") == 0
    assert value(samples, "satisfaction_ratio") == 0.5
    latency_s = (records[0].departure_ns - records[0].arrival_ns) / 1e9
    assert value(samples, "request_latency_seconds_sum", outcome="served") == latency_s
    assert value(samples, "request_latency_seconds_count", outcome="not_served") == 1
    assert value(samples, "model_requests_answered_total", model=model.name) == 2
    assert value(samples, "model_requests_in_time_total", model=model.name) == 1


def test_a_request_that_could_not_be_taken_is_not_among_the_offered(
    served: tuple[Rig, ModelInfo],
) -> None:
    rig, _ = served
    rig.infer(99, slo_ms=10)  # no such model
    samples = scrape(collector_of(rig))
    assert value(samples, "requests_invalid_total") == 1
    assert value(samples, "requests_offered_total") == 2


def test_histograms_are_cumulative_and_in_seconds(served: tuple[Rig, ModelInfo]) -> None:
    rig, _ = served
    samples = scrape(collector_of(rig))
    by_bound: dict[float, float] = {}
    for (name, labels), count in samples.items():
        if name == "slosched_request_latency_seconds_bucket" and ("outcome", "served") in labels:
            by_bound[float(dict(labels)["le"])] = count
    bounds = sorted(by_bound)
    assert bounds[0] == 0.0001 and bounds[-2:] == [10.0, float("inf")]
    counts = [by_bound[bound] for bound in bounds]
    assert counts == sorted(counts) and counts[-1] == 1
    record, _ = rig.records()
    latency_s = (record.departure_ns - record.arrival_ns) / 1e9
    assert all(by_bound[bound] == (latency_s <= bound) for bound in bounds)


def test_what_waits_and_what_runs(served: tuple[Rig, ModelInfo]) -> None:
    rig, model = served
    for _ in range(5):
        rig.infer(model, slo_ms=1000)
    rig.step()
    sent = sum(len(a.requests) for a in rig.scheduler.cluster.actions.values())
    assert sent > 0
    rig.now_ns += 3_000_000
    samples = scrape(collector_of(rig))
    assert value(samples, "requests_in_flight") == sent
    assert value(samples, "requests_queued") == 5 - sent
    assert value(samples, "oldest_unanswered_seconds") == pytest.approx(0.003)
    assert value(samples, "clients") == 1
    assert value(samples, "gpu_outstanding_inferences", worker="0", gpu="0") >= 1


def test_counters_survive_the_loss_and_the_return_of_a_worker(
    served: tuple[Rig, ModelInfo],
) -> None:
    rig, _ = served
    collector = collector_of(rig)
    worker = rig.scheduler.cluster.workers[0]
    worker.beat, worker.pid = replace(NO_BEAT, errors=3), os.getpid()
    worker.address = "127.0.0.1:12345"
    before = scrape(collector)
    gpu = {"worker": "0", "gpu": "0"}
    assert value(before, "gpu_busy_seconds_total", **gpu) > 0
    assert value(before, "worker_up", worker="0") == 1
    rig.scheduler.sessions.lose(worker, "a test", now_ns=rig.now_ns)
    rig.step()
    away = scrape(collector)
    assert value(away, "worker_up", worker="0") == 0
    assert value(away, "worker_lost_total", worker="0") == 1
    assert value(away, "worker_gpus", worker="0") == 0
    worker.beat = NO_BEAT
    rig.join(session=51)
    worker.beat = replace(NO_BEAT, errors=1)  # a new process, which counts from the beginning
    back = scrape(collector)
    assert value(back, "worker_errors_total", worker="0") == 4
    for samples in (away, back):
        for key, count in before.items():
            if key[0].endswith(("_total", "_count")) and "cpu" not in key[0]:
                assert samples.get(key, count) >= count, key
        assert value(samples, "gpu_busy_seconds_total", **gpu) == value(
            before, "gpu_busy_seconds_total", **gpu
        )


def test_what_a_driver_says_is_in_base_units_and_what_it_does_not_say_is_left_out() -> None:
    scheduler, tally = big_controller(gpus=2, instances=1)
    collector = ControllerCollector(scheduler, tally, Recent(tally))
    gpu = scheduler.cluster.gpus[1]
    gpu.driver.stats = GpuStats(
        gpu_id=0, name="card", power_mw=300_000, energy_mj=5_000_000, sm_clock_mhz=1380
    )
    samples = scrape(collector)
    assert value(samples, "gpu_power_watts", worker="1", gpu="0") == 300
    assert value(samples, "gpu_energy_joules_total", worker="1", gpu="0") == 5000
    assert value(samples, "gpu_sm_clock_hertz", worker="1", gpu="0") == 1.38e9
    assert value(samples, "gpu_sm_busy_ratio", worker="0", gpu="0") == 0.5
    assert ("slosched_gpu_sm_busy_ratio", frozenset({("worker", "1"), ("gpu", "0")})) not in samples
    gpu.driver.stats = GpuStats(
        gpu_id=0, name="card", energy_mj=1_000_000
    )  # the driver was loaded anew
    samples = scrape(collector)
    assert value(samples, "gpu_energy_joules_total", worker="1", gpu="0") == 6000


def test_failed_actions_say_of_what_kind_and_why() -> None:
    scheduler, tally = big_controller(gpus=1, instances=1)
    tally.failures[int(ActionType.INFER), int(Code.EXEC_TOO_LATE)] = 7
    samples = scrape(ControllerCollector(scheduler, tally, Recent(tally)))
    assert value(samples, "actions_failed_total", action="infer", reason="exec_too_late") == 7


def test_the_controller_s_own_process_and_workers_on_this_machine_are_measured() -> None:
    scheduler, tally = big_controller(gpus=2, instances=1)
    near = scheduler.cluster.workers[0]
    near.address, near.pid = "127.0.0.1:12345", os.getpid()
    samples = scrape(ControllerCollector(scheduler, tally, Recent(tally)))
    assert samples["process_cpu_seconds_total", frozenset()] > 0
    resident = samples["process_resident_memory_bytes", frozenset()]
    assert value(samples, "worker_resident_memory_bytes", worker="0") == pytest.approx(
        resident, rel=0.2
    )
    of_workers = [labels for name, labels in samples if name == "slosched_worker_cpu_seconds_total"]
    assert of_workers == [frozenset({("worker", "0")})]  # the other is on another machine


def test_a_registry_gets_the_same_families_as_a_scrape() -> None:
    scheduler, tally = big_controller(gpus=40, instances=100)
    collector = ControllerCollector(scheduler, tally, Recent(tally))
    registry = CollectorRegistry()
    registry.register(collector)
    assert parsed(generate_latest(registry)).keys() == scrape(collector).keys()


def test_a_large_scrape_is_made_in_small_parts_and_stays_bounded() -> None:
    scheduler, tally = big_controller(gpus=300, instances=10_000)
    collector = ControllerCollector(scheduler, tally, Recent(tally))
    parts = list(collector.parts())
    samples: dict[str, int] = defaultdict(int)
    for part in parts:
        if isinstance(part, Metric):
            assert len(part.samples) <= PART_SAMPLES
            samples[part.name] += len(part.samples)
    assert parts.count(None) >= 10_000 // 100  # the walk over the instances stops as well
    # By architecture, not by instance; and what is there for each GPU, 300 times.
    assert samples["slosched_model_instances"] == 61
    assert samples["slosched_gpu_busy_seconds"] == 300
    assert sum(samples.values()) < 300 * 40 + 61 * 6 + 300


@pytest.mark.parametrize(("each_look_ns", "lets_others_run"), [(SLICE_NS, True), (0, False)])
def test_others_have_their_turn_whenever_a_slice_of_time_is_over(
    each_look_ns: int, lets_others_run: bool
) -> None:
    scheduler, tally = big_controller(gpus=100, instances=1000)
    turns = looks = 0

    def now_ns() -> int:
        nonlocal looks
        looks += 1
        return looks * each_look_ns

    collector = ControllerCollector(scheduler, tally, Recent(tally), now_ns=now_ns)

    async def run() -> None:
        nonlocal turns
        scraping = asyncio.create_task(collector.render())
        while not scraping.done():
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(run())
    assert (turns >= len(list(collector.parts()))) == lets_others_run
    assert lets_others_run or turns < 5


def test_the_route_answers_in_the_text_format() -> None:
    scheduler, tally = big_controller(gpus=1, instances=1)
    handler = metrics_routes(ControllerCollector(scheduler, tally, Recent(tally)))["/metrics"]

    async def ask() -> Answer:
        answer = handler(Request("/metrics"))
        assert not isinstance(answer, Answer)
        return await answer

    answer = asyncio.run(ask())
    assert (answer.status, answer.content_type) == (200, CONTENT_TYPE)
    assert isinstance(answer.body, bytes) and parsed(answer.body)
