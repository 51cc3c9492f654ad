"""Queues with requests, by a lower bound of the key of any batch that INFER5 could make of them.

The key of a batch (policies/infer5.py) is d_first + d_head / 4 + (l - 1) e + (delta i - g k) b1, and with
d_first >= d_head and i >= 0 it is at least

    5/4 d_head + min over the classes b that n requests reach of ((l - 1) e_b - g min(b, n) b1)

A request of value v counts as v requests in the credit term g k. If any queued request has a value other
than 1, the queue is bounded as if every request had the largest value.

Here e_b is the shortest and b1 the longest time that any GPU shows for the queue's program, and g and l are
those of a whole interval of the loss x: both are kept with some slack, so that the order changes when a
queue does and rarely otherwise. A search in this order may stop where the bound passes the best key found.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from slosched.core.scheduler.state import Instance, Queue

#: g, l - 1 and delta at a loss of 0, and how they change with it.
CREDIT, CREDIT_SLOPE = 1.9, 3.45
WEIGHT, WEIGHT_SLOPE = 2.3, 4.0
PENALTY, PENALTY_SLOPE = 0.24, -0.17
#: Keys are floats near 10^18 and each step of their sum rounds to 128 ns or so.
ROUNDING_NS = 4096.0
#: Half the interval of x that the bounds hold for, and the slack of exec times.
_LOSS_SLACK = 0.125
_EXEC_SLACK = 0.03
_NEVER_NS = 2**62

Entry = tuple[float, int, Queue]


class _Envelope:
    """Bounds of the exec times that GPUs show for one program, ns."""

    __slots__ = ("bound_ns", "least_single_ns", "lowest_ns", "single_ns")

    def __init__(self) -> None:
        self.lowest_ns: dict[int, float] = {}  # by class
        self.single_ns = 0.0  # of batch 1, the highest
        self.least_single_ns = _NEVER_NS  # the lowest, without slack
        self.bound_ns: list[float] = []  # by queue length, the last for all longer ones

    def widen(self, batch: int, time_ns: int) -> bool:
        """Take an exec time in, with slack. False if it was within the bounds."""
        changed = False
        if time_ns < self.lowest_ns.get(batch, _NEVER_NS):
            self.lowest_ns[batch] = time_ns * (1.0 - _EXEC_SLACK)
            changed = True
        if batch == 1 and time_ns > self.single_ns:
            self.single_ns = time_ns * (1.0 + _EXEC_SLACK)
            changed = True
        return changed

    def tabulate(self, losses: tuple[float, float]) -> None:
        """The bounds without deadlines, for every queue length."""
        self.bound_ns = [0.0]
        for length in range(1, max(self.lowest_ns) + 1):
            self.bound_ns.append(self.bound_for(length, 1.0, losses))

    def bound_for(self, length: int, value: float, losses: tuple[float, float]) -> float:
        """The bound without deadlines for `length` requests, none of which counts more than `value`.

        Linear in x: the ends are enough.
        """
        classes = sorted(self.lowest_ns)
        reached = [b for i, b in enumerate(classes) if i == 0 or classes[i - 1] < length]
        return min(
            (WEIGHT + WEIGHT_SLOPE * x) * self.lowest_ns[b]
            - (CREDIT + CREDIT_SLOPE * x) * min(b, length) * value * self.single_ns
            for x in losses
            for b in reached
        )


class _Weighted:
    """The queued requests of one queue whose value is not 1."""

    __slots__ = ("count", "highest")

    def __init__(self) -> None:
        self.count = 0
        self.highest = 1.0  # the highest value since there were none, at least 1


class Urgency:
    """The waiting queues in order. The caller reports each change of a queue, and what GPUs measure."""

    def __init__(self) -> None:
        #: By queue id: queues with requests whose value is not 1.
        self.weighted: dict[int, _Weighted] = {}
        self.waiting: dict[int, Queue] = {}  # by queue id, in the order in which they began to wait
        self.since: dict[int, int] = {}  # the same order as numbers: the tie-break
        self._next = 0
        self._entries: list[Entry] = []
        self._entry: dict[int, Entry] = {}
        self._stale: dict[int, Queue] = {}
        self._envelopes: dict[str, _Envelope] = {}
        self._losses = (-1.0, -1.0)

    # -------------------------------------------------------------------------------- facts

    def grew(self, queue: Queue) -> None:
        """A request was queued."""
        queue_id = queue.queue_id
        if queue_id not in self.waiting:
            self.waiting[queue_id] = queue
            self.since[queue_id] = self._next
            self._next += 1
        self._stale[queue_id] = queue

    def shrank(self, queue: Queue) -> None:
        """Requests left the queue."""
        queue_id = queue.queue_id
        if queue.requests:
            self._stale[queue_id] = queue
            return
        del self.waiting[queue_id], self.since[queue_id]
        self._stale.pop(queue_id, None)
        self._drop(queue_id)

    def weighs(self, queue: Queue, value: float) -> None:
        """A request was queued whose `value` is not 1."""
        weighted = self.weighted.get(queue.queue_id)
        if weighted is None:
            weighted = self.weighted[queue.queue_id] = _Weighted()
        weighted.count += 1
        weighted.highest = max(value, weighted.highest)

    def weighs_no_more(self, queue: Queue, count: int) -> None:
        """`count` such requests left the queue."""
        if count:
            weighted = self.weighted[queue.queue_id]
            weighted.count -= count
            if not weighted.count:
                del self.weighted[queue.queue_id]

    def measured(self, name: str, batch: int, time_ns: int) -> None:
        """A GPU takes about `time_ns` for `batch` of `name`: widen the bounds to include it."""
        envelope = self._envelopes.get(name)
        if envelope is None:
            envelope = self._envelopes[name] = _Envelope()
        if batch == 1 and time_ns < envelope.least_single_ns:
            envelope.least_single_ns = time_ns
        if envelope.widen(batch, time_ns):
            envelope.bound_ns.clear()
            self._stale.update((i, q) for i, q in self.waiting.items() if q.program == name)

    # ---------------------------------------------------------------------------- questions

    def least_single_ns(self, name: str) -> int:
        """No GPU takes less for one request of `name`, nor ever did."""
        envelope = self._envelopes.get(name)
        return envelope.least_single_ns if envelope is not None else 0

    def in_order(self, loss: float) -> list[Entry]:
        """(bound, since, queue) of all waiting queues, ascending; valid until anything changes."""
        self._refresh(loss)
        return self._entries

    def among(self, instances: Iterable[Instance], loss: float) -> list[Entry]:
        """The same for those queues of `instances` that have requests."""
        self._refresh(loss)
        return sorted(
            self._entry[queue.queue_id]
            for instance in instances
            for queue in instance.queues
            if queue.requests
        )

    # -------------------------------------------------------------------------------- upkeep

    def _drop(self, queue_id: int) -> None:
        entry = self._entry.pop(queue_id, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def _refresh(self, loss: float) -> None:
        if not self._losses[0] <= loss <= self._losses[1]:
            self._losses = (max(0.0, loss - _LOSS_SLACK), min(1.0, loss + _LOSS_SLACK))
            for envelope in self._envelopes.values():
                envelope.bound_ns.clear()
            self._stale.update(self.waiting)
        stale = self._stale
        if not stale:
            return
        if len(stale) * 4 > len(self.waiting) > 8:
            for queue_id, queue in stale.items():
                self._entry[queue_id] = self._entry_for(queue)
            self._entries = sorted(self._entry.values())
        else:
            for queue_id, queue in stale.items():
                entry = self._entry_for(queue)
                known = self._entry.get(queue_id)
                if known is None or known[0] != entry[0]:
                    self._drop(queue_id)
                    self._entry[queue_id] = entry
                    insort(self._entries, entry)
        stale.clear()

    def _entry_for(self, queue: Queue) -> Entry:
        bounds_ns = self._envelopes[queue.program].bound_ns
        if not bounds_ns:
            envelope = self._envelopes[queue.program]
            envelope.tabulate(self._losses)
            bounds_ns = envelope.bound_ns
        requests = queue.requests
        length = min(len(requests), len(bounds_ns) - 1)
        bound_ns = bounds_ns[length]
        if self.weighted and (weighted := self.weighted.get(queue.queue_id)) is not None:
            envelope = self._envelopes[queue.program]
            bound_ns = envelope.bound_for(length, weighted.highest, self._losses)
        return (
            1.25 * requests[0].due_ns + bound_ns,
            self.since[queue.queue_id],
            queue,
        )
