"""What the machine did while something ran on it: how often it stood still, what its host took.

A thread sleeps to every 2nd ms and notes when it wakes late; it asks for the real-time class, so that
it does not wait behind the processes that are measured. It costs about 1 % of a CPU.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from slosched.clock import now_ns, set_timer_slack
from slosched.units import NS_PER_MS, NS_PER_S

_TICK_NS = 2 * NS_PER_MS
#: A wake-up this late is noted; less is the ordinary cost of waking.
_NOTED_NS = NS_PER_MS
_SAMPLE_NS = NS_PER_S // 2

#: What a stretch of time may suffer and still count.
LONGEST_STALL_NS = 10 * NS_PER_MS
STALLED_SHARE = 0.01
STEAL_CORES = 0.02


@dataclass(frozen=True)
class Disturbance:
    """What happened in one stretch of time. `stalled_share` is of its length, `steal_cores` of one CPU
    (taken by the host)."""

    stalls: int
    longest_stall_ns: int
    stalled_share: float
    steal_cores: float

    def reasons(self) -> tuple[str, ...]:
        """In words, each bound that was passed; empty if the stretch counts."""
        reasons = []
        if self.longest_stall_ns > LONGEST_STALL_NS:
            reasons.append(
                f"the machine stood still for {self.longest_stall_ns / NS_PER_MS:.0f} ms"
            )
        if self.stalled_share > STALLED_SHARE:
            reasons.append(f"{100 * self.stalled_share:.1f} % of the time lost to stalls")
        if self.steal_cores > STEAL_CORES:
            reasons.append(f"{100 * self.steal_cores:.0f} % of a CPU taken by the host")
        return tuple(reasons)


class MachineWatch:
    """Notes stalls from entering the context to leaving it. `real_time`: it got that class."""

    def __init__(self) -> None:
        self.real_time = False
        self._stalls: list[tuple[int, int]] = []  # (woke at, late by)
        self._steal: list[tuple[int, int]] = []  # (at, cumulative ns)
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
        before = [sample for sample in self._steal if sample[0] <= start_ns] or self._steal[:1]
        after = [sample for sample in self._steal if sample[0] >= end_ns] or self._steal[-1:]
        steal = 0.0
        if before and after and after[0][0] > before[-1][0]:
            steal = (after[0][1] - before[-1][1]) / (after[0][0] - before[-1][0])
        return Disturbance(
            stalls=len(inside),
            longest_stall_ns=max((late for _, late in inside), default=0),
            stalled_share=sum(overlap for overlap, _ in inside) / max(1, end_ns - start_ns),
            steal_cores=steal,
        )

    def _tick(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # of this thread alone
            self.real_time = True
        set_timer_slack()
        due_ns = sample_ns = now_ns()
        while not self._stop.is_set():
            due_ns += _TICK_NS
            time.sleep(max(0, due_ns - now_ns()) / NS_PER_S)
            woke_ns = now_ns()
            if woke_ns - due_ns > _NOTED_NS:
                self._stalls.append((woke_ns, woke_ns - due_ns))
                due_ns = woke_ns
            if woke_ns >= sample_ns:
                sample_ns = woke_ns + _SAMPLE_NS
                self._steal.append((woke_ns, _steal_ns()))


def _steal_ns() -> int:
    """CPU time that the host took from this machine so far; 0 where nobody says."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
        return int(fields[8]) * NS_PER_S // os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0
