"""What every engine can do, and how it is given its functions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from slosched.clients.arguments import slo_fields
from slosched.clock import now_ns
from slosched.functions.context import NO_DEADLINE_NS
from slosched.functions.errors import FunctionError
from slosched.functions.function import Function, checked_name
from slosched.functions.registry import collected, find
from slosched.functions.state.state import State

#: Functions themselves, or what functions/registry.py finds them by.
Offered = Function[Any] | str

_numbers = itertools.count()


class Handle(Protocol):
    """One call."""

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the value. Raises CallFailed, or TimeoutError after `timeout_s`; the call then goes on."""

    def cancel(self) -> None:
        """Give the call up: it is ended if it runs. One that has ended keeps its result."""

    @property
    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""


class Engine(Protocol):
    """Runs calls of the functions that it was opened with. Close it, or use `with`."""

    @property
    def name(self) -> str:
        """What `open` calls it."""

    def call(
        self,
        function: Function[Any] | str,
        /,
        *args: Any,
        slo: str | float | None = None,
        near: str = "",
        **kwargs: Any,
    ) -> Handle:
        """Begin a call, whose deadline is `slo` from now ("20ms", or seconds).

        Raises FunctionError for a function that the engine was not opened with, TypeError for arguments that it
        does not take or that cannot travel, PayloadTooLarge, InvalidRequest for an SLO that is not above 0.
        """

    def map(
        self,
        function: Function[Any] | str,
        calls: Iterable[Sequence[Any]],
        /,
        *,
        slo: str | float | None = None,
    ) -> list[Any]:
        """Make a call for each sequence of positional arguments, and return the values in order.

        In the place of a call that failed stands its CallFailed. Many small calls cost less than by `call`. It
        raises what `call` does; the calls before the one that is wrong are given up, or have run.
        """

    def close(self) -> None:
        """End what runs, and everything that the engine started. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def offered(functions: Sequence[Offered]) -> dict[str, Function[Any]]:
    """The functions by name. Raises FunctionError or ExtensionError, as registry.find does."""
    if isinstance(functions, str) or not isinstance(functions, Sequence):
        raise FunctionError("functions is a list of modules or functions: functions=['my_module']")
    found: list[Function[Any]] = []
    for each in functions:
        found += find([each]).values() if isinstance(each, str) else [each]
    if not found:
        raise FunctionError("an engine needs functions: functions=['my_module']")
    return collected(found)


def deadline_of(slo: str | float | None) -> int:
    """When a call with this SLO must be over; NO_DEADLINE_NS without one. Raises InvalidRequest."""
    return NO_DEADLINE_NS if slo is None else now_ns() + slo_fields(slo, None)[1]


def known(functions: dict[str, Function[Any]], called: Function[Any] | str) -> Function[Any]:
    """The function that is `called`, itself or by name. Raises FunctionError if the engine has it not."""
    name = called.name if isinstance(called, Function) else checked_name(called)
    found = functions.get(name)
    if found is None or (isinstance(called, Function) and called is not found):
        raise FunctionError(
            f"the engine was not opened with the function {name!r}; it has {', '.join(sorted(functions))}"
        )
    return found


def run_state(state: State | str | None) -> tuple[State | None, bool]:
    """The state of an engine's calls, and whether the engine closes it.

    A text is the address of a store, in which the engine has a namespace of its own until it is closed.
    """
    if not isinstance(state, str):
        return state, False
    return State(f"engine-{os.getpid()}-{next(_numbers)}", state, own=True), True
