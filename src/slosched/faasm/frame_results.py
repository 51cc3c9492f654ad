"""results.jsonl of a run: one record on each line, in the order in which the cells ended.

A cell is one configuration of an experiment, named by its key. Its records are appended together when it ends,
and the last one says how many there are, so a cell that a crash or a full disk cut off does not count, and is
made again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from slosched.errors import InvalidConfig
from slosched.output_files import utf8_document, write_error

RESULTS = "results.jsonl"
#: Fields that the frame writes into records: the cell, and in its last one the number of its records.
KEY, RECORDS = "key", "records"
Record = dict[str, Any]


def append_cell(path: Path, key: str, records: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Append the records of the cell `key`, which are at least one; return them as `read_results` would.

    Raises InvalidConfig if a record cannot be written as JSON or uses a field of the frame, OutOfResources on a
    full disk.
    """
    lines = []
    for place, record in enumerate(records, start=1):
        for taken in (KEY, RECORDS):
            if taken in record:
                raise InvalidConfig(
                    f"a record of the cell {key!r} has the field {taken!r}, which is the frame's"
                )
        document: Record = {KEY: key, **record}
        if place == len(records):
            document[RECORDS] = place
        lines.append(_line(key, document))
    try:
        with path.open("ab") as file:
            if file.tell() and not _ends_a_line(path):
                file.write(b"\n")  # behind a line that a crash cut off
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(f"cannot write {path}: {error.strerror}", error) from error
    written: list[Record] = [msgspec.json.decode(line) for line in lines]
    written[-1].pop(RECORDS)
    return written


def read_results(path: Path) -> dict[str, list[Record]]:
    """The records of each complete cell, by its key, in the order of the file. Empty without a file.

    A cell that is there twice counts as it was written last. Raises InvalidConfig if the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InvalidConfig(f"cannot read {path}: {error.strerror}") from None
    cells: dict[str, list[Record]] = {}
    begun: list[Record] = []
    for line in data.splitlines():
        record = _record(line)
        if record is None:
            begun = []
            continue
        if begun and begun[0][KEY] != record[KEY]:
            begun = []
        begun.append(record)
        total = record.pop(RECORDS, None)
        if total is None:
            continue
        if isinstance(total, int) and 0 < total <= len(begun):
            cells.pop(record[KEY], None)
            cells[record[KEY]] = begun[-total:]
        begun = []
    return cells


def _record(line: bytes) -> Record | None:
    try:
        record = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get(KEY), str) else None


def _line(key: str, document: Record) -> bytes:
    try:
        return msgspec.json.encode(utf8_document(document), enc_hook=_plain) + b"\n"
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidConfig(
            f"a record of the cell {key!r} does not fit into JSON: {error}"
        ) from None


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__}")


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
