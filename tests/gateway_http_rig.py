"""A gateway's HTTP port over a service of its own making, in a thread, and raw connections to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from msgspec import structs

from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart
from slosched.fronts.errors import FrontError, Refusal, Status
from slosched.fronts.http.bounds import Limits
from slosched.fronts.http.server import HttpFront
from slosched.fronts.regions import Regions
from slosched.fronts.service import Caller, OnEnd, Running
from slosched.fronts.tls import TlsFiles
from slosched.gateway_config import GatewayConfig

WITHIN_S = 20.0


class FakeRegions(Regions):
    """Regions of memory in this process, by key."""

    def __init__(self) -> None:
        self.memory = {"/inputs": bytearray(4096), "/outputs": bytearray(4096)}
        self.named: dict[str, tuple[str, int, int]] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        if key not in self.memory:
            raise FrontError(
                Status.INVALID_ARGUMENT, f"Unable to open shared memory region: '{key}'"
            )
        self.named[name] = (key, offset, byte_size)

    def unregister(self, name: str) -> None:
        self.named = {each: it for each, it in self.named.items() if name and each != name}

    def status(self, name: str) -> list[dict[str, Any]]:
        return [
            {"name": each, "key": key, "offset": offset, "byte_size": size}
            for each, (key, offset, size) in self.named.items()
            if name in ("", each)
        ]

    def read(self, part: RegionPart) -> bytes:
        if part.region not in self.named:
            raise FrontError(
                Status.INVALID_ARGUMENT,
                f"Unable to find shared memory region: '{part.region}'",
            )
        key, offset, _ = self.named[part.region]
        return bytes(self.memory[key][offset + part.offset :][: part.byte_size])

    def write(self, part: RegionPart, data: Any) -> None:
        key, offset, _ = self.named[part.region]
        self.memory[key][offset + part.offset : offset + part.offset + len(data)] = data

    def close(self) -> None:
        self.named = {}


class FakeRunning(Running):
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeCaller(NamedTuple):
    name: str
    regions: Regions


class FakeService:
    """Echoes: output y is input x. Models: echo; slow, which ends when `finish` is called; refused; broken.

    With `token` callers need it. What happened is in `asked`, `cancelled` and `loaded`.
    """

    def __init__(self, token: str = "") -> None:
        self.regions: Regions = FakeRegions()
        self.token = token
        self.asked: list[Asked] = []
        self.callers: list[str] = []
        self.slow: list[tuple[Asked, OnEnd, FakeRunning]] = []
        self.loaded: list[tuple[str, Mapping[str, Any]]] = []
        self.loading: asyncio.Event | None = None
        self.described: asyncio.Event | None = None  # for which metadata wait
        self.describing = 0
        self.outputs: Callable[[Asked], tuple[NamedTensor, ...]] = echoed
        self.is_ready = True

    @property
    def cancelled(self) -> int:
        return sum(running.cancelled for _, _, running in self.slow)

    def caller(self, authorization: str) -> Caller:
        if self.token and authorization != f"Bearer {self.token}":
            raise FrontError(Status.UNAUTHENTICATED, "give a token")
        return cast(Caller, FakeCaller(authorization, self.regions))

    def begin(self, asked: Asked, caller: Caller, on_end: OnEnd) -> Running:
        self.asked.append(asked)
        self.callers.append(caller.name)
        running = FakeRunning()
        if asked.model == "slow":
            self.slow.append((asked, on_end, running))
        else:
            on_end(self._outcome(asked))
        return running

    def _outcome(self, asked: Asked) -> Answered | FrontError:
        if asked.model == "refused":
            refusal = Refusal(
                code=8, predicted_start_ns=5_000_000, predicted_exec_ns=-1, time_left_ns=2_500_000
            )
            return FrontError(Status.UNAVAILABLE, "could not start in time", refusal)
        if asked.model == "limited":
            return FrontError(Status.RESOURCE_EXHAUSTED, "over the quota", retry_after_s=0.2)
        if asked.model == "broken":
            raise RuntimeError("a fault of this test")
        return self.answered(asked)

    def answered(self, asked: Asked) -> Answered:
        outputs = self.outputs(asked)
        parts = {each.name: each.part for each in asked.wanted if each.part is not None}
        written = {}
        for each in outputs:
            part = parts.get(each.name)
            if part is not None:
                self.regions.write(part, each.data)
                written[each.name] = RegionPart(part.region, part.offset, len(each.data))
        return Answered(
            model=asked.model,
            version=asked.version or "1",
            id=asked.id,
            outputs=tuple(
                structs.replace(each, data=b"") if each.name in written else each
                for each in outputs
            ),
            in_regions=written,
            slo_ns=asked.slo_ns,
            latency_ns=1_500_000,
            in_time=asked.model != "late",
        )

    async def infer(self, asked: Asked, caller: Caller) -> Answered:
        future: asyncio.Future[Answered | FrontError] = asyncio.get_running_loop().create_future()
        running = self.begin(asked, caller, future.set_result)
        try:
            outcome = await future
        except asyncio.CancelledError:
            running.cancel()
            raise
        if isinstance(outcome, FrontError):
            raise outcome
        return outcome

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    async def model_ready(self, name: str, version: str, caller: object) -> bool:
        return name == "echo" and version in ("", "1")

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "fake", "version": "1", "extensions": ["binary_tensor_data"]}

    async def model_metadata(self, name: str, version: str, caller: object) -> dict[str, Any]:
        self.describing += 1
        if self.described is not None:
            await self.described.wait()
        await asyncio.sleep(0)
        if name not in MODELS:
            raise FrontError(Status.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        inputs = [
            {"name": each, "datatype": datatype, "shape": [-1, *shape]}
            for each, datatype, shape in MODELS[name]
        ]
        return {"name": name, "versions": [version or "1"], "inputs": inputs, "outputs": inputs}

    async def model_config(self, name: str, version: str, caller: object) -> dict[str, Any]:
        return {"name": name, "max_batch_size": 4, "version": version}

    async def statistics(self, name: str, version: str, caller: object) -> dict[str, Any]:
        return {"model_stats": [{"name": name, "version": version}]}

    async def index(self, caller: object, *, ready: bool) -> Sequence[dict[str, Any]]:
        return [{"name": "echo", "state": "READY", "ready": ready}]

    def metrics(self, caller: object) -> bytes:
        return b"gateway_requests 3\n"

    async def load(self, name: str, parameters: Mapping[str, Any], caller: Caller) -> None:
        if self.loading is not None:
            await self.loading.wait()
        self.loaded.append((name, parameters))

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: Caller) -> None:
        raise FrontError(Status.NOT_FOUND, f"unknown model '{name}'")


MODELS: dict[str, list[tuple[str, str, list[int]]]] = {
    "echo": [("x", "FP32", [4])],
    "slow": [("x", "FP32", [4])],
    "refused": [("x", "FP32", [4])],
    "grid": [("x", "FP32", [2, 3])],
    "words": [("text", "BYTES", [1])],
    "tokens": [("ids", "INT64", [-1])],
    "pair": [("left", "FP16", [2]), ("right", "BF16", [2])],
}


def echoed(asked: Asked) -> tuple[NamedTensor, ...]:
    """Each input as an output; x is called y."""
    return tuple(
        NamedTensor("y" if each.name == "x" else each.name, each.datatype, each.shape, each.data)
        for each in asked.inputs
    )


def new_loop(kind: str) -> asyncio.AbstractEventLoop:
    if kind == "asyncio":
        return asyncio.new_event_loop()
    import uvloop

    return cast(asyncio.AbstractEventLoop, uvloop.new_event_loop())


class Served:
    """A port that is served in a thread."""

    def __init__(
        self, service: FakeService, front: HttpFront, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.service, self.front, self.loop = service, front, loop
        self.failures: list[dict[str, Any]] = []

    @property
    def port(self) -> int:
        return self.front.port

    def do(self, function: Callable[[], Any]) -> Any:
        """Call `function` in the loop's thread, and wait; a coroutine is awaited."""

        async def inside() -> Any:
            made = function()
            return await made if asyncio.iscoroutine(made) else made

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(WITHIN_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition`, which is looked at in the loop's thread, is true."""

        async def inside() -> None:
            while not condition():
                await asyncio.sleep(0.002)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(inside(), WITHIN_S), self.loop).result()

    def finish(self) -> None:
        """End all that the model `slow` holds."""

        def inside() -> None:
            for asked, on_end, running in self.service.slow:
                if not running.cancelled:
                    on_end(self.service.answered(asked))

        self.do(inside)


@contextlib.contextmanager
def served(
    service: FakeService | None = None,
    *,
    loop: str = "uvloop",
    limits: Limits | None = None,
    tls: TlsFiles | None = None,
    **options: Any,
) -> Iterator[Served]:
    """Serve a service by HTTP, with these options of GatewayConfig."""
    service = service or FakeService()
    config = GatewayConfig(http_port=0, grpc_port=-1, **options)
    front = HttpFront(cast(Any, service), config, tls=tls, limits=limits)
    running = new_loop(loop)
    it = Served(service, front, running)
    running.set_exception_handler(lambda _, context: it.failures.append(context))
    thread = threading.Thread(target=running.run_forever)
    thread.start()
    try:
        it.do(front.start)
        yield it
        it.do(front.close)
        it.until(lambda: front.connections == 0)
    finally:
        it.do(front.close)
        running.call_soon_threadsafe(running.stop)
        thread.join(WITHIN_S)
        running.run_until_complete(running.shutdown_default_executor())
        running.close()


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])


class Raw:
    """A connection that sends what it is told, byte for byte, and reads answers."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=WITHIN_S)
        self._buffer = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        self.socket.sendall(b"".join(parts))

    def ask(self, *parts: bytes) -> Reply:
        self.send(*parts)
        return self.reply()

    def line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._more()
        line, self._buffer = self._buffer.split(b"\r\n", 1)
        return line

    def reply(self, *, head_only: bool = False) -> Reply:
        status = int(self.line().split()[1])
        headers = {}
        while line := self.line():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        if status == 100:
            return Reply(status, headers, b"")
        length = 0 if head_only else int(headers["content-length"])
        while len(self._buffer) < length:
            self._more()
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        return Reply(status, headers, body)

    def ended(self) -> bool:
        """Whether the server has closed, and nothing more came. Waits for it."""
        try:
            return not self._buffer and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def _more(self) -> None:
        more = self.socket.recv(65536)
        if not more:
            raise EOFError(f"the server closed after {self._buffer!r}")
        self._buffer += more


def request(
    path: str, body: bytes = b"", *lines: str, method: str = "", host: str = "localhost"
) -> bytes:
    """A request in HTTP/1.1."""
    head = [f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1", f"host: {host}", *lines]
    if body:
        head.append(f"content-length: {len(body)}")
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


def inference(document: Mapping[str, Any], *binaries: bytes, model: str = "echo") -> bytes:
    """An inference: a document, and binary data behind it."""
    text = json.dumps(document).encode()
    lines = (f"inference-header-content-length: {len(text)}",) if binaries else ()
    return request(f"/v2/models/{model}/infer", text + b"".join(binaries), *lines)


def x_of(*values: float, **more: Any) -> dict[str, Any]:
    """A document with the input x of a batch of 1."""
    return {
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": list(values)}
        ],
        **more,
    }
