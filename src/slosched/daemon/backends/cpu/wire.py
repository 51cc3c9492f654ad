"""What the worker, the zygote and its children say to each other: typed messages over SEQPACKET sockets.

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

from slosched.config import ModelProfile, WorkerConfig

#: No message is longer; the longest, the names of two libraries' models, has some 60 KiB.
MAX_PACKET_BYTES = 160 * 1024
_FDS_AT_MOST = 4


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of every message."""


# ------------------------------------------------------------------------- worker to zygote


class Open(Message, frozen=True):
    """Import what the models of `config` need. `anchor_ns` is the worker's clock, `cpus` its cores."""

    config: WorkerConfig
    anchor_ns: int
    cpus: tuple[int, ...]


class Spawn(Message, frozen=True):
    """Fork child `number`; its end of a socket comes with this."""

    number: int


class Kill(Message, frozen=True):
    """End the child and every process it started."""

    number: int


ToZygote = Open | Spawn | Kill

# ------------------------------------------------------------------------- zygote to worker


class Opened(Message, frozen=True):
    """Everything is imported. `names` can be loaded; `torch` is its version."""

    names: tuple[str, ...]
    torch: str


class OpenFailed(Message, frozen=True):
    """`kind` is the name of a class of slosched.errors, or another exception's."""

    kind: str
    words: str


class Said(Message, frozen=True):
    """A line that the child printed, without control characters."""

    number: int
    text: str


class Ended(Message, frozen=True):
    """The child is gone: "exit code 3", "signal 11 (Segmentation fault)"."""

    number: int
    words: str


FromZygote = Opened | OpenFailed | Said | Ended

# -------------------------------------------------------------------------- worker to child


class Prepare(Message, frozen=True):
    """Build `name`. With `known`, its profile, it is neither checked nor measured again."""

    name: str
    batches: tuple[int, ...]
    max_exec_ns: int
    known: ModelProfile | None = None
    own_state: tuple[str, ...] = ()


class Classes(Message, frozen=True):
    """Another child measured the model anew."""

    profile: ModelProfile
    own_state: tuple[str, ...]


class Load(Message, frozen=True):
    op_id: int
    model_id: int


class Evict(Message, frozen=True):
    model_id: int


class AddSlot(Message, frozen=True):
    """Memory for batches of the class (`batch`, `length`): inputs, then outputs. Its descriptor comes with
    this."""

    slot: int
    batch: int
    length: int
    outputs_at: int
    nbytes: int


class DropSlot(Message, frozen=True):
    slot: int


class Exec(Message, frozen=True):
    """Run the batch of a slot. Those of `rows` are in its inputs, and the others are made up.

    The first `answers` rows of the output are written into the slot; 0: none is needed.
    """

    op_id: int
    model_id: int
    slot: int
    rows: tuple[int, ...]
    answers: int


ToChild = Prepare | Classes | Load | Evict | AddSlot | DropSlot | Exec

# -------------------------------------------------------------------------- child to worker


class Progress(Message, frozen=True):
    """A step of the preparation has ended, and it continues; `words` are human-readable."""

    words: str = ""


class Prepared(Message, frozen=True):
    """`pads` are what inputs are padded with, by name, where that is not 0."""

    profile: ModelProfile
    random_weights: bool
    labels: tuple[str, ...]
    own_state: tuple[str, ...] = ()
    pads: dict[str, float] = {}


class PrepareFailed(Message, frozen=True):
    code: int
    words: str


class Done(Message, frozen=True):
    """An op has ended; `code` other than 0 says that it failed. Times are the worker's clock."""

    op_id: int
    begin_ns: int
    end_ns: int
    code: int = 0
    words: str = ""


FromChild = Progress | Prepared | PrepareFailed | Done

encode = msgspec.msgpack.Encoder().encode
to_zygote = msgspec.msgpack.Decoder(ToZygote)
from_zygote = msgspec.msgpack.Decoder(FromZygote)
to_child = msgspec.msgpack.Decoder(ToChild)
from_child = msgspec.msgpack.Decoder(FromChild)


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
