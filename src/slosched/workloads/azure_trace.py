"""Traces of function invocations: the Azure Functions data set's files, read and held in memory.

A file has a header, then for each function four columns about it (owner, app, function, trigger) and
its invocations in each minute, 1,440 for a day (Shahrad et al., USENIX ATC'20). Clockwork's client
looks in AZURE_TRACE_DIR for `invocations_per_function_md.svls.anon.dNN.csv`; the published files
lack the `.svls`.
"""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from slosched.errors import InvalidConfig
from slosched.text_files import no_integer, open_lines

DIRECTORY_VARIABLE = "AZURE_TRACE_DIR"
TRACES = 14
LEADING_COLUMNS = ("HashOwner", "HashApp", "HashFunction", "Trigger")
#: Without files, functions in the synthetic trace.
SYNTHETIC_ROWS = 18_000
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
    return _PATTERNS[-1].format(trace)


def compact(counts: Iterable[int]) -> Counts:
    """`counts` in the smallest unsigned items that hold them. Raises OverflowError beyond 32 bits."""
    wide = array("I", counts)
    highest = max(wide, default=0)
    if highest < 1 << 8:
        return array("B", wide)
    return array("H", wide) if highest < 1 << 16 else wide


def ordered(rows: Iterable[Counts]) -> Trace:
    """The trace of `rows` in file order. Of equal totals the later row comes first, as published."""
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
    """Which count is none. Slow, and only reached when there is one."""
    for minute, cell in enumerate(cells[_LEADING:], start=1):
        try:
            array("I", (int(cell),))
        except (ValueError, OverflowError):
            return f"minute {minute} holds {cell!r}, which is {_no_count(cell)}"
    return "this is not a row of such a trace"


def _no_count(cell: str) -> str:
    said = no_integer(cell)
    return (
        "not a count (0, 1, 2, ...)" if said == "not a whole number" or cell.isdecimal() else said
    )


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change, for what is kept of a file: None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class TraceSource:
    """Where a trace comes from: the file at `path`, or, without one, the generator with seed `number`."""

    number: int
    path: Path | None = None

    def load(self) -> Trace:
        """The trace; the two used last are kept. Raises what read_trace raises."""
        return _load(self, file_stamp(self.path) if self.path else None)

    def describe(self) -> str:
        """Where it comes from, in words."""
        if self.path:
            return f"trace {self.path}"
        return (
            f"a synthetic trace (seed {self.number}, {SYNTHETIC_ROWS} functions; "
            f"{DIRECTORY_VARIABLE} names a directory of real ones)"
        )


@lru_cache(maxsize=2)
def _load(source: TraceSource, stamp: object) -> Trace:
    if source.path:
        return read_trace(source.path)
    from slosched.workloads.azure_synthetic import synthetic_trace

    return synthetic_trace(rows=SYNTHETIC_ROWS, minutes=DAY_MINUTES, seed=source.number)


def find_trace(number: int) -> TraceSource:
    """Trace `number` of AZURE_TRACE_DIR, or a synthetic one where that is not set.

    Raises InvalidConfig if the directory holds no such file.
    """
    directory = os.environ.get(DIRECTORY_VARIABLE, "")
    if not directory:
        return TraceSource(number)
    names = [pattern.format(number) for pattern in _PATTERNS]
    for name in names:
        path = Path(directory) / name
        if path.is_file():
            return TraceSource(number, path)
    raise InvalidConfig(
        f"{DIRECTORY_VARIABLE} is {directory}, which holds neither {names[0]} nor {names[1]}; unset "
        "it to replay a synthetic trace, or make one there (slosched azure-trace)"
    )
