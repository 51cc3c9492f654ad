"""`clockwork_action_log.tsv`: one row per finished LoadWeights, Infer or EvictWeights.

Names, order and units are the published ones (Clockwork, docs/telemetry.md, and its code where the
two differ): `t` is when the controller received the *result*, in wall-clock ns; seven other times
are ns after the action was sent, never below 0, so that it was sent at
`t - controller_result_enqueue`; `goodput` is ns of exec time spent on requests answered in time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from slosched.codes import ActionType
from slosched.core.scheduler.interface import ActionRecord
from slosched.telemetry.rows import Cells, rows_of
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "clockwork_action_log.tsv"

COLUMNS: dict[str, type] = dict.fromkeys(
    (
        "t",
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
        "expected_gpu_clock",
        "worker_gpu_clock_before",
        "worker_gpu_clock",
        "worker_copy_output_complete",
        "worker_action_received",
        "worker_result_sent",
        "controller_result_enqueue",
        "controller_action_duration",
        "goodput",
        "requests_queued",
        "copies_loaded",
    ),
    int,
)
HEADER = header_of(COLUMNS)

#: The kinds that the published format knows. Calls of functions have call_log.py.
_LOGGED = (ActionType.LOAD_WEIGHTS, ActionType.INFER, ActionType.EVICT_WEIGHTS)


def has_row(record: ActionRecord) -> bool:
    """True if the action is of a kind that has rows here."""
    return record.action_type in _LOGGED


def format_action(record: ActionRecord) -> str:
    """Return the row of `record`, without a newline. Raises ValueError for another kind of action."""
    return rows_of([_cells(record)]).decode()


def action_rows(records: Iterable[ActionRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end. Raises as `format_action`."""
    return rows_of([_cells(record) for record in records])


def _cells(r: ActionRecord) -> Cells:
    """The columns, in order.

    An eviction has no expectations, and 0 stands for them; a load or eviction is a batch of 1.
    """
    if r.action_type not in _LOGGED:
        raise ValueError(f"action type {r.action_type} has no row in the action log")
    sent = r.sent_ns
    evict = r.action_type == ActionType.EVICT_WEIGHTS
    batch = r.batch_size if r.action_type == ActionType.INFER else 1
    expected = 0 if evict else r.expected_duration_ns
    expected_complete = 0 if evict else max(0, r.expected_complete_ns - sent)
    expected_clock = 0 if evict else r.gpu_clock_expected_mhz
    span = r.exec
    return (
        r.result_received_ns,
        r.action_id,
        r.action_type,
        r.code,
        r.worker_id,
        r.gpu_id,
        r.model_id,
        batch,
        expected,
        span.duration_ns,
        expected_complete,
        max(0, span.end_ns - sent),
        expected_clock,
        r.gpu_clock_before_mhz,
        r.gpu_clock_mhz,
        max(0, r.copy_output_end_ns - sent),
        max(0, r.worker_received_ns - sent),
        max(0, r.worker_sent_ns - sent),
        max(0, r.result_received_ns - sent),
        max(0, r.processed_ns - sent),
        0 if r.code else r.goodput_ns,
        r.requests_queued,
        r.copies_loaded,
    )


def read_action_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Read an action log into numpy columns (int64).

    With `only` nothing but those columns is parsed. Raises MalformedLog.
    """
    return read_table(path, COLUMNS, only=only)
