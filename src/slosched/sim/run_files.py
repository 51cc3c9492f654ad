"""The files of a simulated run: the same logs and manifest as live, written as rows come.

Nothing waits for these rows, so they need no thread: records are kept until there are enough for a write,
written, and forgotten. Memory does not grow with the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slosched.core.scheduler.interface import (
    ActionRecord,
    CallPart,
    CallRecord,
    PlanRecord,
    RequestRecord,
    StageRecord,
)
from slosched.errors import RunDirectoryInUse, SloschedError
from slosched.output_files import write_error
from slosched.telemetry import (
    action_log,
    call_log,
    call_part_log,
    client_log,
    plan_log,
    reason_log,
    request_log,
    segment_log,
    stage_log,
)

_ROWS_PER_WRITE = 2048

Rows = Callable[[list[Any]], bytes]


class RowsNotWritten(SloschedError):
    """A row could not be written (disk full, directory gone)."""


class RowFile:
    """One log at `path`, made anew, with `header` as its first line. `rows` makes records into lines.

    Files hold whole lines only, also of a run that was
    stopped. Raises RunDirectoryInUse if the file exists, RowsNotWritten when the disk takes no more.
    """

    def __init__(self, path: Path, header: str, rows: Rows) -> None:
        self.rows = 0
        self._path = path
        self._make = rows
        self._waiting: list[Any] = []
        try:
            self._fd = os.open(
                path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        except FileExistsError:
            raise RunDirectoryInUse(
                f"{path} exists and logs are never overwritten; choose another directory"
            ) from None
        except OSError as error:
            raise write_error(f"cannot make the log {path}: {error.strerror}", error) from error
        self._write(header.encode() + b"\n")

    def append(self, record: Any) -> None:
        waiting = self._waiting
        waiting.append(record)
        if len(waiting) >= _ROWS_PER_WRITE:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        waiting = self._waiting
        if waiting:
            data = self._make(waiting) + b"\n"
            rows = len(waiting)
            waiting.clear()
            self._write(data)
            self.rows += rows

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            raise RowsNotWritten(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        """Write what waits and close the file. Idempotent."""
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1


class RunFiles:
    """The four logs in `directory`; `on_request`, `on_action` and `on_client` take records."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests = RowFile(
            directory / request_log.FILE_NAME, request_log.HEADER, request_log.request_rows
        )
        self.actions = RowFile(
            directory / action_log.FILE_NAME, action_log.HEADER, action_log.action_rows
        )
        self.clients = RowFile(
            directory / client_log.FILE_NAME, client_log.HEADER, client_log.client_rows
        )
        self.reasons = RowFile(
            directory / reason_log.FILE_NAME, reason_log.HEADER, reason_log.reason_rows
        )
        self.stages: RowFile | None = None  # made for the first request with a second stage
        self.plans: RowFile | None = None  # made for the first plan of a cascade
        self.segments: RowFile | None = None  # made for the first Infer that was interrupted
        self.calls: RowFile | None = None  # made for the first call of a function that ends
        self.parts: RowFile | None = None
        self.on_client = self.clients.append

    def on_request(self, record: RequestRecord) -> None:
        self.requests.append(record)
        if reason_log.has_row(record):
            self.reasons.append(record)

    def on_action(self, record: ActionRecord) -> None:
        if action_log.has_row(record):
            self.actions.append(record)
        if record.segments:
            if self.segments is None:
                path = self.directory / segment_log.FILE_NAME
                self.segments = RowFile(path, segment_log.HEADER, segment_log.segment_rows)
            self.segments.append(record)

    def on_stage(self, record: StageRecord) -> None:
        if self.stages is None:
            path = self.directory / stage_log.FILE_NAME
            self.stages = RowFile(path, stage_log.HEADER, stage_log.stage_rows)
        self.stages.append(record)

    def on_plan(self, record: PlanRecord) -> None:
        if self.plans is None:
            path = self.directory / plan_log.FILE_NAME
            self.plans = RowFile(path, plan_log.HEADER, plan_log.plan_rows)
        self.plans.append(record)

    def on_call(self, record: CallRecord) -> None:
        if self.calls is None:
            path = self.directory / call_log.FILE_NAME
            self.calls = RowFile(path, call_log.HEADER, call_log.call_rows)
        self.calls.append(record)

    def on_call_part(self, record: CallPart) -> None:
        if self.parts is None:
            path = self.directory / call_part_log.FILE_NAME
            self.parts = RowFile(path, call_part_log.HEADER, call_part_log.call_part_rows)
        self.parts.append(record)

    def close(self) -> dict[str, int]:
        """Write everything. Returns the number of rows of each log."""
        stages = {}
        if self.plans is not None:
            self.plans.close()
            stages["plan_rows"] = self.plans.rows
        if self.stages is not None:
            self.stages.close()
            stages["stage_rows"] = self.stages.rows
        if self.segments is not None:
            self.segments.close()
            stages["interrupted_actions"] = self.segments.rows
        if self.calls is not None:
            self.calls.close()
            stages["call_rows"] = self.calls.rows
        if self.parts is not None:
            self.parts.close()
            stages["call_part_rows"] = self.parts.rows
        for log in (self.requests, self.actions, self.clients, self.reasons):
            log.close()
        return {
            "request_rows": self.requests.rows,
            "action_rows": self.actions.rows,
            "client_rows": self.clients.rows,
            "reason_rows": self.reasons.rows,
            **stages,
        }
