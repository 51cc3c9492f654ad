"""Cancelling, silence, restarts and nonsense: the asynchronous client when things go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any

import numpy as np
import pytest

import slosched.core.client.requests as requests
from fake_controller import FakeController
from slosched.clients.aio import connect
from slosched.core.client.brain import LOST_AFTER_TICKS
from slosched.errors import (
    ConnectionLost,
    InvalidRequest,
    MalformedMessage,
    PeerUnreachable,
    RequestFailed,
)
from slosched.messages import (
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    InferReply,
    InferRequest,
    LoadModelRequest,
)

Array = np.ndarray[Any, Any]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def _into(future: asyncio.Future[InferReply], reply: InferReply, output: object) -> None:
    future.set_result(reply)


def array() -> Array:
    return np.arange(12, dtype=np.float32).reshape(3, 4)


def test_cancelling_the_task_cancels_the_request() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.hold = True
                task = asyncio.ensure_future(client.infer(model, array(), slo=10))
                request = await asyncio.to_thread(controller.wait_for, InferRequest)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancel = await asyncio.to_thread(controller.wait_for, CancelRequest)
                assert isinstance(cancel, CancelRequest) and isinstance(request, InferRequest)
                assert cancel.request_id == request.request_id
                assert client.unanswered == 0

    run(work())


def test_an_own_timeout_cancels_the_request() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.hold = True
                with pytest.raises(RequestFailed, match="within timeout_s, 50ms"):
                    await client.infer(model, array(), slo=10, timeout_s=0.05)
                await asyncio.to_thread(controller.wait_for, CancelRequest)

    run(work())


def test_an_answered_request_is_not_cancelled() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                await client.infer(model, slo=1)
                await client.status()
            assert not controller.of(CancelRequest)

    run(work())


@pytest.mark.parametrize("slo", ["10ms", None])
def test_a_silent_controller_ends_the_request(
    slo: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "GRACE_NS", 300_000_000)
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)

    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.deaf = True
                with pytest.raises(ConnectionLost) as caught:
                    await client.infer(model, array(), slo=slo)
                assert controller.address in str(caught.value)
                assert client.unanswered == 0
                with pytest.raises((ConnectionLost, PeerUnreachable)):
                    await client.status(timeout_s=1)
                # It comes back: the same session goes on.
                controller.deaf = False
                await client.status(timeout_s=10)
                assert (await client.infer(model, array(), slo=1)).ok
                assert not client.lost

    run(work())


def test_a_request_made_after_the_silence_was_noticed_ends_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)

    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.deaf = True  # as a stopped process: its TCP connection stays up
                async with asyncio.timeout(10):
                    while not client.lost:
                        await asyncio.sleep(0.02)
                    with pytest.raises(ConnectionLost, match="silent"):
                        await client.infer(model, array())
                assert client.unanswered == 0

    run(work())


@pytest.mark.parametrize(("default_slo_ns", "words"), [(10**7, "the SLO and"), (0, "within 200ms")])
def test_a_request_without_an_slo_ends_though_the_controller_lives(
    default_slo_ns: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "GRACE_NS", 100_000_000)
    monkeypatch.setattr(requests, "UNKNOWN_SLO_LIMIT_NS", 200_000_000)

    async def work() -> None:
        with FakeController() as controller:
            controller.hold = True  # hellos are answered, inferences never
            controller.default_slo_ns = default_slo_ns
            async with connect(controller.address) as client:
                assert client.controller.default_slo_ns == default_slo_ns
                [model] = await client.load("toy")
                async with asyncio.timeout(10):
                    with pytest.raises(ConnectionLost, match=words):
                        await client.infer(model, array())
                assert not client.lost and client.unanswered == 0

    run(work())


def test_a_controller_that_is_slow_but_alive_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)

    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.hold = True  # no inference is answered, hellos are
                task = asyncio.ensure_future(client.infer(model, array()))
                await asyncio.sleep(1.0)
                assert not task.done() and not client.lost
                task.cancel()

    run(work())


def test_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 20_000_000)

    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address):
                for _ in range(200):
                    if len(controller.of(ClientHeartbeat)) >= 3:
                        return
                    await asyncio.sleep(0.02)
                raise AssertionError("no heartbeats")

    run(work())


def test_no_heartbeat_is_ahead_of_the_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that has just come up would refuse it, and the client would take that for itself."""
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 20_000_000)

    async def work() -> None:
        with FakeController() as controller:
            monkeypatch.setattr(controller, "_hello", lambda peer, message: None)
            with pytest.raises(PeerUnreachable):
                async with connect(controller.address, timeout_s=0.4):
                    pass
            assert controller.of(ClientHello) and not controller.of(ClientHeartbeat)

    run(work())


