"""Outbox: one message for each peer and step, in order, and nothing that is lost goes untold."""

from __future__ import annotations

import pytest

from slosched.messages import InferReply, LoadModelReply
from slosched.transport import outbox as module
from slosched.transport.bundles import ReplyBundle
from slosched.transport.codec import Frame, decode_for_client
from slosched.transport.outbox import Outbox


def reply(request_id: int) -> InferReply:
    return InferReply(request_id, 0, "", 3, 5, 4, True)


class Wire:
    """What was sent, decoded, and which peers are gone."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, object, int]] = []  # (peer, message, frames behind it)
        self.gone: set[str] = set()
        self.failed: list[tuple[str, object]] = []
        self.outbox: Outbox[str, InferReply] = Outbox(
            self._send,
            lambda replies, counts: ReplyBundle(replies, counts),
            failed=lambda peer, message: self.failed.append((peer, message)),
        )

    def _send(self, peer: str, frames: list[Frame]) -> bool:
        if peer in self.gone:
            return False
        self.sent.append((peer, decode_for_client(frames[0]), len(frames) - 1))
        return True


def test_messages_of_a_step_are_one_for_each_peer_and_a_single_one_stays_itself() -> None:
    wire = Wire()
    for peer, request_id in (("a", 1), ("b", 2), ("a", 3), ("a", 4)):
        wire.outbox.put(peer, reply(request_id))
    assert wire.sent == []
    wire.outbox.flush()
    assert wire.sent == [("a", ReplyBundle((reply(1), reply(3), reply(4))), 0), ("b", reply(2), 0)]
    wire.outbox.flush()
    assert len(wire.sent) == 2


def test_what_has_frames_goes_behind_what_waits_for_its_peer() -> None:
    wire = Wire()
    wire.outbox.put("a", reply(1))
    wire.outbox.put("b", reply(2))
    wire.outbox.send("a", reply(3), [b"output"])
    wire.outbox.send("c", LoadModelReply(9, 0), [])
    wire.outbox.put("a", reply(4))
    wire.outbox.flush()
    assert [(peer, message) for peer, message, _ in wire.sent if peer == "a"] == [
        ("a", reply(1)),
        ("a", reply(3)),
        ("a", reply(4)),
    ]
    assert ("a", reply(3), 1) in wire.sent and ("c", LoadModelReply(9, 0), 0) in wire.sent


def test_each_message_that_cannot_be_queued_is_told_in_order() -> None:
    wire = Wire()
    wire.gone.add("a")
    wire.outbox.put("a", reply(1))
    wire.outbox.put("a", reply(2))
    wire.outbox.put("b", reply(3))
    wire.outbox.flush()
    wire.outbox.send("a", reply(4), [b"output"])
    assert wire.failed == [("a", reply(1)), ("a", reply(2)), ("a", reply(4))]
    assert wire.sent == [("b", reply(3), 0)]


def test_a_bundle_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BUNDLED", 3)
    wire = Wire()
    for request_id in range(7):
        wire.outbox.put("a", reply(request_id))
    wire.outbox.flush()
    found: list[int] = []
    for _, message, _ in wire.sent:
        replies = message.replies if isinstance(message, ReplyBundle) else (message,)
        assert len(replies) <= 3
        found += [each.request_id for each in replies if isinstance(each, InferReply)]
    assert found == list(range(7))
