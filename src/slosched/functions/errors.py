"""What can go wrong with a call of a function, for the program that made it."""

from __future__ import annotations

from slosched.codes import REJECTIONS, Code, code_name
from slosched.errors import (
    DeadlineExceeded,
    InvalidConfig,
    MalformedMessage,
    RequestFailed,
    SloschedError,
)
from slosched.message_types import MAX_TEXT

_DEADLINE = (Code.TIMED_OUT, Code.SKIPPED, Code.COULD_NOT_START_IN_TIME)


class FunctionError(InvalidConfig):
    """A function cannot be registered, or a module with functions cannot be used."""


class CallFailed(RequestFailed):
    """A call did not return a value.

    `function` is its name, `code` one of codes.Code (104: the function raised) and `reason` says why in words:
    for code 104 it is the traceback of the function, in which that of a child may stand.
    """

    def __init__(self, function: str, *, code: int, reason: str = "", reply: object = None) -> None:
        text = f"call of {function!r} failed: {code_name(code)} (code {int(code)})"
        if reason:
            text += f"\n{reason}" if "\n" in reason else f": {reason}"
        super().__init__(text, code=int(code), reply=reply)
        self.function, self.reason = function, reason

    @property
    def refused(self) -> bool:
        """The scheduler decided not to run it: it would have been late, or there was too much to do."""
        return self.code in REJECTIONS


class CallRefused(CallFailed, DeadlineExceeded):
    """The call was refused, given up or timed out: it could not be in time."""


class PayloadTooLarge(SloschedError, ValueError):
    """Arguments or a result are larger than the function's limit."""

    exit_code = 2


class MalformedPayload(MalformedMessage):
    """A frame that holds neither arguments nor a result."""


def call_failed(function: str, *, code: int, reason: str = "", reply: object = None) -> CallFailed:
    """The error that stands for `code`: CallRefused for what could not be in time, else CallFailed."""
    kind = CallRefused if code in _DEADLINE else CallFailed
    return kind(function, code=code, reason=reason, reply=reply)


def shortened(text: str, most: int = MAX_TEXT) -> str:
    """`text` with at most `most` characters, without its middle: the first and the last lines say most."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= most:
        return text
    note = f"\n... {len(text) - most:,} characters are left out ...\n"
    first = most // 4
    return text[:first] + note + text[len(text) - (most - first - len(note)) :]
