"""The controller's shell between steps: when it reads, and that it sleeps in between."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvloop

from slosched import clock
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.daemon.controller import ControllerServer
from slosched.messages import PROTOCOL_VERSION, ClientHello, Refused, Welcome
from slosched.transport.codec import decode_for_client, encode
from slosched.transport.sockets import Dealer

_REST_NS = 80_000_000


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
    said = ControllerServer._clients_said

    def counted(server: ControllerServer) -> None:
        nonlocal calls
        calls += 1
        said(server)

    monkeypatch.setattr(ControllerServer, "_clients_said", counted)

    async def work() -> None:
        nonlocal calls
        config = ControllerConfig(
            SchedulerConfig(),
            bind="127.0.0.1",
            port=0,
            workers=("127.0.0.1:9",),
            http_port=-1,
            log_dir=str(tmp_path / "run"),
        )
        server = ControllerServer(config, announce=lambda line: None)
        await server.start()
        dealer = Dealer(f"127.0.0.1:{server.port}", identity=b"c-test")
        try:
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
            assert isinstance(await _answer(dealer), Welcome)
            calls = 0
            began_ns = clock.now_ns()
            server._rested_ns = began_ns + _REST_NS
            await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
            assert isinstance(await _answer(dealer), Welcome)
            assert calls < 20, "the loop was called again and again for one message"
        finally:
            dealer.close()
            await server.close()

    _run(work())


def test_a_client_is_heard_after_a_message_that_was_none(tmp_path: Path) -> None:
    async def work() -> None:
        config = ControllerConfig(
            SchedulerConfig(),
            bind="127.0.0.1",
            port=0,
            workers=("127.0.0.1:9",),
            http_port=-1,
            log_dir=str(tmp_path / "run"),
        )
        server = ControllerServer(config, announce=lambda line: None)
        await server.start()
        dealer = Dealer(f"127.0.0.1:{server.port}", identity=b"c-test")
        try:
            for _ in range(20):
                await _send(dealer, b"no message")
                assert isinstance(await _answer(dealer), Refused)
                await _send(dealer, encode(ClientHello(PROTOCOL_VERSION, 7)))
                assert isinstance(await _answer(dealer), Welcome)
        finally:
            dealer.close()
            await server.close()

    _run(work())
