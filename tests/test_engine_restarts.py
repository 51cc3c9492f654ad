"""A worker of the live engine that ends is started again; an engine whose controller ends says so."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from slosched.clock import now_ns, sleep_ns
from slosched.engines.live import LiveEngine
from slosched.engines.restarts import Restarts, Start
from slosched.experiment.children import ChildFailed, Children
from slosched.functions.errors import CallFailed
from slosched.units import NS_PER_MS, NS_PER_S

pytestmark = pytest.mark.processes


def soon(is_so: Callable[[], bool], within_s: int = 60) -> bool:
    give_up_ns = now_ns() + within_s * NS_PER_S
    while not is_so():
        if now_ns() > give_up_ns:
            return False
        sleep_ns(20 * NS_PER_MS)
    return True


def test_a_worker_that_is_killed_is_started_again_and_a_controller_that_is_ends_the_engine(
    tmp_path: Path,
) -> None:
    with LiveEngine(["sample_functions:noop"], slots=1, logs=tmp_path) as engine:
        assert engine.call("noop").result(60) is None
        worker, controller = engine.processes
        worker.process.kill()
        assert soon(lambda: engine.processes[0] is not worker)
        with pytest.raises(ChildFailed, match="the worker 0 of the engine ended with exit code -9"):
            engine.check()
        assert soon(lambda: _returns(engine))
        controller.process.kill()
        with pytest.raises(ChildFailed, match="the controller of the engine ended"):
            engine.call("noop").result(60)
        assert soon(lambda: _breaks(engine))
        again = engine.processes[0].process
    assert again.poll() is not None


def _returns(engine: LiveEngine) -> bool:
    try:
        return engine.call("noop").result(60) is None
    except CallFailed:  # the worker is not back yet
        return False


def _breaks(engine: LiveEngine) -> bool:
    try:
        engine.call("noop")
    except ChildFailed:
        return True
    return False


def test_a_worker_that_keeps_ending_is_not_started_for_ever(tmp_path: Path) -> None:
    broke = threading.Event()
    with Children([sys.executable, "-c"]) as children:
        ends = "raise SystemExit('no luck')"
        first = children.start("worker 0", [ends], tmp_path / "first.log")
        controller = children.start(
            "controller", ["import time; time.sleep(600)"], tmp_path / "c.log"
        )
        start = Start("worker 0", [ends], tmp_path, None)
        restarts = Restarts(children, [start], [first], controller, when_broken=broke.set)
        try:
            assert broke.wait(120)
        finally:
            restarts.close()
    assert restarts.broken is not None
    assert "no luck; it ended 6 times within a minute" in str(restarts.broken)
    assert len(restarts.ended) == 6
