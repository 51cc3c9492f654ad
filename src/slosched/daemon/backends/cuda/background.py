"""One thread for everything slow, which runs only in the slices that the loop gives it.

Beside a second busy Python thread the loop's starts were late by 60 ms at the 99th percentile (H200),
and models are built by foreign Python code, which cannot be cut into pieces by hand. So the thread runs
under a profile hook, which Python calls at every call and return: once its slice is over the hook stops
it there, holding nothing but its own stack, until the loop gives it the next one. Whatever is built,
captured or measured is cut up that way; starts beside it were late by 0.5 us (p50) and 9 us (p99).

What a slice cannot cut is one long call into C. Those that matter (torch's operators, pinning,
allocation, NVML) let the interpreter go, so the loop runs on beside them: it waits for the thread no
longer than the slice and a little, and takes the thread's return for the end of a later slice.

The loop must never need a Python lock that the thread may hold when it is stopped. It needs none: what it
imports it has imported before, and jobs hand over their results through plain attributes.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Protocol

from slosched.clock import Clock, now_ns
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: How long a slice is at most, and the least that is worth handing over.
SLICE_NS = 200 * NS_PER_US
LEAST_NS = 60 * NS_PER_US
#: Stopping takes a hand-over between two threads (30 to 150 us, H200).
HANDOVER_NS = 150 * NS_PER_US

Job = Callable[[], None]


class Yielding(Protocol):
    """What jobs of a preparation call: where they may stop, and what they wait for. See Background."""

    def pause(self) -> None: ...

    def uncut(self) -> AbstractContextManager[None]: ...

    def until_idle(self, for_ns: int) -> None: ...


class AtOnce:
    """For a preparation beside which nothing is served: it stops nowhere, and waits for nothing."""

    def pause(self) -> None:
        pass

    def uncut(self) -> AbstractContextManager[None]:
        return nullcontext()

    def until_idle(self, for_ns: int) -> None:
        pass


class Background:
    """Runs jobs one after another; `enter` is called first in the thread. `close` ends it."""

    def __init__(
        self,
        *,
        enter: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda line: None,
        clock: Clock = now_ns,
    ) -> None:
        self._enter, self._report, self._clock = enter, report, clock
        self._jobs: deque[Job] = deque()
        # Two locks as signals: each is released by one side exactly once before the other takes it
        # again. They are single calls into C, so an exception cannot interrupt our Python code inside one.
        self._go, self._stopped = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._stopped.acquire()
        self._over_ns = 0  # when the present slice ends
        self._out = False  # a slice was given and its end not yet seen
        self._busy = False
        self._needs_idle_ns = 0
        self._uncut = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="slosched-background", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------- the loop's side

    def submit(self, job: Job) -> None:
        """Queue a job. What it raises is reported and forgotten."""
        self._jobs.append(job)

    @property
    def pending(self) -> bool:
        """True if there is something to give a slice to, or to wait for."""
        return self._busy or bool(self._jobs)

    @property
    def needs_idle_ns(self) -> int:
        """For how long the job has asked for a device that does nothing else (`until_idle`); 0: it has not."""
        return self._needs_idle_ns

    def slice(self, at_most_ns: int) -> None:
        """Let the thread work for about `at_most_ns`; returns when it has stopped, or soon after."""
        if not self._out:
            self._over_ns = self._clock() + at_most_ns
            self._out = True
            self._go.release()
            patience_ns = at_most_ns + HANDOVER_NS
        else:  # it was in a long call: is it back?
            patience_ns = LEAST_NS
        if self._stopped.acquire(timeout=patience_ns / NS_PER_S):
            self._out = False

    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread once its present job is over, or leave it stopped for ever; idempotent."""
        self._closing = True
        self._jobs.clear()
        give_up_ns = self._clock() + round(timeout_s * NS_PER_S)
        while self._thread.is_alive() and self._clock() < give_up_ns:
            self.slice(50 * SLICE_NS)

    # -------------------------------------------------------------------- the thread's side

    def pause(self) -> None:
        """Called by a job that waits for something: give the rest of the slice back."""
        self._stop()

    @contextmanager
    def uncut(self) -> Iterator[None]:
        """Within it the slice does not end: for what is timed, and takes less than 100 us."""
        uncut, self._uncut = self._uncut, True
        try:
            yield
        finally:
            self._uncut = uncut

    def until_idle(self, for_ns: int, patience_ns: int = 50 * NS_PER_MS) -> None:
        """Called by a job: go on when the loop says that the device will be idle for `for_ns`.

        After `patience_ns` it goes on in any case: a worker under full load must be able to prepare.
        """
        self._needs_idle_ns = max(1, for_ns)
        give_up_ns = self._clock() + patience_ns
        while self._needs_idle_ns and self._clock() < give_up_ns and not self._closing:
            self._stop()
        self._needs_idle_ns = 0

    def is_idle(self) -> None:
        """The loop's answer to `needs_idle_ns`: it is, for the next slice."""
        self._needs_idle_ns = 0

    def _stop(self) -> None:
        uncut, self._uncut = self._uncut, True  # the hook must not stop us while we stop
        self._stopped.release()
        self._go.acquire()
        self._uncut = uncut

    def _hook(self, frame: FrameType, event: str, argument: object) -> None:
        if not self._uncut and self._clock() > self._over_ns:
            self._stop()

    def _run(self) -> None:
        self._go.acquire()
        self._enter()
        while not self._closing:
            if not self._jobs:
                self._busy = False
                self._stop()
                continue
            job = self._jobs.popleft()
            self._busy = True
            sys.setprofile(self._hook)
            try:
                job()
            except Exception:
                self._report(f"a background job failed: {traceback.format_exc()}")
            finally:
                sys.setprofile(None)
        self._busy = False
        self._stopped.release()
