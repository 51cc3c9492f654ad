"""What the controller remembers for its live page: right by brute force, and no larger with time."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter

import msgspec
import pytest

from slosched.codes import ActionType, Code
from slosched.core.scheduler.interface import RequestRecord
from slosched.messages import NO_SPAN
from slosched.telemetry.recent import (
    BUSY_SECONDS,
    KEPT_ACTIONS,
    KEPT_MISSES,
    LATE,
    LATENCY_BOUNDS_NS,
    OTHER,
    SECONDS,
    LastMinutes,
    bucket_of,
)
from synthetic_run import MS, START_NS, S, action, request

FIRST = START_NS // S


def some_requests(count: int, seconds: int, *, seed: int = 1) -> list[RequestRecord]:
    """In the order of their answers, as a controller gives them; latencies from 50 us to 20 s."""
    chance = random.Random(seed)
    records = [
        request(
            chance.randrange(seconds * S),
            round(10 ** chance.uniform(4.7, 10.3)),
            slo_ns=100 * MS,
            code=chance.choice([0, 0, 0, int(Code.TIMED_OUT), int(Code.COULD_NOT_START_IN_TIME)]),
            number=number,
        )
        for number in range(count)
    ]
    return sorted(records, key=lambda r: r.departure_ns)


def test_counts_and_latencies_are_those_of_the_records() -> None:
    records, recent = some_requests(5_000, 40), LastMinutes()
    for record in records:
        recent.add_request(record)
    now_ns = START_NS + 70 * S
    series = recent.series(now_ns)
    assert series.second == FIRST + 70
    seconds = range(series.second - SECONDS + 1, series.second + 1)
    offered = Counter(r.arrival_ns // S for r in records)
    satisfied = Counter(r.arrival_ns // S for r in records if r.deadline_met)
    missed = Counter((r.code, r.departure_ns // S) for r in records if not r.deadline_met)
    assert series.offered == [offered[s] for s in seconds]
    assert series.satisfied == [satisfied[s] for s in seconds]
    assert set(series.misses) == {LATE, Code.TIMED_OUT, Code.COULD_NOT_START_IN_TIME}
    for code, counts in series.misses.items():
        assert counts == [missed[code, s] for s in seconds]
    for at, second in enumerate(seconds):
        latencies = sorted(
            r.departure_ns - r.arrival_ns
            for r in records
            if r.code == 0 and r.departure_ns // S == second
        )
        for share, told_us in ((50, series.p50_us[at]), (99, series.p99_us[at])):
            if not latencies:
                assert told_us is None
                continue
            exact_ns = latencies[-(-len(latencies) * share // 100) - 1]
            # Half a class: 33 us below 67 ms, then 0.5 ms, from 1.07 s on 8.4 ms; 17 s is the end.
            half_ns = 2**15 if exact_ns < 2**26 else 2**19 if exact_ns < 2**30 else 2**23
            assert told_us is not None
            if exact_ns < 2**34:
                assert abs(told_us * 1000 - exact_ns) <= half_ns + 1000
            else:
                assert told_us * 1000 == pytest.approx(2**34, rel=0.001)


def test_a_shift_finds_the_bucket_that_a_search_finds() -> None:
    chance = random.Random(2)
    edges = [bound + more for bound in LATENCY_BOUNDS_NS for more in (0, 1)]
    for latency_ns in (0, *edges, *(round(10 ** chance.uniform(0, 11)) for _ in range(2_000))):
        assert bucket_of(latency_ns) == bisect_left(LATENCY_BOUNDS_NS, latency_ns)


@pytest.mark.parametrize("pause_s", [1, 7, SECONDS - 1, SECONDS, 10 * SECONDS])
def test_a_pause_leaves_empty_seconds_and_no_old_ones(pause_s: int) -> None:
    recent = LastMinutes()
    recent.add_request(request(0, 5 * MS))
    recent.add_request(request(10 * MS, 5 * MS, code=4))
    recent.add_request(request(pause_s * S, 5 * MS))
    series = recent.series(START_NS + pause_s * S + 6 * MS)
    kept = pause_s < SECONDS
    assert sum(series.offered) == 1 + 2 * kept and series.offered[-1] == 1
    assert sum(series.satisfied) == 1 + kept
    assert sum(series.misses[4]) == kept
    told = [back for back, us in enumerate(reversed(series.p50_us)) if us is not None]
    assert told == [pause_s] * kept
    for values in (
        series.offered,
        series.satisfied,
        series.misses[4],
        series.p50_us,
        series.p99_us,
    ):
        assert len(values) == SECONDS


def test_looking_does_not_change_what_is_seen() -> None:
    watched, alone = LastMinutes(), LastMinutes()
    for record in some_requests(500, 20):
        watched.add_request(record)
        watched.series(record.departure_ns)
        alone.add_request(record)
    now_ns = START_NS + 50 * S
    assert watched.series(now_ns) == alone.series(now_ns)


def test_what_arrived_before_all_seconds_is_missed_only_where_it_was_answered() -> None:
    recent = LastMinutes()
    recent.add_request(request(0, (SECONDS + 5) * S, slo_ns=100 * MS))
    series = recent.series(START_NS + (SECONDS + 5) * S)
    assert sum(series.offered) == 0 and series.misses[LATE][-1] == 1


def test_a_flood_of_codes_shares_one_place() -> None:
    recent = LastMinutes()
    for code in range(40):
        recent.add_request(request(code * MS, MS, code=code or 4))
    misses = recent.series(START_NS + S - 1).misses
    assert len(misses) == 17 and sum(map(sum, misses.values())) == 40
    assert misses[OTHER][-1] == 40 - sum(c[-1] for code, c in misses.items() if code != OTHER) > 20


def test_the_last_misses_are_kept_as_they_are() -> None:
    records, recent = some_requests(2_000, 10), LastMinutes()
    for record in records:
        recent.add_request(record)
    assert list(recent.missed) == [r for r in records if not r.deadline_met][-KEPT_MISSES:]


def test_actions_are_found_by_their_numbers_until_newer_ones_take_their_place() -> None:
    recent, more = LastMinutes(), 10
    loads = [action(i * MS, MS, kind=ActionType.LOAD_WEIGHTS) for i in range(KEPT_ACTIONS + more)]
    for record in loads:
        recent.add_action(record)
    recent.add_action(action(0, MS, kind=ActionType.EVICT_WEIGHTS))
    assert recent.next_action == KEPT_ACTIONS + more
    assert recent.actions(0, more) == []
    assert recent.actions(0, more + 2) == loads[more : more + 2]
    assert recent.actions(recent.next_action - 3, recent.next_action + 99) == loads[-3:]


def test_busy_time_is_split_over_the_seconds_that_it_touches() -> None:
    chance = random.Random(3)
    recent, at_ns, busy_ns = LastMinutes(), 0, Counter[int]()
    spans = []
    while at_ns < 90 * S:
        at_ns += chance.randrange(300 * MS)
        spans.append((at_ns, duration_ns := chance.choice([3 * MS, 20 * MS, 2_500 * MS])))
        at_ns += duration_ns
    # Reports may overtake one another by a little.
    spans.sort(key=lambda span: sum(span) + chance.randrange(5 * MS))
    for begin_ns, duration_ns in spans:
        record = action(begin_ns + duration_ns, duration_ns)
        recent.add_action(record)
        left_ns, end_ns = record.exec.begin_ns, record.exec.end_ns
        while left_ns < end_ns:
            until_ns = min(end_ns, (left_ns // S + 1) * S)
            busy_ns[left_ns // S] += until_ns - left_ns
            left_ns = until_ns
    last = START_NS + 90 * S
    record = action(0, MS)
    told = recent.exec_percent(record.worker_id, record.gpu_id, last)
    exact = [busy_ns[s] * 100 / S for s in range(last // S - BUSY_SECONDS, last // S)]
    assert len(told) == BUSY_SECONDS and 20 < sum(told) / BUSY_SECONDS < 100
    assert all(abs(a - b) <= 0.5 for a, b in zip(told, exact, strict=True))
    mean, loads = recent.busy_mean(record.worker_id, record.gpu_id, last, seconds=10)
    assert mean == pytest.approx(sum(exact[-10:]) / 10) and loads == 0
    assert recent.busy_mean(99, 0, last, seconds=10) == (0.0, 0.0)
    assert recent.exec_percent(99, 0, last) == [0] * BUSY_SECONDS


def test_a_gpu_that_stands_still_is_not_busy_and_failed_actions_took_no_time() -> None:
    recent = LastMinutes()
    record = action(951 * MS, 900 * MS)
    recent.add_action(record)
    failed = action(S, 900 * MS, code=int(Code.EXEC_TOO_LATE))
    recent.add_action(msgspec.structs.replace(failed, exec=NO_SPAN))
    gpu = (record.worker_id, record.gpu_id)
    assert recent.exec_percent(*gpu, START_NS + 2 * S)[-3:] == [0, 90, 0]
    assert recent.exec_percent(*gpu, START_NS + 70 * S) == [0] * BUSY_SECONDS
    assert len(recent.actions(0, 9)) == 2
