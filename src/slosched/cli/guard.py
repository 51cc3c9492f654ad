"""How a command ends: exit codes, and one line on stderr instead of a traceback.

| what happened                      | exit code |
|------------------------------------|-----------|
| done                               | 0         |
| a SloschedError                    | that class's `exit_code` |
| a usage error                      | 2         |
| the system has no room (disk, open files, memory) | 1 |
| an unexpected error                | 70 (the traceback goes into a file) |
| Ctrl-C                             | 130       |
| the reader of our output went away | 141, and silence |
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from slosched.daemon.traceback_file import INTERNAL_ERROR, keep_traceback
from slosched.descriptors import abandon, too_many_files
from slosched.errors import OutOfResources, SloschedError, UnknownName

#: What typer raises for a wrong option; its BadParameter, which is public, is one.
_TyperUsageError: Any = typer.BadParameter.__mro__[1]

INTERRUPTED = 130
BROKEN_PIPE = 141


#: Errors of the system, by number, and what to do.
_ADVICE = {
    errno.ENOSPC: "make room on the disk that the output goes to",
    errno.EDQUOT: "make room within the quota of the disk that the output goes to",
    errno.EFBIG: "the file is as large as the file system or `ulimit -f` lets it be",
    errno.EROFS: "write to another disk",
    errno.EIO: "the disk or terminal behind a file failed",
    errno.ENOMEM: "end other programs or take a smaller run",
    errno.EAGAIN: "no process or thread can be started; see `ulimit -u`",
}


class UsageError(SloschedError):
    """An option or argument that the command does not take, or that is missing."""

    exit_code = 2


@contextmanager
def _one_style() -> Iterator[None]:
    """Turn typer's own errors, which take three lines, into ours."""
    try:
        yield
    except _TyperUsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        text = error.format_message().rstrip(".")
        hint = f"; see {error.ctx.command_path} --help" if error.ctx is not None else ""
        raise UsageError(f"{text[:1].lower()}{text[1:]}{hint}") from None


class _Interrupted(Exception):
    """Ctrl-C on its way past typer, which would turn KeyboardInterrupt into exit code 1."""


class _OutputClosed(Exception):
    """BrokenPipeError on its way past typer, for the same reason."""


class SloschedGroup(TyperGroup):
    """A group whose commands end as the table above says.

    `noun` is what the group's subcommands are called in "unknown ... 'x'".
    """

    noun = "command"

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with _one_style():
                return super().make_context(*args, **kwargs)
        except KeyboardInterrupt:  # while what the options need is imported
            raise _Interrupted from None

    def invoke(self, ctx: Any) -> Any:
        try:
            with _one_style():
                result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows here, not when the interpreter exits
            return result
        except KeyboardInterrupt:
            raise _Interrupted from None
        except BrokenPipeError:
            raise _OutputClosed from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if ctx.resilient_parsing:  # a shell asks how to complete a line
            return super().resolve_command(ctx, args)
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise self.unknown(ctx, name)
        return super().resolve_command(ctx, args)

    def unknown(self, ctx: Any, name: str) -> SloschedError:
        """Return the error that there is no subcommand `name`."""
        return UnknownName(self.noun, name, self.list_commands(ctx))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        return guarded(lambda: super(SloschedGroup, self).main(*args, **kwargs))


def guarded(run: Callable[[], Any]) -> Any:
    """Return what `run` returns; end the process as the table above says if it raises."""
    try:
        return run()
    except (KeyboardInterrupt, _Interrupted):
        _end("interrupted", INTERRUPTED)
    except (BrokenPipeError, _OutputClosed):
        abandon(1)  # what is still in the buffer would raise again when the interpreter flushes it
        raise SystemExit(BROKEN_PIPE) from None
    except SloschedError as error:
        _end(f"error: {error}", error.exit_code)
    except Exception as error:
        if (text := _of_the_system(error)) is not None:
            _end(f"error: {text}", OutOfResources.exit_code)
        # the last line of defence: no traceback reaches a user
        where = keep_traceback()
        _end(f"internal error: {type(error).__name__}: {_one_line(error)}; {where}", INTERNAL_ERROR)


def _of_the_system(error: Exception) -> str | None:
    """What to say of an error of the system that no program can mend; None for any other.

    libzmq's errors have a number as well, and are not an OSError.
    """
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return too_many_files()
    advice = _ADVICE.get(number) if isinstance(number, int) else None
    if isinstance(error, MemoryError):
        return "out of memory"
    if advice is None:
        return None
    name = getattr(error, "filename", None)
    where = f" ({name})" if isinstance(name, str) else ""
    return f"{os.strerror(number or 0)}{where}; {advice}"


def _end(text: str, code: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        abandon(1)
    try:
        typer.echo(f"slosched: {_one_line(text)}", err=True)
    except (OSError, ValueError):  # stderr takes nothing: the code has to say it
        abandon(2)
    raise SystemExit(code) from None


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
