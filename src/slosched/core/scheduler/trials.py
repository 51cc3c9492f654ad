"""Requests that their forecast makes hopeless, and that run all the same now and then.

A function that says that it takes 5 s and takes 1 ms, or a GPU that was slow and is quick now, would never
run anything again where all requests have less time: without a run nothing corrects the forecast. So one of
the requests that would be refused runs, late or not, in a slot or on a GPU that is free: the first after
`_LEAST_NS`, or ten times what it takes, in which none was measured. If it was quick, or an inference in time,
the next one runs at once, until the forecast has followed. An inference that would be late even in half the
time that was measured as its model was prepared is hopeless on any day, and refused.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import ActionState, Gpu, Queue, Request
from slosched.core.scheduler.urgency import Urgency
from slosched.units import NS_PER_MS, NS_PER_S

#: Between two calls of a program that are tried, also of all programs on one host; so trials take a tenth of a
#: slot at the most.
_LEAST_NS, _TIMES = 5 * NS_PER_S, 10
#: A call that took less than its forecast by this factor says that the forecast is wrong.
_QUICKER = 2
#: How late a trial may start.
_LATE_NS = 20 * NS_PER_MS


class Trials:
    """Tries calls of host functions, and inferences of plain models.

    `commit` is that of INFER5: (device, batch, start, now).
    """

    def __init__(
        self,
        cluster: Cluster,
        urgency: Urgency,
        commit: Callable[[Gpu, tuple[Queue, int, int, int], int, int], object],
    ) -> None:
        self._cluster, self._urgency, self._commit = cluster, urgency, commit
        self._due_ns: dict[str, int] = {}  # by program, once one of its calls was refused
        self._device_due_ns: dict[int, int] = {}  # by device index
        #: The key of the request that was tried last, by device index.
        self._tried: dict[int, int] = {}

    def sent(self, request: Request, now_ns: int) -> bool:
        """Whether `request`, which would be refused for its forecast, was sent to a device all the same."""
        queue = request.queue
        if not request.instance.on_host and (request.call or queue.after or request.attempts):
            return False
        if queue.queue_id in self._urgency.weighted:
            return False
        gpu = self._free_device(request, now_ns)
        if gpu is None:
            return False
        pause_ns = _pause_ns(gpu.tables[queue.program].single.expected_ns)
        if now_ns < self._due_ns.setdefault(queue.program, now_ns + pause_ns):
            return False
        self._due_ns[queue.program] = self._device_due_ns[gpu.index] = now_ns + pause_ns
        self._tried[gpu.index] = request.key
        insort(queue.requests, request)
        self._urgency.grew(queue)
        choice = queue, bisect_left(queue.requests, request), 1, 1
        self._commit(gpu, choice, now_ns + gpu.worker.transit.margin_ns + _LATE_NS, now_ns)
        return True

    def measured(self, action: ActionState, duration_ns: int, end_ns: int) -> None:
        """A call, or a batch of a model, took `duration_ns`."""
        program = action.queue.program
        if program not in self._due_ns:
            return
        quick = duration_ns * _QUICKER < action.expected_duration_ns
        tried = self._tried.get(action.gpu.index) == action.requests[0].key
        if quick or (tried and _in_time(action, end_ns)):
            self._due_ns[program] = self._device_due_ns[action.gpu.index] = 0
        elif tried or self._due_ns[program]:
            # Otherwise it was not a trial: its time says nothing about requests that seem hopeless.
            self._due_ns[program] = end_ns + _pause_ns(duration_ns)

    def _free_device(self, request: Request, now_ns: int) -> Gpu | None:
        """A device that could be in time, with a slot free, and another one unless it has one alone."""
        for gpu in request.instance.resident_on.values():
            lane, worker = gpu.exec, gpu.worker
            least_ns = worker.transit.expected_ns + worker.returns.expected_ns
            if not gpu.host:
                table = gpu.tables[request.queue.program]
                least_ns += table.profiled_ns[table.batches[0]] // _QUICKER
            free = lane.width - len(lane.outstanding) > int(lane.width > 1)
            if (
                free
                and not gpu.held
                and not gpu.runs_alone
                and now_ns >= self._device_due_ns.get(gpu.index, 0)
                and now_ns + least_ns < request.deadline_ns
                and self._cluster.reports(gpu, now_ns)
            ):
                return gpu
        return None


def _in_time(action: ActionState, end_ns: int) -> bool:
    """Whether an inference ended while its answer could still be in time; a call must be quick to count."""
    back_ns = action.gpu.worker.returns.expected_ns
    return not action.instance.on_host and end_ns + back_ns <= action.requests[0].deadline_ns


def _pause_ns(expected_ns: int) -> int:
    return max(_LEAST_NS, _TIMES * expected_ns)
