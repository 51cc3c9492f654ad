"""Messages to bytes and back. A decoder knows one direction's union, so nothing else gets in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import msgspec

from slosched.errors import MalformedMessage
from slosched.messages import (
    ClientMessage,
    ControllerToClient,
    ControllerToWorker,
    Heartbeat,
    Message,
    WorkerToController,
)

Frame = bytes | memoryview

_encode: Callable[[object], bytes] = msgspec.msgpack.Encoder().encode


def encode(message: Message) -> bytes:
    """The message's bytes. A Heartbeat without statistics of GPUs has its older, shorter form."""
    if type(message) is Heartbeat and not message.gpus:
        return _encode((Heartbeat.__name__, *msgspec.structs.astuple(message)[:-1]))
    return _encode(message)


def _decoder(union: Any) -> Callable[[Frame], Any]:
    decode = msgspec.msgpack.Decoder(union).decode

    def checked(frame: Frame) -> Any:
        try:
            return decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessage(f"not a message of this protocol: {error}") from None

    return checked


#: Each raises MalformedMessage for bytes that are no message of its direction.
decode_from_client = cast(Callable[[Frame], ClientMessage], _decoder(ClientMessage))
decode_from_worker = cast(Callable[[Frame], WorkerToController], _decoder(WorkerToController))
decode_for_worker = cast(Callable[[Frame], ControllerToWorker], _decoder(ControllerToWorker))
decode_for_client = cast(Callable[[Frame], ControllerToClient], _decoder(ControllerToClient))
