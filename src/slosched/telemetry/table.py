"""Tab-separated logs: one header row, then a row of numbers and names per line, read in blocks.

The lines come from log_lines.py, the cells from cells.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.telemetry.cells import Block, NotNumbers
from slosched.telemetry.log_lines import LogLines, OtherHeader
from slosched.telemetry.log_lines import MalformedLog as MalformedLog
from slosched.text_files import no_integer, no_number

_INTEGER = re.compile(rb"-?[0-9]+")

Column = NDArray[Any]

_PARSE: dict[type, Callable[[Block, int], Column]] = {
    int: Block.integers,
    float: Block.floats,
    str: Block.texts,
}
_DTYPES: dict[type, Any] = {int: np.int64, float: np.float64, str: np.object_}


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


def read_table(
    path: Path, columns: Mapping[str, type], *, only: Collection[str] | None = None
) -> LogTable:
    """Read the log at `path`, whose columns are `columns` (name -> int, float or str), in that order.

    Integers are of 64 bits, and texts an array of objects. With `only` the other columns are neither read nor
    looked at. An empty file (a run killed before its first write) is a table without rows. Raises MalformedLog
    if the file cannot be read, its header is another one, or a whole line is not a row of it.
    """
    wanted = [name for name in columns if only is None or name in only]
    parts: dict[str, list[Column]] = {name: [] for name in wanted}
    expected = f"the {len(columns)} columns {', '.join(columns)}"
    lines = LogLines(path, header_of(columns), expected)
    try:
        for first, text in lines:
            try:
                block = Block(text, len(columns))
                for place, (name, kind) in enumerate(columns.items()):
                    if name in parts:
                        parts[name].append(_PARSE[kind](block, place))
            except NotNumbers:
                raise _explain(path, text, columns, first) from None
    except OtherHeader as error:
        raise _lacks(path, error.header, columns) or error from None
    return LogTable(path, {n: _joined(parts, n, columns[n]) for n in wanted}, int(lines.torn))


def _joined(parts: dict[str, list[Column]], name: str, kind: type) -> Column:
    """The column in one piece. Its pieces are let go at once: there are columns of 80 MB and more."""
    pieces = parts.pop(name)
    return np.concatenate([np.empty(0, _DTYPES[kind]), *pieces])


def _lacks(path: Path, header: bytes, columns: Mapping[str, type]) -> MalformedLog | None:
    """What to say of a log of an earlier version, whose header lacks some columns; None if it is not one."""
    there = header.decode("utf-8", "replace").split("\t")
    missing = [name for name in columns if name not in there]
    if there != [name for name in columns if name in there] or len(missing) == len(columns):
        return None
    what = f"column {missing[0]}" if len(missing) == 1 else f"columns {', '.join(missing)}"
    return MalformedLog(
        f"{path}, line 1: a log of an earlier version, without the {what}; read it with that version, or make "
        "the run again"
    )


def _explain(path: Path, text: bytes, columns: Mapping[str, type], first: int) -> MalformedLog:
    """Name the first line that is not a row; `first` is the number of the text's first line."""
    for number, line in enumerate(text.split(b"\n")[:-1], start=first):
        cells = line.split(b"\t")
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            return MalformedLog(f"{where}: {len(cells)} cells where there should be {len(columns)}")
        for cell, (name, kind) in zip(cells, columns.items(), strict=True):
            problem = _problem(cell, kind)
            if problem:
                shown = cell.decode("ascii", "replace")
                return MalformedLog(f"{where}: column {name} holds {shown!r}, which is {problem}")
    return MalformedLog(f"{path}: lines {first} and following hold something else than such cells")


def _problem(cell: bytes, kind: type) -> str:
    """What is wrong with `cell`; "" if nothing is."""
    if kind is int:
        if not _INTEGER.fullmatch(cell):
            problem = no_integer(cell.decode("ascii", "replace"))
            return "not an integer" if problem == "not a whole number" else problem
        return "" if len(cell.lstrip(b"-")) < 20 and abs(int(cell)) < 2**63 else "out of range"
    if kind is str:
        try:
            return "" if cell.decode().isprintable() else "not a name"
        except UnicodeDecodeError:
            return "not UTF-8"
    try:
        if not re.search(rb"[\s_]", cell):
            float(cell)
            return ""
    except ValueError:
        pass
    return no_number(cell.decode("ascii", "replace"))
