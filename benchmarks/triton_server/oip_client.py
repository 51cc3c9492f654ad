"""An open-loop client of the Open Inference Protocol over HTTP, and one of slosched's own protocol.

Requests leave at their scheduled times, whatever became of earlier ones. An answer's latency counts from the
scheduled send. Refusals, other errors, connections that break and answers that never come are each counted.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slosched.clients.aio import AsyncClient
from slosched.clients.inference import Model
from slosched.clock import Timer, now_ns, set_timer_slack
from slosched.codes import Code
from slosched.errors import ConnectionLost
from slosched.transport.codec import Frame
from slosched.units import NS_PER_S

#: Ends of a request. ANSWERED may still be too late.
ANSWERED, REFUSED, FAILED, LOST = "answered", "refused", "failed", "lost"
_LEAD_NS = 20_000_000
_MOST_CONNECTIONS, _FIRST_CONNECTIONS = 1024, 256
_HEAD_BYTES = 65536

Done = Callable[[int, str], None]


class Target(Protocol):
    """Where requests go."""

    def send(self, number: int, done: Done) -> None:
        """Send one request now; `done` hears its number and its end, once."""


@dataclass
class Offered:
    """What became of requests. Times in ns; a latency is -1 without an answer."""

    slo_ns: int
    latency_ns: list[int]
    ends: list[str]
    issue_delay_ns: list[int]

    def behind(self, first: int) -> Offered:
        """The requests from number `first` on: those before have filled the queues."""
        return Offered(
            self.slo_ns, self.latency_ns[first:], self.ends[first:], self.issue_delay_ns[first:]
        )

    @property
    def sent(self) -> int:
        return len(self.ends)

    @property
    def in_time(self) -> int:
        """Answered within the SLO of the scheduled send."""
        return sum(0 <= each <= self.slo_ns for each in self.latency_ns)

    def count(self, end: str) -> int:
        return self.ends.count(end)

    def latency(self, share: float) -> int:
        """A quantile of the latencies of what was answered; -1 if nothing was."""
        return quantile([each for each in self.latency_ns if each >= 0], share)


def quantile(values: Sequence[int], share: float) -> int:
    """The least value that `share` of all do not exceed; -1 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else -1


def poisson(rate: float, seconds: float, seed: int) -> list[int]:
    """Times of sends, ns from the begin."""
    draw, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < seconds:
        found.append(round(at_s * NS_PER_S))
    return found


async def offer(
    target: Target, arrivals_ns: Sequence[int], slo_ns: int, *, patience_s: float = 1.0
) -> Offered:
    """Send requests at these times, and wait `patience_s` beyond the last one's SLO for what is missing."""
    loop = asyncio.get_running_loop()
    found = Offered(slo_ns, [-1] * len(arrivals_ns), [LOST] * len(arrivals_ns), [])
    begin_ns, following, missing = now_ns() + _LEAD_NS, 0, len(arrivals_ns)
    all_done = loop.create_future()
    timer = Timer()

    def done(number: int, end: str) -> None:
        nonlocal missing
        found.ends[number] = end
        if end == ANSWERED:
            found.latency_ns[number] = now_ns() - begin_ns - arrivals_ns[number]
        missing -= 1
        if not missing and not all_done.done():
            all_done.set_result(None)

    def due() -> None:
        nonlocal following
        timer.clear()
        while following < len(arrivals_ns):
            late_ns = now_ns() - begin_ns - arrivals_ns[following]
            if late_ns < 0:
                timer.arm(begin_ns + arrivals_ns[following])
                return
            found.issue_delay_ns.append(late_ns)
            following += 1
            target.send(following - 1, done)

    set_timer_slack()
    loop.add_reader(timer.fileno(), due)
    gc.collect()
    gc.disable()
    try:
        timer.arm(begin_ns)
        span_s = (arrivals_ns[-1] + _LEAD_NS + slo_ns) / NS_PER_S
        await asyncio.wait([all_done], timeout=span_s + patience_s)
    finally:
        gc.enable()
        loop.remove_reader(timer.fileno())
        timer.close()
    return found


# ---------------------------------------------------------------------------------------- HTTP


def infer_message(model: str, inputs: bytes, shape: Sequence[int], timeout_us: int) -> bytes:
    """A POST of one inference: one FP32 input in binary, all outputs in binary, the timeout as a parameter."""
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": list(shape),
        "parameters": {"binary_data_size": len(inputs)},
    }
    parameters: dict[str, Any] = {"binary_data_output": True, "timeout": timeout_us}
    head = json.dumps({"parameters": parameters, "inputs": [tensor]}).encode()
    lines = (
        f"POST /v2/models/{model}/infer HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/octet-stream",
        f"Inference-Header-Content-Length: {len(head)}",
        f"Content-Length: {len(head) + len(inputs)}",
    )
    return "\r\n".join([*lines, "", ""]).encode() + head + inputs


