"""Bundles: one message for all that one peer is told at one wake-up.

They hold what has no frames behind it, in order, and only go to a peer whose hello says that it takes them. A
bundle with one wrong message in it is a wrong message.
"""

from __future__ import annotations

from slosched.messages import (
    Action,
    ClientMessage,
    ControllerToClient,
    ControllerToWorker,
    InferReply,
    InferRequest,
    Message,
    Result,
    WorkerToController,
)


class RequestBundle(Message, frozen=True):
    """Requests without an input that were due at one wake-up of a client."""

    requests: tuple[InferRequest, ...]


class ReplyBundle(Message, frozen=True):
    """Answers without an output that were given at one wake-up of the controller."""

    replies: tuple[InferReply, ...]


class ActionBundle(Message, frozen=True):
    """Actions without inputs that were decided at one wake-up of the controller."""

    actions: tuple[Action, ...]


class ResultBundle(Message, frozen=True):
    """Results without outputs that a worker sends at one wake-up."""

    results: tuple[Result, ...]


# What a frame may hold, by direction.
FromClients = ClientMessage | RequestBundle
ForClients = ControllerToClient | ReplyBundle
ForWorkers = ControllerToWorker | ActionBundle
FromWorkers = WorkerToController | ResultBundle
