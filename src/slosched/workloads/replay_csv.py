"""Arrivals of one's own as a CSV: `timestamp[,model][,slo]`, for the workload `replay`.

`timestamp` is in seconds (from any origin, Unix time say) or a date and time of ISO 8601; `model` is any
text, and each text is an instance of its own; `slo` is a duration ("25ms"), a bare number in seconds, or
empty for the default SLO. Columns may stand in any order, and others are ignored. Rows need not be in order.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path

from slosched.errors import InvalidConfig, InvalidDuration
from slosched.units import NS_PER_S, parse_duration_ns

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_S = 2**62 // NS_PER_S


@dataclass(frozen=True)
class CsvRow:
    """One arrival: ns since the timestamps' origin, the model's text, the SLO in ns (0: the default)."""

    at_ns: int
    model: str
    slo_ns: int


def is_csv_header(line: str) -> bool:
    """True for a first line that names a column `timestamp`, with commas between the columns."""
    return "timestamp" in _names(line)


def csv_rows(path: Path, header: str, lines: Iterable[str]) -> Iterator[CsvRow]:
    """Yield the arrivals behind `header`. Raises InvalidConfig with the line of what is wrong."""
    names = _names(header)
    for wanted in ("timestamp", "model", "slo"):
        if names.count(wanted) > 1:
            raise InvalidConfig(f"{path}, line 1: the column {wanted} is there twice")
    time = names.index("timestamp")
    model = names.index("model") if "model" in names else -1
    slo = names.index("slo") if "slo" in names else -1
    for number, cells in enumerate(csv.reader(lines), start=2):
        if not cells:
            continue
        if len(cells) != len(names):
            raise InvalidConfig(
                f"{path}, line {number}: {len(cells)} columns, but the header has {len(names)}"
            )
        try:
            yield CsvRow(
                _time_ns(cells[time].strip()),
                cells[model].strip() if model >= 0 else "",
                _slo_ns(cells[slo].strip()) if slo >= 0 else 0,
            )
        except (ValueError, InvalidDuration) as error:
            raise InvalidConfig(f"{path}, line {number}: {error}") from None


def _names(line: str) -> list[str]:
    cells: Sequence[str] = next(csv.reader([line]), [])
    return [cell.strip().lower() for cell in cells]


def _time_ns(text: str) -> int:
    try:
        seconds = Decimal(text)
    except InvalidOperation:
        return _date_ns(text)
    if not seconds.is_finite() or abs(seconds) >= _MAX_S:
        raise ValueError(f"column timestamp: {text[:40]!r} is out of range; give it in seconds")
    return int(seconds * NS_PER_S)


def _date_ns(text: str) -> int:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"column timestamp: {text[:40]!r} is neither a number of seconds nor a date of ISO 8601 "
            "(2026-01-31T12:00:00.250Z)"
        ) from None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000


def _slo_ns(text: str) -> int:
    if not text:
        return 0
    try:
        value_ns = parse_duration_ns(text, bare_unit="s")
    except InvalidDuration as error:
        raise InvalidDuration(f"column slo: {error}") from None
    if value_ns < 1:
        raise ValueError(f"column slo: {text[:40]!r} is too short; leave it empty for the default")
    return value_ns
