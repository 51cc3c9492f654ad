"""A client in a fork of its process says so at once, and the parent's goes on."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import traceback
from collections.abc import Callable

import pytest

from fake_controller import FakeController
from slosched.clients.aio import AsyncClient
from slosched.clients.blocking import Client
from slosched.errors import ConnectionLost
from slosched.messages import ClientHello, Goodbye
from slosched.transport.sockets import finish_sending


def in_child(work: Callable[[], None]) -> str:
    """Run `work` in a fork; what went wrong there, empty if nothing did. At most 20 s."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        problem = ""
        try:
            work()
        except BaseException:
            problem = traceback.format_exc()
        finally:
            os.write(writing, problem.encode()[-4000:])
            os._exit(0)
    os.close(writing)
    try:
        if not select.select([reading], [], [], 20)[0]:
            os.kill(pid, signal.SIGKILL)
            return "it hung"
        return os.read(reading, 4096).decode()
    finally:
        os.waitpid(pid, 0)
        os.close(reading)


def test_a_blocking_client_in_a_child() -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")

        def work() -> None:
            for call in (
                lambda: client.infer(model),
                lambda: client.load("toy"),
                client.models,
                client.status,
            ):
                with pytest.raises(ConnectionLost, match=r"before the process was forked.*spawn"):
                    call()
            client.close()
            client.close()

        assert in_child(work) == ""
        client._lock.acquire()  # as a thread that was in a call at the moment of the fork
        try:
            assert in_child(work) == ""
        finally:
            client._lock.release()
        assert client.infer(model, timeout_s=10).ok  # the parent's session is untouched
        assert not controller.of(Goodbye)


def test_a_child_may_have_a_client_of_its_own() -> None:
    with FakeController() as controller, Client(controller.address) as client:
        [model] = client.load("toy")

        def work() -> None:
            with Client(controller.address, name="child") as own:
                [loaded] = own.load("toy")
                assert own.infer(loaded, timeout_s=10).ok
            finish_sending(10_000)  # _exit waits for no message that is queued

        assert in_child(work) == ""
        controller.wait_for(Goodbye)
        assert client.infer(model, timeout_s=10).ok
        hellos = [hello for hello in controller.received if isinstance(hello, ClientHello)]
        own = {hello.incarnation for hello in hellos if hello.name == "child"}
        assert own and own.isdisjoint(hello.incarnation for hello in hellos if not hello.name)


def test_an_asynchronous_client_in_a_child() -> None:
    with FakeController() as controller:
        loop = asyncio.new_event_loop()

        async def connected() -> AsyncClient:
            client = AsyncClient(controller.address)
            await client.open()
            return client

        client = loop.run_until_complete(connected())
        [model] = loop.run_until_complete(client.load("toy"))

        def work() -> None:
            for call in (
                lambda: client.infer(model),
                lambda: client.load("toy"),
                client.models,
                client.status,
                client.open,
            ):
                with pytest.raises(ConnectionLost, match="forked"):
                    asyncio.run(call())
            with pytest.raises(ConnectionLost, match="forked"):
                client.submit(model, on_reply=lambda *_: None)
            with pytest.raises(ConnectionLost, match="forked"):
                client.flush()
            asyncio.run(client.close())

        assert in_child(work) == ""
        assert loop.run_until_complete(client.infer(model, timeout_s=10)).ok
        assert not controller.of(Goodbye)
        loop.run_until_complete(client.close())
        loop.close()
