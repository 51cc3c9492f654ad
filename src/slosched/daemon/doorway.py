"""Where clients' messages enter the controller: read, decoded, and handed to the scheduler or refused.

How many requests a step takes is the scheduler's decision (core/scheduler/door.py); here is what costs CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from slosched import clock
from slosched.codes import Code
from slosched.core.scheduler.door import NO_LIMIT, REASON, fair_parts
from slosched.core.scheduler.interface import FromClient, Joining
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Client
from slosched.core.values import ValueStore
from slosched.errors import MalformedMessage
from slosched.join_messages import Register
from slosched.messages import InferRequest, Refused
from slosched.transport.bundles import (
    MAX_REFUSED,
    ForClients,
    FromClients,
    NotTaken,
    RequestBundle,
    with_frames,
)
from slosched.transport.codec import Frame, message_from_client
from slosched.transport.sockets import JOINS, BadMessages, Router

_ASKS = (RequestBundle, InferRequest)
Arrival = tuple[bytes, FromClients, list[Frame]]


#: Messages that a step reads as long as the loop keeps up: each takes five microseconds, also a cancel.
_AT_ONCE = 48


class Doorway:
    """Reads `router` for `scheduler`. `answer` sends a client what is decided here; `frames` keeps inputs."""

    def __init__(
        self,
        scheduler: Scheduler,
        router: Router,
        values: ValueStore[Frame],
        *,
        answer: Callable[[bytes, ForClients], None],
        bad: BadMessages,
    ) -> None:
        self._scheduler, self._router, self._values = scheduler, router, values
        self._door = scheduler.door
        self._answer = answer
        self._bad = bad
        self._taken = 0  # requests of this step
        #: Of each client's first message with requests in it: when it was sent, and its first request.
        self._firsts: dict[bytes, tuple[int, InferRequest]] = {}
        self._read_ns = 0
        self._refusing_ns = 0  # CPU time that refusals took so far
        self._announced = 0  # refused at the door, and said

    def receive(self) -> int:
        """Take what waits, up to the socket's bound, and return the number of messages."""
        if self._door.limit < NO_LIMIT:
            return self._receive_some(self._door.limit)
        heard = 0
        for peer, frames in self._router.receive(_AT_ONCE):
            message = self._decoded(peer, frames)
            if message is None:
                heard += 1
                continue
            self._read_ns = clock.now_ns()
            heard += self._hand_on(peer, message, frames, 0)
        return heard

    def step_ended(self) -> None:
        """Tell the door how the step went."""
        if not self._firsts:
            return
        waited_ns, longest = -1, None
        for peer, (sent_ns, request) in self._firsts.items():
            each_ns = self._waited_ns(peer, sent_ns)
            if each_ns > waited_ns:
                waited_ns, longest = each_ns, request
        self._firsts.clear()
        assert longest is not None
        self._door.step_ended(
            now_ns=clock.now_ns(),
            cpu_ns=clock.thread_cpu_ns() - self._refusing_ns,
            took=self._taken,
            waited_ns=waited_ns,
            slo_ns=self._scheduler.arrivals.slo_ns(longest),
        )
        self._taken = 0

    def console_line(self) -> str:
        """What was refused since the last call, for the operator; empty without any."""
        refused, self._announced = self._door.refused - self._announced, self._door.refused
        if not refused:
            return ""
        return f"warning: {refused:,} requests refused at the door: {REASON}"

    def _waited_ns(self, peer: bytes, sent_ns: int) -> int:
        client = self._scheduler.clients.get(peer)
        if client is None or not sent_ns:
            return 0
        return client.delays.queued_ns(sent_ns=sent_ns, now_ns=self._read_ns)

    def _decoded(self, peer: bytes, frames: list[Frame]) -> FromClients | None:
        source = bytes(frames.pop()).decode() if frames and peer.startswith(JOINS) else ""
        try:
            message = message_from_client(frames)
            if isinstance(message, Register):
                event = Joining(peer, source, message)
                self._scheduler.handle(event, now_ns=clock.now_ns())
                return None
        except MalformedMessage as error:
            self._bad.note(peer, str(error))
            refused = Refused(-1, Code.INVALID_REQUEST, f"message not taken: {error}")
            self._answer(peer, refused)
            return None
        if isinstance(message, _ASKS) and message.sent_ns and peer not in self._firsts:
            requests = _requests(message)
            if requests:
                self._firsts[peer] = message.sent_ns, requests[0]
        return message

    def _hand_on(
        self, peer: bytes, message: FromClients, frames: list[Frame], waited_ns: int
    ) -> int:
        """To the scheduler, and how many messages that were."""
        handle, now_ns = self._scheduler.handle, self._read_ns
        if isinstance(message, RequestBundle):
            asked = with_frames(message.requests, message.frames, frames[1:])
            if peer not in self._scheduler.clients and asked:
                self._refuse_unknown(peer, message.requests[1:])
                asked = asked[:1]
            for request, inputs in asked:
                value = self._values.came(inputs[0]) if inputs else None
                handle(FromClient(peer, request, value, waited_ns), now_ns=now_ns)
            self._taken += len(message.requests)
            return len(message.requests)
        value = self._values.came(frames[1]) if len(frames) > 1 else None
        handle(FromClient(peer, message, value, waited_ns), now_ns=now_ns)
        self._taken += isinstance(message, InferRequest)
        return 1

    def _refuse_unknown(self, peer: bytes, requests: tuple[InferRequest, ...]) -> None:
        """Refuse these as the scheduler refuses the first of their bundle, in one message."""
        if requests:
            ids = tuple([request.request_id for request in requests])
            self._answer(peer, NotTaken(ids, int(Code.INVALID_REQUEST), "say hello first"))

    # ----------------------------------------------------------------------- behind: take some

    def _receive_some(self, most: int) -> int:
        """As `receive`, and take only `most` requests, a fair part of each client's; refuse the others."""
        began_ns = clock.thread_cpu_ns()
        arrivals: list[Arrival] = []
        waiting: dict[bytes, int] = {}
        for peer, frames in self._router.receive():
            message = self._decoded(peer, frames)
            if message is None:
                continue
            arrivals.append((peer, message, frames))
            if count := len(_requests(message)):
                waiting[peer] = waiting.get(peer, 0) + count
        self._read_ns = clock.now_ns()
        total = sum(waiting.values())
        if total > most:
            arrivals = self._refuse_some(arrivals, fair_parts(waiting, most))
        self._refusing_ns += clock.thread_cpu_ns() - began_ns
        for peer, message, frames in arrivals:
            waited_ns = 0
            if isinstance(message, _ASKS):
                waited_ns = self._waited_ns(peer, message.sent_ns)
            self._hand_on(peer, message, frames, waited_ns)
        return max(total, len(arrivals))

    def _refuse_some(self, arrivals: list[Arrival], parts: dict[bytes, int]) -> list[Arrival]:
        """Refuse what is beyond `parts`, the number of requests of each client; returns the others."""
        asked: dict[bytes, list[InferRequest]] = {}
        for peer, message, _ in arrivals:
            if requests := _requests(message):
                asked.setdefault(peer, []).extend(requests)
        chosen = {
            peer: iter(self._door.choose([request.model_id for request in requests], parts[peer]))
            for peer, requests in asked.items()
        }
        taken: list[Arrival] = []
        refused: dict[bytes, list[InferRequest]] = {}
        for peer, message, frames in arrivals:
            requests = _requests(message)
            marks = list(islice(chosen[peer], len(requests))) if requests else []
            if all(marks) or peer not in self._scheduler.clients:
                taken.append((peer, message, frames))
                continue
            others = refused.setdefault(peer, [])
            others += [each for each, mark in zip(requests, marks, strict=True) if not mark]
            if any(marks) and isinstance(message, RequestBundle):
                taken.append((peer, *_some_of(message, frames, marks)))
        for peer, others in refused.items():
            client = self._scheduler.clients[peer]
            self._tell(client, self._door.refuse(client, others))
        return taken

    def _tell(self, client: Client, refused: list[int]) -> None:
        client.heard = True
        code = int(Code.CONTROLLER_OVERLOADED)
        for first in range(0, len(refused), MAX_REFUSED):
            ids = tuple(refused[first : first + MAX_REFUSED])
            self._answer(client.identity, NotTaken(ids, code, REASON))


def _some_of(
    bundle: RequestBundle, frames: list[Frame], marks: list[bool]
) -> tuple[RequestBundle, list[Frame]]:
    """A bundle of the marked requests of `bundle`, and the frames of such a message."""
    asked = with_frames(bundle.requests, bundle.frames, frames[1:])
    kept = [each for each, mark in zip(asked, marks, strict=True) if mark]
    inputs = [frame for _, its in kept for frame in its]
    counts = tuple([len(its) for _, its in kept]) if inputs else ()
    some = RequestBundle(tuple([request for request, _ in kept]), bundle.sent_ns, counts)
    return some, [frames[0], *inputs]


def _requests(message: FromClients) -> tuple[InferRequest, ...]:
    if isinstance(message, RequestBundle):
        return message.requests
    return (message,) if isinstance(message, InferRequest) else ()
