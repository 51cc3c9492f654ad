"""What a call sees of the system: its context, and references to the calls that it makes, its children."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, overload

from slosched.clock import Clock, now_ns
from slosched.codes import Code
from slosched.errors import InvalidConfig
from slosched.functions.errors import CallFailed, call_failed
from slosched.functions.function import (
    MAX_PAYLOAD_BYTES,
    Function,
    checked_name,
    duration_ns_of,
)
from slosched.functions.payload import Buffer, encode
from slosched.functions.state.state import State

T = TypeVar("T")
R = TypeVar("R")

Status = Literal["unanswered", "returned", "failed", "cancelled"]

#: A call may wait for that many children.
MOST_UNANSWERED = 10_000
_LONGEST_KEY = 256
_MOST_NS = 2**62
#: The deadline of a call that has none.
NO_DEADLINE_NS = 2**62


@dataclass(frozen=True, slots=True)
class ChildCall:
    """A child that a call asks for. `child` is its number in that call: 0, 1, ...

    `payload` has the parts of the frame of its arguments. The other fields are those of a ChildRequest.
    """

    child: int
    function: str
    payload: list[Buffer]
    slo_ns: int = 0
    size_class: int = 0
    near: str = ""
    near_child: int = -1


class CallHost(Protocol):
    """What runs a call: it carries the call's children to a scheduler."""

    def chained(self, child: ChildCall) -> None:
        """Ask for a child now. Raises CallFailed if that is impossible; the call sees the error."""

    def taken_back(self, child: int) -> None:
        """The call does not want the answer of that child any more."""


class Waiting:
    """What the coroutine of a call yields to the Body that drives it: it waits for all of `refs`."""

    __slots__ = ("refs",)

    def __init__(self, refs: tuple[ChildRef[Any], ...]) -> None:
        self.refs = refs


class ChildRef(Generic[T]):
    """A child of a call. `await ref` returns its result, or raises CallFailed with the child's traceback.

    `child` is its number, `function` the name of what it calls.
    """

    __slots__ = ("_context", "_outcome", "child", "function", "status")

    def __init__(self, context: Context, child: int, function: str) -> None:
        self._context = context
        self._outcome: object = None
        self.child, self.function = child, function
        #: "unanswered", "returned", "failed" or "cancelled", as far as this call has heard.
        self.status: Status = "unanswered"

    def __await__(self) -> Generator[Waiting, None, T]:
        if self.status == "unanswered":
            yield Waiting((self,))
        return self.result()

    def __repr__(self) -> str:
        return f"ChildRef({self.child}, {self.function!r}, {self.status})"

    def result(self) -> T:
        """The value of an answered child. Raises what `await` raises; RuntimeError while it is unanswered."""
        if self.status == "unanswered":
            raise RuntimeError(
                f"child {self.child} ({self.function}) is not answered yet; await it"
            )
        if isinstance(self._outcome, CallFailed):
            raise self._outcome.with_traceback(None)
        return self._outcome  # type: ignore[return-value]

    def error(self) -> CallFailed | None:
        """Why an answered child failed; None if it returned. Raises RuntimeError while it is unanswered."""
        if self.status == "unanswered":
            self.result()
        return self._outcome if isinstance(self._outcome, CallFailed) else None

    def cancel(self) -> None:
        """Take the child back: it is ended if it runs, and `await` raises CallFailed with code 1 from now on.

        A child that has been answered keeps its answer.
        """
        if self.status == "unanswered":
            self._context._take_back(self)

    def _answer(self, outcome: object) -> None:
        """The child returned the value `outcome`, or failed with that CallFailed; the first answer counts."""
        if self.status == "unanswered":
            self.status = "failed" if isinstance(outcome, CallFailed) else "returned"
            self._outcome = outcome

    def _cancelled(self) -> None:
        self.status = "cancelled"
        self._outcome = call_failed(
            self.function, code=Code.CANCELLED, reason="its parent took it back"
        )


class _Gathered(Generic[T]):
    """What `gather` returns: awaiting it waits for all."""

    __slots__ = ("_errors", "_refs")

    def __init__(self, refs: tuple[ChildRef[T], ...], errors: bool) -> None:
        self._refs, self._errors = refs, errors

    def __await__(self) -> Generator[Waiting, None, list[T]]:
        unanswered = tuple(ref for ref in self._refs if ref.status == "unanswered")
        if unanswered:
            yield Waiting(unanswered)
        if self._errors:
            return [cast(T, ref.error() or ref._outcome) for ref in self._refs]
        return [ref.result() for ref in self._refs]


@overload
def gather(*refs: ChildRef[T]) -> _Gathered[T]: ...
@overload
def gather(*refs: ChildRef[T], errors: Literal[True]) -> _Gathered[T | CallFailed]: ...
def gather(*refs: ChildRef[Any], errors: bool = False) -> _Gathered[Any]:
    """`await gather(*refs)`: the results of several children, in order, when all of them are answered.

    Raises the error of the first that failed; with `errors` the list has each CallFailed in its place instead.
    """
    for ref in refs:
        if not isinstance(ref, ChildRef):
            raise TypeError(f"gather takes references that ctx.chain returned, not {ref!r}")
    return _Gathered(refs, errors)


