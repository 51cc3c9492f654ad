"""Closed loops: never more outstanding than their concurrency, and what follows a refusal."""

from __future__ import annotations

import random

import pytest

from arrival_statistics import serve
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Arrival, ModelUse
from slosched.workloads.composed import BurstyClosedPart, ClosedPart, Composed
from slosched.workloads.streams import BurstyClosedLoop, ClosedLoop


def looping(part: ClosedPart | BurstyClosedPart) -> Composed:
    return Composed("loop", (), "a closed loop", (ModelUse("m", 3),), (part,))


def most_outstanding(sent: list[tuple[Arrival, int, bool]]) -> int:
    """At any time, with an answer counted as given before what is sent at the same time."""
    changes = sorted([(a.at_ns, 1) for a, _, _ in sent] + [(at_ns, -1) for _, at_ns, _ in sent])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("concurrency", [1, 4, 17])
def test_outstanding_requests_never_exceed_the_concurrency(concurrency: int) -> None:
    draws = random.Random(5)

    def server(arrival: Arrival) -> tuple[int, bool, int]:
        ok = draws.random() < 0.7
        return draws.randrange(1, 30 * NS_PER_MS), ok, 20 * NS_PER_MS

    part = ClosedPart(concurrency, (0, 1, 2), 0)
    sent = serve(looping(part), server, duration_ns=5 * NS_PER_S)
    assert most_outstanding(sent) == concurrency
    assert [a.instance for a, _, _ in sent] == [i % 3 for i in range(len(sent))]


def test_each_answer_is_followed_at_once() -> None:
    takes_ns = 7 * NS_PER_MS
    sent = serve(
        looping(ClosedPart(2, (0,), 0)), lambda a: (takes_ns, True, NS_PER_S), duration_ns=NS_PER_S
    )
    assert [a.at_ns for a, _, _ in sent] == [i // 2 * takes_ns for i in range(2 * 143)]


def test_a_refused_request_is_followed_at_its_deadline() -> None:
    # Refused after 1 ms with an SLO of 25 ms: 40 requests/s and not 1,000.
    sent = serve(
        looping(ClosedPart(1, (0,), 0)),
        lambda a: (NS_PER_MS, False, 25 * NS_PER_MS),
        duration_ns=NS_PER_S,
    )
    assert [a.at_ns for a, _, _ in sent] == [i * 25 * NS_PER_MS for i in range(40)]
    # What fails after its deadline is followed at once.
    sent = serve(
        looping(ClosedPart(1, (0,), 0)),
        lambda a: (50 * NS_PER_MS, False, 25 * NS_PER_MS),
        duration_ns=NS_PER_S,
    )
    assert [a.at_ns for a, _, _ in sent] == [i * 50 * NS_PER_MS for i in range(20)]


def test_a_delay_and_a_cap() -> None:
    part = ClosedPart(3, (0,), 0, requests=7, delay_ns=NS_PER_S)
    sent = serve(looping(part), lambda a: (NS_PER_MS, True, NS_PER_S), duration_ns=9 * NS_PER_S)
    assert len(sent) == 7
    assert [a.at_ns for a, _, _ in sent[:3]] == [NS_PER_S] * 3


@pytest.mark.parametrize("concurrency", [1, 5])
def test_bursts_begin_and_end_with_all_their_requests(concurrency: int) -> None:
    takes_ns, burst_ns = 10 * NS_PER_MS, NS_PER_S
    part = BurstyClosedPart(concurrency, 0, 0, burst_ns)
    length_ns = 400 * NS_PER_S
    sent = serve(looping(part), lambda a: (takes_ns, True, NS_PER_S), duration_ns=length_ns)
    assert [a.at_ns for a, _, _ in sent[:concurrency]] == [0] * concurrency
    assert most_outstanding(sent) == concurrency
    # Every burst is a row of whole rounds; pauses are as long as bursts on average.
    times = [a.at_ns for a, _, _ in sent]
    rounds = times[::concurrency]
    assert times == [at_ns for at_ns in rounds for _ in range(concurrency)]
    assert len(rounds) * takes_ns / length_ns == pytest.approx(0.5, abs=0.08)


def test_a_burst_that_is_refused_goes_on_at_the_deadline() -> None:
    part = BurstyClosedPart(1, 0, 0, 1000 * NS_PER_S)
    sent = serve(looping(part), lambda a: (NS_PER_MS, False, 20 * NS_PER_MS), duration_ns=NS_PER_S)
    assert [a.at_ns for a, _, _ in sent] == [i * 20 * NS_PER_MS for i in range(50)]


def test_impossible_loops_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="concurrency must be at least 1"):
        ClosedLoop(0, (0,), user_id=0)
    with pytest.raises(InvalidConfig, match="at least 0"):
        ClosedLoop(1, (0,), user_id=0, requests=-1)
    with pytest.raises(InvalidConfig, match="at least one model instance"):
        ClosedLoop(1, (), user_id=0)
    with pytest.raises(InvalidConfig, match="concurrency must be at least 1"):
        BurstyClosedLoop(0, (0,), burst_ns=1, seed=0, user_id=0)
