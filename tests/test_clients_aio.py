"""The asynchronous client against a fake controller over real sockets."""

from __future__ import annotations

import asyncio
import gc
import math
import warnings
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import uvloop

from fake_controller import FakeController
from slosched.clients.aio import connect
from slosched.clients.inference import Inference, Unloaded
from slosched.codes import Code
from slosched.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InvalidConfig,
    InvalidRequest,
    PeerUnreachable,
    ProtocolMismatch,
    RequestFailed,
)
from slosched.messages import (
    CancelRequest,
    ClientHello,
    Goodbye,
    InferRequest,
    LoadModelRequest,
    UnloadModelRequest,
)

Array = np.ndarray[Any, Any]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def array() -> Array:
    return np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.parametrize("loop_kind", ["asyncio", "uvloop"])
def test_load_and_infer_on_both_event_loops(loop_kind: str) -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address, name="tester") as client:
                assert client.controller.policy == "FAKE"
                models = await client.load("toy", copies=2)
                assert [m.model_id for m in models] == [0, 1]
                answer = await client.infer(models[1], array(), slo="25ms")
                assert answer.ok and answer.deadline_met and not answer.cold
                assert answer.output is not None
                assert answer.output.tolist() == [0.0, 2.0]
                assert answer.output.flags.writeable
                assert answer.slo_ns == 25_000_000
                assert answer.remaining_ns == 22_000_000 and answer.remaining_s == 0.022
                assert answer.predicted_exec_ns == answer.exec_ns == 2_600_000
                assert answer.start_ns == 400_000 and answer.predicted_start_ns == 300_000
                assert answer.gpu == "worker 0 GPU 0" and answer.batch_size == 1
                assert answer.round_trip_ns > 0
                assert "ran 2.6ms (predicted 2.6ms)" in answer.explain()
                assert "22ms left until the deadline" in answer.explain()
            request = controller.of(InferRequest)[0]
            assert isinstance(request, InferRequest)
            assert (request.model_id, request.shape, request.dtype) == (1, (3, 4), "float32")
            hello = controller.of(ClientHello)[0]
            assert isinstance(hello, ClientHello) and hello.name == "tester"
            controller.wait_for(Goodbye)

    if loop_kind == "uvloop":
        uvloop.run(work())
    else:
        run(work())


def test_models_and_status() -> None:
    async def work() -> None:
        with FakeController() as controller:
            client = await connect(controller.address)
            loaded, loadable = await client.models()
            assert [info.name for info in loaded] == ["toy"]
            assert loadable == ("toy", "other")
            assert (await client.status())["policy"] == "FAKE"
            await client.close()
            await client.close()

    run(work())


@pytest.mark.parametrize(
    ("slo", "slo_factor", "expected"),
    [
        (0.025, None, (0.0, 25_000_000)),
        ("2.9ms", None, (0.0, 2_900_000)),
        ("2", None, (0.0, 2_000_000_000)),
        (1, None, (0.0, 1_000_000_000)),
        (np.float32(0.5), None, (0.0, 500_000_000)),
        (None, 1.5, (1.5, 0)),
        (None, None, (0.0, 0)),
    ],
)
def test_the_slo_on_the_wire(
    slo: float | str | None, slo_factor: float | None, expected: tuple[float, int]
) -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                answer = await client.infer(model, slo=slo, slo_factor=slo_factor)
                assert answer.output is None
            request = controller.of(InferRequest)[0]
            assert isinstance(request, InferRequest)
            assert (request.slo_factor, request.slo_ns) == expected
            assert (request.shape, request.dtype) == ((), "")

    run(work())


