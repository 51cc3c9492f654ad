"""What the benchmark compares: slosched's engines, Dask in two forms, and two bare process pools."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import bench_functions

import slosched.engines
from slosched.engines import Engine
from slosched.functions.function import Function
from slosched.functions.state.state import State

#: In the order in which they are shown. The first is ours.
SYSTEMS = ("slosched", "dask-processes", "dask-threads", "pool", "executor", "local")
POOLS = ("pool", "executor")
WAIT_S = 120.0


class System(Protocol):
    """Something that calls functions."""

    name: str

    def one(self, function: Function[Any], *args: Any) -> Any:
        """Call it and wait for the value."""

    def many(self, function: Function[Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The values of many calls, as fast as the system can; errors in place of values."""


class OnEngine:
    """An engine of slosched's."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine = name, engine

    def one(self, function: Function[Any], *args: Any) -> Any:
        return self.engine.call(function, *args).result(WAIT_S)

    def many(self, function: Function[Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self.engine.map(function, calls)


class OnDask(OnEngine):
    """Dask: its `map` fetches many results together, which is its fastest way."""

    def bare(self, count: int) -> list[int]:
        """As many tasks that return their number, by Dask's own `map`: without frames, codes and deadlines."""
        engine: Any = self.engine
        tasks = engine.client.map(plain_noop, range(count), pure=False)
        values: list[int] = engine.client.gather(tasks)
        return values

    def hurry(self) -> None:
        """Send without the pauses of 2 to 10 ms between messages that are fixed in Dask's code."""
        engine: Any = self.engine
        client = engine.client
        client.scheduler_comm.interval = 0
        scheduler = client.cluster.scheduler
        for each in (*scheduler.stream_comms.values(), *scheduler.client_comms.values()):
            each.interval = 0
        client.run(_hurry_worker)


def _hurry_worker(dask_worker: Any) -> None:
    dask_worker.batched_stream.interval = 0


def plain_noop(n: int) -> int:
    """What a bare pool calls: it knows no functions of slosched, and pays for none."""
    return n


class OnPool:
    """multiprocessing.Pool: one message for each call, no deadlines, no calls in calls, no codes."""

    name = "pool"

    def __init__(self, pool: multiprocessing.pool.Pool) -> None:
        self._pool = pool

    def one(self, function: Function[Any], *args: Any) -> Any:
        return self._pool.apply_async(plain_noop, args).get(WAIT_S)

    def many(self, function: Function[Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        return self._pool.starmap_async(plain_noop, calls, chunksize=1).get(WAIT_S)


class OnExecutor:
    """concurrent.futures.ProcessPoolExecutor, likewise."""

    name = "executor"

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def one(self, function: Function[Any], *args: Any) -> Any:
        return self._executor.submit(plain_noop, *args).result(WAIT_S)

    def many(self, function: Function[Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        futures: list[Future[int]] = [self._executor.submit(plain_noop, *args) for args in calls]
        return [each.result(WAIT_S) for each in futures]


@contextmanager
def opened(
    name: str, slots: int, state: State | None = None, *, kills: bool = False
) -> Iterator[System]:
    """The system `name` with that many slots; its calls share `state`.

    With `kills` Dask sends its workers no call ahead, so that a lost one takes the fewest along.

    """
    functions: list[Function[Any] | str] = [
        *bench_functions.PLAIN,
        *(bench_functions.STATE if state else []),
    ]
    options: dict[str, Any] = {"state": state} if state else {}
    if name == "pool":
        with multiprocessing.get_context("spawn").Pool(slots) as pool:
            yield OnPool(pool)
    elif name == "executor":
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(slots, mp_context=spawn) as executor:
            yield OnExecutor(executor)
    elif name.startswith("dask-"):
        workers = name.removeprefix("dask-")
        if kills:
            options["saturation"] = 1.0
        with slosched.engines.open(
            "dask", functions, workers=workers, slots=slots, **options
        ) as engine:
            yield OnDask(name, engine)
    elif name == "local":
        with slosched.engines.open("local", functions, **options) as engine:
            yield OnEngine(name, engine)
    else:
        with slosched.engines.open("slosched", functions, slots=slots, **options) as engine:
            yield OnEngine(name, engine)
