"""How a request of the protocol fails: one status, which HTTP and gRPC each have a number for."""

from __future__ import annotations

from enum import Enum

import msgspec

from slosched.units import NS_PER_US


class Status(Enum):
    """Statuses by the gRPC code (its number) and the HTTP status that say the same."""

    CANCELLED = (1, 499)
    INVALID_ARGUMENT = (3, 400)
    DEADLINE_EXCEEDED = (4, 504)
    NOT_FOUND = (5, 404)
    ALREADY_EXISTS = (6, 409)
    PERMISSION_DENIED = (7, 403)
    RESOURCE_EXHAUSTED = (8, 429)
    UNIMPLEMENTED = (12, 501)
    INTERNAL = (13, 500)
    UNAVAILABLE = (14, 503)
    UNAUTHENTICATED = (16, 401)
    TOO_LARGE = (8, 413)

    def __init__(self, rpc: int, http: int) -> None:
        self.rpc, self.http = rpc, http


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller said of a request that it did not serve. Times in ns; -1: it made no prediction.

    `code` is a codes.Code. The start is relative to the request's arrival at the controller, `time_left_ns` the
    time from the refusal to the deadline.
    """

    code: int
    predicted_start_ns: int = -1
    predicted_exec_ns: int = -1
    time_left_ns: int = 0

    def fields(self) -> dict[str, int]:
        """By the names of headers, metadata and JSON fields; a prediction that was not made is left out."""
        found = {"slosched-code": int(self.code)}
        if self.predicted_start_ns >= 0:
            found["slosched-predicted-start-us"] = self.predicted_start_ns // NS_PER_US
        if self.predicted_exec_ns >= 0:
            found["slosched-predicted-exec-us"] = self.predicted_exec_ns // NS_PER_US
        found["slosched-time-left-us"] = self.time_left_ns // NS_PER_US
        return found


class FrontError(Exception):
    """A request of the protocol failed. `text` is for its client; a refusal of the controller has `refusal`.

    `retry_after_s` is when a client over its quota may try again; 0: nothing is known.
    """

    def __init__(
        self,
        status: Status,
        text: str,
        refusal: Refusal | None = None,
        *,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.refusal = status, text, refusal
        self.retry_after_s = retry_after_s

    def again(self) -> FrontError:
        """The same error for another request: an exception that is raised again and again keeps growing."""
        return FrontError(self.status, self.text, self.refusal, retry_after_s=self.retry_after_s)
