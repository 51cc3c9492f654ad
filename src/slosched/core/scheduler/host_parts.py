"""Calls with a host part: when they could have the lane, and that their host parts begin at once.

What runs on the host need not wait for the lane of a GPU, and nothing behind it should: so a call of such a
function goes to its worker when it comes, up to `Gpu.prepare.most` on each GPU, and stands in the lane when its
host part is over. Those that find no room wait in their queues, the one that is due first in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import Gpu, Queue, Request


def lane_start_ns(gpu: Gpu, program: str, soonest_ns: int) -> int:
    """When a call of `program` that reaches its worker at `soonest_ns` or later is likely to have the lane."""
    host_part = gpu.tables[program].host_part
    if host_part is not None:
        soonest_ns = max(soonest_ns, gpu.prepare.busy_until_ns) + host_part.expected_ns
    return max(soonest_ns, gpu.exec.busy_until_ns)


def has_host_part(queue: Queue) -> bool:
    function = queue.instance.function
    return function is not None and function.prepare_ns > 0


class HostParts:
    """Sends such calls; `commit` sends a batch of INFER5: (device, batch, start, now)."""

    def __init__(
        self,
        cluster: Cluster,
        commit: Callable[[Gpu, tuple[Queue, int, int, int], int, int], object],
    ) -> None:
        self._cluster, self._commit = cluster, commit
        self._queues: dict[int, Queue] = {}  # by id: those in which some wait

    def __bool__(self) -> bool:
        return bool(self._queues)

    def queued(self, request: Request) -> None:
        if has_host_part(request.queue):
            self._queues[request.queue.queue_id] = request.queue

    def plan(self, now_ns: int) -> None:
        """Send what finds room, each to the GPU where it could have the lane first."""
        for queue_id, queue in list(self._queues.items()):
            while queue.requests and self._send_first(queue, now_ns):
                pass
            if not queue.requests:
                del self._queues[queue_id]

    def full(self, gpu: Gpu) -> bool:
        """Whether `gpu` takes no other call in its host part."""
        return len(gpu.prepare.outstanding) >= gpu.prepare.most

    def others(self, queues: Iterable[Queue]) -> list[Queue]:
        """Those without host parts."""
        return [queue for queue in queues if not has_host_part(queue)]

    def _send_first(self, queue: Queue, now_ns: int) -> bool:
        """Send the first that could be in time. False: there is none, or no room."""
        best: tuple[int, int, Gpu] | None = None
        for index, gpu in queue.instance.resident_on.items():
            if gpu.held or gpu.runs_alone or self.full(gpu):
                continue
            soonest_ns = now_ns + gpu.worker.transit.expected_ns
            start_ns = lane_start_ns(gpu, queue.program, soonest_ns)
            if best is None or (start_ns, index) < best[:2]:
                best = start_ns, index, gpu
        if best is None:
            return False
        start_ns, _, gpu = best
        needs_ns = start_ns + gpu.tables[queue.program].single.expected_ns
        place = first_from(
            queue.requests, needs_ns + gpu.worker.returns.expected_ns - queue.rest_ns
        )
        if place == len(queue.requests):
            return False
        self._commit(gpu, (queue, place, 1, 1), start_ns, now_ns)
        return True
