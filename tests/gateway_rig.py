"""A gateway's service in the test's own loop: before a controller that answers by the book, or a real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from msgspec import structs

from fake_controller import FakeController, model_info
from slosched.config import ControllerConfig, ModelSource, SchedulerConfig, WorkerConfig
from slosched.daemon.controller import ControllerServer
from slosched.daemon.worker import WorkerServer
from slosched.fronts.asked import Answered, Asked, NamedTensor
from slosched.fronts.callers import Caller
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.inferences import Inference
from slosched.fronts.serving import Serving
from slosched.gateway_config import GatewayConfig
from slosched.messages import (
    ClientHello,
    ListModelsReply,
    LoadModelReply,
    LoadModelRequest,
    Message,
    ModelInfo,
    StatusReply,
    UnloadModelRequest,
)

ROW_BYTES = 3 * 4 * 4  # of the fake controller's models: float32 of (3, 4)
Result = Answered | FrontError


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


class Controller(FakeController):
    """Loads what it `offers`, each name with an id of its own, and knows what is loaded."""

    def __init__(self, offers: tuple[str, ...] = ("toy", "other"), port: int = 0) -> None:
        self.offers = offers
        self.loaded: dict[str, int] = {}
        self.ready = True
        self.batch_sizes: tuple[int, ...] = (1, 2, 4)
        self.fails: dict[str, str] = {}  # names whose load fails, with the reason
        self.left_out: tuple[tuple[str, str], ...] = ()  # of the workers' repositories
        self._ids = 100
        super().__init__(port)

    def __enter__(self) -> Controller:
        return self

    def restart(self) -> None:
        """Be another process, which knows no client and has no model."""
        self.incarnation += 1
        self.loaded, self.greeted = {}, set()

    def _send(self, peer: bytes, message: Message) -> None:
        if isinstance(message, ListModelsReply):
            infos = tuple(self._info(name, number) for name, number in [*self.loaded.items()])
            message = ListModelsReply(
                message.request_id, infos, self.offers, left_out=self.left_out
            )
        elif isinstance(message, StatusReply):
            message = StatusReply(message.request_id, {"ready": self.ready, "draining": False})
        super()._send(peer, message)

    def _info(self, name: str, number: int) -> ModelInfo:
        info = model_info(number)
        return structs.replace(info, name=name, copy=0, batch_sizes=self.batch_sizes)

    def _load(self, peer: bytes, message: LoadModelRequest) -> None:
        if message.name in self.fails:
            reply = LoadModelReply(message.request_id, 2, self.fails[message.name])
        elif message.name not in self.offers:
            reply = LoadModelReply(message.request_id, 10, f"no worker knows {message.name!r}")
        else:
            self._ids += 1
            number = self.loaded.setdefault(message.name, self._ids)
            reply = LoadModelReply(message.request_id, 0, "", (self._info(message.name, number),))
        self._send(peer, reply)

    def _unload(self, peer: bytes, message: UnloadModelRequest) -> None:
        self.loaded.pop(message.name, None)
        super()._unload(peer, message)


@asynccontextmanager
async def service(address: str, **options: Any) -> AsyncIterator[Serving]:
    """A started service before the controller at `address`, with these options of a GatewayConfig."""
    serving = Serving(GatewayConfig(controller=address, **options), announce=lambda text: None)
    serving.start()
    try:
        yield serving
    finally:
        await serving.close()


@asynccontextmanager
async def real(
    folder: Path, models: tuple[ModelSource, ...] = (), device: str = "emulated", **scheduler: Any
) -> AsyncIterator[ControllerServer]:
    """A controller in this loop and a worker in a thread. Its address is 127.0.0.1 and `port`."""
    config = WorkerConfig(device=device, gpus=1, port=0, bind="127.0.0.1", models=models)
    with WorkerServer(config) as worker:
        controller = ControllerServer(
            ControllerConfig(
                scheduler=SchedulerConfig(**scheduler),
                workers=(f"127.0.0.1:{worker.port}",),
                port=0,
                bind="127.0.0.1",
                http_port=-1,
                log_dir=str(folder / "run"),
            ),
            announce=lambda text: None,
        )
        await controller.start()
        runs = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            controller.stop()
            await runs


def asked(rows: int = 1, model: str = "toy", **fields: Any) -> Asked:
    """A request of `rows` for one of the fake controller's models."""
    tensor = NamedTensor("input", "FP32", (rows, 3, 4), bytes(ROW_BYTES * rows))
    given: dict[str, Any] = {"model": model, "inputs": (tensor,), "slo_ns": 10**9}
    return Asked(**given | fields)


class Ends:
    """Keeps the end of each inference that it begins."""

    def __init__(self, serving: Serving, caller: Caller | None = None) -> None:
        self._serving, self._caller = serving, caller or serving.caller("")
        self.results: list[Result] = []

    def begin(self, wanted: Asked) -> Inference:
        return self._serving.begin(wanted, self._caller, self.results.append)

    async def of(self, wanted: Asked) -> Result:
        before = len(self.results)
        self.begin(wanted)
        await until(lambda: len(self.results) > before)
        return self.results[before]


async def until(holds: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait for something to hold. Fails after `within_s`."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


async def status_of(work: Coroutine[Any, Any, Any]) -> tuple[Status, str]:
    """Status and text of the refusal in which `work` ends."""
    try:
        await work
    except FrontError as error:
        return error.status, error.text
    raise AssertionError("it was not refused")


def nothing_is_held(serving: Serving) -> bool:
    quota = serving._quota
    return (serving.running, quota.rows_now, quota.bytes_now) == (0, 0, 0)


def hellos(controller: FakeController) -> list[tuple[str, float]]:
    """Name and weight of each client that greeted, once."""
    found = [m for m in controller.of(ClientHello) if isinstance(m, ClientHello)]
    return sorted({(m.name, m.weight) for m in found})


def unloads(controller: FakeController) -> list[str]:
    return [m.name for m in controller.of(UnloadModelRequest) if isinstance(m, UnloadModelRequest)]


def loads(controller: FakeController) -> list[str]:
    return [m.name for m in controller.of(LoadModelRequest) if isinstance(m, LoadModelRequest)]
