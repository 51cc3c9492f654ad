"""Messages to bytes and back. A decoder knows one direction's union, so nothing else gets in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec

from slosched.errors import MalformedMessage
from slosched.join_messages import MembershipReply
from slosched.messages import (
    InferRequest,
    ListModelsReply,
    LoadModelReply,
    Message,
    StatusReply,
)
from slosched.transport.bundles import (
    MAX_BUNDLED,
    AtTheDoor,
    ForClients,
    ForWorkers,
    FromWorkers,
    RequestBundle,
    with_frames,
)

Frame = bytes | memoryview

#: A larger message is refused, with words; libzmq itself drops a peer that sends a larger frame (sockets.py).
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
#: The struct of a message has no more bytes; only the controller's lists for clients do.
MAX_STRUCT_BYTES = 64 * 1024
#: A worker's struct may be longer: its Welcome lists whole libraries, and its errors quote a model's exception.
_MAX_WORKER_STRUCT_BYTES = 512 * 1024

_encode: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode
#: The message's bytes.
encode: Callable[[Message], bytes] = _encode


#: Elements of a long list that are encoded between two looks at the time.
_A_PART = 16


def is_long(message: Message) -> bool:
    """Whether encoding `message` takes long enough for `pieces_of` to be worth while."""
    if isinstance(message, StatusReply):
        return any(isinstance(each, list) and len(each) > 50 for each in message.report.values())
    return isinstance(message, LoadModelReply | ListModelsReply) and len(message.models) > 50


def pieces_of(message: Message) -> Iterator[bytes]:
    """What `encode` returns of a long message, in pieces that each take some microseconds."""
    fields = msgspec.structs.astuple(message)
    yield _head_of(0x90, 0xDC, 1 + len(fields))
    yield _encode(type(message).__name__)
    for value in fields:
        yield from _pieces(value)


def _pieces(value: object) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield _head_of(0x80, 0xDE, len(value))
        for key, each in value.items():
            yield _encode(key)
            yield from _pieces(each)
    elif isinstance(value, list | tuple) and len(value) > _A_PART:
        yield _head_of(0x90, 0xDC, len(value))
        for at in range(0, len(value), _A_PART):
            part = value[at : at + _A_PART]
            yield _encode(part)[len(_head_of(0x90, 0xDC, len(part))) :]
    else:
        yield _encode(value)


def _head_of(short: int, long: int, count: int) -> bytes:
    """MessagePack's head of an array or map of `count`: `short` holds up to 15, `long` 16 bits, then 32."""
    if count < 16:
        return bytes((short | count,))
    if count < 2**16:
        return bytes((long,)) + count.to_bytes(2, "big")
    return bytes((long + 1,)) + count.to_bytes(4, "big")


def _decoder(union: Any, most_bytes: int) -> Callable[[Frame], Any]:
    decode = msgspec.msgpack.Decoder(union).decode

    def checked(frame: Frame) -> Any:
        if len(frame) > most_bytes:
            raise MalformedMessage(
                f"a message of {len(frame)} bytes before its tensors; {most_bytes} are allowed"
            )
        try:
            return decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessage(f"not a message of this protocol: {error}") from None

    return checked


#: Each raises MalformedMessage for bytes that are not a message of its direction.
decode_from_client = cast(Callable[[Frame], AtTheDoor], _decoder(AtTheDoor, MAX_STRUCT_BYTES))
decode_from_worker = cast(
    Callable[[Frame], FromWorkers], _decoder(FromWorkers, _MAX_WORKER_STRUCT_BYTES)
)
decode_for_worker = cast(Callable[[Frame], ForWorkers], _decoder(ForWorkers, MAX_STRUCT_BYTES))
decode_for_client = cast(Callable[[Frame], ForClients], _decoder(ForClients, MAX_MESSAGE_BYTES))
#: What a worker gets back that registers.
decode_membership = cast(
    Callable[[Frame], MembershipReply], _decoder(MembershipReply, MAX_STRUCT_BYTES)
)


def message_from_client(frames: list[Frame]) -> AtTheDoor:
    """The message of a client's frames. Raises MalformedMessage if it is none that is taken.

    Each request of a bundle has one frame behind it at most, as a request alone.
    """
    if len(frames) == 1 and len(frames[0]) <= MAX_MESSAGE_BYTES:
        message = decode_from_client(frames[0])
        if isinstance(message, RequestBundle) and message.frames:
            with_frames(message.requests, message.frames, ())
        return message
    if not frames:
        raise MalformedMessage("an empty message")
    if total_bytes(frames) > MAX_MESSAGE_BYTES or len(frames) > 1 + MAX_BUNDLED:
        raise MalformedMessage(
            f"{total_bytes(frames)} bytes in {len(frames)} frames; at most {MAX_MESSAGE_BYTES} bytes are "
            f"taken, in two frames, or as a bundle in {1 + MAX_BUNDLED}"
        )
    message = decode_from_client(frames[0])
    if isinstance(message, RequestBundle):
        if any(count > 1 for count in message.frames):
            raise MalformedMessage("a bundle with a request that has more than one frame")
        with_frames(message.requests, message.frames, frames[1:])
        return message
    if len(frames) > 2:
        raise MalformedMessage(f"{type(message).__name__} in {len(frames)} frames")
    if not isinstance(message, InferRequest):
        raise MalformedMessage(f"{type(message).__name__} with a frame behind it")
    return message


def total_bytes(frames: Sequence[Frame]) -> int:
    return sum(map(len, frames))
