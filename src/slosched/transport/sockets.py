"""ZeroMQ sockets as this project uses them: bounded, non-blocking, drained by file descriptor.

zmq.asyncio costs four to five times the CPU of draining the socket when its descriptor is readable.
Two traps come with the descriptor, and both are handled here: it is edge-triggered, so after every
burst of sends the EVENTS must be looked at again (`has_input`); and a ROUTER silently drops what it
cannot route unless ROUTER_MANDATORY is set.

A message is a list of frames: one encoded struct and, behind it, raw tensors. Frames are sent and
received through pyzmq's backend: its multipart calls, in Python, cost four times as much.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import zmq
from zmq.backend import Socket as _Backend

from slosched.addresses import bracketed, is_ipv6, parse_address, parse_bind
from slosched.descriptors import SOCKET_NEEDS, require_descriptors, too_many_files
from slosched.errors import AddressInUse, InvalidConfig, OutOfResources, PeerUnreachable
from slosched.transport.codec import MAX_MESSAGE_BYTES, Frame, total_bytes

#: libzmq itself drops a peer that sends a larger frame.
HARD_LIMIT_BYTES = 96 * 1024 * 1024
#: A message has no more parts: a batch of 1,024 inputs and what goes before them. Those beyond are thrown away,
#: a bounded number at a time, so that a peer that sends 500,000 empty ones does not hold the loop.
MAX_PARTS = 1024 + 8
_DISCARD_AT_MOST = 1024
#: As a plain int: going through the enum's own operator costs microseconds on every wake-up.
_POLLIN = int(zmq.POLLIN)
_EVENTS = int(zmq.EVENTS)
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_NOW_UNSENDABLE = (errno.EAGAIN, errno.EHOSTUNREACH)
_HIGH_WATER_MARK = 10_000
#: Messages taken in one drain: a flood must not hold the loop.
_DRAIN_AT_MOST = 512
#: Bytes taken in one drain: a flood must not fill the memory.
_DRAIN_BYTES = 2 * MAX_MESSAGE_BYTES
#: Bytes of small messages taken in one drain; in bundles these are some 1,400 requests.
_DRAIN_SMALL_BYTES = 64 * 1024
#: For the first messages of a drain, ask whether there is one; later the error that ends it is cheaper.
_ASKED_FOR = 3
#: A smaller frame is handed on as bytes; a tensor stays in libzmq's buffer and is only viewed.
_AS_BYTES = 65536

#: How the identity of a worker begins that registers. Behind a message of such a peer its Router puts a frame
#: with the address that it comes from, as the kernel says it.
JOINS = b"join/"

#: A host's name is looked up for this long before a socket takes it for IPv4.
_LOOK_UP_WITHIN_S = 1.0
_IPV4 = re.compile(r"[0-9.]+")

Message = list[Frame]


def _context() -> zmq.Context[zmq.Socket[bytes]]:
    # One IO thread in each process, unless `use_io_threads` says otherwise: the loops are single-threaded.
    return zmq.Context.instance()


def use_io_threads(number: int) -> None:
    """Have `number` threads of this process move bytes between sockets and memory, from its first socket on.

    Each connection stays with one of them, so a process needs more than one only if it has several connections
    with much to carry.
    """
    _context().set(zmq.IO_THREADS, number)


def _whole(frame: Frame) -> Frame:
    """What libzmq is given to send: the very message that `frame` views, if it came in one and views all of it.

    That is sent on without a copy and without a callback: the message is counted, and freed by its last user.
    """
    if isinstance(frame, memoryview):
        received = frame.obj
        if isinstance(received, zmq.Frame) and len(received) == frame.nbytes and frame.c_contiguous:
            return received  # type: ignore[return-value]
    return frame


def _only_ipv6(name: str) -> bool:
    """Whether the host `name` has IPv6 addresses and no other. False for one that is not known by now."""
    interfaces = ("*", *(interface for _, interface in socket.if_nameindex()))
    # A daemon may listen on an interface by its name.
    if _IPV4.fullmatch(name) or name in interfaces:
        return False
    families: list[int] = []

    def look_up() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            families.extend(found[0] for found in socket.getaddrinfo(name, None))

    # In a thread: a name server that does not answer would hold up the caller for many seconds.
    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(_LOOK_UP_WITHIN_S)
    return socket.AF_INET6 in families and socket.AF_INET not in families


def _source_of(frame: zmq.Frame) -> bytes:
    """The IP address that a frame comes from; empty if libzmq does not know it."""
    try:
        return str(frame.get("Peer-Address")).encode()
    except (zmq.ZMQError, LookupError, TypeError):
        return b""


class _Port:
    """What both socket kinds share."""

    tells_sources = False  # of peers that register

    def __init__(self, kind: int) -> None:
        require_descriptors(SOCKET_NEEDS)
        try:
            self._socket = zmq_socket = _context().socket(kind)
        except zmq.ZMQError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise OutOfResources(too_many_files()) from None
            raise
        self._get = cast(Callable[[int], int], partial(_Backend.get, zmq_socket))
        self._take = cast(Callable[[int, bool], zmq.Frame], partial(_Backend.recv, zmq_socket))
        self._put = partial(_Backend.send, zmq_socket)
        self.unread = False  # the last `receive` took all that it may, not all there was
        self._discarding = False  # the rest of a message with too many parts
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, HARD_LIMIT_BYTES)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)

    def _allow_ipv6(self, host: str) -> str:
        """Set up the socket for `host`. A name that has an IPv4 address stays IPv4: libzmq takes the first
        address alone, and "localhost" would be ::1, where few daemons listen."""
        if is_ipv6(host) or _only_ipv6(host):
            self._socket.setsockopt(zmq.IPV6, 1)
        return host

    def fileno(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def has_input(self) -> bool:
        """True if a message waits. Clears the edge of the descriptor: ask before sleeping on it."""
        return bool(self._get(_EVENTS) & _POLLIN)

    def close(self) -> None:
        self._socket.close(linger=0)

    def close_after(self, linger_ms: int) -> None:
        """Close, but let what is queued travel for up to `linger_ms` (the last answers of a drain)."""
        self._socket.close(linger=linger_ms)

    def _receive(self) -> list[Frame] | None:
        try:
            frame = self._take(_NOBLOCK, False)
        except zmq.Again:
            return None
        parts: list[Frame] = [frame.bytes if len(frame) < _AS_BYTES else frame.buffer]
        joins = parts[0][:5] == JOINS
        while frame.more:
            if len(parts) > MAX_PARTS:
                self._discarding = True
                break
            frame = self._take(_NOBLOCK, False)
            parts.append(frame.bytes if len(frame) < _AS_BYTES else frame.buffer)
        if joins and self.tells_sources:
            parts.append(_source_of(frame))
        return parts

    def _discard(self) -> bool:
        """Throw away some of what is left of a message with too many parts. True: all of it."""
        for _ in range(_DISCARD_AT_MOST):
            if not self._take(_NOBLOCK, False).more:
                self._discarding = False
                return True
        return False

    def _drain(self, at_most: int = _DRAIN_AT_MOST) -> list[list[Frame]]:
        """Everything that waits, up to the bounds; `unread` tells that those ended it."""
        received: list[list[Frame]] = []
        taken_bytes = small_bytes = 0
        self.unread = False
        while (
            len(received) < at_most
            and not (self._discarding and not self._discard())
            and taken_bytes < _DRAIN_BYTES
            and small_bytes < _DRAIN_SMALL_BYTES
        ):
            if len(received) < _ASKED_FOR and not self.has_input():
                return received
            parts = self._receive()
            if parts is None:
                return received
            received.append(parts)
            size = total_bytes(parts)
            taken_bytes += size
            if size < _AS_BYTES:
                small_bytes += size
        self.unread = True
        return received

    def _send(self, frames: Sequence[Frame]) -> bool:
        put, last = self._put, frames[-1]
        try:
            for frame in frames[:-1]:
                size = len(frame)
                put(frame if size < _AS_BYTES else _whole(frame), _MORE, size < _ZERO_COPY_BYTES)
            size = len(last)
            put(last if size < _AS_BYTES else _whole(last), _NOBLOCK, size < _ZERO_COPY_BYTES)
        except zmq.ZMQError as error:
            if error.errno in _NOW_UNSENDABLE:
                return False
            raise
        return True


#: A frame from this size on is sent without a copy. That costs a callback in another Python thread, which
#: takes the interpreter from the loop for 50 us and more; a copy of 602 kB takes 20 (H200's host).
_ZERO_COPY_BYTES = 2 * 1024 * 1024


class Router(_Port):
    """A bound ROUTER: many peers, each under the identity that it chose.

    Raises AddressInUse when the port is taken, InvalidConfig when the address is none.
    """

    tells_sources = True

    def __init__(self, bind: str, port: int) -> None:
        super().__init__(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            bind = bracketed(self._allow_ipv6(parse_bind(bind)))
            # Port 0: libzmq takes a free one, and says which.
            self._socket.bind(f"tcp://{bind}:{port or '*'}")
            self.port = port or int(
                str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT)).rpartition(":")[2]
            )
        except InvalidConfig:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(
                    f"port {port} on {bind} is in use; end the process that has it or take another --port"
                ) from None
            raise InvalidConfig(f"cannot listen on {bind}:{port}: {error.strerror}") from None

    def receive(self, at_most: int = _DRAIN_AT_MOST) -> list[tuple[bytes, list[Frame]]]:
        """Everything that waits, up to a bound, as (peer, frames). `frames` may be empty or garbage."""
        return [(bytes(parts[0]), parts[1:]) for parts in self._drain(at_most)]

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Queue a message. False if the peer is gone, or has 10,000 unread messages."""
        return self._send([peer, *frames])


