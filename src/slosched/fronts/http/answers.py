"""Answers of the HTTP side: their bytes, and the form of errors, which is Triton's: {"error": "..."}.

An error that carries a refusal of the controller has its numbers beside the text and in headers of the same
names: slosched-code, slosched-predicted-start-us, slosched-predicted-exec-us, slosched-time-left-us.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from slosched.fronts.errors import FrontError, Status
from slosched.transport.codec import Frame

JSON, OCTETS, TEXT = b"application/json", b"application/octet-stream", b"text/plain; version=0.0.4"

_LINES = {
    each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\ncontent-type: ".encode()
    for each in HTTPStatus
}
_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\ncontent-type: "

encode = msgspec.json.Encoder().encode
Parts = Sequence[Frame | bytearray]


class Answer(msgspec.Struct, frozen=True, gc=False):
    """One answer. `parts` are its body; `headers` whole lines, each with its CRLF."""

    status: int
    parts: Parts = ()
    headers: bytes = b""
    content_type: bytes = JSON


class Rejected(Exception):
    """A request that is wrong as HTTP, whatever it asks for. `headers` as in Answer."""

    def __init__(self, status: int, text: str, headers: bytes = b"") -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


def document(value: Any, status: int = 200) -> Answer:
    """An answer with a JSON document."""
    return Answer(status, (encode(value),))


def error_answer(error: FrontError | Rejected) -> Answer:
    """An error in Triton's form."""
    fields: dict[str, Any] = {"error": error.text}
    if isinstance(error, Rejected):
        return Answer(error.status, (encode(fields),), error.headers)
    if error.refusal is not None:
        fields |= error.refusal.fields()
    return Answer(error.status.http, (encode(fields),), error_headers(error))


def error_headers(error: FrontError) -> bytes:
    """The header lines that go with an error: its refusal's numbers, when to try again, how to ask."""
    lines = b""
    if error.refusal is not None:
        for name, value in error.refusal.fields().items():
            lines += f"{name}: {value}\r\n".encode()
    if error.retry_after_s > 0:
        lines += b"retry-after: %d\r\n" % math.ceil(error.retry_after_s)
    if error.status is Status.UNAUTHENTICATED:
        lines += b'www-authenticate: Bearer realm="slosched"\r\n'
    return lines


def head(answer: Answer, *, date: bytes, close: bool, keep: bool) -> bytes:
    """The answer's head. `date` is a whole header line; `keep` says that the connection stays (HTTP/1.0)."""
    length = 0
    for part in answer.parts:
        length += len(part)
    ending = b"connection: close\r\n\r\n" if close else b"\r\n"
    if keep and not close:
        ending = b"connection: keep-alive\r\n\r\n"
    return b"%b%b\r\ncontent-length: %d\r\n%b%b%b" % (
        _LINES[answer.status],
        answer.content_type,
        length,
        date,
        answer.headers,
        ending,
    )
