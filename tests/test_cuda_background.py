"""The background thread: it runs in its slices and at no other time, and what it does gets done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from slosched.clock import now_ns
from slosched.daemon.backends.cuda.background import Background
from slosched.units import NS_PER_MS, NS_PER_S


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


def work(background: Background, until: Callable[[], bool], slice_ns: int = NS_PER_MS) -> int:
    """Give slices until `until()`; how many it took."""
    give_up_ns = now_ns() + 20 * NS_PER_S
    slices = 0
    while not until():
        background.slice(slice_ns)
        slices += 1
        assert now_ns() < give_up_ns
    return slices


def count_to(n: int, seen: list[int]) -> None:
    def step(i: int) -> None:
        seen.append(i)

    for i in range(n):
        step(i)


def test_it_works_in_its_slices_alone(background: Background) -> None:
    seen: list[int] = []
    background.submit(lambda: count_to(400_000, seen))
    assert background.pending
    for _ in range(5):
        background.slice(NS_PER_MS)
        there = len(seen)
        time.sleep(0.01)
        # A machine that holds the thread up lets it reach its next call, where it stops, after its slice.
        assert len(seen) <= there + 1, "it ran outside of its slice"
    assert 0 < len(seen) < 400_000
    assert work(background, lambda: not background.pending) > 3
    assert seen == list(range(400_000))


def test_jobs_come_in_order_and_one_that_raises_does_not_end_the_thread() -> None:
    lines: list[str] = []
    background = Background(report=lines.append)
    done: list[int] = []

    def fails() -> None:
        raise ValueError("no such model")

    background.submit(lambda: done.append(1))
    background.submit(fails)
    background.submit(lambda: done.append(2))
    work(background, lambda: not background.pending)
    assert done == [1, 2] and len(lines) == 1 and "no such model" in lines[0]
    background.close()


def test_the_loop_does_not_wait_for_a_long_call_and_takes_the_thread_back_after_it(
    background: Background,
) -> None:
    seen: list[int] = []
    entered, returned = threading.Event(), threading.Lock()
    returned.acquire()

    def job() -> None:
        entered.set()
        returned.acquire()  # one call that lets the interpreter go, as torch's operators do
        count_to(50_000, seen)

    background.submit(job)
    while not entered.is_set():
        background.slice(NS_PER_MS)
    background.slice(NS_PER_MS)  # it returns, although the call does not
    assert background.pending and not seen
    time.sleep(0.01)  # the slice is over
    returned.release()
    time.sleep(0.05)  # it finds its slice over, and stops
    assert len(seen) < 50
    work(background, lambda: not background.pending)
    assert len(seen) == 50_000


def test_what_is_timed_is_not_cut(background: Background) -> None:
    gaps: list[int] = []

    def job() -> None:
        for _ in range(8):
            with background.uncut():
                begin_ns = now_ns()
                count_to(2_000, [])
                gaps.append(now_ns() - begin_ns)
            count_to(50, [])

    background.submit(job)
    while background.pending:
        background.slice(NS_PER_MS)
        time.sleep(0.02)  # what is cut takes at least this much more time
    assert len(gaps) == 8 and sorted(gaps)[4] < 20 * NS_PER_MS


def test_a_job_that_wants_an_idle_device_waits_for_the_word_or_its_patience(
    background: Background,
) -> None:
    done: list[str] = []

    def job() -> None:
        background.until_idle(3 * NS_PER_MS, patience_ns=10 * NS_PER_S)
        done.append("told")
        background.until_idle(NS_PER_MS, patience_ns=20 * NS_PER_MS)
        done.append("impatient")

    background.submit(job)
    for _ in range(20):
        background.slice(NS_PER_MS)
    assert not done and background.needs_idle_ns == 3 * NS_PER_MS
    background.is_idle()
    background.slice(NS_PER_MS)
    assert done == ["told"]
    begin_ns = now_ns()
    work(background, lambda: len(done) == 2)
    assert now_ns() - begin_ns >= 15 * NS_PER_MS and background.needs_idle_ns == 0


def test_pausing_gives_the_rest_of_a_slice_back(background: Background) -> None:
    pauses = 0

    def job() -> None:
        nonlocal pauses
        for _ in range(10):
            pauses += 1
            background.pause()

    background.submit(job)
    begin_ns = now_ns()
    assert work(background, lambda: not background.pending, NS_PER_S) >= 10
    assert pauses == 10 and now_ns() - begin_ns < 5 * NS_PER_S  # and not ten slices


def test_closing_ends_the_thread_even_in_the_middle_of_a_job() -> None:
    entered: list[str] = []
    background = Background(enter=lambda: entered.append(threading.current_thread().name))
    background.submit(lambda: background.until_idle(1, patience_ns=600 * NS_PER_S))
    background.slice(NS_PER_MS)
    assert entered == ["slosched-background"]
    background.close(5.0)
    assert not background._thread.is_alive()
    background.close()


def test_a_job_may_pause_after_its_slice_is_over(background: Background) -> None:
    """Its own stop is Python too, and must not be stopped by the hook."""
    rounds = 0

    def job() -> None:
        nonlocal rounds
        for _ in range(200):
            time.sleep(0.0003)  # the slice is over when it comes back
            background.pause()
            rounds += 1

    background.submit(job)
    work(background, lambda: not background.pending, slice_ns=100_000)
    assert rounds == 200
