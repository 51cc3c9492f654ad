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
from contextlib import suppress
from types import TracebackType
from typing import Any

from slosched.clients.arguments import (
    check_fields,
    check_model,
    known_slo_ns,
    slo_fields,
    time_limit_s,
    user_number,
)
from slosched.clients.forks import generation
from slosched.clients.inference import Array, Inference, Model
from slosched.clients.questions import Questions
from slosched.clients.session import OnReply, not_served
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.config import CONTROLLER_PORT
from slosched.errors import (
    ConnectionLost,
    InvalidRequest,
    RequestFailed,
)
from slosched.messages import (
    CancelRequest,
    InferReply,
    InferRequest,
)
from slosched.transport.bundles import MAX_BUNDLED, RequestBundle
from slosched.transport.codec import Frame, encode
from slosched.units import NS_PER_S, format_duration

DEFAULT_ADDRESS = f"127.0.0.1:{CONTROLLER_PORT}"

_GRACE_S = 5.0  # beyond a request's SLO
#: The whole limit of a request whose SLO this client does not know: an older controller's default.
_UNKNOWN_SLO_LIMIT_S = 60.0
#: After a controller's restart: until it has said hello again, and until a model is loaded again.
_HELLO_AGAIN_S = 5.0
_GATHER_S = 0.002
_LOAD_AGAIN_S = 60.0


