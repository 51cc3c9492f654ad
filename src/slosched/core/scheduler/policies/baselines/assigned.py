"""What policies share that assign each request to a GPU before that GPU is free.

Each GPU has a queue, whose order is the policy's own. Requests of a model that no GPU holds wait unassigned
(unassigned_requests.py), and so do those of a GPU that is lost or gives their model up, until weights arrive.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.baselines.queued import LoadedByDemand, answer_unoffered
from slosched.core.scheduler.policies.baselines.unassigned_requests import (
    AN_ASSIGNMENT,
    UnassignedRequests,
)
from slosched.core.scheduler.queues import take_appended
from slosched.core.scheduler.slices import Work
from slosched.core.scheduler.state import Gpu, Queue, Request


class GpuQueue(Protocol):
    """The requests that are assigned to one GPU."""

    def first(self) -> Request | None:
        """One of them, by a fixed rule; None if there are none."""

    def remove(self, request: Request) -> None: ...


_Queue = TypeVar("_Queue", bound=GpuQueue)


class AssignedToGpus(LoadedByDemand, Generic[_Queue]):
    """Which request is assigned to which GPU; the policy says how a GPU's queue is served."""

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._queues: dict[int, _Queue] = {}  # by GPU index
        self._assigned: dict[int, int] = {}  # request key -> GPU index
        self._unassigned = UnassignedRequests()

    def _new_queue(self) -> _Queue:
        raise NotImplementedError

    def _serve(self, gpu: Gpu, start_ns: int, now_ns: int) -> None:
        """Send the next action of `gpu`, which is open and can start at `start_ns`."""
        raise NotImplementedError

    def _serve_open(self, now_ns: int) -> None:
        if self._assigned:
            for start_ns, _, gpu in self._windows.open_gpus(now_ns):
                self._serve(gpu, start_ns, now_ns)

    def forget(self, request: Request) -> None:
        take_appended(request.queue.requests, request)
        self._leave(request)

    def _leave(self, request: Request) -> None:
        """Take `request` off its GPU, or from the unassigned ones."""
        index = self._assigned.pop(request.key, None)
        if index is None:
            self._unassigned.discard(request)
        else:
            self._queues[index].remove(request)

    def _unassign(self, request: Request) -> None:
        self._leave(request)
        self._unassigned.add(request)

    def gpu_added(self, gpu: Gpu) -> None:
        self._queues[gpu.index] = self._new_queue()

    def gpu_removed(self, gpu: Gpu) -> None:
        self._placement.gpu_removed(gpu)
        self._cluster.slices.begin(self._removed(gpu.index))

    def _removed(self, index: int) -> Work:
        """Requests of a GPU that is gone wait for another one, or are answered if there is none."""
        queue = self._queues[index]
        while (request := queue.first()) is not None:
            self._unassign(request)
            yield AN_ASSIGNMENT
        del self._queues[index]
        yield from answer_unoffered(self._cluster, self, self._refusals, self._unassigned.queues())

    def head(self, queue: Queue) -> Request | None:
        """The first request of `queue` that is assigned to no GPU."""
        return self._unassigned.head(queue)
