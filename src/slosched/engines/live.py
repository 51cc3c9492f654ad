"""slosched itself as an engine: a controller, workers and a client, on this host or at an address."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from slosched.clients.blocking import Client
from slosched.clients.calls import prepared
from slosched.codes import Code
from slosched.engines.engine import Offered, known, offered, run_state
from slosched.engines.restarts import Restarts, Start
from slosched.errors import ConnectionLost, InvalidConfig
from slosched.experiment.children import Child, ChildFailed, Children
from slosched.functions.errors import FunctionError, call_failed
from slosched.functions.function import Function, duration_ns_of
from slosched.functions.registry import find
from slosched.functions.state import folders
from slosched.functions.state.state import State

_READY_S = 60.0
#: How long a function may take to be loaded: its module, its init.
_LOADED_S = 120.0
_MOST_WORKERS = 64
#: How the folders of logs begin, before the number of the program's process.
_FOLDER = "slosched-engine-"
#: A process that was killed is seen to have ended at most this long after its connections broke.
_ENDS_WITHIN_S = 1.0
#: `call` waits for the answer of another one for at most this time.
_ROOM_S = 600.0


class LiveHandle:
    """A call that was sent."""

    def __init__(
        self, function: Function[Any], future: Future[Any], check: Callable[[BaseException], None]
    ) -> None:
        self._function, self._future, self._check = function, future, check

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value. Raises what Client.call does; TimeoutError after `timeout_s`: it goes on then;
        ChildFailed if the engine broke meanwhile.
        """
        try:
            return self._future.result(timeout_s)
        except ConnectionLost as error:
            self._check(error)
            raise
        except CancelledError as error:
            self._check(error)
            raise call_failed(
                self._function.name, code=Code.CANCELLED, reason="its caller gave it up"
            ) from None

    @property
    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        """Give the call up; it is ended if it runs."""
        self._future.cancel()


