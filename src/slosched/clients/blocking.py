"""The blocking client: AsyncClient's twin for programs without an event loop.

with Client("127.0.0.1:12346") as client:
    [model] = client.load("resnet50_v2")
    answer = client.infer(model, array, slo="25ms")
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, overload

from slosched.clients.aio import DEFAULT_ADDRESS, connect
from slosched.clients.calls import CallAnswer, Prepared, prepared
from slosched.clients.forks import forked_error, generation
from slosched.clients.inference import Inference, Model, Unloaded
from slosched.clients.session import OnRestart
from slosched.clients.started import Batch, Start, Starter
from slosched.clients.tensors import Inputs
from slosched.codes import Code
from slosched.errors import ConnectionLost
from slosched.functions.function import Function, R
from slosched.messages import ModelInfo, Welcome

_T = TypeVar("_T")
_JOIN_S = 5.0


class Client:
    """A connection to a controller. Its event loop runs in a thread of its own.

    Safe to share between threads: each call blocks the thread that makes it. In a fork of the process each
    call raises ConnectionLost. Interrupting a call
    (Ctrl-C) cancels its request. `close`, or `with`, ends it. `weight` is what its requests are worth
    beside others' of 1, as far as the operator lets it say so. Raises PeerUnreachable when no controller
    answers within `timeout_s`, ProtocolMismatch when it speaks another version, InvalidConfig for a weight
    that cannot be. `on_restart` is called, in the loop's thread, with words when the controller was restarted
    (without one, a RuntimeWarning says so).
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        name: str = "",
        weight: float = 1.0,
        on_restart: OnRestart | None = None,
    ) -> None:
        self._generation = generation()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        # A daemon: a program that forgets to close still ends.
        self._thread = threading.Thread(target=self._run, name="slosched client", daemon=True)
        self._thread.start()
        try:
            connecting = connect(
                address, timeout_s=timeout_s, name=name, weight=weight, on_restart=on_restart
            )
            self._client = self._call(connecting.open)
            self._starter = Starter(self._loop, self._client)
        except BaseException:
            self._end_loop()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _call(self, make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine in the loop and wait for it; its own time limit bounds the wait."""
        future = self._started(make)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of no effect on one that has ended
            raise

    def _started(self, make: Callable[[], Coroutine[Any, Any, _T]]) -> Future[_T]:
        """Run a coroutine in the loop."""
        with self._open():
            return asyncio.run_coroutine_threadsafe(make(), self._loop)

    @contextmanager
    def _open(self) -> Iterator[None]:
        """The loop goes on within. Raises ConnectionLost if the client is closed, or is another process's."""
        # Before the lock, which a thread may have held at the fork.
        if self._generation != generation():
            raise forked_error()
        with self._lock:
            if self._closed:
                raise ConnectionLost("this client is closed", code=Code.CANCELLED)
            yield

    def close(self) -> None:
        """Say goodbye and end the thread. Calls that wait in other threads fail. Idempotent."""
        if self._generation != generation():  # the thread and the session are the parent's
            self._closed = True
            return
        with self._lock:
            if self._closed:
                return
            closing = asyncio.run_coroutine_threadsafe(self._client.close(), self._loop)
            self._closed = True
        closing.result(_JOIN_S)
        self._end_loop()

    def _end_loop(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_S)

    @property
    def controller(self) -> Welcome:
        """What the controller said of itself: its version, policy and incarnation."""
        return self._client.controller

    @property
    def restarts(self) -> int:
        """How often another controller process has answered here."""
        return self._client.restarts

    @property
    def lost_requests(self) -> int:
        """Requests that were in flight when their controller was restarted: each has failed by name."""
        return self._client.lost_requests

    def load(self, name: str, copies: int = 1, *, timeout_s: float = 60.0) -> list[Model]:
        """Load `copies` instances of the model `name`; see AsyncClient.load."""
        return self._call(lambda: self._client.load(name, copies, timeout_s=timeout_s))

    def unload(self, name: str, *, force: bool = False, timeout_s: float = 60.0) -> Unloaded:
        """Give up the use of the model `name`; see AsyncClient.unload."""
        return self._call(lambda: self._client.unload(name, force=force, timeout_s=timeout_s))

    def models(self, *, timeout_s: float = 5.0) -> tuple[tuple[ModelInfo, ...], tuple[str, ...]]:
        """Return the instances that are loaded, and the names that can be."""
        return self._call(lambda: self._client.models(timeout_s=timeout_s))

    def status(self, *, brief: bool = False, timeout_s: float = 5.0) -> dict[str, Any]:
        """Return the controller's report: plain dicts and lists, times in ns."""
        return self._call(lambda: self._client.status(brief=brief, timeout_s=timeout_s))

    def infer(
        self,
        model: Model,
        inputs: Inputs | None = None,
        *,
        slo: float | str | None = None,
        slo_factor: float | None = None,
        timeout_s: float | None = None,
        user_id: int = 0,
    ) -> Inference:
        """Run one inference and return its answer; see AsyncClient.infer for shapes and errors."""
        return self._call(
            lambda: self._client.infer(
                model,
                inputs,
                slo=slo,
                slo_factor=slo_factor,
                timeout_s=timeout_s,
                user_id=user_id,
            )
        )

    @overload
    def call(self, function: Function[R], /, *args: Any, **options: Any) -> R: ...
    @overload
    def call(self, function: str, /, *args: Any, **options: Any) -> Any: ...
    def call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: float | str | None = None,
        near: str = "",
        timeout_s: float | None = None,
        user_id: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Call a function of the workers and return its result; see AsyncClient.call for what it raises."""
        options: dict[str, Any] = {"slo": slo, "near": near}
        options |= {"timeout_s": timeout_s, "user_id": user_id}
        call = prepared(function, args, kwargs, **options)
        future = self.start_prepared(call)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # of no effect on one that has ended
            raise

    def call_answer(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: float | str | None = None,
        near: str = "",
        timeout_s: float | None = None,
        user_id: int = 0,
        **kwargs: Any,
    ) -> CallAnswer:
        """Call a function, as `call`, and return all that is answered, also if it failed or was refused."""
        options: dict[str, Any] = {"slo": slo, "near": near}
        options |= {"timeout_s": timeout_s, "user_id": user_id}
        call = prepared(function, args, kwargs, **options)
        return self._call(lambda: self._client.answer_of(call))

    @overload
    def start_call(self, function: Function[R], /, *args: Any, **options: Any) -> Future[R]: ...
    @overload
    def start_call(self, function: str, /, *args: Any, **options: Any) -> Future[Any]: ...
    def start_call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: float | str | None = None,
        near: str = "",
        timeout_s: float | None = None,
        user_id: int = 0,
        **kwargs: Any,
    ) -> Future[Any]:
        """Begin a call and return at once: `.result()` waits for it as `call` does, `.cancel()` ends it.

        What is wrong with the call itself raises here. The arguments may be changed as soon as it returns.
        """
        options: dict[str, Any] = {"slo": slo, "near": near}
        options |= {"timeout_s": timeout_s, "user_id": user_id}
        return self.start_prepared(prepared(function, args, kwargs, **options))

    def start_prepared(self, call: Prepared, *, patient: bool = False) -> Future[Any]:
        """Begin a call that was checked, as `start_call`.

        A `patient` one is sent again while the controller refuses it unread (code 103), until its SLO has
        passed.
        """
        future: Future[Any] = Future()

        def ended(value: Any, error: BaseException | None) -> None:
            with suppress(InvalidStateError):  # it was cancelled
                if error is None:
                    future.set_result(value)
                else:
                    future.set_exception(error)

        start = Start(call, ended, patient=patient)
        with self._open():
            self._starter.hand_over((start,))
        future.add_done_callback(lambda done: self._give_up(start) if done.cancelled() else None)
        return future

    def _give_up(self, start: Start) -> None:
        if self._generation == generation():
            self._starter.give_up((start,))

    def batch(self, *, most: int, within_s: float) -> Batch:
        """Calls whose values are wanted together (clients/started.py)."""
        with self._open():
            return Batch(self._starter, most=most, within_s=within_s)
