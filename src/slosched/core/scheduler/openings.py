"""When a GPU takes its next Infer: before the running one ends, and no earlier than that needs.

Two findings of the policy study stand behind this file. Sending the next action before the running
one ends is worth 15 to 20 points of satisfaction at 2,400 requests/s; binding it earlier than that
costs 1.5 points per millisecond, because a later decision knows more arrivals. So a GPU is *open*
while at most one action is outstanding, from the predicted end minus the lead; an overdue one is not,
until it reports.
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Gpu

MAX_OUTSTANDING = 2
#: On top of the measured transit: timers fire a little late, decisions take a little time.
_LEAD_SLACK_NS = 50_000


class Openings:
    """Which GPUs can be given an Infer now, and when the next one will be."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        assert cluster.config.schedule_ahead_ns is not None
        self._ahead_ns = cluster.config.schedule_ahead_ns

    def opens_ns(self, gpu: Gpu, now_ns: int) -> int | None:
        """When `gpu` opens (a past time: it is open). None: only a report can open it."""
        outstanding = gpu.exec.outstanding
        if not outstanding:
            return now_ns
        if len(outstanding) >= MAX_OUTSTANDING:
            return None
        worker = gpu.worker
        end_ns = gpu.exec.busy_until_ns
        # Its report is later than nine in ten are: something is wrong there, send nothing more.
        if now_ns > end_ns + worker.returns.margin_ns + outstanding[0].expected_duration_ns // 8:
            return None
        return end_ns - min(worker.transit.margin_ns + _LEAD_SLACK_NS, self._ahead_ns)

    def open_gpus(self, now_ns: int) -> list[tuple[int, int, Gpu]]:
        """Open GPUs as (predicted start, index, gpu), soonest first."""
        found = []
        for gpu in self._cluster.gpus.values():
            opens_ns = self.opens_ns(gpu, now_ns)
            if opens_ns is not None and opens_ns <= now_ns:
                found.append((self._cluster.earliest_start_ns(gpu, now_ns), gpu.index, gpu))
        found.sort()
        return found

    def next_opening_ns(self, now_ns: int) -> int | None:
        """When the next GPU that is closed now opens by itself."""
        soonest: int | None = None
        for gpu in self._cluster.gpus.values():
            opens_ns = self.opens_ns(gpu, now_ns)
            if (
                opens_ns is not None
                and opens_ns > now_ns
                and (soonest is None or opens_ns < soonest)
            ):
                soonest = opens_ns
        return soonest
