"""Engine.map and calls that other threads begin: values in order, errors in place, nothing left over."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, wait
from typing import Any

import pytest

import sample_functions as samples
import slosched.engines
from slosched.clients.blocking import Client
from slosched.codes import Code
from slosched.engines.live import LiveEngine
from slosched.errors import ConnectionLost
from slosched.functions.errors import CallFailed, FunctionError
from slosched.functions.function import function
from slosched.messages import CancelRequest, InferRequest
from test_functions_clients import FunctionController

FIBONACCI = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34]


@pytest.mark.parametrize("most", [1, 3, 256])
def test_the_values_come_in_order_whatever_is_on_its_way_at_a_time(most: int) -> None:
    with (
        FunctionController() as controller,
        LiveEngine(
            ["sample_functions"], address=controller.address, most_unanswered=most
        ) as engine,
    ):
        calls = [(n % 10,) for n in range(300)]
        assert engine.map("fibonacci", calls) == [FIBONACCI[n] for (n,) in calls]
        assert engine.map("fibonacci", []) == []
        assert len(controller.of(InferRequest)) == 300


def test_the_local_engine_maps_too() -> None:
    with slosched.engines.open("local", ["sample_functions"]) as engine:
        assert engine.map(samples.fibonacci, [(n,) for n in range(10)]) == FIBONACCI
        boom = engine.map("boom", [("oh no",)])
        assert isinstance(boom[0], CallFailed) and "oh no" in boom[0].reason
        with pytest.raises(TypeError):
            engine.map("fibonacci", [(7,), ()])


def test_a_call_that_failed_has_its_error_in_its_place() -> None:
    with (
        FunctionController() as controller,
        LiveEngine(["sample_functions"], address=controller.address) as engine,
    ):
        found = engine.map("boom", [(f"no {n}",) for n in range(3)])
        assert [isinstance(each, CallFailed) and each.code for each in found] == [
            Code.CALL_RAISED
        ] * 3
        assert [f"no {n}" in each.reason for n, each in enumerate(found)] == [True] * 3


def test_a_wrong_call_raises_and_what_was_begun_is_given_up() -> None:
    with (
        FunctionController() as controller,
        LiveEngine(["sample_functions"], address=controller.address) as engine,
    ):
        with pytest.raises(FunctionError):
            engine.map("nowhere", [(1,)])
        engine.map("fibonacci", [(1,)])
        controller.hold = True
        with pytest.raises(TypeError):
            engine.map("fibonacci", [*[(1,)] * 100, ("too", "many", "of", "them")])
        controller.wait_for(CancelRequest)
        controller.hold = False
        assert engine.map("fibonacci", [(7,)]) == [13]
        assert engine.client._client.unanswered == 0


def test_what_a_function_takes_by_place_is_what_its_signature_binds() -> None:
    def none(ctx: Any) -> None: ...
    def some(ctx: Any, x: int, y: int = 1) -> None: ...
    def any_number(ctx: Any, *rest: int) -> None: ...
    def named(ctx: Any, x: int, *, k: int) -> None: ...
    def named_with_default(ctx: Any, x: int = 1, *, k: int = 2) -> None: ...
    def by_place(ctx: Any, x: int, /, y: int) -> None: ...
    def defaults(ctx: Any = None, x: int = 2) -> None: ...

    for body in (none, some, any_number, named, named_with_default, by_place, defaults):
        called = function(body)
        for count in range(5):
            args = tuple(range(count))
            try:
                called.signature.bind(None, *args)
            except TypeError:
                with pytest.raises(TypeError, match=called.name):
                    called.check_arguments(args, {})
            else:
                called.check_arguments(args, {})


def test_calls_of_many_threads_are_each_answered_once() -> None:
    with FunctionController() as controller, Client(controller.address) as client:
        found: dict[int, list[int]] = {}

        def work(thread: int) -> None:
            futures = [client.start_call("fibonacci", n % 10) for n in range(50)]
            found[thread] = [each.result(30) for each in futures]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(30)
        assert found == {thread: [FIBONACCI[n % 10] for n in range(50)] for thread in range(4)}
        assert client._client.unanswered == 0


def test_a_call_is_taken_back_before_and_after_it_left() -> None:
    with FunctionController() as controller, Client(controller.address) as client:
        assert client.call("fibonacci", 7) == 13
        controller.hold = True
        held = [client.start_call("fibonacci", n) for n in range(5)]
        controller.wait_for(InferRequest)
        for each in held:
            assert each.cancel()
        again = client.start_call("fibonacci", 3)
        assert again.cancel()
        with pytest.raises(CancelledError):
            again.result(1)
        controller.hold = False
        assert client.call("fibonacci", 8) == 21
        assert client._client.unanswered == 0


def test_closing_ends_what_waits() -> None:
    with FunctionController() as controller:
        client = Client(controller.address)
        assert client.call("fibonacci", 7) == 13
        controller.hold = True
        futures = [client.start_call("fibonacci", 1) for _ in range(5)]
        client.close()
        assert not wait(futures, 10).not_done
        for each in futures:
            assert isinstance(each.exception(), ConnectionLost)
        with pytest.raises(ConnectionLost):
            client.start_call("fibonacci", 1)
