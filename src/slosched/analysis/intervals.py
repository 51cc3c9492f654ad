"""When the executors of the GPUs did what, and when that was predicted: from an action log's columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slosched.codes import ActionType

#: The two executors that take time, and the actions of each.
EXECUTORS = (
    ("exec", (ActionType.INFER,)),
    ("weights", (ActionType.LOAD_WEIGHTS, ActionType.EVICT_WEIGHTS)),
)

#: What became of an action. `done`: weights have no deadline.
IN_TIME, PARTLY, LATE, FAILED, DONE = range(5)
OUTCOMES = ("in time", "partly late", "late", "failed", "done")

Column = NDArray[Any]
Columns = Mapping[str, Column]


class Gpu(NamedTuple):
    """One GPU of a cluster."""

    worker_id: int
    gpu_id: int

    def __str__(self) -> str:
        return f"W{self.worker_id}-GPU{self.gpu_id}"


def gpus_of(actions: Columns) -> list[Gpu]:
    """The GPUs that have actions, in order."""
    pairs = np.unique(np.stack((actions["worker_id"], actions["gpu_id"])), axis=1)
    return [Gpu(int(worker_id), int(gpu_id)) for worker_id, gpu_id in pairs.T]


class Intervals:
    """What one executor of one GPU did, and what was predicted of it; an entry for each row.

    `rows` are columns of the action log, and `sent`, when each was sent, on the scale of `t`. `begin` and
    `end` hold where `ran`; what did not run (a refusal, an eviction) has both where its result came in.
    `due_begin` and `due` hold where `expects`. `outcome` is a place in OUTCOMES. `clipped` is by how much the
    begin of an action was moved, because its worker reported one before the end of the action ahead.
    Predictions whose `lane` is the same do not overlap; there are `lanes` of them. Actions whose ids are in
    `interrupted` ran in segments between which others ran: they are not clipped, and clip nothing.
    """

    def __init__(self, rows: Columns, interrupted: Collection[int] = ()) -> None:
        sent, status = rows["sent"], rows["status"]
        self.took = took = rows["worker_exec_duration"]
        self.ran = (took > 0) & (rows["worker_exec_complete"] > 0)
        self.end = np.where(self.ran, sent + rows["worker_exec_complete"], rows["t"])
        self.begin = np.where(self.ran, self.end - took, self.end)
        self.expects = rows["expected_exec_complete"] > 0
        self.due = sent + rows["expected_exec_complete"]
        self.due_begin = self.due - rows["expected_exec_duration"]
        self.outcome = np.full(len(sent), PARTLY)
        self.outcome[rows["goodput"] >= took] = IN_TIME
        self.outcome[(rows["goodput"] <= 0) & self.ran] = LATE
        self.outcome[rows["action_type"] != ActionType.INFER] = DONE
        self.outcome[status != 0] = FAILED
        whole = self.ran
        if interrupted:
            whole = whole & ~np.isin(rows["action_id"], list(interrupted))
        self._clip(whole)
        self.lane = _lanes(self.due_begin, self.due, self.expects)
        self.lanes = int(self.lane.max()) + 1

    def _clip(self, whole: Column) -> None:
        """One executor does one thing at a time, whatever the clocks say; for the rows in `whole`."""
        slices = np.flatnonzero(whole)
        slices = slices[np.argsort(self.begin[slices], kind="stable")]
        begin, end = self.begin[slices], self.end[slices]
        self.clipped = np.zeros(len(self.begin), np.int64)
        if len(slices) > 1:
            free = np.maximum.accumulate(end)[:-1]
            later = np.maximum(begin[1:], free)
            self.clipped[slices[1:]] = later - begin[1:]
            self.begin[slices[1:]] = later
            self.end[slices[1:]] = np.maximum(end[1:], later)


def _lanes(begin: Column, end: Column, there: Column) -> Column:
    """Lanes for intervals so that none overlap in a lane; -1 where there is no interval.

    Predictions were made at different moments, later ones with more knowledge, so they may overlap.
    """
    lanes = np.full(len(begin), -1)
    free: list[int] = []
    rows = np.flatnonzero(there)
    for row in rows[np.lexsort((end[rows], begin[rows]))].tolist():
        at = int(begin[row])
        lane = next((lane for lane, since in enumerate(free) if since <= at), len(free))
        if lane == len(free):
            free.append(0)
        free[lane] = int(end[row])
        lanes[row] = lane
    return lanes
