"""Tab-separated logs: one header row, then one row of numbers per line, read at C speed.

A line is whole only with its newline, so what a killed process left of its last line is dropped and
counted, never guessed at.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.errors import SloschedError

Column = NDArray[Any]


class MalformedLog(SloschedError):
    """A log file is not what its name says; the message names the file and the line."""

    exit_code = 2


@dataclass(frozen=True)
class LogTable:
    """The columns of one log, each an array of length `len(table)`, in file order.

    `truncated` is 1 if the file ended within a line, which was dropped; else 0.
    """

    path: Path
    columns: Mapping[str, Column]
    truncated: int

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def header_of(columns: Mapping[str, type]) -> str:
    """Return the header row, without a newline."""
    return "\t".join(columns)


def read_table(path: Path, columns: Mapping[str, type]) -> LogTable:
    """Read the log at `path`, whose columns are `columns` (name -> int or float), in that order.

    An empty file (a run killed before its first write) is a table without rows. Raises MalformedLog
    if the file cannot be read, its header is another one, or a whole line is no row of it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MalformedLog(f"cannot read the log {path}: {error.strerror}") from error
    whole, newline, rest = data.rpartition(b"\n")
    truncated = 1 if rest else 0
    header, _, body = (whole + newline).partition(b"\n")
    if newline and header != header_of(columns).encode():
        raise MalformedLog(
            f"{path}, line 1: this is not the header of such a log; expected the {len(columns)} "
            f"columns {', '.join(columns)}"
        )
    return LogTable(path, _parse(path, body, columns), truncated)


def _parse(path: Path, body: bytes, columns: Mapping[str, type]) -> dict[str, Column]:
    dtypes = {
        name: np.dtype(np.float64 if kind is float else np.int64) for name, kind in columns.items()
    }
    if not body.strip():
        return {name: np.empty(0, dtype) for name, dtype in dtypes.items()}
    try:
        with warnings.catch_warnings():
            # numpy only warns of "1.5" in a column of integers.
            warnings.simplefilter("error")
            rows = np.loadtxt(
                io.StringIO(body.decode("ascii")),
                dtype=np.dtype(list(dtypes.items())),
                delimiter="\t",
                comments=None,
                ndmin=1,
            )
    except (ValueError, DeprecationWarning) as error:
        raise _explain(path, body, columns) or MalformedLog(f"{path}: {error}") from error
    return {name: np.ascontiguousarray(rows[name]) for name in columns}


def _explain(path: Path, body: bytes, columns: Mapping[str, type]) -> MalformedLog | None:
    """Find the first line that is no row. Slow, and only reached when there is one."""
    for number, line in enumerate(body.split(b"\n")[:-1], start=2):
        cells = line.decode("ascii", "replace").split("\t")
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            return MalformedLog(f"{where}: {len(cells)} cells where there should be {len(columns)}")
        for cell, (name, kind) in zip(cells, columns.items(), strict=True):
            try:
                kind(cell)
            except ValueError:
                noun = "a number" if kind is float else "an integer"
                return MalformedLog(f"{where}: column {name} holds {cell!r}, which is not {noun}")
    return None
