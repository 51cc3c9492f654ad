"""Where a light batch of a cascade interrupts a heavy one (option `preempt`).

A heavy batch keeps its GPU for seconds. Where its program stops at boundaries (between two steps of a diffusion
model, say), no GPU has to stay free for light batches: one that is due runs at the next boundary, and the heavy
batch goes on behind it. It interrupts the batch that has the most time to spare, and makes no heavy request
late unless it saves more light ones. So a heavy batch needs no time for interruptions when it is planned: where
it has none to spare, light ones wait for its end.
"""

from __future__ import annotations

from typing import NamedTuple

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.overtaking import interrupts_at_ns, may_interrupt, may_pause
from slosched.core.scheduler.queues import first_from
from slosched.core.scheduler.state import Gpu, Queue
from slosched.units import NS_PER_S


class Interruption(NamedTuple):
    """`taken` requests of the light queue, from the place `first` on, interrupt `gpu` at `start_ns`."""

    gpu: Gpu
    first: int
    taken: int
    start_ns: int
    ends_ns: int  # at the latest, with the latency of the answer


class Interruptions:
    """Finds them. `possible` says whether every GPU that serves can be interrupted by light batches."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.possible = False

    def replan(self, gpus: list[Gpu], light: Queue, heavy: Queue) -> None:
        """`gpus` are those that serve."""
        self.possible = self._cluster.config.preempt and all(
            may_interrupt(gpu, light) and gpu.exec_table(heavy).boundaries_ns for gpu in gpus
        )

    def best(self, light: Queue, most: int, now_ns: int) -> Interruption | None:
        """The batch of at most `most` requests on the GPU with the most time to spare; None: none gains."""
        found: Interruption | None = None
        greatest = 0
        for gpu in light.instance.resident_on.values():
            running = gpu.exec.ordinary()
            if running is None or running.queue is light:
                continue  # another light batch would only be delayed
            start_ns = interrupts_at_ns(self._cluster, gpu, light, now_ns, promised=True)
            if start_ns is None:
                continue
            chosen = self._on(gpu, light, most, start_ns)
            if chosen is None:
                continue
            spare_ns = self._spare_ns(gpu, chosen, light)
            if spare_ns is not None and (found is None or spare_ns > greatest):
                found, greatest = chosen, spare_ns
        return found

    def _on(self, gpu: Gpu, light: Queue, most: int, start_ns: int) -> Interruption | None:
        """The largest batch that may interrupt there and is in time."""
        table, requests = gpu.exec_table(light), light.requests
        urgent_ns = gpu.worker.prepared[light.instance.name].urgent_ns
        back_ns = gpu.worker.returns.margin_ns
        for batch in range(min(most, len(requests)), 0, -1):
            batch_class = table.class_for(batch)
            if table.profiled_ns[batch_class] > urgent_ns:
                continue
            ends_ns = start_ns + table.estimators[batch_class].margin_ns + back_ns
            rest_ns = requests[0].deadline_ns - requests[0].due_ns
            first = first_from(requests, ends_ns - rest_ns)
            taken = min(batch, len(requests) - first)
            if taken == batch:
                return Interruption(gpu, first, taken, start_ns, ends_ns)
        return None

    def _spare_ns(self, gpu: Gpu, chosen: Interruption, light: Queue) -> int | None:
        """The least time that a request of the heavy batches there has left; None if they would lose more."""
        table = gpu.exec_table(light)
        pause_ns = table.estimators[table.class_for(chosen.taken)].expected_ns
        paused = [action for action in gpu.exec.outstanding if not action.priority]
        if not may_pause(paused, pause_ns):
            return None
        returns_ns = gpu.worker.returns.expected_ns
        spare = [
            request.deadline_ns - action.predicted_end_ns - returns_ns
            for action in paused
            for request in action.requests
        ]
        lost = sum(0 <= each < pause_ns for each in spare)
        if lost:
            # What waits could begin when the heavy batches end.
            after_ns = gpu.exec.busy_until_ns + chosen.ends_ns - chosen.start_ns
            taken = light.requests[chosen.first : chosen.first + chosen.taken]
            if sum(each.deadline_ns < after_ns for each in taken) <= lost:
                return None
        return min(spare, default=NS_PER_S) - pause_ns
