"""Tuned boundaries in live runs: what is measured of a job, what is chosen, and where it is told."""

from __future__ import annotations

from collections.abc import Callable
from math import isclose, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from slosched.cli.share_options import all_tuned
from slosched.core.share.tuner import measured_of, tune, tuning_of, urgent_of
from slosched.errors import InvalidConfig
from slosched.share import tuning as tuning_module
from slosched.share.outputs import read_summary
from slosched.share.tuning import BoundaryTuner, to_measure, tuning_line
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    JobResult,
    Mode,
    Pieces,
    Prepared,
    Run,
    RunResult,
    ShareSpec,
    Urgent,
)

MS = 1_000_000
SYNC = Boundary(kind=BoundaryKind.SYNC, tuned=True)
LOW = Job(name="low", model="m", boundary=SYNC)
HIGH = Job(name="high", model="h", priority=1, clients=Clients(think_ns=960 * MS))
#: Deft's Faster R-CNN at 1440p: 913 launches of 0.104 ms, 11.5 us a boundary; here in 300 modules.
PIECES = Pieces(pieces=300, exec_ns=95 * MS, costs_ns={1: 11_500}, kernels=913, kernel_ns=104_000)


def test_what_interrupts_a_job() -> None:
    poisson = Clients(arriving=Arriving.POISSON, rate_per_s=3.5)
    trace = Clients(arriving=Arriving.TRACE, trace=(0.5, 1.0, 2.0))
    jobs = {
        0: replace(LOW, clients=Clients(think_ns=5 * MS)),
        1: HIGH,
        2: replace(HIGH, name="open", clients=poisson),
        3: replace(HIGH, name="trace", priority=2, clients=trace),
        4: replace(HIGH, name="program", command=("true",)),
    }
    urgent = urgent_of(
        jobs, 0, exec_ns={0: 95 * MS, 1: 40 * MS, 2: 10 * MS}, slo_ns={1: 64 * MS, 2: 30 * MS}
    )
    assert urgent is not None
    # One in 960 + 40 ms, 3.5/s and three in 2 s; the own job: one in 100 ms.
    assert isclose(urgent.rate_per_s, 1 + 3.5 + 1.5)
    assert isclose(urgent.low_rate_per_s, 10)
    assert (urgent.exec_ns, urgent.slo_ns) == (10 * MS, 30 * MS)  # 20 ms of room, not 24
    assert urgent_of(jobs, 3, exec_ns={}, slo_ns={}) is None
    equal = {0: LOW, 1: replace(LOW, name="too")}
    assert urgent_of(equal, 0, exec_ns={}, slo_ns={}) is None
    both = urgent_of(equal, 0, exec_ns={1: 100 * MS}, slo_ns={}, equals=True)
    assert both is not None and isclose(both.rate_per_s, 10)


def test_the_choice_stands_beside_defts() -> None:
    urgent = urgent_of({0: LOW, 1: HIGH}, 0, exec_ns={0: 95 * MS, 1: 40 * MS}, slo_ns={})
    assert urgent is not None
    boundary, tuning = tuning_of(LOW, PIECES, urgent, unit="modules")
    best = tune(measured_of(PIECES, urgent), BoundaryKind.SYNC)
    assert tuning is not None
    assert (boundary.every, boundary.depth, boundary.tuned) == (best.every, best.depth, False)
    # An urgent request a second loses its mean wait, N p / 2; each run of the low job loses 300 c / N.
    rate, piece_ms = 1000 / 95, 95 / 300
    n_best = sqrt(2 * rate * 300 * 0.0115 / piece_ms)
    assert isclose(boundary.every, n_best, rel_tol=0.15)
    assert isclose(tuning.deft_launches, sqrt(0.0115 * 913 / 0.104))
    assert isclose(tuning.deft_every, tuning.deft_launches * 300 / 913)
    line = tuning_line("low", tuning)
    assert f"low: a boundary after every {boundary.every} of 300 modules: a boundary costs" in line
    assert (
        "urgent requests come 1/s" in line
        and "Deft's N* = 10 launches (of its 13 values 10), here 3.3 modules" in line
    )
    # Where kernels were not counted, the modules stand for them.
    _, plain = tuning_of(LOW, replace(PIECES, kernels=0, kernel_ns=0), urgent)
    assert plain is not None and "N* = 3.3 pieces (kernels were not counted)" in tuning_line(
        "low", plain
    )
    assert isclose(plain.deft_every, sqrt(0.0115 * 300 * 300 / 95))


