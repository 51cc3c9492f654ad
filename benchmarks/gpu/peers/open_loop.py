"""One open-loop Poisson client for slosched and for HTTP servers: same arrivals, same clock, same judge.

    open_loop.py http://127.0.0.1:8000/inference --rates 300,600 --slos-ms 5,10,25,100 --seconds 3 --out F.json
    open_loop.py slosched://127.0.0.1:12346/resnet50 ...

A latency runs from the scheduled send. Who has no use for an SLO is measured once for each rate and judged
by each SLO; slosched is told the SLO with each request, so every cell is a run. A request that is refused,
fails or has no answer within 5 s after the last was sent is not in time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import numpy as np

from slosched.clients.aio import AsyncClient, connect
from slosched.clients.inference import Model
from slosched.clock import Timer, now_ns, set_timer_slack
from slosched.errors import ConnectionLost
from slosched.messages import InferReply
from slosched.units import NS_PER_MS, NS_PER_S

_ANSWER_S = 5.0
_FIRST_CONNECTIONS, _MOST_CONNECTIONS = 64, 2048
_LOAD_S = 60.0
#: Requests one after the other before anything counts, and how long each may take.
_WARM_UPS, _WARM_UP_S = 20, 60.0
_PAUSE_S = 0.3
#: Told whether the request was served.
Done = Callable[[bool], None]


class Target(Protocol):
    """What requests go to."""

    needs_slo: bool

    def submit(self, slo_ns: int, done: Done) -> None:
        """Send one request; `done` is called once with its outcome."""


class Slosched:
    """A model behind a controller."""

    needs_slo = True

    def __init__(self, client: AsyncClient, model: Model) -> None:
        self._client, self._model = client, model

    def submit(self, slo_ns: int, done: Done) -> None:
        def on_reply(message: InferReply, output: object) -> None:
            done(message.code == 0)

        try:
            self._client.submit(self._model, slo_ns=slo_ns, on_reply=on_reply)
        except ConnectionLost:
            done(False)


class _Connection(asyncio.Protocol):
    """A kept HTTP/1.1 connection with one request at a time."""

    def __init__(self, pool: Http) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._done: Done | None = None
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def send(self, request: bytes, done: Done) -> None:
        assert self._transport is not None
        self._done = done
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.lower()
        length = lines.partition(b"content-length:")[2].partition(b"\r\n")[0]
        if len(body) < int(length or b"0"):
            return
        self._buffer = b""
        done, self._done = self._done, None
        if done is not None:
            done(lines.split(b" ", 2)[1] == b"200")
        if b"connection: close" in lines and self._transport is not None:
            self._transport.close()
        else:
            self._pool.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        done, self._done = self._done, None
        self._pool.lost(self)
        if done is not None:
            done(False)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class Http:
    """A pool of kept connections. Without a free one another is opened, up to a bound; then requests wait."""

    needs_slo = False

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._request = (
            f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        ).encode()
        self._free: list[_Connection] = []
        self._waiting: deque[Done] = deque()
        self._open = 0
        self._all: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        for _ in range(_FIRST_CONNECTIONS):
            await self._connect()

    def submit(self, slo_ns: int, done: Done) -> None:
        if self._free:
            self._free.pop().send(self._request, done)
            return
        self._waiting.append(done)
        if self._open < _MOST_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        self._open += 1
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self), self._host, self._port
            )
        except OSError:
            self._open -= 1
            return
        self._all.add(connection)
        self.free(connection)

    def free(self, connection: _Connection) -> None:
        if self._waiting:
            connection.send(self._request, self._waiting.popleft())
        else:
            self._free.append(connection)

    def lost(self, connection: _Connection) -> None:
        self._open -= 1
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._free.remove(connection)

    def close(self) -> None:
        for connection in list(self._all):
            connection.close()


class Run:
    """One run at one rate: every request leaves when it is due, whatever became of those before."""

    def __init__(self, target: Target, rate: float, seconds: float, slo_ns: int, seed: int) -> None:
        self._target, self._slo_ns = target, slo_ns
        chance = random.Random(seed)
        offsets, at_s = [], chance.expovariate(rate)
        while at_s < seconds:
            offsets.append(round(at_s * NS_PER_S))
            at_s += chance.expovariate(rate)
        self._offsets = offsets
        self._latencies: list[int | None] = [None] * len(offsets)
        self._delays: list[int] = []
        self._ended = 0

    async def run(self) -> dict[str, Any]:
        loop, timer = asyncio.get_running_loop(), Timer()
        begin_ns = now_ns() + 20 * NS_PER_MS
        sent = asyncio.Event()

        def due() -> None:
            timer.clear()
            while len(self._delays) < len(self._offsets):
                place = len(self._delays)
                at_ns = begin_ns + self._offsets[place]
                now = now_ns()
                if at_ns > now:
                    timer.arm(at_ns)
                    return
                self._delays.append(now - at_ns)
                self._target.submit(self._slo_ns, self._answered(place, at_ns))
            sent.set()

        loop.add_reader(timer.fileno(), due)
        try:
            timer.arm(begin_ns)
            last_s = (self._offsets[-1] if self._offsets else 0) / NS_PER_S
            await asyncio.wait_for(sent.wait(), last_s + 30)
            give_up_ns = now_ns() + round(_ANSWER_S * NS_PER_S)
            while self._ended < len(self._offsets) and now_ns() < give_up_ns:
                await asyncio.sleep(0.02)
        finally:
            loop.remove_reader(timer.fileno())
            timer.close()
        return self._outcome()

    def _answered(self, place: int, at_ns: int) -> Done:
        def done(served: bool) -> None:
            self._ended += 1
            if served:
                self._latencies[place] = now_ns() - at_ns

        return done

    def _outcome(self) -> dict[str, Any]:
        served = [ns for ns in self._latencies if ns is not None]
        delays = self._delays or [0]
        return {
            "latencies": served,
            "sent": len(self._delays),
            "served": len(served),
            "issue_delay_p99_ns": float(np.percentile(delays, 99)),
        }


def cell(outcome: dict[str, Any], slo_ns: int) -> dict[str, Any]:
    """One rate at one SLO, judged from the scheduled send."""
    latencies = outcome["latencies"]
    in_time = sum(ns <= slo_ns for ns in latencies)
    p50, p99 = (float(np.percentile(latencies, p)) if latencies else None for p in (50, 99))
    counts = {key: outcome[key] for key in ("sent", "served", "issue_delay_p99_ns")}
    return counts | {
        "slo_ns": slo_ns,
        "in_time": in_time,
        "satisfaction": in_time / outcome["sent"] if outcome["sent"] else None,
        "latency_p50_ns": p50,
        "latency_p99_ns": p99,
    }


async def measure(target: Target, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of the grid, printed as they are measured."""
    cells = []
    slos_ns = [round(float(ms) * NS_PER_MS) for ms in options.slos_ms.split(",")]
    await _warm_up(target)
    gc.collect()
    gc.freeze()
    for rate in (float(text) for text in options.rates.split(",")):
        outcome: dict[str, Any] = {}
        for slo_ns in slos_ns:
            if target.needs_slo or not outcome:
                await asyncio.sleep(_PAUSE_S)
                outcome = await Run(target, rate, options.seconds, slo_ns, options.seed).run()
            found = {"rate": rate} | cell(outcome, slo_ns)
            print(f"  {rate:g}/s, {slo_ns / NS_PER_MS:g} ms: {found['satisfaction']}", flush=True)
            cells.append(found)
    return cells


async def _warm_up(target: Target) -> None:
    for _ in range(_WARM_UPS):
        answered = asyncio.get_running_loop().create_future()
        target.submit(NS_PER_S, answered.set_result)
        await asyncio.wait_for(answered, _WARM_UP_S)


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    set_timer_slack()
    if not options.target.startswith("slosched://"):
        http = Http(options.target)
        await http.start()
        try:
            return await measure(http, options)
        finally:
            http.close()
    address, _, name = options.target.removeprefix("slosched://").partition("/")
    async with connect(address, name="open-loop") as client:
        (model,) = await client.load(name, 1, timeout_s=_LOAD_S)
        return await measure(Slosched(client, model), options)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", help="http://HOST:PORT/PATH or slosched://HOST:PORT/MODEL")
    parser.add_argument("--rates", required=True, help="requests/s, with commas")
    parser.add_argument("--slos-ms", required=True, help="SLOs in ms, with commas")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a run (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the arrivals (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    try:
        import uvloop
    except ImportError:
        cells = asyncio.run(run(options))
    else:
        cells = uvloop.run(run(options))
    options.out.write_text(json.dumps(cells), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