class Dealer(_Port):
    """A connected DEALER: one peer. Nothing is queued while there is no connection (IMMEDIATE).

    Raises InvalidConfig for an address that is none, PeerUnreachable if nothing can be reached there.
    """

    def __init__(self, address: str, identity: bytes | None = None) -> None:
        super().__init__(zmq.DEALER)
        self.address = address
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if identity is not None:
            self._socket.setsockopt(zmq.IDENTITY, identity)
        try:
            where = parse_address(address)
            self._allow_ipv6(where.host)
            self._socket.connect(f"tcp://{where.texts()[0]}")
        except InvalidConfig:
            self.close()
            raise
        except zmq.ZMQError as error:
            self.close()
            raise PeerUnreachable(f"cannot connect to {address}: {error.strerror}") from None

    def receive(self) -> list[list[Frame]]:
        """Everything that waits, up to a bound."""
        return self._drain()

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue a message. False if there is no connection, or 10,000 messages wait already."""
        return self._send(frames)


class AsyncReader:
    """Calls `on_readable` in the running event loop whenever `port` may have input.

    Call `recheck()` after each burst of sends and each `receive` that left something: a send can swallow
    the descriptor's edge, and the loop would wait for ever on messages that are there.
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
            self._loop.call_soon(self._call)

    def _readable(self) -> None:
        if not self._scheduled and not self._closed:
            self._on_readable()

    def _call(self) -> None:
        self._scheduled = False
        if not self._closed:
            self._on_readable()

    def close(self) -> None:
        """Stop calling. Does not close the port."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)


class BadMessages:
    """Counts what peers sent that was not a message, and says so once for each peer."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._seen: set[bytes] = set()
        self.count = 0

    def note(self, peer: bytes, reason: str) -> None:
        self.count += 1
        if peer not in self._seen:
            if len(self._seen) >= 1024:  # bounded, however many peers send
                self._seen.clear()
            self._seen.add(peer)
            self._log(f"peer {peer.hex()}: {reason} (further ones are counted, not logged)")


def finish_sending(within_ms: int) -> None:
    """Wait until everything that sockets closed by `close_after` still held has left, at most `within_ms`.

    For the last line of a process: pyzmq does not wait when the interpreter exits, so answers that
    are queued then would be lost. Every socket of the process must have been closed.
    """
    # term() blocks until the sockets' linger is over; in a thread, so that a socket left open
    # cannot hold up the exit.
    thread = threading.Thread(target=zmq.Context.instance().term, daemon=True)
    thread.start()
    thread.join(within_ms / 1000)
