"""Examples from a file in svmlight's format: lines `LABEL INDEX:VALUE ... [# comment]`.

Indexes count from 1, or from 0 in a file that has a 0. Labels are numbers: of two the larger is positive, of
more those above 0. Files that end in .gz are decompressed.
"""

from __future__ import annotations

import codecs
import gzip
import math
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

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
    indexes = np.frombuffer(columns, np.int32) if columns else np.ones(0, np.int32)
    rows = Rows(
        np.frombuffer(offsets, np.int64),
        indexes if indexes.min(initial=1) == 0 else indexes - 1,
        np.frombuffer(values, np.float64) if values else np.zeros(0),
        _signs(path, np.frombuffer(labels, np.float64)),
    )
    most = int(rows.columns.max()) + 1 if rows.nonzeros else 0
    return examples_of(
        rows,
        held_out=math.floor(held_out * len(rows)),
        features=max(features, most),
        origin=path.name,
        counts=None,
    )


def _signs(path: Path, labels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 for positive examples, -1 for the others."""
    found = np.unique(labels)
    if len(found) == 1:
        raise InvalidConfig(
            f"all labels in {path} are {found[0]:g}: there is nothing to tell apart"
        )
    return np.where(labels > (found[0] if len(found) == 2 else 0.0), 1.0, -1.0)


def check_readable(path: Path) -> None:
    """Raise InvalidConfig if there is no such file, or it may not be read."""
    for _ in _lines(path):
        return


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with _opened(path) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
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
    before = -1
    for field in fields[1:]:
        index_text, colon, value_text = field.partition(b":")
        if not colon or not index_text.isdigit():
            if index_text == b"qid":
                continue
            raise ValueError(f"{_shown(field)} is not INDEX:VALUE")
        index = int(index_text)
        if index > MOST_FEATURES:
            raise ValueError(f"index {index} is not within 0..{MOST_FEATURES:,}")
        if index <= before:
            raise ValueError(f"index {index} stands behind {before}; indexes ascend")
        before = index
        value = _number(value_text)
        if value:
            columns.append(index)
            values.append(value)
    labels.append(label)


def _number(text: bytes) -> float:
    try:
        if b"_" in text:  # which Python takes within a number
            raise ValueError
        value = float(text)
    except ValueError:
        raise ValueError(f"{_shown(text)} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{_shown(text)} is not a finite number")
    return value


def _shown(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))
