"""What runs a call inside a Dask worker: the Body that slosched's workers drive, with Dask's own nesting.

A call is one task. It holds the thread (the slot) of its worker, and leaves it while it awaits children
(`secede`, `rejoin`), as Dask's documentation shows for tasks that launch tasks.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from asyncio import CancelledError
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import distributed
import numpy as np
import numpy.typing as npt

from slosched.clock import now_ns
from slosched.codes import Code
from slosched.errors import SloschedError
from slosched.functions.body import Awaits, Body, Ended, ended, outcome_of, traceback_text
from slosched.functions.context import ChildCall, Context
from slosched.functions.errors import shortened
from slosched.functions.function import Function
from slosched.functions.payload import Buffer, decode, joined
from slosched.functions.state.state import State

#: The name under which each worker has its Functions.
PLUGIN = "slosched-functions"
#: A call of a call of a call: beyond that, a chain has no end.
MOST_LEVELS = 1_000
#: Smaller frames travel inside Dask's pickles, larger ones beside them, without a copy.
_LARGE_BYTES = 64 * 1024
#: A wait is looked at again after that long.
_WAIT_S = 10.0

Frame = bytes | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Answer:
    """How a call ended: its result with code 0, else why it has none."""

    code: int
    reason: str = ""
    frame: Frame = b""


@dataclass(frozen=True, slots=True)
class Order:
    """One call: what it calls, its arguments, its deadline on slosched.clock, and the calls above it."""

    function: str
    frame: Frame
    deadline_ns: int
    depth: int = 0
    near: str = ""


class Functions(distributed.WorkerPlugin):  # type: ignore[misc]
    """The functions of one worker process, what `init` made for each, and the state of the run.

    `targets` are "module:attribute" of functions that a worker can import; the others travel by value, with
    their own copies of the globals that they use.
    """

    name = PLUGIN

    def __init__(
        self,
        targets: Sequence[str],
        by_value: Sequence[Function[Any]],
        namespace: str = "",
        store: str = "",
    ) -> None:
        self._targets, self._by_value = tuple(targets), tuple(by_value)
        self._namespace, self._store = namespace, store
        self.known: dict[str, Function[Any]] = {}

    def setup(self, worker: Any) -> None:
        self._lock = threading.RLock()
        self._made: dict[str, Any] = {}
        self._state: State | None = None
        self._ids = itertools.count()
        found = [*map(imported_target, self._targets), *self._by_value]
        self.known = {each.name: each for each in found}

    def teardown(self, worker: Any) -> None:
        with self._lock:
            state, self._state = self._state, None
        if state is not None:
            with suppress(SloschedError):
                state.close()

    def next_id(self) -> int:
        return next(self._ids)

    def made(self, function: Function[Any]) -> Any:
        """The product of the function's `init`, which runs once per worker process, before its first call."""
        if function.init is None:
            return None
        with self._lock:
            if function.name not in self._made:
                self._made[function.name] = function.init()
            return self._made[function.name]

    @property
    def opens_state(self) -> Callable[[], State] | None:
        return self._open_state if self._store else None

    def _open_state(self) -> State:
        with self._lock:
            if self._state is None:
                self._state = State(self._namespace, self._store)
            return self._state


def imported_target(target: str) -> Function[Any]:
    """The function at "module:attribute.attribute". Raises ImportError or AttributeError."""
    module, _, path = target.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, Function):
        raise AttributeError(f"{target} is not a function of slosched")
    return found


def is_importable(function: Function[Any]) -> bool:
    """Whether another process finds this very function at its target."""
    if function.module == "__main__":
        return False
    try:
        return imported_target(function.target) is function
    except (ImportError, AttributeError):
        return False


