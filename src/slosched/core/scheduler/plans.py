"""What one request can expect of the GPUs that have its model, or can load it, and the reason if too late."""

from __future__ import annotations

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.host_parts import has_host_part, lane_start_ns
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.state import Request
from slosched.core.scheduler.urgency import Urgency
from slosched.units import format_duration

#: Later than everything: where no GPU can start a request at all.
NEVER_NS = 2**62
#: Number of GPUs looked at, at most, for the one that would be the least late.
_LOOKED_AT = 8

#: Latest start that is likely in time, earliest start there is, exec.
Plan = tuple[int, int, int]


def resident_plan(
    cluster: Cluster, urgency: Urgency, request: Request, now_ns: int
) -> tuple[Plan, int]:
    """The plan on a GPU that holds the model, in the order in which they are free: the first that
    will do, else the least late of the first few. And how many GPUs were looked at.
    """
    holders, program = request.instance.resident_on, request.queue.program
    prepares = has_host_part(request.queue)
    deadline_ns = request.deadline_ns
    order = cluster.free_order.entries
    if len(holders) * 4 < len(order):
        order = sorted((g.exec.busy_until_ns, i, g) for i, g in holders.items())
    best = (0, NEVER_NS, 0)
    seen = 0
    looked_at = 0
    for busy_ns, index, gpu in order:
        looked_at += 1
        if index not in holders:
            continue
        worker = gpu.worker
        start_ns = now_ns + worker.transit.expected_ns
        if prepares:
            start_ns = lane_start_ns(gpu, program, start_ns)
        elif busy_ns > start_ns:
            start_ns = busy_ns
        single_ns = gpu.tables[program].single.expected_ns
        latest_ns = deadline_ns - single_ns - worker.returns.expected_ns
        if start_ns <= latest_ns:
            return (latest_ns, start_ns, single_ns), looked_at
        if seen < _LOOKED_AT:
            seen += 1
            if start_ns - latest_ns < best[1] - best[0]:
                best = (latest_ns, start_ns, single_ns)
        else:
            paths = cluster.paths
            soonest_ns = max(busy_ns, now_ns + paths.least_transit_ns)
            needs_ns = urgency.least_single_ns(program) + paths.least_returns_ns
            if soonest_ns + needs_ns > deadline_ns:
                return best, looked_at  # nor will any that is free later
    return best, len(order)


def loading_plan(cluster: Cluster, placement: Placement, request: Request, now_ns: int) -> Plan:
    """The plan on a GPU that could load the model, in order of their numbers: the first that will do,
    else the least late. With no GPU at all the start lies beyond every deadline.
    """
    instance, queue = request.instance, request.queue
    best = (request.deadline_ns, NEVER_NS, instance.b1_ns)
    for gpu in cluster.gpus.values():
        start_ns = placement.load_ready_ns(gpu, instance, now_ns)
        if start_ns is None:
            continue
        single_ns = gpu.exec_table(queue).single.expected_ns
        latest_ns = request.deadline_ns - single_ns - gpu.worker.returns.expected_ns
        if start_ns <= latest_ns:
            return latest_ns, start_ns, single_ns
        if start_ns - latest_ns < best[1] - best[0]:
            best = (latest_ns, start_ns, single_ns)
    return best


def why_nowhere(cluster: Cluster, request: Request) -> str:
    """In words: there is nothing that could run the request, and for which it could wait."""
    function = request.instance.function
    device = "host" if request.instance.on_host else "GPU"
    if not cluster.gpus:
        return f"no {device} is connected to the controller"
    what = "model" if function is None else "function"
    return f"no connected {device} has this {what} ready"


def why_refused(request: Request, start_ns: int, exec_ns: int, now_ns: int) -> str:
    """In words: the best plan starts at `start_ns` and takes `exec_ns`, which is too late."""
    loading = " after loading its weights" if request.call is None else " after a cold start"
    state = "" if request.instance.resident_on else loading
    late = (
        ", and its result would arrive here too late"
        if start_ns + exec_ns <= request.deadline_ns
        else ""
    )
    return (
        f"could start in {format_duration(start_ns - now_ns)} at the earliest{state} and takes "
        f"{format_duration(exec_ns)}{late}; the deadline is in {format_duration(request.slo_ns)}"
    )


def why_given_up(
    request: Request, start_ns: int, exec_ns: int, now_ns: int, *, stepped_over: bool
) -> tuple[Code, str]:
    """The code and the words for a request that waited, could start at `start_ns` and needs `exec_ns`.

    `stepped_over`: a larger batch was preferred that the request was too old for.
    """
    if start_ns >= NEVER_NS and request.instance.function is not None:
        name, waited = request.instance.name, format_duration(now_ns - request.arrival_ns)
        words = f"no worker that has the function {name!r} is connected any more; the call had not begun"
        return Code.TIMED_OUT, f"{words}, and had waited {waited}"
    what = "slot" if request.instance.on_host else "GPU"
    code, why = Code.TIMED_OUT, f"no {what} came free in time"
    if stepped_over:
        code, why = Code.SKIPPED, "given up in favour of a better batch"
    return code, (
        f"{why}: waited {format_duration(now_ns - request.arrival_ns)}, needs "
        f"{format_duration(exec_ns)}, {format_duration(request.deadline_ns - now_ns)} were left"
    )
