"""POST /v1/infer/MODEL: plain JSON, for curl."""

from __future__ import annotations

import asyncio
import json
import math
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from gateway_http_rig import FakeService, Raw, Reply, Served, echoed, request, served
from slosched.fronts.asked import NamedTensor


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with served() as gateway:
        yield gateway
        assert not gateway.failures


@pytest.fixture
def gateway(running: Served) -> Served:
    running.service.asked.clear()
    running.service.outputs = echoed
    return running


@pytest.fixture
def client(gateway: Served) -> Iterator[Raw]:
    with Raw(gateway.port) as raw:
        yield raw


def plain(client: Raw, model: str, body: Any, *lines: str) -> Reply:
    return client.ask(request(f"/v1/infer/{model}", json.dumps(body).encode(), *lines))


def test_one_value_or_an_object_of_inputs(gateway: Served, client: Raw) -> None:
    for inputs in ([1, 2, 3, 4], {"x": [1, 2, 3, 4]}):
        assert plain(client, "echo", {"inputs": inputs, "id": "a"}).json == {
            "id": "a",
            "model": "echo",
            "version": "1",
            "outputs": {"y": [1, 2, 3, 4]},
            "latency_ms": 1.5,
            "in_time": True,
        }
    asked = gateway.service.asked[0]
    assert asked.inputs == (NamedTensor("x", "FP32", (1, 4), struct.pack("4f", 1, 2, 3, 4)),)


def test_values_are_nested_or_flat_and_answers_are_nested(client: Raw) -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    for value in (rows, [1, 2, 3, 4, 5, 6]):
        assert plain(client, "grid", {"inputs": value}).json["outputs"] == {"y": rows}
    assert plain(client, "tokens", {"inputs": [7, 8]}).json["outputs"] == {"ids": [7, 8]}


def test_texts(client: Raw) -> None:
    for value in ("äöü", ["äöü"], {"text": ["äöü"]}):
        assert plain(client, "words", {"inputs": value}).json["outputs"] == {"text": ["äöü"]}


def test_half_precision_is_numbers_here(client: Raw) -> None:
    reply = plain(client, "pair", {"inputs": {"left": [1.5, 2], "right": [1.5, -2]}})
    assert reply.json["outputs"] == {"left": [1.5, 2], "right": [1.5, -2]}


def test_what_json_has_no_number_for_is_a_text(gateway: Served, client: Raw) -> None:
    data = struct.pack("4f", 1, math.nan, math.inf, -math.inf)
    gateway.service.outputs = lambda _: (NamedTensor("y", "FP32", (1, 4), data),)
    outputs = plain(client, "echo", {"inputs": [1, 2, 3, 4]}).json["outputs"]
    assert outputs == {"y": [1, "NaN", "Infinity", "-Infinity"]}
    gateway.service.outputs = lambda _: (NamedTensor("y", "BYTES", (1, 1), b"\1\0\0\0\xff"),)
    reply = plain(client, "echo", {"inputs": [1, 2, 3, 4]})
    assert reply.status == 400 and "UTF-8" in reply.error
    gateway.service.outputs = lambda _: (NamedTensor("y", "FP32", (1,), struct.pack("f", 2)),)
    assert plain(client, "echo", {"inputs": [1, 2, 3, 4]}).json["outputs"] == {"y": 2}
    gateway.service.outputs = lambda asked: (NamedTensor("y", "FP32", (1, 2, 0), b""),)
    assert plain(client, "echo", {"inputs": [1, 2, 3, 4]}).json["outputs"] == {"y": []}


def test_the_slo_is_in_the_query_the_body_or_a_header(gateway: Served, client: Raw) -> None:
    body = {"inputs": [1, 2, 3, 4]}
    for path, more, lines, expected_ms in (
        ("echo", {}, (), 0),
        ("echo?slo=25ms", {"slo": "30ms"}, ("slosched-slo: 40ms",), 25),
        ("echo", {"slo": "30ms"}, ("slosched-slo: 40ms",), 30),
        ("echo", {}, ("slosched-slo: 40ms",), 40),
        ("echo?slo=2", {}, (), 2000),
    ):
        reply = plain(client, path, {**body, **more}, *lines)
        assert gateway.service.asked[-1].slo_ns == expected_ms * 10**6
        assert reply.json.get("slo_ms", 0) == expected_ms
    for path in ("echo?slo=nope", "echo?slo=-1s", "echo?" + "a=b&" * 20):
        assert plain(client, path, body).status == 400, path