class _Connection(asyncio.Protocol):
    """A kept connection with one request in flight."""

    def __init__(self, pool: HttpTarget) -> None:
        self._pool = pool
        self._seen = bytearray()
        self._left = -1  # bytes of the body that are missing; -1: the head is
        self._status = 0
        self.running: tuple[int, Done] | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._pool.came(self)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if self._left < 0 and not self._head():
            return
        if len(self._seen) < self._left:
            return
        body = bytes(self._seen[: self._left])
        del self._seen[: self._left]
        self._left = -1
        running, self.running = self.running, None
        if running is not None:
            running[1](running[0], _end_of(self._status))
            if self._status == 200 and self._pool.heard is not None:
                self._pool.heard(running[0], body)
        self._pool.came(self)

    def _head(self) -> bool:
        """Take the head, if it is whole."""
        end = self._seen.find(b"\r\n\r\n")
        if end < 0:
            if len(self._seen) > _HEAD_BYTES:
                self.transport.abort()
            return False
        head = bytes(self._seen[:end]).lower()
        del self._seen[: end + 4]
        self._status = int(head[9:12])
        at = head.find(b"\r\ncontent-length:")
        self._left = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else 0
        return True

    def connection_lost(self, error: Exception | None) -> None:
        running, self.running = self.running, None
        self._pool.went(self)
        if running is not None:
            running[1](running[0], FAILED)


def _end_of(status: int) -> str:
    if status == 200:
        return ANSWERED
    return REFUSED if status in (429, 503) else FAILED


class HttpTarget:
    """Sends `message`, or those in turn, over as many kept connections as are needed. Use it in `async with`.

    `heard` is called with the number and the body of each request that was answered with 200.
    """

    def __init__(
        self, port: int, *messages: bytes, heard: Callable[[int, bytes], None] | None = None
    ) -> None:
        self._port, self._messages, self.heard = port, messages, heard
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening: set[asyncio.Task[Any]] = set()
        self._waiting: deque[tuple[int, Done]] = deque()

    async def __aenter__(self) -> HttpTarget:
        for _ in range(_FIRST_CONNECTIONS):
            await self._open()
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._opening:
            task.cancel()
        for connection in list(self._all):
            connection.transport.abort()
        await asyncio.sleep(0)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: _Connection(self), "127.0.0.1", self._port)

    def send(self, number: int, done: Done) -> None:
        if self._free:
            self._write(self._free.pop(), number, done)
            return
        self._waiting.append((number, done))
        if len(self._all) + len(self._opening) < _MOST_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[Any]) -> None:
        self._opening.discard(task)
        if not task.cancelled() and task.exception() is not None and self._waiting:
            number, done = self._waiting.popleft()
            done(number, FAILED)

    def _write(self, connection: _Connection, number: int, done: Done) -> None:
        connection.running = (number, done)
        connection.transport.write(self._messages[number % len(self._messages)])

    def came(self, connection: _Connection) -> None:
        """A connection is free."""
        self._all.add(connection)
        if connection.transport.is_closing():
            return
        if self._waiting:
            self._write(connection, *self._waiting.popleft())
        else:
            self._free.append(connection)

    def went(self, connection: _Connection) -> None:
        self._all.discard(connection)
        if connection in self._free:
            self._free.remove(connection)


# -------------------------------------------------------------------------------------- native


class NativeTarget:
    """Sends inferences with these inputs in turn through slosched's own client; `heard` as HttpTarget's."""

    def __init__(
        self,
        client: AsyncClient,
        model: Model,
        slo_ns: int,
        *frames: bytes,
        heard: Callable[[int, bytes], None] | None = None,
    ) -> None:
        self._client, self._model, self._frames, self._slo_ns = client, model, frames, slo_ns
        self._heard = heard

    def send(self, number: int, done: Done) -> None:
        def on_reply(reply: Any, output: Frame | None) -> None:
            served = reply.code == Code.OK and output is not None
            done(number, ANSWERED if served else REFUSED)
            if served and output is not None and self._heard is not None:
                self._heard(number, bytes(output))

        frame = self._frames[number % len(self._frames)]
        try:
            self._client.submit(self._model, slo_ns=self._slo_ns, frame=frame, on_reply=on_reply)
        except ConnectionLost:
            done(number, FAILED)
