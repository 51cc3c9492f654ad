"""The asynchronous client: one connection to a controller, in the running event loop.

    async with connect("127.0.0.1:12346") as client:
        [model] = await client.load("resnet50_v2")
        answer = await client.infer(model, array, slo="25ms")

It works on asyncio and on uvloop, and belongs to the loop it was made in. Every wait has an end:
a request fails with ConnectionLost when the controller has not answered 5 s after its SLO. One
without an SLO has the controller's default (60 s in all, if the controller does not tell it), and
also fails when the controller has been silent for 5 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Protocol, overload

from slosched.clients.arguments import (
    check_fields,
    check_model,
    known_slo_ns,
    slo_fields,
    user_number,
)
from slosched.clients.calls import CallAnswer, Caller, Prepared, prepared
from slosched.clients.forks import generation
from slosched.clients.inference import Inference, Model
from slosched.clients.questions import Questions, limit_ns
from slosched.clients.session import OnReply, OnRestart, Waiter
from slosched.clients.tensors import Inputs, pack, unpack
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import CONTROLLER_PORT
from slosched.core.client.interface import Infer
from slosched.errors import ConnectionLost, InvalidRequest
from slosched.functions.function import Function, R
from slosched.messages import InferReply
from slosched.transport.codec import Frame

DEFAULT_ADDRESS = f"127.0.0.1:{CONTROLLER_PORT}"


class CallStart(Waiter, Protocol):
    """Hears the end of a call that has no task."""

    def replied(self, reply: InferReply, frame: Frame | None) -> None: ...


class AsyncClient(Questions):
    """A session with a controller. Made by `connect`; `close` (or `async with`) ends it.

    Not safe to share between threads or loops; in a fork of the process each call raises ConnectionLost.
    `lost` says in words that the controller has fallen silent, and is empty while it answers.
    `weight` is what its requests are worth beside others' of 1, within 0.01..100 and as far as the
    operator lets it say so; InvalidConfig for another.
    """

    _caller: Caller | None = None

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    # ----------------------------------------------------------------------------- inference

    def submit(
        self,
        model: Model,
        *,
        slo_factor: float = 0.0,
        slo_ns: int = 0,
        user_id: int = 0,
        frame: Frame | None = None,
        length: int = 0,
        on_reply: OnReply,
        later: bool = False,
    ) -> int:
        """Send an inference and return its request id; the cheap form, without a future.

        With `later` it waits for `flush`, which sends what has no large input as one message.

        `frame` has the inputs' bytes as signature.py lays them out, for a request of `length` where a
        dimension varies; that of a single input is its bytes in C order. It may be sent without a copy: leave
        it unchanged until the answer. `on_reply` runs in the event loop, once, or never if the controller is
        lost: then `on_lost` is called with its id, if it is set. Raises ConnectionLost if nothing can be sent
        now, the model was unloaded, or is not loaded again yet after a restart of the controller;
        InvalidRequest for a value that cannot travel.
        """
        if self._closed or self._generation != generation():
            self._check_open()
        check_model(model)
        check_fields(slo_factor, slo_ns, user_id)
        held, now = model.held, now_ns()
        event = Infer(held, slo_ns, slo_factor, user_id, frame is not None, length, later)
        request_id = self._brain.handle(event, now_ns=now)
        if not request_id:
            raise ConnectionLost(self._brain.unready(held), code=Code.CANCELLED)
        self._on_reply[request_id] = on_reply
        if frame is not None:
            self._inputs[request_id] = frame
        if later:
            return request_id
        failed = self._step_now(now)
        if request_id in failed:
            raise ConnectionLost(failed[request_id], code=Code.CANCELLED)
        return request_id

    def flush(self) -> list[int]:
        """Send what `submit` kept for later. Returns the ids of those that could not be sent.

        While the controller refuses requests at its door, the brain lets a message leave only every 2 ms, with
        all that came meanwhile.
        """
        self._check_process()
        if not self._brain.requests.gathered:
            return []
        return list(self._step_now(now_ns()))

    def _step_now(self, now: int) -> dict[int, str]:
        """One step; returns the requests of `submit` that failed in it, with words."""
        failed = self._failed_now = {}
        try:
            self._step(now)
        finally:
            self._failed_now = None
        return failed

    def cancel(self, *request_ids: int) -> None:
        """Give up requests of `submit`: their answers, if there are some, are not heard any more.

        One that waits for `flush` is never sent.
        """
        self._check_process()
        given_up = [each for each in request_ids if each in self._on_reply]
        if given_up:
            self._cancel(*given_up)

    async def infer(
        self,
        model: Model,
        inputs: Inputs | None = None,
        *,
        slo: float | str | None = None,
        slo_factor: float | None = None,
        timeout_s: float | None = None,
        user_id: int = 0,
    ) -> Inference:
        """Run one inference and return its answer.

        `inputs` maps each input's name to an array of its dtype and shape exactly (for BYTES: a text, bytes,
        or a list or array of them); a single input may be given itself. A dimension of -1 is the request's
        length, the same for all. Without inputs the worker makes them, and no output returns. `slo` is the
        time from this call's send to the receipt of its answer, in seconds or as text ("25ms"); `slo_factor`
        gives it as a multiple of the model's b1; with neither the controller's default holds. Cancelling the
        awaiting task cancels the request; so does `timeout_s`, an own limit of the wait. Without one, the
        wait ends 5 s after the SLO, or after 60 s where the SLO is unknown.

        While the client loads the model again, after a restart of the controller, the request waits (within
        `timeout_s`, else 60 s). One that was in flight when the controller went fails with ConnectionLost: it
        may have run already.

        Raises DeadlineExceeded when it was refused, given up or timed out (`.reply.remaining_s`
        then tells the time left until the deadline), InvalidRequest for an impossible SLO, shape or
        dtype, ConnectionLost when the controller went away, RequestFailed for anything else.
        """
        self._check_open()
        check_model(model)
        factor, slo_ns = slo_fields(slo, slo_factor)
        known_slo_ns(model, factor, slo_ns)  # raises before anything is sent
        user_id = user_number(user_id)
        if not self._brain.held.has(model.held):
            raise InvalidRequest(
                f"model {model.name!r} was loaded through another client or controller; load it through "
                "this one",
                code=Code.INVALID_REQUEST,
            )
        info = model.info
        packed = None if inputs is None else pack(info, inputs)
        length = 0 if packed is None else packed.length
        sent_ns = now_ns()
        event = Infer(
            model=model.held,
            slo_ns=slo_ns,
            slo_factor=factor,
            user_id=user_id,
            has_input=packed is not None,
            length=length,
            bundled=True,
            bounded=True,
            waits=True,
            within_ns=0 if timeout_s is None else limit_ns(timeout_s),
        )
        frame = None if packed is None else packed.frame
        reply, output = await self._answer_to(event, frame, sent_ns)
        served = output is not None and reply.code == Code.OK
        outputs = unpack(info, output, length) if served and output is not None else {}
        answer = Inference(model, outputs, reply, now_ns() - sent_ns)
        answer.raise_for_code()
        return answer

    # --------------------------------------------------------------------------------- calls

    @overload
    async def call(self, function: Function[R], /, *args: Any, **options: Any) -> R: ...
    @overload
    async def call(self, function: str, /, *args: Any, **options: Any) -> Any: ...
    async def call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: float | str | None = None,
        near: str = "",
        timeout_s: float | None = None,
        user_id: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Call a function of the workers with these arguments, and return its result; its arrays are read-only.

        `function` is the decorated function, or its name; with the name alone the call has the size class 0,
        and its arguments are checked by the worker. `slo`, `timeout_s`, `user_id` and cancelling are those of
        `infer`; without `slo` the function's own holds, else the controller's. The call should run where the
        last one `near` the same text did. The first call of a function asks the controller for it.

        Raises TypeError for arguments that the function does not take or that cannot travel, PayloadTooLarge;
        CallFailed when it did not return: its `code` is 104 if it raised, and its `reason` the traceback;
        CallRefused, a DeadlineExceeded, if it could not be in time; InvalidRequest for a name that no worker
        offers; ConnectionLost when the controller went away. `.reply` of CallFailed is the CallAnswer.
        """
        options: dict[str, Any] = {"slo": slo, "near": near}
        options |= {"timeout_s": timeout_s, "user_id": user_id}
        answer = await self.answer_of(prepared(function, args, kwargs, **options))
        answer.raise_for_code()
        return answer.value

    async def call_answer(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: float | str | None = None,
        near: str = "",
        timeout_s: float | None = None,
        user_id: int = 0,
        **kwargs: Any,
    ) -> CallAnswer:
        """Call a function, as `call`, and return all that is answered, also if it failed or was refused."""
        options: dict[str, Any] = {"slo": slo, "near": near}
        options |= {"timeout_s": timeout_s, "user_id": user_id}
        return await self.answer_of(prepared(function, args, kwargs, **options))

    async def answer_of(self, call: Prepared, *, patient: bool = False) -> CallAnswer:
        """Make a call that was checked, and may have been prepared in another thread (clients/calls.py)."""
        self._check_open()
        if self._caller is None:
            self._caller = Caller(self.load, self._answer_to)
        return await self._caller.answer(call, patient=patient)

    def begin_call(self, call: Prepared, start: CallStart, sent_ns: int) -> int:
        """Send a call without a task, and return its request id; 0: its function is not known yet.

        `start` hears its end; `value_of` and `end_start` are for it.
        """
        self._check_open()
        event = None if self._caller is None else self._caller.event_of(call)
        if event is None:
            return 0
        request_id = self._brain.handle(event, now_ns=sent_ns)
        assert request_id  # one that waits is always taken
        self._inputs[request_id] = call.frame
        self._on_reply[request_id] = start.replied
        self._futures[request_id] = start
        self._step_soon()
        return request_id

    def end_start(self, request_id: int) -> None:
        """The call of `begin_call` was answered."""
        self._futures.pop(request_id, None)

    def value_of(self, call: Prepared, reply: InferReply, frame: Frame | None, sent_ns: int) -> Any:
        """The value of an answered call. Raises what its code stands for."""
        assert self._caller is not None
        return self._caller.value_of(call, reply, frame, sent_ns)

    async def _answer_to(
        self, event: Infer, frame: Frame | None, sent_ns: int
    ) -> tuple[InferReply, Frame | None]:
        """Have a request sent that waits, and wait for its answer."""
        request_id = self._brain.handle(event, now_ns=sent_ns)
        assert request_id  # one that waits is always taken
        if frame is not None:
            self._inputs[request_id] = frame
        future: asyncio.Future[tuple[InferReply, Frame | None]] = self._loop.create_future()

        def on_reply(message: InferReply, output: Frame | None) -> None:
            if not future.done():
                future.set_result((message, output))

        self._on_reply[request_id] = on_reply
        self._futures[request_id] = future
        try:
            self._step_soon()
            return await future
        finally:
            self._futures.pop(request_id, None)
            if request_id in self._on_reply:
                self._cancel(request_id)


