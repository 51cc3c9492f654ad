"""Calls that other threads begin in a client's event loop: handed over together, without a task for each.

A thread that hands calls over wakes the loop only if none waits there, and those that wait together leave in
one message.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from slosched.clients.aio import AsyncClient
from slosched.clients.calls import Prepared
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.functions.errors import CallFailed, call_failed
from slosched.messages import InferReply
from slosched.transport.codec import Frame

#: Is called in the loop's thread when a call has ended, with its value or its error.
Ended = Callable[[Any, BaseException | None], None]
#: A batch hands over that many calls together, so that its thread and the loop's seldom take turns.
_TOGETHER = 32


class Start:
    """One call that was handed over. `ended` is called once."""

    __slots__ = ("_ended", "call", "client", "over", "patient", "request_id", "sent_ns", "task")

    def __init__(self, call: Prepared, ended: Ended, *, patient: bool) -> None:
        self.call, self.patient, self._ended = call, patient, ended
        self.request_id = 0  # it has none yet, or a task makes it
        self.sent_ns = 0
        self.task: asyncio.Task[None] | None = None
        self.client: AsyncClient | None = None
        self.over = False

    def done(self) -> bool:
        return self.over

    def set_result(self, value: Any) -> None:
        if not self.over:
            self.over = True
            self._ended(value, None)

    def set_exception(self, error: BaseException) -> None:
        if not self.over:
            self.over = True
            self._ended(None, error)

    def replied(self, reply: InferReply, frame: Frame | None) -> None:
        """The answer has come."""
        client = self.client
        assert client is not None
        client.end_start(self.request_id)
        if self.patient and reply.code == Code.CONTROLLER_OVERLOADED:
            self.request_id = 0
            begin_slowly(client, self)  # after a pause; it is rare
            return
        try:
            self.set_result(client.value_of(self.call, reply, frame, self.sent_ns))
        except Exception as error:
            self.set_exception(error)


def begin(client: AsyncClient, start: Start) -> None:
    """Begin a call, in the loop of `client`."""
    if start.over:
        return
    start.client, start.sent_ns = client, now_ns()
    try:
        start.request_id = client.begin_call(start.call, start, start.sent_ns)
    except Exception as error:
        start.set_exception(error)
        return
    if not start.request_id:
        begin_slowly(client, start)


def begin_slowly(client: AsyncClient, start: Start) -> None:
    """Begin a call in a task: its function is not known yet, or it is sent again."""
    start.task = asyncio.ensure_future(_slowly(client, start))


async def _slowly(client: AsyncClient, start: Start) -> None:
    try:
        answer = await client.answer_of(start.call, patient=start.patient)
        answer.raise_for_code()
    except asyncio.CancelledError:
        start.set_exception(_cancelled(start))
        raise
    except Exception as error:
        start.set_exception(error)
    else:
        start.set_result(answer.value)


def _cancelled(start: Start) -> CallFailed:
    return call_failed(start.call.name, code=Code.CANCELLED, reason="its caller gave it up")


class Starter:
    """Takes calls from any thread and begins them in the `loop` of `client`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: AsyncClient) -> None:
        self._loop, self._client = loop, client
        self._waiting: deque[Start] = deque()
        self._woken = False

    def hand_over(self, starts: Sequence[Start]) -> None:
        """Begin these soon. Any thread may call it, as long as the loop runs."""
        self._waiting.extend(starts)
        if not self._woken:  # the loop unsets it before it looks at what waits
            self._woken = True
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._woken = False
        waiting = self._waiting
        while waiting:
            begin(self._client, waiting.popleft())

    def give_up(self, starts: Sequence[Start]) -> None:
        """End these calls wherever they are; they are told an error. Any thread may call it."""
        with suppress(RuntimeError):  # the loop was closed, and all calls have ended with it
            self._loop.call_soon_threadsafe(self._give_up, starts)

    def _give_up(self, starts: Sequence[Start]) -> None:
        for start in starts:
            if start.over:
                continue
            if start.task is not None:
                start.task.cancel()
            elif start.request_id:
                self._client.cancel(start.request_id)
            start.set_exception(_cancelled(start))


class Batch:
    """Calls whose values are wanted together; at most `most` of them are on their way at a time.

    `add` and `values` are for the thread that made it. Use it as a context manager: what has not ended when it
    is left is given up.
    """

    def __init__(self, starter: Starter, *, most: int, within_s: float) -> None:
        self._starter, self._most, self._within_s = starter, most, within_s
        self._values: list[Any] = []
        self._name = ""  # of the last function
        self._starts: dict[int, Start] = {}  # those that have not ended
        self._new: list[Start] = []  # not handed over yet
        self._handed = 0  # calls that were handed over, and of these
        self._ends = 0  # those that have ended
        self._wanted = 0  # the number of ends for which the thread waits
        self._reached = threading.Event()

    def add(self, call: Prepared) -> None:
        """Begin another call. It may wait until earlier ones have ended.

        Raises CallFailed if none of those ends within the batch's time.
        """
        number = len(self._values)
        self._values.append(None)
        self._name = call.name

        def ended(value: Any, error: BaseException | None) -> None:
            self._end(number, value if error is None else error)

        start = Start(call, ended, patient=True)
        self._starts[number] = start
        self._new.append(start)
        if len(self._new) >= min(_TOGETHER, self._most):
            self._hand_over()

    def _hand_over(self) -> None:
        new, self._new = self._new, []
        if self._handed + len(new) - self._ends > self._most:
            # Until half of them have ended: the thread wakes seldom.
            self._wait_for(self._handed + len(new) - max(self._most // 2, len(new)))
        self._handed += len(new)
        self._starter.hand_over(new)

    def values(self) -> list[Any]:
        """Wait for all calls. Returns their values in order, and CallFailed in place of those that failed.

        Raises the first error that is not a CallFailed.
        """
        self._hand_over()
        self._wait_for(self._handed)
        for value in self._values:
            if isinstance(value, BaseException) and not isinstance(value, CallFailed):
                raise value
        return self._values

    def _wait_for(self, ends: int) -> None:
        self._wanted = ends
        while self._ends < ends:
            self._reached.clear()
            before = self._ends
            if before < ends and not self._reached.wait(self._within_s) and self._ends == before:
                raise call_failed(
                    self._name,
                    code=Code.LIMIT_REACHED,
                    reason=f"none of {self._most} calls was answered within {self._within_s:.0f} s",
                )

    def _end(self, number: int, value: Any) -> None:
        self._values[number] = value
        del self._starts[number]
        self._ends += 1
        if self._ends >= self._wanted:
            self._reached.set()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ends < self._handed:
            self._starter.give_up([*self._starts.values()])
