"""HTTP of a running gateway: plain requests, refusals, and clients that leave as the controller counts."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway_http_rig import Raw, inference, request
from live_gateway import Gateway, serving
from slosched import Client
from slosched.codes import Code

pytestmark = pytest.mark.processes

MODEL, ELEMENTS = "resnet50_v2", 3 * 224 * 224
WITHIN_S = 20.0


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(tmp_path_factory.mktemp("http"), gateway=("--load", MODEL)) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Raw]:
    with Raw(port(gateway)) as raw:
        yield raw


def port(gateway: Gateway) -> int:
    return int(gateway.http.rpartition(":")[2])


def image(timeout_us: int) -> bytes:
    form = {"binary_data_size": 4 * ELEMENTS}
    given = {"name": "input", "datatype": "FP32", "shape": [1, 3, 224, 224], "parameters": form}
    parameters = {"timeout": timeout_us, "binary_data_output": True}
    document = {"inputs": [given], "parameters": parameters}
    return inference(document, bytes(4 * ELEMENTS), model=MODEL)


def cancelled(client: Client) -> int:
    """How many requests the controller ended because their client took them back."""
    by_code: dict[str, int] = client.status()["requests"]["by_code"]
    return sum(
        count for code, count in by_code.items() if code.split()[0] == str(int(Code.CANCELLED))
    )


def in_flight(client: Client) -> int:
    requests: dict[str, Any] = client.status()["requests"]
    return int(requests["queued"]) + int(requests["in_flight"])


def until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def test_a_plain_request_and_its_refusal(client: Raw) -> None:
    body = json.dumps({"inputs": [0.5] * ELEMENTS, "slo": "20s"}).encode()
    served = client.ask(request(f"/v1/infer/{MODEL}", body))
    assert served.status == 200, served.body
    assert len(served.json["outputs"]["output"]) == 1000 and served.json["in_time"]
    refused = client.ask(request(f"/v1/infer/{MODEL}?slo=1us", body))
    assert refused.status == 503
    assert refused.json["code"] in (Code.TIMED_OUT, Code.COULD_NOT_START_IN_TIME)
    assert refused.headers["slosched-code"] == str(refused.json["code"])
    short = client.ask(request(f"/v1/infer/{MODEL}", b'{"inputs": [1, 2]}'))
    assert short.status == 400 and "2 elements came" in short.error


def test_binary_requests_in_a_row_on_one_connection(client: Raw) -> None:
    sent = image(20_000_000)
    client.send(sent * 8)
    for _ in range(8):
        reply = client.reply()
        assert reply.status == 200, reply.body
        assert len(reply.body) - int(reply.headers["inference-header-content-length"]) == 4000


def test_the_controller_counts_as_cancelled_what_clients_left(gateway: Gateway) -> None:
    with Client(gateway.controller) as native:
        assert cancelled(native) == 0

        def some_left_in_time() -> bool:
            """Clients ask and leave; that of a request which is served at once leaves too late."""
            with contextlib.ExitStack() as stack:
                leaving = [stack.enter_context(Raw(port(gateway))) for _ in range(20)]
                for each in leaving:
                    each.send(image(20_000_000))
            until(lambda: in_flight(native) == 0)
            return cancelled(native) > 0

        until(some_left_in_time)
    with Raw(port(gateway)) as raw:
        assert raw.ask(image(20_000_000)).status == 200
