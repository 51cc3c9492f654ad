"""The file of rows that a member appends to: encoded by the few, written by whole chunks once a second.

To encode a row costs about 2 us and to write a chunk 20 to 50, between two requests of an eager model or while
a graph runs; so neither the latencies nor a kill -9 lose much.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from slosched.errors import OutOfResources
from slosched.share_spec import Interruption, Request, Row
from slosched.units import NS_PER_S

_CHUNK = 1 << 16
_EVERY_NS = NS_PER_S // 2


class RowFile:
    """Rows of all lanes of a member. Several threads may use it.

    Raises OutOfResources if the file cannot be opened or written.
    """

    def __init__(self, path: Path, now: Callable[[], int]) -> None:
        self._now = now
        self._encode = msgspec.json.Encoder().encode
        self._pending = bytearray()
        self._lock = threading.Lock()
        self._due_ns = 0
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise OutOfResources(f"the rows cannot be written: {error}") from None

    def take(self, rows: Sequence[Request | Interruption]) -> None:
        """Keep `rows`; a full chunk is written at once."""
        pending, encode = self._pending, self._encode
        with self._lock:
            for row in rows:
                line = Row(request=row) if isinstance(row, Request) else Row(interruption=row)
                pending += encode(line)
                pending += b"\n"
            if len(pending) > _CHUNK:
                self._write()

    def tick(self) -> None:
        """Write what is kept if the last time is half a second ago."""
        if self._now() >= self._due_ns:
            self.flush()

    def flush(self) -> None:
        """Write all that is kept."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._due_ns = self._now() + _EVERY_NS
        try:
            while self._pending:
                written = os.write(self._file, self._pending)
                del self._pending[:written]
        except OSError as error:
            raise OutOfResources(f"the rows cannot be written: {error}") from None

    def close(self) -> None:
        """Write what is kept and close the file."""
        try:
            self.flush()
        finally:
            os.close(self._file)
