"""When a worker's process is started again, and which model ended it.

A model is to blame when its code was at work: one that runs in the worker's process (a plain launch) before
one whose kernels ran on the device, and that only for an end that a device's fault brings about, before one
that was being prepared. With none at work no model is blamed. A model that was to blame twice is *put aside*:
workers started from then on do not offer it.

A signal that an operator sends says nothing about a model: SIGTERM, SIGINT and SIGHUP blame none, and
SIGKILL only if the kernel counted a kill for want of memory during that life.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from slosched.config import MOST_PUT_ASIDE
from slosched.daemon.blackbox import ENDED, READY, AtWork
from slosched.errors import AddressInUse, DeviceLost, InvalidConfig, MissingPackage
from slosched.units import NS_PER_S

#: A model that ended its worker so often is put aside.
ENDS_ALLOWED = 2
_OPERATORS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
#: A new process would say the same, if no earlier one was ever ready.
_UNMENDABLE = (InvalidConfig.exit_code, MissingPackage.exit_code, AddressInUse.exit_code)
#: An end that a fault of the device brings about: we exit with 9, C++ that meets it first aborts.
_DEVICE_FAULTS = (DeviceLost.exit_code, -signal.SIGABRT)


@dataclass(frozen=True, slots=True)
class RestartRule:
    """When a child that ended by itself is started again: at once, then after pauses that double, and at
    most `at_most` times within `within_ns`. Ends that a model is to blame for do not count: they are bounded
    by putting it aside.
    """

    first_pause_ns: int = NS_PER_S
    longest_pause_ns: int = 15 * NS_PER_S
    at_most: int = 8
    within_ns: int = 600 * NS_PER_S

    def pause_ns(self, restarts: list[int], now_ns: int) -> int | None:
        """How long to wait now, None: no more. `restarts` are the times of earlier ones, and gets this."""
        restarts[:] = [at_ns for at_ns in restarts if now_ns - at_ns < self.within_ns]
        earlier = len(restarts)
        if earlier >= self.at_most:
            return None
        restarts.append(now_ns)
        if not earlier:
            return 0
        return min(self.first_pause_ns << (earlier - 1), self.longest_pause_ns)


def was_told_to_end(code: int, work: AtWork) -> bool:
    """True if this child was asked to end, and did: it is not started again."""
    return code in _OPERATORS or work.state == ENDED


def can_be_mended(code: int, work: AtWork, *, ever_ready: bool) -> bool:
    """False for an end that a new process would only repeat, such as wrong options."""
    return code not in _UNMENDABLE or ever_ready or work.state == READY


def culprit(code: int, work: AtWork, *, out_of_memory: bool) -> str:
    """The name of the model that ended a process so; "": none is to blame.

    `code` is the exit code, or the negative signal. `out_of_memory`: the kernel killed for want of
    memory while the process lived.
    """
    if was_told_to_end(code, work) or (code == -signal.SIGKILL and not out_of_memory):
        return ""
    if work.launching:
        return work.launching
    if code in _DEVICE_FAULTS and work.running:
        return work.running
    return work.preparing


def how_it_ended(code: int) -> str:
    """For people: "exit code 9", "signal 11 (Segmentation fault)"."""
    return f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"


def out_of_memory_kills() -> int:
    """How many processes the kernel killed for want of memory: of our cgroup, else of the host; -1: it
    does not say.
    """
    counters = [(Path("/proc/vmstat"), "oom_kill")]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):  # cgroup v2
                group = Path("/sys/fs/cgroup") / line[4:]
                counters.insert(0, (group / "memory.events", "oom_kill"))
    for path, name in counters:
        with suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                key, _, count = line.partition(" ")
                if key == name:
                    return int(count)
    return -1


@dataclass(slots=True)
class Blame:
    """Which models ended workers of one supervisor, and how; bounded by the models that are offered."""

    _ends: dict[str, list[str]] = field(default_factory=dict)

    def note(self, name: str, code: int) -> bool:
        """`name` ended a process. False if it can only be counted, not put aside: too many are."""
        ends = self._ends.setdefault(name, [])
        if len(ends) < ENDS_ALLOWED and len(self.put_aside()) >= MOST_PUT_ASIDE:
            return False
        ends.append(how_it_ended(code))
        return True

    def count(self, name: str) -> int:
        return len(self._ends.get(name, ()))

    def put_aside(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of each model that a new worker must not offer, in the order of the first end."""
        return tuple(
            (
                name,
                f"it ended its worker {len(ends)} times ({', '.join(dict.fromkeys(ends))}); fix it and "
                "restart the worker",
            )
            for name, ends in self._ends.items()
            if len(ends) >= ENDS_ALLOWED
        )
