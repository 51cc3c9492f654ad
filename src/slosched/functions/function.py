"""`@slosched.function`: a Python function that workers run, with what a scheduler must know about it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args, overload

from slosched.errors import SloschedError, shown_name
from slosched.functions.errors import FunctionError
from slosched.message_types import FunctionInfo
from slosched.units import NS_PER_MS, NS_PER_S, parse_bytes, parse_duration_ns

Reset = Literal["none", "restore", "reload"]
Duration = str | float | int

#: Size classes are numbered from 0; a function that names none has one.
SIZE_CLASSES = 16
#: What one message carries beside its struct.
MAX_PAYLOAD_BYTES = 64 * 1024 * 1024 - 64 * 1024
#: A function may not ask for more: 30 days.
_LONGEST_NS = 30 * 24 * 3600 * NS_PER_S
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
#: What `chain` and `call` take for themselves, so an argument of that name must be given by its place.
RESERVED = ("slo", "near", "timeout_s", "user_id")

_PLACED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Function(Generic[R]):
    """A registered function. `body` is what the decorator was put on; calling the Function calls it.

    `body` gets a Context first and then the arguments of the call; it is a `def` or an `async def`. `init`
    takes nothing and runs once per instance; calls see its product as `ctx.init`. With `gpu` calls run on a
    GPU's exec lane, without it in slots of a host. `slo_ns` is the SLO of a client's call that names none
    (0: the controller's default). With `reset` "restore" each call gets what `init` made anew; with "none"
    a process is used again and keeps what calls changed in it; with "reload" each call has a new process that
    imports the module and runs `init` for it alone, so that it is a cold start. An `idempotent` call may run
    again after its process ended. A call that ran for longer than `limit_ns`, its suspensions left out, is
    ended. With `prepare` each call of a function for GPUs begins with a *host part*: `prepare` gets the context
    and the arguments, runs in the call's process before the call asks for the lane, and the body sees its
    product as `ctx.prepared`. `expected_ns` is the first forecast of a call, and of its host part, before any
    has been measured, and `memory_bytes` what an instance takes. `size` gets the arguments of a call and
    returns its size class, 0 to 15: durations are forecast for each class apart. Arguments and result have at
    most `max_payload_bytes` each.
    """

    name: str
    body: Callable[..., Any]
    init: Callable[[], Any] | None = None
    gpu: bool = False
    prepare: Callable[..., Any] | None = None
    slo_ns: int = 0
    reset: Reset = "none"
    idempotent: bool = False
    limit_ns: int = 60 * NS_PER_S
    expected_ns: int = NS_PER_MS
    memory_bytes: int = 0
    size: Callable[..., int] | None = None
    max_payload_bytes: int = MAX_PAYLOAD_BYTES
    signature: inspect.Signature = field(default_factory=inspect.Signature)

    def __call__(self, ctx: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the body as the plain function that it is, for tests."""
        return self.body(ctx, *args, **kwargs)

    def __repr__(self) -> str:
        return f"Function({self.name!r}, {self.target})"

    @property
    def module(self) -> str:
        """The module that defines it."""
        return str(self.body.__module__)

    @property
    def target(self) -> str:
        """ "module:attribute", where it is defined."""
        return f"{self.module}:{self.body.__qualname__}"

    @property
    def doc(self) -> str:
        """The first line of its docstring; empty without one."""
        return (inspect.getdoc(self.body) or "").partition("\n")[0]

    @property
    def is_async(self) -> bool:
        """Whether it is an `async def`, which alone may chain calls."""
        return inspect.iscoroutinefunction(self.body)

    @property
    def size_classes(self) -> int:
        """How many classes durations are forecast for: 16 with `size`, else 1."""
        return SIZE_CLASSES if self.size is not None else 1

    @property
    def info(self) -> FunctionInfo:
        """What controllers are told about it."""
        prepares = self.prepare is not None or (self.gpu and self.reset == "reload")
        return FunctionInfo(
            gpu=self.gpu,
            slo_ns=self.slo_ns,
            limit_ns=self.limit_ns,
            max_payload_bytes=self.max_payload_bytes,
            size_classes=self.size_classes,
            idempotent=self.idempotent,
            prepare_ns=self.expected_ns if prepares else 0,
        )

    @cached_property
    def _by_place(self) -> range:
        """How many arguments may be given by their places alone: to bind a signature costs each call 4 us."""
        parameters = [*self.signature.parameters.values()]
        plain = [each for each in parameters if each.kind in _PLACED]
        needed = [each for each in parameters if each.default is each.empty]
        if len(plain) < len(parameters) or not plain:  # *args and others: bind decides
            return range(0)
        return range(len(needed) - 1, len(plain))  # the first is the context

    def check_arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise TypeError, with the function's name, unless the body takes these arguments."""
        if not kwargs and len(args) in self._by_place:
            return
        try:
            self.signature.bind(None, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}(): {error}") from None

    def size_class(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """The size class of a call with these arguments. Raises ValueError if `size` returns none."""
        if self.size is None:
            return 0
        found: object = self.size(*args, **kwargs)
        if type(found) is not int or not 0 <= found < SIZE_CLASSES:
            raise ValueError(
                f"{self.name}: size returned {found!r}; a size class is a whole number within "
                f"0..{SIZE_CLASSES - 1}"
            )
        return found


class Decorator(Protocol):
    """What `function` with options returns."""

    @overload
    def __call__(self, body: Callable[..., Coroutine[Any, Any, R]], /) -> Function[R]: ...
    @overload
    def __call__(self, body: Callable[..., R], /) -> Function[R]: ...


@overload
def function(body: Callable[..., Coroutine[Any, Any, R]], /) -> Function[R]: ...
@overload
def function(body: Callable[..., R], /) -> Function[R]: ...
@overload
def function(
    *,
    init: Callable[[], Any] | None = None,
    gpu: bool = False,
    prepare: Callable[..., Any] | None = None,
    slo: Duration | None = None,
    reset: Reset = "none",
    idempotent: bool = False,
    limit: Duration = "60s",
    expected: Duration = "1ms",
    memory: str | int = 0,
    name: str | None = None,
    size: Callable[..., int] | None = None,
    max_payload: str | int = MAX_PAYLOAD_BYTES,
) -> Decorator: ...
def function(body: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Register a function: `@slosched.function`, or with options, `@slosched.function(slo="50ms")`.

    Durations are texts ("50ms") or numbers in seconds, sizes texts ("64MiB") or bytes. What each option means
    stands at Function. Raises FunctionError for what cannot be.
    """
    if body is None:
        return lambda decorated: _made(decorated, **options)
    return _made(body, **options)


def _made(
    body: Callable[..., Any],
    *,
    init: Callable[[], Any] | None = None,
    gpu: bool = False,
    prepare: Callable[..., Any] | None = None,
    slo: Duration | None = None,
    reset: Reset = "none",
    idempotent: bool = False,
    limit: Duration = "60s",
    expected: Duration = "1ms",
    memory: str | int = 0,
    name: str | None = None,
    size: Callable[..., int] | None = None,
    max_payload: str | int = MAX_PAYLOAD_BYTES,
) -> Function[Any]:
    named = checked_name(getattr(body, "__name__", "") if name is None else name)
    problem = _Problem(named)
    for option, value in (("gpu", gpu), ("idempotent", idempotent)):
        if not isinstance(value, bool):
            raise problem(f"{option} is True or False, not {value!r}")
    if reset not in get_args(Reset):
        raise problem(f"reset is one of {', '.join(get_args(Reset))}, not {reset!r}")
    if prepare is not None and not gpu:
        raise problem("prepare is for functions with gpu=True: in a slot, the body may do as well")
    for option, hook in (("init", init), ("prepare", prepare), ("size", size)):
        if hook is not None and (not callable(hook) or inspect.iscoroutinefunction(hook)):
            raise problem(f"{option} must be a plain function, not {hook!r}")
    return Function(
        name=named,
        body=body,
        init=init,
        gpu=gpu,
        prepare=prepare,
        slo_ns=0 if slo is None else _duration_ns(problem, "slo", slo),
        reset=reset,
        idempotent=idempotent,
        limit_ns=_duration_ns(problem, "limit", limit),
        expected_ns=_duration_ns(problem, "expected", expected),
        memory_bytes=_bytes(problem, "memory", memory, 0, 2**50),
        size=size,
        max_payload_bytes=_bytes(problem, "max_payload", max_payload, 1, MAX_PAYLOAD_BYTES),
        signature=_signature(problem, body),
    )


class _Problem:
    """Makes the errors about one function."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, text: str) -> FunctionError:
        return FunctionError(f"function {self._name!r}: {text}")


def checked_name(name: object) -> str:
    """`name` if a function can be called so. Raises FunctionError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = shown_name(name) if isinstance(name, str) else repr(name)
        raise FunctionError(
            f"a function cannot be called {shown}: its name is of letters, digits, '.', '_' and '-', 64 at "
            "most; give it name=..."
        )
    return name


def _signature(problem: _Problem, body: Callable[..., Any]) -> inspect.Signature:
    """The signature of `body`, which must take a context first."""
    if not callable(body) or isinstance(body, type):
        raise problem(f"{body!r} is not a function")
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise problem("it has a yield; a call returns one value, so return a list")
    if not hasattr(body, "__module__") or not hasattr(body, "__qualname__"):
        raise problem("only a def or an async def can be a function")
    try:
        signature = inspect.signature(body)
    except (TypeError, ValueError) as error:
        raise problem(f"its parameters cannot be read: {error}") from None
    parameters = [*signature.parameters.values()]
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    ):
        raise problem("its first parameter must be the context, as in def f(ctx, ...)")
    for each in parameters:
        if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name in RESERVED:
            raise problem(
                f"its parameter {each.name!r} can be given by name only, and calls take {each.name}= for "
                "themselves; call it something else"
            )
    return signature


def _duration_ns(problem: _Problem, option: str, value: Duration) -> int:
    try:
        duration_ns = duration_ns_of(value)
    except (SloschedError, TypeError) as error:
        raise problem(f"{option}: {error}") from None
    if not 0 < duration_ns <= _LONGEST_NS:
        raise problem(f"{option} is above 0 and at most 30 days, not {value!r}")
    return duration_ns


def duration_ns_of(value: object) -> int:
    """A text ("20ms"), or a number in seconds, in ns. Raises InvalidDuration, or TypeError for another type."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is not a duration; write it as a text, '20ms', or in seconds")
    return parse_duration_ns(value if isinstance(value, str) else repr(value), bare_unit="s")


def _bytes(problem: _Problem, option: str, value: str | int, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise problem(f"{option} is a text, '64MiB', or a number of bytes, not {value!r}")
    try:
        size = parse_bytes(value) if isinstance(value, str) else value
    except SloschedError as error:
        raise problem(f"{option}: {error}") from None
    if not least <= size <= most:
        raise problem(f"{option} is within {least:,}..{most:,} bytes, not {value!r}")
    return size
