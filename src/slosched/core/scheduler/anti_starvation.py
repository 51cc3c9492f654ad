"""No model with feasible requests is starved: one that was passed over for long gets a turn.

A policy that serves the most urgent or the most efficient batch may never serve some model: one that takes
50 ms for a request beside a flood for one that takes 2 ms. What is promised, for models with weights on a
GPU:

    A model that loses a request which had waited, or had to be refused early (forecast.py), and gets no
    batch for `PATIENCE_NS` after that, is *starved*. A GPU that opens then and could serve one of its
    requests in time takes it before everything else; of several models the one that has been waiting
    longest.
    After a turn of exec time e the next one comes when other batches of `OTHERS_PER_TURN` e were sent: all
    turns together cost at most a part in `OTHERS_PER_TURN` + 1 of the exec time.

So n models with batches of at most e, each of which has a feasible request whenever one of G busy GPUs
opens, get a batch each at least every PATIENCE_NS + n e (1 + OTHERS_PER_TURN) / G after a loss (n up to
`LOOKED_AT`; of more, some wait longer). A model that loses nothing never needs this, and a cluster that
serves every model four times a second, however overloaded, decides exactly as without.
"""

from __future__ import annotations

from itertools import islice

from slosched.core.scheduler.state import Queue
from slosched.units import NS_PER_MS

PATIENCE_NS = 250 * NS_PER_MS
OTHERS_PER_TURN = 20
#: Number of starved models examined for one GPU at one time; those that do not fit go behind the others.
LOOKED_AT = 16


class AntiStarvation:
    """Queues that wait for a turn, by the time of the first loss since their last batch.

    `turns` counts the turns given.
    """

    __slots__ = ("_due", "_owed_ns", "_patient", "turns")

    def __init__(self) -> None:
        self._patient: dict[int, tuple[int, Queue]] = {}  # by queue id, the longest wait first
        self._due: dict[int, Queue] = {}
        self._owed_ns = 0  # exec time of other batches before the next turn
        self.turns = 0

    def lost(self, queue: Queue, *, now_ns: int) -> None:
        """A request of `queue` that had waited was given up, or it was refused early."""
        queue_id = queue.queue_id
        if queue_id not in self._patient and queue_id not in self._due:
            self._patient[queue_id] = (now_ns, queue)

    def served(self, queue: Queue, exec_ns: int, *, turn: bool) -> None:
        """A batch of `queue` was sent; `turn`: because it was starved."""
        self._patient.pop(queue.queue_id, None)
        self._due.pop(queue.queue_id, None)
        if turn:
            self.turns += 1
            self._owed_ns = OTHERS_PER_TURN * exec_ns
        elif self._owed_ns:
            self._owed_ns = max(0, self._owed_ns - exec_ns)

    def gone(self, queue: Queue) -> None:
        """`queue` is unloaded."""
        self._patient.pop(queue.queue_id, None)
        self._due.pop(queue.queue_id, None)

    def due(self, now_ns: int) -> list[Queue]:
        """The queues whose turn it is, the longest wait first; at most `LOOKED_AT`."""
        if self._owed_ns or not (self._patient or self._due):
            return []
        patient, due = self._patient, self._due
        while patient:
            queue_id = next(iter(patient))
            since_ns, queue = patient[queue_id]
            if now_ns - since_ns < PATIENCE_NS:
                break
            del patient[queue_id]
            due[queue_id] = queue
        return list(islice(due.values(), LOOKED_AT))

    def none_fits(self, queues: list[Queue]) -> None:
        """None of `queues` could go to the GPU that was asked: examine others next."""
        if len(self._due) > LOOKED_AT:
            for queue in queues:
                self._due[queue.queue_id] = self._due.pop(queue.queue_id)
