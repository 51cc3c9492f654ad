"""Every error that slosched raises on purpose. A message says what was wrong and what to do.

The command line turns each into one line on stderr and the exit code of its class; no traceback
reaches a user.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

#: More names than this are not listed in full; with libraries, a worker offers 1,300 models.
_LISTED_AT_MOST = 40
_NEAREST = 8
_NEIGHBOURS = 24
#: A longer name is like no other, and is not shown in full: a comparison costs the product of both lengths.
_LONGEST_NAME = 200


class SloschedError(Exception):
    """Base of every deliberate error. `exit_code` is what the command line exits with."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException would call the class with `args` alone, but a class may take keywords or make its
        # message itself. Errors travel between processes (ProcessPoolExecutor), so none may depend on that.
        return _revived, (type(self), self.args), self.__dict__ or None


def _revived(kind: type[SloschedError], args: tuple[Any, ...]) -> SloschedError:
    """The error that was pickled, without its __init__; its attributes follow."""
    return kind.__new__(kind, *args)


class InvalidConfig(SloschedError):
    """An option, a configuration file or a profile says something impossible."""

    exit_code = 2


class ExtensionError(InvalidConfig):
    """A policy, workload or device of another package, or of a module:attribute, cannot be used."""


class InvalidDuration(InvalidConfig):
    """A text that should be a duration is none."""


class UnknownName(InvalidConfig):
    """A policy, workload, model, profile or figure that is not known here."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        compared = len(self.known) <= _LISTED_AT_MOST and len(name) <= _LONGEST_NAME
        close = get_close_matches(name, self.known, 1, 0.75) if compared else ()
        hint = f" (did you mean {close[0]}?)" if close else ""
        super().__init__(
            f"unknown {kind} {shown_name(name)}{hint}; known: {known_names(name, known)}"
        )


def shown_name(name: str) -> str:
    """`name` in quotes, for an error about it; a name from a peer may be very long."""
    if len(name) <= _LONGEST_NAME:
        return repr(name)
    return f"{name[:_LONGEST_NAME]!r}... ({len(name):,} characters)"


def known_names(name: str, known: Sequence[str]) -> str:
    """The names of `known` for an error about `name`: all, or those most like it and how many more.

    Bounded to a millisecond however many there are: a controller's loop says this to clients.
    """
    ordered = sorted(known)
    if len(ordered) <= _LISTED_AT_MOST:
        return _listed(ordered) or "none"
    if len(name) > _LONGEST_NAME:
        return f"{_listed(ordered[:_NEAREST])} and {len(ordered) - _NEAREST:,} more"
    # A full comparison with 1,300 names takes up to 40 ms. Those that begin alike stand together; and a
    # library's model may be asked for without the library's name, or one of the few others misspelt.
    place = bisect_left(ordered, name)
    near = ordered[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
    near += [each for each in ordered if each.endswith(f"/{name}")][:_NEAREST]
    near += [each for each in ordered if "/" not in each][: 2 * _NEIGHBOURS]
    near = [each for each in dict.fromkeys(near) if len(each) <= _LONGEST_NAME]
    shown = get_close_matches(name, near, _NEAREST) or ordered[:_NEAREST]
    return f"{_listed(shown)} and {len(ordered) - len(shown):,} more"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name[:_LONGEST_NAME] for name in names)


class MissingPackage(SloschedError):
    """A package of an extra is needed and not installed."""

    exit_code = 3


class AddressInUse(SloschedError):
    """Another process listens on the port."""

    exit_code = 4


class PeerUnreachable(SloschedError):
    """The peer did not answer within the time allowed."""

    exit_code = 5


class ProtocolMismatch(SloschedError):
    """The peer speaks another version of the protocol."""

    exit_code = 6


class MalformedMessage(SloschedError):
    """Bytes from a socket that are not a valid message. The daemon counts them and continues."""


class OutOfResources(SloschedError):
    """The machine or a limit of the process has no room: open files, disk, memory, processes."""


class OutputExists(SloschedError):
    """A file to be written is there already, and is not overwritten."""

    exit_code = 7


class RunDirectoryInUse(OutputExists):
    """A run directory that already holds a run; it is never overwritten."""


class DeviceLost(SloschedError):
    """A worker's GPU does not answer any more. Its process cannot mend that; a new one often can."""

    exit_code = 9


class RequestFailed(SloschedError):
    """An inference was answered with a code other than 0; `reply` holds everything it said."""

    def __init__(self, message: str, *, code: int, reply: object = None) -> None:
        super().__init__(message)
        self.code = code
        self.reply = reply


class DeadlineExceeded(RequestFailed):
    """The controller refused, gave up or timed out the request: it could not be in time."""


class InvalidRequest(RequestFailed):
    """The request itself was wrong: unknown model, wrong shape or dtype, impossible SLO."""

    exit_code = 2


class ConnectionLost(RequestFailed):
    """The controller went away while the request was on its way."""
