"""The member process: its loop over lanes, its rows, its input, and a user's own program."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from slosched.clock import anchor_ns, now_ns, take_anchor
from slosched.core.share.brain import Load, ShareBrain
from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.daemon.member import loop, opening
from slosched.daemon.member.loop import Control, Pair, Serving, outcome, undisturbed
from slosched.daemon.member.main import Member
from slosched.daemon.member.rows import RowFile
from slosched.errors import InvalidConfig, OutOfResources
from slosched.share.row_files import read_rows
from slosched.share.run import run_mode
from slosched.share.session import Session
from slosched.share_spec import (
    Arriving,
    Begin,
    Clients,
    FromMember,
    Job,
    JobEnded,
    Mode,
    Order,
    Policy,
    Prepared,
    Progress,
    Request,
    Run,
    RunResult,
    ShareSpec,
    Status,
)
from slosched.units import NS_PER_MS, NS_PER_S


class FakeLane:
    """Requests take `length_ns` after their start, on the real clock; `script` says what else happens."""

    takes = 1
    preemptive = False

    def __init__(self, length_ns: int = NS_PER_MS, script: str = "") -> None:
        self.length_ns, self.script = length_ns, script
        self.running: tuple[Start, int] | None = None
        self.started = 0

    def start(self, start: Start, *, now_ns: int) -> None:
        self.started += 1
        if self.script == "raises" and self.started == 3:
            raise RuntimeError("the lane broke")
        self.running = (start, now_ns)

    def withdraw(self, withdraw: Withdraw) -> bool:
        return False

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        if self.running is None or self.script == "hangs":
            return ()
        start, began_ns = self.running
        if now_ns < began_ns + self.length_ns:
            return ()
        self.running = None
        memory = self.script == "out of memory" and self.started == 2
        wrong = memory or (self.script == "fails" and self.started == 2)
        return [
            Ended(
                job=start.job,
                number=start.number,
                started_ns=began_ns,
                ended_ns=began_ns + self.length_ns,
                reason="it went wrong" if wrong else "",
                fatal=memory,
                out_of_memory=memory,
            )
        ]

    def next_event_ns(self) -> int | None:
        return None if self.running is None else 0

    def pass_time(self, until_ns: int | None) -> bool:
        return False


class _World:
    """Pairs of a brain and a fake lane, served for a short time."""

    def __init__(self, tmp_path: Path, *, length_ns: int = 60 * NS_PER_MS) -> None:
        self.path = tmp_path / "rows"
        self.rows = RowFile(self.path, now_ns)
        self.control = Control()
        self.told: list[Progress | JobEnded] = []
        self.at_ns = now_ns()
        self.until_ns = self.at_ns + length_ns
        self.within_ns = 100 * NS_PER_MS

    def pair(self, job: int, lane: FakeLane, count: int = 0) -> Pair:
        brain = ShareBrain([Load(job=job, clients=Clients(), count=count)])
        return Pair((job,), brain, lane)

    def serve(self, *pairs: Pair) -> list[JobEnded]:
        serving = Serving(
            Begin(at_ns=self.at_ns, until_ns=self.until_ns),
            rows=self.rows,
            control=self.control,
            now=now_ns,
            tell=self.told.append,
            finish_within_ns=self.within_ns,
        )
        serving.serve(pairs)
        self.rows.close()
        return [outcome(pair, pair.jobs[0], (0, 0), self.within_ns) for pair in pairs]

    def requests(self, job: int) -> list[Request]:
        return [row for row in read_rows(self.path, job, 0) if isinstance(row, Request)]


def test_a_window_serves_lanes_side_by_side_and_writes_each_row_once(tmp_path: Path) -> None:
    world = _World(tmp_path)
    ended = world.serve(
        world.pair(0, FakeLane(NS_PER_MS)), world.pair(3, FakeLane(2 * NS_PER_MS), count=5)
    )
    assert [(each.job, each.status) for each in ended] == [(0, Status.OK), (3, Status.OK)]
    numbers = [row.number for row in world.requests(3)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 5
    rows = world.requests(0)
    assert all(row.ended_ns - row.started_ns == NS_PER_MS for row in rows)
    # A closed loop: the next request is due when the last one ended, and latency counts from there.
    for before, after in itertools.pairwise(rows):
        assert after.arrived_ns >= before.ended_ns
        assert after.started_ns >= after.arrived_ns


def test_what_an_overloaded_open_loop_leaves_is_counted(tmp_path: Path) -> None:
    world = _World(tmp_path)
    lane = FakeLane(7 * NS_PER_MS)
    load = Load(
        job=0,
        clients=Clients(arriving=Arriving.CONSTANT, rate_per_s=1000.0),
        arrivals=[each * NS_PER_MS for each in range(1000)],
    )
    [ended] = world.serve(Pair((0,), ShareBrain([load]), lane))
    assert ended.status is Status.OK
    assert ended.left + len(world.requests(0)) == 60  # one each ms of the window
    assert ended.left > 0


def test_a_lane_that_raises_ends_its_own_job_alone(tmp_path: Path) -> None:
    world = _World(tmp_path)
    ended = world.serve(
        world.pair(0, FakeLane(script="raises")), world.pair(1, FakeLane(), count=30)
    )
    assert ended[0].status is Status.FAILED
    assert "the lane broke" in ended[0].reason
    assert ended[1].status is Status.OK
    assert len(world.requests(0)) == 2
    assert len(world.requests(1)) > 2


def test_a_lane_that_raised_serves_no_further_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = {0: FakeLane(script="raises"), 1: FakeLane()}
    plans = [
        opening.Plan(
            (job,),
            lambda job=job, lane=lane: opening.Held(  # type: ignore[misc]
                jobs=(job,),
                lane=lane,
                prepare=lambda: (Prepared(job=job, pid=1),),
                memory=lambda: {job: (1, 2)},
                failures=dict,
            ),
        )
        for job, lane in lanes.items()
    ]
    monkeypatch.setattr(opening, "plans", lambda order: (plans, []))
    order = Order(
        mode=Mode.TM,
        device="cpu",
        jobs={job: Job(name=f"job{job}", model="tiny") for job in lanes},
        policy=Policy.FCFS,
        seed=0,
        rows=str(tmp_path / "rows"),
        least_jobs=5,
    )
    told: list[FromMember] = []
    member = Member(order, Control(), told.append)
    assert member.prepare()
    ends = []
    for _ in range(2):
        told.clear()
        member.window(Begin(at_ns=now_ns(), until_ns=now_ns() + 30 * NS_PER_MS))
        ends.append({each.job: each for each in told if isinstance(each, JobEnded)})
    for each in ends:
        assert (each[0].status, each[1].status) == (Status.FAILED, Status.OK)
        assert "the lane broke" in each[0].reason
    assert lanes[0].started == 3  # in the first window alone


def test_failed_requests_and_memory_are_typed_results(tmp_path: Path) -> None:
    world = _World(tmp_path)
    ended = world.serve(
        world.pair(0, FakeLane(script="fails")), world.pair(1, FakeLane(script="out of memory"))
    )
    assert ended[0].status is Status.FAILED
    assert ended[0].reason == "1 request(s) failed, the last: it went wrong"
    assert len(world.requests(0)) > 1  # it went on
    assert ended[1].status is Status.OUT_OF_MEMORY
    assert len(world.requests(1)) == 1


def test_what_does_not_end_is_given_up_in_time(tmp_path: Path) -> None:
    world = _World(tmp_path, length_ns=NS_PER_MS)
    [ended] = world.serve(world.pair(0, FakeLane(script="hangs")))
    assert ended.status is Status.TIMED_OUT
    assert "did not end within 0.1 s" in ended.reason
    assert now_ns() >= world.until_ns + world.within_ns


def test_no_request_starts_after_the_end_was_asked_for(tmp_path: Path) -> None:
    world = _World(tmp_path, length_ns=3600 * NS_PER_S)
    lane = FakeLane()
    timer = threading.Timer(0.05, lambda: setattr(world.control, "ending", True))
    timer.start()
    [ended] = world.serve(world.pair(0, lane))
    assert ended.status is Status.OK
    assert lane.running is None
    assert len(world.requests(0)) == lane.started
    timer.join()


def test_rows_that_cannot_be_written_say_so(tmp_path: Path) -> None:
    with pytest.raises(OutOfResources, match="rows cannot be written"):
        RowFile(tmp_path / "none" / "rows", now_ns)
    rows = RowFile(Path("/dev/full"), now_ns)
    rows.take([Request(job=0, number=0, arrived_ns=0, started_ns=0, ended_ns=0)])
    with pytest.raises(OutOfResources, match="No space left"):
        rows.flush()


# ---------------------------------------------------------------------------------------------- lanes


def _order(mode: Mode, *jobs: Job, device: str = "cuda:0") -> Order:
    return Order(
        mode=mode,
        device=device,
        jobs=dict(enumerate(jobs)),
        policy=Policy.PRIORITY,
        seed=0,
        rows="",
    )


def test_streams_get_priorities_in_the_order_of_their_jobs() -> None:
    jobs = {i: Job(name="a", model="x", priority=p) for i, p in enumerate((7, 0, 3, 7))}
    assert opening.stream_priorities(jobs) == {0: -2, 1: 0, 2: -1, 3: -2}
    many = {i: Job(name="a", model="x", priority=i) for i in range(9)}
    assert min(opening.stream_priorities(many).values()) == -5


def test_each_mode_gets_its_lanes() -> None:
    bert = Job(name="a", model="bert")
    eager = Job(name="b", model="bert", run=Run.EAGER)
    faster = Job(name="c", model="fasterrcnn_resnet50_fpn")
    for mode, jobs, lanes, threads, refused in (
        (Mode.STREAMS, (bert, eager, faster), [(0,), (1,), (2,)], [False, True, True], []),
        (Mode.PREEMPT, (bert, eager, faster, bert), [(0, 3)], [False], [1, 2]),
        (Mode.TM, (faster,), [(0,)], [True], []),
        (Mode.GATE, (bert,), [(0,)], [True], []),
    ):
        plans, ended = opening.plans(_order(mode, *jobs))
        assert [plan.jobs for plan in plans] == lanes
        assert [plan.own_thread for plan in plans] == threads
        assert [each.job for each in ended] == refused
        assert all(each.status is Status.UNAVAILABLE for each in ended)
    graphs = Job(name="d", model="bert", run=Run.GRAPHS)
    for order, words in (
        (_order(Mode.GATE, graphs), "has no gate"),
        (_order(Mode.TM, graphs, device="cpu"), "needs a GPU"),
    ):
        plans, [ended_] = opening.plans(order)
        assert plans == []
        assert words in ended_.reason


def test_errors_of_a_model_are_told_apart() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert opening.why_not(OutOfMemoryError("CUDA out of memory"))[0] is Status.OUT_OF_MEMORY
    assert opening.why_not(MemoryError())[0] is Status.OUT_OF_MEMORY
    assert opening.why_not(InvalidConfig("no such model")) == (Status.FAILED, "no such model")
    assert opening.why_not(SystemExit(3))[0] is Status.FAILED


# ----------------------------------------------------------------------------------------- real processes


def _run(tmp_path: Path, mode: Mode, *jobs: Job, length_ns: int) -> RunResult:
    spec = ShareSpec(jobs=jobs, device="cpu", duration_ns=length_ns, finish_within_ns=5 * NS_PER_S)
    [result] = run_mode(spec, mode, 0, tmp_path, say=lambda text: None, stopped=lambda: False)
    return result


@pytest.mark.processes
@pytest.mark.torch
@pytest.mark.parametrize("mode", [Mode.GATE, pytest.param(Mode.STREAMS, marks=pytest.mark.slow)])
def test_models_run_beside_one_another_on_the_cpu(tmp_path: Path, mode: Mode) -> None:
    low = Job(name="low", model="tiny:4:1")
    high = Job(name="high", model="tiny:2:1", priority=1, clients=Clients(think_ns=15 * NS_PER_MS))
    wrong = Job(name="wrong", model="tiny:no:1")
    result = _run(tmp_path, mode, low, high, wrong, length_ns=400 * NS_PER_MS)
    first, second, third = result.jobs
    assert (first.status, second.status, third.status) == (Status.OK, Status.OK, Status.FAILED)
    assert third.reason
    assert third.requests == ()
    for each in (first, second):
        rows = [row for row in each.requests if not row.warmup]
        assert len(rows) > 1
        assert all(result.begin_ns <= row.arrived_ns <= row.started_ns for row in rows)
        assert all(row.started_ns < row.ended_ns for row in rows)
        assert any(row.warmup for row in each.requests)
    assert (first.pid == second.pid) == (mode is Mode.STREAMS)
    if mode is Mode.GATE:
        assert first.interruptions
        assert {pause.by for pause in first.interruptions} == {1}
        assert not second.interruptions


@pytest.mark.processes
@pytest.mark.torch
@pytest.mark.slow
def test_kill_9_of_one_model_leaves_the_others_results(tmp_path: Path) -> None:
    job = Job(name="a", model="tiny:2:1")
    spec = ShareSpec(
        jobs=(job, msgspec.structs.replace(job, name="b")), device="cpu", duration_ns=NS_PER_S
    )
    with Session(spec, Mode.TM, tmp_path, say=lambda text: None, stopped=lambda: False) as session:
        victim = session._members.all[0].pid
        threading.Timer(0.8, os.kill, (victim, signal.SIGKILL)).start()
        result = session.window()
    died, fine = result.jobs
    assert died.status is Status.DIED
    assert "SIGKILL" in died.reason
    assert fine.status is Status.OK
    assert fine.requests[-1].ended_ns > result.begin_ns + 900 * NS_PER_MS


@pytest.mark.processes
def test_a_program_of_ones_own_runs_to_the_end_of_the_window(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {pid_file}; echo ready; wait"
    jobs = (
        Job(name="long", model="bash", command=("bash", "-c", script)),
        Job(name="short", model="true", command=("true",)),
        Job(name="fails", model="bash", command=("bash", "-c", "exit 3")),
        Job(name="none", model="none", command=(str(tmp_path / "no-such-program"),)),
    )
    result = _run(tmp_path, Mode.TM, *jobs, length_ns=2 * NS_PER_S)
    long, short, fails, none = result.jobs
    assert (long.status, long.reason) == (Status.OK, "it ran to the end of the window")
    assert short.status is Status.OK
    assert "ended by itself after" in short.reason
    assert fails.status is Status.FAILED
    assert "exit code 3" in fails.reason
    assert none.status is Status.FAILED
    assert "there is no program" in none.reason
    assert (tmp_path / "long.log").read_text() == "ready\n"
    # What it has started, and left, is gone.
    stat = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    for _ in range(200):
        if not stat.exists() or ") Z" in stat.read_text():
            break
        threading.Event().wait(0.01)
    else:
        raise AssertionError("the program's own child is left")


@pytest.mark.processes
def test_a_member_without_an_order_or_a_parent_ends(tmp_path: Path) -> None:
    near, far = os.pipe()
    command = [sys.executable, "-m", "slosched.daemon.member", str(far)]
    done = subprocess.run(
        command,
        input=b'{"mode":"tm"}\n',
        capture_output=True,
        pass_fds=(far,),
        timeout=60,
        check=False,
    )
    os.close(near)
    os.close(far)
    assert done.returncode == 2
    assert b"the order cannot be read" in done.stderr


def test_the_clock_of_members_is_the_one_that_all_processes_share() -> None:
    before = anchor_ns()
    try:
        take_anchor(0)
        assert abs(now_ns() - time.monotonic_ns()) < NS_PER_S
    finally:
        take_anchor(before)


def test_garbage_of_a_loop_that_is_never_idle_is_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cycles of an eager model may hold the device's memory, and automatic collections are off."""
    # A second and a half behind the start of the loop; here a tenth of a second.
    monkeypatch.setattr(loop, "_NEVER_IDLE_NS", -NS_PER_S * 9 // 10)

    class Node:
        def __init__(self) -> None:
            self.own = self

    class Littering(FakeLane):
        def start(self, start: Start, *, now_ns: int) -> None:
            nodes.append(weakref.ref(Node()))
            super().start(start, now_ns=now_ns - self.length_ns)  # an eager lane: it has ended

    nodes: list[weakref.ref[Node]] = []
    with undisturbed():  # which takes long where other tests have filled the heap
        world = _World(tmp_path, length_ns=NS_PER_S * 3 // 10)
        world.serve(world.pair(0, Littering(NS_PER_MS)))
        freed = nodes[0]() is None
    assert freed
    assert len(world.requests(0)) == len(nodes)
