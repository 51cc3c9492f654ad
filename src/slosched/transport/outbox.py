"""What a shell tells its peers at one wake-up, one message for each peer.

A message costs its sender some tens of microseconds whatever its size: a wake-up of libzmq's thread, a
system call, a wake-up of the peer. So messages are gathered until the step ends and travel as a bundle, with
their frames behind it where these are small: a copy of some kilobytes costs less than a message. Order is kept
for each peer: a message with larger frames goes out at once, behind those gathered for that peer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from slosched.messages import Message
from slosched.transport.bundles import MAX_BUNDLED
from slosched.transport.codec import Frame, encode

#: A message whose frames have more bytes together travels alone.
SMALL_BYTES = 8 * 1024
#: A bundle that has this number of bytes or of frames behind it leaves at once.
FULL_BYTES = 32 * 1024
FULL_FRAMES = 128

Peer = TypeVar("Peer")
M = TypeVar("M", bound=Message)


class _Waiting(Generic[M]):
    """What waits for one peer: messages, the number of frames of each, and those frames."""

    __slots__ = ("counts", "frames", "messages", "size")

    def __init__(self) -> None:
        self.messages: list[M] = []
        self.counts: list[int] = []
        self.frames: list[Frame] = []
        self.size = 0  # bytes of the frames


class Outbox(Generic[Peer, M]):
    """`send` queues frames for a peer and says whether that could be done; `bundle` makes one message of
    messages and the number of frames of each (empty: there are none).

    A message that is alone travels as itself, or with `always` as a bundle too. `failed` is called with every
    message that could not be queued, in order.
    """

    def __init__(
        self,
        send: Callable[[Peer, list[Frame]], bool],
        bundle: Callable[[tuple[M, ...], tuple[int, ...]], Message],
        *,
        failed: Callable[[Peer, Any], None],
        always: bool = False,
    ) -> None:
        self._send = send
        self._bundle = bundle
        self._failed = failed
        self._always = always
        self._waiting: dict[Peer, _Waiting[M]] = {}

    def put(self, peer: Peer, message: M, frames: Sequence[Frame] = ()) -> None:
        """Send `message` with the next `flush`, or at once if `frames`, which go behind it, are large."""
        waiting = self._waiting.get(peer)
        size = sum(map(len, frames)) if frames else 0
        large = size > SMALL_BYTES
        if large and waiting is not None:
            self._flush(peer, self._waiting.pop(peer))
            waiting = None
        if waiting is None:
            waiting = self._waiting[peer] = _Waiting()
        waiting.messages.append(message)
        waiting.counts.append(len(frames))
        if frames:
            waiting.frames += frames
            waiting.size += size
        if (
            large
            or len(waiting.messages) >= MAX_BUNDLED
            or waiting.size >= FULL_BYTES
            or len(waiting.frames) >= FULL_FRAMES
        ):
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

    def _flush(self, peer: Peer, waiting: _Waiting[M]) -> None:
        messages, frames = waiting.messages, waiting.frames
        if len(messages) == 1 and not self._always:
            message: Message = messages[0]
        else:
            message = self._bundle(tuple(messages), tuple(waiting.counts) if frames else ())
        if not self._send(peer, [encode(message), *frames]):
            for each in messages:
                self._failed(peer, each)
