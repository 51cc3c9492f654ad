"""Metrics of shared runs, on examples that were worked out by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from slosched.share.energy import counter_joules, energy_of, integrated_joules, mean_watts
from slosched.share.latency import latency_of, percentiles
from slosched.share.metrics import jain, metrics_of
from slosched.share_spec import (
    Arriving,
    Clients,
    Interruption,
    Job,
    JobResult,
    Mode,
    PowerSample,
    Request,
    RunResult,
    ShareSpec,
    Status,
)

MS, S = 1_000_000, 1_000_000_000
LOW, HIGH = Job(name="low", model="gpt"), Job(name="high", model="bert", priority=1)
SPEC = ShareSpec(jobs=(LOW, HIGH))


def rows(
    job: int, start_ms: int, each_ms: int, n: int, gap_ms: int = 0, **more: Any
) -> tuple[Request, ...]:
    """`n` requests of `each_ms`, one behind the other with `gap_ms` between them."""
    return tuple(
        Request(
            job=job,
            number=k,
            arrived_ns=(begin := (start_ms + k * (each_ms + gap_ms))) * MS,
            started_ns=begin * MS,
            ended_ns=(begin + each_ms) * MS,
            **more,
        )
        for k in range(n)
    )


def watts(level: float, until_s: int, *, energy: bool = True) -> tuple[PowerSample, ...]:
    return tuple(
        PowerSample(
            at_ns=k * S // 10,
            watts=level,
            energy_mj=round(7_000_000 + level * k * 100) if energy else -1,
        )
        for k in range(until_s * 10 + 1)
    )


def run(*jobs: JobResult, mode: Mode = Mode.TM, level: float = 0.0, **more: Any) -> RunResult:
    power = watts(level, 10) if level else ()
    return RunResult(mode=mode, repeat=0, jobs=jobs, begin_ns=0, end_ns=10 * S, power=power, **more)


# Alone: low takes 100 ms, 100 W over idle; high takes 50 ms every second.
SOLO_LOW = run(JobResult(job=0, requests=rows(0, 0, 100, 100)), level=300.0, idle_watts=100.0)
SOLO_HIGH = run(JobResult(job=1, requests=rows(1, 0, 50, 10, 950)), level=120.0, idle_watts=100.0)
SOLOS = {0: SOLO_LOW, 1: SOLO_HIGH}


def test_a_solo_run_beside_itself_is_one() -> None:
    for job, solo in SOLOS.items():
        found = metrics_of(SPEC, solo, {job: solo})
        assert found.stp == found.antt == found.jain == 1.0
        assert found.jobs[0].inflation.all == found.jobs[0].inflation.apart == 0.0
        assert found.jobs[0].inflation.overlapping_n == 0
        assert found.complete


def test_the_energy_ratio_of_a_busy_solo_run_is_one_and_idle_clients_cost_their_own_gpu() -> None:
    busy = metrics_of(SPEC, SOLO_LOW, {0: SOLO_LOW})
    assert busy.energy_ratio == pytest.approx(1.0) == busy.gpu_seconds_ratio
    idle = metrics_of(SPEC, SOLO_HIGH, {1: SOLO_HIGH})
    # 0.5 s of work: 1200 J - 9.5 s x 100 W = 250 J for 10 requests; with its idle time all 1200 J again.
    assert idle.jobs[0].solo_joules_per_request == pytest.approx(25.0)
    assert idle.energy_ratio == pytest.approx(1200 / 250)
    assert idle.energy_ratio_with_idle == pytest.approx(1.0)
    assert idle.gpu_s_alone == pytest.approx(0.5)


def test_two_jobs_on_one_gpu() -> None:
    # Low: 80 requests of 125 ms; high: ten of 60 ms, of which each overlaps low ones.
    low = JobResult(job=0, requests=rows(0, 0, 125, 80))
    high = JobResult(job=1, requests=rows(1, 0, 60, 10, 940))
    found = metrics_of(SPEC, run(low, high, level=320.0, idle_watts=100.0), SOLOS)
    assert [each.throughput_per_s for each in found.jobs] == pytest.approx([8.0, 1.0])
    assert found.stp == pytest.approx(0.8 + 1.0)
    assert found.antt == pytest.approx((1.25 + 1.2) / 2)
    assert found.jain == pytest.approx(1.8**2 / (2 * (0.64 + 1.0)))
    a, b = found.jobs
    assert a.inflation.all == pytest.approx(0.25) and b.inflation.all == pytest.approx(0.2)
    # Those of high begin at each second, as every eighth of low's does.
    assert (a.inflation.overlapping_n, a.inflation.apart_n) == (10, 70)
    assert (b.inflation.overlapping_n, b.inflation.apart_n) == (10, 0)
    assert b.inflation.apart is None
    # Energy: 3200 J. Alone: 80 x 30 J and 10 x 25 J; idle 10 - 8 s and 10 - 0.5 s at 100 W.
    assert found.energy_alone_j == pytest.approx(2650.0)
    assert found.energy_ratio == pytest.approx(3200 / 2650)
    assert found.energy_ratio_with_idle == pytest.approx(3200 / (2650 + 200 + 950))
    assert found.joules_per_request == pytest.approx(3200 / 90)
    assert found.active_joules_per_request == pytest.approx(2200 / 90)
    assert found.gpu_s_alone == pytest.approx(8.5)
    # Attribution: 10 s of low, 0.6 s of high.
    assert a.device_share == pytest.approx(10 / 10.6) and not a.device_measured
    assert b.joules_per_request == pytest.approx(3200 * 0.6 / 10.6 / 10)
    assert a.joules is not None and b.joules is not None
    assert a.joules + b.joules == pytest.approx(3200.0)


def test_energy_is_attributed_by_measured_device_time() -> None:
    low = JobResult(job=0, requests=rows(0, 0, 100, 100, device_ns=30 * MS))
    high = JobResult(job=1, requests=rows(1, 0, 100, 100, device_ns=10 * MS))
    found = metrics_of(SPEC, run(low, high, level=100.0))
    assert [each.device_share for each in found.jobs] == pytest.approx([0.75, 0.25])
    assert all(each.device_measured for each in found.jobs)
    assert found.stp is None and found.energy_ratio is None, "no run alone"
    assert found.active_joules_per_request is None, "idle power is unknown"


def test_a_request_counts_with_its_part_in_the_window() -> None:
    # From -5 s to 15 s in requests of 4 s: 2.5 of them lie in ten seconds.
    job = JobResult(job=0, requests=rows(0, -5000, 4000, 5))
    found = metrics_of(SPEC, run(job)).jobs[0]
    assert found.work == pytest.approx(2.5) and found.throughput_per_s == pytest.approx(0.25)
    assert found.n == 2, "those of 3 s and 7 s arrived in it"


def test_warmups_and_cut_requests_are_left_out() -> None:
    kept = rows(0, 0, 100, 3)
    odd = rows(0, 300, 5000, 1, warmup=True) + rows(0, 400, 9000, 1, cut=True)
    found = metrics_of(SPEC, run(JobResult(job=0, requests=kept + odd))).jobs[0]
    assert found.n == 3 and found.latency is not None and found.latency.p100_ms == 100.0
    assert found.work == pytest.approx(3.0)


def test_misses_by_the_deadline_of_the_row_the_job_and_the_run_alone() -> None:
    requests = rows(0, 0, 100, 4) + rows(0, 1000, 170, 2) + rows(0, 2000, 300, 1)
    tight = Job(name="a", model="gpt", slo_ns=150 * MS)
    found = metrics_of(ShareSpec(jobs=(tight,)), run(JobResult(job=0, requests=requests)), SOLOS)
    misses = found.jobs[0].misses
    assert (misses.n, misses.missed, misses.slo_ms) == (7, 3, 150.0)
    assert (misses.deft_missed, misses.deft_share) == (3, 3 / 7)  # over 160 ms
    times = Job(name="a", model="gpt", slo_times_solo=2.0)
    spec = ShareSpec(jobs=(times,))
    assert (
        metrics_of(spec, run(JobResult(job=0, requests=requests)), SOLOS).jobs[0].misses.missed == 1
    )
    assert metrics_of(spec, run(JobResult(job=0, requests=requests))).jobs[0].misses.n == 0
    own = rows(0, 0, 100, 1, deadline_ns=99 * MS)
    assert metrics_of(spec, run(JobResult(job=0, requests=own)), SOLOS).jobs[0].misses.missed == 1


def test_pauses_and_what_they_cost_the_low_job() -> None:
    # Every request takes 105 ms; each second one is paused for 45 ms more.
    low = tuple(
        Request(
            job=0,
            number=k,
            arrived_ns=k * 200 * MS,
            started_ns=k * 200 * MS,
            ended_ns=(k * 200 + (150 if k % 2 else 105)) * MS,
            interruptions=k % 2,
            paused_ns=45 * MS * (k % 2),
        )
        for k in range(10)
    )
    high = rows(1, 240, 45, 5, 355)
    pauses = tuple(
        Interruption(
            job=0,
            by=1,
            wanted_ns=(240 + 400 * k) * MS,
            started_ns=(241 + 400 * k) * MS,
            resumed_ns=(286 + 400 * k) * MS,
        )
        for k in range(5)
    )
    found = metrics_of(
        SPEC,
        run(JobResult(job=0, requests=low, interruptions=pauses), JobResult(job=1, requests=high)),
        SOLOS,
    )
    assert found.low_overhead == pytest.approx(0.05)
    a = found.jobs[0]
    assert a.inflation.overlapping == pytest.approx(0.5) and a.inflation.own == pytest.approx(0.05)
    assert (a.inflation.overlapping_n, a.inflation.apart_n) == (5, 5)
    for figures in (found.pauses, a.pauses):
        assert figures.n == 5 and figures.preempted is not None and figures.paused is not None
        assert figures.preempted.p50_ms == 1.0 and figures.paused.mean_ms == 45.0
    assert found.jobs[1].pauses.n == 0


def test_what_an_open_loop_left_over_is_told_and_what_clients_of_a_closed_one_await_is_not() -> (
    None
):
    open_loop = Clients(arriving=Arriving.POISSON, rate_per_s=100.0)
    spec = ShareSpec(jobs=(msgspec.structs.replace(LOW, clients=open_loop), HIGH))
    found = metrics_of(spec, run(*(JobResult(job=job, left=7) for job in (0, 1))))
    assert [each.left for each in found.jobs] == [7, 0]
    [told] = [note for note in found.notes if "not started" in note]
    assert told.startswith("low: 7 requests")


def test_a_failed_job_is_there_with_its_status() -> None:
    good = JobResult(job=0, requests=rows(0, 0, 100, 100))
    bad = JobResult(job=1, status=Status.OUT_OF_MEMORY, reason="CUDA out of memory")
    found = metrics_of(SPEC, run(good, bad), SOLOS)
    assert not found.complete and found.jobs[1].status is Status.OUT_OF_MEMORY
    assert found.jobs[1].latency is None and found.jobs[1].throughput_per_s == 0.0
    assert found.stp == pytest.approx(1.0) and found.antt is None
    assert any("out of memory: CUDA out of memory" in note for note in found.notes)


def test_an_empty_window_and_no_job_divide_by_nothing() -> None:
    empty = RunResult(mode=Mode.MPS, repeat=0, jobs=(), begin_ns=5, end_ns=5, unavailable="no MPS")
    found = metrics_of(SPEC, empty)
    assert found.unavailable == "no MPS" and not found.complete
    assert (found.stp, found.antt, found.jain, found.throughput_per_s) == (None, None, None, 0.0)


def test_percentiles_are_numpys_and_a_p99_needs_a_hundred() -> None:
    values = [int(each) for each in np.random.default_rng(3).integers(1, 10**9, 99)]
    few = latency_of(values)
    assert few is not None and few.p99_is_maximum and few.p99_ms == few.p100_ms
    many = latency_of([*values, 10**9])
    assert many is not None and not many.p99_is_maximum
    expected = np.percentile(np.array([*values, 10**9]) / 1e6, [0, 50, 90, 99, 100])
    assert percentiles([*values, 10**9]) == pytest.approx(tuple(expected))
    assert many.p99_ms == pytest.approx(expected[3])
    assert many.sem_ms == pytest.approx(np.std([*values, 10**9], ddof=1) / 10 / 1e6)
    assert latency_of([]) is None
    one = latency_of([5 * MS])
    assert one is not None and one.sem_ms is None and one.mean_ms == one.p50_ms == 5.0


def test_jain() -> None:
    assert jain([1.0, 1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([0.0]) is None and jain([]) is None


# --------------------------------------------------------------------------------------------- energy


def test_counter_and_integral_agree_on_constant_power() -> None:
    found = energy_of(watts(250.0, 10), S, 9 * S, idle_watts=80.0)
    assert found.source == "counter" and found.joules == pytest.approx(2000.0)
    assert found.difference == pytest.approx(0.0, abs=1e-9)
    assert found.active_j == pytest.approx(2000 - 640) and found.mean_watts == pytest.approx(250.0)
    assert found.samples == 81 and found.samples_per_s == pytest.approx(81 / 8)


def test_their_difference_is_stated() -> None:
    samples = [
        PowerSample(at_ns=k * S, watts=110.0, energy_mj=100_000 * k, throttle=1 << (k % 2))
        for k in range(5)
    ]
    found = energy_of(samples, 0, 4 * S)
    assert (found.counter_j, found.integrated_j) == (400.0, 440.0)
    assert found.difference == pytest.approx(0.1) and found.joules == 400.0
    assert found.throttle == 3


def test_a_ramp_is_integrated_by_trapezoids_between_samples() -> None:
    ramp = [PowerSample(at_ns=k * S, watts=100.0 * k) for k in range(5)]
    assert integrated_joules(ramp, 0, 4 * S) == pytest.approx(800.0)
    assert integrated_joules(ramp, S // 2, 3 * S // 2) == pytest.approx(100.0)
    assert counter_joules(ramp, 0, 4 * S) is None
    found = energy_of(ramp, 0, 4 * S)
    assert found.source == "integrated" and found.joules == pytest.approx(800.0)


def test_the_counter_is_read_less_often_than_power() -> None:
    samples = [
        PowerSample(at_ns=k * S // 20, watts=200.0, energy_mj=-1 if k % 4 else k * 10_000)
        for k in range(201)
    ]
    assert counter_joules(samples, S, 9 * S) == pytest.approx(1600.0)


def test_what_does_not_cover_the_window_is_not_made_up() -> None:
    late = [each for each in watts(100.0, 10) if each.at_ns > 2 * S]
    found = energy_of(late, 0, 10 * S)
    assert found.joules is None and "less than 95 %" in found.problem
    nearly = [each for each in watts(100.0, 10) if each.at_ns >= S // 5]
    assert energy_of(nearly, 0, 10 * S).joules == pytest.approx(1000.0)
    fell = [
        PowerSample(at_ns=k * S, watts=-1.0, energy_mj=mj) for k, mj in enumerate((500, 600, 3))
    ]
    assert energy_of(fell, 0, 2 * S).joules is None
    assert energy_of((), 0, S).problem == "no power was sampled"
    assert energy_of((), 0, S, problem="no NVML").problem == "no NVML"
    assert mean_watts(watts(76.0, 3), 0, 3 * S) == pytest.approx(76.0)
    assert mean_watts((), 0, S) == -1.0
