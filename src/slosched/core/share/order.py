"""Which waiting request goes first on a lane that several jobs share, and which one interrupts what runs.

- fcfs: the request that arrived first (ties: the jobs' order, turned by the seed). Nothing is interrupted.
- rr: the jobs have turns; one without a waiting request loses its turn. Nothing is interrupted.
- priority: the job of the highest priority, fcfs inside a level; a higher level interrupts a lower one.
- edf: the earliest deadline, requests without one last, then as priority. An earlier deadline interrupts.
- least slack: the least `deadline - now - remaining time`, as the poster of Deft promises (its repository has
  only two levels): all slacks of waiting requests fall alike, so the order is that of `deadline - remaining
  time`, the date by which a request must run without a break. It interrupts what runs if the latter's slack is
  larger by more than the time to its next boundary.

A preemptive lane only knows integer priorities, and interrupts for a strictly higher one. The brain therefore
does not hand on the priorities of the jobs but *levels*: the first request of an empty lane has level 0, one
that is to interrupt has the highest level in the lane plus one, and one that is to wait behind another has the
level of that one (a lane keeps the order of arming inside a level). So the order of the lane, which is the same
class live and in virtual time (core/worker/lane_order.py), is right under each policy, also where the rank of a
request changes while it runs, and ties never interrupt.
"""

from __future__ import annotations

from typing import TypeAlias

from slosched.core.share.queues import JobQueue, Waiting
from slosched.share_spec import Policy

#: Later than each deadline: of requests that have none.
NEVER_NS = 2**62

Key: TypeAlias = tuple[int, ...]


class Order:
    """The order of `policy` over `queues`. A smaller key goes first."""

    def __init__(self, policy: Policy, queues: list[JobQueue], seed: int) -> None:
        self.policy = policy
        #: False: the order of two waiting requests never changes, so none is taken back for another.
        self.swaps = policy not in (Policy.FCFS, Policy.RR)
        self._queues = queues
        self._turn = seed % len(queues)
        self._ties = [(place - seed) % len(queues) for place in range(len(queues))]

    def key(self, waiting: Waiting) -> Key:
        """The place of a waiting request. Keys of two requests of one job rise with their numbers."""
        place = waiting.place
        tie = self._ties[place]
        if self.policy is Policy.FCFS:
            return waiting.arrived_ns, tie, waiting.number
        if self.policy is Policy.RR:
            return (place - self._turn) % len(self._queues), waiting.number
        by_level = (-self._queues[place].load.priority, waiting.arrived_ns, tie, waiting.number)
        if self.policy is Policy.PRIORITY:
            return by_level
        if self.policy is Policy.EDF:
            return (waiting.deadline_ns or NEVER_NS, *by_level)
        return (self.must_start_ns(waiting, 0), *by_level)

    def started(self, waiting: Waiting) -> None:
        """The request went to the lane: the turn is the next job's."""
        self._turn = (waiting.place + 1) % len(self._queues)

    def must_start_ns(self, waiting: Waiting, ran_ns: int) -> int:
        """By when the request must run without a break, having run for `ran_ns`."""
        if not waiting.deadline_ns:
            return NEVER_NS
        return waiting.deadline_ns - max(0, self._queues[waiting.place].expected_ns - ran_ns)

    def interrupts(self, waiting: Waiting, other: Waiting, ran_ns: int) -> bool:
        """True if `waiting` goes first where `other` runs and has run for `ran_ns`."""
        queues = self._queues
        higher = queues[waiting.place].load.priority > queues[other.place].load.priority
        if self.policy is Policy.PRIORITY:
            return higher
        if self.policy is Policy.EDF:
            mine, its = waiting.deadline_ns or NEVER_NS, other.deadline_ns or NEVER_NS
        elif self.policy is Policy.LEAST_SLACK:
            mine = self.must_start_ns(waiting, 0)
            # A tie is nearer than a boundary, so it does not interrupt.
            return mine < self.must_start_ns(other, ran_ns) - queues[other.place].load.boundary_ns
        else:
            return False
        return mine < its or (mine == its and higher)
