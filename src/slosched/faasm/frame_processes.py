"""The processes below one, from /proc (Linux): which there are, and what the kernel counts for each.

Elsewhere than on Linux nothing is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slosched.errors import SloschedError
from slosched.units import NS_PER_S

_PROC = Path("/proc")
_TICK_NS = NS_PER_S // os.sysconf("SC_CLK_TCK")
#: Places behind the name in /proc/PID/stat, whose first is the state.
_STATE, _PARENT, _USER, _SYSTEM, _REAPED_USER, _REAPED_SYSTEM, _START = 0, 1, 11, 12, 13, 14, 19
_MOST_NAME = 120


@dataclass(frozen=True)
class Process:
    """One process as it was when it was read. `start` and `pid` together are never used again.

    `cpu_ns` is its own CPU time, `reaped_cpu_ns` that of its children that ended and were waited for.
    """

    pid: int
    parent: int
    start: int
    state: str
    name: str
    cpu_ns: int
    reaped_cpu_ns: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.start

    @property
    def ended(self) -> bool:
        """Whether it has ended, and its parent has not looked yet."""
        return self.state in "ZX"


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: `pss_bytes` counts each shared page in parts, `rss_bytes` as a whole."""

    pss_bytes: int
    rss_bytes: int


def read_process(pid: int) -> Process | None:
    """The process `pid`; None if there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
        head, _, rest = text.rpartition(")")
        words = rest.split()
        return Process(
            pid=pid,
            parent=int(words[_PARENT]),
            start=int(words[_START]),
            state=words[_STATE],
            name=head.partition("(")[2],
            cpu_ns=(int(words[_USER]) + int(words[_SYSTEM])) * _TICK_NS,
            reaped_cpu_ns=(int(words[_REAPED_USER]) + int(words[_REAPED_SYSTEM])) * _TICK_NS,
        )
    except (OSError, ValueError, IndexError):
        return None


def below(roots: Iterable[int]) -> list[Process]:
    """All processes below `roots`, without these, by one look at /proc."""
    children: dict[int, list[Process]] = {}
    with suppress(OSError):
        for entry in os.listdir(_PROC):  # noqa: PTH208 - names alone, ten times a second
            if entry.isdecimal() and (process := read_process(int(entry))) is not None:
                children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    waiting, seen = [*roots], set(roots)
    while waiting:
        for process in children.get(waiting.pop(), ()):
            if process.pid not in seen:
                seen.add(process.pid)
                found.append(process)
                waiting.append(process.pid)
    return sorted(found, key=lambda each: each.identity)


class Tree:
    """The processes below some, looked at again and again: only new ones are searched for.

    A process stays in the tree when its parent ends, also where `below` would not find it any more.
    """

    def __init__(self) -> None:
        self._roots: frozenset[int] = frozenset()
        self._inside: dict[int, int] = {}  # pid -> start
        self._outside: set[int] = set()

    def look(self, roots: Iterable[int]) -> list[Process]:
        """All processes below `roots` now, without these."""
        wanted = frozenset(roots)
        if not wanted <= self._roots:
            self._outside.clear()  # what was outside may be below the new ones
        self._roots = wanted
        try:
            listed = {int(entry) for entry in os.listdir(_PROC) if entry.isdecimal()}  # noqa: PTH208
        except OSError:
            return []
        self._outside &= listed
        found = []
        for pid, start in [*self._inside.items()]:
            process = read_process(pid) if pid in listed else None
            if process is None or process.start != start:
                del self._inside[pid]
            else:
                found.append(process)
        new = [read_process(pid) for pid in sorted(listed - self._outside - self._inside.keys())]
        return sorted([*found, *self._added(new)], key=lambda each: each.identity)

    def _added(self, new: Iterable[Process | None]) -> list[Process]:
        """Those of the new processes that belong to the tree, which they join."""
        added: list[Process] = []
        waiting = [process for process in new if process and process.pid not in self._roots]
        while True:
            joins = [p for p in waiting if p.parent in self._roots or p.parent in self._inside]
            if not joins:
                self._outside.update(process.pid for process in waiting)
                return added
            added += joins
            self._inside.update((process.pid, process.start) for process in joins)
            waiting = [process for process in waiting if process.pid not in self._inside]


def memory_of(pid: int) -> Memory | None:
    """What the process holds now; None if it has ended, or may not be looked at.

    Where the kernel has no smaps_rollup, PSS is the RSS, which counts shared pages too often.
    """
    place = _PROC / str(pid)
    try:
        lines = (place / "smaps_rollup").read_text().splitlines()
        sizes = {line.split(":")[0]: line.split() for line in lines[1:]}
        return Memory(int(sizes["Pss"][1]) * 1024, int(sizes["Rss"][1]) * 1024)
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        pages = int((place / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    size = pages * os.sysconf("SC_PAGE_SIZE")
    return Memory(size, size)


def available_bytes() -> int:
    """What the host has for more instances. Raises SloschedError where /proc does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise SloschedError("/proc/meminfo does not say how much memory is available")


def command_of(process: Process) -> str:
    """Its command line in at most 120 characters, or its name where that is empty."""
    try:
        raw = (_PROC / str(process.pid) / "cmdline").read_bytes()
    except OSError:
        raw = b""
    text = " ".join(raw.decode(errors="replace").replace("\0", " ").split())
    return (text or process.name)[:_MOST_NAME]
