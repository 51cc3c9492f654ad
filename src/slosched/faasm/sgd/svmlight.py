"""Examples from a file in svmlight's format: lines `LABEL INDEX:VALUE ... [# comment]`, indexes from 1 on.

Labels are numbers: what is above 0 is positive, the rest negative. Files that end in .gz are decompressed.
"""

from __future__ import annotations

import gzip
import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from slosched.errors import InvalidConfig
from slosched.faasm.sgd.examples import FEATURES, Examples, Rows, examples_of

#: A text or a hash of words may have more features than RCV1, but each costs every copy of the weights 8 bytes.
MOST_FEATURES = 50_000_000
MOST_ROWS = 20_000_000
_LONGEST_LINE = 16 << 20


def read_svmlight(path: Path, *, held_out: float, features: int = FEATURES) -> Examples:
    """The examples of the file; the part `held_out` at its end is not trained on.

    There are at least `features` features, more if the file has larger indexes. Raises InvalidConfig with the
    line's number for what is not such a file, for rows without order, and for one with no example.
    """
    offsets, columns, values = array("q", [0]), array("i"), array("d")
    labels = array("d")
    for number, line in _lines(path):
        fields = line.split(b"#", 1)[0].split()
        if not fields:
            continue
        try:
            _add(fields, columns, values, labels)
        except (ValueError, OverflowError) as error:
            raise InvalidConfig(f"{path}, line {number}: {error}") from None
        offsets.append(len(columns))
        if len(labels) > MOST_ROWS:
            raise InvalidConfig(f"{path} has more than {MOST_ROWS:,} examples")
    if not labels:
        raise InvalidConfig(f"{path} has no example")
    rows = Rows(
        np.frombuffer(offsets, np.int64),
        np.frombuffer(columns, np.int32) if columns else np.zeros(0, np.int32),
        np.frombuffer(values, np.float64) if values else np.zeros(0),
        np.frombuffer(labels, np.float64),
    )
    most = int(rows.columns.max()) + 1 if rows.nonzeros else 0
    return examples_of(
        rows,
        held_out=math.floor(held_out * len(rows)),
        features=max(features, most),
        origin=path.name,
        counts=None,
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise InvalidConfig(f"{path}, line {number}: is longer than 16 MiB")
                yield number, line
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidConfig(f"cannot read {path}: {reason}") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if not path.is_file():
        raise InvalidConfig(f"{path} is not a file")
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as packed:
            yield packed  # type: ignore[misc]
    else:
        with path.open("rb") as file:
            yield file


def _add(
    fields: list[bytes], columns: array[int], values: array[float], labels: array[float]
) -> None:
    """Append an example; zeros are left out. Raises ValueError with what is wrong."""
    label = _number(fields[0])
    before = 0
    for field in fields[1:]:
        index_text, colon, value_text = field.partition(b":")
        if not colon or not index_text.isdigit():
            if index_text == b"qid":
                continue
            raise ValueError(f"{_shown(field)} is not INDEX:VALUE")
        index = int(index_text)
        if not 1 <= index <= MOST_FEATURES:
            raise ValueError(f"index {index} is not within 1..{MOST_FEATURES:,}")
        if index <= before:
            raise ValueError(f"index {index} stands behind {before}; indexes ascend")
        before = index
        value = _number(value_text)
        if value:
            columns.append(index - 1)
            values.append(value)
    labels.append(1.0 if label > 0 else -1.0)


def _number(text: bytes) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{_shown(text)} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return value


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))
