"""Bundles: one message for everything that one peer is sent at one wake-up.

They hold messages without frames, in order. A bundle with one malformed message in it is malformed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

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
#: Request ids in one NotTaken; a step refuses more only in a flood.
MAX_REFUSED = 1024


class RequestBundle(Message, frozen=True):
    """Requests without an input that were due at one wake-up of a client, sent at `sent_ns` by its clock."""

    requests: Annotated[tuple[InferRequest, ...], _Bound]
    sent_ns: Number


class ReplyBundle(Message, frozen=True):
    """Answers without an output that were given at one wake-up of the controller."""

    replies: Annotated[tuple[InferReply, ...], _Bound]


class NotTaken(Message, frozen=True):
    """Requests of one client that the controller refused unread, for one reason."""

    request_ids: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MAX_REFUSED)]
    code: Number
    reason: Name


#: What an ActionBundle and a ResultBundle may hold.
Bundled = Action | CancelCall | ChildReply
Reported = Result | CallNews


class ActionBundle(Message, frozen=True):
    """What goes to a worker without a frame, as decided at one wake-up of the controller."""

    actions: Annotated[tuple[Bundled, ...], _Bound]


class ResultBundle(Message, frozen=True):
    """Results without outputs and news of calls without payloads, as a worker sends them at one wake-up."""

    results: Annotated[tuple[Reported, ...], _Bound]


# What a frame may hold, by direction.
FromClients = ClientMessage | RequestBundle
AtTheDoor = FromClients | Register  # the port of clients
ForClients = ControllerToClient | ReplyBundle | NotTaken | MembershipReply
ForWorkers = ControllerToWorker | ActionBundle
FromWorkers = WorkerToController | ResultBundle
