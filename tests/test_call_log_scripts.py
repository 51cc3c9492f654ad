"""A recorded graph of calls becomes scripts that do what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from made_call_run import MS, a_call, a_part, family, write_calls
from slosched.core.scheduler.interface import CallPart, CallRecord
from slosched.core.worker.emulated_calls import AwaitAll, Chain, Exit, Raise, Return, Run
from slosched.errors import InvalidConfig
from slosched.sim.recorded_calls import RecordedCalls, recorded_calls
from slosched.telemetry import call_log, call_part_log
from slosched.telemetry.call_graph import read_call_graph


def recorded(
    directory: Path,
    calls: list[CallRecord],
    parts: list[CallPart],
    loads_ns: dict[int, list[int]] | None = None,
) -> RecordedCalls:
    write_calls(directory, calls, parts)
    graph = read_call_graph(directory / call_log.FILE_NAME, directory / call_part_log.FILE_NAME)
    return recorded_calls(graph, loads_ns=loads_ns)


def scripts(found: RecordedCalls) -> dict[str, list[tuple[object, ...]]]:
    return {f.name: [script.steps for script in f.scripts] for f in found.functions}


def test_the_scripts_of_a_family_do_what_was_recorded(tmp_path: Path) -> None:
    found = recorded(tmp_path, *family())
    assert scripts(found) == {
        "parent": [
            (
                Run(MS),
                Chain("leaf", 1, numbers=(0,), in_bytes=1),
                Run(MS),
                Chain("leaf", 1, numbers=(1,), in_bytes=1),
                AwaitAll((0, 1), catch=True),  # child 1 failed, and the parent went on
                Run(MS),
                Chain("last", 1, numbers=(0,), in_bytes=1),
                AwaitAll((2,)),
                Run(MS),
                Return(8),
            )
        ],
        "leaf": [
            (Run(4 * MS), Return(0)),
            (Run(5 * MS // 2), Raise("as recorded")),
        ],
        "last": [(Run(3 * MS), Return(0))],
    }
    assert [(r.at_ns, r.function, r.number, r.in_bytes) for r in found.roots] == [
        (0, "parent", 0, 100)
    ]
    assert found.calls == 4
    assert {f.name: f.expected_ns for f in found.functions}["leaf"] == 4 * MS


def test_children_that_are_alike_and_asked_for_at_once_are_one_step(tmp_path: Path) -> None:
    calls = [a_call(n, 0, 2, parent=1, child=n - 2, exec=1, start=1) for n in range(2, 6)]
    calls.append(a_call(1, 0, 3, start=0, exec=1, function="parent", children=4))
    found = recorded(tmp_path, calls, [a_part(1, 0, 0, 0, (0, 1, 2, 3)), a_part(1, 1, 2, 3)])
    steps = scripts(found)["parent"][0]
    assert steps[0] == Chain("f", 4, numbers=(0, 1, 2, 3), in_bytes=1)
    assert steps[1:] == (AwaitAll((0, 1, 2, 3)), Run(MS), Return(0))


def test_a_child_that_inherited_its_deadline_inherits_it_again(tmp_path: Path) -> None:
    calls = [
        a_call(2, 1, 2, parent=1, child=0, slo=9),  # what was left of the parent's 10
        a_call(3, 1, 2, parent=1, child=1, slo=5),
        a_call(1, 0, 3, start=0, exec=1, slo=10, function="parent", children=2),
    ]
    steps = scripts(recorded(tmp_path, calls, [a_part(1, 0, 0, 1)]))["parent"][0]
    assert [step.slo_ns for step in steps if isinstance(step, Chain)] == [0, 5 * MS]


def test_children_whose_answers_were_there_are_awaited_before_the_return(tmp_path: Path) -> None:
    calls = [
        a_call(2, 0, 1, parent=1, child=0, start=0, exec=1),
        a_call(3, 0, 1, parent=1, child=1, code=1),  # taken back
        a_call(1, 0, 3, start=0, exec=3, function="parent", children=2),
    ]
    steps = scripts(recorded(tmp_path, calls, [a_part(1, 0, 0, 3)]))["parent"][0]
    assert steps[-2:] == (AwaitAll((0,), catch=True), Return(0))


@pytest.mark.parametrize(
    ("code", "exec_ms", "last"),
    [
        (101, 1, (Run(4 * MS), Exit())),
        (1, 1, (Run(4 * MS), Return(0))),
        (54, 0, (Run(4 * MS), Return(0))),
        (100, 6, (Run(6 * MS), Return(0))),
    ],
)
def test_a_call_that_was_ended_runs_as_long_as_others_at_least(
    tmp_path: Path, code: int, exec_ms: int, last: tuple[object, ...]
) -> None:
    begun = {"start": 0, "exec": exec_ms} if exec_ms else {}
    calls = [a_call(n, 0, 5, start=0, exec=4) for n in range(3)]
    calls.append(a_call(3, 0, 9, code=code, **begun))
    found = recorded(tmp_path, calls, [a_part(n, 0, 0, 4) for n in range(3)])
    assert scripts(found)["f"][3] == last


def test_a_child_without_a_row_leaves_no_gap(tmp_path: Path) -> None:
    calls = [
        a_call(4, 1, 2, parent=1, child=2, near_child=0),
        a_call(3, 1, 2, parent=1, child=1, near_child=2),
        a_call(1, 0, 3, start=0, exec=1, function="parent", children=3),
    ]
    parts = [a_part(1, 0, 0, 1, (0, 1, 2)), a_part(1, 1, 2, 2)]
    steps = scripts(recorded(tmp_path, calls, parts))["parent"][0]
    assert [s.near_child for s in steps if isinstance(s, Chain)] == [1, -1]
    assert AwaitAll((0, 1)) in steps


def test_a_load_takes_what_loads_of_the_function_took(tmp_path: Path) -> None:
    calls = [
        a_call(1, 0, 5, start=0, exec=4, model_id=7),
        a_call(2, 0, 5, function="g", model_id=8),
    ]
    found = recorded(tmp_path, calls, [a_part(1, 0, 0, 4)], {7: [10 * MS, 20 * MS]})
    assert {f.name: f.cold_ns for f in found.functions} == {"f": 15 * MS, "g": MS}


def test_a_graph_without_a_client_is_refused(tmp_path: Path) -> None:
    calls, parts = family()
    with pytest.raises(InvalidConfig, match="nothing to simulate"):
        recorded(tmp_path, calls[:-1], parts)
