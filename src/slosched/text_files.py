"""Texts that people hand in: TOML, CSV and tab-separated logs, written on any system.

One rule for all of them. A byte order mark is passed over, UTF-16 (PowerShell's `>`) is understood, and lines
may end as on Windows. A number has a decimal point and all its digits: what a spreadsheet rounded, or wrote
with a comma, is refused, since the times in a log have 19 digits and it keeps 15.
"""

from __future__ import annotations

import codecs
import errno
import os
import re
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO

from slosched.errors import InvalidConfig

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECIMAL_COMMA = re.compile(
    r"[+-]?\d{1,3}(\.\d{3})*,\d+([eE][+-]?\d+)?|[+-]?\d+,\d*([eE][+-]?\d+)?"
)
_NULL = os.makedev(1, 3)
#: Characters of a text that is read whole, and of one that people write. A device such as /dev/zero has no end.
_LONGEST = 256 << 20
LONGEST_WRITTEN = 16 << 20
_ROUNDED = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+|[+-]?\d+\.\d*")


def encoding_of(start: bytes) -> str:
    """The encoding that a file which begins with `start` says it has; UTF-8 if it says none."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def read_text(path: Path, what: str, *, longest: int = _LONGEST) -> str:
    """The text of the file at `path`, with "\\n" at each line's end. `what` it is ("the log") stands before
    its name in errors; empty, the name is enough.

    Raises InvalidConfig if it cannot be read, is not text or has more than `longest` characters.
    """
    with reading(path, what), _opened(path) as file:
        text = _wrapped(file).read(longest + 1)
    if len(text) > longest:
        raise InvalidConfig(
            f"cannot read {f'{what} {path}'.strip()}: it is longer than {longest >> 20} MiB"
        )
    return text


@contextmanager
def open_lines(path: Path, what: str) -> Iterator[Iterator[str]]:
    """Read the lines of the file at `path`, each with "\\n" at its end. Raises as `read_text`."""
    with reading(path, what), _opened(path) as file:
        yield _wrapped(file)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong while the file `path` is read into an InvalidConfig."""
    named = f"{what} {path}".strip()
    try:
        yield
    except OSError as error:
        raise InvalidConfig(f"cannot read {named}: {error.strerror}") from None
    except UnicodeError as error:
        reason = getattr(error, "reason", None) or str(error)
        raise InvalidConfig(f"cannot read {named}: it is not UTF-8 text ({reason})") from None


def read_toml(path: Path, what: str) -> tuple[str, dict[str, Any]]:
    """The text of a TOML file and what it says. Raises InvalidConfig, with the line and column of an error."""
    text = read_text(path, what, longest=LONGEST_WRITTEN)
    return text, toml_of(text, str(path))


def toml_text(data: bytes, name: str) -> str:
    """The text of a TOML file, which its reader has bounded. Raises InvalidConfig if they are not text."""
    with reading(Path(name), ""):
        return _wrapped(BytesIO(data)).read()


def toml_of(text: str, name: str) -> dict[str, Any]:
    """What a TOML text says; `name` is that of its file. Raises InvalidConfig, with line and column."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise InvalidConfig(f"{name} is not a TOML file: it is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
        reason = str(error).replace(
            "at end of document", f"at line {line}, column {column}, the end of the file"
        )
        raise InvalidConfig(f"{name} is not a TOML file: {reason}") from None


def no_integer(text: str) -> str:
    """What `text` is instead of a whole number, for an error about a cell."""
    text = text.strip()
    if _DECIMAL_COMMA.fullmatch(text):
        return _COMMA
    if _ROUNDED.fullmatch(text):
        return "a number that a spreadsheet rounded; export the column as text, with all its digits"
    return "not a whole number"


def no_number(text: str) -> str:
    """What `text` is instead of a number, for an error about a cell."""
    return _COMMA if _DECIMAL_COMMA.fullmatch(text.strip()) else "not a number"


_COMMA = "a number with a decimal comma; export the file with decimal points"


def _opened(path: Path) -> BinaryIO:
    """The file at `path`, opened. Raises OSError, also for a device that has no end or only noise."""
    file = path.open("rb")
    mode = os.fstat(file.fileno())
    if stat.S_ISCHR(mode.st_mode) and mode.st_rdev != _NULL and not file.isatty():
        file.close()
        raise OSError(errno.ENODEV, "it is a device; name a file")
    return file


def _wrapped(file: BinaryIO) -> TextIOWrapper:
    encoding = encoding_of(file.read(4))
    file.seek(0)
    return TextIOWrapper(file, encoding=encoding, newline=None)
