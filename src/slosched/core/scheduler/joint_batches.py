"""Requests of several length classes of one instance in one batch, where that takes less GPU time than apart.

A batch runs at the length of the longest class in it, and what is shorter is padded. That pays where the
longer batch has rows to spare, or where a batch's time hardly depends on its size: for small batches, of which
most of the time is fixed. With e_c(b) the exec time of class c at batch b, n requests of class c join the batch
(c0, b0) as (c1, b1) if e_c1(b1) < e_c0(b0) + n e_c(B) / min(B, m), where B is the batch that all m requests
that wait in class c would make, and if everything aboard is then in time. GPU time that is saved serves other
requests.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from slosched.core.scheduler.estimators import ExecTable
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import Gpu, Queue, Request


class Joint(NamedTuple):
    """A batch as it runs: in the program of `queue`. `riders` are (queue, first place, number of requests)."""

    queue: Queue
    batch: int
    expected_ns: int
    riders: tuple[tuple[Queue, int, int], ...]


class _Step(NamedTuple):
    """One more queue that joins: what is saved, ns, and the batch with it."""

    saved_ns: float
    batch: int
    expected_ns: int
    queue: Queue
    rider: tuple[Queue, int, int]


def joint_batch(
    gpu: Gpu,
    queue: Queue,
    requests: Sequence[Request],
    batch: int,
    start_ns: int,
    left_out: Container[int],
) -> Joint:
    """The batch of `requests` (in the order of their due dates, taken from `queue`) with what joins it.

    It starts at `start_ns`. Queues whose ids are in `left_out` join nothing.
    """
    joint = Joint(queue, batch, gpu.tables[queue.program].estimators[batch].expected_ns, ())
    aboard, due_ns = len(requests), requests[0].due_ns
    others = [
        each
        for each in queue.instance.queues
        if each is not queue
        and each.requests
        and each.length
        and each.after is queue.after
        and each.queue_id not in left_out
    ]
    while others:
        steps = [_best_step(gpu, joint, other, aboard, due_ns, start_ns) for other in others]
        step = max([each for each in steps if each is not None], default=None, key=_saved_ns)
        if step is None:
            break
        other, first, count = step.rider
        joint = Joint(step.queue, step.batch, step.expected_ns, (*joint.riders, step.rider))
        aboard, due_ns = aboard + count, min(due_ns, other.requests[first].due_ns)
        others.remove(other)
    return joint


def _saved_ns(step: _Step) -> float:
    return step.saved_ns


def _best_step(
    gpu: Gpu, joint: Joint, other: Queue, aboard: int, due_ns: int, start_ns: int
) -> _Step | None:
    """How requests of `other` join best; None if that saves nothing, or something aboard would be late."""
    waiting = len(other.requests)
    each_ns = _time_of_each(gpu.tables[other.program], waiting)
    longer = other if other.length > joint.queue.length else joint.queue
    returns_ns = gpu.worker.returns.margin_ns
    best = None
    for batch, estimator in gpu.tables[longer.program].classes:
        if batch <= aboard:
            continue
        expected_ns, end_ns = estimator.expected_ns, start_ns + estimator.margin_ns + returns_ns
        unchanged = longer is joint.queue and batch == joint.batch
        if due_ns < end_ns and not unchanged:
            break
        first = first_from(other.requests, end_ns)
        count = min(batch - aboard, waiting - first)
        saved_ns = joint.expected_ns + count * each_ns - expected_ns
        if count > 0 and saved_ns > (best.saved_ns if best is not None else 0.0):
            best = _Step(saved_ns, batch, expected_ns, longer, (other, first, count))
    return best


def _time_of_each(table: ExecTable, waiting: int) -> float:
    """The GPU time of each of `waiting` requests in the batch that they make by themselves, ns."""
    batch = table.class_for(waiting)
    return table.estimators[batch].expected_ns / min(batch, waiting)


def by_queue(requests: Sequence[Request]) -> Iterable[list[Request]]:
    """Those of each queue, in their order."""
    parts: dict[int, list[Request]] = {}
    for request in requests:
        parts.setdefault(request.queue.queue_id, []).append(request)
    return parts.values()
