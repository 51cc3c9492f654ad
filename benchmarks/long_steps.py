"""How long the controller's loop is held: by reports of 10,000 instances, and by 20,000 queued requests.

A controller runs in this process, with a worker and a client that speak the protocol from the same loop.
A *step* is the controller's: what came is handled, and all effects are performed. A *turn* is one of the
loop, seen by a callback: a step or a part of a long answer, and also what the client, the worker and the
callback do in it, so that the loop of a controller alone is held for less. Both are CPU time of this thread,
which does not count the machine's other work.

    .venv/bin/python benchmarks/long_steps.py [--instances 10000] [--queued 20000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvloop

from slosched import clock
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.daemon.controller import ControllerServer
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ControllerHello,
    Goodbye,
    GpuInfo,
    Heartbeat,
    Infer,
    InferRequest,
    InferResult,
    ListModelsReply,
    ListModelsRequest,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    LoadWeightsResult,
    Span,
    StatusReply,
    StatusRequest,
    WorkerWelcome,
)
from slosched.transport.codec import decode_for_worker, encode
from slosched.transport.sockets import Dealer, Router
from slosched.units import NS_PER_MS, NS_PER_S

_SESSION = 7
_EXEC_NS = NS_PER_S
_SLO_NS = 20 * 3600 * NS_PER_S
_WITHIN_S = 100.0
#: Longer than it takes to queue all of them.
_ALL_DUE_NS = 12 * NS_PER_S
_BATCHES = (1, 2, 4, 8)


class Worker:
    """Answers a controller's actions: all at once but an Infer, which takes a second whatever its batch."""

    def __init__(self, pages: int) -> None:
        self.port = (router := Router("127.0.0.1", 0)).port
        self._router, self._pages, self._peer = router, pages, b""
        self._task = asyncio.create_task(self._serve())

    def fall_silent(self) -> None:
        self._task.cancel()

    def close(self) -> None:
        self._task.cancel()
        self._router.close()

    async def _serve(self) -> None:
        beat_ns = 0
        while True:
            for peer, frames in self._router.receive():
                self._peer = peer
                message = decode_for_worker(frames[0])
                for action in getattr(message, "actions", (message,)):
                    self._answer(action)
            now_ns = clock.now_ns()
            if self._peer and now_ns >= beat_ns:
                beat_ns = now_ns + 100 * NS_PER_MS
                self._say(
                    Heartbeat(
                        session=_SESSION,
                        sent_ns=now_ns,
                        clock_offset_ns=0,
                        clock_error_ns=1000,
                        preparing=0,
                    )
                )
            await asyncio.sleep(0.002)

    def _say(self, message: Any) -> None:
        self._router.send(self._peer, [encode(message)])

    def _answer(self, action: Any) -> None:
        now_ns = clock.now_ns()
        if isinstance(action, ControllerHello):
            gpus = (GpuInfo(0, "made up", self._pages, 2**20),)
            self._say(
                WorkerWelcome(
                    protocol=PROTOCOL_VERSION,
                    session=_SESSION,
                    version="",
                    host="here",
                    pid=0,
                    device="made up",
                    gpus=gpus,
                    loadable=("net",),
                )
            )
        elif isinstance(action, LoadModel):
            self._say(
                LoadModelResult(
                    _SESSION,
                    action.action_id,
                    span=Span(0, 0, 0),
                    copies=action.copies,
                    batch_sizes=_BATCHES,
                    exec_ns=(_EXEC_NS,) * len(_BATCHES),
                    weights_ns=1000,
                    weights_bytes=2**20,
                    pages=1,
                    input_shape=(4,),
                    input_dtype="float32",
                    output_shape=(2,),
                    output_dtype="float32",
                    random_weights=True,
                    received_ns=now_ns,
                    sent_ns=now_ns,
                )
            )
        elif isinstance(action, LoadWeights):
            span = Span(now_ns - 1000, now_ns, 1000)
            self._say(
                LoadWeightsResult(
                    _SESSION, action.action_id, span=span, received_ns=now_ns, sent_ns=now_ns
                )
            )
        elif isinstance(action, Infer):
            asyncio.get_running_loop().call_later(
                _EXEC_NS / NS_PER_S, self._ran, action.action_id, now_ns
            )

    def _ran(self, action_id: int, begin_ns: int) -> None:
        now_ns = clock.now_ns()
        span = Span(begin_ns, now_ns, now_ns - begin_ns)
        nothing = Span(0, 0, 0)
        self._say(
            InferResult(
                _SESSION,
                action_id,
                copy_input=nothing,
                exec=span,
                copy_output=nothing,
                gpu_id=0,
                gpu_clock_before_mhz=0,
                gpu_clock_mhz=0,
                received_ns=begin_ns,
                sent_ns=now_ns,
            )
        )


