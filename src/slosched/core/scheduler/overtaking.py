"""When an urgent request may interrupt what runs on a GPU (option `preempt`).

A long inference stops at its next boundary, an urgent batch runs, and the long one goes on. So everything
ordinary on that GPU, aboard or waiting, is delayed by the urgent batch's exec time D. The batch is sent if
the sum over its requests that would be late otherwise, of value times batch-1 time, exceeds

    the same sum over the ordinary requests aboard that its pause would make late, each of a value no less than
    the urgent ones' (their GPU time would be wasted, and could have served those)
    + D u / U

where u is the largest share of its SLO that an ordinary request of this GPU needs with the pause, aboard or
last in its queue. Requests count by their GPU time, because a long one would never be worth more than the
short ones that fit into its place; and while ordinary requests need less than a share U of their SLOs, there
is time to spare.

What is promised to long requests: the urgent batches sent behind an action pause it for no longer than the
action's own expected exec time, all together. So an action of exec time e, sent when its GPU is free, ends
after 2 e at the latest.

Urgent are models whose worker says so, in the batch sizes that it has captured for that: short ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import ActionState, Gpu, Queue, Request
from slosched.core.scheduler.weights import value_of

#: Urgent actions outstanding on one GPU: one runs, and the next is on its way.
_MAX_URGENT = 2
#: Waiting queues, and GPUs for each, that one decision looks at.
_QUEUES, _GPUS = 16, 8
#: U: the share of their SLOs that ordinary requests may need before an interruption must gain more than it
#: takes.
_SHARE_TO_SPARE = 0.6


class Urgent(NamedTuple):
    """An urgent batch: `taken` requests of `queue` from the place `first` on, in the class `batch`."""

    gpu: Gpu
    queue: Queue
    first: int
    taken: int
    batch: int
    start_ns: int
    expected_ns: int
    gain: float


class Overtaking:
    """Finds urgent batches. `waiting` has every queue with requests, by its id."""

    def __init__(self, cluster: Cluster, waiting: Mapping[int, Queue]) -> None:
        self._cluster = cluster
        self._all_waiting = waiting
        self._waiting: dict[int, Queue] = {}  # by queue id

    def queued(self, request: Request) -> None:
        """`request` waits in its queue from now on."""
        queue = request.queue
        if queue.queue_id not in self._waiting and _is_urgent(queue):
            self._waiting[queue.queue_id] = queue

    def start_ns(self, request: Request, now_ns: int) -> int | None:
        """When `request` would likely start at the earliest if it interrupted something; None: it cannot."""
        if not _is_urgent(request.queue):
            return None
        starts = [
            start_ns
            for gpu in islice(request.instance.resident_on.values(), _GPUS)
            if (
                start_ns := interrupts_at_ns(
                    self._cluster, gpu, request.queue, now_ns, promised=False
                )
            )
            is not None
        ]
        return min(starts, default=None)

    def best(self, now_ns: int) -> Urgent | None:
        """The urgent batch that gains most, if one gains."""
        found: Urgent | None = None
        for queue_id, queue in list(islice(self._waiting.items(), _QUEUES)):
            if not queue.requests:
                del self._waiting[queue_id]
                continue
            for gpu in islice(queue.instance.resident_on.values(), _GPUS):
                urgent = self._on(gpu, queue, now_ns)
                if urgent is not None and (found is None or urgent.gain > found.gain):
                    found = urgent
            if len(self._waiting) > _QUEUES:  # next time the others are looked at
                self._waiting[queue_id] = self._waiting.pop(queue_id)
        return found

    def _on(self, gpu: Gpu, queue: Queue, now_ns: int) -> Urgent | None:
        """The urgent batch of `queue` on `gpu` that gains most."""
        start_ns = interrupts_at_ns(self._cluster, gpu, queue, now_ns, promised=True)
        if start_ns is None:
            return None
        requests, table, returns = queue.requests, gpu.exec_table(queue), gpu.worker.returns
        urgent_ns = gpu.worker.prepared[queue.instance.name].urgent_ns
        ordinary_ns = self._ordinary_start_ns(queue, now_ns)
        paused = [action for action in gpu.exec.outstanding if not action.priority]
        used = self._used(gpu, paused, now_ns)
        single_ns = table.single.expected_ns
        best: Urgent | None = None
        for batch, estimator in table.classes:
            expected_ns = estimator.expected_ns
            if table.profiled_ns[batch] > urgent_ns or not may_pause(paused, expected_ns):
                break
            first = first_from(requests, start_ns + estimator.margin_ns + returns.margin_ns)
            aboard = requests[first : first + batch]
            if not aboard or (best is not None and len(aboard) <= best.taken):
                break
            late_ns = ordinary_ns + expected_ns + returns.expected_ns
            late = [value_of(each) for each in aboard if each.deadline_ns < late_ns]
            if not late:
                continue
            gain = sum(late) * single_ns - self._lost_ns(paused, expected_ns, max(late))
            most = max(
                [(needs_ns + expected_ns) / slo_ns for needs_ns, slo_ns in used], default=0.0
            )
            gain -= expected_ns * most / _SHARE_TO_SPARE
            if gain > (best.gain if best is not None else 0.0):
                best = Urgent(
                    gpu=gpu,
                    queue=queue,
                    first=first,
                    taken=len(aboard),
                    batch=batch,
                    start_ns=start_ns,
                    expected_ns=expected_ns,
                    gain=gain,
                )
        return best

    def _ordinary_start_ns(self, queue: Queue, now_ns: int) -> int:
        """When a request of `queue` could start without interrupting anything, at the earliest."""
        holders = islice(queue.instance.resident_on.values(), _GPUS)
        return min([self._cluster.likely_start_ns(gpu, now_ns) for gpu in holders])

    def _used(self, gpu: Gpu, paused: Sequence[ActionState], now_ns: int) -> list[tuple[int, int]]:
        """(time needed, SLO) of the ordinary requests aboard, and of the last in each queue for `gpu`."""
        returns_ns = gpu.worker.returns.expected_ns
        used: list[tuple[int, int]] = []
        for action in paused:
            ends_ns = action.predicted_end_ns + returns_ns
            used += [(ends_ns - each.arrival_ns, each.slo_ns) for each in action.requests]
        ends_ns = max(now_ns, gpu.exec.busy_until_ns) + returns_ns
        for queue in islice(self._all_waiting.values(), _QUEUES):
            if queue.instance.model_id not in gpu.resident or may_interrupt(gpu, queue):
                continue
            ends_ns += _work_ns(gpu, queue)
            last = queue.requests[-1]
            used.append((ends_ns - last.arrival_ns, last.slo_ns))
        return used

    def _lost_ns(self, paused: Sequence[ActionState], pause_ns: int, value: float) -> float:
        """What the requests aboard count that would be in time, and are late with a pause.

        Each has a value of at least `value`, the urgent ones' greatest: the GPU time that it took could have
        served those.
        """
        lost = 0.0
        for action in paused:
            gpu = action.gpu
            ends_ns = action.predicted_end_ns + gpu.worker.returns.expected_ns
            late = [
                max(value, value_of(request))
                for request in action.requests
                if ends_ns <= request.deadline_ns < ends_ns + pause_ns
            ]
            lost += sum(late) * gpu.exec_table(action.queue).single.expected_ns
        return lost


def interrupts_at_ns(
    cluster: Cluster, gpu: Gpu, queue: Queue, now_ns: int, *, promised: bool
) -> int | None:
    """When an urgent batch of `queue` sent now would start on `gpu`; None: it cannot interrupt there.

    `promised`: at the latest, else likely.
    """
    lane, worker = gpu.exec, gpu.worker
    if not may_interrupt(gpu, queue):
        return None  # a shorter program of the model may, or on other workers
    running = lane.ordinary()
    if running is None or gpu.held or gpu.runs_alone or lane.urgent >= _MAX_URGENT:
        return None
    boundary_ns = gpu.exec_table(running.queue).boundaries_ns.get(running.batch_class, 0)
    if not boundary_ns or not cluster.reports(gpu, now_ns):
        return None
    transit = worker.transit
    reaches_ns = now_ns + (transit.margin_ns if promised else transit.expected_ns)
    if lane.urgent:
        return max(reaches_ns, lane.outstanding[lane.urgent - 1].predicted_end_ns)
    if running.predicted_start_ns > reaches_ns:
        return reaches_ns
    wait_ns = boundary_ns if promised else boundary_ns // 2
    return min(reaches_ns + wait_ns, max(reaches_ns, running.predicted_end_ns))


def _work_ns(gpu: Gpu, queue: Queue) -> int:
    """The part of what waits in `queue` that falls to `gpu`, ns."""
    waiting, table = len(queue.requests), gpu.exec_table(queue)
    batch = table.class_for(waiting)
    whole_ns = table.estimators[batch].expected_ns * waiting // min(batch, waiting)
    return whole_ns // len(queue.instance.resident_on)


def may_interrupt(gpu: Gpu, queue: Queue) -> bool:
    """True if `gpu` has a class of the queue's program ready for that."""
    table = gpu.exec_table(queue)
    urgent_ns = gpu.worker.prepared[queue.instance.name].urgent_ns
    return urgent_ns > 0 and table.profiled_ns[table.batches[0]] <= urgent_ns


def _is_urgent(queue: Queue) -> bool:
    """False if no worker has its model ready for that."""
    result = queue.instance.result
    return result is not None and result.urgent_ns > 0


def may_pause(paused: Sequence[ActionState], pause_ns: int) -> bool:
    """True if each action may be paused that much more; see the head of this file."""
    return all(each.paused_ns + pause_ns <= each.expected_duration_ns for each in paused)
