"""Hosts whose worker has as many unfinished calls as it may have.

Such a worker refuses new calls (TOO_MANY_CALLS) until one of its calls ends. So its host gets none until then:
they go to other hosts, or wait. Calls that are suspended there go on meanwhile, as soon as their children are
answered.

Where these children need a host themselves, and all that could run them are full, nothing would ever end. Then
children of one call after the other, those due last first, are answered with the worker's refusal, until a
call can go on: it sees that error. The others wait.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import Gpu, Request, RequestState


class FullHosts:
    """`full` has them, by their index. `end` ends a request, wherever it is: (request, code, words)."""

    def __init__(
        self,
        cluster: Cluster,
        end: Callable[[Request, int, str], None],
    ) -> None:
        self._cluster, self._end = cluster, end
        self.full: dict[int, Gpu] = {}
        self._reasons: dict[int, str] = {}  # the refusal of each

    def refused(self, gpu: Gpu, reason: str) -> bool:
        """The worker of `gpu` refused a call with TOO_MANY_CALLS. True if the call may wait for a while."""
        if not gpu.host or not _has_calls(gpu):
            return False  # a GPU's models are served all the same; and what is unknown here may never end
        self.full[gpu.index], self._reasons[gpu.index] = gpu, reason
        return True

    def ended(self, gpu: Gpu) -> None:
        """A call that had begun ended on the worker of `gpu`, which has room for another one."""
        for each in gpu.worker.gpus:
            self._open(each.index)

    def _open(self, index: int) -> None:
        self.full.pop(index, None)
        self._reasons.pop(index, None)

    def plan(self, children: dict[int, Request], *, loading: bool) -> None:
        """What could be sent was sent: see whether any of `children`, calls without an answer, can ever end.

        `loading`: some functions are being made ready.
        """
        for index, gpu in list(self.full.items()):
            if self._cluster.gpus.get(index) is not gpu or not _has_calls(gpu):
                self._open(index)
        if not self.full or loading or self._something_runs():
            return
        stuck = [
            child
            for child in children.values()
            if child.state is RequestState.QUEUED
            and child.instance.resident_on
            and self.full.keys() >= child.instance.resident_on.keys()
        ]
        if stuck and not self._cluster.slices.under_way:
            self._cluster.slices.begin(self._end_stuck(stuck))

    def _something_runs(self) -> bool:
        """Whether anything is under way that may end a call."""
        for gpu in self._cluster.gpus.values():
            if gpu.exec.outstanding or gpu.load.outstanding:
                return True
            for action in gpu.suspended.values():
                call = action.requests[0].call
                if call is not None and not call.children:
                    return True  # it is about to go on
        return False

    def _end_stuck(self, stuck: list[Request]) -> Work:
        stuck.sort(key=_after_all, reverse=True)
        for child in stuck:
            if self._something_runs():
                return
            if child.state is RequestState.QUEUED:
                reasons = [self._reasons.get(index, "") for index in child.instance.resident_on]
                words = next((each for each in reasons if each), "its host is full")
                self._end(child, Code.TOO_MANY_CALLS, f"no call can go on: {words}")
                yield ANSWER


def _has_calls(gpu: Gpu) -> bool:
    """Whether its worker has calls that are known here, so that one of them will end."""
    return any(each.exec.outstanding or each.suspended for each in gpu.worker.gpus)


def _after_all(child: Request) -> tuple[int, int]:
    """Children of one call stand together, those of the call that is due last behind all others."""
    parent = child.parent
    return (0, 0) if parent is None else (parent.due_ns, parent.key)
