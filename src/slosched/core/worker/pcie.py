"""The PCIe link from host memory to emulated GPUs: copies that run at the same time share it equally.

Processor sharing: with k copies on the link, each moves at 1/k of the speed, so a load of weights slows the
inputs beside it and the other way round. GPUs of one host may have a link each, or one for all.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

#: Units of progress in one ns of a copy that is alone. Divisible by 1..16, so that sharing among up to 16
#: copies rounds nothing.
_PER_NS = 720_720

#: Called with the time at which the copy ended.
OnEnd = Callable[[int], None]


class PcieLink:
    """Copies in progress. Times are in ns; `work_ns` is the time that a copy takes alone.

    The state is exact at `now_ns` after `advance(now_ns)`, which `begin` calls first.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[int, int, OnEnd]] = []  # (progress at its end, seq, callback)
        self._progress = 0  # that a copy which was always on the link would have made
        self._at_ns = 0
        self._seq = 0

    def begin(self, work_ns: int, *, now_ns: int, on_end: OnEnd) -> None:
        """A copy begins; `on_end` is called from the `advance` that reaches its end."""
        self.advance(now_ns)
        self._seq += 1
        heappush(self._copies, (self._progress + work_ns * _PER_NS, self._seq, on_end))

    def advance(self, now_ns: int) -> None:
        """Let time pass up to `now_ns`; call `on_end` for each copy that has ended, in order."""
        while self._copies:
            end_ns = self._next_ns()
            if end_ns > now_ns:
                elapsed_ns = now_ns - self._at_ns
                self._progress += elapsed_ns * _PER_NS // len(self._copies)
                break
            self._progress, _, on_end = heappop(self._copies)
            self._at_ns = end_ns
            on_end(end_ns)
        self._at_ns = now_ns

    def next_event_ns(self) -> int | None:
        """When the next copy ends, on any GPU. None: nothing is copied."""
        return self._next_ns() if self._copies else None

    def _next_ns(self) -> int:
        left = self._copies[0][0] - self._progress
        return self._at_ns - (-left * len(self._copies) // _PER_NS)  # rounded up
