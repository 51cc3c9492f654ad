"""What the experiment and a process of one instance say to each other: packets of MessagePack behind their
length."""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

from slosched.faasm.inference.instance import Answer

_LENGTH = struct.Struct("<Q")
#: A picture and what belongs to it; anything longer is a mistake.
_MOST_BYTES = 1 << 28


class Answering(msgspec.Struct, frozen=True, tag="answer"):
    """Answer a picture of uint8 with that shape, after a cold start of that rung."""

    image: bytes
    shape: tuple[int, int, int]
    rung: str
    pause_ns: int = 0


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    """Go through a rung `count` times."""

    rung: str
    count: int


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Fork, have the child answer one picture, and say when that was."""


class Weigh(msgspec.Struct, frozen=True, tag="weigh"):
    """Say what the process takes on the GPU, which is what all processes take."""


class Hold(msgspec.Struct, frozen=True, tag="hold"):
    """Fork `count` children that answer a picture, as this process does, and stay until the next order."""

    count: int


Order = Answering | Measure | Fork | Weigh | Hold


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process can answer. `import_ns` and `load_ns` are parts of its start; `cpu_ns` is what it took until
    then."""

    pid: int
    import_ns: int
    load_ns: int
    cpu_ns: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    answer: Answer


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    """Wall and CPU time of each."""

    wall_ns: tuple[int, ...]
    cpu_ns: tuple[int, ...]


class Weighed(msgspec.Struct, frozen=True, tag="weighed"):
    gpu_used_bytes: int
    gpu_total_bytes: int


class Held(msgspec.Struct, frozen=True, tag="held"):
    """The children, of which `right` answered as their parent did."""

    pids: tuple[int, ...]
    right: int


Report = Ready | Failed | Answered | Measured | Weighed | Held

_orders = msgspec.msgpack.Decoder(Order)
_reports = msgspec.msgpack.Decoder(Report)
_encoder = msgspec.msgpack.Encoder()


def send(end: socket.socket, message: Order | Report) -> None:
    """Send a message. Raises OSError if the other side is gone, or does not read within the socket's
    time-out."""
    packet = _encoder.encode(message)
    end.sendall(_LENGTH.pack(len(packet)) + packet)


def receive_order(end: socket.socket) -> Order:
    """The next order. Raises EOFError when the other side is gone, ValueError for nonsense."""
    order: Order = _orders.decode(_packet(end))
    return order


def receive_report(end: socket.socket) -> Report:
    """What the process reports next. Raises EOFError, ValueError, and TimeoutError."""
    report: Report = _reports.decode(_packet(end))
    return report


def _packet(end: socket.socket) -> bytearray:
    (length,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    if length > _MOST_BYTES:
        raise ValueError(f"a packet of {length:,} bytes")
    return _exactly(end, length)


def _exactly(end: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view: Any = memoryview(data)
    while view:
        got = end.recv_into(view)
        if not got:
            raise EOFError("the other side closed the connection")
        view = view[got:]
    return data