class Bench:
    """A controller with a worker and clients, and the longest turn of their loop."""

    def __init__(self, server: ControllerServer) -> None:
        self.server, self.scheduler = server, server.scheduler
        self._clients = 0
        self._request_id = 0
        self._last_ns: int | None = None  # of the callback; None: none runs
        self._longest_ns = self._longest_step_ns = 0
        self._step = server._steps._step
        server._steps._step = self._timed_step  # type: ignore[method-assign]

    def _timed_step(self) -> None:
        began_ns = time.thread_time_ns()
        self._step()
        self._longest_step_ns = max(self._longest_step_ns, time.thread_time_ns() - began_ns)

    async def client(self) -> Dealer:
        self._clients += 1
        dealer = Dealer(f"127.0.0.1:{self.server.port}", identity=f"c{self._clients}".encode())
        there = len(self.scheduler.clients)
        while not dealer.send([encode(ClientHello(PROTOCOL_VERSION, 1, "bench"))]):
            await asyncio.sleep(0.002)
        await until(lambda: len(self.scheduler.clients) > there)
        return dealer

    def next_id(self) -> int:
        self._request_id += 1
        return self._request_id

    async def queued(self, count: int, due_ns: int | None = None) -> tuple[Dealer, list[int]]:
        """A client with `count` requests, the last of which is due first; or all of them at `due_ns`."""
        dealer, ids, arrived = await self.client(), [], self.scheduler.arrived
        for place in range(count):
            ids.append(self.next_id())
            slo_ns = _SLO_NS - place * NS_PER_S if due_ns is None else due_ns - clock.now_ns()
            while not dealer.send(
                [encode(InferRequest(request_id=ids[-1], model_id=0, slo_ns=slo_ns))]
            ):
                await asyncio.sleep(0.001)
            if place % 200 == 0:
                await asyncio.sleep(0)
        await until(lambda: self.scheduler.arrived >= arrived + count)
        return dealer, ids

    def heartbeat(self, dealer: Dealer) -> None:
        dealer.send([encode(ClientHeartbeat(clock.now_ns()))])

    async def measured(self, work: Callable[[], Awaitable[Any]]) -> dict[str, float]:
        """The longest step and turn (CPU ms), and the whole time (s) of `work`."""
        for _ in range(3):
            await asyncio.sleep(0.02)
        gc.collect()
        began_ns = clock.now_ns()
        with self._watch():
            await work()
        return {
            "step": self._longest_step_ns / NS_PER_MS,
            "turn": self._longest_ns / NS_PER_MS,
            "whole": (clock.now_ns() - began_ns) / NS_PER_S,
        }

    @contextmanager
    def _watch(self) -> Iterator[None]:
        self._longest_ns = self._longest_step_ns = 0
        self._last_ns = time.thread_time_ns()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._turn, loop)
        try:
            yield
        finally:
            self._last_ns = None

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._last_ns is not None:
            now_ns = time.thread_time_ns()
            self._longest_ns = max(self._longest_ns, now_ns - self._last_ns)
            self._last_ns = time.thread_time_ns()
            loop.call_soon(self._turn, loop)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(_WITHIN_S):
        while not true():
            await asyncio.sleep(0.001)


async def ask(dealer: Dealer, message: Any, kind: type) -> None:
    """Send `message` and wait for a reply of `kind`, which is not decoded: that would hold the loop."""
    while not dealer.send([encode(message)]):
        await asyncio.sleep(0.001)
    head = kind.__name__.encode()
    async with asyncio.timeout(_WITHIN_S):
        while True:
            for frames in dealer.receive():
                if bytes(frames[0][:64]).find(head) >= 0:
                    return
            await asyncio.sleep(0.001)


async def http_status(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nhost: localhost\r\n\r\n")
    while await reader.read(65536):
        pass
    writer.close()


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[tuple[Worker, Bench]]:
    """A controller and its worker, which has joined."""
    worker = Worker(pages=64)
    config = ControllerConfig(
        SchedulerConfig(),
        bind="127.0.0.1",
        port=0,
        workers=(f"127.0.0.1:{worker.port}",),
        http_port=0,
        log_dir=str(directory),
    )
    server = ControllerServer(config, announce=lambda line: None)
    await server.start()
    bench = Bench(server)
    await until(server.scheduler.ready)
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 5, 1_000)
    try:
        yield worker, bench
    finally:
        await server.close()
        worker.close()


