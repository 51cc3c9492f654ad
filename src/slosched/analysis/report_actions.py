"""What a report says of the GPUs: how busy they were, how good predictions were, and what was worst.

The action log is read several times, each time a few columns of it, so that ten million actions take
some hundreds of MB and not gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.fig10 import COLUMNS as ERROR_COLUMNS
from slosched.analysis.fig10 import ErrorSide, error_sides
from slosched.analysis.intervals import EXECUTORS, Column, Columns, Gpu, Intervals, gpus_of
from slosched.analysis.runs import read_actions, read_rows
from slosched.codes import ActionType, code_name
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_TIMES = (
    "t",
    "controller_result_enqueue",
    "action_type",
    "status",
    "worker_id",
    "gpu_id",
    "worker_exec_duration",
    "worker_exec_complete",
)
_SHOWN = (
    "t",
    "controller_result_enqueue",
    "action_id",
    "action_type",
    "status",
    "worker_id",
    "gpu_id",
    "model_id",
    "batch_size",
    "expected_exec_duration",
    "worker_exec_duration",
    "expected_exec_complete",
    "worker_exec_complete",
    "goodput",
)
#: Size of the timeline: inferences of a GPU (about), and limits of its actions and GPUs.
_IN_A_ROW = 22
_MOST_SHOWN = 3_000
_MOST_GPUS_SHOWN = 10
#: Cells of the overview of utilisation, and its GPUs.
_MOST_CELLS = 4_000
_MOST_GPUS = 64
_MOST_WINDOWS = 120
_WORST = 10

Say = Callable[[str], None]


@dataclass(frozen=True)
class Utilisation:
    """Shares of time that executors were busy: a row for each GPU, a column for each window."""

    gpus: list[Gpu]
    of_gpus: int
    edges_s: list[float]
    exec: NDArray[np.float64]
    loads: NDArray[np.float64]
    #: Over the whole run.
    exec_share: list[float]
    load_share: list[float]


@dataclass(frozen=True)
class ClassErrors:
    """Predictions of one batch class (or of loads): medians, and sizes of errors at p50 and p99, in ns."""

    name: str
    actions: int
    requests: int
    predicted_ns: float
    took_ns: float
    duration_p50_ns: float
    duration_p99_ns: float
    completion_p50_ns: float
    completion_p99_ns: float


@dataclass(frozen=True)
class ActionRow:
    """One action, for a table. Times in ns; `at_ns` is its end after the start of the run."""

    action_id: int
    what: str
    gpu: Gpu
    at_ns: int
    predicted_ns: int
    took_ns: int
    behind_ns: int


@dataclass(frozen=True)
class ActionNumbers:
    """What the action log says of the run."""

    actions: int
    infers: int
    loads: int
    evictions: int
    failed: list[tuple[str, int]]
    utilisation: Utilisation
    errors: list[ErrorSide]
    classes: list[ClassErrors]
    slowest: list[ActionRow]
    mispredicted: list[ActionRow]


@dataclass(frozen=True)
class Lane:
    """What one executor of a GPU did in the window of the timeline. `rows` has an entry for each action."""

    executor: str
    intervals: Intervals
    rows: Columns


@dataclass(frozen=True)
class Excerpt:
    """The window that the timeline shows, from `start_ns` to `end_ns` after the start of the run."""

    start_ns: int
    end_ns: int
    chosen: bool
    gpus: list[tuple[Gpu, list[Lane]]]
    of_gpus: int
    shortened: bool


def measure_actions(
    path: Path,
    start_ns: int,
    window: tuple[int, int] | None,
    notices: list[str],
    say: Say,
) -> tuple[ActionNumbers | None, Excerpt | None]:
    """Read the action log of a run. (None, None) without one, which is added to the notices.

    `start_ns` is the start of the run, `window` (start, length) in ns after it. Raises InvalidConfig
    if nothing happened in the window, MalformedLog.
    """
    say("reading the actions")
    try:
        log = read_actions(path, only=_TIMES)
    except InvalidConfig as error:
        if window is not None:
            raise
        notices.append(f"there is nothing about GPUs and predictions: {error}")
        return None, None
    if log.truncated:
        notices.append("the action log ends within a line, which was left out")
    sent = log["t"] - log["controller_result_enqueue"] - start_ns
    used = _utilisation(log.columns, sent)
    chosen = window or _busiest(log.columns, sent)
    rows, shortened = _rows_of(log["t"] - start_ns, sent, chosen)
    if not len(rows) and window is not None:
        length_ns = max(0, int(log["t"].max()) - start_ns)
        raise InvalidConfig(
            f"no action from {format_duration(window[0])} to {format_duration(sum(window))} in {path}; the "
            f"run is {format_duration(length_ns)} long"
        )
    infers, loads, evictions = (
        int(np.count_nonzero(log["action_type"] == kind)) for kind in _KINDS
    )
    failed = _failed(log["status"])
    count = len(log)
    del log, sent
    say("comparing predictions with what happened")
    log = read_actions(path, only=(*ERROR_COLUMNS, "batch_size"))
    good = log["status"] == 0
    errors = error_sides(log.columns)
    classes = _classes(log.columns, good)
    slowest, mispredicted = _worst(log.columns, good)
    del log, good
    say("looking up the actions that are shown one by one")
    shown: dict[str, Column] = dict(
        read_rows(path, np.concatenate((slowest, mispredicted, rows)), _SHOWN)
    )
    shown["sent"] = shown["t"] - shown["controller_result_enqueue"] - start_ns
    shown["t"] = shown["t"] - start_ns
    first, second = len(slowest), len(slowest) + len(mispredicted)
    numbers = ActionNumbers(
        actions=count,
        infers=infers,
        loads=loads,
        evictions=evictions,
        failed=failed,
        utilisation=used,
        errors=errors,
        classes=classes,
        slowest=_table(shown, range(first)),
        mispredicted=_table(shown, range(first, second)),
    )
    if not len(rows):
        notices.append("there is no timeline: no action ran on a GPU after the first request")
        return numbers, None
    shown = {name: column[second:] for name, column in shown.items()}
    return numbers, _excerpt(shown, chosen, window is not None, shortened)


_KINDS = (ActionType.INFER, ActionType.LOAD_WEIGHTS, ActionType.EVICT_WEIGHTS)


def _failed(status: Column) -> list[tuple[str, int]]:
    codes, counts = np.unique(status[status != 0], return_counts=True)
    found = [(code_name(code), n) for code, n in zip(codes.tolist(), counts.tolist(), strict=True)]
    return sorted(found, key=lambda pair: -pair[1])


# ------------------------------------------------------------------------------------ utilisation


def _utilisation(log: Columns, sent: Column) -> Utilisation:
    gpus = gpus_of(log)
    shown = gpus[:_MOST_GPUS]
    end = sent + log["worker_exec_complete"]
    first, last = min(0, int(sent.min())), int(end.max())
    count = max(20, min(_MOST_WINDOWS, _MOST_CELLS // len(shown)))
    edges = np.linspace(first, last, count + 1)
    ran = (log["status"] == 0) & (log["worker_exec_duration"] > 0)
    busy = {executor: np.zeros((len(shown), count)) for executor, _ in EXECUTORS}
    for place, gpu in enumerate(shown):
        on_gpu = ran & (log["worker_id"] == gpu.worker_id) & (log["gpu_id"] == gpu.gpu_id)
        for executor, types in EXECUTORS:
            rows = on_gpu & np.isin(log["action_type"], types)
            busy[executor][place] = _busy(end[rows], log["worker_exec_duration"][rows], edges)
    width = edges[1] - edges[0]
    exec_, loads = busy["exec"], busy["weights"]
    return Utilisation(
        gpus=shown,
        of_gpus=len(gpus),
        edges_s=(edges / NS_PER_S).tolist(),
        exec=exec_ / width,
        loads=loads / width,
        exec_share=(exec_.sum(axis=1) / (edges[-1] - edges[0])).tolist(),
        load_share=(loads.sum(axis=1) / (edges[-1] - edges[0])).tolist(),
    )


def _busy(end: Column, took: Column, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """How long an executor was busy between each two edges. What overlaps counts once."""
    if not len(end):
        return np.zeros(len(edges) - 1)
    order = np.argsort(end, kind="stable")
    end, begin = end[order], end[order] - took[order]
    begin[1:] = np.maximum(begin[1:], end[:-1])
    times = np.stack((begin, end), axis=1).ravel()
    done = np.stack((np.zeros_like(end), end - begin), axis=1).ravel().cumsum()
    return np.diff(np.interp(edges, times, done))


# -------------------------------------------------------------------------------------- timeline


def _busiest(log: Columns, sent: Column) -> tuple[int, int]:
    """The window, a readable length, in which executors were busy for longest; (start, length)."""
    infers = (log["action_type"] == ActionType.INFER) & (log["worker_exec_duration"] > 0)
    usual = float(np.median(log["worker_exec_duration"][infers])) if infers.any() else NS_PER_MS
    length = _nice(_IN_A_ROW * usual)
    end = sent + log["worker_exec_complete"]
    # The first loads come before any request, and no window begins there.
    after = end >= 0
    if not after.any():
        return 0, length
    work = np.bincount(end[after] // length, log["worker_exec_duration"][after])
    return int(np.argmax(work)) * length, length


def _nice(length_ns: float) -> int:
    """A length of 1, 2, 5, 10, ... ms that is at least `length_ns`."""
    scale = NS_PER_MS
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= length_ns:
                return digit * scale
        scale *= 10


def _rows_of(
    result: Column, sent: Column, window: tuple[int, int]
) -> tuple[NDArray[np.intp], bool]:
    """The rows of a window, in order of their sending, and whether they are too many to show all."""
    begin, end = window[0], window[0] + window[1]
    rows = np.flatnonzero((result >= begin) & (sent < end))
    rows = rows[np.argsort(sent[rows], kind="stable")]
    most = _MOST_SHOWN * 8  # GPUs that are not shown go first
    return rows[:most], len(rows) > most


def _excerpt(columns: Columns, window: tuple[int, int], chosen: bool, shortened: bool) -> Excerpt:
    gpus = gpus_of(columns)
    end_ns = window[0] + window[1]
    shown = np.zeros(len(columns["t"]), bool)
    for gpu in gpus[:_MOST_GPUS_SHOWN]:
        shown |= (columns["worker_id"] == gpu.worker_id) & (columns["gpu_id"] == gpu.gpu_id)
    places = np.flatnonzero(shown)
    if len(places) > _MOST_SHOWN:
        end_ns = max(int(columns["sent"][places[_MOST_SHOWN]]), window[0] + 1)
        places, shortened = places[:_MOST_SHOWN], True
    columns = {name: column[places] for name, column in columns.items()}
    tracks = [(gpu, _lanes(columns, gpu)) for gpu in gpus[:_MOST_GPUS_SHOWN]]
    return Excerpt(
        start_ns=window[0],
        end_ns=end_ns,
        chosen=chosen,
        gpus=tracks,
        of_gpus=len(gpus),
        shortened=shortened,
    )


def _lanes(columns: Columns, gpu: Gpu) -> list[Lane]:
    on_gpu = (columns["worker_id"] == gpu.worker_id) & (columns["gpu_id"] == gpu.gpu_id)
    lanes = []
    for executor, types in EXECUTORS:
        rows = np.flatnonzero(on_gpu & np.isin(columns["action_type"], types))
        if len(rows):
            of_lane = {name: column[rows] for name, column in columns.items()}
            lanes.append(Lane(executor, Intervals(of_lane), of_lane))
    return lanes


# ------------------------------------------------------------------------------------ predictions


def _classes(log: Columns, good: NDArray[np.bool_]) -> list[ClassErrors]:
    infers = good & (log["action_type"] == ActionType.INFER)
    found = [
        _class(f"batch {size}", log, infers & (log["batch_size"] == size))
        for size in np.unique(log["batch_size"][infers]).tolist()
    ]
    loads = good & (log["action_type"] == ActionType.LOAD_WEIGHTS)
    return [*found, _class("load of weights", log, loads)] if loads.any() else found


def _class(name: str, log: Columns, rows: NDArray[np.bool_]) -> ClassErrors:
    took, expected = log["worker_exec_duration"][rows], log["expected_exec_duration"][rows]
    behind = np.abs(log["worker_exec_complete"][rows] - log["expected_exec_complete"][rows])
    off = np.abs(took - expected)
    return ClassErrors(
        name,
        len(took),
        int(log["batch_size"][rows].sum()),
        float(np.median(expected)),
        float(np.median(took)),
        *(float(value) for value in np.quantile(off, (0.5, 0.99))),
        *(float(value) for value in np.quantile(behind, (0.5, 0.99))),
    )


def _worst(log: Columns, good: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The rows that took longest, and those that ended furthest from their predicted end."""
    known = np.flatnonzero(
        good & (log["worker_exec_complete"] > 0) & (log["worker_exec_duration"] > 0)
    )
    took = log["worker_exec_duration"][known]
    behind = np.abs(log["worker_exec_complete"] - log["expected_exec_complete"])[known]
    return tuple(known[np.argsort(-by, kind="stable")[:_WORST]] for by in (took, behind))  # type: ignore[return-value]


def _table(columns: Columns, rows: range) -> list[ActionRow]:
    return [
        ActionRow(
            action_id=int(columns["action_id"][row]),
            what=_what(columns, row),
            gpu=Gpu(int(columns["worker_id"][row]), int(columns["gpu_id"][row])),
            at_ns=int(columns["sent"][row] + columns["worker_exec_complete"][row]),
            predicted_ns=int(columns["expected_exec_duration"][row]),
            took_ns=int(columns["worker_exec_duration"][row]),
            behind_ns=int(
                columns["worker_exec_complete"][row] - columns["expected_exec_complete"][row]
            ),
        )
        for row in rows
    ]


def _what(columns: Columns, row: int) -> str:
    model = f"model {columns['model_id'][row]}"
    if columns["action_type"][row] == ActionType.LOAD_WEIGHTS:
        return f"load of {model}"
    return f"{model}, batch {columns['batch_size'][row]}"