class connect:  # noqa: N801 - used as a function: `async with connect(...)`, `await connect(...)`
    """Connect to a controller: `async with connect(address) as client`, or `await connect(address)`.

    `address` is "host:port", `timeout_s` how long to try, `name` what `slosched status` shows. SLOs count from
    the client's send, or without `slo_from_send` from arrival at the controller. `on_restart` is called with
    words when another controller process answers (without one, a RuntimeWarning says so).
    Raises InvalidConfig for an address that is malformed, PeerUnreachable when no controller answers,
    ProtocolMismatch when it speaks another version of the protocol.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        name: str = "",
        weight: float = 1.0,
        slo_from_send: bool = True,
        on_restart: OnRestart | None = None,
    ) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._name, self._weight = name, weight
        self._slo_from_send, self._on_restart = slo_from_send, on_restart
        self._client: AsyncClient | None = None

    async def open(self) -> AsyncClient:
        client = AsyncClient(
            self._address,
            name=self._name,
            weight=self._weight,
            slo_from_send=self._slo_from_send,
            on_restart=self._on_restart,
        )
        try:
            await client.open(timeout_s=self._timeout_s)
        except BaseException:
            await client.close()
            raise
        return client

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self.open().__await__()

    async def __aenter__(self) -> AsyncClient:
        self._client = await self.open()
        return self._client

    async def __aexit__(self, *error: object) -> None:
        if self._client is not None:
            await self._client.close()
