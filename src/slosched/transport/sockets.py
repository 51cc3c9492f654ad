"""ZeroMQ sockets as this project uses them: bounded, non-blocking, drained by file descriptor.

zmq.asyncio costs four to five times the CPU of draining the socket when its descriptor is readable.
Two traps come with the descriptor, and both are handled here: it is edge-triggered, so after every
burst of sends the EVENTS must be looked at again (`has_input`); and a ROUTER silently drops what it
cannot route unless ROUTER_MANDATORY is set.

A message is a list of frames: one encoded struct and, behind it, raw tensors.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Sequence

import zmq

from slosched.errors import AddressInUse, InvalidConfig, PeerUnreachable
from slosched.transport.codec import Frame

#: A message larger than this is refused by us, with words; libzmq itself drops a peer that sends a
#: frame past HARD_LIMIT_BYTES.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
HARD_LIMIT_BYTES = 256 * 1024 * 1024
#: As a plain int: going through the enum's own operator costs microseconds on every wake-up.
_POLLIN = int(zmq.POLLIN)
_HIGH_WATER_MARK = 10_000
_DRAIN_AT_MOST = 512  # messages per drain, so that one flood cannot hold the loop,
_DRAIN_BYTES = 2 * MAX_MESSAGE_BYTES  # nor fill the memory

Message = list[Frame]


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    # One IO thread in each process: the loops here are single-threaded and small.
    return zmq.Context.instance()


class _Port:
    """What both socket kinds share."""

    def __init__(self, kind: int) -> None:
        self._socket = _context().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, HARD_LIMIT_BYTES)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)

    def fileno(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def has_input(self) -> bool:
        """True if a message waits. Clears the edge of the descriptor: ask before sleeping on it."""
        return bool(self._socket.get(zmq.EVENTS) & _POLLIN)  # type: ignore[operator]

    def close(self) -> None:
        self._socket.close(linger=0)

    def close_after(self, linger_ms: int) -> None:
        """Close, but let what is queued travel for up to `linger_ms` (the last answers of a drain)."""
        self._socket.close(linger=linger_ms)

    def _receive(self) -> list[Frame] | None:
        try:
            parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        # Small frames are cheaper as bytes; a tensor stays in libzmq's buffer and is only viewed.
        return [f.bytes if len(f.buffer) < 65536 else f.buffer for f in parts]

    def _send(self, frames: Sequence[Frame]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=_copies(frames))
        except zmq.ZMQError as error:
            if error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
                return False
            raise
        return True


#: A frame from this size on is sent without a copy. That costs a callback in another Python thread, which
#: takes the interpreter from the loop for 50 us and more; a copy of 602 kB takes 20 (H200's host).
_ZERO_COPY_BYTES = 2 * 1024 * 1024


def _copies(frames: Sequence[Frame]) -> bool:
    return all(len(frame) < _ZERO_COPY_BYTES for frame in frames)


class Router(_Port):
    """A bound ROUTER: many peers, each under the identity that it chose.

    Raises AddressInUse when the port is taken, InvalidConfig when the address is none.
    """

    def __init__(self, bind: str, port: int) -> None:
        super().__init__(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            if port == 0:
                self.port = int(self._socket.bind_to_random_port(f"tcp://{bind}"))
            else:
                self._socket.bind(f"tcp://{bind}:{port}")
                self.port = port
        except zmq.ZMQError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"port {port} on {bind} is in use; end the process that has it or take another --port"
                ) from None
            raise InvalidConfig(f"cannot listen on {bind}:{port}: {error.strerror}") from None

    def receive(self) -> list[tuple[bytes, list[Frame]]]:
        """Everything that waits, up to a bound, as (peer, frames). `frames` may be empty or garbage."""
        received: list[tuple[bytes, list[Frame]]] = []
        taken_bytes = 0
        while len(received) < _DRAIN_AT_MOST and taken_bytes < _DRAIN_BYTES:
            parts = self._receive()
            if parts is None:
                break
            received.append((bytes(parts[0]), parts[1:]))
            taken_bytes += total_bytes(parts)
        return received

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Queue a message. False if the peer is gone, or has 10,000 unread messages."""
        return self._send([peer, *frames])


class Dealer(_Port):
    """A connected DEALER: one peer. Nothing is queued while there is no connection (IMMEDIATE)."""

    def __init__(self, address: str, identity: bytes | None = None) -> None:
        super().__init__(zmq.DEALER)
        self.address = address
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if identity is not None:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        try:
            self._socket.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            self.close()
            raise PeerUnreachable(f"{address!r} is no host:port: {error.strerror}") from None

    def receive(self) -> list[list[Frame]]:
        """Everything that waits, up to a bound."""
        received: list[list[Frame]] = []
        while len(received) < _DRAIN_AT_MOST:
            parts = self._receive()
            if parts is None:
                break
            received.append(parts)
        return received

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue a message. False if there is no connection, or 10,000 messages wait already."""
        return self._send(frames)


class AsyncReader:
    """Calls `on_readable` in the running event loop whenever `port` has input.

    Call `recheck()` after each burst of sends: a send can swallow the descriptor's edge, and the
    loop would wait for ever on messages that are there.
    """

    def __init__(self, port: _Port, on_readable: Callable[[], None]) -> None:
        self._port = port
        self._on_readable = on_readable
        self._loop = asyncio.get_running_loop()
        self._fd = port.fileno()
        self._scheduled = False
        self._closed = False
        self._loop.add_reader(self._fd, self._readable)
        self.recheck()

    def recheck(self) -> None:
        if not self._scheduled and not self._closed and self._port.has_input():
            self._scheduled = True
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        if self._port.has_input():
            self._on_readable()
            if not self._closed:
                self.recheck()

    def close(self) -> None:
        """Stop calling. Does not close the port."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)


class BadMessages:
    """Counts what peers sent that was no message, and says so once for each peer."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._seen: set[bytes] = set()
        self.count = 0

    def note(self, peer: bytes, reason: str) -> None:
        self.count += 1
        if peer not in self._seen:
            if len(self._seen) >= 1024:  # bounded, whoever sends
                self._seen.clear()
            self._seen.add(peer)
            self._log(f"peer {peer.hex()}: {reason} (further ones are counted, not logged)")


def total_bytes(frames: Sequence[Frame]) -> int:
    return sum(len(frame) for frame in frames)


def finish_sending(within_ms: int) -> None:
    """Wait until everything that sockets closed by `close_after` still held has left, at most `within_ms`.

    For the last line of a process: pyzmq does not wait when the interpreter exits, so answers that
    are queued then would be lost. Every socket of the process must have been closed.
    """
    # term() blocks until the sockets' linger is over; in a thread, so that a socket somebody forgot
    # cannot hold up the exit.
    thread = threading.Thread(target=zmq.Context.instance().term, daemon=True)
    thread.start()
    thread.join(within_ms / 1000)
