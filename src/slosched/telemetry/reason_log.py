"""`request_reasons.jsonl`: why each request that was not answered in time was not, in words and numbers.

The published logs have no room for a reason or a prediction, so these stand in our own file beside them. Only
requests that were refused, failed or answered late have a row: what a run does well costs nothing here. The
first line is the list of column names, each further line the list of a request's values, both as JSON: a
reason may hold any text (a model's exception), and JSON keeps it on one line without control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from slosched.core.scheduler.interface import RequestRecord
from slosched.telemetry.log_lines import LogLines, MalformedLog

FILE_NAME = "request_reasons.jsonl"

_MOST_CHARACTERS = 2_000  # of a reason


class Reason(NamedTuple):
    """One row. Times in ns; `t` is wall-clock time, all others are durations from arrival.

    `predicted_start` and `start` are -1 and `predicted_exec` and `exec` 0 where there was none.
    """

    t: int
    request_id: int
    user_id: int
    model_id: int
    code: int
    reason: str
    deadline: int
    latency: int
    arrival_count: int
    batch_size: int
    worker_id: int
    gpu_id: int
    attempts: int
    predicted_start: int
    predicted_exec: int
    start: int
    exec: int


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Reason)
HEADER = _encoder.encode(Reason._fields).decode()


def has_row(record: RequestRecord) -> bool:
    """True for what was not answered in time."""
    return not record.deadline_met


def reason_of(record: RequestRecord) -> Reason:
    r = record
    return Reason(
        t=r.departure_ns,
        request_id=r.request_id,
        user_id=r.user_id,
        model_id=r.model_id,
        code=int(r.code),
        reason=r.reason[:_MOST_CHARACTERS],
        deadline=r.slo_ns,
        latency=r.departure_ns - r.arrival_ns,
        arrival_count=r.arrival_count,
        batch_size=r.batch_size,
        worker_id=r.worker_id,
        gpu_id=r.gpu_id,
        attempts=r.attempts,
        predicted_start=r.predicted_start_ns,
        predicted_exec=r.predicted_exec_ns,
        start=r.start_ns,
        exec=r.exec_ns,
    )


def reason_rows(records: Iterable[RequestRecord]) -> bytes:
    """Return the rows of `records`, without a newline at the end."""
    return _encoder.encode_lines([reason_of(record) for record in records])[:-1]


def read_reasons(path: Path) -> Iterator[Reason]:
    """Yield the rows of a log, in order; what a killed process left of its last line is left out.

    Raises MalformedLog if the file cannot be read, or holds something else.
    """
    for first, text in LogLines(path, HEADER):
        for number, line in enumerate(text.split(b"\n")[:-1], start=first):
            try:
                yield _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise MalformedLog(f"{path}, line {number}: {error}") from None
