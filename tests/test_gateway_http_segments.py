"""However the bytes of a client are cut, and whatever they are, a connection answers the same, and in order."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_http_rig import FakeService, inference, request, x_of
from slosched.fronts.http.bounds import Bounds, Limits
from slosched.fronts.http.connection import Connection
from slosched.fronts.http.door import Door
from slosched.fronts.http.routes import Routes

MOST = 50_000


class FakeTransport:
    """Keeps what is written, and says that the connection is on loopback."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.closing = self.ended = False
        self.reading = True

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def write(self, data: bytes) -> None:
        assert not self.closing and not self.ended
        self.written += data

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0


class Driven:
    """A connection without a socket."""

    def __init__(self) -> None:
        self.service = FakeService()
        self.bounds = Bounds(most_bytes=MOST, most_held=2 * MOST, limits=Limits())
        routes = Routes(cast(Any, self.service), shared_memory=True, most_bytes=MOST)
        door = Door(cast(Any, self.service), routes, self.bounds, own_host=True)
        self.connection = Connection(self.bounds, door, joined=lambda _: True, left=lambda _: None)
        self.transport = FakeTransport()
        self.connection.connection_made(cast(asyncio.BaseTransport, self.transport))

    def feed(self, data: bytes) -> None:
        """Put `data` where the connection wants it, as a transport does that reads it from a socket."""
        while data and not self.transport.closing:
            assert self.transport.reading
            room = self.connection.get_buffer(-1)
            assert len(room) > 0
            taken = min(len(room), len(data))
            room[:taken] = data[:taken]
            self.connection.buffer_updated(taken)
            data = data[taken:]

    def end(self) -> bytes:
        """The client leaves; what was written to it. Nothing is held then."""
        self.connection.connection_lost(None)
        assert self.bounds.held == 0
        return bytes(self.transport.written)


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in parts)
    lines = ("transfer-encoding: chunked",)
    return request("/v2/models/echo/infer", b"", *lines, method="POST") + chunks + b"0\r\n\r\n"


BODY = json.dumps(x_of(1, 2, 3, 4)).encode()
#: Requests after which the next one is still found.
GOOD = (
    request("/v2"),
    request("/v2/health/live", method="HEAD"),
    request("/nope", b"x" * 40_000),
    request("/v2", b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    inference(x_of(*range(3000))),
    inference(x_of(5.0)),
    request("/v2/models/echo/infer", b"{"),
    request("/v2/models/echo/infer", BODY, "expect: 100-continue"),
    chunked(BODY, 7),
    b"\r\n" + request("/v2"),
    request("/v2/systemsharedmemory/unregister", method="POST"),
    request("/v2", host="evil.example"),
)


def answers(*segments: bytes) -> bytes:
    driven = Driven()
    for each in segments:
        driven.feed(each)
    return driven.end()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(range(len(GOOD))), min_size=1, max_size=6),
    st.lists(st.integers(0, 10**6), max_size=12),
)
def test_requests_are_answered_alike_however_they_are_cut(
    chosen: list[int], places: list[int]
) -> None:
    whole = b"".join(GOOD[each] for each in chosen)
    alone = b"".join(answers(GOOD[each]) for each in chosen)
    assert answers(whole) == alone
    assert answers(*cut(whole, places)) == alone


@pytest.mark.parametrize("number", range(len(GOOD)))
def test_byte_by_byte(number: int) -> None:
    one = GOOD[number]
    if len(one) < 20_000:
        assert answers(*[bytes((byte,)) for byte in one]) == answers(one)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 10**6), max_size=6))
def test_requests_with_bytes_changed_are_answered_or_closed_and_hold_nothing(
    seed: int, places: list[int]
) -> None:
    random_ = random.Random(seed)
    data = bytearray(b"".join(random_.choice(GOOD) for _ in range(3)))
    for _ in range(random_.randint(1, 6)):
        at = random_.randrange(min(len(data), 400))
        if random_.random() < 0.5:
            data[at] = random_.choice(b"\r\n :0129azAZ\0\xff{}[]")
        else:
            del data[at : at + random_.randint(1, 8)]
    written = answers(*cut(bytes(data), places))
    assert not written or written.startswith(b"HTTP/1.1 ")
    assert b"internal error" not in written


def test_what_waits_behind_a_request_stays_in_the_socket_when_the_buffer_is_full() -> None:
    driven = Driven()
    driven.feed(inference(x_of(1), model="slow"))
    behind = request("/v2/health/live")
    sent = 0
    while driven.transport.reading:
        driven.feed(behind[: len(driven.connection.get_buffer(-1))])
        sent += 1
    assert 100 < sent < 1000 and not driven.transport.written
    (asked, on_end, _), *_ = driven.service.slow
    on_end(driven.service.answered(asked))
    assert driven.transport.reading
    assert driven.end().count(b"HTTP/1.1 200 OK") >= sent - 1


def test_an_answer_that_is_not_taken_holds_the_next_request_back() -> None:
    driven = Driven()
    driven.feed(inference(x_of(1), model="slow") + request("/v2"))
    driven.connection.pause_writing()
    (asked, on_end, _), *_ = driven.service.slow
    on_end(driven.service.answered(asked))
    assert driven.transport.written.count(b"HTTP/1.1 200 OK") == 1
    driven.connection.resume_writing()
    assert driven.end().count(b"HTTP/1.1 200 OK") == 2
