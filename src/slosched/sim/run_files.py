"""The files of a simulated run: the same TSVs and manifest as live, written as rows come.

Nothing waits for these rows, so they need no thread: they are formatted at once, kept as text until
there are enough for a write, and forgotten. Memory does not grow with the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from slosched.errors import InvalidConfig, RunDirectoryInUse, SloschedError
from slosched.telemetry import action_log, client_log, request_log

_ROWS_PER_WRITE = 2048

_Record = TypeVar("_Record")


class RowsNotWritten(SloschedError):
    """A row could not be written (disk full, directory gone)."""


class RowFile:
    """One log at `path`, made anew, with `header` as its first line.

    `append` takes a row without its newline. Files hold whole lines only, also of a run that was
    stopped. Raises RunDirectoryInUse if the file exists, RowsNotWritten when the disk takes no more.
    """

    def __init__(self, path: Path, header: str) -> None:
        self.rows = 0
        self._path = path
        self._waiting: list[str] = []
        try:
            self._fd = os.open(
                path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
        except FileExistsError:
            raise RunDirectoryInUse(
                f"{path} exists and logs are never overwritten; choose another directory"
            ) from None
        except OSError as error:
            raise InvalidConfig(f"cannot make the log {path}: {error.strerror}") from error
        self._write(header + "\n")

    def append(self, row: str) -> None:
        waiting = self._waiting
        waiting.append(row)
        if len(waiting) >= _ROWS_PER_WRITE:
            self.flush()

    def taking(self, format_row: Callable[[_Record], str]) -> Callable[[_Record], None]:
        """Return what takes a record and appends its row: one call for each, not three."""
        waiting, flush = self._waiting, self.flush
        most = _ROWS_PER_WRITE

        def take(record: _Record) -> None:
            waiting.append(format_row(record))
            if len(waiting) >= most:
                flush()

        return take

    def flush(self) -> None:
        """Write what waits."""
        waiting = self._waiting
        if waiting:
            rows = len(waiting)
            text = "\n".join(waiting) + "\n"
            waiting.clear()
            self._write(text)
            self.rows += rows

    def _write(self, text: str) -> None:
        data = memoryview(text.encode("ascii"))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
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
    """The three logs in `directory`; `on_request`, `on_action` and `on_client` take records."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests = RowFile(directory / request_log.FILE_NAME, request_log.HEADER)
        self.actions = RowFile(directory / action_log.FILE_NAME, action_log.HEADER)
        self.clients = RowFile(directory / client_log.FILE_NAME, client_log.HEADER)
        self.on_request = self.requests.taking(request_log.format_request)
        self.on_action = self.actions.taking(action_log.format_action)
        self.on_client = self.clients.taking(client_log.format_client)

    def close(self) -> dict[str, int]:
        """Write everything; returns how many rows each log has."""
        for log in (self.requests, self.actions, self.clients):
            log.close()
        return {
            "request_rows": self.requests.rows,
            "action_rows": self.actions.rows,
            "client_rows": self.clients.rows,
        }
