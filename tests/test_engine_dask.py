"""The engine that runs functions on Dask: the same answers, and plain words for what Dask has not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slosched
import slosched.engines
from slosched.codes import Code
from slosched.errors import InvalidConfig
from slosched.functions.context import Context
from slosched.functions.errors import FunctionError

pytest.importorskip("distributed")

import dask_functions as offers
from slosched.engines.dask_engine import DaskEngine, NotPossible

pytestmark = pytest.mark.processes

WAIT_S = 60.0
captured = 41


@slosched.function
def by_value(ctx: Context, n: int) -> int:
    """Its name in this module is another thing's, so it travels by value."""
    return n + captured


hidden, by_value = by_value, None  # type: ignore[assignment]


@pytest.fixture(scope="module", params=["processes", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[DaskEngine]:
    with DaskEngine(
        [*offers.RUNS, hidden], workers=request.param, slots=1, state="embedded"
    ) as opened:
        yield opened


def result(engine: DaskEngine, name: Any, *args: Any, **options: Any) -> Any:
    return engine.call(name, *args, **options).result(WAIT_S)


def failure(engine: DaskEngine, name: Any, *args: Any, **options: Any) -> slosched.CallFailed:
    with pytest.raises(slosched.CallFailed) as caught:
        result(engine, name, *args, **options)
    return caught.value


def test_values_come_back_as_they_went(engine: DaskEngine) -> None:
    assert result(engine, offers.double, "ab") == "abab"
    assert result(engine, "double", 2.5) == 5.0
    for size in (10, 100_000):
        found = result(engine, offers.total, np.ones(size))
        assert found["sum"] == size
        assert type(found["sum"]) is np.float64
        assert found["pair"] == (1, "two")
        assert np.array_equal(found["half"], np.ones(size // 2))


def test_nested_calls_end_with_one_slot(engine: DaskEngine) -> None:
    assert result(engine, offers.leaves, 2, 8) == 64


def test_a_deep_chain_ends_with_one_slot(engine: DaskEngine) -> None:
    assert result(engine, offers.leaves, 40, 1) == 1


def test_an_error_has_the_traceback(engine: DaskEngine) -> None:
    error = failure(engine, offers.fails, "because")
    assert error.code == Code.CALL_RAISED
    assert "ValueError: because" in error.reason


def test_a_parent_sees_the_traceback_of_its_child(engine: DaskEngine) -> None:
    code, reason = result(engine, offers.asks_failing, "fails", "because")
    assert code == Code.CALL_RAISED
    assert "ValueError: because" in reason


def test_a_child_that_is_not_there_has_its_code(engine: DaskEngine) -> None:
    code, reason = result(engine, offers.asks_failing, "nowhere")
    assert (code, "nowhere" in reason) == (Code.UNKNOWN_MODEL, True)


def test_a_child_can_be_taken_back(engine: DaskEngine) -> None:
    assert result(engine, offers.gives_up) == "cancelled 1 8"


def test_an_exit_costs_that_call(engine: DaskEngine) -> None:
    assert failure(engine, offers.exits).code == Code.MODEL_PROCESS_ENDED
    assert result(engine, offers.double, 2) == 4


def test_a_passed_deadline_is_told(engine: DaskEngine) -> None:
    error = failure(engine, offers.double, 1, slo="1us")
    assert error.code == Code.TIMED_OUT
    assert isinstance(error, slosched.DeadlineExceeded)


def test_init_runs_in_the_process_of_the_call(engine: DaskEngine) -> None:
    made_in, ran_in = result(engine, offers.instance)
    assert made_in == ran_in
    assert (ran_in == os.getpid()) == (engine.workers == "threads")


def test_state_is_shared(engine: DaskEngine) -> None:
    calls = [engine.call(offers.adds, n) for n in range(8)]
    assert all(left > 0 for left in engine.results(calls))
    assert engine.state is not None
    weights = engine.state.array("weights", 4, merge="sum")
    weights.pull()
    assert weights.copy().tolist() == [2.0] * 4


def test_many_results_have_failures_in_place(engine: DaskEngine) -> None:
    calls = [engine.call("fails" if n % 2 else "double", "x") for n in range(6)]
    found = engine.results(calls)
    assert found[::2] == ["xx"] * 3
    assert all(isinstance(each, slosched.CallFailed) for each in found[1::2])


def test_a_function_that_cannot_be_imported_travels_by_value(engine: DaskEngine) -> None:
    assert result(engine, hidden, 1) == 42


def test_calls_near_a_key_go_to_one_worker(engine: DaskEngine) -> None:
    assert len({result(engine, offers.instance, near="a")[1] for _ in range(3)}) == 1


def test_wrong_calls_are_refused_before_they_are_sent(engine: DaskEngine) -> None:
    with pytest.raises(FunctionError, match="not opened with"):
        engine.call("nowhere")
    with pytest.raises(TypeError, match="double"):
        engine.call(offers.double)
    with pytest.raises(TypeError, match=r"args\[0\]: a set"):
        engine.call(offers.double, {1})


def test_a_cancelled_call_has_its_code(engine: DaskEngine) -> None:
    handle = engine.call(offers.double, 1)
    handle.cancel()
    with pytest.raises(slosched.CallFailed) as caught:
        handle.result(WAIT_S)
    assert caught.value.code == Code.CANCELLED


def test_a_crash_costs_its_call_and_the_worker_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "begun"
    with DaskEngine(offers.RUNS, slots=1, saturation=1.0) as engine:
        assert failure(engine, offers.dies).code == Code.MODEL_PROCESS_ENDED
        result(engine, offers.writes_line, str(path))
    assert path.read_text() == "begun\n"


def test_a_parent_in_another_process_hears_of_the_crash() -> None:
    with DaskEngine(offers.RUNS, slots=2, saturation=1.0) as engine:
        # The parent waits without a slot; its child may run in its own process and take it along.
        try:
            code, _ = result(engine, offers.asks_failing, "dies")
        except slosched.CallFailed as error:
            code = error.code
        assert code == Code.MODEL_PROCESS_ENDED


@pytest.mark.parametrize("function", [offers.on_a_gpu, offers.restored])
def test_what_dask_cannot_do_is_said_before_anything_starts(function: Any) -> None:
    with pytest.raises(NotPossible, match="Dask"):
        slosched.engines.open("dask", [function])


def test_wrong_options_are_said() -> None:
    with pytest.raises(InvalidConfig, match="processes, threads"):
        DaskEngine([offers.double], workers="fibers")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="at least one slot"):
        DaskEngine([offers.double], slots=0)


def test_closing_twice_is_fine() -> None:
    engine = DaskEngine([offers.double], workers="threads", slots=1)
    engine.close()
    engine.close()
