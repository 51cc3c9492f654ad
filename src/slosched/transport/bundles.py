"""Bundles: one message for everything that one peer is sent at one wake-up.

They hold messages in order, and behind a bundle come the frames of its messages in the same order: those
messages whose frames are small travel so (outbox.py). A bundle with one malformed message in it is malformed,
and so is one whose `frames` does not fit what comes behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from slosched.errors import MalformedMessage
from slosched.join_messages import MembershipReply, Register
from slosched.messages import (
    Action,
    CallNews,
    CancelCall,
    ChildReply,
    ClientMessage,
    ControllerToClient,
    ControllerToWorker,
    InferReply,
    InferRequest,
    Message,
    Name,
    Number,
    Result,
    WorkerToController,
)

#: No bundle is longer, and a longer one is malformed: what one message can hold up has a bound.
MAX_BUNDLED = 64
_Bound = msgspec.Meta(max_length=MAX_BUNDLED)
#: No message in a bundle has more frames: an Infer has one for each input.
_MAX_FRAMES_OF_ONE = 1024
#: The number of frames of each message in a bundle, in order; empty: none has any.
FrameCounts = Annotated[
    tuple[Annotated[int, msgspec.Meta(ge=0, le=_MAX_FRAMES_OF_ONE)], ...], _Bound
]
#: Request ids in one NotTaken; a step refuses more only in a flood.
MAX_REFUSED = 1024


class RequestBundle(Message, frozen=True):
    """Requests that were due at one wake-up of a client, sent at `sent_ns` by its clock."""

    requests: Annotated[tuple[InferRequest, ...], _Bound]
    sent_ns: Number
    frames: FrameCounts = ()


class ReplyBundle(Message, frozen=True):
    """Answers that were given at one wake-up of the controller."""

    replies: Annotated[tuple[InferReply, ...], _Bound]
    frames: FrameCounts = ()


class NotTaken(Message, frozen=True):
    """Requests of one client that the controller refused unread, for one reason."""

    request_ids: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_REFUSED)]
    code: Number
    reason: Name


#: What an ActionBundle and a ResultBundle may hold.
Bundled = Action | CancelCall | ChildReply
Reported = Result | CallNews


class ActionBundle(Message, frozen=True):
    """What goes to a worker, as decided at one wake-up of the controller."""

    actions: Annotated[tuple[Bundled, ...], _Bound]
    frames: FrameCounts = ()


class ResultBundle(Message, frozen=True):
    """Results and news of calls, as a worker sends them at one wake-up."""

    results: Annotated[tuple[Reported, ...], _Bound]
    frames: FrameCounts = ()


M = TypeVar("M", bound=Message)
F = TypeVar("F")


def with_frames(
    messages: Sequence[M], counts: Sequence[int], frames: Sequence[F]
) -> list[tuple[M, list[F]]]:
    """Each message of a bundle with its own of the `frames` behind it; `counts` is the bundle's field `frames`.

    Raises MalformedMessage if they do not fit one another.
    """
    if not counts and not frames:
        return [(each, []) for each in messages]
    if len(counts) != len(messages) or sum(counts) != len(frames):
        raise MalformedMessage(
            f"a bundle of {len(messages)} messages with {len(frames)} frame(s) behind it, where it states "
            f"{sum(counts)} for {len(counts)} of them"
        )
    found: list[tuple[M, list[F]]] = []
    at = 0
    for message, count in zip(messages, counts, strict=True):
        found.append((message, [*frames[at : at + count]]))
        at += count
    return found


# What a frame may hold, by direction.
FromClients = ClientMessage | RequestBundle
AtTheDoor = FromClients | Register  # the port of clients
ForClients = ControllerToClient | ReplyBundle | NotTaken | MembershipReply
ForWorkers = ControllerToWorker | ActionBundle
FromWorkers = WorkerToController | ResultBundle
