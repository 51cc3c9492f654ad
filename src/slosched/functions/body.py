"""Drives the body of one call, step by step, without an event loop.

A body is a `def`, or an `async def` that awaits its children and nothing else. Each step runs it until it
awaits children that are unanswered, returns or raises; whatever carries the call (a worker's child process, an
engine, a test) delivers the answers in between.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from slosched.codes import Code
from slosched.errors import SloschedError
from slosched.functions import context
from slosched.functions.context import Context, Waiting
from slosched.functions.errors import PayloadTooLarge, call_failed, shortened
from slosched.functions.function import Function
from slosched.functions.payload import Buffer, decode_result, encode_result


@dataclass(frozen=True, slots=True)
class Awaits:
    """The call waits until all of these children are answered."""

    children: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """The call returned `value`."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """The function raised; `text` is its traceback, at most 4,000 characters."""

    text: str


Step = Awaits | Returned | Raised

_NO_LOOP = "A call has no event loop: asyncio.sleep, locks and sockets of asyncio do not work in it"
_OURS = (__file__, context.__file__)


class Body:
    """One call of `function` with `args` and `kwargs`, which begins with the first `step`.

    SystemExit and KeyboardInterrupt of the function come out of `step`: they are meant for its process.
    """

    def __init__(
        self,
        function: Function[Any],
        ctx: Context,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._function, self._ctx = function, ctx
        self._args, self._kwargs = args, kwargs or {}
        self._coroutine: Coroutine[Any, None, Any] | None = None
        self._prepared = function.prepare is None
        self._begun = self._ended = False
        self._awaited: tuple[int, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether `step` can be called: it has not ended, and all that it awaited is answered."""
        return not self._ended and not self._unanswered()

    def prepare(self) -> Raised | None:
        """Run the function's `prepare`, which `step` does otherwise. None: `ctx.prepared` has its product."""
        hook, self._prepared = self._function.prepare, True
        assert hook is not None
        try:
            self._ctx.prepared = hook(self._ctx, *self._args, **self._kwargs)
        except (SystemExit, KeyboardInterrupt):
            self._ended = True
            raise
        except BaseException as error:
            self._ended = True
            return Raised(traceback_text(error))
        return None

    def step(self) -> Step:
        """Run until the next await of unanswered children, or the end. Raises RuntimeError unless `ready`."""
        if not self.ready:
            raise RuntimeError("the call has ended, or awaits children that are unanswered")
        raised = None if self._prepared else self.prepare()
        if raised is not None:
            return raised
        try:
            result = self._continued() if self._begun else self._begin()
        except (SystemExit, KeyboardInterrupt):
            self._ended = True
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError) and "no running event loop" in str(error):
                error.add_note(_NO_LOOP)
            result = Raised(traceback_text(error))
        finally:
            self._ctx._driven = False
        self._ended = not isinstance(result, Awaits)
        return result

    def deliver(self, child: int, outcome: object) -> None:
        """A child returned the value `outcome`, or failed with that CallFailed (`outcome_of` makes it).

        The answer of a child that was taken back, or has been answered, changes nothing.
        """
        self._ctx._deliver(child, outcome)

    def close(self) -> None:
        """End a call that awaits: its `finally` blocks run now."""
        self._ended = True
        if self._coroutine is not None:
            with suppress(Exception):  # what the blocks raise has no listener
                self._coroutine.close()

    def _unanswered(self) -> list[int]:
        return [child for child in self._awaited if child in self._ctx._refs]

    def _begin(self) -> Step:
        self._begun = True
        function = self._function
        self._ctx._driven = function.is_async
        try:
            value = function.body(self._ctx, *self._args, **self._kwargs)
        except StopIteration as error:
            return Raised(traceback_text(error))
        if not inspect.iscoroutine(value):
            return Returned(value)
        self._coroutine = value
        return self._continued()

    def _continued(self) -> Step:
        coroutine = self._coroutine
        assert coroutine is not None
        self._ctx._driven = True
        wrong: TypeError | None = None
        while True:
            try:
                found = coroutine.send(None) if wrong is None else coroutine.throw(wrong)
            except StopIteration as stop:
                return Returned(stop.value)
            wrong = self._wrong(found)
            if wrong is None:
                self._awaited = tuple(ref.child for ref in found.refs)
                if self._unanswered():
                    return Awaits(tuple(self._unanswered()))

    def _wrong(self, found: object) -> TypeError | None:
        if isinstance(found, Waiting) and all(ref._context is self._ctx for ref in found.refs):
            return None
        if isinstance(found, Waiting):
            return TypeError(
                "a call can await its own children alone, and this reference is another call's"
            )
        return TypeError(
            f"a function can await what ctx.chain returned, and slosched.gather of these, alone; it awaited "
            f"{type(found).__name__}. {_NO_LOOP}"
        )


@dataclass(frozen=True, slots=True)
class Ended:
    """How a call ended: its code, with code 0 its result as the parts of a frame, else the reason."""

    code: int
    reason: str = ""
    result: tuple[Buffer, ...] = ()


def ended(function: Function[Any], step: Returned | Raised) -> Ended:
    """What is answered for the last step of a call: also a result that cannot travel has its code."""
    if isinstance(step, Raised):
        return Ended(Code.CALL_RAISED, step.text)
    try:
        return Ended(
            Code.OK, "", tuple(encode_result(step.value, most_bytes=function.max_payload_bytes))
        )
    except PayloadTooLarge as error:
        return Ended(Code.CALL_OVER_LIMIT, str(error))
    except Exception as error:  # what it returned may have code of its own
        return Ended(Code.CALL_RAISED, shortened(f"{type(error).__name__}: {error}"))


def outcome_of(function: str, *, code: int, reason: str, frame: Buffer) -> object:
    """What `Body.deliver` takes: the value of `frame` where `code` is 0, else the CallFailed of the code."""
    if code != Code.OK:
        return call_failed(function, code=code, reason=reason)
    try:
        return decode_result(frame)
    except SloschedError as error:
        return call_failed(function, code=Code.RUNTIME_ERROR, reason=str(error))


def traceback_text(error: BaseException) -> str:
    """The traceback of what a function raised, without the frames of this runtime, at most 4,000 characters."""
    try:
        report = traceback.TracebackException.from_exception(error)
        reports: list[traceback.TracebackException | None] = [report]
        for each in reports:
            if each is not None:
                each.stack[:] = [frame for frame in each.stack if frame.filename not in _OURS]
                reports += [each.__cause__, each.__context__]
        text = "".join(report.format())
    except Exception as problem:  # an exception's own code
        name, other = type(error).__name__, type(problem).__name__
        text = f"{name}, whose traceback cannot be written ({other})"
    return shortened(text.rstrip())
