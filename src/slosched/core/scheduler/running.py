"""How many GPUs run batches of each queue, and how many are idle: counted as they change."""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu, Queue


class Running:
    """Follows the execs of all GPUs in use (changes.py); a question looks at those that changed."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._changed = cluster.changes.follow_execs()
        self._queues_on: dict[int, frozenset[int]] = {}  # by GPU index: ids of the queues that run
        self._gpus_with: dict[int, int] = {}  # by queue id
        self._idle = 0

    def gpus_with(self, queue: Queue) -> int:
        """The number of GPUs that run, or are about to run, a batch of `queue`."""
        self._recount()
        return self._gpus_with.get(queue.queue_id, 0)

    @property
    def idle(self) -> int:
        """The number of GPUs with nothing outstanding."""
        self._recount()
        return self._idle

    def _recount(self) -> None:
        if self._changed:
            for gpu in self._changed.values():
                self._place(gpu)
            self._changed.clear()

    def _place(self, gpu: Gpu) -> None:
        before = self._queues_on.pop(gpu.index, None)
        if before is not None:
            self._add(before, -1)
        if gpu.index in self._cluster.gpus:
            now = frozenset(action.queue.queue_id for action in gpu.exec.outstanding)
            self._queues_on[gpu.index] = now
            self._add(now, 1)

    def _add(self, queues: frozenset[int], by: int) -> None:
        if not queues:
            self._idle += by
        for queue_id in queues:
            left = self._gpus_with.get(queue_id, 0) + by
            if left:
                self._gpus_with[queue_id] = left
            else:
                self._gpus_with.pop(queue_id, None)
