"""`client_log.tsv`: one row per request that the load generator issued, judged by the client.

Latency runs from the *scheduled* send, so a generator that falls behind is charged for it and not
the system under test (open loop; coordinated omission).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from slosched.telemetry.rows import Cells, rows_of, short
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "client_log.tsv"

COLUMNS: dict[str, type] = {
    "scheduled_ns": int,
    "issue_delay_ns": int,
    "latency_ns": int,
    "request_id": int,
    "user_id": int,
    "model_id": int,
    "slo_factor": float,
    "slo_ns": int,
    "code": int,
    "in_time": int,
    "controller_latency_ns": int,
    "deadline_met": int,
    "batch_size": int,
    "worker_id": int,
    "gpu_id": int,
    "cold": int,
    "predicted_exec_ns": int,
    "exec_ns": int,
}
HEADER = header_of(COLUMNS)

#: The code of a request that was never answered.
NO_ANSWER = -1


class ClientRecord(msgspec.Struct, frozen=True, gc=False):
    """What the load generator knows of one request. Field for field the columns of the log.

    `scheduled_ns` is wall-clock ns; `issue_delay_ns` is sent - scheduled; `latency_ns` is reply -
    scheduled; `in_time` is latency <= SLO with code 0. From `controller_latency_ns` on it is what
    the controller's reply said: `deadline_met` is the controller's own view, from arrival.
    """

    scheduled_ns: int
    issue_delay_ns: int
    latency_ns: int
    request_id: int
    user_id: int
    model_id: int
    slo_factor: float
    slo_ns: int
    code: int
    in_time: bool
    controller_latency_ns: int = 0
    deadline_met: bool = False
    batch_size: int = 0
    worker_id: int = -1
    gpu_id: int = -1
    cold: bool = False
    predicted_exec_ns: int = 0
    exec_ns: int = 0


def format_client(record: ClientRecord) -> str:
    """Return the row of `record`, without a newline."""
    return rows_of([_cells(record)]).decode()


def client_rows(records: Iterable[ClientRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return rows_of([_cells(record) for record in records])


def _cells(r: ClientRecord) -> Cells:
    return (
        r.scheduled_ns,
        r.issue_delay_ns,
        r.latency_ns,
        r.request_id,
        r.user_id,
        r.model_id,
        short(r.slo_factor),
        r.slo_ns,
        r.code,
        1 if r.in_time else 0,
        r.controller_latency_ns,
        1 if r.deadline_met else 0,
        r.batch_size,
        r.worker_id,
        r.gpu_id,
        1 if r.cold else 0,
        r.predicted_exec_ns,
        r.exec_ns,
    )


def read_client_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Read a client log into numpy columns (int64; slo_factor float64).

    With `only` nothing but those columns is parsed. Raises MalformedLog.
    """
    return read_table(path, COLUMNS, only=only)
