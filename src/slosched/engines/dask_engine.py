"""Functions on Dask's distributed scheduler, for comparison: `slosched.engines.open("dask", ...)`.

What Dask has of its own is used as its documentation shows it: one task per call, priorities, `secede` for
calls that await. State is slosched's own (docs/state.md), which any process can join. What Dask lacks:

- deadlines: a call whose deadline has passed is not begun, but none is refused before;
- limits: a call in a thread cannot be ended, so `limit`, `memory` and `cancel` do not stop one that runs;
- a process per call: a crash takes all calls of its worker process along, those that wait included;
- at most once: a result that a lost worker held is computed again;
- snapshots (`reset="restore"`) and GPU lanes (`gpu=True`): NotPossible.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self, get_args

from slosched.engines.engine import Offered, deadline_of, known, offered, run_state
from slosched.errors import InvalidConfig, MissingPackage, SloschedError
from slosched.functions.body import outcome_of
from slosched.functions.errors import CallFailed
from slosched.functions.function import Function
from slosched.functions.payload import encode
from slosched.functions.state.state import State

try:
    import dask
    import distributed

    from slosched.engines.dask_calls import (
        Answer,
        Functions,
        Order,
        answers_of,
        buffer_of,
        frame_of,
        is_importable,
        lost_answer,
        submitted,
        worker_names,
    )
except ImportError as error:
    raise MissingPackage(
        f"the engine \"dask\" needs distributed ({error}): pip install 'slosched[dask]'"
    ) from error

Workers = Literal["processes", "threads"]


class NotPossible(SloschedError):
    """The engine cannot run a function as it is declared; the message says why."""

    exit_code = 2


class DaskHandle:
    """A call that was made."""

    def __init__(self, function: Function[Any], client: Any, future: Any) -> None:
        self._function, self._client, self._future = function, client, future

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value. Raises CallFailed; TimeoutError after `timeout_s`, and the call goes on."""
        answer = self._answer(timeout_s)
        name, frame = self._function.name, buffer_of(answer.frame)
        outcome = outcome_of(name, code=answer.code, reason=answer.reason, frame=frame)
        if isinstance(outcome, CallFailed):
            raise outcome
        return outcome

    def _answer(self, timeout_s: float | None) -> Answer:
        try:
            answer: Answer = self._future.result(timeout_s)
        except TimeoutError:
            if self._future.status == "pending":
                raise
        except Exception:
            if self._future.status == "pending":  # a failure of Dask's own
                raise
        else:
            return answer
        return lost_answer(self._future)

    @property
    def done(self) -> bool:
        return bool(self._future.done())

    def when_done(self, call: Callable[[], None]) -> None:
        """Call `call` in a thread of Dask's when the call has ended, however it did."""
        self._future.add_done_callback(lambda _: call())

    def cancel(self) -> None:
        """Take the call back. One that runs goes on to its end, unheard: Dask cannot end it."""
        self._future.cancel()


