"""GPUs in the order of the time at which their exec is predicted to be free. A change costs O(log n)."""

from __future__ import annotations

from bisect import bisect_left, insort

from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.state import Gpu


class GpusByFreeTime:
    """`gpus` are those in use, by index; `entries` follow the change feed."""

    __slots__ = ("_changed", "_entries", "_gpus", "_listed_ns")

    def __init__(self, gpus: dict[int, Gpu], changes: Changes) -> None:
        self._gpus = gpus
        self._changed = changes.follow_execs()
        self._entries: list[tuple[int, int, Gpu]] = []
        self._listed_ns: dict[int, int] = {}  # by GPU index: the time under which it stands

    @property
    def entries(self) -> list[tuple[int, int, Gpu]]:
        """(predicted end of all that was sent, index, GPU), ascending; read only."""
        if self._changed:
            for gpu in self._changed.values():
                self._place(gpu)
            self._changed.clear()
        return self._entries

    def _place(self, gpu: Gpu) -> None:
        index, entries = gpu.index, self._entries
        used, busy_ns = index in self._gpus, gpu.exec.busy_until_ns
        listed_ns = self._listed_ns.get(index)
        if listed_ns is not None:
            if used and listed_ns == busy_ns:
                return
            del self._listed_ns[index]
            del entries[bisect_left(entries, (listed_ns, index))]
        if used:
            self._listed_ns[index] = busy_ns
            insort(entries, (busy_ns, index, gpu))
