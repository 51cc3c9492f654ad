"""What a worker's process does for itself: the core that its loop stays on, and when garbage is collected.

A collection in front of a due start makes it late. So automatic ones are off (`gc = "idle"`), and the loop
offers the collector the times at which nothing is due. Only a process that is a worker's own may be
treated so: run_worker does it, a WorkerServer in an application's process does not.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from slosched.clock import Clock, now_ns
from slosched.config import WorkerConfig
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S

#: Nothing may be due for this time, nor for twice the time of the last collection.
_FREE_NS = 5 * NS_PER_MS
_EVERY_NS = NS_PER_S
_LOOK_AGAIN_NS = NS_PER_MS
#: Number of new objects at which a collection does not wait: a loop that is never idle must not grow for ever.
_OBJECTS_AT_MOST = 200_000
#: After this time without models the worker is idle, and may take its time.
_LONG_IDLE_NS = 10 * NS_PER_S
#: Memory grew: by a quarter, and by at least this. It is looked at this often.
_GROWTH_BYTES = 512 * 2**20
_MEMORY_EVERY_NS = 10 * NS_PER_S


def usable_cores() -> tuple[int, ...]:
    """The cores that this thread may run on, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def check_core(cpu: int) -> None:
    """Raises InvalidConfig if this process may not run on the core `cpu`; -1 stands for any."""
    cores = usable_cores()
    if cpu != -1 and cpu not in cores:
        raise InvalidConfig(
            f"cpu {cpu} is not a core that this process may use; it may use {_ranges(cores)}"
        )


class Collector:
    """Collects garbage when the loop has time. Times in ns; `rss_bytes` reads the process's memory.

    `due_ns` is when the loop should call `tidy` next, if it comes round then.
    """

    def __init__(
        self,
        clock: Clock = now_ns,
        *,
        collect: Callable[[int], object] = gc.collect,
        collect_all: Callable[[bool], object] | None = None,
        young_objects: Callable[[], int] = lambda: gc.get_count()[0],
        rss_bytes: Callable[[], int] | None = None,
    ) -> None:
        self._clock = clock
        self._collect = collect
        self._collect_all = collect_all or _collect_all
        self._young_objects = young_objects
        self._rss_bytes = rss_bytes or _rss_bytes
        self.due_ns = clock() + _EVERY_NS
        self._took_ns = 0  # by the last collection of each kind
        self._full_took_ns = 0
        self._unused_since_ns: int | None = None
        self._idle_tidied = False
        self._memory_due_ns = 0
        self._known_bytes = self._rss_bytes()  # after the last full collection

    def tidy(self, next_ns: int | None, *, unused: bool) -> None:
        """Collect if there is time until `next_ns` (None: nothing is due). `unused`: no model is here."""
        now = self._clock()
        free_ns = _LONG_IDLE_NS if next_ns is None else next_ns - now
        if not unused:
            self._unused_since_ns, self._idle_tidied = None, False
        elif self._unused_since_ns is None:
            self._unused_since_ns = now
        if free_ns >= max(_FREE_NS, 2 * self._took_ns):
            if not self._full(now, free_ns):
                self._took_ns = self._timed(self._collect, 1)
            self.due_ns = self._clock() + _EVERY_NS
        elif self._young_objects() > _OBJECTS_AT_MOST:
            self._took_ns = self._timed(self._collect, 1)
            self.due_ns = self._clock() + _EVERY_NS
        else:
            self.due_ns = now + _LOOK_AGAIN_NS

    def _full(self, now: int, free_ns: int) -> bool:
        """Collect everything, once the worker was idle for long or its memory grew. False: neither."""
        since_ns = self._unused_since_ns
        idle = since_ns is not None and now - since_ns >= _LONG_IDLE_NS and not self._idle_tidied
        if not idle:
            if now < self._memory_due_ns or free_ns < 2 * self._full_took_ns:
                return False
            self._memory_due_ns = now + _MEMORY_EVERY_NS
            grown_bytes = self._rss_bytes() - self._known_bytes
            if grown_bytes < max(_GROWTH_BYTES, self._known_bytes // 4):
                return False
        took_ns = self._timed(self._collect_all, idle)
        if idle:
            self._idle_tidied = True
        else:
            self._full_took_ns = took_ns
        self._known_bytes = self._rss_bytes()
        return True

    def _timed(self, collect: Callable[[Any], object], what: int) -> int:
        begin_ns = self._clock()
        collect(what)
        return self._clock() - begin_ns


@contextmanager
def own_process(config: WorkerConfig) -> Iterator[Collector | None]:
    """This process is the worker's: pin the calling thread and set up the collector, until the end.

    Yields what the loop is to call, None unless `config.gc` is "idle". Threads that exist stay where they
    are. Raises InvalidConfig if there is no core `config.cpu`.
    """
    check_core(config.cpu)
    cores = usable_cores()
    enabled, threshold = gc.isenabled(), gc.get_threshold()
    # A later collection of everything that start-up made would hold the loop for milliseconds.
    gc.collect()
    gc.freeze()
    if config.gc == "auto":
        gc.set_threshold(50_000, 20, 100)
    else:
        gc.disable()
    if config.cpu >= 0:
        os.sched_setaffinity(0, {config.cpu})
    try:
        yield Collector() if config.gc == "idle" else None
    finally:
        if config.cpu >= 0:
            os.sched_setaffinity(0, cores)
        gc.set_threshold(*threshold)
        if enabled:
            gc.enable()
        gc.unfreeze()


def _collect_all(thaw: bool) -> None:
    """Collect every generation and put aside what is left, so that the next time need not walk it.

    `thaw`: first take back what was put aside earlier, which may have become garbage.
    """
    if thaw:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def _rss_bytes() -> int:
    """Memory of this process that is in RAM; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def _ranges(cores: tuple[int, ...]) -> str:
    """0-3, 8: numbers in order, as people write them."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1][1:] = [core]
        else:
            parts.append([core])
    return ", ".join("-".join(str(end) for end in part) for part in parts)
