"""Clients that call functions, against a controller that runs them inline behind real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any

import msgspec
import numpy as np
import pytest

import sample_functions as samples
from fake_controller import FakeController, model_info
from slosched.clients.aio import connect
from slosched.clients.blocking import Client
from slosched.clients.calls import CallAnswer, prepared
from slosched.clock import sleep_ns
from slosched.codes import Code
from slosched.engines.local import LocalEngine
from slosched.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidRequest,
    RequestFailed,
)
from slosched.functions.body import Ended
from slosched.functions.errors import CallFailed, FunctionError, PayloadTooLarge
from slosched.functions.function import function
from slosched.functions.payload import decode, encode_result, joined
from slosched.messages import (
    CancelRequest,
    InferReply,
    InferRequest,
    LoadModelReply,
    LoadModelRequest,
)
from slosched.transport.codec import Frame, encode


class FunctionController(FakeController):
    """Knows sample_functions, and runs each call at once."""

    def __init__(self) -> None:
        self.engine = LocalEngine(["sample_functions"])
        self.names = [*self.engine.functions]
        self.result: bytes | None = None  # in the place of what calls return
        self.refusals = 0  # of the next calls, unread
        super().__init__()

    def __enter__(self) -> FunctionController:
        return self

    def _load(self, peer: bytes, message: LoadModelRequest) -> None:
        if message.name not in self.names:
            super()._load(peer, message)
            return
        number = self.names.index(message.name)
        info = msgspec.structs.replace(
            model_info(number, shape=(), dtype=""),
            name=message.name,
            output_shape=(),
            output_dtype="",
            function=self.engine.functions[message.name].info,
        )
        self._send(peer, LoadModelReply(message.request_id, 0, "", (info,)))

    def _infer(self, peer: bytes, message: InferRequest, frames: list[Frame]) -> None:
        if self.hold:
            return
        end = Ended(self.code, self.reason)
        if self.refusals:
            self.refusals -= 1
            end = Ended(Code.CONTROLLER_OVERLOADED, "too fast")
        elif not self.code:
            args, kwargs = decode(frames[0])
            try:
                value = self.engine.call(self.names[message.model_id], *args, **kwargs).result()
                end = Ended(0, "", tuple(encode_result(value)))
            except CallFailed as error:
                end = Ended(error.code, error.reason)
        reply = InferReply(
            message.request_id,
            end.code,
            end.reason,
            message.model_id,
            message.slo_ns,
            2_000_000,
            end.code == 0,
            batch_size=1,
            worker_id=3,
            gpu_id=0,
            predicted_exec_ns=1_000_000,
            start_ns=400_000,
            exec_ns=1_100_000,
            attempts=1,
        )
        result = joined(end.result) if self.result is None else self.result
        self._send_frames(peer, [encode(reply), *([result] if end.code == 0 else [])])

    def request(self) -> InferRequest:
        found = self.of(InferRequest)[-1]
        assert isinstance(found, InferRequest)
        return found


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_a_call_returns_its_value_and_the_details_if_they_are_wanted() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                assert await client.call(samples.fibonacci, 12, slo="25ms") == 144
                request = controller.request()
                assert request.slo_ns == 25_000_000 and request.length == 1 and not request.near
                assert await client.call("fibonacci", n=10, near="me", user_id=4) == 55
                request = controller.request()
                assert request.near == "me" and request.user_id == 4 and request.length == 0
                assert request.slo_ns == 2 * 10**9  # the function's own
                await client.call("noop")
                assert controller.request().slo_ns == 0  # the controller's
                array = await client.call(samples.echo, np.arange(3.0), key=(1, "a"))
                assert array["kwargs"] == {"key": (1, "a")}
                assert array["args"][0].tolist() == [0, 1, 2]
                answer = await client.call_answer(samples.fibonacci, 5)
                assert answer.value == 5 and answer.ok and answer.function == "fibonacci"
                assert answer.explain() == (
                    "ok after 2ms of 2s; 2s left until the deadline; started at 400us; ran 1.1ms "
                    "(predicted 1ms); on worker 3, warm"
                )
            assert len(controller.of(LoadModelRequest)) == 3  # each function is asked for once

    run(work())


def test_a_call_that_fails_raises_with_the_traceback() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                with pytest.raises(CallFailed, match="ValueError: so it goes") as failed:
                    await client.call(samples.parent_of_boom, "so it goes")
                assert failed.value.code == Code.CALL_RAISED and "in boom" in failed.value.reason
                answer = failed.value.reply
                assert isinstance(answer, CallAnswer) and answer.value is None
                same = await client.call_answer(samples.parent_of_boom, "so it goes")
                assert same.code == Code.CALL_RAISED and same.value is None
                for code, kind in (
                    (Code.COULD_NOT_START_IN_TIME, DeadlineExceeded),
                    (Code.TIMED_OUT, DeadlineExceeded),
                    (Code.INVALID_REQUEST, InvalidRequest),
                    (Code.TOO_MANY_CALLS, CallFailed),
                    (Code.CALL_OVER_LIMIT, CallFailed),
                ):
                    controller.code, controller.reason = code, "the reason"
                    with pytest.raises(kind, match="the reason"):
                        await client.call(samples.noop)

    run(work())


def test_wrong_calls_are_refused_before_anything_is_sent() -> None:
    @function(max_payload=100, size=lambda data: 99)
    def small(ctx: Any, data: bytes) -> None: ...

    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                for error, args, options in (
                    (TypeError, (samples.fibonacci,), {}),
                    (TypeError, (samples.fibonacci, 1, 2), {}),
                    (TypeError, ("echo", {1}), {}),
                    (TypeError, ("echo", 3j), {}),
                    (ValueError, (small, b""), {}),
                    (PayloadTooLarge, (dataclasses.replace(small, size=None), b"x" * 100), {}),
                    (PayloadTooLarge, ("echo", np.broadcast_to(np.zeros(1), (2**27,))), {}),
                    (FunctionError, ("a b",), {}),
                    (FunctionError, (3,), {}),
                    (InvalidRequest, ("noop",), {"slo": -1}),
                    (InvalidRequest, ("noop",), {"slo": "soon"}),
                    (InvalidRequest, ("noop",), {"timeout_s": -1}),
                    (InvalidRequest, ("noop",), {"user_id": "x"}),
                    (InvalidRequest, ("noop",), {"near": "x" * 257}),
                    (InvalidRequest, ("noop",), {"near": 3}),
                ):
                    with pytest.raises(error):
                        await client.call(*args, **options)
                assert not controller.of(InferRequest) and not controller.of(LoadModelRequest)
                with pytest.raises(InvalidRequest, match="'toy' is a model and not a function"):
                    await client.call("toy")
                with pytest.raises(InvalidRequest, match="unknown"):
                    await client.call("unknown")
                assert await client.call("noop") is None

    run(work())


def test_a_result_that_cannot_be_read_is_an_error() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                controller.result = b"garbage"
                with pytest.raises(RequestFailed, match="the result of 'noop' cannot be read"):
                    await client.call("noop")
                controller.result = b""
                assert await client.call("noop") is None

    run(work())


def test_a_call_that_is_given_up_is_cancelled() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                await client.call("noop")
                controller.hold = True
                with pytest.raises(RequestFailed, match="no answer within timeout_s"):
                    await client.call("noop", timeout_s=0.05)
                task = asyncio.create_task(client.call("noop"))
                while len(controller.of(InferRequest)) < 3:
                    await asyncio.sleep(0.005)
                task.cancel()
                while len(controller.of(CancelRequest)) < 2:
                    await asyncio.sleep(0.005)
            with pytest.raises(ConnectionLost, match="closed"):
                await client.call("noop")

    run(work())


def test_the_blocking_client_calls_too() -> None:
    with FunctionController() as controller, Client(controller.address) as client:
        assert client.call(samples.fibonacci, 10, slo=1, near="x") == 55
        assert client.call_answer("fibonacci", 10).value == 55
        futures = [client.start_call("fibonacci", n) for n in range(10)]
        assert [each.result(30) for each in futures] == [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]
        with pytest.raises(CallFailed, match="oh no"):
            client.start_call("boom", "oh no").result(30)
        controller.hold = True
        before = len(controller.of(InferRequest))
        future = client.start_call("noop")
        while len(controller.of(InferRequest)) == before:
            sleep_ns(5_000_000)
        assert future.cancel()
        controller.wait_for(CancelRequest)


def test_a_function_that_was_unloaded_is_asked_for_again() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                await client.call("noop")
                await client.unload("noop")
                assert await client.call("noop") is None
            assert len(controller.of(LoadModelRequest)) == 2

    run(work())


def test_a_patient_call_is_sent_again_while_the_controller_refuses_it_unread() -> None:
    with FunctionController() as controller, Client(controller.address) as client:
        options: dict[str, Any] = {"near": "", "timeout_s": None, "user_id": 0}
        call = prepared(samples.fibonacci, (10,), {}, slo="20s", **options)
        controller.refusals = 3
        assert client.start_prepared(call, patient=True).result(30) == 55
        assert len(controller.of(InferRequest)) == 4
        controller.refusals = 1
        with pytest.raises(CallFailed, match="too fast"):
            client.start_prepared(call).result(30)
        controller.refusals = 10**6
        call = prepared(samples.fibonacci, (10,), {}, slo="50ms", **options)
        with pytest.raises(CallFailed, match="too fast"):
            client.start_prepared(call, patient=True).result(30)


def test_many_first_calls_ask_once_for_their_function() -> None:
    async def work() -> None:
        with FunctionController() as controller:
            async with connect(controller.address) as client:
                calls = [client.call(samples.fibonacci, n) for n in range(12)]
                cancelled = asyncio.create_task(client.call("fibonacci", 1))
                await asyncio.sleep(0)
                cancelled.cancel()
                assert sum(await asyncio.gather(*calls)) == 232
                assert len(controller.of(LoadModelRequest)) == 1
                for _ in range(2):  # a failure is not kept
                    with pytest.raises(InvalidRequest):
                        await client.call("unknown")
                assert len(controller.of(LoadModelRequest)) == 3
                named = await client.call("echo", function=1, self=2, args=3)
                assert named["kwargs"] == {"function": 1, "self": 2, "args": 3}

    run(work())


def test_the_callers_limit_holds_while_the_function_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FunctionController, "_load", lambda *args: None)
    with (
        FunctionController() as controller,
        Client(controller.address) as client,
        pytest.raises(RequestFailed, match="'noop' is still being loaded"),
    ):
        client.call("noop", slo="60s", timeout_s=0.2)
