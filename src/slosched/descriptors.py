"""File descriptors of this process: that 0, 1 and 2 are the standard streams, and that some are left."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys

from slosched.errors import OutOfResources

#: What a command needs besides its files: an event loop, its wake-ups, a socket, modules to import.
COMMAND_NEEDS = 20
#: What libzmq may open for a socket, with its threads. It aborts the process where it gets none.
SOCKET_NEEDS = 12


def open_standard_streams() -> None:
    """Open /dev/null in place of each closed standard stream, and let stdout take any text.

    The next file or socket would else get the number 0, 1 or 2, and what is printed would be written
    into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            try:
                # It gets the lowest number that is free, which is this one.
                opened = os.open(os.devnull, os.O_RDWR)
            except OSError:
                return
            os.set_inheritable(opened, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    codecs.register_error("slosched", _written)
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr takes any text as it is
        sys.stdout.reconfigure(errors="slosched")


def _written(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stdout gets for a character that its encoding lacks: of a path the byte it is, else "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return b"".join(
        bytes([ord(each) - 0xDC00]) if "\udc80" <= each <= "\udcff" else b"?" for each in text
    ), error.end


def require_descriptors(count: int) -> None:
    """Raise OutOfResources unless `count` more files can be opened."""
    taken: list[int] = []
    try:
        while len(taken) < count:
            taken.append(os.dup(2))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OutOfResources(too_many_files()) from None
    finally:
        for number in taken:
            os.close(number)


def too_many_files() -> str:
    """What to say of EMFILE and ENFILE."""
    return "too many open files; allow this process more of them, as with `ulimit -n 4096`"


def abandon(number: int) -> None:
    """Point a standard stream that cannot be written at /dev/null: its buffer is flushed at the exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
    except OSError:
        return
