"""The order of armed work in a lane: by time and priority, within its slots, without starvation."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slosched.core.worker.lane_order import ArmedWork, LaneOrder, LingeringOrder
from slosched.core.worker.lanes import LaneSpec, Role


@dataclass(slots=True, eq=False)
class Work(ArmedWork):
    name: str = ""
    segments: list[int] = field(default_factory=lambda: [1])  # how long each takes


def lane(width: int = 1, *, preemptive: bool = False) -> LaneSpec:
    return LaneSpec(Role.EXEC, width, preemptive)


def started(order: LaneOrder[Work], now_ns: int) -> list[str]:
    """The names of all work that starts at `now_ns`, in order."""
    names = []
    while (work := order.first(now_ns)) is not None:
        order.begin(work)
        names.append(work.name)
    return names


def test_work_starts_in_the_order_of_its_times_and_of_arming_where_these_agree() -> None:
    order: LaneOrder[Work] = LaneOrder(lane(4))
    for name, start_ns in (("late", 30), ("first", 10), ("second", 10), ("past", 0)):
        order.arm(Work(name), start_ns=start_ns, now_ns=5)
    assert order.next_due_ns() == 5
    assert started(order, 4) == []
    assert started(order, 9) == ["past"] and order.next_due_ns() == 10
    assert started(order, 10) == ["first", "second"]
    assert started(order, 30) == ["late"] and order.next_due_ns() is None


def test_a_higher_priority_goes_first_among_the_work_that_is_due() -> None:
    order: LaneOrder[Work] = LaneOrder(lane())
    order.arm(Work("low"), start_ns=0, now_ns=0)
    order.arm(Work("high"), start_ns=0, now_ns=0, priority=2)
    order.arm(Work("higher, later"), start_ns=9, now_ns=0, priority=3)
    assert started(order, 0) == ["high"]
    following = order.end(order.running[0], 5)
    assert following is not None and following.name == "low"


def test_no_more_runs_than_there_are_slots() -> None:
    order: LaneOrder[Work] = LaneOrder(lane(2))
    for name in "abc":
        order.arm(Work(name), start_ns=0, now_ns=0)
    assert started(order, 0) == ["a", "b"]
    following = order.end(order.running[1], 1)
    assert following is order.first(1) is order.armed[0] and following.name == "c"
    with pytest.raises(ValueError, match="at least one slot"):
        lane(0)


def test_at_a_boundary_higher_work_goes_first_and_what_it_interrupts_comes_before_its_equals() -> (
    None
):
    order: LaneOrder[Work] = LaneOrder(lane(preemptive=True))
    order.arm(Work("long"), start_ns=0, now_ns=0)
    assert started(order, 0) == ["long"]
    long = order.running[0]
    order.arm(Work("equal"), start_ns=1, now_ns=1)
    assert order.boundary(long, 2)
    order.arm(Work("urgent"), start_ns=3, now_ns=2, priority=1)
    assert order.boundary(long, 2)  # it is not due
    assert not order.boundary(long, 3)
    assert started(order, 3) == ["urgent"]
    assert order.end(order.running[0], 4) is long
    assert started(order, 4) == ["long"]
    following = order.end(long, 5)
    assert following is not None and following.name == "equal"


def test_a_lane_that_is_not_preemptive_is_never_interrupted() -> None:
    order: LaneOrder[Work] = LaneOrder(lane())
    order.arm(Work("long"), start_ns=0, now_ns=0)
    assert started(order, 0) == ["long"]
    order.arm(Work("urgent"), start_ns=0, now_ns=1, priority=9)
    assert order.boundary(order.running[0], 2)


def test_armed_work_can_be_given_up() -> None:
    order: LaneOrder[Work] = LaneOrder(lane())
    for name in "abc":
        order.arm(Work(name), start_ns=0, now_ns=0)
    order.disarm(order.armed[0])
    assert started(order, 0) == ["b"]
    assert [work.name for work in order.clear()] == ["b", "c"]
    assert not order.armed and not order.running


# ------------------------------------------------------------------------ whatever is armed

#: When a work is armed, its start time after that, its priority, the durations of its segments.
WORKS = st.lists(
    st.tuples(
        st.integers(0, 30),
        st.integers(-5, 10),
        st.integers(0, 2),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=12,
)


class Simulated:
    """A lane in integer time, with the checks that hold at each start and each boundary."""

    def __init__(self, width: int, preemptive: bool) -> None:
        self.order: LaneOrder[Work] = LaneOrder(lane(width, preemptive=preemptive))
        self.width, self.preemptive = width, preemptive
        self.ends: list[tuple[int, Work]] = []
        self.starts: list[tuple[int, Work]] = []
        self.interrupted = 0

    def due(self, now: int) -> list[Work]:
        return [work for work in self.order.armed if work.due_ns <= now]

    def start(self, now: int) -> None:
        while (work := self.order.first(now)) is not None:
            best = min(self.due(now), key=lambda w: (-w.priority, w.due_ns, w.number))
            assert work is best
            self.order.begin(work)
            self.starts.append((now, work))
            self.ends.append((now + work.segments[0], work))
        assert len(self.order.running) <= self.width
        assert len(self.order.running) == self.width or not self.due(now)

    def end_segments(self, now: int) -> None:
        for entry in [entry for entry in self.ends if entry[0] == now]:
            self.ends.remove(entry)
            work = entry[1]
            del work.segments[0]
            if not work.segments:
                following = self.order.end(work, now)
                assert following is self.order.first(now)
                continue
            higher = any(other.priority > work.priority for other in self.due(now))
            goes_on = self.order.boundary(work, now)
            assert goes_on == (not (self.preemptive and higher))
            if goes_on:
                self.ends.append((now + work.segments[0], work))
            else:
                self.interrupted += 1

    def run(self, works: list[tuple[int, int, int, list[int]]]) -> None:
        last = 41 + sum(sum(segments) for *_, segments in works)
        for now in range(last):
            for number, (armed_at, offset, priority, segments) in enumerate(works):
                if armed_at == now:
                    work = Work(str(number), list(segments))
                    start_ns = now + offset
                    self.order.arm(work, start_ns=start_ns, now_ns=now, priority=priority)
                    assert work.due_ns == max(start_ns, now)
            self.end_segments(now)
            self.start(now)
        assert not self.order.armed and not self.order.running, "starved"


@given(WORKS, st.integers(1, 3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_is_armed(
    works: list[tuple[int, int, int, list[int]]], width: int, preemptive: bool
) -> None:
    simulated = Simulated(width, preemptive)
    simulated.run(works)
    assert len(simulated.starts) == len(works) + simulated.interrupted


@given(WORKS, st.integers(1, 3), st.booleans())
@settings(max_examples=200, deadline=None)
def test_work_of_one_priority_starts_in_the_order_in_which_it_is_due(
    works: list[tuple[int, int, int, list[int]]], width: int, preemptive: bool
) -> None:
    simulated = Simulated(width, preemptive)
    simulated.run([(armed_at, offset, 1, segments) for armed_at, offset, _, segments in works])
    places = [(work.due_ns, work.number) for _, work in simulated.starts]
    assert places == sorted(places) and simulated.interrupted == 0


@given(st.integers(1, 40), st.integers(0, 9))
def test_no_stream_of_equals_starves_a_work_that_is_due(others: int, due_ns: int) -> None:
    order: LaneOrder[Work] = LaneOrder(lane())
    order.arm(Work("patient"), start_ns=due_ns, now_ns=0)
    behind = 0
    for now in range(others):
        order.arm(Work("other"), start_ns=0, now_ns=now)  # each might start at any time
        for name in started(order, now):
            if name == "patient":
                assert behind <= due_ns + 1
                return
            behind += 1
        order.end(order.running[0], now)
    assert others <= due_ns + 1


def test_a_lane_lingers_behind_a_work_before_it_resumes_another() -> None:
    order: LingeringOrder[Work] = LingeringOrder(lane(preemptive=True))
    low, high, next_one = Work("low"), Work("high"), Work("next")
    order.arm(low, start_ns=0, now_ns=0)
    assert started(order, 0) == ["low"]
    high.linger_ns = next_one.linger_ns = 100
    order.arm(high, start_ns=0, now_ns=10, priority=1)
    assert not order.boundary(low, 20)
    assert started(order, 20) == ["high"]
    assert order.end(high, 50) is None and order.first(149) is None  # low waits, though it is due
    order.arm(next_one, start_ns=0, now_ns=60, priority=1)
    assert started(order, 60) == ["next"]
    assert order.end(next_one, 90) is None
    assert started(order, 189) == [] and started(order, 190) == ["low"]
    other = Work("patient")
    other.patient = True
    order.arm(other, start_ns=0, now_ns=200)
    assert order.end(low, 210) is other  # low does not linger


def test_nothing_waits_for_a_lingering_work_but_what_is_patient() -> None:
    order: LingeringOrder[Work] = LingeringOrder(lane(preemptive=True))
    work, peer, behind = Work("work"), Work("peer"), Work("behind")
    work.linger_ns = 100
    behind.patient = True
    order.arm(work, start_ns=0, now_ns=0)
    assert started(order, 0) == ["work"]
    order.arm(behind, start_ns=0, now_ns=1)
    order.arm(peer, start_ns=0, now_ns=2)
    # The patient one goes first, so its peer may not overtake it either.
    assert order.end(work, 10) is None and order.first(109) is None
    assert order.first(110) is behind
    order.disarm(behind)
    assert order.first(11) is peer
