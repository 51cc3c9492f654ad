"""Large bodies by HTTP: what is announced and not sent takes no memory, and what is sent comes whole."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway_http_rig import Raw, Served, inference, request, served

INFER = "/v2/models/echo/infer"
LARGE = 64 * 1024**2


def resident_bytes() -> int:
    """What this process holds of the machine's memory."""
    pages = int(Path(f"/proc/{os.getpid()}/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def test_what_many_clients_announce_and_do_not_send_holds_no_memory() -> None:
    with served() as gateway, contextlib.ExitStack() as clients:
        before = resident_bytes()
        for _ in range(12):
            client = clients.enter_context(Raw(gateway.port))
            head = request(INFER, b"", f"content-length: {LARGE}", method="POST")
            client.send(head, b" " * 1000)
        gateway.until(lambda: gateway.front._bounds.held == 12 * 1000)
        assert resident_bytes() - before < 3 * LARGE


def test_a_large_body_comes_whole_as_bytes_as_json_and_inflated() -> None:
    count = 400_000
    numbers = list(range(count))
    data = b"".join(number.to_bytes(4, "little") for number in numbers)
    given = {"name": "x", "datatype": "INT32", "shape": [1, count]}
    in_json = {"inputs": [given | {"data": numbers}]}
    binary = {"inputs": [given | {"parameters": {"binary_data_size": len(data)}}]}
    with served() as gateway, Raw(gateway.port) as client:
        for each in (
            inference(binary, data),
            inference(in_json),
            request(
                INFER, gzip.compress(json.dumps(in_json).encode(), 1), "content-encoding: gzip"
            ),
        ):
            assert client.ask(each).status == 200
            tensor = gateway.service.asked[-1].inputs[0]
            assert bytes(tensor.data) == data and len(each) > 0
    assert not gateway.failures


def _have_come(gateway: Served, before: int) -> bool:
    """Whether one request more has come, and was answered."""
    return len(gateway.service.asked) > before and gateway.front._bounds.held == 0


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_answers_that_many_clients_do_not_take_are_bounded_together(loop: str) -> None:
    size, most = 24 * 1024**2, 64 * 1024**2
    given = {"name": "x", "datatype": "UINT8", "shape": [1, size]}
    binary = {
        "inputs": [given | {"parameters": {"binary_data_size": size}}],
        "parameters": {"binary_data_output": True},
    }
    asks = inference(binary, bytes(size))
    options: dict[str, Any] = {"max_request_bytes": 2 * size, "max_in_flight_bytes": most}
    with served(loop=loop, **options) as gateway, contextlib.ExitStack() as clients:
        bounds = gateway.front._bounds
        waiting = [clients.enter_context(Raw(gateway.port)) for _ in range(8)]
        for client in waiting:
            before = len(gateway.service.asked)
            client.send(asks)
            gateway.until(partial(_have_come, gateway, before))
            assert bounds.untaken <= most
        gateway.until(lambda: 0 < gateway.front.connections < len(waiting))
        assert waiting[0].reply().body.endswith(bytes(size))  # who takes it gets it
        gateway.until(lambda: bounds.untaken < most)
        clients.close()
        gateway.until(lambda: bounds.untaken == 0 and gateway.front.connections == 0)
    assert not gateway.failures


def test_a_token_leaves_others_room_for_bodies() -> None:
    def announced(name: str, size: int) -> bytes:
        path = "POST /v2/models/echo/infer HTTP/1.1"
        return f"{path}\r\nhost: localhost\r\nauthorization: {name}\r\ncontent-length: {size}\r\n\r\n".encode()

    with served(max_in_flight_bytes=9000, max_request_bytes=8000) as gateway:
        bounds = gateway.front._bounds
        with Raw(gateway.port) as first, Raw(gateway.port) as more, Raw(gateway.port) as other:
            first.send(announced("greedy", 8000) + bytes(7900))
            gateway.until(lambda: bounds.held == 7900)
            more.send(announced("greedy", 200) + bytes(200))
            assert more.reply().status == 429
            other.send(announced("modest", 200) + bytes(200))
            assert other.reply().status == 400  # it was read, and is not an inference
        gateway.until(lambda: bounds.held == 0)
        assert not bounds._by_token
    assert not gateway.failures