def test_a_version_stands_behind_a_colon(gateway: Served, client: Raw) -> None:
    body = {"inputs": [1, 2, 3, 4]}
    assert plain(client, "echo:2", body).json["version"] == "2"
    assert plain(client, "echo%3A3", body).json["version"] == "3"
    assert [(each.model, each.version) for each in gateway.service.asked] == [
        ("echo", "2"),
        ("echo", "3"),
    ]


def test_a_refusal_says_why_and_what_was_predicted(client: Raw) -> None:
    reply = plain(client, "refused", {"inputs": [1, 2, 3, 4]})
    assert reply.status == 503
    assert reply.json == {
        "error": "could not start in time",
        "code": 8,
        "reason": "could not start in time",
        "predicted_start_ms": 5.0,
        "time_left_ms": 2.5,
    }
    assert reply.headers["slosched-code"] == "8"


@pytest.mark.parametrize(
    ("model", "body", "words"),
    [
        ("echo", {}, "inputs"),
        ("echo", {"inputs": [1, 2, 3, 4], "sloo": "1s"}, "sloo"),
        ("echo", {"inputs": [1, 2, 3, 4], "slo": 25}, "slo"),
        ("echo", [1, 2], "object"),
        ("echo", {"inputs": [1, 2, 3]}, "input 'x' FP32[4]: a value of shape [3] came"),
        ("echo", {"inputs": []}, "shape [0]"),
        ("echo", {"inputs": None}, "1 element came"),
        ("echo", {"inputs": [1, 2, 3, "4"]}, "a text is among"),
        ("echo", {"inputs": [1, 2, 3, {}]}, "an object is among"),
        ("echo", {"inputs": {"z": [1]}}, "has no input 'z'; its inputs are x"),
        ("echo", {"inputs": {}}, "lacks its input 'x'"),
        ("echo", {"inputs": {"x": [1, 2, 3, 4], "z": 1}}, "has no input 'z'"),
        ("grid", {"inputs": [[1, 2], [3, 4], [5, 6]]}, "shape [3, 2]"),
        ("grid", {"inputs": [[1, 2, 3], [4, 5]]}, "different lengths"),
        ("grid", {"inputs": [[1, 2], [3], [4, 5, 6]]}, "different lengths"),
        ("grid", {"inputs": [[[1, 2, 3], [4, 5, 6]]]}, "shape [1, 2, 3]"),
        ("tokens", {"inputs": 3.5}, "not whole"),
        ("tokens", {"inputs": []}, "shape [0]"),
        ("words", {"inputs": 3}, "a number is among"),
        ("pair", {"inputs": [1, 2]}, 'give an object with "left", "right"'),
        ("pair", {"inputs": {"left": [1e6, 0], "right": [0, 0]}}, "does not fit into FP16"),
    ],
)
def test_a_request_that_is_wrong(
    gateway: Served, client: Raw, model: str, body: Any, words: str
) -> None:
    reply = plain(client, model, body)
    assert reply.status == 400 and words in reply.error, reply.body
    assert not gateway.service.asked


def test_a_model_that_is_not_there(client: Raw) -> None:
    reply = plain(client, "nope", {"inputs": [1]})
    assert (reply.status, reply.error) == (404, "Request for unknown model: 'nope' is not found")
    for body in (b"", b"{", b"[" * 10**5, b"\xff"):
        assert client.ask(request("/v1/infer/echo", body, method="POST")).status == 400


def test_a_request_that_waits_for_its_model_is_kept_as_its_bytes() -> None:
    """As lists of Python 16 MiB of JSON are half a gigabyte, which a load would hold for a minute."""
    service = FakeService()
    service.described = asyncio.Event()
    body = b'{"inputs": [' + b"[]," * 300_000 + b"[]]}"
    with served(service) as gateway, Raw(gateway.port) as client:
        tracemalloc.start()
        try:
            client.send(request("/v1/infer/echo", body))
            gateway.until(lambda: service.describing == 1)
            assert tracemalloc.get_traced_memory()[0] < 4 * len(body)
        finally:
            tracemalloc.stop()
        gateway.do(service.described.set)
        assert client.reply().status == 400


def test_a_fault_of_the_gateway_is_500() -> None:
    with served() as gateway, Raw(gateway.port) as client:
        gateway.service.outputs = lambda _: (NamedTensor("y", "FP32", (1, 9), b"abcd"),)
        assert plain(client, "echo", {"inputs": [1, 2, 3, 4]}).status == 500
