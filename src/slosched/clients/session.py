"""A client's session with a controller: hello, liveness, and answers handed to the calls that wait.

The calls are in `questions.py` and, for inferences, `aio.py`, on top of this.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from slosched.clients.arguments import client_name, client_weight, time_limit_s
from slosched.clients.forks import forked_error, generation
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import CLIENT_HEARTBEAT_NS
from slosched.errors import (
    ConnectionLost,
    InvalidRequest,
    MalformedMessage,
    PeerUnreachable,
    ProtocolMismatch,
)
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHeartbeat,
    ClientHello,
    DrainWorkerReply,
    Goodbye,
    InferReply,
    ListModelsReply,
    LoadModelReply,
    Message,
    ModelInfo,
    Refused,
    StatusReply,
    UnloadModelReply,
    Welcome,
)
from slosched.transport.bundles import NotTaken, ReplyBundle
from slosched.transport.codec import Frame, decode_for_client, encode
from slosched.transport.sockets import AsyncReader, Dealer
from slosched.units import NS_PER_S, format_duration

#: Called with an inference's answer and its output frame, if it has one.
OnReply = Callable[[InferReply, Frame | None], None]


def not_served(request_id: int, code: int, reason: str) -> InferReply:
    """The answer that a message stands for which refuses a request without one."""
    return InferReply(request_id, code, reason, -1, 0, 0, False)


HELLO_EVERY_S = 0.5
SEND_AGAIN_S = 0.02  # while there is no connection yet
_TICK_S = CLIENT_HEARTBEAT_NS / NS_PER_S
#: Ticks in a row without a word after which the controller counts as lost. Ticks that happened are
#: counted, not time, so that a machine that stood still does not declare its peer dead.
_LOST_AFTER_TICKS = 5
_LINGER_MS = 500
#: So long after its last refusal at the door a controller counts as crowded.
_CROWDED_NS = NS_PER_S

#: Answers to questions, by their request ids.
_ANSWERS = (LoadModelReply, UnloadModelReply, ListModelsReply, StatusReply, DrainWorkerReply)


class Session:
    """The connection to one controller, in the running event loop.

    `lost` says in words that the controller has fallen silent, and is empty while it answers.
    `malformed` counts bytes from it that were not a message.
    """

    def __init__(self, address: str, *, name: str = "", weight: float = 1.0) -> None:
        name, weight = client_name(name), client_weight(weight)
        self._generation = generation()
        self.address = address
        self.malformed = 0
        self.lost = ""
        self._loop = asyncio.get_running_loop()
        self._name, self._weight = name, weight
        self._incarnation = secrets.randbits(62)
        self._controller: Welcome | None = None
        self._refusal = ""
        self._greeted = asyncio.Event()
        self._heard = False
        self._crowded_until_ns = 0  # the controller refuses requests at its door
        self._silent_ticks = 0
        self._closed = False
        #: The models that this client has loaded, by id.
        self._infos: dict[int, ModelInfo] = {}
        self._inferences: dict[int, OnReply] = {}
        self._futures: dict[int, asyncio.Future[Any]] = {}
        #: Requests without an SLO of their own, and questions; they end when it falls silent.
        self._until_silence: dict[int, None] = {}
        # An identity of our own survives a reconnect, so answers still find us.
        self._dealer = Dealer(address, identity=b"c" + self._incarnation.to_bytes(8, "big"))
        self._reader = AsyncReader(self._dealer, self._on_readable)
        self._ticker = self._loop.call_later(_TICK_S, self._tick)

    async def open(self, *, timeout_s: float = 5.0) -> None:
        """Say hello until the controller answers.

        Raises PeerUnreachable after `timeout_s`, ProtocolMismatch if it speaks another version.
        """
        self._check_process()
        timeout_s = time_limit_s(timeout_s)
        ends_s = self._loop.time() + timeout_s
        self._greeted.clear()
        while not self._greeted.is_set():
            left_s = ends_s - self._loop.time()
            if left_s <= 0:
                raise PeerUnreachable(
                    f"no controller answered at {self.address} within "
                    f"{format_duration(timeout_s * NS_PER_S)}; start one with `slosched controller` "
                    "or give the host:port where it listens for clients"
                )
            sent = self._send(self._hello())
            try:
                async with asyncio.timeout(min(left_s, HELLO_EVERY_S if sent else SEND_AGAIN_S)):
                    await self._greeted.wait()
            except TimeoutError:
                continue
        if self._refusal:
            raise ProtocolMismatch(f"the controller at {self.address} refuses: {self._refusal}")

    async def close(self) -> None:
        """Say goodbye and end the session. Unanswered requests fail. Idempotent."""
        if self._closed:
            return
        if self._generation != generation():  # the session and its sockets are the parent's
            self._closed = True
            return
        self._send(Goodbye())
        self._closed = True
        self._ticker.cancel()
        self._reader.close()
        self._fail_all("the client was closed")
        self._dealer.close_after(_LINGER_MS)

    @property
    def controller(self) -> Welcome:
        """What the controller said of itself: its version, policy and incarnation."""
        if self._controller is None:
            raise PeerUnreachable(f"not connected to {self.address} yet; await open() first")
        return self._controller

    @property
    def unanswered(self) -> int:
        """Inferences on their way."""
        return len(self._inferences)

    def _hello(self) -> ClientHello:
        return ClientHello(PROTOCOL_VERSION, self._incarnation, self._name, self._weight)

    def _check_process(self) -> None:
        """Raise ConnectionLost in a fork of the process that made this client."""
        if self._generation != generation():
            raise forked_error()

    def _send(self, message: Message) -> bool:
        self._check_process()
        if self._closed:
            raise ConnectionLost("this client is closed", code=Code.CANCELLED)
        sent = self._dealer.send([encode(message)])
        self._reader.recheck()
        return sent

    def _tick(self) -> None:
        """Each second: tell the controller that we live, and find out whether it does."""
        self._ticker = self._loop.call_later(_TICK_S, self._tick)
        if self._controller is None:
            return  # one that does not know us yet would refuse a heartbeat that is ahead of our hello
        self._send(ClientHeartbeat(now_ns()))
        if self._heard:
            self._heard, self._silent_ticks = False, 0
            if not self._greeted.is_set():
                self._send(self._hello())
            return
        self._silent_ticks += 1
        self._send(self._hello())  # it answers with its incarnation, so a restart shows as well
        # Each tick from then on: a request made during the silence ends as well.
        if self._silent_ticks >= _LOST_AFTER_TICKS:
            self.lost = (
                f"the controller at {self.address} has been silent for {_LOST_AFTER_TICKS} s"
            )
            for request_id in [*self._until_silence]:
                self._fail(request_id, self.lost)

    def _fail(self, request_id: int, reason: str) -> None:
        self._inferences.pop(request_id, None)
        future = self._futures.pop(request_id, None)
        if future is not None and not future.done():
            future.set_exception(ConnectionLost(reason, code=Code.CANCELLED))

    def _fail_all(self, reason: str) -> None:
        for request_id in [*self._futures, *self._inferences]:
            self._fail(request_id, reason)

    # ----------------------------------------------------------------------------- receiving

    def _on_readable(self) -> None:
        inferences = self._inferences
        for frames in self._dealer.receive():
            try:
                message = decode_for_client(frames[0])
            except (MalformedMessage, IndexError):
                self.malformed += 1
                continue
            self._heard = True
            if type(message) is ReplyBundle:
                for reply in message.replies:
                    on_reply = inferences.pop(reply.request_id, None)
                    if on_reply is not None:
                        on_reply(reply, None)
            elif type(message) is InferReply:
                on_reply = inferences.pop(message.request_id, None)
                if on_reply is not None:
                    on_reply(message, frames[1] if len(frames) > 1 else None)
            elif type(message) is NotTaken:
                self._crowded_until_ns = now_ns() + _CROWDED_NS
                for request_id in message.request_ids:
                    on_reply = inferences.pop(request_id, None)
                    if on_reply is not None:
                        on_reply(not_served(request_id, message.code, message.reason), None)
            else:
                self._on_control(message)
        self._reader.recheck()

    def _on_control(self, message: Message) -> None:
        if isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, _ANSWERS):
            future = self._futures.pop(message.request_id, None)
            if future is not None and not future.done():
                future.set_result(message)
        elif isinstance(message, Refused):
            self._on_refused(message)

    def _on_welcome(self, message: Welcome) -> None:
        before = self._controller
        self._controller = message
        self._refusal = self.lost = ""
        self._greeted.set()
        if before is not None and before.incarnation != message.incarnation:
            self._infos.clear()
            self._fail_all(
                f"the controller at {self.address} was restarted; send the request again"
            )

    def _on_refused(self, message: Refused) -> None:
        if message.request_id < 0:
            if self._controller is None:
                self._refusal = message.reason
                self._greeted.set()
            else:  # it may be another one by now, which does not know us
                self._send(self._hello())
            return
        reason = f"the controller at {self.address} refuses: {message.reason}"
        on_reply = self._inferences.pop(message.request_id, None)
        if on_reply is not None:
            on_reply(not_served(message.request_id, message.code, reason), None)
        future = self._futures.pop(message.request_id, None)
        if future is not None and not future.done():
            future.set_exception(InvalidRequest(reason, code=message.code))
        if self._greeted.is_set():  # it may have forgotten us, after a restart or a long silence
            self._greeted.clear()
            self._send(self._hello())
