"""One window of requests on lanes that are ready: what starts when is the brain's, the waiting is done here.

Exact in time: garbage is collected only where nothing is due, the thread sleeps until shortly before the next
request and then spins, and rows are written behind a start or in idle times.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from slosched.clock import Waiter, set_timer_slack
from slosched.core.share.brain import ShareBrain, Tally
from slosched.core.share.driving import step
from slosched.core.share.interface import Lane
from slosched.daemon.housekeeping import Collector
from slosched.daemon.member.rows import RowFile
from slosched.share_spec import Begin, JobEnded, Progress, Status
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: A timer of a virtual machine wakes this late at worst (h200: 300 us at the 99th percentile).
_SPIN_NS = 500 * NS_PER_US
_SPIN_BESIDE_OTHERS_NS = 100 * NS_PER_US
#: End is seen after this time at the latest.
_SLEEP_AT_MOST_NS = 50 * NS_PER_MS
_PROGRESS_NS = NS_PER_S
#: Garbage waits for idle times for as long.
_NEVER_IDLE_NS = NS_PER_S // 2


@dataclass
class Pair:
    """A brain and the lane that it fills with requests of `jobs`."""

    jobs: tuple[int, ...]
    brain: ShareBrain
    lane: Lane
    problem: str = ""  # what the lane raised, which it should not
    unfinished: bool = False  # it was given up


class Control:
    """What the experiment says meanwhile; the thread that reads the input sets it."""

    def __init__(self) -> None:
        self.ending = False  # no more requests
        self.gone = False  # the experiment has closed the input: end


class Serving:
    """Serves the pairs of one window, those of one thread at a time.

    `tell` sends a Progress or JobEnded. What runs `finish_within_ns` after the last arrival is given up.
    """

    def __init__(
        self,
        begin: Begin,
        *,
        rows: RowFile,
        control: Control,
        now: Callable[[], int],
        tell: Callable[[Progress | JobEnded], None],
        finish_within_ns: int,
        threads: int = 1,
    ) -> None:
        self._begin, self._rows, self._control = begin, rows, control
        self._now, self._tell = now, tell
        self._finish_within_ns = finish_within_ns
        # Where threads share the interpreter, one that spins holds up the others.
        self._spin_ns = _SPIN_NS if threads == 1 else _SPIN_BESIDE_OTHERS_NS
        self._give_up_ns = begin.until_ns + finish_within_ns
        self._lock = threading.Lock()
        self._ended_by_job: dict[int, int] = {}
        self._told_ns = now()

    def serve(self, pairs: Sequence[Pair], *, collects: bool = True) -> None:
        """Serve `pairs` in this thread until all are done or given up. A lane's exception ends its own jobs."""
        set_timer_slack()
        waiter = Waiter()
        collector = Collector(self._now) if collects else None
        live = list(pairs)
        for pair in live:
            pair.brain.begin(self._begin.at_ns, self._begin.until_ns)
        ending = False
        try:
            while live:
                if self._control.gone:
                    return
                if self._control.ending and not ending:
                    ending = True
                    now = self._now()
                    self._give_up_ns = min(self._give_up_ns, now + self._finish_within_ns)
                    for pair in live:
                        pair.brain.end(now)
                worked = False
                for pair in live:
                    worked = self._step(pair) or worked
                self._tick(live, collector)
                live = [pair for pair in live if not self._is_over(pair)]
                if live and not worked:
                    self._rest(live, waiter, collector)
        finally:
            waiter.close()
            for pair in pairs:
                self._rows.take(pair.brain.rows())

    def _step(self, pair: Pair) -> bool:
        brain = pair.brain
        try:
            worked = step(brain, pair.lane, self._now)
        except (
            Exception
        ) as error:  # a lane reports errors as ends; if it raises, nothing of it can be trusted
            pair.problem = f"{type(error).__name__}: {error}"[:500]
            return False
        rows = brain.rows()
        if rows:
            self._rows.take(rows)
        return worked or bool(rows)

    def _is_over(self, pair: Pair) -> bool:
        if pair.problem or pair.brain.done:
            return True
        if self._now() < self._give_up_ns:
            return False
        pair.unfinished = True
        return True

    def _tick(self, live: Sequence[Pair], collector: Collector | None) -> None:
        """Write rows, tell of progress and collect garbage, if the last time is long enough ago."""
        self._rows.tick()
        now = self._now()
        if collector is not None and now >= collector.due_ns + _NEVER_IDLE_NS:
            # A loop that is never idle: garbage may hold the device's memory. Little is young, the rest is
            # frozen, so this takes some 0.1 ms of one request in a second.
            gc.collect()
            collector.due_ns = self._now() + _PROGRESS_NS
        if now - self._told_ns < _PROGRESS_NS:
            return
        with self._lock:
            self._told_ns = self._now()
            for pair in live:
                for job in pair.jobs:
                    self._ended_by_job[job] = pair.brain.tally(job).ended
            self._tell(Progress(ended=dict(self._ended_by_job)))

    def _rest(self, live: Sequence[Pair], waiter: Waiter, collector: Collector | None) -> None:
        """Nothing can be done now: wait for the next request, or for what runs."""
        wakeup_ns = _first(pair.brain.next_wakeup_ns() for pair in live)
        event_ns = _first(pair.lane.next_event_ns() for pair in live)
        if event_ns is not None and (
            # With several lanes none may keep the loop: the next round looks at all of them.
            len(live) > 1 or live[0].lane.pass_time(wakeup_ns) or event_ns <= self._now()
        ):
            return
        due_ns = _first((wakeup_ns, event_ns))
        now = self._now()
        if collector is not None and now >= collector.due_ns:
            collector.tidy(due_ns, unused=False)
        if due_ns is None:
            waiter.wait(None, at_most_ns=_SLEEP_AT_MOST_NS)
        elif due_ns - now > self._spin_ns:
            waiter.wait(due_ns - self._spin_ns, at_most_ns=_SLEEP_AT_MOST_NS)
        else:
            while self._now() < due_ns:
                pass


def _first(times_ns: Iterable[int | None]) -> int | None:
    return min((each for each in times_ns if each is not None), default=None)


def outcome(pair: Pair, job: int, memory: tuple[int, int], within_ns: int) -> JobEnded:
    """How `job` ended, by its tally and by what the lane raised."""
    tally = pair.brain.tally(job)
    status, reason = _status(pair, tally, within_ns)
    return JobEnded(
        job=job,
        status=status,
        reason=reason,
        memory_allocated=memory[0],
        memory_reserved=memory[1],
        left=tally.left,
    )


def _status(pair: Pair, tally: Tally, within_ns: int) -> tuple[Status, str]:
    if pair.problem:
        return Status.FAILED, pair.problem
    if tally.out_of_memory:
        return Status.OUT_OF_MEMORY, tally.reason
    if tally.failed or tally.fatal:
        return Status.FAILED, f"{tally.failed} request(s) failed, the last: {tally.reason}"
    if pair.unfinished and not tally.over:
        seconds = within_ns / NS_PER_S
        return Status.TIMED_OUT, f"what ran at the end did not end within {seconds:g} s"
    return Status.OK, ""


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage is collected by itself in this block, and what was made before is never looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
