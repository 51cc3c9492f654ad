"""The protocol by HTTP: paths, JSON and binary bodies, shared memory, and the form of errors."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from gateway_http_rig import FakeService, Raw, Served, inference, request, served, x_of
from slosched.fronts.asked import NamedTensor
from slosched.fronts.http.elements import to_bytes, values_of

FOUR = struct.pack("4f", 1, 2, 3, 4)


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with served() as gateway:
        yield gateway
        assert not gateway.failures
        assert gateway.front._bounds.held == 0


@pytest.fixture
def gateway(running: Served) -> Served:
    running.service.asked.clear()
    return running


@pytest.fixture
def client(gateway: Served) -> Iterator[Raw]:
    with Raw(gateway.port) as raw:
        yield raw


def binary(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    parameters = {"binary_data_size": size}
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}


# ------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/v2", {"name": "fake", "version": "1", "extensions": ["binary_tensor_data"]}),
        ("/v2/models/echo/config", {"name": "echo", "max_batch_size": 4, "version": ""}),
        (
            "/v2/models/a%20b/versions/2/config",
            {"name": "a b", "max_batch_size": 4, "version": "2"},
        ),
        ("/v2/models/ready/config?x=y", {"name": "ready", "max_batch_size": 4, "version": ""}),
        ("/v2/models/stats", {"model_stats": [{"name": "", "version": ""}]}),
        ("/v2/models/echo/stats", {"model_stats": [{"name": "echo", "version": ""}]}),
        ("/v2/models/echo/versions/3/stats", {"model_stats": [{"name": "echo", "version": "3"}]}),
        ("/v2/systemsharedmemory/status", []),
        ("/v2/cudasharedmemory/status", []),
    ],
)
def test_documents(client: Raw, path: str, answer: object) -> None:
    reply = client.ask(request(path))
    assert (reply.status, reply.json) == (200, answer)
    assert reply.headers["content-type"] == "application/json"


def test_metadata_is_of_the_version_that_is_asked(client: Raw) -> None:
    for path, version in (("", "1"), ("/versions/7", "7")):
        found = client.ask(request(f"/v2/models/grid{path}")).json
        assert found["versions"] == [version]
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}]


def test_health_and_readiness(gateway: Served, client: Raw) -> None:
    for path, status in (
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/echo/ready", 200),
        ("/v2/models/echo/versions/1/ready", 200),
        ("/v2/models/echo/versions/2/ready", 400),
        ("/v2/models/nope/ready", 400),
    ):
        assert client.ask(request(path)).status == status, path
    gateway.service.is_ready = False
    assert client.ask(request("/v2/health/ready")).status == 400
    gateway.service.is_ready = True


def test_the_repository(gateway: Served, client: Raw) -> None:
    assert client.ask(request("/v2/repository/index", method="POST")).json[0]["ready"] is False
    assert client.ask(request("/v2/repository/index", b'{"ready": true}')).json[0]["ready"] is True
    assert client.ask(request("/v2/repository/models/a/load", method="POST")).status == 200
    body = b'{"parameters": {"config": "{}"}}'
    assert client.ask(request("/v2/repository/models/b%3A2/load", body)).body == b""
    assert gateway.service.loaded == [("a", {}), ("b:2", {"config": "{}"})]
    lists = b'{"parameters": {"unload_dependents": [[], []]}}'  # which a wait would hold
    assert client.ask(request("/v2/repository/models/b/unload", lists)).status == 400
    gone = client.ask(request("/v2/repository/models/b/unload", b"{}"))
    assert (gone.status, gone.error) == (404, "unknown model 'b'")
    wrong = client.ask(request("/v2/repository/models/a/load", b"{]"))
    assert wrong.status == 400 and "JSON" in wrong.error
    long = client.ask(request("/v2/repository/models/a/load", b" " * 2**20 + b"{}"))
    assert long.status == 413


def test_metrics_and_what_is_off(client: Raw) -> None:
    metrics = client.ask(request("/metrics"))
    assert metrics.body == b"gateway_requests 3\n"
    assert metrics.headers["content-type"].startswith("text/plain")
    for path in ("/v2/trace/setting", "/v2/models/echo/trace/setting", "/v2/logging"):
        for method in ("GET", "POST"):
            reply = client.ask(request(path, method=method))
            assert reply.status == 503 and "does not support" in reply.error


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v2/",
        "/v2/nope",
        "/v2/models",
        "/v2/models/",
        "/v2/models/a/versions/one/infer",
        "//",
        "/v2/models/a/b",
        "/v1/infer/",
        "/v2/health/",
        "/v2/repository/models/load",
        "/v2/models//infer",
        "/v2/systemsharedmemory/a/status",
        "/v2/systemsharedmemory/region/a/nope",
        "/v2/health/live/",
    ],
)
def test_paths_that_are_not_there(client: Raw, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        reply = client.ask(request(path, method=method))
        assert (reply.status, reply.json) == (404, {"error": "Not Found"})


def test_methods_that_are_not_there(client: Raw) -> None:
    for path, method, allowed in (
        ("/v2", "POST", "GET, HEAD"),
        ("/v2/models/echo/infer", "GET", "POST"),
        ("/v2/models/echo/infer", "PUT", "POST"),
        ("/v2/repository/index", "GET", "POST"),
        ("/v2/systemsharedmemory/status", "DELETE", "GET, HEAD"),
        ("/v2/health/live", "OPTIONS", "GET, HEAD"),
    ):
        reply = client.ask(request(path, method=method))
        assert (reply.status, reply.error) == (405, "Method Not Allowed")
        assert reply.headers["allow"] == allowed


# --------------------------------------------------------------------------------- inference


def test_json_in_and_out(gateway: Served, client: Raw) -> None:
    sent = inference(x_of(1, 2, 3, 4, id="seven", parameters={"timeout": 2500, "own": "x"}))
    assert client.ask(sent).json == {
        "id": "seven",
        "model_name": "echo",
        "model_version": "1",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}],
    }
    (asked,) = gateway.service.asked
    assert asked.inputs == (NamedTensor("x", "FP32", (1, 4), FOUR),)
    assert (asked.id, asked.slo_ns, asked.model, asked.version) == ("seven", 2_500_000, "echo", "")


def test_binary_in_and_out_is_a_part_of_the_body(gateway: Served, client: Raw) -> None:
    document = {"inputs": [binary("x", "FP32", [1, 4], 16), binary("z", "INT8", [3], 3)]}
    both = {**document, "parameters": {"binary_data_output": True}}
    reply = client.ask(inference(both, FOUR, b"abc"))
    length = int(reply.headers["inference-header-content-length"])
    assert reply.headers["content-type"] == "application/octet-stream"
    outputs = json.loads(reply.body[:length])["outputs"]
    assert [each["parameters"]["binary_data_size"] for each in outputs] == [16, 3]
    assert reply.body[length:] == FOUR + b"abc"
    first, second = gateway.service.asked[0].inputs
    assert isinstance(first.data, memoryview) and isinstance(second.data, memoryview)
    assert first.data.obj is second.data.obj

    outputs = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    reply = client.ask(inference({**both, "outputs": outputs}, FOUR, b"abc"))
    length = int(reply.headers["inference-header-content-length"])
    found = {each["name"]: each for each in json.loads(reply.body[:length])["outputs"]}
    assert found["y"]["data"] == [1, 2, 3, 4] and reply.body[length:] == b"abc"
    assert [each.binary for each in gateway.service.asked[1].wanted] == [True, False]


def test_an_input_of_no_bytes_beside_others(client: Raw) -> None:
    document = {"inputs": [binary("x", "FP32", [0, 4], 0), binary("z", "INT8", [3], 3)]}
    outputs = client.ask(inference(document, b"abc")).json["outputs"]
    assert [each["data"] for each in outputs] == [[], [97, 98, 99]]


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False, True]),
        ("UINT8", [0, 255, 7]),
        ("INT8", [-128, 127, 0]),
        ("UINT16", [0, 65535, 1]),
        ("INT16", [-32768, 32767, 0]),
        ("UINT32", [0, 2**32 - 1, 1]),
        ("INT32", [-(2**31), 2**31 - 1, 0]),
        ("UINT64", [0, 2**64 - 1, 1]),
        ("INT64", [-(2**63), 2**63 - 1, 0]),
        ("FP32", [0.5, -3.0, 16777216.0]),
        ("FP64", [0.1, -1e300, 5e-324]),
        ("BYTES", ["", "äöü €", '"\\\n']),
    ],
)
def test_every_datatype_goes_through_json_and_back(
    client: Raw, datatype: str, values: list[Any]
) -> None:
    given = {"name": "x", "datatype": datatype, "shape": [1, 3]}
    for data in (values, [values], [[values[0]], values[1:]]):
        reply = client.ask(inference({"inputs": [{**given, "data": data}]}))
        assert reply.json["outputs"][0]["data"] == values, reply.json


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_is_binary_alone(client: Raw, datatype: str) -> None:
    given = {"name": "x", "datatype": datatype, "shape": [1]}
    reply = client.ask(inference({"inputs": [{**given, "data": [1]}]}))
    assert reply.status == 400
    assert reply.error.startswith(f"receiving {datatype} data via JSON is not supported")
    document = {"inputs": [binary("x", datatype, [1], 2)]}
    assert "sending" in client.ask(inference(document, b"\0\x3c")).error
    document["parameters"] = {"binary_data_output": True}  # type: ignore[assignment]
    assert client.ask(inference(document, b"\0\x3c")).body.endswith(b"\0\x3c")


def test_half_precision_in_numbers() -> None:
    assert values_of(to_bytes([1.5, -2, 65504.0], "FP16"), "FP16", 3) == [1.5, -2, 65504.0]
    assert values_of(to_bytes([1.5, -2, 3e38], "BF16"), "BF16", 3) == pytest.approx(
        [1.5, -2, 3e38], rel=0.01
    )
    assert to_bytes([1.00390625], "BF16") == b"\x80\x3f"  # a tie goes to the even one
    assert to_bytes([1.01171875], "BF16") == b"\x82\x3f"
    for datatype in ("FP16", "FP32", "BF16"):
        with pytest.raises(ValueError, match="fit"):
            to_bytes([1e39], datatype)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
def test_what_json_has_no_number_for_travels_as_in_triton(client: Raw, datatype: str) -> None:
    values = [1.5, math.nan, math.inf, -math.inf]
    given = {"name": "x", "datatype": datatype, "shape": [1, 4]}
    for data in (values, [[values[0]], values[1:]]):
        reply = client.ask(inference({"inputs": [{**given, "data": data}]}))
        assert b"[1.5,NaN,Infinity,-Infinity]" in reply.body
    sent = inference({"inputs": [{**given, "datatype": "INT32", "data": values}]})
    assert "not whole" in client.ask(sent).error
    sent = request("/v2/models/echo/infer", b'{"inputs": [NaN]}')
    assert "Expected `object`, got `float`" in client.ask(sent).error


def test_bytes_that_are_not_texts_are_binary_alone(client: Raw) -> None:
    data = struct.pack("<I", 2) + b"\xff\xfe"
    document: dict[str, Any] = {"inputs": [binary("x", "BYTES", [1], 6)]}
    assert "UTF-8" in client.ask(inference(document, data)).error
    document["outputs"] = [{"name": "y", "parameters": {"binary_data": True}}]
    assert client.ask(inference(document, data)).body.endswith(data)


X = {"name": "x", "datatype": "FP32", "shape": [1, 2]}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "inputs"),
        ({"inputs": {}}, "inputs"),
        ([], "object"),
        ({"inputs": [{**X, "name": 3, "data": [1, 2]}]}, "name"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "data": [1]}]}, "shape"),
        ({"inputs": [{**X, "shape": [1, -2], "data": [1, 2]}]}, "shape"),
        ({"inputs": [{**X, "shape": [1, 1.5], "data": [1, 2]}]}, "shape"),
        ({"inputs": [{**X, "shape": [2**62, 2**62], "data": [1, 2]}]}, "2 elements came"),
        ({"inputs": [{**X, "shape": [1] * 18, "data": [1]}]}, "shape"),
        ({"inputs": [X]}, "no field is set"),
        (
            {"inputs": [{**X, "data": [1, 2], "parameters": {"binary_data_size": 8}}]},
            "'data' 'binary",
        ),
        ({"inputs": [{**X, "data": [1, 2, 3]}]}, "3 elements came"),
        ({"inputs": [{**X, "data": [[1], [2, 3]]}]}, "3 elements came"),
        ({"inputs": [{**X, "data": [[1], 2]}]}, "beside lists"),
        ({"inputs": [{**X, "data": [1, "2"]}]}, "a text is among"),
        ({"inputs": [{**X, "data": [1, None]}]}, "null is among"),
        ({"inputs": [{**X, "data": [1, True]}]}, "true or false is among"),
        ({"inputs": [{**X, "data": [1, 1e39]}]}, "does not fit"),
        ({"inputs": [{**X, "data": {"a": 1}}]}, "1 elements came"),
        ({"inputs": [{**X, "datatype": "INT8", "data": [1, 128]}]}, "does not fit"),
        ({"inputs": [{**X, "datatype": "INT8", "data": [1, 1.5]}]}, "not whole"),
        ({"inputs": [{**X, "datatype": "UINT8", "data": [1, -1]}]}, "does not fit"),
        ({"inputs": [{**X, "datatype": "INT64", "data": [1, 2**64]}]}, "does not fit"),
        ({"inputs": [{**X, "datatype": "BOOL", "data": [1, 0]}]}, "a number is among"),
        ({"inputs": [{**X, "datatype": "BYTES", "data": ["a", 2]}]}, "a number is among"),
        ({"inputs": [{**X, "datatype": "FP12", "data": [1, 2]}]}, "invalid datatype"),
        ({"inputs": [], "parameters": {"timeout": -1}}, "timeout"),
        ({"inputs": [], "parameters": {"timeout": 1.5}}, "timeout"),
        ({"inputs": [], "parameters": {"a": [1]}}, "invalid type"),
        ({"inputs": [], "parameters": {"a": None}}, "invalid type"),
        ({"inputs": [], "parameters": {"triton_x": 1}}, "reserved"),
        ({"inputs": [], "parameters": {"binary_data_output": 1}}, "binary_data_output"),
        ({"inputs": [], "parameters": {str(each): 1 for each in range(65)}}, "parameters"),
        ({"inputs": [X] * 65}, "inputs"),
        ({"inputs": [], "id": "x" * 1025}, "id"),
        ({"inputs": [], "outputs": {"y": 1}}, "outputs"),
        (
            {"inputs": [], "outputs": [{"name": "y", "parameters": {"classification": 3}}]},
            "classification",
        ),
    ],
)
def test_a_document_that_is_wrong(gateway: Served, client: Raw, document: Any, words: str) -> None:
    reply = client.ask(inference(document))
    assert reply.status == 400 and words in reply.error, reply.body
    assert not gateway.service.asked


def with_data(data: bytes, datatype: bytes = b"FP32") -> bytes:
    head = b'{"inputs":[{"name":"x","datatype":"%b","shape":[1],"data":[' % datatype
    return head + data + b"]}]}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b'"a"',
        b"NaN",
        b'{"inputs": [], "inputs": 3}',
        b'{"inputs":[' + b"[" * 10**5,
        with_data(b"nan"),
        with_data(b"Infinity,"),
        with_data(b"1e999"),
        with_data(b"1e999,NaN"),
        with_data(b"01"),
        with_data(b"+1"),
        with_data(b"[" * 50 + b"]" * 50),
        with_data(b"[" * 10**4 + b"]" * 10**4),
        with_data(b'"\\ud800"', b"BYTES"),
        with_data(b"NaN").replace(b'"x"', b'"\\ud800"'),
    ],
)
def test_json_that_is_none(client: Raw, body: bytes) -> None:
    reply = client.ask(request("/v2/models/echo/infer", body, method="POST"))
    assert reply.status == 400 and reply.error
    assert client.ask(inference(x_of(1))).status == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("", 400),
        ("abc", 400),
        ("-1", 400),
        ("0", 400),
        ("999", 400),
        ("9" * 40, 400),
        ("1.5", 400),
        ("0x10", 400),
        ("\xb2", 400),
        ("10", 400),
        ("73", 200),
    ],
)
def test_the_length_of_the_json_may_be_a_lie(client: Raw, header: str, status: int) -> None:
    body = json.dumps({"inputs": [binary("x", "UINT8", [1], 1)], "id": ""}, separators=(",", ":"))
    text = body.encode().ljust(73) if len(body) < 73 else body.encode()
    sent = text + b"a"
    header = str(len(text)) if status == 200 else header
    reply = client.ask(
        request("/v2/models/echo/infer", sent, f"inference-header-content-length: {header}")
    )
    assert reply.status == status, reply.body


@pytest.mark.parametrize(
    ("size", "sent", "words"),
    [
        (16, FOUR[:-1], "expecting 1 additional bytes"),
        (16, FOUR + b"!", "unexpected additional input data"),
        (2**60, FOUR, "additional bytes"),
        (-1, FOUR, "binary_data_size"),
        ("16", FOUR, "binary_data_size"),
    ],
)
def test_sizes_of_binary_data_that_are_wrong(
    gateway: Served, client: Raw, size: Any, sent: bytes, words: str
) -> None:
    reply = client.ask(inference({"inputs": [binary("x", "FP32", [1, 4], size)]}, sent))
    assert reply.status == 400 and words in reply.error, reply.body
    assert not gateway.service.asked


def test_the_slo_is_a_parameter_or_a_header(gateway: Served, client: Raw) -> None:
    def slo_of(sent: dict[str, Any], *lines: str) -> int:
        text = json.dumps(sent).encode()
        reply = client.ask(request("/v2/models/echo/infer", text, *lines))
        assert reply.status == 200, reply.body
        return gateway.service.asked[-1].slo_ns

    assert slo_of(x_of(1)) == 0
    assert slo_of(x_of(1), "slosched-slo: 25ms") == 25_000_000
    assert slo_of(x_of(1, parameters={"timeout": 7}), "Slosched-SLO: 25ms") == 7_000
    wrong = client.ask(
        request("/v2/models/echo/infer", json.dumps(x_of(1)).encode(), "slosched-slo: x")
    )
    assert wrong.status == 400 and "slosched-slo" in wrong.error


def test_errors_carry_what_the_controller_said(client: Raw) -> None:
    reply = client.ask(inference(x_of(1), model="refused"))
    assert reply.status == 503
    assert reply.json == {
        "error": "could not start in time",
        "slosched-code": 8,
        "slosched-predicted-start-us": 5000,
        "slosched-time-left-us": 2500,
    }
    assert reply.headers["slosched-code"] == "8"
    assert reply.headers["slosched-time-left-us"] == "2500"
    assert "slosched-predicted-exec-us" not in reply.headers
    limited = client.ask(inference(x_of(1), model="limited"))
    assert (limited.status, limited.headers["retry-after"]) == (429, "1")


def test_a_late_answer_says_so(client: Raw) -> None:
    assert client.ask(inference(x_of(1), model="late")).headers["slosched-in-time"] == "0"
    assert "slosched-in-time" not in client.ask(inference(x_of(1))).headers


def test_a_large_answer_is_whole(client: Raw) -> None:
    data = bytes(range(256)) * 20_000
    form = binary("x", "UINT8", [1, len(data)], len(data))
    document = {"inputs": [form], "parameters": {"binary_data_output": True}}
    for _ in range(3):
        assert client.ask(inference(document, data)).body.endswith(data)


# ------------------------------------------------------------------------------- other waits


def test_a_load_goes_on_when_its_client_leaves() -> None:
    service = FakeService()
    with served(service) as gateway:
        service.loading = gateway.do(asyncio.Event)
        with Raw(gateway.port) as client:
            client.send(request("/v2/repository/models/a/load", method="POST"))
            gateway.until(lambda: len(gateway.front._routes._running) == 1)
        with Raw(gateway.port) as other:
            assert other.ask(request("/v2")).status == 200
        assert not service.loaded
        gateway.do(service.loading.set)
        gateway.until(lambda: service.loaded == [("a", {})])
        gateway.until(lambda: gateway.front.connections == 0)


def test_localhost_is_served_on_both_addresses() -> None:
    for bind in ("127.0.0.1", "localhost"):
        with served(bind=bind) as gateway:
            for host in ("127.0.0.1", "::1"):
                try:
                    with Raw(gateway.port, host) as client:
                        assert client.ask(request("/v2")).status == 200
                except OSError:
                    assert host == "::1" and len(gateway.front._servers) == 1  # a host without IPv6