async def measure_the_loss(queued: int, directory: Path) -> dict[str, dict[str, float]]:
    """The only worker says nothing any more, with `queued` requests for it."""
    async with started(directory) as (worker, bench):
        scheduler = bench.scheduler
        owner = await bench.client()
        await ask(owner, LoadModelRequest(bench.next_id(), "net", 1), LoadModelReply)
        client, _ = await bench.queued(queued)
        beats = asyncio.create_task(beating(bench, [owner, client]))

        async def lose() -> None:
            worker.fall_silent()
            await until(lambda: scheduler.idle)

        row = await bench.measured(lose)
        beats.cancel()
        for dealer in (owner, client):
            dealer.close()
        return {"the last worker is lost": row}


async def measure(instances: int, queued: int, directory: Path) -> dict[str, dict[str, float]]:
    """Everything else once, in a new controller."""
    async with started(directory) as (_, bench):
        return await measured_in(bench, instances, queued)


async def measured_in(bench: Bench, instances: int, queued: int) -> dict[str, dict[str, float]]:
    server, found = bench.server, {}
    owner = await bench.client()
    present = [owner]
    beats = asyncio.create_task(beating(bench, present))
    found["the first load"] = await bench.measured(
        lambda: ask(owner, LoadModelRequest(bench.next_id(), "net", instances), LoadModelReply)
    )
    for name, message, kind in (
        (
            "a load of what is there",
            LoadModelRequest(bench.next_id(), "net", instances),
            LoadModelReply,
        ),
        ("slosched models", ListModelsRequest(bench.next_id()), ListModelsReply),
        ("slosched status", StatusRequest(bench.next_id()), StatusReply),
    ):
        found[name] = await bench.measured(lambda m=message, k=kind: ask(owner, m, k))  # type: ignore[misc]
    found["GET /status"] = await bench.measured(lambda: http_status(server._http.port))
    scheduler = server.scheduler
    leaver, _ = await bench.queued(queued)

    async def leave() -> None:
        leaver.send([encode(Goodbye())])
        await until(lambda: scheduler.arrived - scheduler.answered < 50)

    found["a client leaves"] = await bench.measured(leave)
    patient, ids = await bench.queued(queued)

    async def cancel() -> None:
        for place, request_id in enumerate(ids):
            while not patient.send([encode(CancelRequest(request_id))]):
                await asyncio.sleep(0.001)
            if place % 20 == 0:
                await asyncio.sleep(0)
        await until(lambda: scheduler.arrived - scheduler.answered < 50)

    found["each request is cancelled"] = await bench.measured(cancel)
    hasty, _ = await bench.queued(queued, clock.now_ns() + _ALL_DUE_NS)
    present.append(hasty)
    found["all of them expire at once"] = await bench.measured(
        lambda: until(lambda: scheduler.arrived - scheduler.answered < 50)
    )
    last, _ = await bench.queued(queued)
    found["the end, at once"] = await bench.measured(lambda: end(server))
    beats.cancel()
    for dealer in (owner, leaver, patient, hasty, last):
        dealer.close()
    return found


async def beating(bench: Bench, dealers: Sequence[Dealer]) -> None:
    """Say that the clients of these are there; more may come."""
    while True:
        for dealer in dealers:
            bench.heartbeat(dealer)
        await asyncio.sleep(0.5)


async def end(server: ControllerServer) -> None:
    """As by two signals: what is in flight is not waited for."""
    server.stop()
    server.stop()
    await server.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--queued", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found = uvloop.run(measure(options.instances, options.queued, Path(folder) / "run"))
            found |= uvloop.run(measure_the_loss(options.queued, Path(folder) / "loss"))
            for name, row in found.items():
                rows.setdefault(name, []).append(row)
    print(
        f"| {options.instances:,} instances, {options.queued:,} queued | longest step, CPU ms "
        "| longest turn, CPU ms | whole, s |"
    )
    print("| :-- | --: | --: | --: |")
    for name, each in rows.items():
        middle = {key: sorted(row[key] for row in each)[len(each) // 2] for key in each[0]}
        print(f"| {name} | {middle['step']:.2f} | {middle['turn']:.2f} | {middle['whole']:.2f} |")
    print(
        f"\nMedian of {options.repeats}; Python {platform.python_version()}, {platform.machine()}, "
        f"{time.strftime('%Y-%m-%d')}."
    )


if __name__ == "__main__":
    main()
