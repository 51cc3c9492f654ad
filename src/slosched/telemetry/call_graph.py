"""The calls of a run as a graph: which call asked for which, when, and what it awaited.

It is read from calls.tsv and call_parts.tsv, with times in wall-clock ns. A call arrives after its parent, so
its id is above the parent's and the graph is a forest. A call whose parent has no row (the controller was
killed while it ran) is a root that says so (`orphan`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.call_messages import MOST_CHILDREN
from slosched.telemetry.call_log import COLUMNS, read_call_log
from slosched.telemetry.call_part_log import read_call_part_log
from slosched.telemetry.log_lines import MalformedLog

Rows = NDArray[np.intp]
#: Columns of a whole log that are in memory at once where some rows are wanted.
_AT_ONCE = 4


@dataclass(slots=True)
class Part:
    """What a call ran without a pause. It ended with a suspension until all of `awaits` were answered.

    `awaits` are ranges of the call's children, both ends included; none: it was the last part.
    """

    begin_ns: int
    end_ns: int
    awaits: list[tuple[int, int]]

    @property
    def ran_ns(self) -> int:
        return self.end_ns - self.begin_ns

    def awaited(self) -> Iterator[int]:
        """The numbers of the children, in order."""
        for first, last in self.awaits:
            yield from range(first, last + 1)


@dataclass(slots=True, eq=False)
class RecordedCall:
    """One call. The columns of calls.tsv, with times of day; `start_ns` is None of one that did not begin.

    `children` are by their number, in the order in which they were asked for. A call that is idempotent may
    have begun again after its process ended: `children` and `parts` are of its last try, and `earlier` are the
    children of those before.
    """

    call_id: int
    parent_id: int
    child: int
    asked_ns: int
    request_id: int
    user_id: int
    function: str
    model_id: int
    size_class: int
    code: int
    slo_ns: int
    arrival_ns: int
    start_ns: int | None
    end_ns: int
    exec_ns: int
    suspended_ns: int
    predicted_ns: int
    in_bytes: int
    out_bytes: int
    worker_id: int
    gpu_id: int
    cold: bool
    on_gpu: bool
    near: str
    near_child: int
    orphan: bool = False
    children: dict[int, RecordedCall] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    earlier: list[RecordedCall] = field(default_factory=list)

    @property
    def latency_ns(self) -> int:
        return self.end_ns - self.arrival_ns

    def asked_in_parts(self) -> list[list[RecordedCall]]:
        """For each part the children that were asked for in it, by number.

        A child that was asked for after just as much of the run as a part ended with came after the suspension
        if what the part awaited had been answered when it arrived.
        """
        asked: list[list[RecordedCall]] = [[] for _ in self.parts]
        waiting = deque(self.children[n] for n in sorted(self.children))
        ran_ns = 0
        for part, in_part in zip(self.parts, asked, strict=True):
            ran_ns += part.ran_ns
            last = self.last_awaited(part)
            while waiting and (
                part is self.parts[-1]
                or waiting[0].asked_ns < ran_ns
                or (
                    waiting[0].asked_ns == ran_ns
                    and (last is None or waiting[0].arrival_ns < last.end_ns)
                )
            ):
                in_part.append(waiting.popleft())
        return asked

    def last_awaited(self, part: Part) -> RecordedCall | None:
        """The child whose answer ended the suspension after `part`; None if none is known."""
        awaited = [self.children[n] for n in part.awaited() if n in self.children]
        return max(awaited, key=lambda child: (child.end_ns, child.child), default=None)


@dataclass(frozen=True)
class CallGraph:
    """Calls by id, parents before their children. `roots` are those of clients, and orphans."""

    calls: dict[int, RecordedCall]
    roots: list[RecordedCall]

    def below(self, root: RecordedCall) -> Iterator[RecordedCall]:
        """The call and all its descendants: each before its children, these by number."""
        waiting = [root]
        while waiting:
            call = waiting.pop()
            yield call
            waiting += [call.children[n] for n in sorted(call.children, reverse=True)]
            waiting += call.earlier[::-1]


def read_call_graph(
    calls_at: Path, parts_at: Path | None, *, rows: Rows | None = None
) -> CallGraph:
    """Return the graph of the logs at `calls_at` and `parts_at`, or of some `rows` of the former.

    Raises MalformedLog if a file is damaged, or a call is said to be its own ancestor.
    """
    calls = _calls(calls_at, _columns(calls_at, rows))
    roots = []
    for call in calls.values():
        if call.parent_id < 0:
            roots.append(call)
            continue
        if call.parent_id >= call.call_id:
            raise MalformedLog(
                f"{calls_at}: call {call.call_id} has the later {call.parent_id} as its parent"
            )
        parent = calls.get(call.parent_id)
        if parent is None:
            call.orphan = True
            roots.append(call)
        else:
            if call.child in parent.children:
                parent.earlier.append(parent.children[call.child])
            parent.children[call.child] = call
    if parts_at is not None:
        _add_parts(parts_at, calls)
    return CallGraph(calls, roots)


def _columns(path: Path, rows: Rows | None) -> dict[str, list[Any]]:
    """The columns of the log, by call. With `rows` few whole columns are in memory at a time."""
    names = tuple(COLUMNS)
    step = len(names) if rows is None else _AT_ONCE
    taken: dict[str, NDArray[Any]] = {}
    for first in range(0, len(names), step):
        log = read_call_log(path, only=names[first : first + step])
        taken |= {name: c if rows is None else c[rows] for name, c in log.columns.items()}
    order = np.argsort(taken["call_id"], kind="stable")
    return {name: column[order].tolist() for name, column in taken.items()}


def _calls(path: Path, columns: dict[str, list[Any]]) -> dict[int, RecordedCall]:
    calls: dict[int, RecordedCall] = {}
    for at, call_id in enumerate(columns["call_id"]):
        end_ns, start = columns["t"][at], columns["start"][at]
        arrival_ns = end_ns - columns["latency"][at]
        if call_id in calls:
            raise MalformedLog(f"{path}: two rows are of call {call_id}")
        calls[call_id] = RecordedCall(
            call_id=call_id,
            parent_id=columns["parent_id"][at],
            child=columns["child"][at],
            asked_ns=columns["asked"][at],
            request_id=columns["request_id"][at],
            user_id=columns["user_id"][at],
            function=columns["function"][at],
            model_id=columns["model_id"][at],
            size_class=columns["size_class"][at],
            code=columns["code"][at],
            slo_ns=columns["slo"][at],
            arrival_ns=arrival_ns,
            start_ns=arrival_ns + start if start >= 0 else None,
            end_ns=end_ns,
            exec_ns=columns["exec"][at],
            suspended_ns=columns["suspended"][at],
            predicted_ns=columns["predicted_exec"][at],
            in_bytes=columns["in_bytes"][at],
            out_bytes=columns["out_bytes"][at],
            worker_id=columns["worker_id"][at],
            gpu_id=columns["gpu_id"][at],
            cold=bool(columns["cold"][at]),
            on_gpu=bool(columns["on_gpu"][at]),
            near=columns["near"][at],
            near_child=columns["near_child"][at],
        )
    return calls


def _add_parts(path: Path, calls: dict[int, RecordedCall]) -> None:
    log = read_call_part_log(path)
    wanted = np.flatnonzero(np.isin(log["call_id"], np.fromiter(calls, np.int64, len(calls))))
    # In the order of the file, in which a call's parts are in the order of time.
    order = wanted[np.argsort(log["call_id"][wanted], kind="stable")]
    names = ("t", "call_id", "part", "ran", "first", "last")
    for end_ns, call_id, number, ran, first, last in zip(
        *(log[name][order].tolist() for name in names), strict=True
    ):
        parts = calls[call_id].parts
        if number == 0 and parts and (len(parts) > 1 or parts[0].end_ns != end_ns):
            parts.clear()  # it began again
        if number == len(parts):
            parts.append(Part(end_ns - ran, end_ns, []))
        elif number != len(parts) - 1:
            # The disk did not take a row: from there on nothing is known of this call.
            continue
        if first >= 0:
            if last - first >= MOST_CHILDREN:
                raise MalformedLog(
                    f"{path}: a part of call {call_id} awaits {last - first + 1} children"
                )
            parts[-1].awaits.append((first, last))


@dataclass(frozen=True)
class GraphFacts:
    """A call and its descendants in numbers. Times in ns.

    `critical_ns` is the least time that any number of slots would need: the longest chain of runs, each begun
    when its parent asked for it, and each suspension until the last of what it awaited. `makespan_ns` is how
    long it took.
    """

    calls: int
    depth: int
    failed: int
    cold: int
    ran_ns: int
    suspended_ns: int
    critical_ns: int
    makespan_ns: int
    in_bytes: int
    out_bytes: int


def facts_of(graph: CallGraph, root: RecordedCall) -> GraphFacts:
    """The numbers of `root` and what is below it."""
    calls = list(graph.below(root))
    depth: dict[int, int] = {}
    critical: dict[int, int] = {}
    for call in calls:
        depth[call.call_id] = depth.get(call.parent_id, 0) + 1
    for call in reversed(calls):
        critical[call.call_id] = _critical_ns(call, critical)
    return GraphFacts(
        calls=len(calls),
        depth=max(depth.values()),
        failed=sum(call.code != 0 for call in calls),
        cold=sum(call.cold for call in calls),
        ran_ns=sum(call.exec_ns for call in calls),
        suspended_ns=sum(call.suspended_ns for call in calls),
        critical_ns=critical[root.call_id],
        makespan_ns=root.latency_ns,
        in_bytes=sum(call.in_bytes for call in calls),
        out_bytes=sum(call.out_bytes for call in calls),
    )


def _critical_ns(call: RecordedCall, critical: dict[int, int]) -> int:
    """From its begin to its end with a slot for every call, where `critical` has that of its children."""
    if not call.parts:
        return call.exec_ns
    now_ns = ran_ns = 0
    ends: dict[int, int] = {}
    for part, asked in zip(call.parts, call.asked_in_parts(), strict=True):
        for child in asked:
            after_ns = min(max(0, child.asked_ns - ran_ns), part.ran_ns)
            ends[child.child] = now_ns + after_ns + critical[child.call_id]
        now_ns, ran_ns = now_ns + part.ran_ns, ran_ns + part.ran_ns
        now_ns = max([now_ns, *(ends[n] for n in part.awaited() if n in ends)])
    return now_ns
