"""`clockwork_request_log.tsv`: one row per answered request (Clockwork, docs/telemetry.md).

Names, order and units are the published ones, so that the published plotters read it unchanged. `t`
is the *departure* of the answer, in wall-clock ns; `latency` and `deadline` are ns from arrival at
the controller; `slo_factor` 0 means that an absolute or the default SLO was used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from slosched.core.scheduler.interface import RequestRecord
from slosched.telemetry.rows import Cells, rows_of, short
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "clockwork_request_log.tsv"

COLUMNS: dict[str, type] = {
    "t": int,
    "request_id": int,
    "result": int,
    "user_id": int,
    "model_id": int,
    "slo_factor": float,
    "latency": int,
    "deadline": int,
    "deadline_met": int,
    "arrival_count": int,
    "departure_count": int,
    "is_coldstart": int,
}
HEADER = header_of(COLUMNS)


def format_request(record: RequestRecord) -> str:
    """Return the row of `record`, without a newline."""
    return rows_of([_cells(record)]).decode()


def request_rows(records: Iterable[RequestRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return rows_of([_cells(record) for record in records])


def _cells(r: RequestRecord) -> Cells:
    """The columns, in order.

    `deadline` is -1 for a request that never had one (an unknown model). A cold start is one whose
    model was on no GPU at arrival and on some GPU at departure, whichever request loaded it.
    """
    departure_ns, slo_ns, arrival_count = r.departure_ns, r.slo_ns, r.arrival_count
    departure_count = r.departure_count
    return (
        departure_ns,
        r.request_id,
        r.code,
        r.user_id,
        r.model_id,
        short(r.slo_factor),
        departure_ns - r.arrival_ns,
        slo_ns if slo_ns > 0 else -1,
        1 if r.deadline_met else 0,
        arrival_count,
        departure_count,
        1 if arrival_count == 0 and departure_count > 0 else 0,
    )


def read_request_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Read a request log into numpy columns (int64; slo_factor float64).

    With `only` nothing but those columns is parsed. Raises MalformedLog.
    """
    return read_table(path, COLUMNS, only=only)