class DaskEngine:
    """A Dask cluster on this host, with `slots` calls at a time.

    `workers` are "processes", each with one thread, or the "threads" of one worker in this process, which share
    Python's lock and what `init` made. `state` is a State or the address of a store (docs/state.md) for calls
    that use `ctx.state`. `saturation` is how many calls per thread a worker is sent at most (Dask's
    worker-saturation): without a limit small calls are fastest, with 1 a lost worker takes the fewest along.

    A program that opens one with processes needs `if __name__ == "__main__":`, as its workers import it.
    Raises NotPossible for what Dask cannot do, and InvalidConfig.
    """

    name = "dask"

    def __init__(
        self,
        functions: Sequence[Offered],
        *,
        workers: Workers = "processes",
        slots: int | None = None,
        state: State | str | None = None,
        saturation: float = math.inf,
    ) -> None:
        if workers not in get_args(Workers):
            raise InvalidConfig(
                f"workers is one of {', '.join(get_args(Workers))}, not {workers!r}"
            )
        self.workers: Workers = workers
        self.slots = (os.cpu_count() or 1) if slots is None else slots
        if self.slots < 1 or not saturation >= 1:
            raise InvalidConfig("an engine has at least one slot, and a saturation of at least 1")
        self.functions = offered(functions)
        for each in self.functions.values():
            _check_possible(each)
        again = all(each.idempotent for each in self.functions.values())
        self._near: tuple[str, ...] = ()
        with ExitStack() as opened:
            self.state, owned = run_state(state)
            if self.state is not None and owned:
                opened.callback(self.state.close)
            settings = _settings(saturation, again)
            self._client = opened.enter_context(_cluster(workers, self.slots, settings))
            self._client.register_plugin(self._plugin(state if isinstance(state, str) else None))
            self._opened = opened.pop_all()

    def _plugin(self, address: str | None) -> Functions:
        importable = {name: is_importable(each) for name, each in self.functions.items()}
        return Functions(
            [each.target for name, each in self.functions.items() if importable[name]],
            [each for name, each in self.functions.items() if not importable[name]],
            namespace="" if self.state is None else self.state.namespace,
            store="" if self.state is None else address or self.state.store.name,
        )

    def call(
        self,
        function: Function[Any] | str,
        *args: Any,
        slo: str | float | None = None,
        near: str = "",
        **kwargs: Any,
    ) -> DaskHandle:
        """Begin a call; see Engine.call."""
        called = known(self.functions, function)
        called.check_arguments(args, kwargs)
        if near and not self._near:
            self._near = worker_names(self._client)
        order = Order(
            function=called.name,
            frame=frame_of(encode(args, kwargs, most_bytes=called.max_payload_bytes)),
            deadline_ns=deadline_of(slo),
            near=near,
        )
        return DaskHandle(called, self._client, submitted(self._client, order, self._near))

    def results(self, handles: Sequence[DaskHandle]) -> list[Any]:
        """The values of many calls, fetched together, which is fastest in Dask; CallFailed for a failed one."""
        answers = answers_of(self._client, [each._future for each in handles])
        return [
            outcome_of(
                each._function.name,
                code=answer.code,
                reason=answer.reason,
                frame=buffer_of(answer.frame),
            )
            for each, answer in zip(handles, answers, strict=True)
        ]

    def map(
        self,
        function: Function[Any] | str,
        calls: Iterable[Sequence[Any]],
        /,
        *,
        slo: str | float | None = None,
    ) -> list[Any]:
        """The values of many calls; see Engine.map."""
        return self.results([self.call(function, *args, slo=slo) for args in calls])

    @property
    def client(self) -> Any:
        """Dask's own client."""
        return self._client

    def close(self) -> None:
        """End the workers and what they run, and drop the state that it opened. Idempotent."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_possible(function: Function[Any]) -> None:
    if function.gpu:
        raise NotPossible(
            f"{function.name!r} has gpu=True: Dask has no lanes of GPUs, on which one call runs at a time; "
            "leave it out, or open the engine slosched"
        )
    if function.reset == "restore":
        raise NotPossible(
            f"{function.name!r} has reset='restore': Dask's workers keep what calls change in them and cannot "
            "go back to a snapshot; leave it out, or open the engine slosched"
        )
    if function.reset == "reload":
        raise NotPossible(
            f"{function.name!r} has reset='reload': Dask starts a worker again only with all that it runs; "
            "leave it out, or open the engine slosched"
        )


def _settings(saturation: float, again: bool) -> dict[str, object]:
    """Dask's options for small tasks. One whose worker was lost runs again only where `again` allows it."""
    settings: dict[str, object] = {
        "distributed.scheduler.worker-saturation": saturation,
        "distributed.scheduler.allowed-failures": 3 if again else 0,
        "distributed.worker.profile.enabled": False,
    }
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return settings
    return settings | {"distributed.admin.event-loop": "uvloop"}


@contextmanager
def _cluster(workers: Workers, slots: int, settings: dict[str, object]) -> Iterator[Any]:
    """The client of a new cluster on loopback, without dashboard and limits of memory."""
    processes = workers == "processes"
    distributed_: Any = distributed  # its classes have no types
    with (
        dask.config.set(settings),
        distributed_.LocalCluster(
            n_workers=slots if processes else 1,
            threads_per_worker=1 if processes else slots,
            processes=processes,
            host="127.0.0.1" if processes else None,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL + 1,  # what fails is said in the codes of calls
        ) as cluster,
        distributed_.Client(cluster, set_as_default=False) as client,
    ):
        if processes:
            # A worker that ends while it starts is given up by its nanny; this starts others.
            cluster.adapt(minimum=slots, maximum=slots)
        yield client
