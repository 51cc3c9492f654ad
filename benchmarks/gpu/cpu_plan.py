"""Which CPUs serve what on a host of GPUs: each worker, the controller and the client have their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched.cli.values import whole_numbers
from slosched.errors import SloschedError

#: For the controller: its loop, and the threads of its sockets and logs. As many for the client. The second
#: number where the workers have enough all the same: inputs of 0.6 MB keep several threads busy.
_CONTROL, _CONTROL_OF_MANY = 2, 4
#: For everything that serves no request: the benchmark itself, references, simulations.
_REST = 2
_LEAST_PER_WORKER = 2
#: More help a worker no further: a loop, the thread that prepares models, and what torch starts there.
_MOST_PER_WORKER = 8


@dataclass(frozen=True)
class CpuPlan:
    """CPUs by purpose. Each is empty where there are too few: any CPU may serve it then.

    `workers` has the CPUs of each GPU's worker, whose loop takes the first of them.
    """

    workers: tuple[tuple[int, ...], ...] = ()
    controller: tuple[int, ...] = ()
    client: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()

    def of_worker(self, gpu: int) -> tuple[int, ...]:
        return self.workers[gpu] if gpu < len(self.workers) else ()

    @property
    def serving(self) -> tuple[int, ...]:
        """All but the rest."""
        return (*(cpu for cpus in self.workers for cpu in cpus), *self.controller, *self.client)


def plan_cpus(cpus: Sequence[int], gpus: int) -> CpuPlan:
    """Divide `cpus` among the workers of `gpus` GPUs, the controller, the client and the rest."""
    enough = (len(cpus) - 2 * _CONTROL_OF_MANY - _REST) // gpus >= _MOST_PER_WORKER
    control = _CONTROL_OF_MANY if enough else _CONTROL
    each = min(_MOST_PER_WORKER, (len(cpus) - 2 * control - _REST) // gpus)
    if each < _LEAST_PER_WORKER:
        return CpuPlan()
    left = iter(cpus)
    controller, client = (tuple(next(left) for _ in range(control)) for _ in range(2))
    workers = tuple(tuple(next(left) for _ in range(each)) for _ in range(gpus))
    return CpuPlan(workers, controller, client, tuple(left))


@contextlib.contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """A process that is started in this block may run on `cpus` only; if there are none, on any CPU."""
    if not cpus:
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def first_siblings(cpus: Sequence[int]) -> list[int]:
    """The first of `cpus` on each physical core; all of them where the kernel does not tell."""
    taken: set[int] = set()
    first = []
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings = whole_numbers(str(path), path.read_text(encoding="utf-8").strip(), least=0)
        except (OSError, SloschedError):
            siblings = (cpu,)
        if not taken.intersection(siblings):
            first.append(cpu)
        taken.update(siblings)
    return first
