"""`clockwork_request_log.tsv`: one row per answered request (Clockwork, docs/telemetry.md).

Names, order and units are the published ones, so that the published plotters read it unchanged. `t`
is the *departure* of the answer, in wall-clock ns; `latency` and `deadline` are ns from arrival at
the controller; `slo_factor` 0 means that an absolute or the default SLO was used.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from slosched.core.scheduler.interface import RequestRecord
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
    """Return the row of `record`, without a newline.

    `deadline` is -1 for a request that never had one (an unknown model). A cold start is one whose
    model was on no GPU at arrival and on some at departure, whoever loaded it.
    """
    r = record
    cold = r.arrival_count == 0 and r.departure_count > 0
    # %g: six significant digits, as a C++ stream prints a float; enough to tell SLO steps apart.
    return (
        f"{r.departure_ns}\t{r.request_id}\t{int(r.code)}\t{r.user_id}\t{r.model_id}"
        f"\t{r.slo_factor:g}\t{r.departure_ns - r.arrival_ns}\t{r.slo_ns if r.slo_ns > 0 else -1}"
        f"\t{int(r.deadline_met)}\t{r.arrival_count}\t{r.departure_count}\t{int(cold)}"
    )


def read_request_log(path: Path, *, only: Collection[str] | None = None) -> LogTable:
    """Read a request log into numpy columns (int64; slo_factor float64).

    With `only` nothing but those columns is parsed. Raises MalformedLog.
    """
    return read_table(path, COLUMNS, only=only)
