"""Every error that slosched raises on purpose. A message says what was wrong and what to do.

The command line turns each into one line on stderr and the exit code of its class; no traceback
reaches a user.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from difflib import get_close_matches

#: More names than this are not listed in full; with libraries, a worker offers 1,300 models.
_LISTED_AT_MOST = 40
_NEAREST = 8
_NEIGHBOURS = 24


class SloschedError(Exception):
    """Base of every deliberate error. `exit_code` is what the command line exits with."""

    exit_code = 1


class InvalidConfig(SloschedError):
    """An option, a configuration file or a profile says something impossible."""

    exit_code = 2


class InvalidDuration(InvalidConfig):
    """A text that should be a duration is none."""


class UnknownName(InvalidConfig):
    """A policy, workload, model, profile or figure that nobody here knows."""

    def __init__(self, kind: str, name: str, known: list[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        close = (
            get_close_matches(name, self.known, 1, 0.75)
            if len(self.known) <= _LISTED_AT_MOST
            else ()
        )
        hint = f" (did you mean {close[0]}?)" if close else ""
        super().__init__(f"unknown {kind} {name!r}{hint}; known: {known_names(name, known)}")


def known_names(name: str, known: Sequence[str]) -> str:
    """The names of `known` for an error about `name`: all, or those most like it and how many more.

    Bounded to a millisecond however many there are: a controller's loop says this to clients.
    """
    ordered = sorted(known)
    if len(ordered) <= _LISTED_AT_MOST:
        return ", ".join(ordered) or "none"
    # A full comparison with 1,300 names takes up to 40 ms. Those that begin alike stand together; and a
    # library's model may be asked for without the library's name, or one of the few others misspelt.
    place = bisect_left(ordered, name)
    near = ordered[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS]
    near += [each for each in ordered if each.endswith(f"/{name}")][:_NEAREST]
    near += [each for each in ordered if "/" not in each][: 2 * _NEIGHBOURS]
    shown = get_close_matches(name, list(dict.fromkeys(near)), _NEAREST) or ordered[:_NEAREST]
    return f"{', '.join(shown)} and {len(ordered) - len(shown):,} more"


class MissingPackage(SloschedError):
    """A package of an extra is needed and not installed."""

    exit_code = 3


class AddressInUse(SloschedError):
    """Another process listens on the port."""

    exit_code = 4


class PeerUnreachable(SloschedError):
    """Nobody answered at the other end within the time allowed."""

    exit_code = 5


class ProtocolMismatch(SloschedError):
    """The peer speaks another version of the protocol."""

    exit_code = 6


class MalformedMessage(SloschedError):
    """Bytes from a socket that are no message of ours. The daemon counts it and goes on."""


class RunDirectoryInUse(SloschedError):
    """A run directory that already holds a run; it is never overwritten."""

    exit_code = 7


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


class ConnectionLost(RequestFailed):
    """The controller went away while the request was on its way."""
