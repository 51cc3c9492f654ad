"""`call_parts.tsv`: the parts of each call's run, between which it was suspended.

The file is made when the first part ends. `t` is when the part ended, by its worker's clock, in wall-clock ns
of the controller; `ran` is its duration. After it the call was suspended until all children from number
`first` to number `last` were answered; -1 and -1: it was the call's last. A part that awaits several ranges has
a row for each. Every part of a call that ended well is here, and `part` counts them from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from slosched.core.scheduler.interface import CallPart
from slosched.telemetry.rows import Cells, rows_of
from slosched.telemetry.table import LogTable, header_of, read_table

FILE_NAME = "call_parts.tsv"

COLUMNS: dict[str, type] = dict.fromkeys(
    ("t", "call_id", "part", "ran", "first", "last"),
    int,
)
HEADER = header_of(COLUMNS)


def call_part_rows(records: Iterable[CallPart]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return rows_of([cells for record in records for cells in _cells(record)])


def _cells(record: CallPart) -> Iterator[Cells]:
    ran_ns = record.end_ns - record.begin_ns
    for first, last in _ranges(record.awaits):
        yield record.end_ns, record.key, record.part, ran_ns, first, last


def _ranges(children: tuple[int, ...]) -> list[tuple[int, int]]:
    """The numbers as ranges, both ends included, in order; (-1, -1) for none."""
    ranges: list[tuple[int, int]] = []
    for child in sorted(children):
        if ranges and child - 1 <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], child
        else:
            ranges.append((child, child))
    return ranges or [(-1, -1)]


def read_call_part_log(path: Path) -> LogTable:
    """Return the columns of the log at `path`. Raises MalformedLog."""
    return read_table(path, COLUMNS)
