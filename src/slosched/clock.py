"""The only room that reads a clock, and the timers that wake a loop to the microsecond.

`now_ns()` is a monotonic clock anchored once to wall time, so differences are exact and values can
be compared with the date (Clockwork's `util::now()` does the same). Daemons take a `Clock` so that
tests can hand them another.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_PR_SET_TIMERSLACK = 29


def _anchor() -> int:
    """Wall time minus monotonic time, from the tightest of several readings.

    A process that loses its core between the two clocks would be off by as long; the reading with
    the shortest way round did not.
    """
    best_ns, anchor_ns = 2**63, 0
    for _ in range(16):
        before_ns = time.monotonic_ns()
        wall_ns = time.time_ns()
        after_ns = time.monotonic_ns()
        if after_ns - before_ns < best_ns:
            best_ns = after_ns - before_ns
            anchor_ns = wall_ns - (before_ns + after_ns) // 2
    return anchor_ns


_anchor_ns = _anchor()

Clock = Callable[[], int]


def now_ns() -> int:
    """Nanoseconds since the epoch; never goes back while the process lives."""
    return time.monotonic_ns() + _anchor_ns


def thread_cpu_ns() -> int:
    """CPU time that this thread has used. A call takes half a microsecond."""
    return time.thread_time_ns()


def sleep_ns(duration_ns: int) -> None:
    """Sleep, in a wait for something that makes no descriptor readable."""
    time.sleep(duration_ns / 1e9)


def anchor_ns() -> int:
    """What turns the kernel's monotonic clock, which all processes share, into `now_ns`."""
    return _anchor_ns


def monotonic_ns() -> int:
    """The kernel's monotonic clock, which all processes of a host share."""
    return time.monotonic_ns()


def take_anchor(anchor: int) -> None:
    """Read the clock from now on as the process does whose `anchor_ns` this is: for a child process."""
    global _anchor_ns
    _anchor_ns = anchor


def set_timer_slack(slack_ns: int = 1_000) -> None:
    """Ask the kernel to wake this thread within `slack_ns` of a timer (default 50 us). Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, slack_ns, 0, 0, 0)


class Timer:
    """A timerfd: `fileno()` becomes readable at the time it was armed for.

    Python 3.11 and 3.12 have no os.timerfd_create, so libc is called through ctypes. Raises OSError
    where the kernel has no timerfd (other than Linux).
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_FLAGS)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._fd: int = fd
        self._spec = ctypes.create_string_buffer(32)
        self.armed_for_ns: int | None = None

    def fileno(self) -> int:
        return self._fd

    def arm(self, at_ns: int | None) -> None:
        """Wake at `at_ns` (on `now_ns`'s scale); a time that has passed wakes at once; None disarms."""
        if at_ns == self.armed_for_ns:
            return
        self.armed_for_ns = at_ns
        if at_ns is None:
            seconds = nanoseconds = 0
        else:
            # An all-zero value would disarm, so the least time is 1 ns.
            seconds, nanoseconds = divmod(max(at_ns - _anchor_ns, 1), 1_000_000_000)
        struct.pack_into("qqqq", self._spec, 0, 0, 0, seconds, nanoseconds)
        if self._libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, self._spec, None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def clear(self) -> None:
        """Take the expiry off the file descriptor, so that a level-triggered loop rests."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self.armed_for_ns = None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Waiter:
    """Sleeps until a file descriptor is readable or a time has come, for a plain synchronous loop."""

    def __init__(self, *fds: int) -> None:
        self._timer = Timer()
        self._poll = select.epoll()
        for fd in (*fds, self._timer.fileno()):
            self._poll.register(fd, select.EPOLLIN)

    def wait(self, until_ns: int | None, *, at_most_ns: int) -> None:
        """Return at `until_ns`, when a descriptor is readable, or after `at_most_ns`, whichever is first."""
        limit_ns = now_ns() + at_most_ns
        wake_ns = limit_ns if until_ns is None else min(until_ns, limit_ns)
        self._timer.arm(wake_ns)
        try:
            self._poll.poll(at_most_ns / 1e9 + 1.0)
        except InterruptedError:  # a signal: the caller looks at its flags
            return
        self._timer.clear()

    def close(self) -> None:
        self._poll.close()
        self._timer.close()
