"""Traces of function invocations: the Azure Functions data set's files, read and held in memory.

A file has a header, then for each function four columns about it (owner, app, function, trigger) and
its invocations in each minute, 1,440 for a day (Shahrad et al., USENIX ATC'20). Clockwork's client
looks in AZURE_TRACE_DIR for `invocations_per_function_md.svls.anon.dNN.csv`; the published files
lack the `.svls`.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from slosched.errors import InvalidConfig
from slosched.text_files import no_integer, open_lines

TRACES = 14
#: Without files, functions in the synthetic trace.
SYNTHETIC_ROWS = 18_000
LEADING_COLUMNS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
DAY_MINUTES = 1440
_LEADING = len(LEADING_COLUMNS)
_PATTERNS = (
    "invocations_per_function_md.svls.anon.d{:02d}.csv",
    "invocations_per_function_md.anon.d{:02d}.csv",
)

#: One function's counts by interval, in as few bytes as they fit.
Counts: TypeAlias = "array[int]"


@dataclass(frozen=True)
class Trace:
    """`rows`: each function's counts, the most invoked one first. All rows have the same length."""

    rows: tuple[Counts, ...]

    @property
    def intervals(self) -> int:
        """Intervals in the trace: minutes, in Azure's files."""
        return len(self.rows[0])


def file_name(trace: int) -> str:
    """The published name of trace file `trace` (1 to 14)."""
    return file_names(trace)[-1]


def file_names(trace: int) -> list[str]:
    """Names that the file may have: Clockwork's, then the published one."""
    return [pattern.format(trace) for pattern in _PATTERNS]


def compact(counts: Iterable[int]) -> Counts:
    """`counts` in the smallest unsigned items that hold them. Raises OverflowError beyond 32 bits."""
    wide_counts = array("I", counts)
    highest = max(wide_counts, default=0)
    if highest < 1 << 8:
        return array("B", wide_counts)
    return array("H", wide_counts) if highest < 1 << 16 else wide_counts


def ordered(rows: Iterable[Counts]) -> Trace:
    """The trace of `rows` in file order. Among equal totals the later row comes first, as published."""
    held = list(rows)
    keys = sorted(((sum(row), index) for index, row in enumerate(held)), reverse=True)
    return Trace(tuple(held[index] for _, index in keys))


def read_trace(path: Path) -> Trace:
    """Read a trace file. Raises InvalidConfig with the file and line of what is wrong."""
    with open_lines(path, "the trace") as lines:
        header = _cells(next(lines, ""))
        _check_header(path, header)
        rows = [
            _counts(path, number, line, len(header))
            for number, line in enumerate(lines, start=2)
            if line.strip()
        ]
    if not rows:
        raise InvalidConfig(f"{path}: the trace has a header and no functions")
    return ordered(rows)


def _cells(line: str) -> list[str]:
    line = line.rstrip("\n")
    return next(csv.reader([line]), []) if '"' in line else line.split(",")


def _check_header(path: Path, header: Sequence[str]) -> None:
    """Raise InvalidConfig unless the columns are those about the function and then minutes 1, 2, 3, ...

    A minute that is missing would shift all that follow, and the calls of another would be lost.
    """
    minutes = [cell.strip() for cell in header[_LEADING:]]
    semicolons = "; its columns are separated by semicolons, not commas"
    hint = semicolons if len(header) == 1 and header[0].count(";") > _LEADING else ""
    if not minutes or not minutes[0].isdecimal():
        raise InvalidConfig(
            f"{path}, line 1: this is not the header of such a trace; it has "
            f"{', '.join(LEADING_COLUMNS)} and then the minutes, 1 to {DAY_MINUTES}{hint}"
        )
    for minute, cell in enumerate(minutes, start=1):
        if cell != str(minute):
            raise InvalidConfig(
                f"{path}, line 1: column {_LEADING + minute} is {cell[:40]!r} where minute {minute} should "
                "be; a column was cut out or moved, and the calls of every later minute would be wrong"
            )
    if len(minutes) > DAY_MINUTES:
        raise InvalidConfig(f"{path}, line 1: {len(minutes)} minutes; a day has {DAY_MINUTES}")


def _counts(path: Path, number: int, line: str, columns: int) -> Counts:
    cells = _cells(line)
    if len(cells) != columns:
        raise InvalidConfig(
            f"{path}, line {number}: {len(cells)} columns where the header has {columns}"
        )
    try:
        return compact(map(int, cells[_LEADING:]))
    except (ValueError, OverflowError):
        raise InvalidConfig(f"{path}, line {number}: {_wrong_cell(cells)}") from None


def _wrong_cell(cells: list[str]) -> str:
    """The error that names the cell which is not a count. Slow, and only reached when there is one."""
    for minute, cell in enumerate(cells[_LEADING:], start=1):
        try:
            array("I", (int(cell),))
        except (ValueError, OverflowError):
            return f"minute {minute} holds {cell!r}, which is {_no_count(cell)}"
    return "this is not a row of such a trace"


def _no_count(cell: str) -> str:
    problem = no_integer(cell)
    return (
        "not a count (0, 1, 2, ...)"
        if problem == "not a whole number" or cell.isdecimal()
        else problem
    )


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change, for what is kept of a file: None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
