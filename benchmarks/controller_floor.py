"""What a controller that decides nothing costs: the least that Python and ZeroMQ take on a machine.

A request comes from a client, goes to a worker, comes back a millisecond later, and is answered: two messages
in and two out, drained by descriptor on uvloop as the controller does, and nothing else. No struct is
decoded, nothing is queued, predicted or logged. What the real controller takes beyond it is what it does.
"""

from __future__ import annotations

import asyncio
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from slosched.clock import Waiter, now_ns
from slosched.transport.sockets import AsyncReader, Dealer, Router
from slosched.units import NS_PER_S

RATE = 600
SECONDS = 8.0
_LEAD_S = 2.0
_EXEC_S = 0.001  # so that one worker that does one thing at a time is enough
_BODY = bytes(120)
_WORKER = b"worker"


def measure() -> dict[str, Any]:
    """CPU of the middle process, in cores and microseconds a request. Its peers are ended before it returns."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_middle())


class _Middle:
    """Passes on what comes. `passed` counts requests."""

    def __init__(self) -> None:
        self.clients, self.workers = Router("127.0.0.1", 0), Router("127.0.0.1", 0)
        self.passed = 0
        self._readers = (
            AsyncReader(self.clients, self._from_clients),
            AsyncReader(self.workers, self._from_worker),
        )

    def _from_clients(self) -> None:
        for peer, frames in self.clients.receive():
            self.workers.send(_WORKER, [peer, *frames])
            self.passed += 1
        self._look_again()

    def _from_worker(self) -> None:
        for _, frames in self.workers.receive():
            if len(frames) > 1:  # the first says that it is there
                self.clients.send(bytes(frames[0]), frames[1:])
        self._look_again()

    def _look_again(self) -> None:
        for reader in self._readers:
            reader.recheck()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        self.clients.close()
        self.workers.close()


async def _middle() -> dict[str, Any]:
    middle = _Middle()
    program = [sys.executable, str(Path(__file__).resolve())]
    children = [subprocess.Popen([*program, "worker", str(middle.workers.port)])]
    try:
        await asyncio.sleep(_LEAD_S)  # nothing can be sent to it before it has connected
        children.append(subprocess.Popen([*program, "client", str(middle.clients.port)]))
        await asyncio.sleep(_LEAD_S)
        cpu_s, before = _cpu_s(), middle.passed
        await asyncio.sleep(SECONDS)
        cpu_s, passed = _cpu_s() - cpu_s, middle.passed - before
    finally:
        for child in children:
            child.kill()
            child.wait()
        middle.close()
    return {
        "rate": RATE,
        "requests": passed,
        "cores": cpu_s / SECONDS,
        "cpu_us": 1e6 * cpu_s / max(1, passed),
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _worker(port: int) -> None:
    dealer = Dealer(f"127.0.0.1:{port}", identity=_WORKER)
    waiter = Waiter(dealer.fileno())
    while not dealer.send([b"here"]):
        time.sleep(0.01)
    while True:
        for frames in dealer.receive():
            time.sleep(_EXEC_S)
            dealer.send(frames)
        if not dealer.has_input():
            waiter.wait(None, at_most_ns=NS_PER_S)


def _client(port: int) -> None:
    dealer = Dealer(f"127.0.0.1:{port}", identity=b"client")
    arrivals = random.Random(0)
    due_ns = now_ns()
    ends_ns = due_ns + int(2 * (_LEAD_S + SECONDS) * NS_PER_S)
    while due_ns < ends_ns:
        due_ns += int(arrivals.expovariate(RATE) * NS_PER_S)
        time.sleep(max(0.0, (due_ns - now_ns()) / NS_PER_S))
        dealer.send([_BODY])
        dealer.receive()


if __name__ == "__main__":
    {"worker": _worker, "client": _client}[sys.argv[1]](int(sys.argv[2]))
