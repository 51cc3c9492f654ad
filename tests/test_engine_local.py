"""The local engine: calls and their children inline, with the semantics of workers."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sample_functions as samples
import slosched.engines
from slosched.codes import Code
from slosched.engines.local import LocalEngine
from slosched.errors import InvalidRequest, SloschedError, UnknownName
from slosched.functions.context import NO_DEADLINE_NS, Context, gather
from slosched.functions.errors import CallFailed, FunctionError
from slosched.functions.function import Function, function


def engine(*functions: Function[Any]) -> LocalEngine:
    return LocalEngine(functions or ["sample_functions"])


def failure(opened: LocalEngine, called: Function[Any] | str, *args: Any) -> CallFailed:
    with pytest.raises(CallFailed) as error:
        opened.call(called, *args).result()
    return error.value


def test_an_engine_is_opened_by_name_and_runs_calls() -> None:
    with slosched.engines.open("local", ["sample_functions"]) as opened:
        assert opened.name == "local"
        assert opened.call(samples.fibonacci, 12).result() == 144
        handle = opened.call("fibonacci", 10, slo="20ms", near="here")
        assert handle.done and handle.result(timeout_s=1) == 55
        handle.cancel()
        assert handle.result() == 55
    with pytest.raises(UnknownName, match="unknown engine 'lokal' \\(did you mean local"):
        slosched.engines.open("lokal", ["sample_functions"])


@pytest.mark.parametrize("functions", [[], "sample_functions", None, ["bisect"], [3]], ids=str)
def test_an_engine_needs_functions(functions: Any) -> None:
    with pytest.raises(FunctionError):
        slosched.engines.open("local", functions)


def test_wrong_calls_raise_where_they_are_made() -> None:
    opened = engine(samples.noop, samples.fibonacci)
    with pytest.raises(FunctionError, match="not opened with the function 'boom'; it has fib"):
        opened.call(samples.boom, "x")
    with pytest.raises(FunctionError, match="'nothing'"):
        opened.call("nothing")
    other = function(name="noop")(lambda ctx: 1)
    with pytest.raises(FunctionError, match="'noop'"):  # another function of that name
        opened.call(other)
    with pytest.raises(TypeError, match="fibonacci"):
        opened.call("fibonacci")
    with pytest.raises(TypeError, match=r"args\[0\]: a set"):
        engine(samples.echo).call("echo", {1})
    with pytest.raises(SloschedError, match="not a duration"):
        opened.call("noop", slo="soon")


def test_arguments_and_results_travel_as_on_workers() -> None:
    array = np.arange(6.0)
    [value] = engine().call(samples.echo, array, text=("a", [1])).result()["args"]
    assert np.array_equal(value, array) and not value.flags.writeable
    assert not np.shares_memory(value, array)
    assert engine().call(samples.echo, text=("a", [1])).result()["kwargs"] == {"text": ("a", [1])}

    @function
    def returns_a_set(ctx: Context) -> set[int]:
        return {1}

    error = failure(engine(returns_a_set), returns_a_set)
    assert error.code == Code.CALL_RAISED and "result: a set" in error.reason


def test_errors_come_with_the_tracebacks_of_all_calls() -> None:
    error = failure(engine(), samples.parent_of_boom, "so it goes")
    assert error.code == Code.CALL_RAISED and error.function == "parent_of_boom"
    for text in ("in parent_of_boom", "in boom", "ValueError: so it goes"):
        assert text in error.reason
    assert failure(engine(), samples.exits, 3).code == Code.MODEL_PROCESS_ENDED


def test_a_child_that_no_engine_knows_fails_in_its_parent() -> None:
    @function
    async def asks(ctx: Context) -> int:
        try:
            await ctx.chain("nowhere", 1)
        except CallFailed as error:
            return error.code
        return 0

    assert engine(asks).call(asks).result() == Code.UNKNOWN_MODEL


def test_calls_nest_a_thousand_deep_and_fan_out_ten_thousand_wide() -> None:
    opened = engine()
    assert opened.call(samples.deep, 1_000).result() == 1_000
    assert "more than 1,000 calls stand above it" in failure(opened, samples.deep, 1_001).reason
    assert opened.call(samples.fan, 10_000).result() == 10_000


def test_init_runs_once_and_restore_gives_each_call_its_product_again() -> None:
    made: list[int] = []

    def init() -> list[int]:
        made.append(1)
        return []

    @function(init=init)
    def keeps(ctx: Context) -> int:
        ctx.init.append(1)
        return len(ctx.init)

    opened = engine(keeps)
    assert [opened.call(keeps).result() for _ in range(3)] == [1, 2, 3] and made == [1]
    opened = engine()
    assert [opened.call("remembers_nothing", n).result() for n in (1, 2)] == [[1], [2]]
    assert [opened.call("remembers", n).result() for n in (1, 2)] == [[1], [1, 2]]

    @function(init=lambda: 1 / 0)
    def never(ctx: Context) -> None: ...

    error = failure(engine(never), never)
    assert error.code == Code.CALL_RAISED and "ZeroDivisionError" in error.reason


def test_a_child_inherits_the_deadline_and_may_have_an_earlier_one() -> None:
    @function
    def left(ctx: Context) -> int:
        return ctx.deadline_ns

    @function
    async def three(ctx: Context) -> list[int]:
        refs = [ctx.chain(left), ctx.chain(left, slo="1ms"), ctx.chain(left, slo="1h")]
        return [ctx.deadline_ns, *await gather(*refs)]

    opened = engine(left, three)
    own, same, earlier, no_later = opened.call(three, slo="10s").result()
    assert own == same == no_later and own - earlier > 9 * 10**9
    own, _, earlier, later = opened.call(three).result()
    assert own == NO_DEADLINE_NS and earlier < later < own


def test_children_that_a_call_leaves_are_ended() -> None:
    seen: list[str] = []

    @function
    async def waits(ctx: Context, name: str) -> None:
        try:
            seen.append(f"{name} began")
            await ctx.chain(samples.noop)
            if name == "left":
                await ctx.chain(waits, "below")
            seen.append(f"{name} went on")
        finally:
            seen.append(f"{name} ended")

    @function
    async def leaves(ctx: Context) -> str:
        cancelled, left = ctx.chain(waits, "cancelled"), ctx.chain(waits, "left")
        cancelled.cancel()
        first = ctx.chain(samples.noop)
        await first
        return left.status

    opened = engine(waits, leaves, samples.noop)
    assert opened.call(leaves).result() in ("unanswered", "returned")
    assert "cancelled began" not in seen
    assert seen.count("left began") == seen.count("left ended")


def test_calls_of_one_call_have_numbers_of_their_own() -> None:
    @function
    async def numbers(ctx: Context, levels: int) -> list[int]:
        below = [ctx.chain(numbers, levels - 1) for _ in range(2)] if levels else []
        return [ctx.call_id, *(n for each in await gather(*below) for n in each)]

    found = engine(numbers).call(numbers, 3).result()
    assert len(found) == 15 == len(set(found))


def test_threads_share_an_engine() -> None:
    opened = engine()
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(opened.call("fibonacci", 10).result()))
        for _ in range(8)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert results == [55] * 8


def test_calls_share_state_that_ends_with_the_engine(tmp_path: Path) -> None:
    from slosched.functions.state import open_store

    @function
    async def adds(ctx: Context, n: int) -> float:
        array = ctx.state.array("sum", 1, merge="sum")
        if n:
            await gather(*(ctx.chain(adds, 0) for _ in range(n)))
        else:
            array.set(array.copy() + 1)
            array.push()
        return float(array.copy()[0])

    address = f"embedded:{tmp_path}"
    with LocalEngine([adds], state=address) as opened:
        assert opened.call(adds, 5).result() == 5.0
        assert len(open_store(address).namespaces()) == 1
    assert not open_store(address).namespaces()
    assert "this call has no state" in failure(engine(adds), adds, 0).reason


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.booleans(), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=12
    )
)
def test_any_tree_of_calls_returns_or_fails_as_its_leaves_do(tree: Any) -> None:
    ran: list[Any] = []

    @function
    async def node(ctx: Context, below: Any) -> int:
        ran.append(below)
        if isinstance(below, bool):
            if not below:
                raise ValueError("a leaf fails")
            return 1
        return sum(await gather(*(ctx.chain(node, each) for each in below)))

    def count(below: Any) -> tuple[int, int, bool]:
        """Nodes, leaves and whether all leaves return."""
        if isinstance(below, bool):
            return 1, 1, below
        parts = [count(each) for each in below]
        nodes, leaves, fine = zip(*parts, strict=True)
        return 1 + sum(nodes), sum(leaves), all(fine)

    nodes, leaves, fine = count(tree)
    handle = engine(node).call(node, tree)
    assert len(ran) == nodes  # each body ran once
    if fine:
        assert handle.result() == leaves
    else:
        with pytest.raises(CallFailed, match="a leaf fails"):
            handle.result()


@pytest.mark.parametrize("slo", [0, -1, float("nan"), float("inf"), "0s", "x"])
def test_an_slo_that_clients_refuse_is_refused_here_too(slo: float | str) -> None:
    with LocalEngine(["sample_functions"]) as engine, pytest.raises(InvalidRequest, match="slo"):
        engine.call("noop", slo=slo)