class LiveEngine:
    """A controller with `workers` workers of `slots` slots each, as processes of this host; or an `address`.

    `slots` is by default what the worker takes, its cores. Calls that name no SLO, and whose function names
    none, have `default_slo`; at an `address` the controller's own. `state` is a State, or the address of a
    store: then the namespace is the engine's (docs/state.md). Output and logs go to `logs`, by default a
    folder that is removed with the engine. At most `most_unanswered` calls are on their way at a time, and
    one more waits in `call`; a controller that refuses calls unread, because they come too fast for its
    core, gets them again. `worker_options` and `controller_options` are further words for their commands.

    With `apart` each worker has shared memory of its own, as if it ran on another host: arrays of the state go
    from one to the other through the store alone, which must then be Redis or embedded:FOLDER. Those hosts are
    emulated: network, cores and memory are this host's.

    A worker that ends is started again: what it ran is answered with a code, and calls that come before it is
    back are refused, unless another worker takes them. If the controller ends, or a worker does for the sixth
    time in a minute, calls raise ChildFailed from then on.

    Workers import the functions' modules, so a function of `__main__` or within another one cannot be used.
    Raises FunctionError for these, ChildFailed if a process does not start, InvalidRequest or RequestFailed
    if a function cannot be loaded, PeerUnreachable if no controller answers at `address`.
    """

    name = "slosched"

    def __init__(
        self,
        functions: Sequence[Offered],
        *,
        address: str | None = None,
        workers: int = 1,
        slots: int | None = None,
        default_slo: str | float = "60s",
        state: State | str | None = None,
        logs: str | Path | None = None,
        most_unanswered: int = 256,
        apart: bool = False,
        worker_options: Sequence[str] = (),
        controller_options: Sequence[str] = (),
    ) -> None:
        self.functions = offered(functions)
        if most_unanswered < 1:
            raise InvalidConfig("most_unanswered is at least 1")
        self._most_unanswered = most_unanswered
        self._room = threading.BoundedSemaphore(most_unanswered)
        if not 1 <= workers <= _MOST_WORKERS or (slots is not None and slots < 1):
            raise InvalidConfig(
                f"an engine has 1 to {_MOST_WORKERS} workers with at least one slot"
            )
        self.address = address or ""
        self.workers, self.slots, self.apart = workers, slots, apart
        self._restarts: Restarts | None = None
        self._worker_options = [*worker_options]
        self._controller_options = [
            *("--default-slo", f"{duration_ns_of(default_slo)}ns"),
            *controller_options,
        ]
        tend: Callable[..., Restarts] | None = None
        with ExitStack() as opened:
            if address is None:
                specs = [_importable(each) for each in functions]
                try:
                    tend = self._start(opened, specs, state, logs)
                except ChildFailed as error:
                    if logs is not None or error.child is None:
                        raise
                    text = error.child.last_line()  # its file is removed with the others
                    raise ChildFailed(
                        f"the {error.child.name} did not start: {text}; logs=FOLDER keeps all that it wrote"
                    ) from None
            elif state is not None or logs is not None or apart:
                raise InvalidConfig(
                    "state, logs and apart are those of the workers at that address"
                )
            self._client = Client(self.address, name="slosched engine", timeout_s=_READY_S)
            opened.callback(self._client.close)
            if tend is not None:
                self._restarts = tend(when_broken=self._client.close)
                opened.callback(self._restarts.close)
            for name in self.functions:
                self._client.load(name, timeout_s=_LOADED_S)
            self._opened = opened.pop_all()

    def _start(
        self,
        opened: ExitStack,
        specs: Sequence[str],
        state: State | str | None,
        logs: str | Path | None,
    ) -> Callable[..., Restarts]:
        """Start the processes. `opened` ends them, and what else was opened for them. Returns what looks after
        them, once it is called.
        """
        if logs is None:
            _remove_left_behind(Path(tempfile.gettempdir()))
            prefix = f"{_FOLDER}{os.getpid()}-"
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=prefix)))
        else:
            folder = Path(logs)
            folder.mkdir(parents=True, exist_ok=True)
        shared, owned = run_state(state)
        if shared is not None:
            if owned:
                opened.callback(shared.close)
            store = state if isinstance(state, str) else shared.store.name
            if self.apart and store == "embedded":
                raise InvalidConfig(
                    "workers that are apart share no memory, which the store embedded needs: give state a "
                    "Redis, or embedded:FOLDER"
                )
            self._worker_options += ["--state", store, "--namespace", shared.namespace]
        environment = _environment()
        roots = [folders.root_of_host(n) for n in range(self.workers)] if self.apart else []
        if roots:
            opened.callback(folders.sweep_hosts)
        children = opened.enter_context(Children(env=environment))
        words = ["worker", "--device", "none", "--functions", ",".join(specs)]
        words += ["--bind", "127.0.0.1", "--port", "0", *self._worker_options]
        words += [] if self.slots is None else ["--slots", str(self.slots)]
        starts = [
            Start(
                f"worker {n}",
                words,
                folder,
                {**environment, folders.PREFIX_VARIABLE: roots[n]} if roots else None,
            )
            for n in range(self.workers)
        ]
        started = [
            children.start(each.name, each.words, folder / f"worker-{n}.log", env=each.env)
            for n, each in enumerate(starts)
        ]
        ports = [children.wait_ready(each, within_s=_READY_S) for each in started]
        words = ["controller", "INFER5", "--bind", "127.0.0.1", "--port", "0", "--http-port", "-1"]
        words += ["--workers", ",".join(f"127.0.0.1:{port}" for port in ports)]
        words += ["--log-dir", str(folder / "run"), *self._controller_options]
        controller = children.start("controller", words, folder / "controller.log")
        port = children.wait_ready(controller, within_s=_READY_S)
        self.address = f"127.0.0.1:{port}"
        again = [
            replace(each, words=[*each.words, "--port", str(at)])  # the last one counts
            for each, at in zip(starts, ports, strict=True)
        ]
        return partial(Restarts, children, again, started, controller)

    @property
    def processes(self) -> list[Child]:
        """The processes of the engine: its workers, and then its controller."""
        restarts = self._restarts
        return [] if restarts is None else [*restarts.workers, restarts.controller]

    def check(self) -> None:
        """Raise ChildFailed if a process of the engine has ended, also if another was started in its place."""
        if self._restarts is not None:
            self._restarts.check()

    def _check_unbroken(self, error: BaseException) -> None:
        """Raise ChildFailed if `error` came because the engine cannot go on."""
        if self._restarts is not None:
            lost = isinstance(
                error, ConnectionLost
            )  # a connection breaks before its process has ended
            self._restarts.check_unbroken(_ENDS_WITHIN_S if lost else 0.0)

    @property
    def client(self) -> Client:
        """The engine's client, for what only slosched has."""
        return self._client

    def call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: str | float | None = None,
        near: str = "",
        **kwargs: Any,
    ) -> LiveHandle:
        """Send a call; see Engine.call. It waits while `most_unanswered` calls are on their way."""
        called = known(self.functions, function)
        options: dict[str, Any] = {"slo": slo, "near": near, "timeout_s": None, "user_id": 0}
        call = prepared(called, args, kwargs, **options)
        if not self._room.acquire(timeout=_ROOM_S):
            raise call_failed(
                called.name,
                code=Code.LIMIT_REACHED,
                reason=f"none of {self._most_unanswered} calls was answered within {_ROOM_S:.0f} s",
            )
        try:
            future = self._client.start_prepared(call, patient=True)
        except BaseException as error:
            self._room.release()
            self._check_unbroken(error)
            raise
        future.add_done_callback(lambda _: self._room.release())
        return LiveHandle(called, future, self._check_unbroken)

    def map(
        self,
        function: Function[Any] | str,
        calls: Iterable[Sequence[Any]],
        /,
        *,
        slo: str | float | None = None,
    ) -> list[Any]:
        """The values of many calls; see Engine.map. It has `most_unanswered` calls of its own on their way."""
        called = known(self.functions, function)
        options: dict[str, Any] = {"slo": slo, "near": "", "timeout_s": None, "user_id": 0}
        try:
            with self._client.batch(most=self._most_unanswered, within_s=_ROOM_S) as batch:
                for args in calls:
                    batch.add(prepared(called, args, {}, **options))
                return batch.values()
        except (ConnectionLost, CancelledError) as error:
            self._check_unbroken(error)
            raise

    def close(self) -> None:
        """End the client and the processes, and drop the state that the engine opened. Idempotent."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _remove_left_behind(temporary: Path) -> None:
    """Remove the folders of engines whose program was killed."""
    for folder in temporary.glob(f"{_FOLDER}*-*"):
        pid = folder.name.removeprefix(_FOLDER).partition("-")[0]
        with suppress(OSError):
            if pid.isdecimal() and folder.stat().st_uid == os.getuid() and not _runs(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _importable(each: Offered) -> str:
    """The spec by which a worker's process finds a function. Raises FunctionError if it cannot."""
    if isinstance(each, str):
        return each
    if each.module != "__main__" and "<locals>" not in each.target:
        try:
            if find([each.target]) == {each.name: each}:
                return each.target
        except InvalidConfig as error:
            raise FunctionError(
                f"workers cannot import the function {each.name!r}: {error}"
            ) from None
    raise FunctionError(
        f"workers cannot import the function {each.name!r} ({each.target}); define it in a module, under the "
        "name that it has there"
    )


def _environment() -> Mapping[str, str]:
    """This process's environment, in which workers find the modules that it finds."""
    folders = [str(Path(each or ".").absolute()) for each in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}