def test_a_restarted_controller_fails_what_waits_and_the_models_are_loaded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slosched.core.client.brain.TICK_NS", 50_000_000)

    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.hold = True
                task = asyncio.ensure_future(client.infer(model, array(), slo=20))
                await asyncio.to_thread(controller.wait_for, InferRequest)
                controller.incarnation = 8
                with pytest.raises(ConnectionLost, match="was restarted"):
                    await task
                controller.hold = False
                answers = await asyncio.gather(
                    *(client.infer(model, array(), slo=1) for _ in range(5))
                )
                assert all(answer.ok and answer.model.incarnation == 8 for answer in answers)
                assert len(controller.of(LoadModelRequest)) == 2  # once for all of them
                assert model.incarnation == 8 and client.restarts == client.lost_requests == 1
                for frame in (None, array().tobytes()):  # the cheap form continues as well
                    answered = asyncio.get_running_loop().create_future()
                    client.submit(model, frame=frame, on_reply=partial(_into, answered))
                    assert (await answered).code == 0
                async with connect(controller.address) as other:
                    with pytest.raises(InvalidRequest, match="through another client"):
                        await other.infer(model, array(), slo=1)

    run(work())


def test_a_forgotten_client_is_told_and_says_hello_again() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                controller.greeted.clear()
                assert (
                    await client.infer(model, array(), slo=1)
                ).ok  # the second time, after a hello
                controller.greeted.clear()
                controller.incarnation = 9  # it was restarted, and the client has not noticed yet
                answer = await client.infer(model, array(), slo=1)
                assert answer.ok and answer.model.incarnation == 9

    run(work())


def test_a_forgotten_client_asks_again_by_itself() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                controller.greeted.clear()
                assert (await client.status())["policy"] == "FAKE"
                controller.greeted.clear()
                assert len(await client.load("toy")) == 1

    run(work())


def test_a_question_that_is_asked_as_the_controller_is_found_lost_has_its_end() -> None:
    async def work() -> None:
        with FakeController() as controller:
            async with connect(controller.address) as client:
                controller.deaf = True
                brain = client._brain
                brain._heard = brain.requests.heard = False
                brain._silent_ticks = LOST_AFTER_TICKS - 1
                brain._alarms.set("tick", 0)  # due, and not looked at before the question is asked
                with pytest.raises(ConnectionLost, match="has been silent"):
                    await asyncio.wait_for(client.status(), 10)

    run(work())


def test_an_answer_of_another_kind_is_an_error() -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.confuse = True
            async with connect(controller.address) as client:
                with pytest.raises(
                    MalformedMessage, match="answered status with a ListModelsReply"
                ):
                    await client.status()

    run(work())


def test_malformed_messages_are_counted_and_passed_over() -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.garbage = b"\xc1 no message"
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                assert (await client.infer(model, array(), slo=1)).ok
                assert client.malformed == 3

    run(work())


def test_an_output_of_another_size_is_an_error() -> None:
    async def work() -> None:
        with FakeController() as controller:
            controller.shape = (1,)  # so the output has one element and not two
            async with connect(controller.address) as client:
                [model] = await client.load("toy")
                with pytest.raises(RequestFailed, match="4 bytes"):
                    await client.infer(model, np.ones(1, np.float32), slo=1)

    run(work())


def test_closing_fails_what_waits_and_later_calls() -> None:
    async def work() -> None:
        with FakeController() as controller:
            client = await connect(controller.address)
            [model] = await client.load("toy")
            controller.hold = True
            task = asyncio.ensure_future(client.infer(model, array(), slo=10))
            await asyncio.sleep(0.05)
            await client.close()
            with pytest.raises(ConnectionLost, match="closed"):
                await task
            with pytest.raises(ConnectionLost, match="closed"):
                await client.infer(model, array(), slo=10)
            with pytest.raises(ConnectionLost, match="closed"):
                await client.status()

    run(work())