def test_each_depth_has_its_own_cost() -> None:
    """Two groups in flight are worth their longer wait only if a boundary then costs much less."""
    low = replace(LOW, boundary=replace(SYNC, kind=BoundaryKind.EVENT))
    urgent = urgent_of({0: low, 1: HIGH}, 0, exec_ns={0: 95 * MS, 1: 40 * MS}, slo_ns={})
    assert urgent is not None
    dear = replace(PIECES, costs_ns={1: 400_000, 2: 1_000})
    assert tuning_of(low, dear, urgent)[0].depth == 2
    equal = replace(PIECES, costs_ns={1: 1_000, 2: 1_000})
    assert tuning_of(low, equal, urgent)[0].depth == 1
    # Boundaries that cost nothing are taken as often as they can be.
    assert tuning_of(low, replace(PIECES, costs_ns={1: 0, 2: 0}), urgent)[0].every == 1


# ------------------------------------------------------------------------------------ in an experiment


class Measuring:
    """Stands in for the process that measures."""

    def __init__(self, pieces: Pieces | None = PIECES, why: str = "") -> None:
        self.pieces, self.why = pieces, why
        self.asked: list[Job] = []

    def __call__(
        self, spec: ShareSpec, place: int, job: Job, work: Path, **_: Any
    ) -> tuple[Prepared | None, str]:
        self.asked.append(job)
        if self.why:
            return None, self.why
        return Prepared(job=place, pid=1, pieces=self.pieces), ""


def tuner_of(
    spec: ShareSpec, out: Path, said: list[str], *, resume: bool = True, digest: str = "d"
) -> BoundaryTuner:
    return BoundaryTuner(
        spec,
        digest_of=lambda job: digest + job.boundary.kind,
        folder_of=lambda place: out / spec.jobs[place].model,
        resume=resume,
        say=said.append,
        stopped=lambda: False,
    )


EXEC = {0: 95 * MS, 1: 40 * MS, 2: 95 * MS}


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr(tuning_module, "measure_alone", found)
    monkeypatch.setattr(tuning_module, "unavailable", lambda spec, mode: "")
    return found


def test_a_job_is_measured_once_and_its_pieces_are_kept(
    tmp_path: Path, measuring: Measuring
) -> None:
    spec = ShareSpec(jobs=(LOW, HIGH, replace(LOW, name="again")), device="cpu")
    said: list[str] = []
    tuner = tuner_of(spec, tmp_path, said)
    for mode in (Mode.GATE, Mode.TM):
        tuned = tuner.tuned(mode, slo_ns={}, exec_ns=EXEC, solos={})
        low, high, again = tuned.spec.jobs
        assert low.boundary.every > 1 and not low.boundary.tuned
        assert low.boundary == again.boundary and high == HIGH
        assert set(tuned.tunings) == {0, 2} and not tuned.urgent
    [asked] = measuring.asked
    assert (asked.run, asked.boundary.kind, asked.boundary.tuned) == (
        Run.EAGER,
        BoundaryKind.SYNC,
        False,
    )
    assert sum("gate: low: a boundary after every" in text for text in said) == 1
    # A result says what was chosen for its jobs.
    jobs = tuple(JobResult(job=i, prepared=Prepared(job=i, pid=1)) for i in range(3))
    noted = tuned.noted(RunResult(mode=Mode.TM, repeat=0, jobs=jobs, begin_ns=0, end_ns=1))
    assert [each.prepared and each.prepared.tuning for each in noted.jobs] == [
        tuned.tunings[0],
        None,
        tuned.tunings[2],
    ]
    for resume, digest, count in ((True, "d", 1), (True, "other", 2), (False, "other", 3)):
        again_tuner = tuner_of(spec, tmp_path, said, resume=resume, digest=digest)
        again_tuner.tuned(Mode.GATE, slo_ns={}, exec_ns=EXEC, solos={})
        assert len(measuring.asked) == count


def test_what_cannot_be_measured_keeps_its_boundary(tmp_path: Path, measuring: Measuring) -> None:
    measuring.why = "out of memory"
    said: list[str] = []
    spec = ShareSpec(jobs=(LOW, HIGH), device="cpu")
    tuned = tuner_of(spec, tmp_path, said).tuned(Mode.GATE, slo_ns={}, exec_ns=EXEC, solos={})
    assert tuned.spec.jobs[0].boundary == LOW.boundary and not tuned.tunings
    assert any("low is not tuned, and keeps its boundary: out of memory" in each for each in said)


