"""The lines of a log's file, whatever the log holds: its header is checked, and a torn last line is dropped.

A line is whole only with its newline, so what a killed process left of its last line is dropped and counted,
never guessed at.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from slosched.errors import SloschedError
from slosched.text_files import encoding_of

#: Bytes that are read at once: large enough for numpy, small beside the columns they become.
_BLOCK_BYTES = 1 << 21


class MalformedLog(SloschedError):
    """A log file is not what its name says; the message names the file and the line."""

    exit_code = 2


class OtherHeader(MalformedLog):
    """The first line is not the header of such a log; `header` is that line."""

    def __init__(self, message: str, header: bytes) -> None:
        super().__init__(message)
        self.header = header


class LogLines:
    """The log at `path`, whose first line is `header`; `expected` says so in words, for an error.

    Iterate once for (number of the first line, text) of each block of whole lines. `torn` is True afterwards if
    the file ended within a line. An empty file (a run killed before its first write) has no blocks. Iterating
    raises MalformedLog if the file cannot be read or its header is another one.
    """

    def __init__(self, path: Path, header: str, expected: str = "") -> None:
        self.path = path
        self.torn = False
        self._header = header.encode()
        self._expected = expected

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                self._check(_plain(file.readline()))
                number = 2
                for block in _blocks(file):
                    text = block.replace(b"\r\n", b"\n") if b"\r" in block else block
                    if not text.endswith(b"\n"):
                        self.torn = True
                        return
                    yield number, text
                    number += text.count(b"\n")
        except OSError as error:
            raise MalformedLog(f"cannot read the log {self.path}: {error.strerror}") from error

    def _check(self, header: bytes) -> None:
        if header and not header.endswith(b"\n"):
            self.torn = True
        elif header and header[:-1] != self._header:
            expected = f"; expected {self._expected}" if self._expected else ""
            message = f"{self.path}, line 1: this is not the header of such a log{expected}"
            raise OtherHeader(message, header[:-1])


def _plain(header: bytes) -> bytes:
    """The header without the marks of other systems."""
    if encoding_of(header).startswith("utf-16"):
        return header  # it is not one
    header = header.removeprefix(codecs.BOM_UTF8)
    if header.endswith(b"\r\n"):
        return header[:-2] + b"\n"
    return header


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the text in blocks of whole lines; last, if there is one, the line without an end."""
    rest = b""
    while data := file.read(_BLOCK_BYTES):
        whole, newline, after = data.rpartition(b"\n")
        if newline:
            yield rest + whole + newline
            rest = after
        else:
            rest += data
    if rest:
        yield rest
