"""What the experiment compares. Every system runs the same `Instance`, and gets the same requests.

Nothing here is Faasm: a warm slot of a worker stands for a Faaslet, a process per instance for a container.
The start of a container is a sleep, as the original's COLD_START_DELAY_MS is, and is called EMULATED
wherever it is shown.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from slosched.errors import MissingPackage, SloschedError, UnknownName
from slosched.faasm.gpu_worker import gpu_words
from slosched.faasm.inference import functions
from slosched.faasm.inference.choices import ABOUT, LIVE_RUNGS, SYSTEMS, WARM
from slosched.faasm.inference.instance import Instance
from slosched.faasm.inference.plan import Plan
from slosched.faasm.inference.pool import Pool
from slosched.faasm.inference.requests import Done, Request, System, ended, ok
from slosched.functions.errors import CallFailed, CallRefused
from slosched.units import NS_PER_S

_END_WITHIN_S = 90.0


def check_names(names: Sequence[str]) -> None:
    """Raise UnknownName for a system that there is not."""
    for name in names:
        if name not in ABOUT:
            raise UnknownName("system", name, list(SYSTEMS))


def lacks(system: str, rung: str) -> str:
    """Why a system has no cold starts of that rung; empty if it has."""
    if rung == "L4" and system == "loop":
        return "a new process is another program than the one that sends"
    if rung == "L4" and system == "dask":
        return "Dask restarts a worker only with all that it runs"
    if system == "container" and rung != "L3":
        return "its cold start is emulated, and is the same on each rung; it stands at L3"
    return ""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a system is opened. `slo_ns` is the SLO of slosched's requests; `logs` a folder for its processes.

    `with_new`: there are requests of rung L4, `with_rebuilt`: of L3.
    """

    plan: Plan
    instances: int
    slo_ns: int
    logs: Path
    with_new: bool
    with_rebuilt: bool = True


def opened(name: str, opening: Opening) -> System:
    """Open the system. Raises UnknownName, MissingPackage and what its parts raise."""
    check_names([name])
    if name == "slosched":
        return Slosched(opening)
    if name in ("process", "container"):
        return Pool(name, ABOUT[name], opening.plan, opening.instances)
    return Loop(opening) if name == "loop" else DaskSystem(opening)


class _Closing:
    """`with` for a system."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Slosched(_Closing):
    """A controller, a worker and its slots, as processes of this host. `opening.slo_ns` may be changed."""

    name = "slosched"
    about = ABOUT["slosched"]

    def __init__(self, opening: Opening) -> None:
        from slosched.engines.live import LiveEngine

        on_gpu = opening.plan.device == "cuda"
        self.slo_ns = opening.slo_ns
        self._call: Any = functions.classify_gpu if on_gpu else functions.classify
        self._new: Any = functions.classify_new_gpu if on_gpu else functions.classify_new
        # On a GPU an instance that is rebuilt is another process than those that answer meanwhile.
        self._rebuilt: Any = None
        if on_gpu and opening.with_rebuilt:
            self._rebuilt = functions.classify_rebuilt_gpu
        offered = [self._call, self._rebuilt, self._new if opening.with_new else None]
        words = ["--call-memory", "0"]
        words += gpu_words() if on_gpu else []
        self._engine = LiveEngine(
            [each for each in offered if each is not None],
            slots=opening.instances,
            logs=opening.logs,
            worker_options=words,
        )
        self._with_new = opening.with_new

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        slo_s = self.slo_ns / NS_PER_S
        client = self._engine.client
        if request.rung == "L4":
            future = client.start_call(self._new, request.image, slo=slo_s)
        elif request.rung == "L3" and self._rebuilt is not None:
            future = client.start_call(self._rebuilt, request.image, slo=slo_s)
        else:
            future = client.start_call(self._call, request.image, request.rung, slo=slo_s)

        def over(_: Any) -> None:
            try:
                done(ok(future.result()))
            except CallRefused as error:
                done(ended("refused", f"code {error.code}: {error.reason}"))
            except CallFailed as error:
                done(ended("failed", f"code {error.code}: {error.reason}"))
            except BaseException as error:  # it was cancelled, or the client is gone
                done(ended("failed", f"{type(error).__name__}: {error}"))

        future.add_done_callback(over)
        return lambda: _ignored(future.cancel())

    def lacks(self, rung: str) -> str:
        return "" if rung != "L4" or self._with_new else "it was opened without"

    def close(self) -> None:
        self._engine.close()


class DaskSystem(_Closing):
    """A Dask cluster of this host."""

    name = "dask"
    about = ABOUT["dask"]

    def __init__(self, opening: Opening) -> None:
        from slosched.engines.dask_engine import DaskEngine

        self._call: Any = functions.classify
        self._engine = DaskEngine([self._call], workers="processes", slots=opening.instances)

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        handle = self._engine.call(self._call, request.image, request.rung)

        def over() -> None:
            try:
                done(ok(handle.result(_END_WITHIN_S)))
            except BaseException as error:
                done(ended("failed", f"{type(error).__name__}: {error}"))

        handle.when_done(over)
        return handle.cancel

    def lacks(self, rung: str) -> str:
        return lacks(self.name, rung)

    def close(self) -> None:
        self._engine.close()


class Loop(_Closing):
    """One instance in this process, in one thread."""

    name = "loop"
    about = ABOUT["loop"]

    def __init__(self, opening: Opening) -> None:
        try:
            self._instance = Instance(opening.plan)
        except ImportError as error:
            raise MissingPackage(
                f"the loop needs torch ({error}): pip install 'slosched[torch]'"
            ) from error
        self._waiting: queue.SimpleQueue[tuple[Request, Done, threading.Event] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="slosched loop", daemon=True)
        self._thread.start()

    def submit(self, request: Request, done: Done) -> Callable[[], None]:
        given_up = threading.Event()
        self._waiting.put((request, done, given_up))
        return given_up.set

    def _run(self) -> None:
        while (each := self._waiting.get()) is not None:
            request, done, given_up = each
            if given_up.is_set():
                done(ended("timeout", "it was given up before it began"))
                continue
            try:
                done(ok(self._instance.answer(request.image, request.rung)))
            except SloschedError as error:
                done(ended("failed", str(error)))

    def lacks(self, rung: str) -> str:
        return "" if rung in (WARM, *LIVE_RUNGS) else lacks(self.name, rung)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(_END_WITHIN_S)


def _ignored(value: object) -> None:
    """A callback returns nothing."""
