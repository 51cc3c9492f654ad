"""What a controller that decides nothing costs: the least that Python and ZeroMQ take on a machine.

A request comes from a client, goes to a worker, comes back a millisecond later, and is answered: two messages
in and two out, drained by descriptor on uvloop as the controller does, and nothing else. No struct is
decoded, nothing is queued, predicted or logged. What the real controller takes beyond it is what it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import uvloop
import zmq

RATE = 600
SECONDS = 8.0
_LEAD_S = 2.0
_EXEC_S = 0.001  # so that one worker that does one thing at a time is enough
_BODY = 120


def measure() -> dict[str, Any]:
    """CPU of the middle process, in cores and microseconds a request. Its peers are ended before it returns."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_middle())


def _socket(kind: int) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    return socket


async def _middle() -> dict[str, Any]:
    clients, worker = _socket(zmq.ROUTER), _socket(zmq.DEALER)
    client_port = clients.bind_to_random_port("tcp://127.0.0.1")
    worker_port = worker.bind_to_random_port("tcp://127.0.0.1")
    loop = asyncio.get_running_loop()
    passed = 0

    def from_clients() -> None:
        nonlocal passed
        while clients.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            peer, body = clients.recv_multipart(zmq.NOBLOCK)
            with contextlib.suppress(zmq.Again):  # the worker is not connected yet
                worker.send_multipart([peer, body], zmq.NOBLOCK)
            passed += 1
        if worker.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            loop.call_soon(from_worker)

    def from_worker() -> None:
        while worker.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            clients.send_multipart(worker.recv_multipart(zmq.NOBLOCK), zmq.NOBLOCK)
        if clients.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            loop.call_soon(from_clients)

    loop.add_reader(clients.get(zmq.FD), from_clients)
    loop.add_reader(worker.get(zmq.FD), from_worker)
    program = [sys.executable, str(Path(__file__).resolve())]
    children = [subprocess.Popen([*program, "worker", str(worker_port)])]
    try:
        await asyncio.sleep(_LEAD_S)  # nothing can be sent to it before it has connected
        children.append(subprocess.Popen([*program, "client", str(client_port)]))
        await asyncio.sleep(_LEAD_S)
        cpu_s, before = _cpu_s(), passed
        await asyncio.sleep(SECONDS)
        cpu_s, passed_then = _cpu_s() - cpu_s, passed - before
    finally:
        for child in children:
            child.kill()
            child.wait()
    return {
        "rate": RATE,
        "requests": passed_then,
        "cores": cpu_s / SECONDS,
        "cpu_us": 1e6 * cpu_s / max(1, passed_then),
    }


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _worker(port: int) -> None:
    socket = _socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{port}")
    while True:
        message = socket.recv_multipart()
        time.sleep(_EXEC_S)
        socket.send_multipart(message)


def _client(port: int) -> None:
    socket = _socket(zmq.DEALER)
    socket.connect(f"tcp://127.0.0.1:{port}")
    arrivals = random.Random(0)
    due_s = time.monotonic()
    ends_s = due_s + 2 * (_LEAD_S + SECONDS)
    while due_s < ends_s:
        due_s += arrivals.expovariate(RATE)
        time.sleep(max(0.0, due_s - time.monotonic()))
        socket.send(bytes(_BODY), zmq.NOBLOCK)
        while socket.get(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]
            socket.recv(zmq.NOBLOCK)


if __name__ == "__main__":
    {"worker": _worker, "client": _client}[sys.argv[1]](int(sys.argv[2]))
