"""A gRPC front on a loop and a thread of its own, before a service that a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import uvloop

from slosched.fronts.asked import Answered, Asked, NamedTensor, RegionPart
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.regions import Regions
from slosched.fronts.rpc.messages import SERVICE, InferRequest
from slosched.fronts.rpc.server import Certificates, RpcFront
from slosched.fronts.service import OnEnd, Running
from slosched.gateway_config import GatewayConfig

T = TypeVar("T")
WITHIN_S = 20.0
TOKEN = "Bearer open sesame"


@dataclass(frozen=True)
class Named:
    """A caller."""

    name: str
    regions: Regions


class Begun:
    """An inference that waits for `service.answer`."""

    def __init__(self, service: EchoService, asked: Asked, on_end: OnEnd) -> None:
        self.service, self.asked, self.on_end = service, asked, on_end

    def cancel(self) -> None:
        if self in self.service.begun:
            self.service.begun.remove(self)
            self.service.cancelled.append(self.asked)

    def end(self, result: Answered | FrontError) -> None:
        self.service.begun.remove(self)
        self.on_end(result)


@dataclass
class EchoService:
    """Answers each inference with its inputs. With `hold` they wait for `release`; `needs_token`: for TOKEN."""

    regions: Regions = field(default_factory=Regions)
    hold: bool = False
    needs_token: bool = False
    fails: FrontError | Exception | None = None
    in_time: bool = True
    is_ready: bool = False
    asked: list[Asked] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    cancelled: list[Asked] = field(default_factory=list)
    loaded: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)

    def caller(self, authorization: str) -> Named:
        if self.needs_token and authorization != TOKEN:
            raise FrontError(Status.UNAUTHENTICATED, "a token is needed, or this one is unknown")
        return Named(authorization, self.regions)

    def begin(self, asked: Asked, caller: Any, on_end: OnEnd) -> Running:
        assert isinstance(caller, Named)
        self.asked.append(asked)
        begun = Begun(self, asked, on_end)
        self.begun.append(begun)
        if not self.hold:
            begun.end(self.end_of(asked))
        return begun

    def end_of(self, asked: Asked) -> Answered | FrontError:
        if isinstance(self.fails, FrontError):
            return self.fails
        if self.fails is not None:
            raise self.fails
        try:
            return self.echo(asked)
        except FrontError as error:
            return error

    def echo(self, asked: Asked) -> Answered:
        outputs: list[NamedTensor] = []
        placed: dict[str, RegionPart] = {}
        places = {each.name: each.part for each in asked.wanted}
        for each in asked.inputs:
            name = each.name.replace("in", "out")
            if places and name not in places:
                continue
            part, data = places.get(name), each.data
            if part is not None:
                self.regions.write(part, data)
                placed[name], data = part, b""
            outputs.append(NamedTensor(name, each.datatype, each.shape, data))
        return Answered(
            model=asked.model,
            version=asked.version or "1",
            id=asked.id,
            outputs=tuple(outputs),
            in_regions=placed,
            slo_ns=asked.slo_ns,
            in_time=self.in_time,
        )

    def release(self, *, last_first: bool = False) -> None:
        for begun in sorted(self.begun, key=self.begun.index, reverse=last_first):
            begun.end(self.end_of(begun.asked))

    async def infer(self, asked: Asked, caller: Any) -> Answered:
        future: asyncio.Future[Answered | FrontError] = asyncio.get_running_loop().create_future()
        running = self.begin(asked, caller, future.set_result)
        try:
            end = await future
        except asyncio.CancelledError:
            running.cancel()
            raise
        if isinstance(end, FrontError):
            raise end
        return end

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    async def model_ready(self, name: str, version: str, caller: object) -> bool:
        return (name, version) == ("echo", "")

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "slosched", "version": "1", "extensions": ["statistics"], "more": 1}

    async def model_metadata(self, name: str, version: str, caller: object) -> dict[str, Any]:
        return self._document(name, "metadata")

    async def model_config(self, name: str, version: str, caller: object) -> dict[str, Any]:
        return self._document(name, "config")

    async def statistics(self, name: str, version: str, caller: object) -> dict[str, Any]:
        return self._document(name, "statistics")

    def _document(self, name: str, kind: str) -> dict[str, Any]:
        if name not in ("echo", ""):
            raise FrontError(Status.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        return self.documents[kind]

    async def index(self, caller: object, *, ready: bool) -> Sequence[dict[str, Any]]:
        models = [{"name": "echo", "version": "1", "state": "READY", "reason": ""}]
        return models if ready else [*models, {"name": "other"}]

    def metrics(self, caller: object) -> bytes:
        return b""

    async def load(self, name: str, parameters: Mapping[str, Any], caller: Any) -> None:
        self.loaded[name] = parameters

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: Any) -> None:
        del self.loaded[name]


class Served:
    """A front that serves."""

    def __init__(
        self, service: EchoService, front: RpcFront, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.service, self.front, self._loop = service, front, loop

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.front.port}"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the front's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WITHIN_S)

    def do(self, function: Callable[[], T]) -> T:
        """Call a function in the front's loop."""

        async def called() -> T:
            return function()

        return self.run(called())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds in the front's loop."""

        async def wait() -> None:
            async with asyncio.timeout(WITHIN_S):
                while not condition():
                    await asyncio.sleep(0.002)

        self.run(wait())


@contextlib.contextmanager
def serving(
    service: EchoService | None = None, *, tls: Certificates | None = None, **options: Any
) -> Iterator[Served]:
    """A front with a service on a free port of loopback; it has ended afterwards, its requests too."""
    service = service or EchoService()
    config = GatewayConfig(**{"http_port": -1, "grpc_port": 0, **options})
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    front = RpcFront(service, config, tls=tls)
    served = Served(service, front, loop)
    try:
        served.run(front.start())
        yield served
    finally:
        with contextlib.suppress(Exception):
            served.run(front.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WITHIN_S)
        service.regions.close()
    assert not thread.is_alive()


@contextlib.contextmanager
def channel(served: Served) -> Iterator[grpc.Channel]:
    """A channel that sends and takes messages of any size."""
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(served.address, options=options) as made:
        yield made


def call(made: grpc.Channel, method: str, data: bytes, **options: Any) -> bytes:
    """The answer of a method to these bytes."""
    found: bytes = made.unary_unary(f"/{SERVICE}/{method}")(data, timeout=WITHIN_S, **options)
    return found


def failure(made: grpc.Channel, method: str, data: bytes = b"", **options: Any) -> grpc.Call:
    """The status with which a method refuses these bytes."""
    try:
        call(made, method, data, **options)
    except grpc.RpcError as error:
        found: grpc.Call = error
        return found
    raise AssertionError(f"{method} did not fail")


def a_request(name: str = "", data: bytes = b"abc", **fields: Any) -> bytes:
    """A ModelInferRequest with that id."""
    made: bytes = InferRequest(
        model_name="echo",
        id=name,
        inputs=[{"name": "in", "datatype": "UINT8", "shape": [1, len(data)]}],
        raw_input_contents=[data],
        **fields,
    ).SerializeToString()
    return made
