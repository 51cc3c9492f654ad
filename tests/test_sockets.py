"""What a peer can send has bounds at the socket: parts of a message are taken a bounded number at a time."""

from __future__ import annotations

import time

import pytest

from slosched.transport.codec import Frame
from slosched.transport.sockets import MAX_PARTS, Dealer, Router

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


def until(done: object) -> None:
    assert callable(done)
    give_up = time.monotonic() + 20
    while not done():
        assert time.monotonic() < give_up
        time.sleep(0.01)
