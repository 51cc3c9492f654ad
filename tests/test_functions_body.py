"""Driving a call's body by hand: its steps, what it sees of its children, and what it may not do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import slosched
from sample_functions import fibonacci
from slosched.codes import Code
from slosched.errors import DeadlineExceeded, InvalidConfig
from slosched.functions.body import (
    Awaits,
    Body,
    Raised,
    Returned,
    ended,
    outcome_of,
    traceback_text,
)
from slosched.functions.context import ChildCall, ChildRef, Context, gather
from slosched.functions.errors import CallFailed, CallRefused, PayloadTooLarge, call_failed
from slosched.functions.function import Function, function
from slosched.functions.payload import decode, decode_result, encode_result, joined


@function
def child(ctx: Context) -> Any: ...


class Host:
    """Keeps what a call asks for."""

    def __init__(self) -> None:
        self.children: list[ChildCall] = []
        self.back: list[int] = []

    def chained(self, asked: ChildCall) -> None:
        self.children.append(asked)

    def taken_back(self, number: int) -> None:
        self.back.append(number)


def started(called: Function[Any], *args: Any, **options: Any) -> tuple[Body, Host]:
    host = Host()
    ctx = Context(function=called.name, host=host, functions={"fibonacci": fibonacci}, **options)
    return Body(called, ctx, args), host


def failed(code: Code, reason: str = "") -> CallFailed:
    return call_failed("child", code=code, reason=reason)


def test_a_def_returns_or_raises_in_one_step() -> None:
    body, _ = started(child)
    assert body.ready and body.step() == Returned(None) and not body.ready
    with pytest.raises(RuntimeError, match="has ended"):
        body.step()

    @function
    def bad(ctx: Context) -> None:
        raise KeyError("missing")

    step = started(bad)[0].step()
    assert isinstance(step, Raised)
    assert "KeyError: 'missing'" in step.text and "in bad" in step.text
    assert "/body.py" not in step.text  # frames of the runtime explain nothing


def test_a_call_awaits_its_children_and_goes_on_when_all_are_answered() -> None:
    body, host = started(fibonacci, 25)
    assert body.step() == Awaits((0, 1)) and not body.ready
    assert [each.function for each in host.children] == ["fibonacci"] * 2
    assert [decode(joined(each.payload)) for each in host.children] == [((24,), {}), ((23,), {})]
    assert [each.size_class for each in host.children] == [2, 2]
    assert host.children[1].near == "two" and host.children[1].near_child == -1
    body.deliver(1, 23)
    assert not body.ready
    body.deliver(0, 24)
    assert body.ready and body.step() == Returned(47)


def test_a_child_that_is_answered_early_is_not_waited_for() -> None:
    @function
    async def waits(ctx: Context) -> list[Any]:
        one, two = ctx.chain(child), ctx.chain(child, slo="20ms")
        second = await two
        return [second, one.status, await one, one.status, one.result()]

    body, host = started(waits)
    assert body.step() == Awaits((1,))
    assert [each.slo_ns for each in host.children] == [0, 20_000_000]
    body.deliver(0, "first")
    body.deliver(0, "again")  # the first answer counts
    body.deliver(7, "of no child")
    assert not body.ready
    body.deliver(1, "second")
    assert body.step() == Returned(["second", "returned", "first", "returned", "first"])


def test_a_childs_error_raises_in_the_parent_with_its_traceback() -> None:
    @function
    async def catches(ctx: Context) -> list[Any]:
        seen: list[Any] = []
        refs = [ctx.chain(child) for _ in range(3)]
        try:
            await gather(*refs)
        except slosched.CallFailed as error:
            seen += [error.function, error.code, error.reason, error.refused, str(error)]
        seen.append([type(each).__name__ for each in await gather(*refs, errors=True)])
        seen.append([ref.status for ref in refs])
        await refs[2]
        return seen

    body, _ = started(catches)
    body.step()
    body.deliver(0, 1)
    body.deliver(1, failed(Code.CALL_RAISED, "Traceback\nValueError: no"))
    body.deliver(2, failed(Code.COULD_NOT_START_IN_TIME, "it needs 3ms"))
    step = body.step()
    assert isinstance(step, Raised)
    assert (
        "CallRefused: call of 'child' failed: could not start in time (code 8): it needs"
        in step.text
    )

    @function
    async def returns(ctx: Context) -> Any:
        try:
            await ctx.chain(child)
        except CallFailed as error:
            return [error.code, str(error), isinstance(error, DeadlineExceeded), error.refused]

    body, _ = started(returns)
    body.step()
    body.deliver(0, failed(Code.CALL_RAISED, "Traceback\nValueError: no"))
    text = "call of 'child' failed: call raised (code 104)\nTraceback\nValueError: no"
    assert body.step() == Returned([104, text, False, False])
    body, _ = started(returns)
    body.step()
    body.deliver(0, failed(Code.TIMED_OUT))
    step = body.step()
    assert isinstance(step, Returned) and step.value[0] == 4 and step.value[2:] == [True, True]


def test_a_cancelled_child_raises_at_once_and_its_answer_is_dropped() -> None:
    @function
    async def cancels(ctx: Context) -> list[Any]:
        one, two = ctx.chain(child), ctx.chain(child)
        one.cancel()
        one.cancel()
        seen: list[Any] = [one.status]
        try:
            await one
        except CallFailed as error:
            seen.append(error.code)
        seen.append(await two)
        two.cancel()  # too late: it keeps its answer
        return [*seen, two.status, one.status]

    body, host = started(cancels)
    assert body.step() == Awaits((1,)) and host.back == [0]
    body.deliver(0, "late")
    assert not body.ready
    body.deliver(1, 5)
    assert body.step() == Returned(["cancelled", 1, 5, "returned", "cancelled"])
    assert host.back == [0]


def test_near_is_an_own_child_or_a_key() -> None:
    other: list[ChildRef[Any]] = []

    @function
    async def nears(ctx: Context) -> str:
        one = ctx.chain(child)
        ctx.chain(child, near=one)
        ctx.chain(child, near="block 3")
        wrong: list[Any] = ["", "x" * 257, 3, *other]
        other.append(one)
        errors = []
        for near in wrong:
            try:
                ctx.chain(child, near=near)
            except (TypeError, ValueError) as error:
                errors.append(type(error).__name__)
        return " ".join(errors)

    body, host = started(nears)
    assert body.step() == Returned("ValueError ValueError TypeError")
    assert [(c.near, c.near_child) for c in host.children] == [("", -1), ("", 0), ("block 3", -1)]
    assert started(nears)[0].step() == Returned("ValueError ValueError TypeError TypeError")


def test_what_is_wrong_with_a_chain_raises_where_it_stands_and_asks_for_nothing() -> None:
    attempts: list[Any] = [
        lambda ctx: ctx.chain(child, 1),
        lambda ctx: ctx.chain("fibonacci", 1, 2),
        lambda ctx: ctx.chain(child, slo="soon"),
        lambda ctx: ctx.chain(child, slo=0),
        lambda ctx: ctx.chain("a b"),
        lambda ctx: ctx.chain("elsewhere", {1}),
        lambda ctx: ctx.chain("fibonacci", 3j),
        lambda ctx: gather(3),  # type: ignore[call-overload]
        lambda ctx: ctx.state,
    ]

    @function
    async def wrong(ctx: Context) -> list[str]:
        errors = []
        for each in attempts:
            try:
                each(ctx)
            except Exception as error:
                errors.append(type(error).__name__)
        ctx.chain("elsewhere", {"n": 1})  # another worker may have it
        return errors

    body, host = started(wrong)
    step = body.step()
    assert isinstance(step, Returned)
    assert step.value == [
        "TypeError",
        "TypeError",
        "InvalidDuration",
        "ValueError",
        "FunctionError",
        "TypeError",
        "TypeError",
        "TypeError",
        "InvalidConfig",
    ]
    assert [each.function for each in host.children] == ["elsewhere"]
    assert host.children[0].child == 0


def test_a_payload_over_the_childs_limit_is_refused() -> None:
    @function(max_payload=100)
    def small(ctx: Context, data: bytes) -> None: ...

    @function
    async def sends(ctx: Context) -> None:
        ctx.chain(small, b"x" * 100)

    step = started(sends)[0].step()
    assert isinstance(step, Raised) and PayloadTooLarge.__name__ in step.text
    assert "at most 100 travel" in step.text


def test_a_plain_def_cannot_chain() -> None:
    @function
    def chains(ctx: Context) -> None:
        ctx.chain(child)

    step = started(chains)[0].step()
    assert isinstance(step, Raised) and "must be an async def to chain calls" in step.text


def test_awaiting_anything_else_raises_a_type_error_that_says_so() -> None:
    others: list[ChildRef[Any]] = []

    @function
    async def sleeps(ctx: Context) -> str:
        errors = []
        wrongs: list[Any] = [asyncio.sleep(0), *others]
        for wrong in wrongs:
            try:
                await wrong
            except TypeError as error:
                errors.append(str(error))
        others.append(ctx.chain(child))
        return "\n".join(errors)

    step = started(sleeps)[0].step()
    assert isinstance(step, Returned) and "A call has no event loop: asyncio.sleep" in step.value
    step = started(sleeps)[0].step()
    assert isinstance(step, Returned) and "this reference is another call's" in step.value


def test_what_needs_an_event_loop_says_that_there_is_none() -> None:
    @function
    async def sleeps(ctx: Context) -> None:
        await asyncio.sleep(1)

    step = started(sleeps)[0].step()
    assert isinstance(step, Raised) and "A call has no event loop: asyncio.sleep" in step.text


def test_helpers_may_be_coroutines_and_a_def_may_return_one() -> None:
    async def helper(ctx: Context) -> Any:
        return 1 + await ctx.chain(child)

    @function
    def wrapped(ctx: Context) -> Any:
        return helper(ctx)

    body, _ = started(wrapped)
    assert body.step() == Awaits((0,))
    body.deliver(0, 41)
    assert body.step() == Returned(42)


@pytest.mark.parametrize("error", [StopIteration(3), asyncio.CancelledError(), GeneratorExit()])
def test_odd_exceptions_are_raised_ones(error: BaseException) -> None:
    @function
    def bad(ctx: Context) -> None:
        raise error

    @function
    async def worse(ctx: Context) -> None:
        raise error

    for each in (bad, worse):
        step = started(each)[0].step()
        assert isinstance(step, Raised) and type(error).__name__ in step.text


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_process_comes_out(error: BaseException) -> None:
    @function
    async def leaves(ctx: Context) -> None:
        raise error

    body, _ = started(leaves)
    with pytest.raises(type(error)):
        body.step()
    assert not body.ready


def test_closing_a_call_that_awaits_runs_its_finally_blocks() -> None:
    seen: list[str] = []

    @function
    async def cleans(ctx: Context) -> None:
        try:
            await ctx.chain(child)
        finally:
            seen.append("cleaned")
            await ctx.chain(child)  # too late, which harms nothing

    body, host = started(cleans)
    body.step()
    body.close()
    body.close()
    assert seen == ["cleaned"] and len(host.children) == 1 and not body.ready


def test_a_call_has_at_most_ten_thousand_unanswered_children() -> None:
    @function
    async def wide(ctx: Context) -> Any:
        refs = [ctx.chain(child) for _ in range(10_000)]
        try:
            ctx.chain(child)
        except CallFailed as error:
            refs[0].cancel()
            ctx.chain(child)
            return [error.code, len(ctx.unanswered)]

    body, host = started(wide)
    assert body.step() == Returned([Code.LIMIT_REACHED, 10_000])
    assert len(host.children) == 10_001


def test_the_context_tells_what_is_left_and_what_init_made() -> None:
    @function
    def looks(ctx: Context) -> list[Any]:
        return [ctx.left_ns(), ctx.call_id, ctx.init, ctx.function, ctx.deadline_ns]

    body, _ = started(looks, deadline_ns=500, call_id=9, init={"a": 1}, clock=lambda: 800)
    assert body.step() == Returned([-300, 9, {"a": 1}, "looks", 500])


def test_state_is_opened_when_it_is_first_used() -> None:
    opened: list[str] = []

    def open_state() -> Any:
        opened.append("once")
        return opened

    ctx = Context(function="f", host=Host(), open_state=open_state)
    assert not opened and ctx.state is ctx.state and opened == ["once"]
    with pytest.raises(InvalidConfig, match="this call has no state"):
        Context(function="f", host=Host()).state  # noqa: B018 - the property raises


def test_the_end_of_a_call_has_a_code_a_reason_and_a_result() -> None:
    @function(max_payload=60)
    def some(ctx: Context) -> None: ...

    end = ended(some, Returned({"a": (1, 2)}))
    assert end.code == 0 and decode_result(joined(end.result)) == {"a": (1, 2)}
    assert ended(some, Raised("why")).code == Code.CALL_RAISED
    end = ended(some, Returned(b"x" * 60))
    assert end.code == Code.CALL_OVER_LIMIT and "at most 60 travel" in end.reason
    end = ended(some, Returned([{1}]))
    assert end.code == Code.CALL_RAISED and end.reason.startswith("TypeError: result[0]: a set")
    assert not end.result


def test_an_answer_becomes_a_value_or_an_error() -> None:
    frame = joined(encode_result([1]))
    assert outcome_of("f", code=0, reason="", frame=frame) == [1]
    error = outcome_of("f", code=105, reason="60s", frame=b"")
    assert isinstance(error, CallFailed) and (error.code, error.reason) == (105, "60s")
    assert isinstance(outcome_of("f", code=8, reason="", frame=b""), CallRefused)
    garbled = outcome_of("f", code=0, reason="", frame=b"garbage")
    assert isinstance(garbled, CallFailed) and garbled.code == Code.RUNTIME_ERROR


def test_a_traceback_is_bounded_and_can_always_travel() -> None:
    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    for error in (ValueError("\ud800" * 10), ValueError("x" * 100_000), Rude()):
        text = traceback_text(error)
        assert len(text) <= 4000 and text.encode()
    long = traceback_text(ValueError("begin" + "x" * 100_000 + "end"))
    assert "begin" in long and long.endswith("end") and "characters are left out" in long
