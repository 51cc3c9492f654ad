"""Measures the rungs: new processes, forks, and what a live process can drop and make again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.faasm.frame_processes import available_bytes, memory_of
from slosched.faasm.inference import wire
from slosched.faasm.inference.plan import Plan
from slosched.faasm.inference.process import InstanceProcess
from slosched.units import NS_PER_MS

#: A rung is gone through this many times before it is measured.
_WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that one more instance takes: of the host (PSS and RSS), and of the GPU (None without one).

    `room_bytes` and `gpu_room_bytes` are what there is for instances.
    """

    pss_bytes: float
    rss_bytes: float
    gpu_bytes: float | None
    room_bytes: int
    gpu_room_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """As fields of a record: `fit` is computed, and bounded by the host's memory or the GPU's."""
        fits = [self.room_bytes / self.pss_bytes] if self.pss_bytes > 0 else []
        if self.gpu_bytes:
            fits.append(self.gpu_room_bytes / self.gpu_bytes)
        return {
            "pss_mb": self.pss_bytes / 1e6,
            "rss_mb": self.rss_bytes / 1e6,
            "gpu_mb": None if self.gpu_bytes is None else self.gpu_bytes / 1e6,
            "fit": int(min(fits)) if fits else None,
        }


def times(wall_ns: Sequence[int], cpu_ns: Sequence[int]) -> dict[str, Any]:
    """Fields of a record: the median, the least and the most in ms, and the median of the CPU time."""
    return {
        "n": len(wall_ns),
        "ms": median(wall_ns) / NS_PER_MS,
        "least_ms": min(wall_ns) / NS_PER_MS,
        "most_ms": max(wall_ns) / NS_PER_MS,
        "cpu_ms": median(cpu_ns) / NS_PER_MS if cpu_ns else None,
    }


@contextmanager
def instance(plan: Plan | None) -> Iterator[InstanceProcess]:
    """A process that can answer; ended behind the block."""
    process = InstanceProcess(plan)
    try:
        process.ready()
        yield process
    finally:
        process.close()


def new_processes(plan: Plan | None, count: int) -> dict[str, Any]:
    """Rung L4: from the wish to the moment at which a new process can answer, with the parts of its start."""
    walls, cpus, imports, loads = [], [], [], []
    for _ in range(count):
        began_ns = now_ns()
        with instance(plan) as process:
            walls.append(now_ns() - began_ns)
            ready = process.ready()
            cpus.append(ready.cpu_ns)
            imports.append(ready.import_ns / NS_PER_MS)
            loads.append(ready.load_ns / NS_PER_MS)
    found = times(walls, cpus)
    if plan is not None:
        found |= {"import_ms": median(imports), "load_ms": median(loads)}
    return found


def rung(process: InstanceProcess, name: str, count: int) -> dict[str, Any]:
    """A rung of a live process."""
    process.ask(wire.Measure(name, _WARM_UP), wire.Measured)
    measured = process.ask(wire.Measure(name, count), wire.Measured)
    return times(measured.wall_ns, measured.cpu_ns)


def forks(process: InstanceProcess, count: int) -> dict[str, Any]:
    """A fork of a process that has loaded all: from the wish to its first instruction of Python."""
    found = [process.ask(wire.Fork(), wire.Measured) for _ in range(count + _WARM_UP)][_WARM_UP:]
    return times([each.wall_ns[0] for each in found], [each.cpu_ns[0] for each in found])


def memory_of_processes(plan: Plan | None, count: int) -> Memory:
    """What one more process takes, beside `count` - 1 others (at least one)."""
    count = max(2, count)
    room = available_bytes()
    with ExitStack() as opened:
        first = opened.enter_context(instance(plan))
        alone = pss_of([first.pid])
        before, total = _gpu(first, plan)
        others = [opened.enter_context(instance(plan)) for _ in range(count - 1)]
        pids = [first.pid, *(each.pid for each in others)]
        after, _ = _gpu(first, plan)
        gpu = None if plan is None or plan.device != "cuda" else (after - before) / (count - 1)
        return Memory(
            pss_bytes=(pss_of(pids) - alone) / (count - 1),
            rss_bytes=_rss(pids) / count,
            gpu_bytes=gpu,
            room_bytes=room,
            gpu_room_bytes=total,
        )


def memory_of_forks(process: InstanceProcess, count: int) -> Memory:
    """What one more fork takes, beside the others, after it has answered."""
    count = max(2, count)
    room = available_bytes()
    held = process.ask(wire.Hold(1), wire.Held)
    alone = pss_of([process.pid, *held.pids])
    held = process.ask(wire.Hold(count), wire.Held)
    together = pss_of([process.pid, *held.pids])
    rss = _rss(held.pids) / count
    process.ask(wire.Measure("L0", 0), wire.Measured)  # they end
    return Memory(
        pss_bytes=(together - alone) / (count - 1), rss_bytes=rss, gpu_bytes=None, room_bytes=room
    )


def _gpu(process: InstanceProcess, plan: Plan | None) -> tuple[int, int]:
    if plan is None or plan.device != "cuda":
        return 0, 0
    weighed = process.ask(wire.Weigh(), wire.Weighed)
    return weighed.gpu_used_bytes, weighed.gpu_total_bytes


def pss_of(pids: Sequence[int]) -> int:
    """PSS of all these processes, in bytes. Raises SloschedError if one is gone."""
    return sum(_memory(pid)[0] for pid in pids)


def _rss(pids: Sequence[int]) -> int:
    return sum(_memory(pid)[1] for pid in pids)


def _memory(pid: int) -> tuple[int, int]:
    memory = memory_of(pid)
    if memory is None:
        raise SloschedError(f"the memory of process {pid} cannot be read")
    return memory.pss_bytes, memory.rss_bytes
