"""`segments.tsv`: one row for each segment of an Infer that was interrupted.

The published action log has one end and one duration for an action, so the segments stand in a file of their
own, made when the first interrupted Infer ends. `t` is when the controller received the result, in wall-clock
ns, as in the action log; `begin` and `end` are ns after the action was sent; `pause` is how long the Infer
stood still, over all its segments.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slosched.core.scheduler.interface import ActionRecord
from slosched.telemetry.rows import Cells, rows_of
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "segments.tsv"

COLUMNS: dict[str, type] = dict.fromkeys(
    (
        "t",
        "action_id",
        "worker_id",
        "gpu_id",
        "model_id",
        "segment",
        "begin",
        "end",
        "pause",
    ),
    int,
)
HEADER = header_of(COLUMNS)


def segment_rows(records: Iterable[ActionRecord]) -> bytes:
    """Return the rows of `records`, which were interrupted, without a newline at the end."""
    return rows_of([cells for record in records for cells in _cells(record)])


def _cells(record: ActionRecord) -> list[Cells]:
    sent_ns, segments = record.sent_ns, record.segments
    ran_ns = sum(segment.end_ns - segment.begin_ns for segment in segments)
    pause_ns = segments[-1].end_ns - segments[0].begin_ns - ran_ns
    return [
        (
            record.result_received_ns,
            record.action_id,
            record.worker_id,
            record.gpu_id,
            record.model_id,
            number,
            segment.begin_ns - sent_ns,
            segment.end_ns - sent_ns,
            pause_ns,
        )
        for number, segment in enumerate(segments)
    ]


def read_segment_log(path: Path) -> LogTable:
    """Return the columns of the log at `path`. Raises MalformedLog."""
    return read_table(path, COLUMNS)
