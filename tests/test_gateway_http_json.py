"""What a gateway reads and writes as JSON: what stands around it, and how much of it there may be."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest

from gateway_http_rig import FakeService, Raw, inference, request, served, x_of
from slosched.fronts.asked import NamedTensor
from slosched.fronts.http.elements import MOST_ELEMENTS, MOST_LISTS

FOUR = struct.pack("4f", 1, 2, 3, 4)
X = {"name": "x", "datatype": "FP32", "shape": [1, 2]}


@pytest.fixture
def client() -> Iterator[Raw]:
    with served() as gateway, Raw(gateway.port) as raw:
        yield raw
        assert not gateway.failures


def test_a_byte_order_mark_before_json_is_left_out(client: Raw) -> None:
    x = X | {"shape": [1, 4], "parameters": {"binary_data_size": 16}}
    text = b"\xef\xbb\xbf" + json.dumps({"inputs": [x]}).encode()
    line = f"inference-header-content-length: {len(text)}"
    in_json = b"\xef\xbb\xbf" + json.dumps(x_of(1, 2)).encode()
    for body, lines in ((text + FOUR, (line,)), (in_json, ())):
        assert client.ask(request("/v2/models/echo/infer", body, *lines)).status == 200


def test_json_of_too_many_objects_is_refused_before_it_is_read(client: Raw) -> None:
    """16 MiB of lists of one number would take seconds, in which no other client is served."""
    lists, ones = MOST_LISTS, MOST_ELEMENTS
    for datatype, count, data, words in (
        ("FP32", lists, b"[" + b"[1]," * (lists - 1) + b"[1]]", "lists"),
        ("FP32", lists, b"[" + b"[1]," * (lists - 1) + b"[NaN]]", "lists"),
        ("UINT8", ones + 1, b"[" + b"1," * ones + b"1]", "elements"),
    ):
        x = json.dumps(X | {"datatype": datatype, "shape": [1, count], "data": []}).encode()
        body = b'{"inputs": [%b]}' % x.replace(b"[]", data)
        reply = client.ask(request("/v2/models/echo/infer", body))
        assert reply.status == 400 and words in reply.error
    # All inputs of a request count together.
    half = b"[" + b"[1]," * (lists // 2) + b"[1]]"
    x = json.dumps(X | {"shape": [1, lists // 2 + 1], "data": []}).encode().replace(b"[]", half)
    reply = client.ask(request("/v2/models/echo/infer", b'{"inputs": [%b, %b]}' % (x, x)))
    assert reply.status == 400 and "lists" in reply.error
    body = b'{"inputs": [' + b"[1]," * lists + b"[1]]}"
    reply = client.ask(request("/v1/infer/echo", body))
    assert reply.status == 400 and "lists" in reply.error


def test_an_answer_of_too_many_elements_is_given_as_binary_data_alone() -> None:
    service = FakeService()
    many = NamedTensor("y", "UINT8", (1, MOST_ELEMENTS), bytes(MOST_ELEMENTS))
    one = NamedTensor("z", "BOOL", (1, 1), b"\1")
    service.outputs = lambda _: (many, one)
    with served(service) as gateway, Raw(gateway.port) as client:
        reply = client.ask(inference(x_of(1)))
        assert reply.status == 400 and "binary data" in reply.error
        assert client.ask(request("/v1/infer/echo", b'{"inputs": [1, 2, 3, 4]}')).status == 400
        binary = x_of(
            1, outputs=[{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}]
        )
        assert client.ask(inference(binary)).status == 200


def test_a_parameter_is_one_value(client: Raw) -> None:
    for value, status in ((b"1.5", 200), (b"NaN", 400), (b"[]", 400), (b"null", 400)):
        body = json.dumps(x_of(1, parameters={"own": "#", "timeout": 10})).encode()
        sent = request("/v2/models/echo/infer", body.replace(b'"#"', value))
        assert client.ask(sent).status == status


def test_long_json_is_refused_before_it_is_read(client: Raw) -> None:
    reply = client.ask(request("/v2/models/echo/infer", b"{}" + b" " * 16 * 2**20))
    assert reply.status == 413 and "binary data" in reply.error
