"""The live shell of a client's brain (core/client): a socket, one timer, and the callers that wait.

What a client does and when is the brain's decision; here events come from the socket, the timer and the
callers, and effects become sends, answers and exceptions. The calls are in `questions.py` and, for
inferences, `aio.py`.
"""

from __future__ import annotations

import asyncio
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from slosched.clients.arguments import client_name, client_weight, time_limit_s
from slosched.clients.forks import forked_error, generation
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.core.client.brain import ClientBrain
from slosched.core.client.interface import (
    Cancel,
    Close,
    Effect,
    Event,
    Failed,
    Greeted,
    NotWelcome,
    Open,
    Overloaded,
    Replied,
    Restarted,
    SendFailed,
    Why,
)
from slosched.errors import (
    ConnectionLost,
    InvalidRequest,
    MalformedMessage,
    PeerUnreachable,
    ProtocolMismatch,
    RequestFailed,
)
from slosched.messages import InferReply, InferRequest, Message, Refused, Welcome
from slosched.transport.bundles import (
    MAX_BUNDLED,
    ForClients,
    NotTaken,
    ReplyBundle,
    RequestBundle,
    with_frames,
)
from slosched.transport.codec import Frame, decode_for_client
from slosched.transport.outbox import Outbox
from slosched.transport.sockets import AsyncReader, Dealer
from slosched.units import NS_PER_S, format_duration

#: Called with an inference's answer and its output frame, if it has one.
OnReply = Callable[[InferReply, Frame | None], None]
#: Called with a request's id and words when it will not be answered any more.
OnLost = Callable[[int, str], None]
#: Called with words when another controller process answers; the models are being loaded again.
OnRestart = Callable[[str], None]

_LINGER_MS = 500


