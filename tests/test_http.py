"""The controller's HTTP side over real sockets: what each path and method gets, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from slosched.daemon.http import HttpServer
from slosched.errors import AddressInUse, InvalidConfig

HEALTHY: dict[str, Any] = {
    "status": "ok", "ready": True, "draining": False, "workers_missing": [], "workers": 1,
}  # fmt: skip


def exchange(
    request: bytes,
    *,
    status: Callable[[], dict[str, Any]] = lambda: {"all": 1},
    health: Callable[[], dict[str, Any]] = lambda: HEALTHY,
) -> tuple[bytes, bytes, list[str]]:
    """Head and body of the answer, and what the event loop had to complain about."""
    complaints: list[str] = []

    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
        server = HttpServer(status=status, health=health)
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


def ask(method: str, path: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()


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
        server = HttpServer(status=dict, health=dict)
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
