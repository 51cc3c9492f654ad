"""The live engine: the same functions on processes of its own, or behind an address."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sample_functions as samples
import slosched.engines
from slosched.codes import Code
from slosched.engines.live import LiveEngine, _remove_left_behind
from slosched.errors import InvalidConfig, PeerUnreachable
from slosched.experiment.children import ChildFailed
from slosched.functions.context import Context
from slosched.functions.errors import CallFailed, FunctionError, PayloadTooLarge
from slosched.functions.function import function
from test_functions_clients import FunctionController


def test_an_engine_at_an_address_uses_what_is_there() -> None:
    with (
        FunctionController() as controller,
        slosched.engines.open(
            "slosched", ["sample_functions"], address=controller.address, most_unanswered=2
        ) as engine,
    ):
        assert engine.name == "slosched"
        handles = [engine.call("fibonacci", n, slo="20s") for n in range(20)]  # two at a time
        assert [each.result(30) for each in handles][-1] == 4181
        assert all(each.done for each in handles)
        with pytest.raises(CallFailed, match="oh no"):
            engine.call("boom", "oh no").result(30)
        controller.hold = True
        handle = engine.call("noop")
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        assert not handle.done
        handle.cancel()
        with pytest.raises(CallFailed) as cancelled:
            handle.result(30)
        assert cancelled.value.code == Code.CANCELLED


def test_what_is_wrong_with_a_call_raises_where_it_is_made() -> None:
    with (
        FunctionController() as controller,
        LiveEngine(["sample_functions"], address=controller.address, most_unanswered=1) as engine,
    ):
        wrong: list[tuple[type[Exception], tuple[Any, ...]]] = [
            (FunctionError, ("nowhere",)),
            (TypeError, ("fibonacci",)),
            (TypeError, ("echo", {1})),
            (PayloadTooLarge, ("echo", np.broadcast_to(np.zeros(1), (2**27,)))),
        ]
        for error, args in wrong:
            with pytest.raises(error):
                engine.call(*args)
        array = np.zeros(3)
        handle = engine.call("echo", array)
        array[:] = 1  # too late: the call has what it was given
        assert handle.result(30)["args"][0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": 65},
        {"slots": 0},
        {"most_unanswered": 0},
        {"address": "127.0.0.1:1", "state": "embedded"},
        {"address": "127.0.0.1:1", "logs": "x"},
        {"default_slo": "soon"},
    ],
    ids=str,
)
def test_impossible_options_start_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig):
        LiveEngine(["sample_functions"], **options)


def test_functions_that_workers_cannot_import_are_refused() -> None:
    @function
    def local(ctx: Context) -> None: ...

    hidden: Any = function(name="other")(
        samples.noop.body
    )  # its module has another one in its place
    for each in (local, hidden):
        with pytest.raises(FunctionError, match="workers cannot import the function"):
            LiveEngine([each])


def test_a_controller_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slosched.engines.live._READY_S", 0.2)
    with pytest.raises(PeerUnreachable):
        LiveEngine(["sample_functions"], address="127.0.0.1:1")


def test_folders_of_programs_that_were_killed_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / f"slosched-engine-{os.getpid()}-abc"
    left, other = tmp_path / f"slosched-engine-{2**31}-abc", tmp_path / "slosched-engine-x-y"
    for folder in (mine, left, other):
        folder.mkdir()
        (folder / "worker-0.log").write_text("words")
    _remove_left_behind(tmp_path)
    assert mine.is_dir() and other.is_dir() and not left.exists()


@pytest.mark.processes
def test_calls_run_on_processes_of_the_engine_and_leave_nothing(tmp_path: Path) -> None:
    """One engine for all of it, as it takes seconds to start."""
    names = ("boom", "parent_of_boom", "exits", "fan", "noop")
    with LiveEngine(
        [samples.fibonacci, *(f"sample_functions:{name}" for name in names)],
        slots=1,
        state=f"embedded:{tmp_path / 'store'}",
        logs=tmp_path / "logs",
    ) as engine:
        assert engine.call(samples.fibonacci, 8).result(60) == 21
        assert engine.call("fan", 20).result(60) == 20  # in one slot
        with pytest.raises(CallFailed, match="ValueError: so it goes") as failed:
            engine.call("parent_of_boom", "so it goes").result(60)
        assert "in boom" in failed.value.reason and "in parent_of_boom" in failed.value.reason
        with pytest.raises(CallFailed) as ended:
            engine.call("exits", 3).result(60)
        assert ended.value.code == Code.MODEL_PROCESS_ENDED
        assert engine.call(samples.fibonacci, 5).result(60) == 5
        processes = [child.process for child in engine.processes]
        engine.check()
    engine.close()
    assert len(processes) == 2 and all(each.poll() is not None for each in processes)
    assert (tmp_path / "logs" / "controller.log").is_file()
    from slosched.functions.state import open_store

    assert not open_store(f"embedded:{tmp_path / 'store'}").namespaces()


@pytest.mark.processes
def test_a_worker_that_does_not_start_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_for_here.py").write_text(
        "import slosched\n@slosched.function\ndef one(ctx): return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ChildFailed, match=r"the worker 0 did not start: .*no such option"):
        LiveEngine(["made_for_here"], worker_options=["--nonsense"])
    sys.modules.pop("made_for_here", None)
