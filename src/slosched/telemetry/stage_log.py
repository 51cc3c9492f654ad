"""`stages.tsv`: one row per stage of each request that had more than one.

The published logs know one action per request, so the stages stand in a file of their own, made when the first
such request ends a stage. `t` is when the controller handled the stage's result, in wall-clock ns. `waited`
(until then), `due` and `start` are ns after the request entered the queue of that stage, and may be negative;
`exec` is a duration in ns; `answers` is 1 for the stage whose output is the answer. In a cascade `verdict`
is a codes.Verdict, beside the `score` and the `threshold` (-1: no judge was asked), and `cascade` its name. A
deferred request that gets its light answer after all, or none, has one more row, of the heavy stage, without an
exec.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slosched.core.scheduler.interface import StageRecord
from slosched.telemetry.rows import Cells, name_cell, named_rows_of, short
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "stages.tsv"

COLUMNS: dict[str, type] = dict.fromkeys(
    (
        "t",
        "request_id",
        "user_id",
        "stage",
        "model_id",
        "waited",
        "due",
        "start",
        "exec",
        "batch_size",
        "worker_id",
        "gpu_id",
        "answers",
        "verdict",
    ),
    int,
) | {"score": float, "threshold": float, "cascade": str}
HEADER = header_of(COLUMNS)


def stage_rows(records: Iterable[StageRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return named_rows_of([_cells(record) for record in records])


def _cells(record: StageRecord) -> Cells:
    queued_ns = record.queued_ns
    return (
        record.end_ns,
        record.request_id,
        record.user_id,
        record.stage,
        record.model_id,
        record.end_ns - queued_ns,
        record.due_ns - queued_ns,
        record.start_ns - queued_ns,
        record.exec_ns,
        record.batch_size,
        record.worker_id,
        record.gpu_id,
        int(record.answers),
        int(record.verdict),
        short(record.score),
        short(record.threshold),
        name_cell(record.cascade),
    )


def read_stage_log(path: Path) -> LogTable:
    """Return the columns of the log at `path`. Raises MalformedLog."""
    return read_table(path, COLUMNS)