def test_only_what_interrupts_and_bounds_is_tuned(tmp_path: Path, measuring: Measuring) -> None:
    said: list[str] = []

    def tuned(mode: Mode, *jobs: Job, device: str = "cpu", solos: Any = None) -> Any:
        spec = ShareSpec(jobs=jobs, device=device)
        return tuner_of(spec, tmp_path, said).tuned(
            mode, slo_ns={}, exec_ns=EXEC, solos=solos or {}
        )

    # Graphs are tuned by their member, behind the cutting, also among equals.
    segment = replace(LOW, boundary=Boundary(tuned=True))
    assert set(tuned(Mode.PREEMPT, segment, HIGH).urgent) == {0}
    assert set(tuned(Mode.PREEMPT, segment, replace(segment, name="b")).urgent) == {0, 1}
    # A segment bounds nothing without a gate; neither does any boundary of a model that runs as graphs.
    alone = JobResult(job=0, prepared=Prepared(job=0, pid=1, runs=Run.GRAPHS))
    graphs = {0: RunResult(mode=Mode.EXCLUSIVE, repeat=0, jobs=(alone,), begin_ns=0, end_ns=1)}
    for found in (
        tuned(Mode.TM, segment, HIGH),
        tuned(Mode.TM, LOW, HIGH, solos=graphs),
        tuned(Mode.GATE, replace(LOW, run=Run.GRAPHS), HIGH),
        tuned(Mode.GATE, LOW, HIGH, device="emulated"),
    ):
        assert not found.tunings and not found.urgent
    assert not measuring.asked
    assert tuned(Mode.GATE, LOW, HIGH, solos=graphs).tunings
    tuned(Mode.GATE, LOW, replace(LOW, name="b"))
    assert said[-1] == "gate: b is not tuned: no job has a higher priority"


def test_what_is_measured_is_the_job_alone() -> None:
    job = replace(LOW, batch=4, priority=3, count=9, slo_ns=5, thread_percentage=20)
    found = to_measure(job)
    assert (found.batch, found.priority, found.count, found.slo_ns) == (4, 0, 0, 0)
    assert not found.thread_percentage


def test_the_option_tunes_what_can_be_interrupted() -> None:
    low, high = all_tuned((replace(LOW, boundary=Boundary()), HIGH))
    assert low.boundary == Boundary(tuned=True) and high == HIGH
    assert all(job.boundary.tuned for job in all_tuned((LOW, replace(LOW, name="b"))))
    layer = replace(LOW, boundary=Boundary(kind=BoundaryKind.LAYER))
    with pytest.raises(InvalidConfig, match="segment, sync or event"):
        all_tuned((layer, HIGH))


# ---------------------------------------------------------------------------------- captured models


