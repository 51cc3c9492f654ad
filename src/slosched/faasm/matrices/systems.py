"""What the experiment compares, and how each is opened.

Nothing of this is Faasm: a warm slot of a worker stands for a Faaslet, and a call that shares nothing with the
other calls of its host for an instance in a container. Hosts that are apart are emulated on this one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import slosched.engines
from slosched.child_processes import computing_threads, environment
from slosched.engines import Engine
from slosched.errors import InvalidConfig, SloschedError, UnknownName
from slosched.faasm import layout
from slosched.faasm.gpu_worker import CUDA, gpu_words
from slosched.faasm.installed import lack_of
from slosched.faasm.matrices import blocks
from slosched.faasm.matrices.blocks import Plan
from slosched.faasm.matrices.functions import offered
from slosched.functions.state import folders
from slosched.functions.state.opening import open_store
from slosched.functions.state.server import NO_PROGRAM, Server, installed_program
from slosched.functions.state.state import State
from slosched.functions.state.store import Limits

_SHARED_MEMORY = Path("/dev/shm")
_SLO = "3600s"
#: Those whose leaves can be on a GPU.
ON_GPU = ("whole", "blocked", "local", "slot", "slots")
_MOST_WORKERS = 16
#: Memory beside the blocks: processes, temporaries, and this program's reference.
_SPARE_BYTES = 2 * 10**9


How = Literal["whole", "blocked", "graph"]


@dataclass(frozen=True, kw_only=True)
class System:
    """One system. `title` is for figures, `about` says what it is and what it emulates.

    `engine` runs the calls; "" is one process by itself, `how` it multiplies, with `one_core` or all. `hosts`
    are workers of `slots` slots with a local tier of their own each. `pushes`, `near` and `alone` are those of
    its plans (blocks.Plan).
    """

    name: str
    title: str
    about: str
    engine: Literal["", "slosched", "dask"] = ""
    how: How = "whole"
    one_core: bool = False
    hosts: int = 1
    slots: int = 1
    pushes: bool = False
    near: bool = False
    alone: bool = False

    def plan(self, size: int, splits: int, seed: int, kernel: str, prefix: str) -> Plan:
        """What its calls are told about a product."""
        return Plan(
            size=size,
            splits=splits,
            seed=seed,
            prefix=prefix,
            kernel=kernel,
            pushes=self.pushes,
            near=self.near,
            alone=self.alone,
        )

    @property
    def calls(self) -> bool:
        """Whether it is a graph of calls."""
        return bool(self.engine) or self.how == "graph"

    @property
    def published(self) -> str:
        """What the seed's directories would call it: FAASM, NATIVE, or its name."""
        return {"slots": layout.WARM, "instances": layout.NATIVE}.get(self.name, self.name)


def all_systems(workers: int) -> dict[str, System]:
    """The systems by name, in the order in which they are shown. Raises InvalidConfig."""
    if not 1 <= workers <= _MOST_WORKERS:
        raise InvalidConfig(f"workers are 1 to {_MOST_WORKERS}, not {workers}")
    return {
        each.name: replace(
            each, title=each.title.format(n=workers), about=each.about.format(n=workers)
        )
        for each in (*_single_processes(), *_engines(workers))
    }


def _single_processes() -> list[System]:
    return [
        System(
            name="whole",
            title="A @ B, one process",
            about="one multiplication in one process, with all cores or the GPU",
        ),
        System(
            name="whole-one-core",
            title="A @ B, one core",
            about="the same with one core",
            one_core=True,
        ),
        System(
            name="blocked",
            title="blocked, one core",
            about="the blocks of the graph one after the other in one process, with one core or the GPU",
            how="blocked",
            one_core=True,
        ),
        System(
            name="local",
            title="graph, inline",
            about="the calls inline in one process with one core: what calls and state cost by themselves",
            how="graph",
            one_core=True,
        ),
    ]


def _engines(workers: int) -> list[System]:
    return [
        System(
            name="slot",
            title="slosched, 1 slot",
            about="a worker with one warm slot",
            engine="slosched",
        ),
        System(
            name="slots",
            title="slosched, {n} slots",
            about="a worker with {n} warm slots, which share the host's local tier",
            engine="slosched",
            slots=workers,
        ),
        System(
            name="dask",
            title="Dask, {n} processes",
            about="Dask with {n} processes of one thread, which share the host's local tier (slosched's)",
            engine="dask",
            slots=workers,
        ),
        System(
            name="near",
            title="{n} hosts, near",
            about="{n} workers of a slot as EMULATED hosts, which share Redis; calls go near their blocks",
            engine="slosched",
            hosts=workers,
            pushes=True,
            near=True,
        ),
        System(
            name="anywhere",
            title="{n} hosts, anywhere",
            about="the same EMULATED hosts; calls go where a slot is free",
            engine="slosched",
            hosts=workers,
            pushes=True,
        ),
        System(
            name="instances",
            title="nothing shared",
            about="a worker with {n} slots, and each call has copies of its own from Redis, as instances in "
            "containers have (EMULATED)",
            engine="slosched",
            slots=workers,
            pushes=True,
            alone=True,
        ),
    ]


