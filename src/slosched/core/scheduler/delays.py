"""How much longer a client's messages take than they need to, without a clock that both sides share.

A message says when it was sent, by the client's clock. Arrival less that is the path's time and the clocks'
difference; both are constant but for queueing, so what exceeds the least value seen lately is time spent in a
queue: in the client's process, in the kernels, or before this process had the CPU to read it.
"""

from __future__ import annotations

from slosched.units import NS_PER_S

#: The least value is of the last one to two of these: clocks drift 500 us in each second at the most.
_MEMORY_NS = 10 * NS_PER_S
#: What a message says of its sending may be anything.
_MOST_NS = 60 * NS_PER_S


class Delays:
    """The delays of one client's messages."""

    __slots__ = ("_lately_ns", "_least_ns", "_since_ns")

    def __init__(self) -> None:
        self._least_ns = self._lately_ns = 1 << 62
        self._since_ns = 0

    def queued_ns(self, *, sent_ns: int, now_ns: int) -> int:
        """How long a message that was read at `now_ns` waited, beyond the least wait seen lately."""
        taken_ns = now_ns - sent_ns
        if now_ns - self._since_ns > _MEMORY_NS:
            self._since_ns = now_ns
            self._least_ns, self._lately_ns = self._lately_ns, taken_ns
        self._lately_ns = min(self._lately_ns, taken_ns)
        self._least_ns = min(self._least_ns, taken_ns)
        return min(taken_ns - self._least_ns, _MOST_NS)
