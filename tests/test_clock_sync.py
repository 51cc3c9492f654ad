"""The offset between two clocks, from heartbeats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slosched.core.clock_sync import DRIFT_PPM, SLEW_PPM, UNKNOWN_ERROR_NS, ClockSync

DELAYS = st.integers(0, 5_000_000)


def exchange(sync: ClockSync, at: int, offset: int, there: int, back: int, held: int = 0) -> bool:
    """One heartbeat at our time `at`; our clock is `offset` ahead of the peer's."""
    received = at + there - offset
    return sync.add(
        sent_ns=at,
        received_ns=received,
        answered_ns=received + held,
        returned_ns=at + there + held + back,
    )


def test_nothing_is_known_before_the_first_exchange() -> None:
    sync = ClockSync()
    assert (sync.offset_ns, sync.error_ns, sync.synchronised) == (0, UNKNOWN_ERROR_NS, False)
    assert sync.to_local_ns(5) == 5 and sync.to_peer_ns(5) == 5


def test_a_symmetric_path_gives_the_offset_exactly() -> None:
    sync = ClockSync()
    assert exchange(sync, at=10**9, offset=-123_456, there=40_000, back=40_000, held=7_000)
    assert (sync.offset_ns, sync.error_ns) == (-123_456, 40_000)
    assert sync.to_local_ns(10**9) == 10**9 - 123_456
    assert sync.to_peer_ns(10**9) == 10**9 + 123_456
    assert sync.to_local_ns(100) == 0  # never below the beginning of time


@given(
    st.integers(-(10**12), 10**12), st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=100)
)
def test_the_error_bound_holds_for_every_path(offset: int, delays: list[tuple[int, int]]) -> None:
    sync = ClockSync()
    for i, (there, back) in enumerate(delays):
        assert exchange(sync, at=10**13 + i * 10**8, offset=offset, there=there, back=back)
    assert abs(sync.offset_ns - offset) <= sync.error_ns
    ended = 10**13 + (len(delays) - 1) * 10**8 + sum(delays[-1])
    exchanges = [  # (half the round trip, age)
        ((there + back + 1) // 2, ended - (10**13 + i * 10**8 + there + back))
        for i, (there, back) in enumerate(delays)
    ][-64:]
    half, age = min(exchanges, key=lambda e: (e[0] + e[1] * DRIFT_PPM // 1_000_000, e[1]))
    assert sync.error_ns == half + age * SLEW_PPM // 1_000_000


@given(st.floats(-SLEW_PPM, SLEW_PPM), st.lists(st.tuples(DELAYS, DELAYS), min_size=1))
def test_the_error_bound_holds_while_clocks_drift_or_are_slewed(
    ppm: float, delays: list[tuple[int, int]]
) -> None:
    sync = ClockSync()
    offset = 0
    for i, (there, back) in enumerate(delays):
        at = 10**13 + i * 2 * 10**8
        offset = round((at - 10**13) * ppm / 1e6)
        assert exchange(sync, at=at, offset=offset, there=there, back=back)
    # One for the rounding of the offset here, one for that of the mean there.
    assert abs(sync.offset_ns - offset) <= sync.error_ns + 2


def test_a_clock_that_is_set_ends_the_use_of_what_was_before() -> None:
    sync = ClockSync()
    for i in range(10):
        exchange(sync, at=10**9 * (i + 1), offset=0, there=20_000, back=20_000)
    exchange(sync, at=11 * 10**9, offset=5_000_000, there=300_000, back=300_000)
    assert (sync.offset_ns, sync.error_ns) == (5_000_000, 300_000)
    exchange(sync, at=12 * 10**9, offset=5_000_000, there=2_000_000, back=0)
    assert sync.offset_ns == 5_000_000  # one-sided queueing contradicts nothing


def test_old_exchanges_leave_the_window() -> None:
    sync = ClockSync(window=4)
    exchange(sync, at=10**9, offset=0, there=1, back=1)
    for i in range(4):
        exchange(sync, at=2 * 10**9 + i, offset=500, there=100, back=100)
    assert (sync.offset_ns, sync.error_ns) == (500, 100)


def test_impossible_exchanges_change_nothing() -> None:
    sync = ClockSync()
    assert not sync.add(sent_ns=100, received_ns=0, answered_ns=0, returned_ns=99)
    assert not sync.add(sent_ns=0, received_ns=50, answered_ns=40, returned_ns=100)
    assert not sync.add(sent_ns=0, received_ns=0, answered_ns=1_000, returned_ns=10)
    assert not sync.synchronised
