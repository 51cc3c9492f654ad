"""`calls.tsv`: one row for each call of a function that ended, also of one that was refused.

The file is made when the first call ends. Together with call_parts.tsv it has the whole graph: each call's
parent, after how much of the parent's run it was asked for, and what was awaited (analysis/call_graph.py reads
both). `t` is the end of the call in wall-clock ns, `latency` reaches from its arrival until then, and `start`
counts from its arrival (-1: it did not begin). From its begin to `t` it ran for `exec` and was suspended for
`suspended`, with its waits for a slot again. `asked` is how long its parent had run when it asked for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from slosched.core.scheduler.interface import CallRecord
from slosched.telemetry.rows import Cells, name_cell, named_rows_of
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "calls.tsv"

COLUMNS: dict[str, type] = dict.fromkeys(
    (
        "t",
        "call_id",
        "parent_id",
        "child",
        "asked",
        "request_id",
        "user_id",
        "model_id",
        "size_class",
        "code",
        "slo",
        "latency",
        "start",
        "exec",
        "suspended",
        "predicted_exec",
        "in_bytes",
        "out_bytes",
        "children",
        "worker_id",
        "gpu_id",
        "cold",
        "attempts",
        "on_gpu",
        "near_child",
    ),
    int,
) | {"function": str, "near": str}
HEADER = header_of(COLUMNS)


def call_rows(records: Iterable[CallRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return named_rows_of([_cells(record) for record in records])


def _cells(r: CallRecord) -> Cells:
    return (
        r.end_ns,
        r.key,
        r.parent,
        r.child,
        r.asked_ran_ns,
        r.request_id,
        r.user_id,
        r.model_id,
        r.size_class,
        r.code,
        r.slo_ns,
        r.end_ns - r.arrival_ns,
        r.start_ns - r.arrival_ns if r.start_ns >= 0 else -1,
        r.exec_ns,
        r.suspended_ns,
        r.predicted_exec_ns,
        r.in_bytes,
        r.out_bytes,
        r.children,
        r.worker_id,
        r.gpu_id,
        1 if r.cold else 0,
        r.attempts,
        1 if r.gpu else 0,
        r.near_child,
        name_cell(_one_line(r.function)),
        name_cell(_one_line(r.near)),
    )


def _one_line(name: str) -> str:
    """A key of `near` is a user's text: what would break the row becomes a question mark."""
    return name if name.isprintable() else "".join(c if c.isprintable() else "?" for c in name)


def read_call_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Return the columns of the log at `path`, or those in `only`. Raises MalformedLog."""
    return read_table(path, COLUMNS, only=only)
