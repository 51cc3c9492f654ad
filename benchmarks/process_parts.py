"""The parts that look at processes and not at requests: startup and memory."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import Load, controller_arguments, serving
from load_parts import COPIES, GPUS

from slosched.clock import now_ns
from slosched.experiment.children import Child, ChildFailed
from slosched.units import NS_PER_S

_LINE_WITHIN_S = 20.0
_END_WITHIN_S = 10.0
MEMORY_RATE = 1200
SAMPLE_EVERY_S = 5.0


def startup(directory: Path, runs: int) -> dict[str, Any]:
    """Start a controller `runs` times beside an idle worker, after one start that only warms up.

    Times are from just before fork and exec until the line was read: "ready" (clients are taken) and
    "joined" (the worker's GPUs are in use). Raises ChildFailed if a line does not come.
    """
    measured = []
    with serving(directory / "startup", gpus=GPUS) as cluster:
        cluster.children.end(cluster.controller)
        worker_port = _port_of(cluster.worker)
        for index in range(runs + 1):
            log_dir = directory / f"startup-controller-{index}"
            result = _start_once(
                [sys.executable, "-m", "slosched", *controller_arguments(worker_port, log_dir)]
            )
            print(
                f"  ready {result['ready_s']:.3f} s, worker joined {result['joined_s']:.3f} s",
                flush=True,
            )
            measured.append(result)
    return {"warm_up": measured[0], "runs": measured[1:]}


def _port_of(worker: Child) -> int:
    return int(
        worker.log.read_text().partition(" ready on ")[2].partition(": ")[0].rpartition(":")[2]
    )


def _start_once(command: list[str]) -> dict[str, Any]:
    started_ns = now_ns()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        ready_ns = _await_text(process, b"ready on", started_ns)
        joined_ns = _await_text(process, b"joined", started_ns)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        return {
            "ready_s": ready_ns / NS_PER_S,
            "joined_s": joined_ns / NS_PER_S,
            "rss_bytes": rss_bytes(process.pid),
            "torch_is_loaded": "torch" in maps,
        }
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _await_text(process: subprocess.Popen[bytes], text: bytes, since_ns: int) -> int:
    """Return the ns from `since_ns` until a line with `text` came."""
    assert process.stdout is not None
    fd, seen = process.stdout.fileno(), b""
    while text not in seen:
        left_s = _LINE_WITHIN_S - (now_ns() - since_ns) / NS_PER_S
        readable, _, _ = select.select([fd], [], [], max(0.0, left_s))
        chunk = os.read(fd, 65536) if readable else b""
        if not chunk:
            printed = seen.decode(errors="replace").strip() or "nothing"
            raise ChildFailed(
                f"the controller did not say {text.decode()!r}; it printed: {printed}"
            )
        seen += chunk
    return now_ns() - since_ns


def memory(directory: Path, minutes: float) -> dict[str, Any]:
    """Resident memory of controller, worker and client under 1,200 requests/s for `minutes`."""
    samples = []
    load = Load(
        rate=MEMORY_RATE, copies=COPIES, slo_start="100ms", slo_end="100ms", period_s=60 * minutes
    )
    with serving(directory / "memory", gpus=GPUS) as cluster:
        client, _ = cluster.start_client(load)
        pids = {
            "controller": cluster.controller.process.pid,
            "worker": cluster.worker.process.pid,
            "client": client.process.pid,
        }
        started_ns = now_ns()
        end_ns = started_ns + int((60 * minutes + 60) * NS_PER_S)
        while cluster.children.wait(client, SAMPLE_EVERY_S) is None and now_ns() < end_ns:
            cluster.children.check()
            at_s = (now_ns() - started_ns) / NS_PER_S
            sample = {"at_s": at_s} | {
                f"{name}_bytes": rss_bytes(pid) for name, pid in pids.items()
            }
            samples.append(sample)
            sizes = ", ".join(f"{name} {sample[f'{name}_bytes'] / 2**20:.1f} MiB" for name in pids)
            print(f"  {at_s:.0f} s: {sizes}", flush=True)
        if client.process.poll() != 0:
            raise ChildFailed(f"the client did not end well: {client.last_line()}")
    return {"minutes": minutes, "rate": MEMORY_RATE, "samples": samples}


def rss_bytes(pid: int) -> int:
    """Resident memory of a process; 0 once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
