"""The brain of a shared lane: policies, queues, and the invariants that hold for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.core.share.brain import Load, ShareBrain
from slosched.core.share.driving import turn
from slosched.core.share.interface import Ended, Lane, Start, Withdraw
from slosched.errors import InvalidConfig
from slosched.share.virtual_lanes import BoundaryLane, Spacing
from slosched.share_spec import Arriving, Clients, Interruption, Policy, Request, Stop
from slosched.workloads.job_arrivals import arrivals_of

MS = 1_000_000
BEGIN = 10**12
OPEN = Clients(arriving=Arriving.TRACE)


@dataclass
class PlainLane:
    """Runs one request after another in the order of their starts, and holds `takes`."""

    work: dict[int, int]
    takes: int = 1
    preemptive: bool = False
    held: list[Start] = field(default_factory=list)
    end_ns: int = 0
    begun_ns: int = 0
    most: dict[int, int] = field(default_factory=dict)

    def start(self, start: Start, *, now_ns: int) -> None:
        self.held.append(start)
        for job in {each.job for each in self.held}:
            out = sum(each.job == job for each in self.held)
            self.most[job] = max(self.most.get(job, 0), out)
        assert len(self.held) <= self.takes
        if len(self.held) == 1:
            self._run(now_ns)

    def _run(self, now_ns: int) -> None:
        self.begun_ns, self.end_ns = now_ns, now_ns + self.work[self.held[0].job]

    def withdraw(self, withdraw: Withdraw) -> bool:
        for each in self.held[1:]:
            if (each.job, each.number) == (withdraw.job, withdraw.number):
                self.held.remove(each)
                return True
        return False

    def poll(self, *, now_ns: int) -> list[Ended]:
        ends = []
        while self.held and self.end_ns <= now_ns:
            done, end_ns = self.held.pop(0), self.end_ns
            ends.append(
                Ended(job=done.job, number=done.number, started_ns=self.begun_ns, ended_ns=end_ns)
            )
            if self.held:
                self._run(end_ns)
        return ends

    def next_event_ns(self) -> int | None:
        return self.end_ns if self.held else None

    def pass_time(self, until_ns: int | None) -> bool:
        return True


def play(brain: ShareBrain, lane: Lane, length_ns: int = 200 * MS) -> list[Request | Interruption]:
    brain.begin(BEGIN, BEGIN + length_ns)
    now = BEGIN
    for _ in range(100_000):
        at = now
        turn(brain, lane, lambda: at)  # noqa: B023 - called before the next step
        if brain.done:
            return brain.rows()
        times = [t for t in (brain.next_wakeup_ns(), lane.next_event_ns()) if t is not None]
        assert times, "it neither ends nor waits for anything"
        assert min(times) >= now
        now = min(times)
    raise AssertionError("it does not end")


def requests(rows: list[Request | Interruption]) -> list[Request]:
    return [row for row in rows if isinstance(row, Request)]


def trace(*at_ms: int) -> list[int]:
    return [at * MS for at in at_ms]


def order_of(brain: ShareBrain, lane: Lane) -> list[tuple[int, int]]:
    rows = requests(play(brain, lane))
    return [(row.job, row.number) for row in sorted(rows, key=lambda row: row.started_ns)]


# --------------------------------------------------------------------------------- policies, by hand


def test_fcfs_goes_by_arrival() -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0, 4, 5)),
        Load(job=1, clients=OPEN, arrivals=trace(1, 2)),
    ]
    brain = ShareBrain(loads, policy=Policy.FCFS)
    lane = PlainLane({0: 10 * MS, 1: 10 * MS})
    assert order_of(brain, lane) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2)]


def test_round_robin_gives_each_job_its_turn() -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0, 0, 0, 0)),
        Load(job=1, clients=OPEN, arrivals=trace(1, 1)),
        Load(job=2, clients=OPEN, arrivals=trace(1)),
    ]
    brain = ShareBrain(loads, policy=Policy.RR)
    lane = PlainLane(dict.fromkeys(range(3), 10 * MS))
    assert [job for job, _ in order_of(brain, lane)] == [0, 1, 2, 0, 1, 0, 0]


def test_priority_has_many_levels_and_fcfs_inside() -> None:
    loads = [
        Load(job=j, clients=OPEN, arrivals=trace(at), priority=level)
        for j, (at, level) in enumerate([(0, 0), (3, 1), (2, 7), (2, 1), (1, -5)])
    ]
    brain = ShareBrain(loads, policy=Policy.PRIORITY)
    lane = PlainLane(dict.fromkeys(range(5), 10 * MS))
    assert [job for job, _ in order_of(brain, lane)] == [0, 2, 3, 1, 4]


def test_edf_and_least_slack_differ_by_the_remaining_time() -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0)),
        Load(job=1, clients=OPEN, arrivals=trace(1), slo_ns=40 * MS, expected_ns=5 * MS),
        Load(job=2, clients=OPEN, arrivals=trace(1), slo_ns=50 * MS, expected_ns=30 * MS),
        Load(job=3, clients=OPEN, arrivals=trace(1)),
    ]
    work = {0: 10 * MS, 1: 5 * MS, 2: 30 * MS, 3: MS}
    edf = order_of(ShareBrain(loads, policy=Policy.EDF), PlainLane(work))
    slack = order_of(ShareBrain(loads, policy=Policy.LEAST_SLACK), PlainLane(work))
    assert [job for job, _ in edf] == [0, 1, 2, 3]
    assert [job for job, _ in slack] == [0, 2, 1, 3]


def test_an_armed_request_is_taken_back_for_a_better_one() -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0, 1)),
        Load(job=1, clients=OPEN, arrivals=trace(3), priority=1),
    ]
    brain = ShareBrain(loads, policy=Policy.PRIORITY, takes=2)
    lane = PlainLane({0: 10 * MS, 1: 10 * MS}, takes=2)
    assert order_of(brain, lane) == [(0, 0), (1, 0), (0, 1)]


def test_a_refused_withdrawal_loses_nothing() -> None:
    class Stubborn(PlainLane):
        def withdraw(self, withdraw: Withdraw) -> bool:
            return False

    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0, 1)),
        Load(job=1, clients=OPEN, arrivals=trace(3), priority=1),
    ]
    brain = ShareBrain(loads, policy=Policy.PRIORITY, takes=2)
    lane = Stubborn({0: 10 * MS, 1: 10 * MS}, takes=2)
    assert order_of(brain, lane) == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("policy", [Policy.PRIORITY, Policy.EDF, Policy.LEAST_SLACK])
def test_the_urgent_one_interrupts_at_the_next_boundary(policy: Policy) -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0), expected_ns=50 * MS, boundary_ns=2 * MS),
        Load(
            job=1, clients=OPEN, arrivals=trace(5), priority=1, slo_ns=12 * MS, expected_ns=10 * MS
        ),
    ]
    work = {0: 50 * MS, 1: 10 * MS}
    lane = BoundaryLane(lambda job, number: work[job], {0: Spacing(2 * MS), 1: Spacing(0)})
    brain = ShareBrain(loads, policy=policy, takes=lane.takes, preemptive=True)
    rows = play(brain, lane)
    low, high = sorted(requests(rows), key=lambda row: row.job)
    (pause,) = [row for row in rows if isinstance(row, Interruption)]
    assert (high.started_ns, high.ended_ns) == (BEGIN + 6 * MS, BEGIN + 16 * MS)
    assert (low.started_ns, low.ended_ns, low.paused_ns) == (BEGIN, BEGIN + 60 * MS, 10 * MS)
    assert (pause.by, pause.wanted_ns, pause.started_ns, pause.resumed_ns, pause.boundary) == (
        1,
        BEGIN + 5 * MS,
        BEGIN + 6 * MS,
        BEGIN + 16 * MS,
        3,
    )


@pytest.mark.parametrize("policy", [Policy.FCFS, Policy.RR])
def test_fcfs_and_round_robin_interrupt_nothing(policy: Policy) -> None:
    loads = [
        Load(job=0, clients=OPEN, arrivals=trace(0, 1, 2)),
        Load(job=1, clients=OPEN, arrivals=trace(3, 4), priority=9, slo_ns=MS),
    ]
    lane = BoundaryLane(lambda job, number: 10 * MS, {0: Spacing(MS), 1: Spacing(MS)})
    rows = play(ShareBrain(loads, policy=policy, takes=lane.takes, preemptive=True), lane)
    assert len(rows) == 5
    assert not any(isinstance(row, Interruption) for row in rows)


def test_three_levels_nest() -> None:
    loads = [
        Load(job=j, clients=OPEN, arrivals=trace(at), priority=j) for j, at in enumerate([0, 5, 8])
    ]
    lane = BoundaryLane(lambda job, number: 20 * MS, dict.fromkeys(range(3), Spacing(MS)))
    rows = play(ShareBrain(loads, policy=Policy.PRIORITY, takes=lane.takes, preemptive=True), lane)
    ends = {row.job: row.ended_ns - BEGIN for row in requests(rows)}
    # What arrives at a boundary waits for the segment that begins there.
    assert ends == {2: 29 * MS, 1: 46 * MS, 0: 60 * MS}


def test_a_waiting_request_becomes_more_urgent_with_time() -> None:
    """Least slack: nothing arrives or ends when the slack of what waits falls below that of what runs."""
    loads = [
        Load(
            job=0,
            clients=OPEN,
            arrivals=trace(0),
            slo_ns=150 * MS,
            expected_ns=100 * MS,
            boundary_ns=MS,
        ),
        Load(
            job=1,
            clients=OPEN,
            arrivals=trace(0),
            slo_ns=75 * MS,
            expected_ns=5 * MS,
            boundary_ns=MS,
        ),
    ]
    work = {0: 100 * MS, 1: 5 * MS}
    lane = BoundaryLane(lambda job, number: work[job], dict.fromkeys((0, 1), Spacing(MS)))
    brain = ShareBrain(loads, policy=Policy.LEAST_SLACK, takes=lane.takes, preemptive=True)
    rows = requests(play(brain, lane))
    assert all(row.ended_ns <= row.deadline_ns for row in rows)
    assert next(row for row in rows if row.job == 0).interruptions == 1


# --------------------------------------------------------------------------------- clients


def test_a_closed_loop_thinks_and_keeps_its_concurrency() -> None:
    load = Load(job=0, clients=Clients(think_ns=5 * MS, concurrency=3))
    lane = PlainLane({0: 10 * MS}, takes=2)
    rows = requests(play(ShareBrain([load], takes=2), lane, 100 * MS))
    assert all(
        sum(row.arrived_ns <= at < row.ended_ns for row in rows) <= 3
        for at in (row.arrived_ns for row in rows)
    )
    assert [row.arrived_ns for row in rows[3:]] == [row.ended_ns + 5 * MS for row in rows[:-3]]


def test_count_and_start_after() -> None:
    loads = [Load(job=0, count=3, start_after_ns=7 * MS), Load(job=1, count=1)]
    brain = ShareBrain(loads)
    rows = requests(play(brain, PlainLane({0: MS, 1: MS})))
    assert [row.job for row in rows] == [1, 0, 0, 0]
    assert rows[1].arrived_ns == BEGIN + 7 * MS
    assert brain.tally(0).left == 0


def test_least_jobs_goes_on_behind_the_duration_and_end_ends_it() -> None:
    lane = PlainLane({0: 30 * MS})
    brain = ShareBrain([Load(job=0)], least_jobs=10, stop=Stop.CUT)
    rows = requests(play(brain, lane, 100 * MS))
    assert len(rows) == 10
    assert not any(row.cut for row in rows)
    brain = ShareBrain([Load(job=0)], least_jobs=10)
    brain.begin(BEGIN, BEGIN + 100 * MS)
    brain.end(BEGIN)
    assert brain.schedule(now_ns=BEGIN) == []
    assert brain.done


@pytest.mark.parametrize(("stop", "cut"), [(Stop.FINISH, False), (Stop.CUT, True)])
def test_what_runs_at_the_end_counts_or_is_cut(stop: Stop, cut: bool) -> None:
    brain = ShareBrain([Load(job=0)], stop=stop)
    rows = requests(play(brain, PlainLane({0: 30 * MS}), 100 * MS))
    assert [row.cut for row in rows] == [False, False, False, cut]


def test_an_overloaded_open_loop_takes_no_memory_and_counts_what_is_left() -> None:
    """1,000/s arrive for 0.2 s, one ends in 10 ms: 20 run, and none is dropped or kept in a list."""
    clients = Clients(arriving=Arriving.CONSTANT, rate_per_s=1000)
    brain = ShareBrain([Load(job=0, clients=clients, arrivals=arrivals_of(clients, 0))])
    rows = requests(play(brain, PlainLane({0: 10 * MS})))
    assert [row.number for row in rows] == list(range(20))
    assert brain.tally(0).left == 199 - 20  # the last arrival is at 199 ms
    assert brain.tally(0).left == 199 - 20  # asked twice


def test_failures_are_counted_and_a_broken_model_ends_its_job_alone() -> None:
    brain = ShareBrain([Load(job=0), Load(job=1, count=2)], policy=Policy.RR)
    brain.begin(BEGIN, BEGIN + 100 * MS)

    def end(start: Start | Withdraw, now_ns: int, **how: object) -> None:
        assert isinstance(start, Start)
        brain.ended(
            Ended(job=start.job, number=start.number, started_ns=now_ns, ended_ns=now_ns, **how),  # type: ignore[arg-type]
            now_ns=now_ns,
        )

    (first,) = brain.schedule(now_ns=BEGIN)
    assert isinstance(first, Start)
    end(first, BEGIN + 1, reason="boom", fatal=True, out_of_memory=True)
    end(first, BEGIN + 1, reason="again")  # a second report of the same end changes nothing
    tally = brain.tally(0)
    assert (tally.over, tally.failed, tally.reason, tally.out_of_memory) == (True, 1, "boom", True)
    now = BEGIN + 2
    while not brain.done:
        (start,) = brain.schedule(now_ns=now)
        assert isinstance(start, Start)
        assert start.job == 1
        now += 1
        end(start, now, beside_lower=start.number == 1)
    assert brain.tally(1).ended == 2
    assert [row.beside_lower for row in brain.rows() if isinstance(row, Request)] == [False, True]


def test_a_model_that_always_fails_does_not_fail_for_ever() -> None:
    brain = ShareBrain([Load(job=0)])
    brain.begin(BEGIN, BEGIN + 10**12)
    now = BEGIN
    while not brain.done:
        (start,) = brain.schedule(now_ns=now)
        assert isinstance(start, Start)
        now += 1
        brain.ended(
            Ended(job=0, number=start.number, started_ns=now, ended_ns=now, reason="no"), now_ns=now
        )
    assert brain.tally(0).failed == 100
    assert brain.tally(0).fatal


def test_wrong_brains_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="at least one job"):
        ShareBrain([])
    with pytest.raises(InvalidConfig, match="each job once"):
        ShareBrain([Load(job=1), Load(job=1)])
    with pytest.raises(InvalidConfig, match="not 0"):
        ShareBrain([Load(job=1)], takes=0)


# --------------------------------------------------------------------------------- arrivals


def test_arrivals() -> None:
    assert list(arrivals_of(Clients(), 0)) == []
    assert list(arrivals_of(Clients(arriving=Arriving.TRACE, trace=(0.0, 0.25, 0.25)), 3)) == [
        0,
        250 * MS,
        250 * MS,
    ]
    poisson = Clients(arriving=Arriving.POISSON, rate_per_s=100)
    first, again, other = (
        [next(times) for _ in range(5)]
        for times in (arrivals_of(poisson, 1), arrivals_of(poisson, 1), arrivals_of(poisson, 2))
    )
    assert first == again != other
    gamma = arrivals_of(Clients(arriving=Arriving.GAMMA, rate_per_s=100, cv=0.1), 0)
    assert abs([next(gamma) for _ in range(500)][-1] - 5 * 10**9) < 10**8  # 500 at 100/s


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (Clients(arriving=Arriving.POISSON), "rate"),
        (Clients(arriving=Arriving.GAMMA, rate_per_s=float("nan")), "rate"),
        (Clients(arriving=Arriving.GAMMA, rate_per_s=1, cv=0), "cv"),
        (Clients(arriving=Arriving.TRACE, trace=(1.0, 0.5)), "sort the trace"),
        (Clients(arriving=Arriving.TRACE, trace=(-1.0,)), "within 0"),
        (Clients(arriving=Arriving.TRACE, trace=(float("nan"),)), "within 0"),
    ],
)
def test_wrong_arrivals_are_refused_at_the_call(clients: Clients, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        arrivals_of(clients, 0)


# --------------------------------------------------------------------------------- invariants

TIMES = st.lists(st.integers(0, 120), max_size=8).map(sorted)


@st.composite
def loads_and_work(draw: st.DrawFn) -> tuple[list[Load], dict[int, int]]:
    loads, work = [], {}
    for job in range(draw(st.integers(1, 4))):
        closed = draw(st.booleans())
        work[job] = draw(st.integers(1, 40)) * MS
        clients = Clients(
            arriving=Arriving.CLOSED if closed else Arriving.TRACE,
            think_ns=draw(st.integers(0, 20)) * MS,
            concurrency=draw(st.integers(1, 3)),
        )
        loads.append(
            Load(
                job=job,
                clients=clients,
                arrivals=[] if closed else trace(*draw(TIMES)),
                priority=draw(st.integers(0, 2)),
                slo_ns=draw(st.sampled_from([0, 30 * MS, 90 * MS])),
                count=draw(st.sampled_from([0, 0, 1, 3])),
                start_after_ns=draw(st.sampled_from([0, 0, 15 * MS])),
                expected_ns=draw(st.sampled_from([0, work[job]])),
                boundary_ns=2 * MS,
            )
        )
    return loads, work


def check_rows(rows: list[Request | Interruption], loads: list[Load], brain: ShareBrain) -> None:
    """Each request has one row or is counted as left over; a closed loop has no more out than it may."""
    until = BEGIN + 200 * MS
    done = requests(rows)
    assert len({(row.job, row.number) for row in done}) == len(done)
    for load in loads:
        mine = [row for row in done if row.job == load.job]
        tally = brain.tally(load.job)
        assert tally.ended == len(mine)
        assert not tally.failed
        assert all(row.arrived_ns <= row.started_ns < row.ended_ns for row in mine)
        assert all(row.started_ns <= until for row in mine)
        arrivals = list(load.arrivals)
        if load.clients.arriving is Arriving.CLOSED:
            for row in mine:
                out = sum(o.arrived_ns <= row.arrived_ns < o.ended_ns for o in mine)
                assert out <= load.clients.concurrency
        elif load.count and len(mine) >= load.count:
            assert tally.left == 0
        else:
            start = BEGIN + load.start_after_ns
            arrived = sum(start + at < until for at in arrivals)
            assert arrived == len(mine) + tally.left
        if load.count:
            assert len(mine) <= load.count


@settings(max_examples=60, deadline=None)
@given(loads_and_work(), st.sampled_from(list(Policy)), st.integers(1, 3), st.integers(0, 5))
def test_plain_lanes(
    given_: tuple[list[Load], dict[int, int]], policy: Policy, takes: int, seed: int
) -> None:
    loads, work = given_
    brain = ShareBrain(loads, policy=policy, takes=takes, seed=seed)
    rows = play(brain, PlainLane(work, takes=takes))
    check_rows(rows, loads, brain)
    # Work conservation: the lane never stands still while a request waits.
    done = sorted(requests(rows), key=lambda row: row.started_ns)
    free_ns = BEGIN
    for row in done:
        waiting = min(other.arrived_ns for other in done if other.started_ns >= row.started_ns)
        assert row.started_ns == max(free_ns, waiting)
        free_ns = row.ended_ns


@settings(max_examples=60, deadline=None)
@given(loads_and_work(), st.sampled_from(list(Policy)), st.sampled_from([1, 2, 99]))
def test_preemptive_lanes(
    given_: tuple[list[Load], dict[int, int]], policy: Policy, most: int
) -> None:
    """A lane that takes fewer than it has jobs loses nothing either, but lets the urgent ones wait."""
    loads, work = given_
    lane = BoundaryLane(
        lambda job, number: work[job], {load.job: Spacing(2 * MS) for load in loads}
    )
    takes = min(most, lane.takes)
    brain = ShareBrain(loads, policy=policy, takes=takes, preemptive=True)
    rows = play(brain, lane)
    check_rows(rows, loads, brain)
    done = requests(rows)
    for row in done:
        assert row.ended_ns - row.started_ns - row.paused_ns == work[row.job]
        pauses = [
            each
            for each in rows
            if isinstance(each, Interruption)
            and each.job == row.job
            and row.started_ns < each.started_ns < row.ended_ns
        ]
        assert row.paused_ns == sum(each.resumed_ns - each.started_ns for each in pauses)
        assert row.interruptions == len(pauses)
    if policy is Policy.PRIORITY and takes == lane.takes:
        check_inversions(done, rows, loads)


def check_inversions(
    done: list[Request], rows: list[Request | Interruption], loads: list[Load]
) -> None:
    """A request waits for one of lower priority no longer than to its next boundary: 2 ms."""
    level = {load.job: load.priority for load in loads}
    paused = [row for row in rows if isinstance(row, Interruption)]
    for row in done:
        inverted = 0
        for low in done:
            if level[low.job] >= level[row.job]:
                continue
            begin, end = max(low.started_ns, row.arrived_ns), min(low.ended_ns, row.started_ns)
            if begin >= end:
                continue
            off = sum(
                max(0, min(end, each.resumed_ns) - max(begin, each.started_ns))
                for each in paused
                if each.job == low.job and low.started_ns < each.started_ns < low.ended_ns
            )
            inverted += end - begin - off
        assert inverted <= 2 * MS


@settings(max_examples=30, deadline=None)
@given(loads_and_work(), st.sampled_from(list(Policy)))
def test_the_same_again(given_: tuple[list[Load], dict[int, int]], policy: Policy) -> None:
    loads, work = given_

    def rows() -> list[Request | Interruption]:
        lane = BoundaryLane(
            lambda job, number: work[job], {load.job: Spacing(2 * MS) for load in loads}
        )
        return play(ShareBrain(loads, policy=policy, takes=lane.takes, preemptive=True), lane)

    assert rows() == rows()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_round_robin_is_fair(work_ms: list[int]) -> None:
    """Closed loops that never think have as many requests as each other, whatever each takes."""
    loads = [Load(job=job) for job in range(len(work_ms))]
    lane = PlainLane({job: ms * MS for job, ms in enumerate(work_ms)})
    done = requests(play(ShareBrain(loads, policy=Policy.RR), lane))
    counts = [sum(row.job == load.job for row in done) for load in loads]
    assert max(counts) - min(counts) <= 1
