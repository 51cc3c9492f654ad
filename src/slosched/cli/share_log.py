"""The lines of HotCarbon's runner, on stdout and in a log file: where it is, what runs, how it ended."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import typer

from slosched.cli.guard import INTERRUPTED
from slosched.cli.output import beside
from slosched.clock import now_ns
from slosched.core.scheduler.foreign_text import printable
from slosched.daemon.traceback_file import INTERNAL_ERROR
from slosched.errors import OutOfResources, SloschedError
from slosched.output_files import utf8
from slosched.units import NS_PER_S

#: Beginnings of lines that belong to the answer.
_PRINTED = ("Running ",)


class ShareLog:
    """A log file in the folder of temporary files. `say` also shows a line, `note` does not."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.error_code = 0
        folder = Path(tempfile.gettempdir())
        self.path = folder / f"print_outs-{secrets.token_hex(4)}.txt"
        try:
            # Exclusive, as all users can write into this folder: a link of that name may lie there.
            descriptor = os.open(
                self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644
            )
        except OSError as error:
            raise OutOfResources(
                f"cannot write a log file in {folder}: {error.strerror}; set TMPDIR to a folder of yours"
            ) from None
        self._file = open(descriptor, "w", encoding="utf-8", buffering=1)  # noqa: PTH123, SIM115 - a descriptor

    def say(self, text: str) -> None:
        self.note(text)
        self._show(text)

    def follow(self, text: str) -> None:
        """Take a line of a running experiment: HotCarbon's runner prints those that begin like its own.

        The others are progress, which goes to stderr.
        """
        text = printable(text)
        if text.startswith(_PRINTED):
            self.say(text)
        else:
            self.note(text)
            beside(text)

    def note(self, text: str) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(f"{_time_of_day()} {utf8(text)}\n")
        except OSError:  # a full disk ends no run whose results lie elsewhere
            self._file.close()

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            return


def _time_of_day() -> str:
    return datetime.fromtimestamp(now_ns() / NS_PER_S).astimezone().strftime("%H:%M:%S")


@contextmanager
def share_log(show: Callable[[str], None]) -> Iterator[ShareLog]:
    """A log whose last lines say with which code the command ends, whatever ends it."""
    log = ShareLog(show)
    log.say(f"Logs at {log.path}")
    heard = True
    try:
        yield log
    except BrokenPipeError:
        heard = False  # the reader of these lines is gone
        raise
    except BaseException as error:
        log.error_code = _code_of(error)
        if isinstance(error, Exception) and not isinstance(error, typer.Exit):
            log.note(f"error: {type(error).__name__}: {error}")
        raise
    finally:
        if heard:
            log.say(f"Exiting with error_code={log.error_code} (0 is clean exit)")
            log.say(f"Examine {log.path} for logs")
        log.close()


def _code_of(error: BaseException) -> int:
    """What the command will exit with because of `error` (cli/guard.py)."""
    if isinstance(error, SloschedError | typer.Exit):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else INTERNAL_ERROR
