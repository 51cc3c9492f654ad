"""Every error that slosched raises on purpose. A message says what was wrong and what to do.

The command line turns each into one line on stderr and the exit code of its class; no traceback
reaches a user.
"""

from __future__ import annotations


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
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(self.known) or 'none'}")


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

    exit_code = 8


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