def test_segments_are_joined_where_boundaries_are_dear() -> None:
    pytest.importorskip("torch")
    from slosched.daemon.backends.cuda.program import Cut
    from slosched.daemon.backends.graphs.stage import cut_notes, tune_cut

    class Program:
        cut = Cut(
            bounds=tuple(range(1, 100)), segment_ns=(MS,) * 100, in_flight=1, bubble_ns=90_000
        )
        joined = 0

        def cut_of(self, of: Any) -> Cut:
            return self.cut

        def join_segments(self, of: Any, every: int) -> None:
            self.joined = every
            count = -(-100 // every)
            self.cut = Cut(tuple(range(1, count)), (every * MS,) * count, 1, 90_000)

    def made() -> Any:
        program = Program()
        return SimpleNamespace(program=program, of=None, notes=[], cut=program.cut)

    job = replace(LOW, boundary=Boundary(every=7, tuned=True))
    seldom = urgent_of({0: job, 1: HIGH}, 0, exec_ns={0: 100 * MS, 1: 40 * MS}, slo_ns={})
    first = made()
    cut_notes(first, job, wanted=True, lines=[])
    assert first.program.joined == 0  # the tuner starts from the segments as they were cut
    tuning = tune_cut(first, job, seldom)
    # 10 runs/s lose 100 / N x 0.09 ms each, one urgent request a second N ms / 2: N = sqrt(2 x 10 x 9 / 1).
    assert tuning is not None and isclose(tuning.every, sqrt(180), rel_tol=0.15)
    assert first.program.joined == tuning.every
    assert (tuning.unit, tuning.depth, tuning.pieces) == ("segments", 1, 100)
    for urgent, other in ((None, job), (seldom, replace(job, boundary=Boundary()))):
        assert tune_cut(made(), other, urgent) is None


@pytest.mark.torch
def test_a_lane_of_graphs_tunes_what_it_has_cut() -> None:
    """The rarer urgent requests are, the fewer boundaries are left; an interrupted answer stays right."""
    pytest.importorskip("torch")
    from test_share_graphs import Rig, job

    def rig(rate_per_s: float, **more: Any) -> Any:
        low = job("steps10", boundary=Boundary(tuned=True))
        urgent = Urgent(rate_per_s=rate_per_s, **more)
        return Rig(low, job("short", 1), check_every=1, urgent={0: urgent})

    often, seldom = rig(10_000.0), rig(0.001)
    uncut = Rig(job("steps10"), job("short", 1))
    assert often.prepared[0].tuning.every == 1
    assert often.prepared[0].boundaries == uncut.prepared[0].boundaries
    assert seldom.prepared[0].boundaries < often.prepared[0].boundaries
    assert seldom.prepared[0].tuning.every > 1 and "tuned: " in seldom.prepared[0].note
    assert seldom.prepared[1].tuning is None and uncut.prepared[0].tuning is None
    # An SLO that leaves less than one segment: the shortest wait is taken, and the choice says so.
    hopeless = rig(0.001, exec_ns=MS, slo_ns=MS + 1).prepared[0].tuning
    assert (hopeless.every, hopeless.fits) == (1, False)
    assert "no choice keeps the urgent SLO" in hopeless.why
    middle = rig(3.0)
    middle.start(0, 0)
    middle.run(5 * MS)
    middle.start(1, 0, priority=1)
    assert not any(each.differs or each.reason for each in middle.finish())


# -------------------------------------------------------------------------------------- eager models


@pytest.mark.torch
@pytest.mark.parametrize("kind", [BoundaryKind.SYNC, BoundaryKind.EVENT, BoundaryKind.SEGMENT])
def test_an_eager_model_is_measured(kind: BoundaryKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only where the test says: 1 ms a module, 20 us a wait for all, 5 us a wait for a group."""
    pytest.importorskip("torch")
    from torch import nn, zeros

    from slosched.daemon.backends.eager import measuring as module
    from slosched.daemon.backends.eager.device import HostTimeline
    from slosched.daemon.backends.eager.profiling import Kernels

    now = [0]
    monkeypatch.setattr("slosched.clock.now_ns", lambda: now[0])

    class Layer(nn.Module):
        def forward(self, value: Any) -> Any:
            now[0] += MS
            return value

    class Timeline(HostTimeline):
        def mark(self, passed: int | None = None) -> int:
            return now[0]

        def synchronize(self) -> None:
            now[0] += 20_000

        def wait(self, mark: int) -> None:
            now[0] += 5_000

    layers = nn.Sequential(*(Layer() for _ in range(32)))
    found = module.measure_pieces(
        Boundary(kind=kind, every=3, tuned=True),
        layers,
        Timeline(),
        lambda boundaries: layers(zeros(1)),
        lambda: Kernels(64, 400_000, 900_000),
    )
    assert found.exec_ns == 32 * MS + 20_000
    assert found.fixed_ns == 0
    assert (found.kernels, found.kernel_ns, found.longest_kernel_ns) == (64, 400_000, 900_000)
    assert not any(layer._forward_hooks for layer in layers)
    if kind is BoundaryKind.SYNC:
        assert (found.pieces, found.longest_ns, found.costs_ns) == (32, MS, {1: 20_000})
    elif kind is BoundaryKind.EVENT:
        # With two in flight the first group is not waited for.
        assert (found.pieces, found.costs_ns) == (32, {1: 5_000, 2: round(5_000 * 31 / 32)})
    else:
        assert (found.pieces, found.longest_ns) == (4, 8 * MS)
        assert found.costs_ns == {1: 5_000, 2: round(5_000 * 3 / 4)}


@pytest.mark.torch
@pytest.mark.processes
def test_a_live_run_on_the_cpu_is_tuned_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from slosched.share.experiment import run_experiment

    low = Job(name="low", model="tiny:6:0.2", boundary=SYNC, warmups=1)
    high = replace(HIGH, model="tiny:2:0.2", clients=Clients(think_ns=20 * MS))
    spec = ShareSpec(
        jobs=(low, high), modes=(Mode.GATE,), device="cpu", duration_ns=300 * MS, idle_ns=0
    )
    said: list[str] = []
    again: Callable[[], Any] = lambda: run_experiment(  # noqa: E731
        spec, tmp_path, solo=False, say=said.append, stopped=lambda: False
    )
    outcome = again()
    assert outcome.error_code == 0
    [run] = outcome.runs
    result = msgspec.json.decode((run.directory / "run.json").read_bytes(), type=RunResult)
    [tuned, untuned] = [each.prepared.tuning for each in result.jobs if each.prepared]
    assert tuned is not None and untuned is None
    assert tuned.pieces == 6 and 1 <= tuned.every <= 6
    summary = read_summary(run.directory / "summary.json")
    assert summary.metrics.jobs[0].tuning == tuned
    assert any(f"gate: {tuning_line('low', tuned)}" == each for each in said)
    # The spec keeps what was asked for, so that the run is kept.
    assert again().runs[0].kept
