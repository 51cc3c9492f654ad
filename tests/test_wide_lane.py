"""When the next slot of a lane with several is free, as it is predicted."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from slosched.core.scheduler.lane import Lane, WideLane


@dataclass(eq=False)
class Work:
    predicted_start_ns: int
    expected_duration_ns: int
    reaches_ns: int = 0
    priority: int = 0
    paused_ns: int = 0

    def __post_init__(self) -> None:
        self.predicted_end_ns = self.predicted_start_ns + self.expected_duration_ns


def test_a_lane_with_a_free_slot_is_free_now() -> None:
    lane: WideLane[Work] = WideLane("exec", width=2)
    assert (lane.busy_until_ns, lane.most) == (0, 4)
    lane.add(Work(100, 50))
    assert lane.busy_until_ns == 0
    second = Work(100, 30)
    lane.add(second)
    assert lane.busy_until_ns == 130
    third = Work(110, 40)
    lane.add(third)
    assert (third.predicted_start_ns, lane.busy_until_ns) == (130, 150)
    lane.finish(second, end_ns=120)
    assert (third.predicted_start_ns, third.predicted_end_ns) == (120, 160)
    assert lane.busy_until_ns == 150
    assert len(lane.drain()) == 2 and lane.busy_until_ns == 0


def test_what_waits_starts_no_sooner_than_it_is_there() -> None:
    lane: WideLane[Work] = WideLane("exec", width=1)
    first, second = Work(0, 10), Work(10, 5, reaches_ns=30)
    lane.add(first)
    lane.add(second)
    assert (second.predicted_start_ns, lane.busy_until_ns) == (30, 35)
    lane.finish(first, end_ns=8)
    assert second.predicted_start_ns == 30


def test_a_call_that_goes_on_stands_before_what_has_not_begun() -> None:
    lane: WideLane[Work] = WideLane("exec", width=1)
    suspended, waiting = Work(0, 10), Work(10, 20)
    lane.add(suspended)
    lane.add(waiting)
    lane.suspend(suspended, end_ns=4)
    assert waiting.predicted_start_ns == 4
    suspended.predicted_start_ns, suspended.predicted_end_ns = 5, 15
    lane.resume(suspended)
    assert lane.outstanding[0] is suspended
    assert (waiting.predicted_start_ns, lane.busy_until_ns) == (15, 35)


def test_a_gpus_lane_takes_a_call_that_goes_on_first_too() -> None:
    lane: Lane[Work] = Lane("exec")
    suspended, waiting = Work(0, 10), Work(10, 20)
    lane.add(suspended)
    lane.suspend(suspended, end_ns=4)
    lane.add(waiting)
    suspended.predicted_start_ns, suspended.predicted_end_ns = 30, 36
    lane.resume(suspended)
    assert (waiting.predicted_start_ns, waiting.predicted_end_ns) == (36, 56)
    assert lane.busy_until_ns == 56
    lane.finish(suspended, end_ns=35)
    assert (waiting.predicted_start_ns, lane.busy_until_ns) == (35, 55)


@pytest.mark.parametrize("seed", range(20))
def test_one_slot_is_predicted_as_a_lane_of_one_is(seed: int) -> None:
    draw = random.Random(seed)
    wide: WideLane[Work] = WideLane("exec", width=1)
    plain: Lane[Work] = Lane("exec")
    pairs: list[tuple[Work, Work]] = []
    now = 0
    for _ in range(60):
        now += draw.randint(1, 30)
        if pairs and draw.random() < 0.5:
            a, b = pairs.pop(0)
            wide.finish(a, end_ns=now)
            plain.finish(b, end_ns=now)
        else:
            start, duration = max(now + 3, plain.busy_until_ns), draw.randint(1, 40)
            made = Work(start, duration, now + 3), Work(start, duration, now + 3)
            pairs.append(made)
            wide.add(made[0])
            plain.add(made[1])
        for a, b in pairs:
            assert a.predicted_end_ns == b.predicted_end_ns
        if pairs:
            assert wide.busy_until_ns == plain.busy_until_ns


@pytest.mark.parametrize("width", [2, 3, 8])
def test_the_next_free_slot_is_that_of_list_scheduling(width: int) -> None:
    draw = random.Random(width)
    lane: WideLane[Work] = WideLane("exec", width=width)
    ends = [0] * width
    for _ in range(100):
        duration = draw.randint(1, 50)
        start = max(min(ends), 0)
        lane.add(Work(start, duration))
        ends[ends.index(min(ends))] = start + duration
        if len(lane.outstanding) >= width:
            assert lane.busy_until_ns == min(ends)