class AsyncClient(Questions):
    """A session with a controller. Made by `connect`; `close` (or `async with`) ends it.

    Not safe to share between threads or loops; in a fork of the process each call raises ConnectionLost.
    `lost` says in words that the controller has fallen silent, and is empty while it answers.
    `weight` is what its requests are worth beside others' of 1, within 0.01..100 and as far as the
    operator lets it say so; InvalidConfig for another.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, name: str = "", weight: float = 1.0
    ) -> None:
        super().__init__(address, name=name, weight=weight)
        self._later: list[InferRequest] = []  # submitted, not sent yet
        self._gathering: asyncio.TimerHandle | None = None  # they leave together, when it rings
        #: What took the place of handles of a controller that was restarted, by name and copy.
        self._renewed: dict[tuple[str, int], Model] = {}
        self._renewing = asyncio.Lock()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # ----------------------------------------------------------------------------- inference

    def submit(
        self,
        model_id: int,
        *,
        slo_factor: float = 0.0,
        slo_ns: int = 0,
        user_id: int = 0,
        frame: Frame | None = None,
        on_reply: OnReply,
        later: bool = False,
    ) -> int:
        """Send an inference and return its request id; the cheap form, without a future.

        With `later` it may wait for `flush`, which sends what has no input as one message.

        `frame` is the input's bytes in C order, of the shape and dtype of a model that this client
        has loaded. It may be sent without a copy: leave it unchanged until the answer. `on_reply`
        runs in the event loop, once, or never if the controller is lost. Raises ConnectionLost if
        nothing can be sent now, or the model's id is not known (any more): a restarted controller
        may give it to another model. Raises InvalidRequest for a value that cannot travel.
        """
        self._check_process()
        if self._closed:
            raise ConnectionLost("this client is closed", code=Code.CANCELLED)
        check_fields(model_id, slo_factor, slo_ns, user_id)
        info = self._infos.get(model_id)
        if info is None:
            raise ConnectionLost(
                f"model {model_id} is not loaded through this connection, was unloaded, or the controller "
                f"at {self.address} was restarted since; load it again",
                code=Code.CANCELLED,
            )
        request_id = self._next_id
        self._next_id = request_id + 1
        if later and frame is None:
            message = InferRequest(
                request_id=request_id,
                model_id=model_id,
                slo_ns=slo_ns,
                slo_factor=slo_factor,
                user_id=user_id,
            )
            self._later.append(message)
            self._inferences[request_id] = on_reply
            return request_id
        message = InferRequest(
            request_id=request_id,
            model_id=model_id,
            slo_ns=slo_ns,
            slo_factor=slo_factor,
            user_id=user_id,
            sent_ns=now_ns(),
            shape=() if frame is None else info.input_shape,
            dtype="" if frame is None else info.input_dtype,
        )
        sent = self._dealer.send([encode(message)] if frame is None else [encode(message), frame])
        if not sent:
            raise ConnectionLost(
                f"the controller at {self.address} takes no messages now: there is no connection, "
                "or too many of them wait to be sent",
                code=Code.CANCELLED,
            )
        self._inferences[request_id] = on_reply
        self._reader.recheck()
        return request_id

    def flush(self) -> list[int]:
        """Send what `submit` kept for later. Returns the ids of those that could not be sent.

        While the controller refuses requests at its door, a message leaves only every 2 ms, with all that came
        meanwhile: it takes a message's cost from what the controller could serve.
        """
        self._check_process()
        if not self._later:
            return []
        if self._crowded_until_ns and len(self._later) < MAX_BUNDLED:
            if now_ns() < self._crowded_until_ns:
                if self._gathering is None:
                    self._gathering = self._loop.call_later(_GATHER_S, self._gathered)
                return []
            self._crowded_until_ns = 0
        lost = self._send_later()
        for request_id in lost:
            self._inferences.pop(request_id, None)
        return lost

    def _gathered(self) -> None:
        self._gathering = None
        for request_id in self._send_later():
            on_reply = self._inferences.pop(request_id, None)
            if on_reply is not None:
                on_reply(not_served(request_id, Code.CANCELLED, "it could not be sent"), None)

    def _send_later(self) -> list[int]:
        later, self._later = self._later, []
        if self._closed:
            return [request.request_id for request in later]
        lost = []
        for first in range(0, len(later), MAX_BUNDLED):
            requests = later[first : first + MAX_BUNDLED]
            message = RequestBundle(tuple(requests), now_ns())
            if not self._dealer.send([encode(message)]):
                lost += [request.request_id for request in requests]
        self._reader.recheck()
        return lost

    def cancel(self, request_id: int) -> None:
        """Give up a request of `submit`: its answer, if there is one, is not heard any more."""
        if self._inferences.pop(request_id, None) is None:
            return
        waiting = len(self._later)
        self._later = [request for request in self._later if request.request_id != request_id]
        if len(self._later) == waiting:  # it was sent
            self._send(CancelRequest(request_id))

    async def infer(
        self,
        model: Model,
        array: Array | None = None,
        *,
        slo: float | str | None = None,
        slo_factor: float | None = None,
        timeout_s: float | None = None,
        user_id: int = 0,
    ) -> Inference:
        """Run one inference and return its answer.

        `array` has the model's `input_shape` and `input_dtype` exactly; without one the worker
        makes the input and no output returns. `slo` is the deadline after arrival at the
        controller, in seconds or as text ("25ms"); `slo_factor` gives it as a multiple of the
        model's b1; with neither the controller's default holds. Cancelling the awaiting task
        cancels the request; so does `timeout_s`, an own limit of the wait. Without one, the wait
        ends 5 s after the SLO, or after 60 s where the SLO is unknown.

        After a restart of the controller the model is loaded again first, once for all requests that
        need it (within `timeout_s`, else 60 s); the answer's `model` is the new handle. A request that was
        on its way when the controller went fails with ConnectionLost: it may have run already.

        Raises DeadlineExceeded when it was refused, given up or timed out (`.reply.remaining_s`
        then tells the time left until the deadline), InvalidRequest for an impossible SLO, shape or
        dtype, ConnectionLost when the controller went away, RequestFailed for anything else.
        """
        self._check_process()
        check_model(model)
        factor, slo_ns = slo_fields(slo, slo_factor)
        known_slo_ns(model, factor, slo_ns)  # raises before anything is sent
        user_id = user_number(user_id)
        timeout_s = None if timeout_s is None else time_limit_s(timeout_s)
        ends_s = self._loop.time() + timeout_s if timeout_s is not None else None

        def left_s() -> float | None:
            return None if ends_s is None else max(0.001, ends_s - self._loop.time())

        current = await self._current(model, left_s())
        try:
            return await self._infer(current, array, factor, slo_ns, left_s(), user_id)
        except InvalidRequest as error:
            # No model saw the request: a controller that was just started does not know this client.
            reply = error.reply
            if not isinstance(reply, Inference) or reply.message.model_id >= 0:
                raise
        with suppress(TimeoutError):
            async with asyncio.timeout(min(_HELLO_AGAIN_S, left_s() or _HELLO_AGAIN_S)):
                await self._greeted.wait()
        current = await self._current(model, left_s())
        return await self._infer(current, array, factor, slo_ns, left_s(), user_id)

    async def _infer(
        self,
        model: Model,
        array: Array | None,
        factor: float,
        slo_ns: int,
        timeout_s: float | None,
        user_id: int,
    ) -> Inference:
        known_ns = known_slo_ns(model, factor, slo_ns)
        frame = None
        if array is not None:
            model.check_input(array)
            frame = array.tobytes()  # a copy: the caller may use the array again at once
        self._infos.setdefault(model.model_id, model.info)
        sent_ns = now_ns()
        future: asyncio.Future[Any] = self._loop.create_future()

        def on_reply(message: InferReply, output: Frame | None) -> None:
            if not future.done():
                future.set_result((message, output))

        request_id = self.submit(
            model.model_id,
            slo_factor=factor,
            slo_ns=slo_ns,
            user_id=user_id,
            frame=frame,
            on_reply=on_reply,
        )
        self._futures[request_id] = future
        if not known_ns:
            self._until_silence[request_id] = None
            known_ns = self.controller.default_slo_ns
        try:
            reply, output = await self._answer(future, known_ns, timeout_s)
        finally:
            self._futures.pop(request_id, None)
            self._until_silence.pop(request_id, None)
            if not self._closed and self._generation == generation():
                self.cancel(request_id)  # of no effect once it was answered
        answer = Inference(
            model,
            model.read_output(output) if output is not None and reply.code == Code.OK else None,
            reply,
            now_ns() - sent_ns,
        )
        answer.raise_for_code()
        return answer

    async def _answer(
        self, future: asyncio.Future[Any], slo_ns: int, timeout_s: float | None
    ) -> tuple[InferReply, Frame | None]:
        """Wait for an inference's answer. `slo_ns` is 0 when only the controller knows it."""
        limit_s = slo_ns / NS_PER_S + _GRACE_S if slo_ns else _UNKNOWN_SLO_LIMIT_S
        own = timeout_s is not None and timeout_s < limit_s
        if timeout_s is not None:
            limit_s = min(limit_s, timeout_s)
        try:
            async with asyncio.timeout(limit_s):
                answer: tuple[InferReply, Frame | None] = await future
                return answer
        except TimeoutError:
            waited = format_duration(limit_s * NS_PER_S)
            if own:
                text = f"no answer within timeout_s, {waited}; the request was cancelled"
                raise RequestFailed(text, code=Code.CANCELLED) from None
            raise ConnectionLost(
                f"the controller at {self.address} did not answer within {waited}"
                f"{f', the SLO and {_GRACE_S:.0f} s' if slo_ns else ''}; it is gone or stands still",
                code=Code.CANCELLED,
            ) from None

    async def _current(self, model: Model, timeout_s: float | None) -> Model:
        """`model`, or the same copy of it loaded again if the controller was restarted since.

        Raises InvalidRequest for a model that this client unloaded, or never loaded.
        """
        if model.name in self._given_up:
            raise InvalidRequest(
                f"model {model.name!r} was unloaded through this client; load it again",
                code=Code.INVALID_REQUEST,
            )
        if model.incarnation == self.controller.incarnation:
            return model
        if model.incarnation not in self._loaded_through:
            raise InvalidRequest(
                f"model {model.name!r} was loaded through another client or controller; load it through "
                "this one",
                code=Code.INVALID_REQUEST,
            )
        key = (model.name, model.info.copy)
        async with self._renewing:
            renewed = self._renewed.get(key)
            if renewed is None or renewed.incarnation != self.controller.incarnation:
                limit_s = _LOAD_AGAIN_S if timeout_s is None else min(timeout_s, _LOAD_AGAIN_S)
                models = await self.load(model.name, model.info.copy + 1, timeout_s=limit_s)
                self._renewed |= {(model.name, each.info.copy): each for each in models}
                renewed = models[-1]
            return renewed


class connect:  # noqa: N801 - used as a function: `async with connect(...)`, `await connect(...)`
    """Connect to a controller: `async with connect(address) as client`, or `await connect(address)`.

    `address` is "host:port", `timeout_s` how long to try, `name` what `slosched status` shows.
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
    ) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._name, self._weight = name, weight
        self._client: AsyncClient | None = None

    async def open(self) -> AsyncClient:
        client = AsyncClient(self._address, name=self._name, weight=self._weight)
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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._client is not None:
            await self._client.close()
