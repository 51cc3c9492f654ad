"""Writing a trace: one JSON object whose events go to the file as they come.

An event is a line. Times are in us with three decimals, so nothing is lost of a ns. The file appears under
its name when it is whole; after an error nothing is left of it.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from slosched.output_files import new_file, utf8_document


class TraceFile:
    """The trace at `path`, written within `with`; gzip if the name ends in .gz.

    `about` is shown by the viewer as the trace's information. `events` counts what was added. Raises
    InvalidConfig if the file cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, object]) -> None:
        self.events = 0
        self._path = path
        self._about = about
        self._open = ExitStack()
        self._write: Callable[[bytes], object] = _not_open

    def __enter__(self) -> TraceFile:
        with ExitStack() as opened:
            raw = opened.enter_context(new_file(self._path))
            self._write = raw.write
            if self._path.name.endswith(".gz"):
                # Without name and time in its header, the same trace is the same bytes.
                packed = gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0)
                opened.enter_context(packed)
                self._write = packed.write
            self._write(
                b'{"displayTimeUnit":"ms","otherData":'
                + msgspec.json.encode(utf8_document(self._about))
                + b',"traceEvents":['
            )
            self._open = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._open as opened:
            if error is not None:
                opened.__exit__(kind, error, traceback)
            else:
                self._write(b"\n]}\n")

    def add(self, event: str) -> None:
        """Add one event, a JSON object as text."""
        self._write((",\n" if self.events else "\n").encode() + event.encode())
        self.events += 1

    def add_dict(self, event: Mapping[str, Any]) -> None:
        """Add one event."""
        self.add(msgspec.json.encode(utf8_document(event)).decode())


def _not_open(data: bytes) -> object:
    raise ValueError("events are added within `with`")


def us(time_ns: int) -> str:
    """A time of the format: us, to the ns."""
    sign = "-" if time_ns < 0 else ""
    whole, rest = divmod(abs(time_ns), 1000)
    return f"{sign}{whole}.{rest:03d}" if rest else f"{sign}{whole}"
