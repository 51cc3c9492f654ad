"""A mixed load of every form of request at once, beside clients that die, break off, cancel and read slowly.

Pipelined HTTP with binary, JSON and plain bodies, with and without TLS, gRPC by calls and by a stream, and
shared memory: each answer is that of its own request, computed here, and what clients left is given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import ssl
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

import certificates
from gateway_rig import until
from live_gateway import Gateway, grpc_port, serving, serving_models
from slosched import Client
from slosched.experiment.children import Children
from triton_clients import Array, Arrays

pytestmark = [pytest.mark.processes, pytest.mark.torch]

#: Answers that are compared, in all forms, and how many requests stand in a pipeline.
ANSWERS, DEPTH = 600, 6
WITHIN_S = 120.0
MODELS = ("pair", "seen", "shouts")
_TYPES = {"float32": "FP32", "int64": "INT64", "object": "BYTES"}
_REGION_KEY = "/slosched_disturbed"


# ------------------------------------------------------------------- requests and their answers


def row_inputs(name: str, rows: int, draw: np.random.Generator) -> dict[str, Array]:
    """The inputs of a batch."""
    if name == "pair":
        return {key: draw.standard_normal((rows, 2, 3), np.float32) for key in ("a", "b")}
    if name == "seen":
        shape = (rows, int(draw.integers(1, 17)))
        return {"ids": draw.integers(0, 10**12, shape), "mask": draw.integers(0, 2, shape)}
    words = ["", "a", "stra\u00dfe", "\x01", "x" * 40]
    texts = [words[int(draw.integers(len(words)))].encode() for _ in range(2 * rows)]
    return {"texts": np.array(texts, np.object_).reshape(rows, 2)}


def answers(name: str, inputs: Arrays) -> dict[str, Array]:
    """What gateway_models.py makes of them, which is exact."""
    if name == "pair":
        return {"sum": inputs["a"] + inputs["b"], "difference": inputs["a"] - inputs["b"]}
    if name == "seen":
        shown = inputs["ids"] * inputs["mask"]
        return {"seen": shown.cumsum(1), "shown": inputs["mask"].sum(1)}
    flat = [text.upper() for text in inputs["texts"].ravel()]
    sizes = np.array([len(text) for text in flat], np.int64)
    shape = inputs["texts"].shape
    return {"loud": np.array(flat, np.object_).reshape(shape), "sizes": sizes.reshape(shape)}


def packed(array: Array) -> bytes:
    if array.dtype != np.object_:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(each)) + each for each in array.ravel())


def as_json(array: Array) -> list[Any]:
    return [each.decode() if isinstance(each, bytes) else each for each in array.ravel().tolist()]


def post(path: str, body: bytes, *lines: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: localhost", "slosched-slo: 60s", *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


def tensors(inputs: Arrays) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": _TYPES[str(each.dtype)], "shape": list(each.shape)}
        for name, each in inputs.items()
    ]


class Asked:
    """A random request: its bytes over HTTP in one of three forms, and the body that must come back."""

    def __init__(self, draw: np.random.Generator) -> None:
        self.name = str(draw.choice(MODELS))
        self.form = str(draw.choice(("binary", "json", "plain")))
        rows = 1 if self.form == "plain" else int(draw.choice((1, 1, 2, 3, 8, 16)))
        self.inputs = row_inputs(self.name, rows, draw)
        self.wanted = answers(self.name, self.inputs)
        self.id = str(draw.integers(10**9))

    def http(self) -> bytes:
        if self.form == "plain":
            values = {key: as_json(each) for key, each in self.inputs.items()}
            body = json.dumps({"inputs": values, "id": self.id}).encode()
            return post(f"/v1/infer/{self.name}", body)
        path, described = f"/v2/models/{self.name}/infer", tensors(self.inputs)
        tail = b""
        for each, array in zip(described, self.inputs.values(), strict=True):
            if self.form == "json":
                each["data"] = as_json(array)
            else:
                each["parameters"] = {"binary_data_size": len(packed(array))}
                tail += packed(array)
        form = {"binary_data_output": self.form == "binary"}
        document = {"id": self.id, "inputs": described, "parameters": form}
        text = json.dumps(document).encode()
        lines = (f"inference-header-content-length: {len(text)}",) if tail else ()
        return post(path, text + tail, *lines)

    def check_http(self, headers: dict[bytes, bytes], body: bytes) -> None:
        size = int(headers.get(b"inference-header-content-length", b"%d" % len(body)))
        document, tail = json.loads(body[:size]), body[size:]
        assert document["id"] == self.id, (document["id"], self.id)
        if self.form == "plain":
            found = {name: np.array(each) for name, each in document["outputs"].items()}
            for name, each in self.wanted.items():
                assert found[name].ravel().tolist() == as_json(each), self.name
            return
        for shown in document["outputs"]:
            wanted = self.wanted[shown["name"]]
            assert shown["shape"] == list(wanted.shape)
            if self.form == "json":
                assert shown["data"] == as_json(wanted), self.name
            else:
                count = shown["parameters"]["binary_data_size"]
                assert tail[:count] == packed(wanted), self.name
                tail = tail[count:]
        assert not tail and len(document["outputs"]) == len(self.wanted)

    def rpc(self) -> Any:
        made = pb.ModelInferRequest(model_name=self.name, id=self.id)
        made.parameters["timeout"].int64_param = 60_000_000
        for each, array in zip(tensors(self.inputs), self.inputs.values(), strict=True):
            made.inputs.add(**each)
            made.raw_input_contents.append(packed(array))
        return made

    def check_rpc(self, found: Any) -> None:
        assert found.id == self.id
        shown = [each.name for each in found.outputs]
        assert shown == [*self.wanted]
        for name, data in zip(shown, found.raw_output_contents, strict=True):
            assert data == packed(self.wanted[name]), self.name


# ------------------------------------------------------------------------------------ the load


class Load:
    """Clients of all kinds, until `ANSWERS` are compared."""

    def __init__(self, gateway: Gateway, secure: tuple[str, str], trusted: Path, seed: int) -> None:
        self.gateway, self.secure, self.trusted = gateway, secure, trusted
        self.draw = np.random.default_rng(seed)
        self.random = random.Random(seed)
        self.compared: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.refused = 0  # by a controller whose core others keep busy

    @property
    def going(self) -> bool:
        return self.compared.total() < ANSWERS

    async def run(self) -> None:
        context = ssl.create_default_context(cafile=str(self.trusted))
        trust = grpc.ssl_channel_credentials(self.trusted.read_bytes())
        plain = grpc.aio.insecure_channel(self.gateway.grpc)
        over_tls = grpc.aio.secure_channel(self.secure[1], trust)
        async with plain, over_tls:
            await asyncio.gather(
                *(self.pipeline(self.gateway.http, None) for _ in range(3)),
                *(self.pipeline(self.secure[0], context) for _ in range(2)),
                self.pipeline(self.gateway.http, None, slow=True),
                *(self.calls(plain, "grpc") for _ in range(4)),
                *(self.calls(over_tls, "grpc with TLS") for _ in range(2)),
                *(self.stream(channel) for channel in (plain, over_tls)),
                *(self.memory(place) for place in range(2)),
                *(self.break_off(address) for address in (self.gateway.http, self.secure[0])),
                self.cancel(plain),
                self.kill(),
            )

    async def pipeline(
        self, address: str, context: ssl.SSLContext | None, *, slow: bool = False
    ) -> None:
        """Requests one behind the other on one connection; `slow`: its client takes a long time to read."""
        host, _, port = address.rpartition(":")
        way = "slow HTTP" if slow else f"HTTP{'S' if context else ''}"
        reader, writer = await asyncio.open_connection(
            host, int(port), ssl=context, limit=2**12 if slow else 2**20
        )
        while self.going:
            asked = [Asked(self.draw) for _ in range(20 * DEPTH if slow else DEPTH)]
            sending = asyncio.ensure_future(_sent(writer, [each.http() for each in asked]))
            for each in asked:
                if slow:
                    await asyncio.sleep(0.01)
                status, headers, body = await _answer(reader)
                if not self.is_refused(status != 200, body.decode("latin-1")):
                    each.check_http(headers, body)
                    self.compared[f"{way} {each.form}"] += 1
            await sending
        writer.close()

    async def calls(self, channel: grpc.aio.Channel, way: str) -> None:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while self.going:
            asked = Asked(self.draw)
            try:
                asked.check_rpc(await stub.ModelInfer(asked.rpc(), timeout=WITHIN_S))
                self.compared[way] += 1
            except grpc.aio.AioRpcError as error:
                assert self.is_refused(True, str(error.details()))

    async def stream(self, channel: grpc.aio.Channel) -> None:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        asked: dict[str, Asked] = {}
        room = asyncio.Semaphore(DEPTH)

        async def requests() -> AsyncIterator[Any]:
            while self.going:
                await room.acquire()
                each = Asked(self.draw)
                asked[each.id] = each
                yield each.rpc()

        async for found in stub.ModelStreamInfer(requests()):
            each = asked.pop(found.infer_response.id)
            if not self.is_refused(bool(found.error_message), found.error_message):
                each.check_rpc(found.infer_response)
                self.compared["stream"] += 1
            room.release()
        assert not asked

    async def memory(self, place: int) -> None:
        """Inputs and outputs of `pair` in shared memory, over HTTP."""
        name, key = f"disturbed{place}", f"{_REGION_KEY}{place}"
        path = Path("/dev/shm") / key[1:]
        path.write_bytes(bytes(4096))
        host, _, port = self.gateway.http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            control = f"/v2/systemsharedmemory/region/{name}"
            body = json.dumps({"key": key, "offset": 0, "byte_size": 4096}).encode()
            writer.write(post(f"{control}/register", body))
            assert (await _answer(reader))[0] == 200
            while self.going:
                await self._in_memory(name, path, reader, writer)
            writer.write(post(f"{control}/unregister", b""))
            assert (await _answer(reader))[0] == 200
        finally:
            writer.close()
            path.unlink()

    async def _in_memory(
        self, name: str, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        inputs = row_inputs("pair", int(self.draw.integers(1, 17)), self.draw)
        described, outputs = tensors(inputs), [{"name": each} for each in ("sum", "difference")]
        size = inputs["a"].nbytes
        parts = [
            {
                "shared_memory_region": name,
                "shared_memory_offset": at,
                "shared_memory_byte_size": size,
            }
            for at in range(0, 4 * size, size)
        ]
        for each, part in zip((*described, *outputs), parts, strict=True):
            each["parameters"] = part
        path.write_bytes(b"".join(map(packed, inputs.values())).ljust(4096, b"\0"))
        document = {"inputs": described, "outputs": outputs}
        writer.write(post("/v2/models/pair/infer", json.dumps(document).encode()))
        status, _, body = await _answer(reader)
        if self.is_refused(status != 200, body.decode("latin-1")):
            return
        wanted = b"".join(map(packed, answers("pair", inputs).values()))
        assert path.read_bytes()[2 * size : 4 * size] == wanted
        self.compared["shared memory"] += 1

    def is_refused(self, failed: bool, text: str) -> bool:
        """Whether the controller sheds load; any other failure is one of the test."""
        assert not failed or "faster than the controller's core can take" in text, text
        self.refused += failed
        return failed

    # ----------------------------------------------------------------------- who leaves

    async def break_off(self, address: str) -> None:
        """Connections that are reset in the middle of their requests, or before their answers."""
        host, _, port = address.rpartition(":")
        while self.going:
            sent = b"".join(Asked(self.draw).http() for _ in range(DEPTH))
            with socket.create_connection((host, int(port)), timeout=WITHIN_S) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.setblocking(False)
                with contextlib.suppress(OSError):
                    connection.send(sent[: self.random.randrange(len(sent))])
                await asyncio.sleep(self.random.random() * 0.02)
            self.left["reset"] += 1

    async def cancel(self, channel: grpc.aio.Channel) -> None:
        """Calls and streams that their client cancels."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while self.going:
            call = stub.ModelInfer(Asked(self.draw).rpc())
            stream = stub.ModelStreamInfer(iter([Asked(self.draw).rpc() for _ in range(DEPTH)]))
            await asyncio.sleep(self.random.random() * 0.01)
            for each in (call, stream):
                each.cancel()
            self.left["cancelled"] += 1

    async def kill(self) -> None:
        """Clients, processes of their own, that are ended with SIGKILL while they wait for answers."""
        host, _, port = self.gateway.http.rpartition(":")
        while self.going:
            sent = b"".join(Asked(self.draw).http() for _ in range(DEPTH))
            words = [sys.executable, "-S", "-c", _DYING, host, port]
            with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                assert process.stdin is not None and process.stdout is not None
                try:
                    await asyncio.to_thread(process.stdin.write, sent)
                    process.stdin.close()
                    assert await asyncio.to_thread(process.stdout.readline) == b"sent\n"
                finally:
                    process.kill()
            self.left["killed"] += 1


