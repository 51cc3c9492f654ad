"""What the machine did while something ran on it: how often it stalled, and which other processes used it.

A thread sleeps to every 2nd ms and notes when it wakes late; it asks for the real-time class, so that
it does not wait behind the processes that are measured. Twice a second it reads in /proc what the host
took, and what CPU time went to processes that are neither this one nor below it. It costs about 1 % of
a CPU. Linux only; elsewhere nothing is ever disturbed but by stalls.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from slosched.clock import Waiter, now_ns, set_timer_slack
from slosched.units import NS_PER_MS, NS_PER_S

TICK_NS = 2 * NS_PER_MS
#: A wake-up this late is noted; less is the ordinary cost of waking.
NOTED_NS = NS_PER_MS
SAMPLE_NS = NS_PER_S // 2


@dataclass(frozen=True)
class Bounds:
    """What a stretch of time may suffer and still count, in the units of Disturbance."""

    longest_stall_ns: int = 10 * NS_PER_MS
    stalled_share: float = 0.01
    steal_cores: float = 0.02
    foreign_cores: float = 0.15


BOUNDS = Bounds()


@dataclass(frozen=True)
class Disturbance:
    """What happened in one stretch of time. `stalled_share` is of its length; `steal_cores` (taken by the
    host) and `foreign_cores` (used by processes that are not ours) are of one CPU."""

    stalls: int
    longest_stall_ns: int
    stalled_share: float
    steal_cores: float
    foreign_cores: float

    def reasons(self, bounds: Bounds = BOUNDS) -> tuple[str, ...]:
        """In words, each bound that was passed; empty if the stretch counts."""
        reasons = []
        if self.longest_stall_ns > bounds.longest_stall_ns:
            reasons.append(
                f"the machine stood still for {self.longest_stall_ns / NS_PER_MS:.0f} ms"
            )
        if self.stalled_share > bounds.stalled_share:
            reasons.append(f"{100 * self.stalled_share:.1f} % of the time lost to stalls")
        if self.steal_cores > bounds.steal_cores:
            reasons.append(f"{100 * self.steal_cores:.0f} % of a CPU taken by the host")
        if self.foreign_cores > bounds.foreign_cores:
            reasons.append(f"{100 * self.foreign_cores:.0f} % of a CPU used by other processes")
        return tuple(reasons)


class _Sample(NamedTuple):
    """CPU times so far, ns."""

    at_ns: int
    steal_ns: int
    foreign_ns: int


class MachineWatch:
    """Notes stalls from entering the context to leaving it. `real_time`: it got that class."""

    def __init__(self) -> None:
        self.real_time = False
        self._stalls: list[tuple[int, int]] = []  # (woke at, late by)
        self._samples: list[_Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="machine watch", daemon=True)

    def __enter__(self) -> MachineWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def between(self, start_ns: int, end_ns: int) -> Disturbance:
        """What overlapped [start_ns, end_ns), which must lie within the watch."""
        overlaps = [
            (min(woke, end_ns) - max(woke - late, start_ns), late) for woke, late in self._stalls
        ]
        inside = [(overlap, late) for overlap, late in overlaps if overlap > 0]
        before = [s for s in self._samples if s.at_ns <= start_ns] or self._samples[:1]
        after = [s for s in self._samples if s.at_ns >= end_ns] or self._samples[-1:]
        steal = foreign = 0.0
        if before and after and after[0].at_ns > before[-1].at_ns:
            (t0, steal0, foreign0), (t1, steal1, foreign1) = before[-1], after[0]
            steal, foreign = (steal1 - steal0) / (t1 - t0), (foreign1 - foreign0) / (t1 - t0)
        return Disturbance(
            stalls=len(inside),
            longest_stall_ns=max((late for _, late in inside), default=0),
            stalled_share=sum(overlap for overlap, _ in inside) / max(1, end_ns - start_ns),
            steal_cores=steal,
            foreign_cores=foreign,
        )

    def _tick(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # of this thread alone
            self.real_time = True
        set_timer_slack()
        waiter = Waiter()
        due_ns = sample_ns = now_ns()
        while not self._stop.is_set():
            due_ns += TICK_NS
            waiter.wait(due_ns, at_most_ns=NS_PER_S)
            woke_ns = now_ns()
            if woke_ns - due_ns > NOTED_NS:
                self._stalls.append((woke_ns, woke_ns - due_ns))
                due_ns = woke_ns
            if woke_ns >= sample_ns:
                sample_ns = woke_ns + SAMPLE_NS
                self._samples.append(_sample(woke_ns))
        waiter.close()


def _sample(at_ns: int) -> _Sample:
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
        user, nice, system, steal = (int(fields[place]) for place in (1, 2, 3, 8))
        # Time in interrupts belongs to no process; kernel threads mostly work for the process that loads them.
        foreign = user + nice + system - _ours(os.getpid())
    except (OSError, ValueError, IndexError):
        return _Sample(at_ns, 0, 0)
    tick_ns = NS_PER_S // os.sysconf("SC_CLK_TCK")
    return _Sample(at_ns, steal * tick_ns, foreign * tick_ns)


def _ours(pid: int) -> int:
    """CPU time of a process and all below it, also of those that ended, in clock ticks."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        # user, system, and both of the children that were waited for
        ticks = sum(int(field) for field in text.rpartition(")")[2].split()[11:15])
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    except OSError:  # it ended meanwhile: its parent has its time
        return 0
    return ticks + sum(_ours(child) for child in children)