class Context:
    """The first argument of a function: its call, what `init` made, shared state, and calls of others.

    `call_id` is the call's number, `function` the name of what it calls and `deadline_ns` its deadline, on the
    clock of slosched.clock. `init` is the product of the function's init, None without one, and `prepared` that
    of its prepare, None until that has run. `host` carries children, `open_state` opens the run's state when it
    is first used, and `functions` are those known here by name: a child that is named by a text gets its size
    class and the check of its arguments from there.
    """

    def __init__(
        self,
        *,
        function: str,
        host: CallHost,
        call_id: int = 0,
        deadline_ns: int = NO_DEADLINE_NS,
        init: Any = None,
        open_state: Callable[[], State] | None = None,
        functions: Mapping[str, Function[Any]] | None = None,
        clock: Clock = now_ns,
    ) -> None:
        self.function, self.call_id = function, call_id
        self.deadline_ns = deadline_ns
        self.init = init
        self.prepared: Any = None
        self._host = host
        self._open_state = open_state
        self._state: State | None = None
        self._functions = functions or {}
        self._clock = clock
        self._refs: dict[int, ChildRef[Any]] = {}  # unanswered children
        self._children = 0
        self._driven = False  # a Body drives a coroutine, so children can be awaited

    def left_ns(self) -> int:
        """Time until the call's deadline in ns; below 0 once it has passed."""
        return self.deadline_ns - self._clock()

    @property
    def state(self) -> State:
        """The state that the calls of a run share (docs/state.md). Raises InvalidConfig where there is none."""
        if self._state is None:
            if self._open_state is None:
                raise InvalidConfig(
                    "this call has no state: start the workers with --state, or give the engine state=..."
                )
            self._state = self._open_state()
        return self._state

    @overload
    def chain(
        self,
        function: Function[R],
        /,
        *args: Any,
        slo: str | float | None = None,
        near: ChildRef[Any] | str | None = None,
        **kwargs: Any,
    ) -> ChildRef[R]: ...
    @overload
    def chain(
        self,
        function: str,
        /,
        *args: Any,
        slo: str | float | None = None,
        near: ChildRef[Any] | str | None = None,
        **kwargs: Any,
    ) -> ChildRef[Any]: ...
    def chain(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: str | float | None = None,
        near: ChildRef[Any] | str | None = None,
        **kwargs: Any,
    ) -> ChildRef[Any]:
        """Ask for a call of `function` (or of that name) with these arguments, and go on. `await` the result.

        The child's deadline is `slo` from now ("20ms", or seconds) and never after this call's. It should run
        where an earlier child, `near`, ran, or where the last call near the same text did. A child that is
        unanswered when this call ends is ended.

        Raises TypeError for arguments that the function does not take or that cannot travel, PayloadTooLarge,
        CallFailed with code 102 when 10,000 children are unanswered, RuntimeError outside of an `async def`.
        """
        if not self._driven:
            raise RuntimeError(
                f"function {self.function!r} must be an async def to chain calls: a plain def cannot await them"
            )
        known = function if isinstance(function, Function) else None
        name = known.name if known is not None else checked_name(function)
        known = known or self._functions.get(name)
        if len(self._refs) >= MOST_UNANSWERED:
            raise call_failed(
                name,
                code=Code.LIMIT_REACHED,
                reason=f"{MOST_UNANSWERED:,} children of the call are unanswered; await some of them first",
            )
        if known is not None:
            known.check_arguments(args, kwargs)
        most_bytes = MAX_PAYLOAD_BYTES if known is None else known.max_payload_bytes
        child = ChildCall(
            child=self._children,
            function=name,
            payload=encode(args, kwargs, most_bytes=most_bytes),
            slo_ns=_slo_ns(slo),
            size_class=0 if known is None else known.size_class(args, kwargs),
            near=_key(near) if isinstance(near, str) else "",
            near_child=self._near_child(near),
        )
        ref: ChildRef[Any] = ChildRef(self, child.child, name)
        self._refs[child.child] = ref
        try:
            self._host.chained(child)
        except BaseException:
            del self._refs[child.child]
            raise
        self._children += 1
        return ref

    def _near_child(self, near: ChildRef[Any] | str | None) -> int:
        if near is None or isinstance(near, str):
            return -1
        if not isinstance(near, ChildRef) or near._context is not self:
            raise TypeError(
                f"near is a reference that this call's ctx.chain returned, or a text, not {near!r}"
            )
        return near.child

    def _take_back(self, ref: ChildRef[Any]) -> None:
        if self._refs.pop(ref.child, None) is not None:
            ref._cancelled()
            self._host.taken_back(ref.child)

    def _deliver(self, child: int, outcome: object) -> bool:
        """An answer of a child. False if none is waited for: it was taken back, or answered before."""
        ref = self._refs.pop(child, None)
        if ref is None:
            return False
        ref._answer(outcome)
        return True

    @property
    def unanswered(self) -> tuple[int, ...]:
        """The numbers of the children that are unanswered."""
        return tuple(self._refs)


def _slo_ns(slo: object) -> int:
    if slo is None:
        return 0
    slo_ns = duration_ns_of(slo)
    if not 0 < slo_ns < _MOST_NS:
        raise ValueError(
            f"slo must be above 0, not {slo!r}; without one the child has what this call has left"
        )
    return slo_ns


def _key(near: str) -> str:
    if not 0 < len(near) <= _LONGEST_KEY:
        raise ValueError(f"near is a text of 1 to {_LONGEST_KEY} characters, not of {len(near)}")
    return near