class Waiter(Protocol):
    """Who waits for an answer: asyncio's Future, or what does as it does."""

    def done(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class Session:
    """The connection to one controller, in the running event loop.

    `malformed` counts bytes from it that were not a message. `on_lost` is called for each request of `submit`
    that ends without an answer.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        weight: float = 1.0,
        slo_from_send: bool = True,
        on_restart: OnRestart | None = None,
    ) -> None:
        name, weight = client_name(name), client_weight(weight)
        self._generation = generation()
        self.address = address
        self.malformed = 0
        self.on_lost: OnLost | None = None
        self._on_restart = on_restart
        self._loop = asyncio.get_running_loop()
        incarnation = secrets.randbits(62)
        self._brain = ClientBrain(
            address=address,
            incarnation=incarnation,
            name=name,
            weight=weight,
            full=MAX_BUNDLED,
            from_send=slo_from_send,
        )
        self._refusal = ""
        self._greeted = asyncio.Event()
        self._closed = False
        self._on_reply: dict[int, OnReply] = {}
        self._futures: dict[int, Waiter] = {}
        self._inputs: dict[int, Frame] = {}  # of unanswered requests
        self._outputs: dict[int, Frame] = {}  # of the answers that are being handed on
        #: Requests of `submit` that failed within the call that goes on, with words; None outside of one.
        self._failed_now: dict[int, str] | None = None
        # An identity of our own survives a reconnect, so answers still find us.
        self._dealer = Dealer(address, identity=b"c" + incarnation.to_bytes(8, "big"))
        self._stepping = False  # a step follows soon
        self._unsent = False  # a message of the effects that are being performed could not be sent
        self._outbox: Outbox[None, InferRequest] = Outbox(
            lambda peer, frames: self._dealer.send(frames),
            lambda requests, counts: RequestBundle(requests, now_ns(), counts),
            failed=self._send_failed,
            always=True,  # a bundle says when it was sent
        )
        self._reader = AsyncReader(self._dealer, self._on_readable)
        self._timer: asyncio.TimerHandle | None = None
        self._armed_ns = 0

    async def open(self, *, timeout_s: float = 5.0) -> None:
        """Say hello until the controller answers.

        Raises PeerUnreachable after `timeout_s`, ProtocolMismatch if it speaks another version.
        """
        self._check_process()
        timeout_s = time_limit_s(timeout_s)
        self._greeted.clear()
        self._do(Open())
        try:
            async with asyncio.timeout(timeout_s):
                await self._greeted.wait()
        except TimeoutError:
            raise PeerUnreachable(
                f"no controller answered at {self.address} within "
                f"{format_duration(timeout_s * NS_PER_S)}; start one with `slosched controller` "
                "or give the host:port where it listens for clients"
            ) from None
        if self._refusal:
            raise ProtocolMismatch(f"the controller at {self.address} refuses: {self._refusal}")

    async def close(self) -> None:
        """Say goodbye and end the session. Unanswered requests fail. Idempotent."""
        if self._closed:
            return
        if self._generation != generation():  # the session and its sockets are the parent's
            self._closed = True
            return
        self._do(Close())
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._reader.close()
        self._dealer.close_after(_LINGER_MS)

    @property
    def controller(self) -> Welcome:
        """What the controller said of itself: its version, policy and incarnation."""
        if self._brain.controller is None:
            raise PeerUnreachable(f"not connected to {self.address} yet; await open() first")
        return self._brain.controller

    @property
    def unanswered(self) -> int:
        """Inferences on their way."""
        return len(self._brain.requests)

    @property
    def lost(self) -> str:
        """Says in words that the controller has fallen silent; empty while it answers."""
        return self._brain.lost

    @property
    def restarts(self) -> int:
        """How often another controller process has answered here."""
        return self._brain.restarts

    @property
    def lost_requests(self) -> int:
        """Requests that were in flight when their controller was restarted: each has failed by name."""
        return self._brain.lost_requests

    def _check_process(self) -> None:
        """Raise ConnectionLost in a fork of the process that made this client."""
        if self._generation != generation():
            raise forked_error()

    def _check_open(self) -> None:
        """Raise ConnectionLost if nothing can be asked for (any more)."""
        self._check_process()
        if self._closed:
            raise ConnectionLost("this client is closed", code=Code.CANCELLED)

    # -------------------------------------------------------------------------- the brain's

    def _do(self, event: Event) -> int | None:
        """One event and all that follows from it."""
        now = now_ns()
        number = self._brain.handle(event, now_ns=now)
        self._step(now)
        return number

    def _step(self, now: int) -> None:
        """Have the brain decide, and perform its effects."""
        brain = self._brain
        effects = brain.schedule(now_ns=now)
        while effects and self._perform(effects):
            effects = brain.schedule(now_ns=now_ns())
        self._reader.recheck()
        wake_ns = brain.next_wakeup_ns()
        if wake_ns is not None and (self._timer is None or wake_ns < self._armed_ns):
            if self._timer is not None:
                self._timer.cancel()
            self._armed_ns = wake_ns
            self._timer = self._loop.call_later(max(0, wake_ns - now) / NS_PER_S, self._ring)

    def _step_soon(self) -> None:
        """Take a step when the tasks that are ready have said what they want: it shares a message."""
        if not self._stepping:
            self._stepping = True
            self._loop.call_soon(self._step_for_all)

    def _step_for_all(self) -> None:
        self._stepping = False
        if not self._closed and self._generation == generation():
            self._step(now_ns())

    def _ring(self) -> None:
        self._timer = None
        if not self._closed and self._generation == generation():
            self._step(now_ns())

    def _perform(self, effects: list[Effect]) -> bool:
        """Do what the brain decided. True if a message could not be sent: the brain has more to say."""
        outbox, self._unsent = self._outbox, False
        for effect in effects:
            kind = type(effect)
            if kind is InferReply:
                self._answer(effect)  # type: ignore[arg-type]
            elif kind is InferRequest:
                self._send_request(effect)  # type: ignore[arg-type]
            elif isinstance(effect, Message):
                outbox.send(None, effect, [])
            else:
                self._seldom(effect)
        outbox.flush()
        return self._unsent

    def _send_request(self, request: InferRequest) -> None:
        frame = self._inputs.get(request.request_id) if self._inputs else None
        frames = [] if frame is None else [frame]
        if request.sent_ns:
            self._outbox.send(None, request, frames)
        else:
            self._outbox.put(None, request, frames)

    def _send_failed(self, peer: None, message: Any) -> None:
        self._unsent = True
        self._brain.handle(SendFailed(message), now_ns=now_ns())

    def _answer(self, reply: InferReply) -> None:
        request_id = reply.request_id
        on_reply = self._on_reply.pop(request_id, None)
        if self._inputs:
            self._inputs.pop(request_id, None)
        if on_reply is not None:
            on_reply(reply, self._outputs.get(request_id))

    def _seldom(self, effect: Effect) -> None:
        if isinstance(effect, Failed):
            self._fail(effect)
        elif isinstance(effect, Replied):
            future = self._futures.pop(effect.request_id, None)
            if future is not None and not future.done():
                future.set_result(effect)
        elif isinstance(effect, Greeted):
            self._refusal = ""
            self._greeted.set()
        elif isinstance(effect, NotWelcome):
            self._refusal = effect.reason
            self._greeted.set()
        elif isinstance(effect, Restarted):
            self._restarted(effect)

    def _fail(self, failed: Failed) -> None:
        request_id = failed.request_id
        submitted = self._on_reply.pop(request_id, None) is not None
        self._inputs.pop(request_id, None)
        future = self._futures.pop(request_id, None)
        if future is not None:
            if not future.done():
                future.set_exception(_error(failed))
        elif self._failed_now is not None:
            self._failed_now[request_id] = failed.reason
        elif submitted and self.on_lost is not None:
            self.on_lost(request_id, failed.reason)

    def _restarted(self, effect: Restarted) -> None:
        text = f"the controller at {self.address} was restarted"
        if effect.models:
            text += ": the models of this client are loaded again"
        if effect.lost:
            text += f", and {effect.lost} requests that were in flight are lost"
        if self._on_restart is not None:
            tell = self._on_restart
        elif effect.models or effect.lost:
            tell = _warn
        else:
            return  # it costs this client nothing
        # Not now: an error in it must not cost the other effects.
        self._loop.call_soon(tell, text)

    def _cancel(self, *request_ids: int) -> None:
        """Their callers give requests or questions up, which may have ended."""
        for request_id in request_ids:
            self._on_reply.pop(request_id, None)
            self._inputs.pop(request_id, None)
            self._futures.pop(request_id, None)
        if not self._closed and self._generation == generation():
            now = now_ns()
            for request_id in request_ids:
                self._brain.handle(Cancel(request_id), now_ns=now)
            self._step(now)

    # ----------------------------------------------------------------------------- receiving

    def _on_readable(self) -> None:
        now, handle = now_ns(), self._brain.handle
        outputs = self._outputs
        for frames in self._dealer.receive():
            try:
                messages = _with_outputs(frames)
            except (MalformedMessage, IndexError):
                self.malformed += 1
                continue
            for message, output in messages:
                if type(message) is NotTaken:
                    self._not_taken(message, now)
                    continue
                if output and type(message) is InferReply:
                    outputs.setdefault(message.request_id, output[0])
                handle(message, now_ns=now)  # type: ignore[arg-type]
        self._step(now)
        outputs.clear()

    def _not_taken(self, message: NotTaken, now: int) -> None:
        ids, code, reason = message.request_ids, message.code, message.reason
        if code == Code.CONTROLLER_OVERLOADED:
            self._brain.handle(Overloaded(ids, code, reason), now_ns=now)
            return
        for request_id in ids:
            self._brain.handle(Refused(request_id, code, reason), now_ns=now)


def _with_outputs(frames: list[Frame]) -> Sequence[tuple[ForClients, Sequence[Frame]]]:
    """The messages of the controller's frames, each with its own. Raises MalformedMessage."""
    message = decode_for_client(frames[0])
    if type(message) is ReplyBundle:
        return with_frames(message.replies, message.frames, frames[1:])
    return [(message, frames[1:])]


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _error(failed: Failed) -> Exception:
    """What a caller gets for a request or question that ends without an answer."""
    if failed.why is Why.LOST:
        return ConnectionLost(failed.reason, code=failed.code)
    if failed.why is Why.UNANSWERED:
        return PeerUnreachable(failed.reason)
    if failed.why is Why.LIMIT:
        return RequestFailed(failed.reason, code=failed.code)
    code = Code.INVALID_REQUEST if failed.why is Why.WITHDRAWN else failed.code
    return InvalidRequest(failed.reason, code=code)