def lacks(system: System) -> str:
    """What is not installed of what a system needs; empty if it can run."""
    if system.engine == "dask":
        return lack_of("distributed")
    if system.pushes:
        return lack_of("redis") or ("" if installed_program() else NO_PROGRAM)
    return ""


def chosen(names: Sequence[str], kernel: str, workers: int) -> list[System]:
    """The systems of these names, by default all that the kernel and the number of workers allow.

    Raises UnknownName and InvalidConfig.
    """
    systems = all_systems(workers)
    possible = [each for each in systems if kernel == "numpy" or each in ON_GPU]
    if workers == 1:  # there is nothing to be near to, and one slot is there already
        possible = [each for each in possible if each not in ("slots", "near", "anywhere")]
    for name in names:
        if name not in systems:
            raise UnknownName("system", name, list(systems))
        if name not in possible:
            raise InvalidConfig(
                f"{name} does not run with the kernel {kernel} and {workers} worker(s); those that do: "
                f"{', '.join(possible)}"
            )
    return [each for each in systems.values() if each.name in (names or possible)]


def needed_bytes(system: System, size: int, splits: int) -> tuple[int, int]:
    """What a product takes at the most, in bytes: of /dev/shm, and of memory in all (with /dev/shm)."""
    whole = 4 * size * size
    beside = 10 * whole + _SPARE_BYTES  # A, B and the product in float64, temporaries
    if not system.calls:
        return whole, beside
    copy = blocks.stored_bytes(size, splits)
    # A local copy has a byte for each element beside it, and two are kept where it is set anew.
    local = copy * 5 // 4 * (1 if system.alone else system.hosts)
    embedded = 0 if system.pushes else copy
    return local + embedded, local + copy + beside


def lack_of_memory(system: System, size: int, splits: int) -> str:
    """Why a product does not fit into this machine now; empty if it does."""
    shared, memory = needed_bytes(system, size, splits)
    free = _free_bytes(_SHARED_MEMORY)
    if shared > free:
        return f"needs {shared / 1e9:.1f} GB of {_SHARED_MEMORY}, which has {free / 1e9:.1f} GB"
    available = _available_bytes()
    if memory > available:
        return f"needs {memory / 1e9:.1f} GB of memory, of which {available / 1e9:.1f} GB are free"
    return ""


def _free_bytes(place: Path) -> int:
    try:
        found = os.statvfs(place)
    except OSError:
        return 2**62
    return found.f_bavail * found.f_frsize


def _available_bytes() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 2**62
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 2**62


class Stores:
    """The Redis server of a run, started when a system first needs it, and ended with `close`."""

    def __init__(self) -> None:
        self._opened = ExitStack()
        self._address = ""

    def address(self, system: System) -> str:
        """The store of a system's state. Raises MissingPackage where it must be Redis and there is none."""
        if not system.pushes:
            return "embedded"
        if not self._address:
            self._address = self._opened.enter_context(Server(_free_port())).address
        return self._address

    def check(self) -> None:
        """Raise SloschedError if a system left state in the server."""
        if self._address:
            with closing(open_store(self._address)) as store:
                left = sorted(store.namespaces())
            if left:
                raise SloschedError(f"state was left in {self._address}: {', '.join(left)}")

    def close(self) -> None:
        self._opened.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def opened(
    system: System,
    kernel: str,
    namespace: str,
    store: str,
    room_bytes: int,
    logs: Path,
    *,
    device: str = CUDA,
) -> Iterator[tuple[Engine, list[State]]]:
    """The engine of a system that has one, and the state of its calls, which may take `room_bytes`.

    Leaves that are not NumPy's run on `device`. The first State is that of this process; if hosts are apart,
    each of them has one more. NumPy in its processes has a core for each slot. What slosched's processes print
    goes to `logs`. The state is gone afterwards.
    """
    functions = offered(kernel)
    limits = Limits(bytes=room_bytes)
    with ExitStack() as stack:
        state = stack.enter_context(State(namespace, store, own=True, limits=limits))
        options: dict[str, Any] = {"state": state}
        if system.engine == "slosched":
            words = ["--call-memory", "0"]
            words += [] if kernel == "numpy" else gpu_words(device)
            options |= {
                "workers": system.hosts,
                "slots": system.slots,
                "default_slo": _SLO,
                "apart": system.hosts > 1,
                "logs": logs,
                "worker_options": words,
            }
        elif system.engine == "dask":
            options |= {"workers": "processes", "slots": system.slots}
        # One core for each slot: NumPy's own threads would take the other slots'.
        with environment(computing_threads(1)):
            engine = stack.enter_context(slosched.engines.open(system.engine, functions, **options))
        states = [state]
        for number in range(system.hosts if system.hosts > 1 else 0):
            with folders.within_root(folders.root_of_host(number)):
                states.append(stack.enter_context(State(namespace, store)))
        yield engine, states