#: A client that sends what it is given, and waits.
_DYING = """
import socket, sys
connection = socket.create_connection(sys.argv[1:])
connection.sendall(sys.stdin.buffer.read())
print("sent", flush=True)
while connection.recv(1 << 16):
    pass
"""


async def _sent(writer: asyncio.StreamWriter, requests: list[bytes]) -> None:
    for each in requests:
        writer.write(each)
        await writer.drain()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    headers = {}
    for line in head[1:-2]:
        name, _, value = line.partition(b": ")
        headers[name] = value
    body = await reader.readexactly(int(headers[b"content-length"]))
    return int(head[0].split()[1]), headers, body


# ------------------------------------------------------------------------------------ the test


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """One gateway without and one with TLS, of one controller."""
    folder = tmp_path_factory.mktemp("gateway")
    certificate, key = certificates.made(folder)
    with serving(folder, worker=serving_models(folder)) as running, Children() as children:
        words = ["gateway", "--controller", running.controller, "--bind", "127.0.0.1"]
        words += ["--http-port", "0", "--grpc-port", "0"]
        words += ["--tls-cert", str(certificate), "--tls-key", str(key)]
        process = children.start("gateway", words, folder / "secure.log")
        port = children.wait_ready(process, within_s=WITHIN_S)
        with Client(running.controller) as client:
            for name in MODELS:
                client.load(name)
        addresses = f"127.0.0.1:{port}", f"127.0.0.1:{grpc_port(process)}"
        yield running, (process, addresses), certificate


def test_each_answer_is_its_own_beside_clients_that_leave(gateways: tuple[Any, ...]) -> None:
    running, (secure, addresses), trusted = gateways
    processes = [running.process.process.pid, secure.process.pid]

    def load(seed: int) -> Load:
        made = Load(running, addresses, trusted, seed)
        asyncio.run(asyncio.wait_for(made.run(), WITHIN_S))
        return made

    load(1)  # connections with the controller, models and pools are there from then on
    before = [files(each) for each in processes]
    found = load(2)
    assert found.compared.total() >= ANSWERS and min(found.left.values()) > 0
    assert len(found.left) == 3 and len(found.compared) == 13, found.compared

    def over() -> bool:
        now = [files(each) for each in processes]
        return in_flight(running) == 0 and all(a <= b for a, b in zip(now, before, strict=True))

    asyncio.run(until(over))


def files(process: int) -> int:
    """Its open files."""
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def in_flight(gateway: Gateway) -> int:
    """Inferences that the gateway has begun and not ended."""
    host, _, port = gateway.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WITHIN_S) as connection:
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    lines = [line for line in text.splitlines() if line.startswith("slosched_gateway_in_flight ")]
    return int(float(lines[0].split()[1]))
