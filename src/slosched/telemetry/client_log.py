"""`client_log.tsv`: one row per request that the load generator issued, judged by the client.

Latency runs from the *scheduled* send, so a generator that falls behind is charged for it and not
the system under test (open loop; coordinated omission).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

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
    r = record
    return (
        f"{r.scheduled_ns}\t{r.issue_delay_ns}\t{r.latency_ns}\t{r.request_id}\t{r.user_id}"
        f"\t{r.model_id}\t{r.slo_factor:g}\t{r.slo_ns}\t{int(r.code)}\t{int(r.in_time)}"
        f"\t{r.controller_latency_ns}\t{int(r.deadline_met)}\t{r.batch_size}\t{r.worker_id}"
        f"\t{r.gpu_id}\t{int(r.cold)}\t{r.predicted_exec_ns}\t{r.exec_ns}"
    )


def read_client_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Read a client log into numpy columns (int64; slo_factor float64).

    With `only` nothing but those columns is parsed. Raises MalformedLog.
    """
    return read_table(path, COLUMNS, only=only)
