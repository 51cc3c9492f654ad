"""Times at which something is to be done, by key; each key has one. In order of time, then of setting."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush

#: Entries of alarms that were taken back stay in the heap until they are more than the others and this.
_SLACK = 64


class Alarms:
    """A heap of (time, key). Taking one back costs nothing; the heap never grows beyond twice what is set."""

    __slots__ = ("_heap", "_seq", "_set")

    def __init__(self) -> None:
        self._set: dict[Hashable, int] = {}  # the sequence number of its entry in the heap
        self._heap: list[tuple[int, int, Hashable]] = []
        self._seq = 0

    def __len__(self) -> int:
        return len(self._set)

    def set(self, key: Hashable, at_ns: int) -> None:
        """`key` is due at `at_ns`, and at no other time."""
        self._seq = seq = self._seq + 1
        heap, current = self._heap, self._set
        current[key] = seq
        heappush(heap, (at_ns, seq, key))
        if len(heap) > 2 * len(current) + _SLACK:
            heap[:] = [entry for entry in heap if current.get(entry[2]) == entry[1]]
            heapify(heap)

    def unset(self, key: Hashable) -> None:
        self._set.pop(key, None)

    def due(self, now_ns: int) -> Iterator[Hashable]:
        """Take out, one after the other, the keys whose time has come."""
        while (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            key = heappop(self._heap)[2]
            del self._set[key]
            yield key

    def next_ns(self) -> int | None:
        """When the next one is due. None: none is set."""
        heap, current = self._heap, self._set
        while heap:
            at_ns, seq, key = heap[0]
            if current.get(key) == seq:
                return at_ns
            heappop(heap)
        return None
