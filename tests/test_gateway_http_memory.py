"""System shared memory by HTTP: regions of clients of this host, for inputs and outputs."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from gateway_http_rig import FakeService, Raw, Reply, Served, inference, request, served, x_of

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


def in_region(name: str, datatype: str, shape: list[int], **more: Any) -> dict[str, Any]:
    parameters = {"shared_memory_region": "ins", **more}
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}


def register(client: Raw, region: str, **body: Any) -> Reply:
    return client.ask(
        request(f"/v2/systemsharedmemory/region/{region}/register", json.dumps(body).encode())
    )


def test_regions_are_registered_shown_and_forgotten(gateway: Served, client: Raw) -> None:
    assert register(client, "ins", key="/inputs", offset=8, byte_size=64).body == b""
    assert register(client, "outs", key="/outputs", byte_size=64).status == 200
    shown = client.ask(request("/v2/systemsharedmemory/region/ins/status")).json
    assert shown == [{"name": "ins", "key": "/inputs", "offset": 8, "byte_size": 64}]
    regions: Any = gateway.service.regions
    regions.memory["/inputs"][8 + 4 : 8 + 20] = FOUR
    given = in_region("x", "FP32", [1, 4], shared_memory_offset=4, shared_memory_byte_size=16)
    into = {"shared_memory_region": "outs", "shared_memory_byte_size": 32}
    reply = client.ask(
        inference({"inputs": [given], "outputs": [{"name": "y", "parameters": into}]})
    )
    assert reply.json["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4]}]
    assert regions.memory["/outputs"][:16] == FOUR
    assert (
        client.ask(request("/v2/systemsharedmemory/region/ins/unregister", method="POST")).status
        == 200
    )
    assert len(client.ask(request("/v2/systemsharedmemory/status")).json) == 1
    assert client.ask(request("/v2/systemsharedmemory/unregister", method="POST")).status == 200
    assert client.ask(request("/v2/systemsharedmemory/status")).json == []


def test_regions_that_are_wrong(client: Raw) -> None:
    assert (
        "region name"
        in client.ask(
            request("/v2/systemsharedmemory/register", b'{"key": "/inputs", "byte_size": 3}')
        ).error
    )
    assert register(client, "a", byte_size=3).error.endswith("has no 'key' field")
    assert register(client, "a", key="/inputs").error.endswith("has no 'byte_size' field")
    for body in ({"key": 3, "byte_size": 1}, {"key": "/inputs", "byte_size": -1}):
        assert register(client, "a", **body).status == 400
    assert "Unable to open" in register(client, "a", key="/nope", byte_size=3).error
    unknown = {"inputs": [in_region("x", "FP32", [1])]}
    assert "Unable to find" in client.ask(inference(unknown)).error
    into = {"shared_memory_region": "outs", "binary_data": True}
    both = x_of(1, outputs=[{"name": "y", "parameters": into}])
    assert "can't set both" in client.ask(inference(both)).error


def test_a_request_takes_no_more_out_of_regions_than_it_may_have_bytes() -> None:
    with served(max_request_bytes=1000) as gateway, Raw(gateway.port) as client:
        register(client, "ins", key="/inputs", byte_size=4096)
        one = in_region("x", "UINT8", [1, 400], shared_memory_byte_size=400)
        assert client.ask(inference({"inputs": [one]})).status == 200
        assert client.ask(inference({"inputs": [one, one]})).status == 200
        assert client.ask(inference({"inputs": [one, one, one]})).status == 413


def test_shared_memory_may_be_off() -> None:
    with served(shared_memory=False) as gateway, Raw(gateway.port) as client:
        reply = register(client, "ins", key="/inputs", byte_size=64)
        assert reply.status == 501 and "is off" in reply.error
        assert client.ask(request("/v2/systemsharedmemory/status")).json == []
        assert client.ask(request("/v2/systemsharedmemory/unregister", method="POST")).status == 200
        assert "is off" in client.ask(inference({"inputs": [in_region("x", "FP32", [1])]})).error


def test_clients_of_other_hosts_have_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slosched.fronts.http.connection.is_loopback", lambda _: False)
    service = FakeService()
    with served(service) as gateway, Raw(gateway.port) as client:
        service.regions.register("ins", "/inputs", 0, 64)
        assert register(client, "more", key="/inputs", byte_size=64).status == 501
        assert client.ask(request("/v2/systemsharedmemory/unregister", method="POST")).status == 200
        assert client.ask(request("/v2/systemsharedmemory/status")).json == []
        refused = client.ask(inference({"inputs": [in_region("x", "FP32", [1])]}))
        assert refused.status == 400 and "gateway's host" in refused.error
        assert len(service.regions.status("")) == 1


def test_cuda_shared_memory_is_unregistered_and_not_registered(client: Raw) -> None:
    for path in ("/unregister", "/region/a/unregister"):
        assert client.ask(request(f"/v2/cudasharedmemory{path}", method="POST")).status == 200
    assert client.ask(request("/v2/cudasharedmemory/region/a/register", b"{}")).status == 501
    assert client.ask(request("/v2/cudasharedmemory/status")).json == []
    unknown = client.ask(request("/v2/cudasharedmemory/region/a/status"))
    assert unknown.status == 404
    assert unknown.error == "Unable to find cuda shared memory region: 'a'"
    # A region without a name is none, and not all.
    for memory in ("system", "cuda"):
        assert client.ask(request(f"/v2/{memory}sharedmemory/region//status")).status == 404
        path = f"/v2/{memory}sharedmemory/region//unregister"
        assert client.ask(request(path, method="POST")).status == 404
