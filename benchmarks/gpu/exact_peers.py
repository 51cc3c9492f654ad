"""Rows beside the product: plain CUDA graphs, and two other servers under the same open-loop client.

The peers have the GPU to themselves: the worker is ended before one starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exact_rig import NotHere, Rig, RowFailed, check

from slosched.clock import now_ns
from slosched.experiment.children import ChildFailed, Children
from slosched.units import NS_PER_S

_PEERS = Path(__file__).resolve().parent / "peers"
RATES = (300, 600, 1200, 2400)
SLOS_MS = (5, 10, 25, 100)
_RUN_S = 3.0
#: Importing torch, building the model, running each batch size.
_READY_S = 90.0
_GRAPHS_WITHIN_S = 90.0
_END_WITHIN_S = 8.0


def graphs(rig: Rig) -> dict[str, Any]:
    """Row "graphs": the back-to-back rate of plain CUDA graphs, which goodput is compared with."""
    if rig.settings.emulated:
        raise NotHere("an emulated GPU has no graphs")
    rig.stop_workers()
    directory = rig.new_directory("graphs")
    out = directory / "graphs.json"
    with Children((sys.executable, str(_PEERS / "graph_rate.py"))) as children:
        child = children.start("graphs", [rig.settings.device], out, stdout=out)
        code = children.wait(child, _GRAPHS_WITHIN_S)
        if code != 0:
            raise RowFailed(f"graph_rate.py ended with exit code {code}; its error stands above")
    figures = json.loads(out.read_text(encoding="utf-8").strip().splitlines()[-1])
    rates = {
        int(size): int(size) * NS_PER_S / ns for size, ns in figures["back_to_back_ns"].items()
    }
    return {
        "figures": figures,
        "checks": [
            check(f"plain graphs back to back, batch {size}", rate, "/s")
            for size, rate in rates.items()
            if size in (1, 16)
        ],
    }


# -------------------------------------------------------------------------------------- the grid


def of_slosched(rig: Rig) -> dict[str, Any]:
    """Row "peer_slosched": this scheduler under the grid, one instance."""
    with rig.serving("peer-slosched") as served:
        return _grid(rig, f"slosched://{served.address}/{rig.settings.model}", served.directory)


def of_asyncio(rig: Rig) -> dict[str, Any]:
    """Row "peer_asyncio": the batching server of an afternoon."""
    rig.model()  # said before anything starts
    rig.stop_workers()
    directory = rig.new_directory("peer-asyncio")
    with Children((sys.executable, str(_PEERS / "asyncio_server.py"))) as children:
        server = children.start(
            "asyncio server", [rig.settings.device, rig.settings.profile], directory / "server.log"
        )
        port = children.wait_ready(server, within_s=_READY_S)
        return _grid(rig, f"http://127.0.0.1:{port}/inference", directory)


def of_mosec(rig: Rig) -> dict[str, Any]:
    """Row "peer_mosec": mosec."""
    rig.model()
    rig.stop_workers()
    directory = rig.new_directory("peer-mosec")
    with _mosec(rig, directory) as port:
        return _grid(rig, f"http://127.0.0.1:{port}/inference", directory)


def _grid(rig: Rig, target: str, directory: Path) -> dict[str, Any]:
    rates = [rig.rate(rate) for rate in RATES]
    seconds = rig.settings.seconds(_RUN_S)
    # An SLO is the same multiple of batch 1 on a GPU that is slower.
    slower = rig.rate(1e9) / 1e9
    slos_ms = [ms / slower for ms in SLOS_MS]
    out = directory / "cells.json"
    arguments = [
        target,
        "--rates",
        ",".join(f"{rate:g}" for rate in rates),
        "--slos-ms",
        ",".join(f"{ms:g}" for ms in slos_ms),
        "--seconds",
        f"{seconds:g}",
        "--out",
        str(out),
    ]
    within_s = 60 + len(rates) * len(SLOS_MS) * (seconds + 6)
    with Children((sys.executable, str(_PEERS / "open_loop.py"))) as children:
        child = children.start("open-loop client", arguments, directory / "open_loop.log")
        code = children.wait(child, within_s)
        if code != 0:
            raise ChildFailed(f"the client ended with exit code {code}: {child.last_line()}")
    cells = json.loads(out.read_text(encoding="utf-8"))
    names = [(rate, slo) for rate in RATES for slo in SLOS_MS]
    for found, (rate, slo) in zip(cells, names, strict=True):
        found |= {"meant_rate": rate, "meant_slo_ms": slo}
    return {"figures": {"cells": cells, "seconds": seconds}, "checks": []}


# ---------------------------------------------------------------------------------------- mosec


@contextlib.contextmanager
def _mosec(rig: Rig, directory: Path) -> Iterator[int]:
    """A mosec server that answers; its whole process group is ended at the end."""
    port = _free_port()
    environment = os.environ | {
        "PEER_DEVICE": rig.settings.device,
        "PEER_PROFILE": rig.settings.profile,
        "PYTHONUNBUFFERED": "1",
    }
    log = directory / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                str(_PEERS / "mosec_server.py"),
                "--address",
                "127.0.0.1",
                "--port",
                str(port),
                "--log-level",
                "warning",
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=directory,
        )
    try:
        _await_answer(process, port, log)
        yield port
    finally:
        _end_group(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _await_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait until a request is answered with 200. Raises ChildFailed."""
    give_up_ns = now_ns() + round(_READY_S * NS_PER_S)
    request = (
        b"POST /inference HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    while True:
        answer = "it does not listen"
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 2.0) as peer,
        ):
            peer.settimeout(5.0)
            peer.sendall(request)
            answer = peer.recv(4096).partition(b"\r\n")[0].decode(errors="replace")
            if " 200" in answer:
                return
        if process.poll() is not None:
            raise ChildFailed(f"mosec ended with {process.returncode}: {_tail(log)}")
        if now_ns() > give_up_ns:
            raise ChildFailed(
                f"mosec did not serve within {_READY_S:.0f} s ({answer}): {_tail(log)}"
            )
        time.sleep(0.3)


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-8:])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, which ends its own; what is left of its process group is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_WITHIN_S)
    # The group is of this server's making alone: it was started in a session of its own.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_WITHIN_S)
