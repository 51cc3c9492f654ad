"""The calls of functions in a trace: what ran in each slot, arrows from parent to child, and each call's story.

A device's slots are tracks of its worker. A call may run in another slot after each suspension, and the logs do
not say in which, so its parts go to the first track that is free: as many tracks as calls ran at once. Arrows
lead from where a parent asked for a child to the child's begin, and from the end of the child that a parent
awaited last to where the parent went on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.intervals import Gpu
from slosched.analysis.runs import find_log
from slosched.analysis.trace_events import CONTROLLER, name_process, name_track, worker_pid
from slosched.analysis.trace_file import TraceFile
from slosched.codes import code_name
from slosched.telemetry import call_log, call_part_log
from slosched.telemetry.call_graph import CallGraph, Part, RecordedCall, read_call_graph
from slosched.units import NS_PER_US

#: The first track of calls; those of actions have lower numbers.
_FIRST_TRACK = 1_000
_TRACKS_A_DEVICE = 1_000
#: Two parts that follow each other in a slot may overlap by this much: a worker's clock is not known exactly.
_CLOCK_NS = 20 * NS_PER_US

_TIMES = ("t", "latency", "worker_id", "gpu_id")

Event = dict[str, Any]
Timed = tuple[int, Event]


@dataclass(frozen=True)
class TracedCalls:
    """The calls of a window. `start_ns` is the start of the run, in wall-clock ns."""

    graph: CallGraph
    start_ns: int

    def __len__(self) -> int:
        return len(self.graph.calls)


class CallLog:
    """When the calls of a run were unfinished, and on which device; `arrived` and `ended` are wall-clock ns."""

    def __init__(self, run_dir: Path) -> None:
        self._path = find_log(run_dir, call_log.FILE_NAME)
        self._parts = find_log(run_dir, call_part_log.FILE_NAME)
        columns = {name: np.empty(0, np.int64) for name in _TIMES}
        if self._path is not None:
            columns |= call_log.read_call_log(self._path, only=_TIMES).columns
        self.ended = columns["t"]
        self.arrived = self.ended - columns["latency"]
        self._worker, self._gpu = columns["worker_id"], columns["gpu_id"]

    def span(self) -> list[tuple[int, int]]:
        """When the first call arrived and the last one ended; [] without calls."""
        return [(int(self.arrived.min()), int(self.ended.max()))] if len(self.ended) else []

    def on(self, gpus: Sequence[Gpu]) -> NDArray[np.bool_]:
        """True for the calls on these devices; all, if `gpus` is empty."""
        if not gpus:
            return np.ones(len(self.ended), bool)
        chosen = [(self._worker == g.worker_id) & (self._gpu == g.gpu_id) for g in gpus]
        found: NDArray[np.bool_] = np.any(chosen, axis=0)
        return found

    def within(self, start_ns: int, span: tuple[int, int], gpus: Sequence[Gpu]) -> TracedCalls:
        """The calls that were unfinished at some time of `span` (ns after `start_ns`). Raises MalformedLog."""
        if self._path is None:
            return TracedCalls(CallGraph({}, []), start_ns)
        inside = (self.ended - start_ns >= span[0]) & (self.arrived - start_ns < span[1])
        rows = np.flatnonzero(inside & self.on(gpus))
        return TracedCalls(read_call_graph(self._path, self._parts, rows=rows), start_ns)


def call_events(
    file: TraceFile, calls: TracedCalls, *, named: set[int], flows: bool, stories: int
) -> None:
    """Add the tracks of the slots and, of at most `stories` calls, how each one waited, ran and was suspended.

    `named` are the workers whose processes have a name already.
    """
    graph, start_ns = calls.graph, calls.start_ns
    places = _places(graph)
    for worker_id, gpu_id, lanes in _devices(graph, places):
        pid = worker_pid(worker_id)
        if worker_id not in named:
            named.add(worker_id)
            name_process(file, pid, f"worker {worker_id}")
        for lane in range(lanes):
            name_track(file, pid, _track(gpu_id, lane), f"device {gpu_id} calls {lane + 1}")
    events: list[Timed] = []
    for call in graph.calls.values():
        events += _runs(call, places, start_ns)
        if flows:
            events += _arrows(call, places, start_ns)
    for call in _with_story(graph, stories):
        events += _story(call, start_ns)
    # The sort is stable: what begins and ends at one time stays in order.
    for _, event in sorted(events, key=itemgetter(0)):
        file.add_dict(event)


# ----------------------------------------------------------------------------------- slots

#: The track of each part and when it begins there, by (call, number of the part).
Places = Mapping[tuple[int, int], tuple[int, int]]


def _places(graph: CallGraph) -> dict[tuple[int, int], tuple[int, int]]:
    """The lane of each part on its device, the first one that is free, and its begin there."""
    by_device: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for call in graph.calls.values():
        for number, part in enumerate(call.parts):
            spans = by_device.setdefault((call.worker_id, call.gpu_id), [])
            spans.append((part.begin_ns, part.end_ns, call.call_id, number))
    places: dict[tuple[int, int], tuple[int, int]] = {}
    for spans in by_device.values():
        free: list[int] = []
        busy: list[tuple[int, int]] = []  # (from when on another part may follow, lane)
        ends: list[int] = []  # of each lane
        for begin_ns, end_ns, call_id, number in sorted(spans):
            while busy and busy[0][0] <= begin_ns:
                heappush(free, heappop(busy)[1])
            if not free:
                heappush(free, len(ends))
                ends.append(0)
            lane = heappop(free)
            places[call_id, number] = lane, min(max(begin_ns, ends[lane]), end_ns)
            ends[lane] = max(ends[lane], end_ns)
            heappush(busy, (end_ns - min(_CLOCK_NS, (end_ns - begin_ns) // 2), lane))
    return places


def _devices(graph: CallGraph, places: Places) -> list[tuple[int, int, int]]:
    """(worker, device, lanes) of each device that ran a call, in order."""
    lanes: dict[tuple[int, int], int] = {}
    for (call_id, _), (lane, _) in places.items():
        call = graph.calls[call_id]
        device = call.worker_id, call.gpu_id
        lanes[device] = max(lanes.get(device, 0), lane + 1)
    return [(worker_id, gpu_id, count) for (worker_id, gpu_id), count in sorted(lanes.items())]


def _runs(call: RecordedCall, places: Places, start_ns: int) -> Iterator[Timed]:
    """A slice for each part of the call."""
    colour = "good" if call.code == 0 and _in_time(call) else "terrible" if call.code else "bad"
    for number, part in enumerate(call.parts):
        begin_ns = places[call.call_id, number][1] - start_ns
        event = {
            "name": call.function + _outcome(call),
            "cat": "call",
            "ph": "X",
            **_at(call, number, places),
            "ts": begin_ns / 1000,
            "dur": (part.end_ns - start_ns - begin_ns) / 1000,
            "cname": colour,
            "args": {
                "call": call.call_id,
                "parent": call.parent_id,
                "child": call.child,
                "part": number,
                "parts": len(call.parts),
                "awaits": sum(last - first + 1 for first, last in part.awaits),
                "size_class": call.size_class,
                "outcome": code_name(call.code),
            },
        }
        yield begin_ns, event


def _at(call: RecordedCall, number: int, places: Places) -> Event:
    lane = places[call.call_id, number][0]
    return {"pid": worker_pid(call.worker_id), "tid": _track(call.gpu_id, lane)}


def _track(gpu_id: int, lane: int) -> int:
    return _FIRST_TRACK + gpu_id * _TRACKS_A_DEVICE + lane


def _in_time(call: RecordedCall) -> bool:
    return call.slo_ns <= 0 or call.latency_ns <= call.slo_ns


def _outcome(call: RecordedCall) -> str:
    """What a name ends in, as those of actions do."""
    if call.code:
        return f" failed: {code_name(call.code)}"
    return "" if _in_time(call) else " late"


# ---------------------------------------------------------------------------------- arrows


def _arrows(call: RecordedCall, places: Places, start_ns: int) -> Iterator[Timed]:
    """From the call to each of its children, and back from those that it awaited last."""
    ran_ns = 0
    for number, (part, asked) in enumerate(zip(call.parts, call.asked_in_parts(), strict=True)):
        begin_ns = places[call.call_id, number][1]
        for child in asked:
            if child.parts:
                at_ns = part.begin_ns + child.asked_ns - ran_ns
                at_ns = min(max(at_ns, begin_ns), part.end_ns)
                yield from _arrow("call", (call, number, at_ns), (child, 0), places, start_ns)
        ran_ns += part.ran_ns
        last = call.last_awaited(part)
        if last is not None and last.parts and number + 1 < len(call.parts):
            back = last, len(last.parts) - 1, last.parts[-1].end_ns
            yield from _arrow("answer", back, (call, number + 1), places, start_ns)


def _arrow(
    name: str,
    tail: tuple[RecordedCall, int, int],
    head: tuple[RecordedCall, int],
    places: Places,
    start_ns: int,
) -> Iterator[Timed]:
    """An arrow goes forward in time: one that would not, as two clocks differ, begins where it ends."""
    call, number, at_ns = tail
    until_ns = places[head[0].call_id, head[1]][1]
    at_ns = min(at_ns, until_ns)
    if at_ns < places[call.call_id, number][1]:
        return
    child = head[0] if name == "call" else call
    both = {"name": name, "cat": name, "id": child.call_id}
    ends = (("s", at_ns, _at(call, number, places)), ("f", until_ns, _at(*head, places)))
    for phase, time_ns, place in ends:
        event = both | place | {"ph": phase, "ts": (time_ns - start_ns) / 1000}
        yield time_ns - start_ns, event | ({"bp": "e"} if phase == "f" else {})


# --------------------------------------------------------------------------------- stories


def _with_story(graph: CallGraph, most: int) -> Iterator[RecordedCall]:
    """At most `most` calls, as whole trees: roots are taken evenly."""
    roots = graph.roots
    count = min(most, len(roots))
    for place in np.unique(np.linspace(0, len(roots) - 1, count).astype(np.int64)).tolist():
        for call in graph.below(roots[place]):
            if most <= 0:
                return
            most -= 1
            yield call


def _story(call: RecordedCall, start_ns: int) -> Iterator[Timed]:
    """One call from its arrival to its answer, and within it how it waited, ran and was suspended."""
    begin_ns, end_ns = call.arrival_ns - start_ns, call.end_ns - start_ns
    about = {"cat": "call", "id": call.call_id, "pid": CONTROLLER, "tid": 0}
    whole = about | {"name": f"call, {call.function}{_outcome(call)}"}
    args = {
        "call": call.call_id,
        "parent": call.parent_id,
        "children": len(call.children),
        "slo_us": call.slo_ns / 1000,
        "ran_us": call.exec_ns / 1000,
        "predicted_us": call.predicted_ns / 1000,
        "in_bytes": call.in_bytes,
        "out_bytes": call.out_bytes,
        "cold": call.cold,
        "outcome": code_name(call.code),
    }
    yield begin_ns, whole | {"ph": "b", "ts": begin_ns / 1000, "args": args}
    at_ns = begin_ns
    for name, until_ns in _states(call):
        # By its worker's clock it may have begun before it arrived, or have ended after its answer.
        until_ns = min(max(at_ns, until_ns - start_ns), end_ns)
        if until_ns > at_ns:
            yield at_ns, about | {"name": name, "ph": "b", "ts": at_ns / 1000}
            yield until_ns, about | {"name": name, "ph": "e", "ts": until_ns / 1000}
        at_ns = until_ns
    yield end_ns, whole | {"ph": "e", "ts": end_ns / 1000}


def _states(call: RecordedCall) -> Iterator[tuple[str, int]]:
    """(what it did, until when), one after the other."""
    if call.start_ns is None:
        yield "waits in vain", call.end_ns
        return
    yield "waits", call.start_ns
    before: Part | None = None
    for part in call.parts:
        if before is not None:
            last = call.last_awaited(before)
            if last is not None and last.end_ns < part.begin_ns:
                yield "awaits", last.end_ns
                yield "waits for a slot", part.begin_ns
            else:
                yield "awaits", part.begin_ns
        yield "runs", part.end_ns
        before = part
    if call.code:
        yield "awaits" if before is not None and before.awaits else "runs", call.end_ns
