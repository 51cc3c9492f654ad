"""What a process and those that it lets fork say to each other: typed packets over SEQPACKET sockets.

Each packet is one message with the file descriptors that belong to it. A packet is bounded; what a child
sends is decoded by type, and one that does not decode ends that child.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence

import msgspec

#: No message is longer; the longest, the names of two libraries' models, has some 60 KiB.
MAX_PACKET_BYTES = 160 * 1024
_FDS_AT_MOST = 4


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of every message."""


# ---------------------------------------------------------------------------------- to a zygote


class Spawn(Message, frozen=True):
    """Fork child `number`; its end of a socket comes with this."""

    number: int


class Kill(Message, frozen=True):
    """End the child and every process it started."""

    number: int


ToZygote = Spawn | Kill

# -------------------------------------------------------------------------------- from a zygote


class Said(Message, frozen=True):
    """A line that the child printed, without control characters."""

    number: int
    text: str


class Ended(Message, frozen=True):
    """The child is gone: "exit code 3", "signal 11 (Segmentation fault)"."""

    number: int
    words: str


FromZygote = Said | Ended

encode = msgspec.msgpack.Encoder().encode
to_zygote = msgspec.msgpack.Decoder(ToZygote)
from_zygote = msgspec.msgpack.Decoder(FromZygote)


# ---------------------------------------------------------------------------------- packets


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends, blocking; neither is inherited by a program that is started."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET_BYTES)
    return near, far


def send(end: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> bool:
    """Send one packet. False: there is no room now. Raises OSError if the peer has ended."""
    if len(packet) > MAX_PACKET_BYTES:
        raise ValueError(f"a packet of {len(packet)} bytes; {MAX_PACKET_BYTES} are allowed")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    try:
        end.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return False
    return True


def receive(end: socket.socket) -> tuple[bytes, list[int]] | None:
    """One packet and its descriptors, which the caller closes. None: nothing is there now.

    Raises EOFError when the other side is gone, ValueError for a packet that is too long.
    """
    size = array.array("i").itemsize
    try:
        packet, rights, flags, _ = end.recvmsg(
            MAX_PACKET_BYTES, socket.CMSG_SPACE(_FDS_AT_MOST * size), socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    except ConnectionError:
        raise EOFError from None
    fds = array.array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % size])
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(fds)
        raise ValueError(f"a packet of more than {MAX_PACKET_BYTES} bytes")
    if not packet:
        close_all(fds)
        raise EOFError
    return packet, list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
