"""When a GPU takes its next Infer: before the running one ends, and no earlier than that needs.

Two findings of the policy study stand behind this file. Sending the next action before the running
one ends is worth 15 to 20 points of satisfaction at 2,400 requests/s; binding it earlier than that
costs 1.5 points per millisecond, because a later decision knows more arrivals. So a GPU is *open*
while at most one action is outstanding, from the predicted end minus the lead; an overdue one is not,
until it reports.

Only changes are examined: a GPU that the cluster reports is placed once, and one that opens by the passing of
time stands in a heap by that time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush, merge

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu, Worker

#: Added to the measured latency: timers fire a little late, decisions take a little time.
_LEAD_SLACK_NS = 50_000
#: More open GPUs than this are not taken up one by one when a request arrives.
_FEW = 8


class DispatchWindows:
    """Which GPUs can be given an Infer now, and when the next one can.

    `to_ask` are open GPUs that the policy has not asked since something about them changed. A policy
    that asks only those reports each (`asked`); one that asks all each time can ignore it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns
        self.to_ask: dict[int, Gpu] = {}  # by index, as below
        #: Open, and a start depends on the latency to the worker alone: (margin of that latency, index).
        self._near: list[tuple[int, int, Gpu]] = []
        self._near_margin_ns: dict[int, int] = {}
        self._soon: dict[int, Gpu] = {}  # open, and starts when the running one ends
        self.open: dict[int, Gpu] = {}  # both, after `refresh`
        #: When each closed GPU opens by the passing of time, by index; the heap also has stale entries.
        self._opens_ns: dict[int, int] = {}
        self._closed: list[tuple[int, int, Gpu]] = []
        #: Asked in vain, but with lower latencies it might not be.
        self._until_faster: dict[int, None] = {}
        self._changed = cluster.changes.follow_execs()
        self._paths_changed = cluster.changes.follow_paths()

    # -------------------------------------------------------------------------------- facts

    def _path_changed(self, worker: Worker) -> None:
        margin_ns = worker.transit.margin_ns
        for gpu in worker.gpus:
            index = gpu.index
            listed_ns = self._near_margin_ns.get(index)
            if index in self._opens_ns:
                self._close(gpu)
            elif index in self._soon or (listed_ns is not None and gpu.exec.outstanding):
                self._changed[index] = gpu  # with a lower latency it need not be open yet
            elif listed_ns is not None and listed_ns != margin_ns:
                self._unlist(index)
                self._list(gpu, margin_ns)
            if index in self._until_faster:
                del self._until_faster[index]
                self.to_ask[index] = gpu

    def _list(self, gpu: Gpu, margin_ns: int) -> None:
        self._near_margin_ns[gpu.index] = margin_ns
        insort(self._near, (margin_ns, gpu.index, gpu))

    def _unlist(self, index: int) -> None:
        margin_ns = self._near_margin_ns.pop(index)
        del self._near[bisect_left(self._near, (margin_ns, index))]

    def _close(self, gpu: Gpu) -> int:
        """`gpu` opens by the passing of time, at the time returned."""
        lead_ns = min(gpu.worker.transit.margin_ns + _LEAD_SLACK_NS, self._ahead_ns)
        opens_ns = gpu.exec.busy_until_ns - lead_ns
        if self._opens_ns.get(gpu.index) != opens_ns:
            self._opens_ns[gpu.index] = opens_ns
            heappush(self._closed, (opens_ns, gpu.index, gpu))
        return opens_ns

    def _now_open(self, gpu: Gpu, now_ns: int) -> None:
        self.open[gpu.index] = gpu
        margin_ns = gpu.worker.transit.margin_ns
        if gpu.exec.busy_until_ns <= now_ns + margin_ns:
            self._list(gpu, margin_ns)
        else:
            self._soon[gpu.index] = gpu
        self.to_ask[gpu.index] = gpu

    def _place(self, gpu: Gpu, now_ns: int) -> None:
        index = gpu.index
        if index in self.open:
            del self.open[index]
            if index in self._near_margin_ns:
                self._unlist(index)
            else:
                del self._soon[index]
            self._until_faster.pop(index, None)
            self.to_ask.pop(index, None)
        else:
            self._opens_ns.pop(index, None)
        outstanding = len(gpu.exec.outstanding)
        if outstanding >= gpu.exec.most or index not in self._cluster.gpus:
            return
        if gpu.held or gpu.runs_alone:
            return
        if outstanding < gpu.exec.width:
            self._now_open(gpu, now_ns)
        else:
            self._close(gpu)

    def refresh(self, now_ns: int) -> None:
        """Bring everything up to `now_ns`."""
        if self._paths_changed:
            for worker in self._paths_changed.values():
                self._path_changed(worker)
            self._paths_changed.clear()
        changed = self._changed
        if changed:
            for gpu in changed.values():
                self._place(gpu, now_ns)
            changed.clear()
        closed = self._closed
        while closed and closed[0][0] <= now_ns:
            opens_ns, index, gpu = heappop(closed)
            if self._opens_ns.get(index) == opens_ns:
                del self._opens_ns[index]
                self._now_open(gpu, now_ns)
        if self._soon:
            for gpu in list(self._soon.values()):
                margin_ns = gpu.worker.transit.margin_ns
                if gpu.exec.busy_until_ns <= now_ns + margin_ns:
                    del self._soon[gpu.index]
                    self._list(gpu, margin_ns)

    # ---------------------------------------------------------------------------- questions

    def open_gpus(self, now_ns: int) -> list[tuple[int, int, Gpu]]:
        """Open GPUs as (predicted start, index, gpu), soonest first."""
        self.refresh(now_ns)
        return list(self.in_order(now_ns))

    def in_order(self, now_ns: int) -> Iterator[tuple[int, int, Gpu]]:
        """The same one at a time, after `refresh`. Between two of them the caller may send actions, and
        nothing else. A GPU that does not report is placed anew, and asked, when it does, or when the
        return latency turns out to be longer.
        """
        soon = sorted((g.exec.busy_until_ns, i, g) for i, g in self._soon.items())
        near = ((now_ns + margin_ns, index, gpu) for margin_ns, index, gpu in self._near)
        for entry in merge(near, soon) if soon else near:
            if self._cluster.reports(entry[2], now_ns):
                yield entry

    def to_ask_in_order(self, now_ns: int) -> list[tuple[int, int, Gpu]]:
        """Those of `open_gpus` that are `to_ask`, after `refresh`."""
        if len(self.to_ask) == 1:
            ((index, gpu),) = self.to_ask.items()
            if not self._cluster.reports(gpu, now_ns):
                return []
            return [(self._cluster.earliest_start_ns(gpu, now_ns), index, gpu)]
        earliest_start_ns = self._cluster.earliest_start_ns
        found = [
            (earliest_start_ns(gpu, now_ns), index, gpu)
            for index, gpu in self.to_ask.items()
            if self._cluster.reports(gpu, now_ns)
        ]
        found.sort()
        return found

    def asked(self, gpu: Gpu, *, retry_when_faster: bool) -> None:
        """`gpu` was asked. `retry_when_faster`: some requests failed only for the latencies of its worker."""
        self.to_ask.pop(gpu.index, None)
        if retry_when_faster:
            self._until_faster[gpu.index] = None

    def ask_holders(self, holders: dict[int, Gpu]) -> bool:
        """Something new waits that `holders` could run. False, and nothing is done, if many are open.

        A closed one is asked anyway when it opens.
        """
        few, others = self.open, holders
        if len(holders) < len(few):
            few, others = holders, self.open
        if len(few) > _FEW:
            return False
        for index, gpu in few.items():
            if index in others:
                self.to_ask[index] = gpu
        return True

    def next_opening_ns(self, now_ns: int) -> int | None:
        """When the next closed GPU opens by the passing of time."""
        closed = self._closed
        # Not every policy has examined what opened since; a time in the past would wake it at once.
        if self._changed or self._paths_changed or (closed and closed[0][0] <= now_ns):
            self.refresh(now_ns)
        while closed and self._opens_ns.get(closed[0][1]) != closed[0][0]:
            heappop(closed)
        return closed[0][0] if closed else None