@pytest.mark.parametrize(
    ("slo", "slo_factor", "words"),
    [
        (math.nan, None, "finite"),
        (-0.1, None, "> 0"),
        (0, None, "> 0"),
        (math.inf, None, "finite"),
        (1e30, None, "146 years"),
        (1e-12, None, "at least 1 ns"),
        ("fast", None, "not a duration"),
        ("-5ms", None, "negative"),
        (True, None, "must be a number"),
        (None, math.nan, "slo_factor"),
        (None, -1.0, "slo_factor"),
        (None, 0.0, "slo_factor"),
        (1.0, 1.0, "not both"),
    ],
)
def test_an_impossible_slo_is_refused_here(
    slo: float | str | None, slo_factor: float | None, words: str
) -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(InvalidRequest) as caught:
                    await client.infer(model, array(), slo=slo, slo_factor=slo_factor)
                assert words in str(caught.value) and caught.value.code == 6
            assert not controller.of(InferRequest)

    run(work())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.zeros((4, 3), np.float32), ["(3, 4)", "(4, 3)"]),
        (np.zeros((1, 3, 4), np.float32), ["(3, 4)", "(1, 3, 4)", "array[0]"]),
        (np.zeros((3, 4), np.float64), ["float32", "float64", "astype('float32')"]),
        (np.zeros((3, 4), np.uint8), ["float32", "uint8"]),
        (np.zeros((3, 4), ">f4"), ["float32", ">f4"]),
        ([[0.0] * 4] * 3, ["numpy array", "list"]),
    ],
)
def test_a_wrong_input_is_refused_here(bad: Any, words: list[str]) -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(InvalidRequest) as caught:
                    await client.infer(model, bad, slo=1)
                for word in words:
                    assert word in str(caught.value)
            assert not controller.of(InferRequest)

    run(work())


def test_an_input_that_is_not_contiguous_travels_in_c_order() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                transposed = np.arange(12, dtype=np.float32).reshape(4, 3).T
                answer = await client.infer(model, transposed, slo=1)
                assert answer.output is not None
                assert answer.output.tolist() == [0.0, 6.0]

    run(work())


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.TIMED_OUT, DeadlineExceeded),
        (Code.SKIPPED, DeadlineExceeded),
        (Code.COULD_NOT_START_IN_TIME, DeadlineExceeded),
        (Code.INVALID_REQUEST, InvalidRequest),
        (Code.CANCELLED, RequestFailed),
        (Code.EXEC_WORKSPACE_EXHAUSTED, RequestFailed),
        (999, RequestFailed),
    ],
)
def test_codes_become_errors_that_hold_the_answer(code: int, error: type[RequestFailed]) -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.code, controller.reason = code, "the queue is full"
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(error) as caught:
                    await client.infer(model, array(), slo="10ms")
                assert type(caught.value) is error
                assert "the queue is full" in str(caught.value) and "'toy'" in str(caught.value)
                assert caught.value.code == code
                answer = caught.value.reply
                assert isinstance(answer, Inference)
                assert answer.remaining_s == 0.007 and answer.output is None
                assert answer.predicted_exec_ns == 2_600_000 and answer.exec_ns is None
                assert "would have run 2.6ms" in answer.explain()
                if error is DeadlineExceeded:
                    assert "7ms left" in str(caught.value)

    run(work())


def test_nobody_there_is_said_in_words() -> None:
    async def work() -> None:
        with pytest.raises(PeerUnreachable) as caught:
            async with connect("127.0.0.1:1", timeout_s=0.2):
                pass
        assert "no controller answered at 127.0.0.1:1 within 200ms" in str(caught.value)
        assert "slosched controller" in str(caught.value)

    run(work())


