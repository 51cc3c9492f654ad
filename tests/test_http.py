"""The controller's HTTP side over real sockets: what each path and method gets, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from slosched.daemon import http
from slosched.daemon.http import (
    Answer,
    Handler,
    HttpServer,
    Request,
    probe_routes,
)
from slosched.errors import AddressInUse, InvalidConfig

HEALTHY: dict[str, Any] = {
    "status": "ok",
    "ready": True,
    "draining": False,
    "workers_missing": [],
    "workers": 1,
}


def exchange(
    request: bytes,
    *,
    status: Callable[[], dict[str, Any]] = lambda: {"all": 1},
    health: Callable[[], dict[str, Any]] = lambda: HEALTHY,
    more: Mapping[str, Handler] | None = None,
) -> tuple[bytes, bytes, list[str]]:
    """Head and body of the answer, and what the event loop had to complain about."""
    complaints: list[str] = []

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
        server = HttpServer(probe_routes(status=status, health=health) | dict(more or {}))
        await server.start("127.0.0.1", 0)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            answer = await asyncio.wait_for(reader.read(), 10)
            writer.close()
            await asyncio.sleep(0.05)  # for the server's side of the connection to end
        finally:
            await server.close()
        return answer

    head, _, body = asyncio.run(run()).partition(b"\r\n\r\n")
    return head, body, complaints


def ask(method: str, path: str, host: str = "localhost") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()


def test_head_gets_the_head_of_the_answer_and_no_body() -> None:
    got, body, _ = exchange(ask("GET", "/status"))
    head, nothing, complaints = exchange(ask("HEAD", "/status"))
    assert json.loads(body) == {"all": 1}
    assert head == got and head.startswith(b"HTTP/1.1 200")
    assert nothing == b""
    assert complaints == []


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_do_not_build_the_whole_report(path: str) -> None:
    def status() -> dict[str, Any]:
        raise AssertionError("a probe asked for the whole report")

    head, body, _ = exchange(ask("GET", path), status=status)
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body) == HEALTHY


@pytest.mark.parametrize(
    ("change", "healthz", "readyz"),
    [
        ({}, b"200", b"200"),
        ({"status": "degraded", "workers_missing": [3]}, b"200", b"200"),
        ({"ready": False}, b"200", b"503"),
        ({"draining": True}, b"200", b"503"),
    ],
)
def test_only_readiness_depends_on_the_state(
    change: dict[str, Any], healthz: bytes, readyz: bytes
) -> None:
    for path, code in (("/healthz", healthz), ("/readyz", readyz)):
        head, body, _ = exchange(ask("GET", path), health=lambda: HEALTHY | change)
        assert head.split()[1] == code
        assert json.loads(body) == HEALTHY | change


@pytest.mark.parametrize(
    ("request_bytes", "code"),
    [(ask("GET", "/nothing"), b"404"), (ask("POST", "/status"), b"405")],
)
def test_other_paths_and_methods_are_refused(request_bytes: bytes, code: bytes) -> None:
    head, body, complaints = exchange(request_bytes)
    assert head.split()[1] == code
    assert "error" in json.loads(body) and complaints == []


def test_a_path_that_is_not_there_is_told_which_are() -> None:
    def page(_: Request) -> Answer:
        return Answer(200, "text/html", b"")

    _, body, _ = exchange(ask("GET", "/nothing"), more={"/page": page})
    assert json.loads(body) == {"error": "there are /healthz, /readyz, /status and /page"}


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *(
            (host, b"200")
            for host in ("localhost", "127.0.0.1:12347", "[::1]", "[::1]:1", "LOCALHOST:80")
        ),
        *(
            (host, b"421")
            for host in (
                "evil.example",
                "evil.example:12347",
                "127.0.0.1.evil.example",
                "localhost:x",
                "[::2]",
                "192.0.2.1",
                "",
            )
        ),
    ],
)
def test_only_a_request_for_this_machine_is_answered(host: str, code: bytes) -> None:
    head, body, complaints = exchange(ask("GET", "/status", host))
    assert head.split()[1] == code and complaints == []
    assert ("127.0.0.1" in json.loads(body).get("error", "")) == (code == b"421")


def test_on_an_address_for_others_any_host_is_answered() -> None:
    async def run() -> bytes:
        server = HttpServer(probe_routes(status=dict, health=dict))
        await server.start("0.0.0.0", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(ask("GET", "/status", "cluster02:9000"))
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await server.close()
        return answer

    assert asyncio.run(run()).split()[1] == b"200"


def test_a_handler_may_wait_and_gets_the_query_and_the_headers() -> None:
    async def echo(request: Request) -> Answer:
        await asyncio.sleep(0)
        text = f"{request.path} {request.query['n']} {request.headers['host']}"
        return Answer(418, "text/plain", text.encode(), (("x-more", "1"),))

    head, body, _ = exchange(ask("GET", "/echo?n=1%202&n=3"), more={"/echo": echo})
    assert head.startswith(b"HTTP/1.1 418") and b"content-type: text/plain\r\n" in head
    assert b"x-more: 1" in head and body == b"/echo 3 localhost"


@pytest.mark.parametrize("noise", [b"\x00\x01\x02\r\n\r\n", b"GET /status HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_is_closed_without_a_complaint(noise: bytes) -> None:
    head, body, complaints = exchange(noise)
    assert (head, body, complaints) == (b"", b"", [])


def test_a_report_that_fails_is_answered_with_500_and_the_cause() -> None:
    def status() -> dict[str, Any]:
        raise KeyError("net")

    head, body, complaints = exchange(ask("GET", "/status"), status=status)
    assert head.split()[1] == b"500"
    assert "KeyError" in json.loads(body)["error"] and complaints == []


def start(host: str, port: int) -> None:
    async def run() -> None:
        server = HttpServer(probe_routes(status=dict, health=dict))
        try:
            await server.start(host, port)
        finally:
            await server.close()

    asyncio.run(run())


def test_a_port_that_is_taken_is_called_in_use() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(AddressInUse, match=rf"{port} .*in use"):
            start("127.0.0.1", port)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70000)])
def test_any_other_failure_to_listen_says_what_it_is(host: str, port: int) -> None:
    with pytest.raises(InvalidConfig, match="cannot listen") as caught:
        start(host, port)
    assert "in use" not in str(caught.value)


# --------------------------------------------------------------------------------- slow clients


def test_slow_clients_keep_no_probe_out() -> None:
    """200 connections that say half a request; those that waited longest make way."""

    async def run() -> tuple[bytes, list[str]]:
        complaints: list[str] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
        server = HttpServer(probe_routes(status=dict, health=lambda: HEALTHY))
        await server.start("127.0.0.1", 0)
        slow = []
        try:
            for _ in range(200):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(b"GET /healthz HTTP/1.1\r\nho")
                slow.append(writer)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(ask("GET", "/healthz"))
            answer = await asyncio.wait_for(reader.read(), 4)  # before the slow ones time out
            writer.close()
        finally:
            for each in slow:
                each.close()
            await server.close()
        return answer, complaints

    answer, complaints = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 200") and not complaints


def test_a_reader_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is not only closed, for which what was written would have to be read first."""
    monkeypatch.setattr(http, "_REQUEST_WITHIN_S", 0.2)
    monkeypatch.setattr(http, "_CLOSED_WITHIN_S", 0.1)
    large = Answer(200, "text/plain", [bytes(2**20)] * 32)
    served: list[asyncio.StreamWriter] = []

    async def run() -> None:
        server = HttpServer({"/large": lambda _: large})
        exchange = server._exchange

        async def noted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served.append(writer)
            await exchange(reader, writer)

        monkeypatch.setattr(server, "_exchange", noted)
        await server.start("127.0.0.1", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
        try:
            writer.write(ask("GET", "/large"))
            async with asyncio.timeout(10):
                while not served or not served[0].transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)
                while server._open or served[0].transport.get_write_buffer_size():
                    await asyncio.sleep(0.01)
        finally:
            writer.close()
            await server.close()

    asyncio.run(run())