class Submits(Protocol):
    """What of Dask's Client sends tasks."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any: ...


def submitted(client: Submits, order: Order, workers: Sequence[str] = ()) -> Any:
    """The Dask future of a call. Deeper calls go first, so that those that await them can end.

    A call that names a key to be near to prefers the worker on which its key falls, and may run elsewhere.
    """
    near: dict[str, Any] = {}
    if order.near and workers:
        near["workers"] = [workers[sum(order.near.encode()) % len(workers)]]
        near["allow_other_workers"] = True
    return client.submit(
        run_call,
        order,
        key=f"{order.function}-{uuid.uuid4().hex}",  # Dask measures durations by what stands before the "-"
        pure=False,
        priority=order.depth,
        **near,
    )


def frame_of(parts: Sequence[Buffer]) -> Frame:
    """The parts of a payload as Dask carries them best."""
    whole = joined(parts)
    return whole if len(whole) < _LARGE_BYTES else np.frombuffer(whole, np.uint8)


def buffer_of(frame: Frame) -> Buffer:
    return frame if isinstance(frame, bytes) else memoryview(cast(Any, frame)).toreadonly()


def run_call(order: Order) -> Answer:
    """Run one call in this thread of a Dask worker. Never raises for what the function does."""
    plugin: Functions = distributed.get_worker().plugins[PLUGIN]
    function = plugin.known[order.function]
    if now_ns() > order.deadline_ns:
        return Answer(Code.TIMED_OUT, "its deadline passed before a slot was free")
    children = _Children(plugin, order)
    try:
        body = _begun(plugin, function, order, children)
    except Exception as error:
        return Answer(Code.CALL_RAISED, f"its init raised:\n{traceback_text(error)}")
    try:
        end = _driven(body, children, function)
    except SystemExit as error:
        end = Ended(Code.MODEL_PROCESS_ENDED, f"the function exited with {error.code!r}")
    finally:
        body.close()
        children.end()
    return Answer(end.code, end.reason, frame_of(end.result))


def _begun(plugin: Functions, function: Function[Any], order: Order, children: _Children) -> Body:
    args, kwargs = decode(buffer_of(order.frame))
    ctx = Context(
        function=function.name,
        host=children,
        call_id=plugin.next_id(),
        deadline_ns=order.deadline_ns,
        init=plugin.made(function),
        open_state=plugin.opens_state,
        functions=plugin.known,
    )
    return Body(function, ctx, args, kwargs)


def _driven(body: Body, children: _Children, function: Function[Any]) -> Ended:
    while isinstance(step := body.step(), Awaits):
        for child, outcome in children.answers(step.children):
            body.deliver(child, outcome)
    return ended(function, step)


class _Children:
    """The children of one call, as tasks of their own (a CallHost)."""

    def __init__(self, plugin: Functions, order: Order) -> None:
        self._plugin, self._order = plugin, order
        self._asked: dict[
            int, tuple[str, Any]
        ] = {}  # unanswered: what each calls, its Answer or future
        self._client: Any = None
        self._workers: tuple[str, ...] = ()

    def chained(self, child: ChildCall) -> None:
        refusal = self._refusal(child)
        self._asked[child.child] = (child.function, refusal or self._submitted(child))

    def _refusal(self, child: ChildCall) -> Answer | None:
        if child.function not in self._plugin.known:
            return Answer(Code.UNKNOWN_MODEL, f"there is no function {child.function!r}")
        if self._order.depth >= MOST_LEVELS:
            return Answer(Code.LIMIT_REACHED, f"more than {MOST_LEVELS:,} calls stand above it")
        return None

    def _submitted(self, child: ChildCall) -> Any:
        if self._client is None:
            self._client = distributed.get_client()
        if child.near and not self._workers:
            self._workers = worker_names(self._client)
        deadline_ns = self._order.deadline_ns
        if child.slo_ns:
            deadline_ns = min(deadline_ns, now_ns() + child.slo_ns)
        order = Order(
            function=child.function,
            frame=frame_of(child.payload),
            deadline_ns=deadline_ns,
            depth=self._order.depth + 1,
            near=child.near,
        )
        return submitted(self._client, order, self._workers)

    def taken_back(self, child: int) -> None:
        _, asked = self._asked.pop(child)
        if not isinstance(asked, Answer):
            asked.cancel()

    def answers(self, children: Sequence[int]) -> Iterator[tuple[int, object]]:
        """Wait for these, without a slot, and give what `Body.deliver` takes for each."""
        found = {child: self._asked.pop(child) for child in children}
        distributed.secede()
        try:
            answers = answers_of(self._client, [asked for _, asked in found.values()])
        finally:
            distributed.rejoin()
        for (child, (function, _)), answer in zip(found.items(), answers, strict=True):
            frame = buffer_of(answer.frame)
            yield child, outcome_of(function, code=answer.code, reason=answer.reason, frame=frame)

    def end(self) -> None:
        """Take back what is unanswered: a call's children end with it."""
        left = [asked for _, asked in self._asked.values() if not isinstance(asked, Answer)]
        self._asked.clear()
        if left:
            self._client.cancel(left)


def worker_names(client: Any) -> tuple[str, ...]:
    """The addresses of Dask's workers, in order."""
    return tuple(sorted(client.scheduler_info(n_workers=-1)["workers"]))


def answers_of(client: Any, asked: Sequence[Any]) -> list[Answer]:
    """The answers of these futures, when all are there; those that are answers already stay so.

    A call that Dask lost has the code that says so.
    """
    futures = [each for each in asked if not isinstance(each, Answer)]
    while waiting := [each for each in futures if each.status == "pending"]:
        with suppress(TimeoutError, CancelledError), client.as_current():
            distributed.wait(waiting, timeout=_WAIT_S)
    finished = [each for each in futures if each.status == "finished"]
    found = dict(zip([each.key for each in finished], gathered(client, finished), strict=True))
    return [
        each if isinstance(each, Answer) else found.get(each.key) or lost_answer(each)
        for each in asked
    ]


def gathered(client: Any, finished: Sequence[Any]) -> list[Answer | None]:
    """The answers of finished calls; None for one that was lost before it could be fetched."""
    if not finished:
        return []
    try:
        return list(client.gather(finished))
    except Exception:  # one of them was lost meanwhile: fetch each
        return [_fetched(each) for each in finished]


def _fetched(future: Any) -> Answer | None:
    try:
        answer: Answer = future.result(_WAIT_S)
    except Exception:
        return None
    return answer


def lost_answer(future: Any) -> Answer:
    """The answer of a call whose task Dask cancelled, or lost with the worker that ran it."""
    if future.status != "error":
        return Answer(Code.CANCELLED, "it was taken back, or Dask lost it")
    error = future.exception(_WAIT_S)
    if isinstance(error, distributed.KilledWorker):
        return Answer(Code.MODEL_PROCESS_ENDED, "the Dask worker that had the call ended")
    return Answer(Code.RUNTIME_ERROR, shortened(f"{type(error).__name__}: {error}"))
