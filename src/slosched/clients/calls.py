"""Calls of functions by a client: arguments to a frame, an answer to a value or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slosched.clients.arguments import client_name, slo_fields, user_number
from slosched.clients.inference import Inference, Model
from slosched.clients.questions import limit_ns
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.core.client.interface import Infer
from slosched.errors import InvalidRequest, MalformedMessage, RequestFailed
from slosched.functions.errors import call_failed
from slosched.functions.function import MAX_PAYLOAD_BYTES, Function, checked_name
from slosched.functions.payload import decode_result, encode, joined
from slosched.message_types import FunctionInfo
from slosched.messages import InferReply
from slosched.transport.codec import Frame
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_LONGEST_KEY = 256
#: A patient caller waits for this time before it sends a call again, and twice as long each time.
_FIRST_PAUSE_NS = 5 * NS_PER_MS
_LONGEST_PAUSE_NS = 100 * NS_PER_MS
#: How long it goes on with a call whose SLO only the controller knows.
_PATIENCE_NS = 10 * NS_PER_S

#: AsyncClient.load, and what sends a request and waits for its answer.
Load = Callable[[str], Awaitable[list[Model]]]
AnswerTo = Callable[[Infer, Frame | None, int], Awaitable[tuple[InferReply, Frame | None]]]


@dataclass(frozen=True, slots=True)
class CallAnswer(Inference):
    """The answer to a call: the `value` that the function returned, and everything that the controller says.

    Times are in ns; `round_trip_ns` is the client's own measure. Arrays in `value` are read-only.
    """

    value: Any = None

    @property
    def function(self) -> str:
        """The function's name."""
        return self.model.name

    def raise_for_code(self) -> None:
        """Raise what the code stands for, with this answer as `.reply`; nothing for code 0.

        CallRefused (a DeadlineExceeded) for what could not be in time, InvalidRequest for 6, CallFailed for
        the others.
        """
        code, reason = self.message.code, self.message.reason
        if code == Code.INVALID_REQUEST:
            text = f"call of {self.function!r}: {reason} (code {code})"
            raise InvalidRequest(text, code=code, reply=self)
        if code != Code.OK:
            raise call_failed(self.function, code=code, reason=reason, reply=self)

    def _run_told(self) -> list[str]:
        """What was predicted of it and what happened; it runs alone, and seldom on a GPU."""
        parts = []
        if self.start_ns is not None:
            parts.append(f"started at {format_duration(self.start_ns)}")
        if self.exec_ns is not None:
            expected = self.predicted_exec_ns
            predicted = "" if expected is None else f" (predicted {format_duration(expected)})"
            parts.append(f"ran {format_duration(self.exec_ns)}{predicted}")
        if self.message.worker_id >= 0:
            warmth = "cold" if self.cold else "warm"
            parts.append(f"on worker {self.message.worker_id}, {warmth}")
        return parts


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call that was checked, with its arguments as a frame. It is of the moment in which it was made."""

    name: str
    frame: Frame
    size_class: int
    slo_ns: int
    near: str
    user_id: int
    within_ns: int


def prepared(
    function: Function[Any] | str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    slo: float | str | None,
    near: str,
    timeout_s: float | None,
    user_id: int,
) -> Prepared:
    """Check a call before anything is sent. Raises what AsyncClient.call does for what is wrong with it."""
    stated = function if isinstance(function, Function) else None
    size_class, most_bytes = 0, MAX_PAYLOAD_BYTES
    if stated is not None:
        stated.check_arguments(args, kwargs)
        size_class = stated.size_class(args, kwargs)
        most_bytes = stated.max_payload_bytes
    return Prepared(
        name=checked_name(function) if stated is None else stated.name,
        frame=joined(encode(args, kwargs, most_bytes=most_bytes)),
        size_class=size_class,
        slo_ns=slo_fields(slo, None)[1],
        near=_key(near),
        user_id=user_number(user_id),
        within_ns=0 if timeout_s is None else limit_ns(timeout_s),
    )


class Caller:
    """Makes the calls of one client, whose methods `load` and `answer_to` are."""

    def __init__(self, load: Load, answer_to: AnswerTo) -> None:
        self._load, self._answer_to = load, answer_to
        self._loaded: dict[str, Model] = {}  # functions that were called before
        self._loading: dict[str, asyncio.Task[list[Model]]] = {}  # one for all that wait for it

    async def function(self, name: str) -> tuple[Model, FunctionInfo]:
        """The function `name`, as the controller knows it. Raises InvalidRequest if a model is called so."""
        model = self._loaded.get(name)
        if model is None or model.held.unloaded:
            [model, *_] = await asyncio.shield(self._load_once(name))
            self._loaded[name] = model
        if model.info.function is None:
            self._loaded.pop(name, None)
            raise InvalidRequest(
                f"{name!r} is a model and not a function; use infer for it",
                code=Code.INVALID_REQUEST,
            )
        return model, model.info.function

    async def _function_within(self, call: Prepared) -> tuple[Model, FunctionInfo]:
        """`function`, within the caller's own time limit. Raises RequestFailed once that has passed."""
        if not call.within_ns:
            return await self.function(call.name)
        try:
            async with asyncio.timeout(call.within_ns / NS_PER_S):
                return await self.function(call.name)
        except TimeoutError:
            raise RequestFailed(
                f"no answer within timeout_s, {format_duration(call.within_ns)}: the function {call.name!r} is "
                "still being loaded",
                code=Code.CANCELLED,
            ) from None

    def _load_once(self, name: str) -> asyncio.Task[list[Model]]:
        task = self._loading.get(name)
        if task is None:
            task = self._loading[name] = asyncio.ensure_future(self._loaded_now(name))
            task.add_done_callback(lambda done: self._load_over(name, done))
        return task

    async def _loaded_now(self, name: str) -> list[Model]:
        return await self._load(name)

    def _load_over(self, name: str, task: asyncio.Task[list[Model]]) -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # all that waited may have been cancelled, and then no one asks for it

    async def answer(self, call: Prepared, *, patient: bool = False) -> CallAnswer:
        """Make a call and return its answer, whatever its code.

        A `patient` caller sends it again while the controller refuses it unread (code 103), until its SLO has
        passed, counted from now.
        """
        begin_ns, pause_ns = now_ns(), _FIRST_PAUSE_NS
        while True:
            answer = await self._answer_once(call)
            again = patient and answer.code == Code.CONTROLLER_OVERLOADED
            patience_ns = answer.slo_ns or call.slo_ns or _PATIENCE_NS
            if not again or now_ns() + pause_ns > begin_ns + patience_ns:
                return answer
            await asyncio.sleep(pause_ns / NS_PER_S)
            pause_ns = min(2 * pause_ns, _LONGEST_PAUSE_NS)

    def event_of(self, call: Prepared) -> Infer | None:
        """What the client's brain is asked for a call; None if its function is not known yet."""
        model = self._loaded.get(call.name)
        if model is None or model.held.unloaded or model.info.function is None:
            return None
        return _event(model, model.info.function, call)

    def value_of(self, call: Prepared, reply: InferReply, frame: Frame | None, sent_ns: int) -> Any:
        """The value of an answer to `call`. Raises what its code stands for, as CallAnswer."""
        if reply.code == Code.OK:
            return None if frame is None else _value(call.name, frame)
        model = self._loaded[call.name]
        CallAnswer(model, {}, reply, now_ns() - sent_ns).raise_for_code()
        raise AssertionError("a code other than 0 is an error")

    async def _answer_once(self, call: Prepared) -> CallAnswer:
        model, info = await self._function_within(call)
        sent_ns = now_ns()
        event = _event(model, info, call)
        reply, frame = await self._answer_to(event, call.frame, sent_ns)
        value = None
        if reply.code == Code.OK and frame is not None:
            value = _value(call.name, frame)
        return CallAnswer(model, {}, reply, now_ns() - sent_ns, value)


def _event(model: Model, info: FunctionInfo, call: Prepared) -> Infer:
    return Infer(
        model=model.held,
        slo_ns=call.slo_ns or info.slo_ns,
        user_id=call.user_id,
        has_input=True,
        length=call.size_class,
        bundled=True,
        bounded=True,
        waits=True,
        within_ns=call.within_ns,
        near=call.near,
    )


def _value(name: str, frame: Frame) -> Any:
    try:
        return decode_result(frame)
    except MalformedMessage as error:
        raise RequestFailed(
            f"the result of {name!r} cannot be read: {error}", code=Code.RUNTIME_ERROR
        ) from None


def _key(near: object) -> str:
    if not isinstance(near, str):
        raise InvalidRequest(f"near must be a text, not {near!r}", code=Code.INVALID_REQUEST)
    key = client_name(near)
    if len(key) > _LONGEST_KEY:
        raise InvalidRequest(
            f"near has {len(key)} characters; at most {_LONGEST_KEY} are taken",
            code=Code.INVALID_REQUEST,
        )
    return key