@pytest.mark.parametrize("address", ["nonsense", "", "host:port", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_said_in_words(address: str) -> None:
    async def work() -> None:
        with pytest.raises(InvalidConfig, match=r"not a host:port|ports are within"):
            await connect(address, timeout_s=0.2)

    run(work())


def test_a_controller_that_comes_late_is_found() -> None:
    async def work() -> None:
        with FakeController() as first:
            port = first.port
        task = asyncio.ensure_future(connect(f"127.0.0.1:{port}", timeout_s=10).open())
        await asyncio.sleep(0.2)
        with FakeController(port):
            client = await task
            await client.close()

    run(work())


def test_another_protocol_is_refused() -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.protocol = 99
            with pytest.raises(ProtocolMismatch, match="protocol 99"):
                await connect(controller.address)

    run(work())


def test_an_unknown_model_and_a_failed_load() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                with pytest.raises(InvalidRequest, match="they offer: toy"):
                    await client.load("unknown")
                controller.load_code, controller.reason = 2, "out of memory"
                with pytest.raises(RequestFailed, match="out of memory"):
                    await client.load("toy")
                with pytest.raises(InvalidRequest, match="copies"):
                    await client.load("toy", copies=0)

    run(work())


def test_what_was_unloaded_is_refused_until_it_is_loaded_again() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                models = await client.load("toy", copies=2)
                controller.kept = 1
                assert await client.unload("toy") == Unloaded(unloaded=2, kept=1)
                assert controller.of(UnloadModelRequest) == [UnloadModelRequest(2, "toy")]
                for model in models:
                    with pytest.raises(InvalidRequest, match=r"was unloaded .*; load it again"):
                        await client.infer(model)
                with pytest.raises(ConnectionLost, match=r"was unloaded .*; load it again"):
                    client.submit(models[0], on_reply=lambda *_: None)
                assert not controller.of(InferRequest)
                assert (await client.infer((await client.load("toy"))[0])).ok
                await client.unload("toy", force=True)
                assert controller.of(UnloadModelRequest)[-1].force  # type: ignore[attr-defined]

    run(work())


def test_a_restarted_controller_does_not_load_again_what_was_unloaded() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                await client.unload("toy")
                controller.incarnation += 1
                await client.open()  # the hello tells the client of the new incarnation
                with pytest.raises(InvalidRequest, match="load it again"):
                    await client.infer(model)
                assert len(controller.of(LoadModelRequest)) == 1

    run(work())


def test_an_unload_that_is_refused_says_why_and_changes_nothing() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(
                    InvalidRequest, match=r"no instance of 'unknown' .*`slosched models`"
                ):
                    await client.unload("unknown")
                controller.unload_code, controller.reason = 6, "--operators names none"
                with pytest.raises(
                    InvalidRequest, match="'toy' is not unloaded: --operators"
                ) as caught:
                    await client.unload("toy", force=True)
                assert caught.value.code == Code.INVALID_REQUEST
                controller.unload_code = 3
                with pytest.raises(RequestFailed, match="'toy' is not unloaded"):
                    await client.unload("toy")
                assert (await client.infer(model)).ok
                controller.deaf = True
                with pytest.raises(
                    PeerUnreachable, match="did not answer unload 'toy' within 50ms"
                ):
                    await client.unload("toy", timeout_s=0.05)

    run(work())


def test_loading_waits_for_a_worker_and_then_says_what_is_missing() -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.load_code, controller.reason = 5, "no worker is connected"
            async with connect(controller.address) as client:
                with pytest.raises(RequestFailed, match="no worker is connected"):
                    await client.load("toy", timeout_s=0.7)
                task = asyncio.ensure_future(client.load("toy", timeout_s=10))
                await asyncio.sleep(0.1)
                controller.load_code = 0
                assert len(await task) == 1

    run(work())


def test_many_at_once_each_get_their_own_answer() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                inputs = [np.full((3, 4), i, np.float32) for i in range(200)]
                answers = await asyncio.gather(*(client.infer(model, a, slo=5) for a in inputs))
                for i, answer in enumerate(answers):
                    assert answer.output is not None
                    assert answer.output.tolist() == [2.0 * i, 2.0 * i]

    run(work())


def test_nothing_is_left_behind() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                await client.load("toy")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(work())
        gc.collect()


def test_requests_that_wait_for_a_flush_go_together_and_one_that_was_cancelled_does_not() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                answered: list[int] = []

                def on_reply(reply: Any, output: object) -> None:
                    answered.append(reply.request_id)

                ids = [
                    client.submit(model, slo_ns=10**9, on_reply=on_reply, later=True)
                    for _ in range(3)
                ]
                client.cancel(ids[1])
                assert client.flush() == [] and client.flush() == []
                while len(answered) < 2:
                    await asyncio.sleep(0.005)
                assert sorted(answered) == [ids[0], ids[2]]
                sent = [m.request_id for m in controller.received if isinstance(m, InferRequest)]
                assert sorted(sent) == [ids[0], ids[2]]
                assert not any(isinstance(m, CancelRequest) for m in controller.received)

    run(work())
