"""`cascade_plans.tsv`: one row per plan that an allocator made for a cascade.

`t` is in wall-clock ns. `demand` and `heavy_demand` are the requests/s of each stage that the plan is made for;
`light_queued` and `heavy_queued` the requests that waited then. `role_changes` is the number of GPUs that serve
another stage from now on; `feasible` is 0 where no plan meets the demand within the SLO. `cascade` is its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from slosched.core.scheduler.interface import PlanRecord
from slosched.telemetry.rows import Cells, name_cell, named_rows_of, short
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "cascade_plans.tsv"

COLUMNS: dict[str, type] = {
    "t": int,
    "threshold": float,
    "light_gpus": int,
    "heavy_gpus": int,
    "light_batch": int,
    "heavy_batch": int,
    "demand": float,
    "heavy_demand": float,
    "light_queued": int,
    "heavy_queued": int,
    "role_changes": int,
    "feasible": int,
    "cascade": str,
}
HEADER = header_of(COLUMNS)


def plan_rows(records: Iterable[PlanRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return named_rows_of([_cells(record) for record in records])


def _cells(record: PlanRecord) -> Cells:
    return (
        record.at_ns,
        short(record.threshold),
        record.light_gpus,
        record.heavy_gpus,
        record.light_batch,
        record.heavy_batch,
        short(record.demand),
        short(record.heavy_demand),
        record.light_queued,
        record.heavy_queued,
        record.role_changes,
        int(record.feasible),
        name_cell(record.cascade),
    )


def read_plan_log(path: Path) -> LogTable:
    """Return the columns of the log at `path`. Raises MalformedLog."""
    return read_table(path, COLUMNS)
