"""Rows to disk without ever making the caller wait for the disk.

`append` puts a record on a list. Records are made into rows some tens at a time, which is several times
cheaper than one by one between other work: by the caller when there are enough of them, else by a small
thread. That thread hands rows to `os.write`, which releases the interpreter lock; it holds the lock for
some hundred microseconds at a time at most, so the event loop beside it keeps its schedule.

The law of the file: it holds whole lines only. A write that ends midway (full disk, file size limit) is cut
back to its last whole line; the rows that did not fit are dropped and counted, the owner is told once, and
later rows are tried again.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import stat
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slosched.errors import RunDirectoryInUse, SloschedError
from slosched.output_files import write_error

_FLUSH_EVERY_S = 0.1
_ROWS_PER_WRITE = 512
_FORMED_AT_ONCE = 64
_MAX_ROWS = 2_000_000
_CLOSE_TIMEOUT_S = 30.0

Write = Callable[[int, bytes | memoryview], int]


@dataclass(frozen=True)
class LogCounts:
    """What became of the rows: `written` are in the file, `dropped` are not. `error` says why."""

    written: int
    dropped: int
    error: str = ""


@dataclass(frozen=True)
class Rotation:
    """When a log begins anew, and how many older parts stay.

    A file that would grow beyond `max_bytes` becomes NAME.1, what was NAME.1 becomes NAME.2, and parts beyond
    `keep` are deleted. Each part begins with the header. `max_bytes` 0: one file, however large.
    """

    max_bytes: int = 0
    keep: int = 8


_NEVER = Rotation()


def _as_they_are(rows: list[Any]) -> bytes:
    return "\n".join(rows).encode("utf-8", "replace")


class LogWriter:
    """One log file, made anew at `path` with `header` as its first line.

    `rotation` bounds the file. `rows` makes records into lines with newlines between them (default: a
    record is a line, as text).
    `on_error` is called, in words, at most once for a failing disk (from the writer's thread) and
    once for an overflowing buffer (from the caller's); it must not raise. `max_rows` bounds the
    rows that wait; past it rows are dropped and counted. `write` stands in for os.write in tests.
    Rows reach the file within 0.2 s. One thread appends; `close` may come from any.

    Raises RunDirectoryInUse if the file exists, InvalidConfig if it cannot be made, OutOfResources
    on a full disk.
    """

    def __init__(
        self,
        path: Path,
        header: str,
        *,
        on_error: Callable[[str], None],
        rows: Callable[[list[Any]], bytes] = _as_they_are,
        max_rows: int = _MAX_ROWS,
        rotation: Rotation = _NEVER,
        write: Write = os.write,
    ) -> None:
        self.path = path
        self._header = header.encode() + b"\n"
        self._on_error = on_error
        self._max_rows = max_rows
        self._rotation = rotation
        self._write = write
        self._fd = _create(path)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._size = 0  # bytes of whole lines in the file
        self._torn = False  # bytes behind _size could not be cut off yet
        self._make = rows
        self._records: deque[Any] = deque()  # before they are rows
        self._forming = threading.Lock()  # one at a time: rows keep the order of their records
        self._rows: deque[bytes] = deque()
        self._written = 0
        self._lost = 0  # rows that the disk refused
        self._refused = 0  # rows that found the buffer full, or the log closed
        self._error = ""
        self._closing = threading.Event()
        self._close_lock = threading.RLock()  # re-entrant: a signal may strike within close
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"log {path.name}", daemon=True)
        self._thread.start()
        # A process that ends without close(), by an exception say, keeps its rows all the same.
        atexit.register(self.close)

    def append(self, record: Any) -> None:
        """Take one record. Never waits and never raises."""
        records = self._records
        waiting = len(records)
        if self._closed or waiting + len(self._rows) >= self._max_rows:
            self._refuse()
            return
        records.append(record)
        # While the thread has the lock the next append tries again.
        if waiting >= _FORMED_AT_ONCE and self._forming.acquire(blocking=False):
            try:
                self._form()
            finally:
                self._forming.release()

    def counts(self) -> LogCounts:
        """Return what has become of the rows so far; rows that still wait count as neither."""
        return LogCounts(self._written, self._lost + self._refused, self._error)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> LogCounts:
        """Write everything that waits, close the file and return the counts.

        Calling again is harmless. Rows that the disk does not take within `timeout_s` are dropped.
        """
        with self._close_lock:
            if self._closed:
                return self.counts()
            self._closing.set()
            self._thread.join(timeout_s)
            self._closed = True
            atexit.unregister(self.close)
            # The thread's descriptor stays open: closing it could hit another file.
            if self._thread.is_alive():
                self._refused += len(self._rows) + len(self._records)
                self._rows.clear()
                self._records.clear()
                self._report(f"the disk did not take the rest of {self.path} in {timeout_s:.0f} s")
            return self.counts()

    # ----------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        # Signals belong to the main thread: one delivered here would not wake its wait.
        with contextlib.suppress(OSError, ValueError):
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            closing = False
            while not closing:
                closing = self._closing.wait(_FLUSH_EVERY_S)
                self._flush()
        finally:
            os.close(self._fd)

    def _flush(self) -> None:
        if self._size == 0:
            self._write_lines([])
        with self._forming:
            self._form()
        while self._rows:
            batch = [self._rows.popleft() for _ in range(min(len(self._rows), _ROWS_PER_WRITE))]
            self._write_lines(batch)

    def _form(self) -> None:
        """Make rows of the records that are there. The caller holds `_forming`."""
        records = self._records
        taken = [records.popleft() for _ in range(len(records))]
        if not taken:
            return
        try:
            rows = self._make(taken)
        except Exception as error:  # an internal error must end neither the log nor its owner
            self._lost += len(taken)
            self._report(f"{len(taken)} rows of {self.path} could not be made: {error!r}")
            return
        self._rows.extend(rows.split(b"\n"))

    def _write_lines(self, rows: list[bytes]) -> None:
        lines = b"\n".join(rows) + b"\n" if rows else b""
        most = self._rotation.max_bytes
        if most and self._size > len(self._header) and self._size + len(lines) > most:
            self._begin_anew()
        data = (self._header if self._size == 0 else b"") + lines
        done = 0
        try:
            if self._torn:
                self._cut()
            while done < len(data):
                written = self._write(self._fd, memoryview(data)[done:])
                if written <= 0:
                    raise OSError(0, "the disk took no bytes")
                done += written
        except OSError as error:
            done = self._cut_back(data, done)
            self._report(
                f"cannot write {self.path}: {error.strerror or error}; "
                "rows are dropped and counted until it can be written again"
            )
        kept = data.count(b"\n", 0, done) - (1 if done and self._size == 0 else 0)
        self._size += done
        self._written += kept
        self._lost += len(rows) - kept

    def _begin_anew(self) -> None:
        """Make a part of what was written so far. If that fails, the file goes on growing."""
        if not self._regular or self._torn:
            return
        keep = self._rotation.keep
        try:
            for number in range(keep, 0, -1):
                older = self._part(number - 1) if number > 1 else self.path
                if older.exists():
                    older.replace(self._part(number))
            if not keep:
                self.path.unlink()
            fd = _create(self.path)
        except (OSError, SloschedError) as error:
            self._report(f"{self.path} cannot begin anew: {error}")
            return
        os.close(self._fd)
        self._fd, self._size = fd, 0

    def _part(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    def _cut_back(self, data: bytes, done: int) -> int:
        """Leave only the whole lines of the `done` bytes written; return their number of bytes."""
        whole = data.rfind(b"\n", 0, done) + 1
        if whole < done:
            self._torn = True
            with contextlib.suppress(OSError):
                self._cut(self._size + whole)
        return whole

    def _cut(self, size: int | None = None) -> None:
        if self._regular:
            os.ftruncate(self._fd, self._size if size is None else size)
        self._torn = False

    def _refuse(self) -> None:
        self._refused += 1
        if not self._closed and self._refused == 1:
            self._on_error(
                f"{self.path}: {self._max_rows} rows wait for the disk; further rows are dropped"
            )

    def _report(self, text: str) -> None:
        first, self._error = not self._error, self._error or text
        if first:
            self._on_error(text)


def _create(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileExistsError:
        raise RunDirectoryInUse(
            f"{path} exists and logs are never overwritten; choose another directory"
        ) from None
    except OSError as error:
        raise write_error(
            f"cannot make the log {path}: {error.strerror}; choose a directory that can be written",
            error,
        ) from error
