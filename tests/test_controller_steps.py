"""The controller's shell between steps: when it reads, and that it sleeps in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from made_messages import a_load_result
from slosched import clock
from slosched.codes import Code
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.core.scheduler.interface import Effect, ToClient
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Instance, ModelState
from slosched.daemon.controller import ControllerServer
from slosched.daemon.steps import Steps
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    InferReply,
    ListModelsRequest,
    Refused,
    StatusRequest,
    Welcome,
)
from slosched.transport.codec import decode_for_client, encode
from slosched.transport.sockets import AsyncReader, Dealer

_REST_NS = 80_000_000


@contextlib.asynccontextmanager
async def _serving(directory: Path) -> AsyncIterator[tuple[ControllerServer, Dealer]]:
    """A controller in this loop without a worker, and a client's socket."""
    config = ControllerConfig(
        SchedulerConfig(),
        bind="127.0.0.1",
        port=0,
        workers=("127.0.0.1:9",),
        http_port=-1,
        log_dir=str(directory / "run"),
    )
    server = ControllerServer(config, announce=lambda line: None)
    await server.start()
    dealer = Dealer(f"127.0.0.1:{server.port}", identity=b"c-test")
    try:
        yield server, dealer
    finally:
        dealer.close()
        await server.close()


def _run(work: Any) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(work, 20))


async def _answer(dealer: Dealer) -> Any:
    while not (received := dealer.receive()):
        await asyncio.sleep(0.002)
    return decode_for_client(received[0][0])


async def _send(dealer: Dealer, *frames: bytes) -> None:
    while not dealer.send(frames):
        await asyncio.sleep(0.002)


def test_a_message_in_a_rest_waits_for_its_end_and_does_not_keep_the_loop_awake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    said = Steps._clients_said

    def counted(steps: Steps) -> None:
        nonlocal calls
        calls += 1
        said(steps)

    monkeypatch.setattr(Steps, "_clients_said", counted)

    async def work() -> None:
        nonlocal calls
        async with _serving(tmp_path) as (server, dealer):
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
            assert isinstance(await _answer(dealer), Welcome)
            calls = 0
            server._steps._rested_ns = clock.now_ns() + _REST_NS
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
            assert isinstance(await _answer(dealer), Welcome)
            assert 0 < calls < 20, "the loop was called again and again for one message"

    _run(work())


def test_the_socket_is_looked_at_after_the_refusal_of_what_was_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The send may have taken the edge of what came meanwhile."""
    looked_at: list[AsyncReader] = []
    recheck = AsyncReader.recheck

    def noted(reader: AsyncReader) -> None:
        looked_at.append(reader)
        recheck(reader)

    monkeypatch.setattr(AsyncReader, "recheck", noted)

    async def work() -> None:
        async with _serving(tmp_path) as (server, dealer):
            await asyncio.sleep(0.05)
            looked_at.clear()
            await _send(dealer, b"no message")
            assert isinstance(await _answer(dealer), Refused)
            await asyncio.sleep(0)
            assert server._steps._client_reader in looked_at

    _run(work())


def test_long_replies_arrive_whole_and_what_is_asked_meanwhile_is_answered(tmp_path: Path) -> None:
    async def ask() -> None:
        async with _serving(tmp_path) as (server, dealer):
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 1, "test")))
            assert isinstance(await _answer(dealer), Welcome)
            loaded = a_load_result(1, 1)
            for number in range(3_000):
                model = Instance(number, "net", number, ModelState.LOADED, result=loaded)
                server.scheduler.cluster.models[number] = model
            await _send(dealer, encode(ListModelsRequest(5)))
            await _send(dealer, encode(StatusRequest(6)))
            await _send(dealer, encode(StatusRequest(7, brief=True)))
            replies: list[Any] = []
            while len(replies) < 3:
                replies += [decode_for_client(frames[0]) for frames in dealer.receive()]
                await asyncio.sleep(0.002)
            by_id = {reply.request_id: reply for reply in replies}
            assert [info.model_id for info in by_id[5].models] == list(range(3_000))
            assert len(by_id[6].report["models"]) == 3_000
            assert by_id[7].report["model_instances"] == 3_000
            assert replies[0].request_id == 7, "the short one overtakes them"

    _run(ask())


def test_clients_have_time_to_read_the_last_answers_of_a_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that the controller closes loses what its client has not read yet."""
    answered = asyncio.Event()
    looks = iter([False])
    last = InferReply(7, Code.SHUTTING_DOWN, "the controller is shutting down", -1, 0, 0, False)

    def abandon(scheduler: Scheduler, *, now_ns: int) -> list[Effect]:
        answered.set()
        return [ToClient(b"c-test", last)]

    monkeypatch.setattr(Scheduler, "abandon", abandon)
    monkeypatch.setattr(Scheduler, "idle", property(lambda scheduler: next(looks, True)))

    async def work() -> None:
        async with _serving(tmp_path) as (server, dealer):
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
            assert isinstance(await _answer(dealer), Welcome)
            running = asyncio.ensure_future(server.run())
            server.stop()
            await answered.wait()
            await asyncio.sleep(0.1)
            assert await asyncio.wait_for(_answer(dealer), 2) == last
            await running

    _run(work())
