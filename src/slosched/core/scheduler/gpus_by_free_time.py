"""GPUs in the order of the time at which their exec is predicted to be free. A change costs O(log n)."""

from __future__ import annotations

from bisect import bisect_left, insort

from slosched.core.scheduler.state import Gpu


class GpusByFreeTime:
    """`entries`: (predicted end of all that was sent, index, GPU), ascending; read only."""

    __slots__ = ("_listed_ns", "entries")

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, Gpu]] = []
        self._listed_ns: dict[int, int] = {}  # by GPU index: the time under which it stands

    def add(self, gpu: Gpu) -> None:
        self._listed_ns[gpu.index] = gpu.exec.busy_until_ns
        insort(self.entries, (gpu.exec.busy_until_ns, gpu.index, gpu))

    def remove(self, gpu: Gpu) -> None:
        """Take `gpu` out, if it is in."""
        listed_ns = self._listed_ns.pop(gpu.index, None)
        if listed_ns is not None:
            del self.entries[bisect_left(self.entries, (listed_ns, gpu.index))]

    def move(self, gpu: Gpu) -> None:
        """The prediction for `gpu` changed; ignored if it is not in."""
        index, busy_ns = gpu.index, gpu.exec.busy_until_ns
        listed_ns = self._listed_ns.get(index)
        if listed_ns is not None and listed_ns != busy_ns:
            self._listed_ns[index] = busy_ns
            del self.entries[bisect_left(self.entries, (listed_ns, index))]
            insort(self.entries, (busy_ns, index, gpu))
