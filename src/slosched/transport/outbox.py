"""What a shell tells its peers at one wake-up, one message for each peer.

A message costs its sender some tens of microseconds whatever its size: a wake-up of libzmq's thread, a
system call, a wake-up of the peer. So messages without frames are gathered until the step ends and travel
as a bundle. Order is kept for each peer: a message with frames goes out at once, behind those gathered for
that peer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from slosched.messages import Message
from slosched.transport.bundles import MAX_BUNDLED
from slosched.transport.codec import Frame, encode

Peer = TypeVar("Peer")
M = TypeVar("M", bound=Message)


class Outbox(Generic[Peer, M]):
    """`send` queues frames for a peer and says whether that could be done; `bundle` makes one message of
    those that may be bundled.

    `failed` is called with every message that could not be queued, in order.
    """

    def __init__(
        self,
        send: Callable[[Peer, list[Frame]], bool],
        bundle: Callable[[tuple[M, ...]], Message],
        *,
        failed: Callable[[Peer, Any], None],
    ) -> None:
        self._send = send
        self._bundle = bundle
        self._failed = failed
        self._waiting: dict[Peer, list[M]] = {}

    def put(self, peer: Peer, message: M) -> None:
        """Send `message` with the next `flush`."""
        waiting = self._waiting.get(peer)
        if waiting is None:
            self._waiting[peer] = [message]
            return
        waiting.append(message)
        if len(waiting) >= MAX_BUNDLED:
            self._flush(peer, self._waiting.pop(peer))

    def send(
        self, peer: Peer, message: Message, frames: list[Frame], encoded: bytes | None = None
    ) -> None:
        """Send `message` with `frames` behind it now, after everything that waits for the peer.

        `encoded` is the message's bytes, where they were made before.
        """
        waiting = self._waiting.pop(peer, None)
        if waiting is not None:
            self._flush(peer, waiting)
        if encoded is None:
            encoded = encode(message)
        if not self._send(peer, [encoded, *frames]):
            self._failed(peer, message)

    def flush(self) -> None:
        """Send everything that waits."""
        if self._waiting:
            everything, self._waiting = self._waiting, {}
            for peer, waiting in everything.items():
                self._flush(peer, waiting)

    def _flush(self, peer: Peer, waiting: list[M]) -> None:
        message: Message = waiting[0] if len(waiting) == 1 else self._bundle(tuple(waiting))
        if not self._send(peer, [encode(message)]):
            for each in waiting:
                self._failed(peer, each)
