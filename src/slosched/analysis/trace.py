"""A run as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing show: what each GPU did, and when.

The file is JSON in the Trace Event Format ("Trace Event Format", Google): a process for each worker, and for
each of its GPUs a track of what the exec executor did and one beside it of what was predicted, and the
same for the executor of weights; a flow links a prediction to what came of it. The controller is a
process too, with counters and some of the requests, each with the stages that it had. Everything comes
from the action log; the request log adds the requests, stages.tsv their stages and calls.tsv the calls of
functions, where there are any.

Only the rows of the window become events, and they are written as they are made, so that a log of ten
million rows takes some columns of numbers and no more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.intervals import Gpu, gpus_of
from slosched.analysis.runs import read_actions, read_requests, read_rows, stated
from slosched.analysis.stage_rows import read_stages
from slosched.analysis.trace_calls import CallLog, call_events
from slosched.analysis.trace_events import (
    Stages,
    action_events,
    counter_events,
    request_events,
    sample,
)
from slosched.analysis.trace_file import TraceFile
from slosched.errors import InvalidConfig
from slosched.output_files import check_output
from slosched.telemetry import segment_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: More actions than this are hard going for a viewer: without --from and --to the trace ends with them.
MOST_ACTIONS = 100_000
#: Number of requests that are shown, evenly taken from those of the window.
SAMPLED_REQUESTS = 200

_ROUND_NS = 100 * NS_PER_MS
_TIMES = ("t", "controller_result_enqueue", "worker_id", "gpu_id")
_REST = (
    "action_id",
    "action_type",
    "status",
    "model_id",
    "batch_size",
    "expected_exec_duration",
    "worker_exec_duration",
    "expected_exec_complete",
    "worker_exec_complete",
    "goodput",
    "requests_queued",
)
_REQUEST_COLUMNS = ("t", "request_id", "result", "model_id", "latency", "deadline", "deadline_met")

Column = NDArray[Any]
Columns = dict[str, Column]


@dataclass(frozen=True)
class Window:
    """What is shown: from `start_ns` until before `end_ns` after the start of the run, on some GPUs.

    `end_ns` None: as much as a viewer can handle. `gpus` empty: all of them.
    """

    start_ns: int = 0
    end_ns: int | None = None
    gpus: tuple[Gpu, ...] = ()

    def __post_init__(self) -> None:
        if self.end_ns is not None and self.end_ns <= self.start_ns:
            raise InvalidConfig(
                f"the window ends at {format_duration(self.end_ns)}, which is not after its start at "
                f"{format_duration(self.start_ns)}"
            )


@dataclass(frozen=True)
class Traced:
    """What was written. Times in ns after the start of the run, which is `run_ns` long.

    `clipped` actions began, by their worker's clock, before the one ahead of them had ended, and are
    drawn from there. `shortened` says that the window ends where it does because of the viewer.
    """

    path: Path
    start_ns: int
    end_ns: int
    run_ns: int
    actions: int
    of_actions: int
    requests: int
    events: int
    clipped: int
    shortened: bool
    calls: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**vars(self), "path": str(self.path)}


def write_trace(
    run_dir: Path,
    out: Path,
    window: Window | None = None,
    *,
    most_actions: int = MOST_ACTIONS,
    requests: int = SAMPLED_REQUESTS,
    flows: bool = True,
) -> Traced:
    """Write the trace of a run directory, live or simulated, to `out` (gzip if it ends in .gz).

    An action is shown if any of its time from sending to result lies in the window. Raises
    InvalidConfig without an action log, for a window or GPU in which nothing happened, or if `out`
    cannot be written; MalformedLog for a damaged log.
    """
    window = window or Window()
    check_output(out)  # before the work
    actions = read_actions(run_dir, only=_TIMES)
    path = actions.path
    log = _requests_of(run_dir)
    sent = actions["t"] - actions["controller_result_enqueue"]
    call_rows = CallLog(run_dir)
    start_ns, end_ns = _run_span(actions, sent, log, call_rows)
    on_gpus = _on_gpus(actions, window.gpus, call_rows)
    begun = np.concatenate((sent[on_gpus], call_rows.arrived[call_rows.on(window.gpus)]))
    until_ns, shortened = _end_of(window, begun - start_ns, end_ns - start_ns, most_actions)
    inside = (actions["t"] - start_ns >= window.start_ns) & (sent - start_ns < until_ns)
    rows = np.flatnonzero(inside & on_gpus)
    span = (window.start_ns, until_ns)
    calls = call_rows.within(start_ns, span, window.gpus)
    if not len(rows) and not len(calls):
        raise InvalidConfig(
            f"no action from {format_duration(window.start_ns)} to {format_duration(until_ns)} in "
            f"{path}; the run is {format_duration(end_ns - start_ns)} long"
        )
    shown: Columns = {name: actions[name][rows] for name in _TIMES}
    shown["sent"] = sent[rows] - start_ns
    shown["t"] = shown["t"] - start_ns
    of_actions = len(actions)
    del actions, sent, inside, on_gpus
    shown |= read_rows(run_dir, rows, _REST)
    asked = None if log is None else _asked(log, start_ns, span)
    about = _about(run_dir, start_ns, span, len(rows), of_actions)
    with TraceFile(out, about) as file:
        clipped = 0
        if len(rows):
            clipped = action_events(file, shown, flows=flows, segments=_segments(run_dir, shown))
        counter_events(file, shown, asked, span)
        sampled = _add_requests(file, run_dir, asked, requests, start_ns)
        if len(calls):
            named = set(shown["worker_id"].tolist())
            call_events(file, calls, named=named, flows=flows, stories=requests)
    return Traced(
        out,
        *span,
        end_ns - start_ns,
        len(rows),
        of_actions,
        sampled,
        file.events,
        clipped,
        shortened,
        len(calls),
    )


def _run_span(
    actions: LogTable, sent: Column, log: LogTable | None, calls: CallLog
) -> tuple[int, int]:
    """When the first thing of a run began and the last one ended, in wall-clock ns."""
    spans = [(int(sent.min()), int(actions["t"].max())), *calls.span()]
    if log is not None:
        spans.append((int((log["t"] - log["latency"]).min()), int(log["t"].max())))
    return min(begin for begin, _ in spans), max(end for _, end in spans)


def _add_requests(
    file: TraceFile, run_dir: Path, asked: Columns | None, most: int, start_ns: int
) -> int:
    """Add a sample of the requests, and return how many these are."""
    if asked is None:
        return 0
    chosen = sample(asked, most)
    request_events(file, asked, chosen, _stages(run_dir, asked, chosen, start_ns), start_ns)
    return len(chosen)


def _requests_of(run_dir: Path) -> LogTable | None:
    try:
        return read_requests(run_dir, only=_REQUEST_COLUMNS, everyone=True)
    except InvalidConfig:
        return None  # the actions say enough


def _segments(run_dir: Path, actions: Columns) -> dict[int, list[tuple[int, int]]]:
    """The segments of the `actions` that were interrupted; empty for a run without any."""
    path = run_dir / segment_log.FILE_NAME
    if not path.is_file():
        return {}
    log = segment_log.read_segment_log(path)
    sent = dict(zip(actions["action_id"].tolist(), actions["sent"].tolist(), strict=True))
    found: dict[int, list[tuple[int, int]]] = {}
    for action_id, begin, end in zip(
        log["action_id"].tolist(), log["begin"].tolist(), log["end"].tolist(), strict=True
    ):
        if action_id in sent:
            at_ns = sent[action_id]
            found.setdefault(action_id, []).append((at_ns + begin, at_ns + end))
    return found


def _stages(run_dir: Path, asked: Columns, rows: Column, start_ns: int) -> Stages:
    """The stages of the requests in `rows`; empty for a run without any."""
    ids = asked["request_id"][rows].tolist()
    arrivals = (asked["arrived"][rows] + start_ns).tolist()
    known = dict(zip(zip(ids, arrivals, strict=True), rows.tolist(), strict=True))
    return {known[request]: stages for request, stages in read_stages(run_dir, known).items()}


def _on_gpus(actions: LogTable, gpus: Collection[Gpu], calls: CallLog) -> Column:
    """True for the rows of `gpus`. Raises InvalidConfig for one that is in no row, and ran no call."""
    if not gpus:
        return np.ones(len(actions), bool)
    chosen = np.zeros(len(actions), bool)
    for gpu in gpus:
        rows = (actions["worker_id"] == gpu.worker_id) & (actions["gpu_id"] == gpu.gpu_id)
        if not rows.any() and not calls.on([gpu]).any():
            known = ", ".join(str(known) for known in gpus_of(actions.columns)[:20])
            raise InvalidConfig(f"{actions.path} has no action of {gpu}; its GPUs are {known}")
        chosen |= rows
    return chosen


def _end_of(window: Window, sent: Column, run_ns: int, most_actions: int) -> tuple[int, bool]:
    """When the window ends, and whether it had to end before the run does."""
    if window.end_ns is not None:
        return window.end_ns, False
    later = np.sort(sent[sent >= window.start_ns])
    if len(later) <= most_actions:
        return run_ns + 1, False
    end_ns = int(later[most_actions])
    # A round time is easier to go on from; a dense log has none.
    rounded = end_ns // _ROUND_NS * _ROUND_NS
    return max(rounded if rounded > window.start_ns else end_ns, window.start_ns + 1), True


def _asked(log: LogTable, start_ns: int, span: tuple[int, int]) -> Columns:
    """The requests that were in progress during the window, in the order of their arrival."""
    answered = log["t"] - start_ns
    arrived = answered - log["latency"]
    rows = np.flatnonzero((answered >= span[0]) & (arrived < span[1]))
    rows = rows[np.argsort(arrived[rows], kind="stable")]
    columns = {name: log[name][rows] for name in _REQUEST_COLUMNS if name != "latency"}
    return columns | {"t": answered[rows], "arrived": arrived[rows]}


def _about(
    run_dir: Path, start_ns: int, span: tuple[int, int], rows: int, of_rows: int
) -> dict[str, Any]:
    """What the trace says of itself."""
    policy = stated(run_dir, "policy")
    return {
        "run": run_dir.resolve().name,
        "scheduler": policy if isinstance(policy, str) else "",
        "run_start_ns": start_ns,
        "window_s": [span[0] / NS_PER_S, span[1] / NS_PER_S],
        "actions": rows,
        "actions_of_the_run": of_rows,
    }


def parse_gpu(text: str) -> Gpu:
    """The GPU that "W0-GPU1" names, in either case. Raises InvalidConfig."""
    worker, dash, gpu = text.strip().upper().partition("-")
    number, gpu_number = worker.removeprefix("W"), gpu.removeprefix("GPU")
    if not dash or not number.isdigit() or not gpu_number.isdigit():
        raise InvalidConfig(f"{text!r} is not a GPU; write it as W0-GPU0 (worker 0, its GPU 0)")
    return Gpu(int(number), int(gpu_number))


def parse_gpus(texts: Sequence[str]) -> tuple[Gpu, ...]:
    """Every GPU that `texts` name, each a list with commas between."""
    return tuple(parse_gpu(part) for text in texts for part in text.split(","))
