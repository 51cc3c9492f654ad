"""Sharing experiments in virtual time: modes, failures, power, and simulations with their files."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from slosched.errors import InvalidConfig
from slosched.share.simulate import off_table, simulate
from slosched.share.solos import Profile, Solo, load_profile
from slosched.share.virtual import Fault, run_exclusive_virtual, run_mode_virtual
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    JobResult,
    Mode,
    Policy,
    Request,
    RunResult,
    ShareSpec,
    Status,
    Stop,
)
from slosched.units import NS_PER_S

MS = 1_000_000
SHARED = (Mode.TM, Mode.MPS, Mode.STREAMS, Mode.PREEMPT, Mode.GATE)

#: A long model with 100 boundaries and a short one; both keep the GPU busy.
SOLOS = Profile(
    device="test",
    measured="made up",
    idle_watts=50,
    most_watts=300,
    solos=(
        Solo(model="long", latency_ms=100, boundaries=100, watts=250),
        Solo(model="short", latency_ms=10, boundaries=10, watts=150),
    ),
)
LOW = Job(name="low", model="long", boundary=Boundary(kind=BoundaryKind.SYNC))
HIGH = Job(name="high", model="short", priority=1, clients=Clients(think_ns=237 * MS))
SPEC = ShareSpec(jobs=(LOW, HIGH), duration_ns=10 * NS_PER_S)


def run(spec: ShareSpec, mode: Mode, *faults: Fault) -> RunResult:
    return run_mode_virtual(spec, mode, 0, solos=SOLOS, faults=faults)


def served(job: JobResult) -> list[Request]:
    return [row for row in job.requests if not row.warmup]


@pytest.mark.parametrize("mode", SHARED)
def test_each_mode_runs_all_jobs_and_says_that_it_is_a_model(mode: Mode) -> None:
    result = run(SPEC, mode)
    assert result == run(SPEC, mode)  # to the byte
    assert result.end_ns - result.begin_ns == SPEC.duration_ns
    assert "virtual" in result.about
    for i, job in enumerate(result.jobs):
        assert (job.job, job.status) == (i, Status.OK)
        rows = served(job)
        assert len(rows) > 10
        assert [row.number for row in rows] == list(range(len(rows)))
        assert sum(row.warmup for row in job.requests) == 2
        assert all(result.begin_ns <= row.arrived_ns <= result.end_ns for row in rows)


def test_preemption_brings_the_high_job_to_its_solo_latency_and_costs_the_low_one_its_pause() -> (
    None
):
    longest = {
        mode: max(row.latency_ns for row in served(run(SPEC, mode).jobs[1])) for mode in SHARED
    }
    # One boundary of 1 ms and what boundaries cost: 11.5 us each, and 60 us of the gate.
    assert 10 * MS < longest[Mode.PREEMPT] < 11.3 * MS
    assert longest[Mode.PREEMPT] < longest[Mode.GATE] + MS < 12.4 * MS
    assert longest[Mode.TM] > 15 * MS
    low = run(SPEC, Mode.PREEMPT).jobs[0]
    for row in served(low):
        alone_ns = row.ended_ns - row.started_ns - row.paused_ns
        assert 100 * MS < alone_ns < 102 * MS
    assert len(low.interruptions) > 30
    assert all(each.by == 1 and each.wanted_ns <= each.started_ns for each in low.interruptions)


def test_without_boundaries_the_high_job_waits_for_the_whole_low_one() -> None:
    whole = replace(SPEC, jobs=(replace(LOW, boundary=Boundary(kind=BoundaryKind.NONE)), HIGH))
    rows = served(run(whole, Mode.GATE).jobs[1])
    assert max(row.latency_ns for row in rows) > 60 * MS
    assert not run(whole, Mode.GATE).jobs[0].interruptions


def test_a_tuned_boundary_lies_between_the_extremes() -> None:
    tuned = replace(SPEC, jobs=(replace(LOW, boundary=replace(LOW.boundary, tuned=True)), HIGH))
    prepared = run(tuned, Mode.PREEMPT).jobs[0].prepared
    assert prepared is not None
    assert MS <= prepared.boundary_ns < 20 * MS


@pytest.mark.parametrize("policy", list(Policy))
def test_each_policy_in_the_serving_lane(policy: Policy) -> None:
    jobs = (replace(LOW, slo_times_solo=3.0), replace(HIGH, slo_times_solo=1.6))
    result = run(replace(SPEC, jobs=jobs, policy=policy), Mode.PREEMPT)
    assert all(job.status is Status.OK and served(job) for job in result.jobs)
    assert all(row.deadline_ns == row.arrived_ns + 16 * MS for row in served(result.jobs[1]))
    interrupting = policy not in (Policy.FCFS, Policy.RR)
    assert bool(result.jobs[0].interruptions) == interrupting


def test_exclusive_runs_each_distinct_model_alone() -> None:
    spec = replace(SPEC, jobs=(LOW, HIGH, replace(LOW, name="low2", priority=3)))
    alone = run_exclusive_virtual(spec, 0, solos=SOLOS)
    assert [[job.job for job in each.jobs] for each in alone] == [[0], [1]]
    assert len(served(alone[0].jobs[0])) == 100
    with pytest.raises(InvalidConfig, match="one job at a time"):
        run(SPEC, Mode.EXCLUSIVE)


# --------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("mode", SHARED)
def test_a_death_is_typed_and_the_others_stay_where_they_have_processes(mode: Mode) -> None:
    result = run(SPEC, mode, Fault(job=0, after_ns=NS_PER_S))
    low, high = result.jobs
    assert low.status is Status.DIED
    assert "fault" in low.reason
    assert all(row.ended_ns <= result.begin_ns + NS_PER_S for row in served(low))
    assert len(served(low)) > 3  # what it had done stays
    together = mode in (Mode.STREAMS, Mode.PREEMPT)
    assert high.status is (Status.DIED if together else Status.OK)
    assert (len(served(high)) > 30) != together


@pytest.mark.parametrize("mode", SHARED)
def test_out_of_memory_ends_one_job_alone(mode: Mode) -> None:
    fault = Fault(job=1, after_ns=5, status=Status.OUT_OF_MEMORY, reason="40 GiB did not fit")
    low, high = run(SPEC, mode, fault).jobs
    assert (high.status, high.reason) == (Status.OUT_OF_MEMORY, "40 GiB did not fit")
    assert low.status is Status.OK
    assert len(served(low)) >= 98


def test_what_does_not_end_in_time_is_timed_out() -> None:
    spec = replace(SPEC, least_jobs=1000, finish_within_ns=NS_PER_S)
    low, high = run(spec, Mode.TM).jobs
    assert low.status is high.status is Status.TIMED_OUT
    assert served(low)


def test_a_fault_of_an_unknown_job_and_a_program_of_ones_own() -> None:
    with pytest.raises(InvalidConfig, match="job 9"):
        run(SPEC, Mode.TM, Fault(job=9, after_ns=0))
    program = Job(name="mine", model="train", command=("python", "train.py"))
    low, mine = run(replace(SPEC, jobs=(LOW, program)), Mode.TM).jobs
    assert low.status is Status.OK
    assert mine.status is Status.UNAVAILABLE
    (only,) = run(replace(SPEC, jobs=(program,)), Mode.TM).jobs
    assert only.status is Status.UNAVAILABLE
    with pytest.raises(InvalidConfig, match="no solo run of 'unknown'"):
        run(replace(SPEC, jobs=(Job(name="a", model="unknown"),)), Mode.TM)


# --------------------------------------------------------------------------------- clients, power


def test_an_overloaded_open_loop_says_what_was_left() -> None:
    flood = replace(HIGH, clients=Clients(arriving=Arriving.CONSTANT, rate_per_s=1000))
    (job,) = run(replace(SPEC, jobs=(flood,)), Mode.TM).jobs
    assert len(served(job)) == 1000
    assert job.left == 8999
    assert job.status is Status.OK


def test_a_cut_flags_what_ends_behind_the_duration() -> None:
    result = run(replace(SPEC, jobs=(LOW,), stop=Stop.CUT, duration_ns=950 * MS), Mode.TM)
    assert [row.cut for row in served(result.jobs[0])] == [False] * 9 + [True]


def test_energy_is_the_integral_of_power() -> None:
    (alone,) = run_exclusive_virtual(replace(SPEC, jobs=(LOW,)), 0, solos=SOLOS)
    inside = [p for p in alone.power if alone.begin_ns < p.at_ns <= alone.end_ns]
    assert len(inside) == 100  # 10 Hz
    assert {round(p.watts) for p in inside} == {250}
    assert inside[-1].energy_mj - inside[0].energy_mj == pytest.approx(250 * 9.9 * 1000)
    before = [p for p in alone.power if p.at_ns <= alone.begin_ns]
    assert {p.watts for p in before} == {50}
    both = run(SPEC, Mode.MPS)
    assert max(p.watts for p in both.power) <= 300


def test_two_minutes_of_bert_beside_whisper_are_quick_to_play() -> None:
    """One step an event: no more than a few for each of 8,000 requests."""
    jobs = (Job(name="bert", model="bert"), Job(name="whisper", model="whisper"))
    result = run_mode_virtual(ShareSpec(jobs=jobs, profile="a6000"), Mode.TM, 0)
    rates = [len(served(job)) / 120 for job in result.jobs]
    assert rates == pytest.approx([65.6, 3.2], rel=0.06)  # HotCarbon's published run of the pair


# --------------------------------------------------------------------------------- simulate


def simulated(tmp_path: Path, **how: object) -> ShareSpec:
    jobs = (Job(name="bert", model="bert"), Job(name="gpt", model="gpt"))
    spec = ShareSpec(jobs=jobs, modes=(Mode.TM, Mode.MPS), duration_ns=10 * NS_PER_S, label="x")
    simulate(spec, tmp_path, **how)  # type: ignore[arg-type]
    return spec


def test_simulate_writes_the_files_of_a_live_run(tmp_path: Path) -> None:
    simulated(tmp_path)
    folder = tmp_path / "x" / "bert-gpt" / "bert-1_gpt-1" / "tm" / "r0"
    names = {path.name for path in folder.iterdir()}
    assert {"run.json", "spec.json", "summary.json", "tput.csv", "pwr.csv", "bert.csv"} <= names
    assert (tmp_path / "x" / "bert" / "bert-1" / "exclusive" / "r0" / "tput.csv").exists()
    assert (folder / "tput.csv").read_text().startswith("mode,load,0_bert-1,1_gpt-1\ntm,1.0,")
    stp = msgspec.json.decode((folder / "summary.json").read_bytes())["metrics"]["stp"]
    assert 0.8 < stp < 1  # as graphs: two changes of context for each pair of slices


def as_measured(folder: Path) -> None:
    """Pretend that the runs below `folder` were live ones."""
    for path in folder.rglob("run.json"):
        result = msgspec.json.decode(path.read_bytes(), type=RunResult)
        path.write_bytes(msgspec.json.encode(replace(result, about={"device": "a card"})))


def test_simulate_says_how_far_it_was_from_a_measured_run(tmp_path: Path) -> None:
    measured = tmp_path / "measured"
    spec = simulated(measured, profile="a6000")
    with pytest.raises(InvalidConfig, match="no measured run of bert, gpt"):
        simulate(spec, tmp_path / "none", against=measured)  # virtual runs do not count
    as_measured(measured)
    from_runs = simulate(spec, tmp_path / "a", profile=str(measured), against=measured)
    assert from_runs.device == "a card"
    figures = {row.figure for row in from_runs.off}
    assert figures == {"throughput /s", "p50 ms", "p99 ms", "STP", "energy J"}
    assert all(abs(row.error) < 0.06 for row in from_runs.off)
    other = simulate(spec, tmp_path / "b", profile="4090", against=measured)
    bert = next(row for row in other.off if row.job == "bert" and row.mode is Mode.TM)
    assert bert.error > 1  # a 4090 is three times as quick
    table = off_table(other.off)
    assert "mean of |off|, STP" in table
    assert len(table.splitlines()) == len(other.off) + 6


def test_a_profile_of_runs_keeps_what_was_measured(tmp_path: Path) -> None:
    simulated(tmp_path, profile="a6000")
    as_measured(tmp_path)
    profile, source = load_profile(str(tmp_path)), load_profile("a6000")
    for name in ("bert", "gpt"):
        job = Job(name=name, model=name)
        assert profile.of(job).latency_ms == pytest.approx(source.of(job).latency_ms, rel=0.02)
        assert profile.of(job).watts == pytest.approx(source.of(job).watts, rel=0.01)
        assert profile.of(job).gpu_share == pytest.approx(source.of(job).gpu_share, abs=0.02)


def test_a_file_that_is_no_profile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text("duration = 3")
    with pytest.raises(InvalidConfig, match=r"other\.toml is not a solo profile: "):
        load_profile(str(file))


def test_a_broken_run_is_refused(tmp_path: Path) -> None:
    spec = simulated(tmp_path)
    as_measured(tmp_path)
    next(tmp_path.rglob("run.json")).write_text("{")
    for call in (
        lambda: load_profile(str(tmp_path)),
        lambda: simulate(spec, tmp_path / "z", against=tmp_path),
    ):
        with pytest.raises(InvalidConfig, match=r"run\.json"):
            call()
