"""Tab-separated logs: one header row, then one row of numbers per line, read in blocks.

A line is whole only with its newline, so what a killed process left of its last line is dropped and
counted, never guessed at.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from slosched.errors import SloschedError
from slosched.telemetry.cells import Block, NotNumbers
from slosched.text_files import encoding_of, no_integer, no_number

#: Bytes that are parsed at once: large enough for numpy, small beside the columns they become.
_BLOCK_BYTES = 1 << 21

_INTEGER = re.compile(rb"-?[0-9]+")

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


def read_table(
    path: Path, columns: Mapping[str, type], *, only: Collection[str] | None = None
) -> LogTable:
    """Read the log at `path`, whose columns are `columns` (name -> int or float), in that order.

    Integers are of 64 bits. With `only` the other columns are neither read nor looked at. An empty
    file (a run killed before its first write) is a table without rows. Raises MalformedLog if the
    file cannot be read, its header is another one, or a whole line is not a row of it.
    """
    wanted = [name for name in columns if only is None or name in only]
    parts: dict[str, list[Column]] = {name: [] for name in wanted}
    try:
        with path.open("rb") as file:
            header = _plain(file.readline())
            _check_header(path, header, columns)
            line, torn = 2, bool(header) and not header.endswith(b"\n")
            for block_text in _blocks(file):
                text = block_text.replace(b"\r\n", b"\n") if b"\r" in block_text else block_text
                if not text.endswith(b"\n"):
                    torn = True
                    break
                try:
                    block = Block(text, len(columns))
                    for place, (name, kind) in enumerate(columns.items()):
                        if name in parts:
                            parse = block.floats if kind is float else block.integers
                            parts[name].append(parse(place))
                except NotNumbers:
                    raise _explain(path, text, columns, line) from None
                line += block.rows
    except OSError as error:
        raise MalformedLog(f"cannot read the log {path}: {error.strerror}") from error
    return LogTable(path, {n: _joined(parts, n, columns[n]) for n in wanted}, int(torn))


def _plain(header: bytes) -> bytes:
    """The header without the marks of other systems."""
    if encoding_of(header).startswith("utf-16"):
        return header  # is none
    header = header.removeprefix(codecs.BOM_UTF8)
    if header.endswith(b"\r\n"):
        return header[:-2] + b"\n"
    return header


def _check_header(path: Path, header: bytes, columns: Mapping[str, type]) -> None:
    if header.endswith(b"\n") and header[:-1] != header_of(columns).encode():
        raise MalformedLog(
            f"{path}, line 1: this is not the header of such a log; expected the {len(columns)} "
            f"columns {', '.join(columns)}"
        )


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the text in blocks of whole lines; last, if there is one, the line without an end."""
    rest = b""
    while data := file.read(_BLOCK_BYTES):
        whole, newline, after = data.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = after
        else:
            rest += data
    if rest:
        yield rest


def _joined(parts: dict[str, list[Column]], name: str, kind: type) -> Column:
    """The column in one piece. Its pieces are let go at once: there are columns of 80 MB and more."""
    pieces = parts.pop(name)
    return np.concatenate([np.empty(0, np.float64 if kind is float else np.int64), *pieces])


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
    return MalformedLog(f"{path}: lines {first} and following hold something else than numbers")


def _problem(cell: bytes, kind: type) -> str:
    """What is wrong with `cell`; "" if nothing is."""
    if kind is int:
        if not _INTEGER.fullmatch(cell):
            problem = no_integer(cell.decode("ascii", "replace"))
            return "not an integer" if problem == "not a whole number" else problem
        return "" if len(cell.lstrip(b"-")) < 20 and abs(int(cell)) < 2**63 else "out of range"
    try:
        if not re.search(rb"[\s_]", cell):
            float(cell)
            return ""
    except ValueError:
        pass
    return no_number(cell.decode("ascii", "replace"))
