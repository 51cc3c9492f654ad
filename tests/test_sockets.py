"""What a peer can send has bounds at the socket: parts of a message are taken a bounded number at a time."""

from __future__ import annotations

import time
from typing import Any

import pytest

from slosched.transport.codec import Frame
from slosched.transport.sockets import MAX_PARTS, Dealer, Router, _whole

pytestmark = pytest.mark.processes


def test_a_message_of_many_parts_holds_the_loop_for_some_of_them_at_a_time() -> None:
    router = Router("127.0.0.1", 0)
    dealer = Dealer(f"127.0.0.1:{router.port}", b"peer")
    try:
        until(lambda: dealer.send([b"hello"]))
        until(lambda: bool(router.receive()))
        assert dealer.send([b""] * 20_000)
        assert dealer.send([b"after"])
        received: list[tuple[bytes, list[Frame]]] = []
        turns = 0
        give_up = time.monotonic() + 20
        while time.monotonic() < give_up and (not received or received[-1][1] != [b"after"]):
            before = len(received)
            received += router.receive()
            turns += len(received) > before or router.unread
        (_, cut), (peer, after) = received
        assert (peer, after) == (b"peer", [b"after"])
        assert len(cut) <= MAX_PARTS + 1
        assert turns >= 20_000 // 1024 // 2, "it was thrown away in one piece"
    finally:
        dealer.close()
        router.close()


def test_a_tensor_is_passed_on_as_the_message_that_it_came_in() -> None:
    """However often it is sent, libzmq is given the message itself; each receiver has its bytes."""
    router = Router("127.0.0.1", 0)
    address = f"127.0.0.1:{router.port}"
    source, sink = Dealer(address, b"source"), Dealer(address, b"sink")
    tensor = bytes(range(256)) * 2400
    try:
        until(lambda: source.send([b"one", tensor]) and sink.send([b"hello"]))
        taken: dict[bytes, list[Frame]] = {}
        while len(taken) < 2:
            until(router.has_input)
            taken |= dict(router.receive())
        (_, came) = taken[b"source"]
        assert isinstance(came, memoryview) and _whole(came) is came.obj
        assert _whole(came[1:]) is not came.obj and _whole(tensor) is tensor
        assert _whole(came[::-1]) is not came.obj
        given: list[object] = []

        def put(frame: object, *more: Any) -> None:
            given.append(frame)
            sending(frame, *more)

        sending, router._put = router._put, put  # type: ignore[assignment]
        for number in range(3):
            assert router.send(b"sink", [b"%d" % number, came])
        assert sum(frame is came.obj for frame in given) == 3
        router._put = sending
        given.clear()
        del came, taken
        found: list[list[Frame]] = []
        while len(found) < 3:
            until(sink.has_input)
            found += sink.receive()
        assert [bytes(head) for head, _ in found] == [b"0", b"1", b"2"]
        assert all(bytes(body) == tensor for _, body in found)
    finally:
        for each in (source, sink, router):
            each.close()


def until(done: object) -> None:
    assert callable(done)
    give_up = time.monotonic() + 20
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.01)
