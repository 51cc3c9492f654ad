"""The local engine: every call runs at once, in the calling thread, and so do its children.

For tests, for debugging, and as the baseline without any system. Arguments and results travel as on workers, as
bytes, so what does not travel fails. It differs from workers in this: deadlines are told to
calls (`ctx.left_ns`) and refuse none; nothing is ended at `limit`; what a call changes in a module stays, also
with reset="restore", which copies the product of `init` alone, or "reload", which runs `init` again; and a
crash is the program's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Self

from slosched.clock import now_ns
from slosched.codes import Code
from slosched.engines.engine import Offered, deadline_of, known, offered, run_state
from slosched.functions.body import Awaits, Body, Ended, ended, outcome_of, traceback_text
from slosched.functions.context import NO_DEADLINE_NS, ChildCall, Context
from slosched.functions.errors import CallFailed
from slosched.functions.function import Function
from slosched.functions.payload import Buffer, decode, encode, joined
from slosched.functions.state.state import State

#: A child may have that many calls above it, as on workers.
MOST_LEVELS = 1_000


class LocalHandle:
    """A call that has ended."""

    done = True

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome  # its value, or CallFailed

    def result(self, timeout_s: float | None = None) -> Any:
        if isinstance(self.outcome, CallFailed):
            raise self.outcome.with_traceback(None)
        return self.outcome

    def cancel(self) -> None:
        """It has ended, so nothing happens."""


class LocalEngine:
    """Runs calls inline. Threads may share it. `state` is a State, or a store's address (docs/state.md)."""

    name = "local"

    def __init__(self, functions: Sequence[Offered], *, state: State | str | None = None) -> None:
        self.functions = offered(functions)
        self._lock = threading.Lock()
        self._products: dict[str, Any] = {}  # what each init made
        self._state, self._owns_state = run_state(state)

    def call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: str | float | None = None,
        near: str = "",
        **kwargs: Any,
    ) -> LocalHandle:
        """Run the call and its children to their end; see Engine.call."""
        called = known(self.functions, function)
        called.check_arguments(args, kwargs)
        called.size_class(args, kwargs)
        frame = joined(encode(args, kwargs, most_bytes=called.max_payload_bytes))
        deadline_ns = deadline_of(slo)
        run = _Run(self)
        end = run.of(called, frame, deadline_ns)
        return LocalHandle(
            outcome_of(called.name, code=end.code, reason=end.reason, frame=joined(end.result))
        )

    def map(
        self,
        function: Function[Any] | str,
        calls: Iterable[Sequence[Any]],
        /,
        *,
        slo: str | float | None = None,
    ) -> list[Any]:
        """Run the calls in turn; see Engine.map."""
        return [self.call(function, *args, slo=slo).outcome for args in calls]

    def product(self, function: Function[Any]) -> Any:
        """What `init` made: once for the engine, or for the call: a copy ("restore"), or anew ("reload")."""
        if function.init is None:
            return None
        if function.reset == "reload":
            return function.init()
        with self._lock:
            if function.name not in self._products:
                self._products[function.name] = function.init()
            made = self._products[function.name]
            return copy.deepcopy(made) if function.reset == "restore" else made

    def state(self) -> State | None:
        """The state that calls share."""
        return self._state

    def close(self) -> None:
        state, self._state = self._state, None
        if state is not None and self._owns_state:
            state.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Call:
    """One call of a run, as the host of its context. `begin` makes its body, when its turn comes."""

    def __init__(
        self,
        run: _Run,
        name: str,
        frame: Buffer,
        deadline_ns: int,
        parent: _Call | None,
        child: int,
    ) -> None:
        self.run, self.name, self.parent, self.child = run, name, parent, child
        self.deadline_ns = deadline_ns
        self.level: int = 0 if parent is None else parent.level + 1
        self.children: dict[int, _Call] = {}  # unanswered
        self.chained_now: list[_Call] = []  # since its last step
        self.body: Body | None = None
        self.over = False
        self._frame: Buffer = frame

    def begin(self, function: Function[Any], engine: LocalEngine) -> Body:
        """Make its body. Raises what init does."""
        self.run.calls += 1
        args, kwargs = decode(self._frame)
        self._frame = b""
        state = engine.state()
        ctx = Context(
            function=self.name,
            host=self,
            call_id=self.run.calls,
            deadline_ns=self.deadline_ns,
            init=engine.product(function),
            open_state=None if state is None else lambda: state,
            functions=engine.functions,
        )
        self.body = Body(function, ctx, args, kwargs)
        return self.body

    def chained(self, child: ChildCall) -> None:
        deadline_ns = min(self.deadline_ns, now_ns() + (child.slo_ns or NO_DEADLINE_NS))
        frame = joined(child.payload)
        call = _Call(self.run, child.function, frame, deadline_ns, self, child.child)
        self.children[child.child] = call
        self.chained_now.append(call)

    def taken_back(self, child: int) -> None:
        call = self.children.pop(child, None)
        if call is not None:
            call.end()

    def end(self) -> None:
        """It is over, and so are the children that it leaves; the deepest end first."""
        calls = [self]
        for each in calls:
            calls += each.children.values()
        for each in reversed(calls):
            each.over = True
            each.children.clear()
            if each.body is not None and each is not self:
                each.body.close()
        if self.body is not None:
            self.body.close()


class _Run:
    """One call of a program, with all below it. Depth first, so that few calls are unfinished at a time."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._ready: list[_Call] = []  # the last one is next
        self.calls = 0

    def of(self, function: Function[Any], frame: Buffer, deadline_ns: int) -> Ended:
        root = _Call(self, function.name, frame, deadline_ns, None, 0)
        try:
            self._ready.append(root)
            while self._ready:
                call = self._ready.pop()
                end = None if call.over else self._step(call)
                if end is None:
                    continue
                call.end()
                if call.parent is None:
                    return end
                self._answer(call.parent, call, end)
            raise AssertionError("a call awaits children that are not there")
        finally:
            root.end()

    def _step(self, call: _Call) -> Ended | None:
        """Run one step of a call. None if it awaits children."""
        function = self._engine.functions.get(call.name)
        if function is None:
            return Ended(Code.UNKNOWN_MODEL, f"there is no function {call.name!r}")
        if call.level > MOST_LEVELS:
            return Ended(Code.LIMIT_REACHED, f"more than {MOST_LEVELS:,} calls stand above it")
        try:
            body = call.body or call.begin(function, self._engine)
        except Exception as error:
            return Ended(Code.CALL_RAISED, f"its init raised:\n{traceback_text(error)}")
        try:
            step = body.step()
        except SystemExit as error:
            return Ended(Code.MODEL_PROCESS_ENDED, f"the function exited with {error.code!r}")
        if not isinstance(step, Awaits):
            return ended(function, step)
        chained, call.chained_now = call.chained_now, []
        self._ready += [each for each in reversed(chained) if not each.over]
        return None

    def _answer(self, parent: _Call, child: _Call, end: Ended) -> None:
        """Hand a child's end to its parent, which goes on once it has all that it awaits."""
        del parent.children[child.child]
        assert parent.body is not None
        outcome = outcome_of(child.name, code=end.code, reason=end.reason, frame=joined(end.result))
        parent.body.deliver(child.child, outcome)
        if parent.body.ready:
            self._ready.append(parent)
