"""Graphs under time slicing, lingering, and what bounds many jobs: virtual time beside what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from slosched.errors import InvalidConfig
from slosched.share.contention import Party, rates
from slosched.share.deft_config import read_deft
from slosched.share.metrics import metrics_of
from slosched.share.solos import Profile, Solo, load_profile
from slosched.share.spec_check import check_spec
from slosched.share.time_slices import SLICE_NS, SWITCH_NS, SliceGpu
from slosched.share.virtual import NOTICE_NS, run_mode_virtual
from slosched.share_spec import Clients, Job, Mode, Policy, Run, ShareSpec
from slosched.units import NS_PER_S

MS = 1_000_000
H200 = load_profile("h200")


def ends(gpu: SliceGpu, jobs: list[int], until_ns: int) -> dict[int, int]:
    """When the request of each job ends."""
    found: dict[int, int] = {}
    while len(found) < len(jobs):
        left = [job for job in jobs if job not in found]
        then_ns = min(at_ns for job in left if (at_ns := gpu.end_ns(job)) is not None)
        assert then_ns <= until_ns
        gpu.advance(then_ns)
        found |= {job: then_ns for job in left if gpu.ended(job)}
    return found


def test_two_contexts_take_turns_and_each_change_costs() -> None:
    gpu = SliceGpu([0, 1], lambda job, _: (5 * MS, 3 * MS)[job])
    gpu.begin(0, 0, 0)
    gpu.begin(1, 0, 0)
    # 0: 2 ms; 1: 2 ms; 0: 2 ms; 1: its last 1 ms; 0: its last 1 ms.
    assert ends(gpu, [0, 1], NS_PER_S) == {1: 7 * MS + 3 * SWITCH_NS, 0: 8 * MS + 4 * SWITCH_NS}
    gpu.begin(0, 1, 20 * MS)  # the context is still that of 0
    assert ends(gpu, [0], NS_PER_S) == {0: 25 * MS}


def test_who_comes_waits_for_the_slice_that_runs() -> None:
    gpu = SliceGpu([0, 1], lambda job, _: (50 * MS, MS)[job])
    gpu.begin(0, 0, 0)
    gpu.begin(1, 0, 2 * SLICE_NS + 500_000)
    assert ends(gpu, [1], NS_PER_S) == {1: 3 * SLICE_NS + SWITCH_NS + MS}
    assert gpu.rates_now() == {0: 1.0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30_000_000), min_size=1, max_size=5), st.integers(0, 5_000_000))
def test_the_gpu_does_all_work_once(work: list[int], later_ns: int) -> None:
    gpu = SliceGpu(range(len(work)), lambda job, _: work[job])
    for job in range(len(work)):
        gpu.begin(job, 0, later_ns if job else 0)
    found = ends(gpu, list(range(len(work))), 10 * NS_PER_S)
    last_ns = max(found.values())
    assert last_ns >= sum(work) or later_ns
    slices = sum(-(-each // SLICE_NS) for each in work) + len(work)
    assert last_ns <= sum(work) + later_ns + slices * SWITCH_NS
    assert all(found[job] >= each for job, each in enumerate(work))


def mix(*names: str, run: Run = Run.GRAPHS) -> tuple[Job, ...]:
    return tuple(
        Job(name=name, model=name, run=run, priority=len(names) - place)
        for place, name in enumerate(names)
    )


def p50s(mode: Mode, *names: str, linger_ns: int = 0) -> tuple[list[float], float]:
    """The median of each job in ms, and STP, over 8 s."""
    spec = ShareSpec(jobs=mix(*names), modes=(mode,), duration_ns=8 * NS_PER_S, linger_ns=linger_ns)
    alone = {
        i: run_mode_virtual(spec, Mode.EXCLUSIVE, 0, solos=H200, jobs=(i,))
        for i in range(len(names))
    }
    found = metrics_of(spec, run_mode_virtual(spec, mode, 0, solos=H200), alone)
    assert found.stp is not None
    return [each.latency.p50_ms if each.latency else 0.0 for each in found.jobs], found.stp


@pytest.mark.parametrize(
    ("mode", "names", "measured_ms", "stp", "within"),
    [
        (Mode.TM, ("bert", "whisper"), (7.44, 193.2), 0.911, 0.05),
        (Mode.TM, ("whisper", "gpt"), (238.1, 1057.0), 0.911, 0.02),
        (Mode.TM, ("bert", "whisper", "gpt"), (11.99, 311.3, 1408.0), 0.914, 0.04),
        (Mode.PREEMPT, ("bert", "whisper"), (3.685, 521.7), 0.944, 0.04),
        (Mode.PREEMPT, ("bert", "gpt"), (3.745, 2304.0), 0.944, 0.04),
        (Mode.PREEMPT, ("bert", "diffusion"), (3.744, 8452.0), 0.967, 0.04),
        (Mode.MPS, ("bert", "whisper"), (3.55, 145.5), 1.435, 0.1),
        (Mode.MPS, ("bert", "gpt"), (4.96, 727.6), 1.191, 0.12),
    ],
)
def test_an_h200_s_mixes_of_graphs(
    mode: Mode, names: tuple[str, ...], measured_ms: tuple[float, ...], stp: float, within: float
) -> None:
    """benchmarks/gpu/sharing.md has all of them."""
    found, found_stp = p50s(mode, *names)
    assert found == pytest.approx(measured_ms, rel=within)
    assert found_stp == pytest.approx(stp, abs=within)


# --------------------------------------------------------------------------------- lingering


def test_a_lane_that_lingers_serves_the_high_job_alone() -> None:
    (high, low), _ = p50s(Mode.PREEMPT, "bert", "gpt", linger_ns=100_000)
    # As in the lane without another job.
    assert high == pytest.approx(2.785 + NOTICE_NS / MS, rel=0.01)
    assert low > 8000  # and the other one waits until it is over


def test_lingering_is_for_clients_that_think_no_longer_and_for_priorities() -> None:
    quick = Job(name="h", model="bert", priority=1, clients=Clients(think_ns=300_000))
    low = Job(name="l", model="gpt")
    spec = ShareSpec(jobs=(quick, low), duration_ns=4 * NS_PER_S)

    def slowest(**changes: object) -> float:
        result = run_mode_virtual(replace(spec, **changes), Mode.PREEMPT, 0, solos=H200)
        rows = [row for row in result.jobs[0].requests if not row.warmup]
        return max(row.latency_ns for row in rows) / MS

    assert slowest(linger_ns=400_000) < 3
    assert slowest(linger_ns=200_000) == slowest() > 8
    edf = slowest(policy=Policy.EDF)
    assert slowest(policy=Policy.EDF, linger_ns=400_000) == edf
    open_loop = (replace(quick, clients=Clients(think_ns=0), count=5), low)
    last = run_mode_virtual(replace(spec, jobs=open_loop, linger_ns=400_000), Mode.PREEMPT, 0)
    begun = [row.started_ns for row in last.jobs[1].requests if not row.warmup]
    end_ns = max(row.ended_ns for row in last.jobs[0].requests)
    assert begun[0] == end_ns  # without a wait: behind the last one nothing is to come
    with pytest.raises(InvalidConfig, match="linger must be within"):
        check_spec(replace(spec, linger_ns=NS_PER_S))


# --------------------------------------------------------------------------------- bounds and profiles


@pytest.mark.parametrize("mode", [Mode.TM, Mode.MPS, Mode.STREAMS])
@pytest.mark.parametrize("gpu_share", [0.2, 0.98])
def test_many_jobs_get_no_more_than_the_gpu_and_the_host_have(mode: Mode, gpu_share: float) -> None:
    most = {Mode.TM: 1.0, Mode.MPS: 1.6, Mode.STREAMS: 1.6}[mode]
    for host_share in (0.02, 1.0):
        many = [Party(gpu_share=gpu_share, burst=4, press=0.2, host_share=host_share)] * 40
        found = rates(many, mode, cores=4)
        assert sum(rate * gpu_share for rate in found) <= most + 1e-9
        hosts = 1 if mode is Mode.STREAMS else 4
        assert sum(rate * host_share for rate in found) <= hosts + 1e-9
    graphs = [replace(each, interprets=False) for each in many]
    assert sum(rates(graphs, Mode.STREAMS)) > sum(rates(many, Mode.STREAMS))


def test_a_job_has_the_solo_of_how_it_runs() -> None:
    both = Profile(
        device="d",
        measured="m",
        solos=(
            Solo(model="m", latency_ms=9),
            Solo(model="m", latency_ms=3, runs=Run.GRAPHS),
            Solo(model="e", latency_ms=5),
        ),
    )
    took = {run: both.of(Job(name="a", model="m", run=run)).latency_ms for run in Run}
    assert took == {Run.AUTO: 3, Run.GRAPHS: 3, Run.EAGER: 9}
    assert both.of(Job(name="a", model="e")).latency_ms == 5
    with pytest.raises(ValueError, match="runs must be"):
        Solo(model="m", latency_ms=1, runs=Run.AUTO)
    with pytest.raises(ValueError, match="lane_ms"):
        Solo(model="m", latency_ms=1, lane_ms=float("nan"))


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "deft_configs").glob("*.json")))
def test_every_shipped_configuration_of_deft_runs_in_virtual_time(file: Path) -> None:
    spec = replace(read_deft(file).spec, duration_ns=NS_PER_S)
    for job in spec.jobs:
        assert H200.of(job).note
    result = run_mode_virtual(spec, Mode.TM, 0, solos=H200)
    assert all(len(job.requests) >= 10 for job in result.jobs)


def test_one_level_of_priorities_interrupts_nothing() -> None:
    """Between two requests of a long model a short one has one turn: first come, first served."""
    jobs = (Job(name="s", model="bert"), Job(name="l", model="gpt"))
    spec = ShareSpec(jobs=jobs, duration_ns=8 * NS_PER_S)
    short, long = run_mode_virtual(spec, Mode.PREEMPT, 0, solos=H200).jobs
    assert not long.interruptions
    turns = [sum(not row.warmup for row in job.requests) for job in (short, long)]
    assert abs(turns[0] - turns[1]) <= 1
