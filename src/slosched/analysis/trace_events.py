"""The events of a trace, from columns of the logs. Shapes and letters are the Trace Event Format's.

Columns hold a row for each action (or request) of the window; times are ns after the start of the run.
Within a track the events are in the order of their times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.intervals import (
    EXECUTORS,
    FAILED,
    LATE,
    OUTCOMES,
    PARTLY,
    Intervals,
    gpus_of,
)
from slosched.analysis.stage_rows import StageRow
from slosched.analysis.trace_file import TraceFile, us
from slosched.codes import ActionType, code_name
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.verdicts import verdict_name

#: The controller's process in the trace; worker w is _FIRST_WORKER + w.
CONTROLLER = 1
_FIRST_WORKER = 10

#: Time between two values of a counter; longer if there would be more than _MOST_SAMPLES.
_QUEUE_STEP_NS = 10 * NS_PER_MS
_RATE_STEP_NS = 100 * NS_PER_MS
_MOST_SAMPLES = 5_000

# A colour for each outcome: chrome://tracing takes these names; Perfetto colours by the slice's name,
# its digits left out, which therefore ends in the outcome.
_COLOURS = ("good", "yellow", "bad", "terrible", "thread_state_iowait")
_PREDICTED_COLOUR = "grey"

Column = NDArray[Any]
Columns = Mapping[str, Column]
#: (begin, end) of each segment, by action id; times are ns after the start of the run.
Segments = Mapping[int, Sequence[tuple[int, int]]]
#: The stages of some requests, by the request's row; their times are wall-clock ns.
Stages = Mapping[int, Sequence[StageRow]]
#: An event, and its time in ns after the start of the run.
Timed = tuple[int, Mapping[str, Any]]


# ----------------------------------------------------------------------------------- actions


def action_events(
    file: TraceFile, actions: Columns, *, flows: bool, segments: Segments | None = None
) -> int:
    """Add the workers' processes and the tracks of their GPUs.

    An action in `segments` was interrupted, and is drawn as these. Returns how many actions were clipped: their
    worker said that they began before the one ahead of them had ended, which is the error of its clock.
    """
    clipped = 0
    tracks: dict[int, count[int]] = {}
    for gpu in gpus_of(actions):
        pid = worker_pid(gpu.worker_id)
        if pid not in tracks:
            tracks[pid] = count(1)
            name_process(file, pid, f"worker {gpu.worker_id}")
        on_gpu = (actions["worker_id"] == gpu.worker_id) & (actions["gpu_id"] == gpu.gpu_id)
        for executor, types in EXECUTORS:
            rows = np.flatnonzero(on_gpu & np.isin(actions["action_type"], types))
            if len(rows):
                chosen = {name: column[rows] for name, column in actions.items()}
                track = _Track(file, chosen, flows, segments or {})
                name = f"GPU{gpu.gpu_id} {executor}"
                clipped += track.actual(pid, next(tracks[pid]), name)
                for lane in range(track.lanes):
                    nth = "" if lane == 0 else f" {lane + 1}"
                    track.predicted(pid, next(tracks[pid]), f"{name}, predicted{nth}", lane)
    return clipped


class _Track:
    """What one executor of one GPU did, and what was predicted of it."""

    def __init__(self, file: TraceFile, rows: Columns, flows: bool, segments: Segments) -> None:
        self._file, self._segments = file, segments
        self._rows = rows
        self._at = at = Intervals(rows, segments)
        self.lanes = at.lanes
        self._flows = at.expects & at.ran if flows else np.zeros(len(at.ran), bool)

    def actual(self, pid: int, tid: int, name: str) -> int:
        """Add the track of what was done; returns how many slices were clipped."""
        name_track(self._file, pid, tid, name)
        where = f'"pid":{pid},"tid":{tid}'
        clipped = 0
        for begin, end, row, number in self._pieces():
            text, colour = self._named(row)
            head = f'{{"name":"{text}","cat":"actual",{where},"ts":{us(begin)}'
            tail = f'"cname":"{colour}","args":{self._args(row)}}}'
            if not self._at.ran[row]:
                self._file.add(f'{head},"ph":"i","s":"t",{tail}')
                continue
            self._file.add(f'{head},"ph":"X","dur":{us(end - begin)},{tail}')
            if self._flows[row] and not number:
                self._flow(row, where, begin, int(self._at.due_begin[row]), first=False)
            clipped += bool(self._at.clipped[row])
        return clipped

    def _interrupted(self, row: int) -> Sequence[tuple[int, int]]:
        return self._segments.get(int(self._rows["action_id"][row]), ())

    def _pieces(self) -> list[tuple[int, int, int, int]]:
        """(begin, end, row, number of the segment) of everything that was done, in the order of time."""
        at, pieces = self._at, []
        for row in np.argsort(at.begin, kind="stable").tolist():
            whole = ((int(at.begin[row]), int(at.end[row])),)
            for number, (begin, end) in enumerate(self._interrupted(row) or whole):
                pieces.append((begin, end, row, number))
        if self._segments:
            pieces.sort(key=lambda piece: piece[0])
        return pieces

    def predicted(self, pid: int, tid: int, name: str, lane: int) -> None:
        """Add the track of those predictions that are in `lane`."""
        name_track(self._file, pid, tid, name)
        where = f'"pid":{pid},"tid":{tid}'
        rows = np.flatnonzero(self._at.lane == lane)
        for row in rows[np.argsort(self._at.due_begin[rows], kind="stable")].tolist():
            begin, end = int(self._at.due_begin[row]), int(self._at.due[row])
            self._file.add(
                f'{{"name":"{self._what(row)}","cat":"predicted",{where},"ts":{us(begin)}'
                f',"ph":"X","dur":{us(end - begin)},"cname":"{_PREDICTED_COLOUR}"'
                f',"args":{{"action":{self._rows["action_id"][row]}}}}}'
            )
            if self._flows[row]:
                self._flow(row, where, begin, int(self._at.begin[row]), first=True)

    def _flow(self, row: int, where: str, at_ns: int, other_ns: int, *, first: bool) -> None:
        """One end of the arrow between prediction and action. It goes forward in time, always."""
        start = at_ns < other_ns or (at_ns == other_ns and first)
        phase = '"ph":"s"' if start else '"ph":"f","bp":"e"'
        action = self._rows["action_id"][row]
        self._file.add(
            f'{{"name":"prediction","cat":"prediction",{where},"ts":{us(at_ns)},{phase},"id":{action}}}'
        )

    def _named(self, row: int) -> tuple[str, str]:
        """The name of what was done, which ends in its outcome, and its colour."""
        rows, outcome = self._rows, int(self._at.outcome[row])
        text = self._what(row)
        if outcome == FAILED:
            return f"{text} failed: {code_name(int(rows['status'][row]))}", _COLOURS[outcome]
        suffix = f" {OUTCOMES[outcome]}" if outcome in (PARTLY, LATE) else ""
        return text + suffix, _COLOURS[outcome]

    def _what(self, row: int) -> str:
        """What was to be done. All inferences of one outcome are called alike but for their digits."""
        rows = self._rows
        text = f"model {rows['model_id'][row]}"
        if rows["action_type"][row] == ActionType.INFER:
            return f"{text}, batch {rows['batch_size'][row]}"
        return f"evict {text}" if rows["action_type"][row] == ActionType.EVICT_WEIGHTS else text

    def _args(self, row: int) -> str:
        rows = self._rows
        document = (
            f'{{"action":{rows["action_id"][row]},"model":{rows["model_id"][row]}'
            f',"batch":{rows["batch_size"][row]},"outcome":"{OUTCOMES[self._at.outcome[row]]}"'
            f',"status":{rows["status"][row]},"sent_us":{us(int(rows["sent"][row]))}'
        )
        if self._at.ran[row]:
            document += f',"exec_us":{us(int(self._at.took[row]))}'
        if self._at.expects[row]:
            document += f',"predicted_exec_us":{us(int(rows["expected_exec_duration"][row]))}'
        if self._at.ran[row] and self._at.expects[row]:
            behind = int(rows["sent"][row] + rows["worker_exec_complete"][row] - self._at.due[row])
            document += f',"ended_after_prediction_us":{us(behind)}'
        if self._at.clipped[row]:
            document += f',"clipped_us":{us(int(self._at.clipped[row]))}'
        return document + "}"


# ---------------------------------------------------------------------------------- counters


def counter_events(
    file: TraceFile, actions: Columns, requests: Columns | None, span: tuple[int, int]
) -> None:
    """Add the controller's process and the counters, over `span` (ns after the start).

    The queue length comes from the actions: each states how many requests of its model waited when it was
    made, and the latest numbers of all models are added up. Goodput is exec time that was spent on requests
    in time, over the time that passed: how many GPUs did useful work.
    """
    name_process(file, CONTROLLER, "controller")
    edges = _edges(span, _QUEUE_STEP_NS)
    if len(actions["sent"]):
        order = np.argsort(actions["sent"], kind="stable")
        queued = _sum_of_last(actions["model_id"][order], actions["requests_queued"][order])
        _levels(file, "queued requests", "queued", edges, actions["sent"][order], queued)
    if requests is not None:
        times = np.concatenate((requests["arrived"], requests["t"]))
        steps = np.repeat((1, -1), len(requests["t"]))
        order = np.lexsort((steps, times))
        level = np.cumsum(steps[order])
        _levels(file, "unanswered requests", "unanswered", edges, times[order], level)
        _answer_rates(file, requests, _edges(span, _RATE_STEP_NS))
    edges = _edges(span, _RATE_STEP_NS)
    done = actions["sent"] + actions["worker_exec_complete"]
    infer = actions["action_type"] == ActionType.INFER
    for worker_id in np.unique(actions["worker_id"]).tolist():
        mine = infer & (actions["worker_id"] == worker_id)
        useful = np.histogram(done[mine], edges, weights=actions["goodput"][mine])[0]
        shares = useful / np.diff(edges)
        for at, share in zip(edges[:-1].tolist(), shares.tolist(), strict=True):
            _count(file, worker_pid(worker_id), "goodput (GPUs)", at, f'"GPUs":{share:.4g}')


def _answer_rates(file: TraceFile, requests: Columns, edges: Column) -> None:
    met = requests["deadline_met"] == 1
    good, bad = (np.histogram(requests["t"][which], edges)[0] for which in (met, ~met))
    seconds = np.diff(edges) / NS_PER_S
    rates = zip(
        edges[:-1].tolist(), (good / seconds).tolist(), (bad / seconds).tolist(), strict=True
    )
    for at, good_rate, bad_rate in rates:
        _count(
            file,
            CONTROLLER,
            "answers per second",
            at,
            f'"in time":{good_rate:.6g},"not in time":{bad_rate:.6g}',
        )


def _edges(span: tuple[int, int], step_ns: int) -> Column:
    """Edges of windows of time over `span`: at least two."""
    start_ns, end_ns = span
    step_ns = max(step_ns, -(-(end_ns - start_ns) // _MOST_SAMPLES))
    return np.arange(start_ns, end_ns + step_ns, step_ns, dtype=np.int64)


def _sum_of_last(keys: Column, values: Column) -> Column:
    """After each row: the sum over all keys of the last value that each had so far."""
    order = np.argsort(keys, kind="stable")
    steps = np.diff(values[order], prepend=0)
    firsts = np.flatnonzero(np.diff(keys[order], prepend=keys[order][0] - 1))
    steps[firsts] = values[order][firsts]
    changes = np.empty_like(steps)
    changes[order] = steps
    total: Column = np.cumsum(changes)
    return total


def _levels(
    file: TraceFile, name: str, series: str, edges: Column, times: Column, levels: Column
) -> None:
    """A counter that shows at each edge the level after the last change before it."""
    places = np.searchsorted(times, edges, side="right") - 1
    known = None
    for at, place in zip(edges.tolist(), places.tolist(), strict=True):
        level = int(levels[place]) if place >= 0 else 0
        if level != known:
            known = level
            _count(file, CONTROLLER, name, at, f'"{series}":{level}')


def _count(file: TraceFile, pid: int, name: str, at_ns: int, values: str) -> None:
    file.add(f'{{"name":"{name}","ph":"C","pid":{pid},"ts":{us(at_ns)},"args":{{{values}}}}}')


# ---------------------------------------------------------------------------------- requests


def sample(requests: Columns, most: int) -> Column:
    """The rows of at most `most` requests, evenly taken."""
    total = len(requests["t"])
    return np.unique(np.linspace(0, total - 1, min(most, total)).astype(np.int64))


def request_events(
    file: TraceFile, requests: Columns, rows: Column, stages: Stages, start_ns: int
) -> None:
    """Add the requests in `rows`, from arrival to answer, and within each what it did by its stages."""
    chosen: list[int] = rows.tolist()
    events = [_request_event(requests, row, begins=True) for row in chosen]
    for row, of_request in stages.items():
        events += _stage_events(requests, row, of_request, start_ns)
    events += [_request_event(requests, row, begins=False) for row in chosen]
    # The sort is stable: a request that was answered at once begins before it ends.
    for _, event in sorted(events, key=itemgetter(0)):
        file.add_dict(event)


def _request_event(requests: Columns, row: int, *, begins: bool) -> Timed:
    code, met = int(requests["result"][row]), bool(requests["deadline_met"][row])
    outcome = "" if met else " late" if code == 0 else f" {code_name(code)}"
    event: dict[str, object] = {
        "name": f"request, model {requests['model_id'][row]}{outcome}",
        "cat": "request",
        "ph": "b" if begins else "e",
        "id": row,
        "pid": CONTROLLER,
        "tid": 0,
        "ts": int(requests["arrived" if begins else "t"][row]) / 1000,
    }
    if begins:
        event["args"] = {
            "request": int(requests["request_id"][row]),
            "deadline_us": int(requests["deadline"][row]) / 1000,
            "outcome": code_name(code),
        }
    return int(requests["arrived" if begins else "t"][row]), event


def _stage_events(
    requests: Columns, row: int, stages: Sequence[StageRow], start_ns: int
) -> Iterator[Timed]:
    """What a request waited for and ran, as slices within its own: two of each stage that ran."""
    at_ns, end_ns = int(requests["arrived"][row]), int(requests["t"][row])
    for stage in stages:
        args = {
            "stage": stage.name,
            "model": stage.model_id,
            "batch": stage.batch_size,
            "worker": stage.worker_id,
            "gpu": stage.gpu_id,
            "verdict": verdict_name(stage.verdict),
            "score": stage.score,
            "threshold": stage.threshold,
            "told": stage.ending,
            "cascade": stage.cascade,
        }
        ended = stage.end_ns if stage.start_ns is None else stage.start_ns
        pieces = [(f"{stage.name} waits", stage.queued_ns, ended)]
        if stage.start_ns is None:
            pieces[0] = (
                f"{stage.name} waits in vain, {verdict_name(stage.verdict)}",
                *pieces[0][1:],
            )
        else:
            end = stage.start_ns + stage.exec_ns
            what = f"{stage.name} runs, model {stage.model_id}, batch {stage.batch_size}"
            verdict = f", {verdict_name(stage.verdict)}" if stage.verdict else ""
            pieces.append((what + verdict, stage.start_ns, end))
        for name, begin, end in pieces:
            # By its worker's clock it may have begun before it was sent, or have ended after its answer.
            at_ns = min(max(at_ns, begin - start_ns), end_ns)
            until_ns = min(max(at_ns, end - start_ns), end_ns)
            if until_ns > at_ns:
                event = {"name": name, "cat": "request", "id": row, "pid": CONTROLLER, "tid": 0}
                yield at_ns, event | {"ph": "b", "ts": at_ns / 1000, "args": args}
                yield until_ns, event | {"ph": "e", "ts": until_ns / 1000}
            at_ns = until_ns


# ---------------------------------------------------------------------------------- metadata


def worker_pid(worker_id: int) -> int:
    """The process of a worker."""
    return _FIRST_WORKER + worker_id


def name_process(file: TraceFile, pid: int, name: str) -> None:
    """Name a process; they are shown in the order of their numbers."""
    for kind, value in (
        ("process_name", {"name": name}),
        ("process_sort_index", {"sort_index": pid}),
    ):
        file.add_dict({"name": kind, "ph": "M", "pid": pid, "ts": 0, "args": value})


def name_track(file: TraceFile, pid: int, tid: int, name: str) -> None:
    """Name a track of a process, likewise."""
    for kind, value in (
        ("thread_name", {"name": name}),
        ("thread_sort_index", {"sort_index": tid}),
    ):
        file.add_dict({"name": kind, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": value})
