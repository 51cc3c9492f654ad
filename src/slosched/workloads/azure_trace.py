"""Traces of function invocations: the Azure Functions data set's files, read and held in memory.

A file has a header, then for each function four columns about it (owner, app, function, trigger) and
its invocations in each minute, 1,440 for a day (Shahrad et al., USENIX ATC'20). Clockwork's client
looks in AZURE_TRACE_DIR for `invocations_per_function_md.svls.anon.dNN.csv`; the published files
lack the `.svls`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from slosched.errors import InvalidConfig

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
    try:
        with path.open(encoding="utf-8") as lines:
            header = next(lines, "").rstrip("\r\n").split(",")
            columns = len(header)
            if columns <= _LEADING or not header[_LEADING].strip('"').isdigit():
                raise InvalidConfig(
                    f"{path}, line 1: this is no header of such a trace; it has "
                    f"{', '.join(LEADING_COLUMNS)} and then the minutes, 1 to {DAY_MINUTES}"
                )
            rows = [
                _counts(path, number, line, columns)
                for number, line in enumerate(lines, start=2)
                if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidConfig(f"cannot read the trace {path}: {reason}") from None
    if not rows:
        raise InvalidConfig(f"{path}: the trace has a header and no functions")
    return ordered(rows)


def _counts(path: Path, number: int, line: str, columns: int) -> Counts:
    cells = line.rstrip("\r\n").split(",")
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
            return f"minute {minute} holds {cell!r}, which is no count (0, 1, 2, ...)"
    return "this is no row of such a trace"


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
