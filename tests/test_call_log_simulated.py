"""A graph of calls that was recorded runs again in the simulator, on other slots."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from made_call_run import a_call, family, write_calls
from slosched.analysis.call_runs import graph_of_run, loads_of_run
from slosched.cli.app import app
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    EmulatedFunction,
    Raise,
    Return,
    Run,
    Script,
)
from slosched.errors import InvalidConfig
from slosched.messages import FunctionInfo
from slosched.sim.calls import CallArrival, CallOutcome, CallSpec, simulate_calls
from slosched.sim.hosts import HostPlan
from slosched.sim.recorded_calls import recorded_calls, replay_spec
from slosched.sim.run_files import RunFiles
from slosched.telemetry.call_graph import CallGraph, RecordedCall, facts_of

MS = 1_000_000

LEAF = EmulatedFunction(
    name="leaf",
    scripts=(
        Script((Run(3 * MS),)),
        Script((Run(MS), Raise("no"))),
        Script((Run(5 * MS), Return(0))),
    ),
    expected_ns=3 * MS,
)
#: It asks for children in between its run, awaits some early, and catches the one that fails.
MIDDLE = EmulatedFunction(
    name="middle",
    scripts=(
        Script(
            (
                Run(MS // 2),
                Chain("leaf", 3, numbers=(0, 2, 0)),
                Run(MS // 2),
                AwaitAll((0, 1)),
                Run(MS),
                Chain("leaf", 1, numbers=(1,)),
                Run(MS // 4),
                AwaitAll(catch=True),
                Return(50),
            )
        ),
    ),
    expected_ns=2 * MS,
)
TOP = EmulatedFunction(
    name="top",
    scripts=(Script((Run(MS), Chain("middle", 4), AwaitAll(), Run(MS), Return(1_000))),),
    expected_ns=2 * MS,
)
FUNCTIONS = (TOP, MIDDLE, LEAF)


def recorded_run(directory: Path, *, slots: int, calls: int = 2) -> CallOutcome:
    """A run of `top`, 200 ms apart, with its logs in `directory`."""
    arrivals = tuple(
        CallArrival(at_ns=n * 200 * MS, function="top", slo_ns=2_000 * MS) for n in range(calls)
    )
    outcome = simulate_calls(CallSpec(hosts=(HostPlan(FUNCTIONS, slots=slots),), arrivals=arrivals))
    files = RunFiles(directory)
    for request in outcome.requests:
        files.on_request(request)
    for action in outcome.actions:
        files.on_action(action)
    for part in outcome.parts:
        files.on_call_part(part)
    for call in outcome.calls:
        files.on_call(call)
    files.close()
    return outcome


def again(directory: Path, *, slots: int, out: Path) -> CallGraph:
    """The recorded run of `directory` once more; the graph of what it gave."""
    recorded = recorded_calls(graph_of_run(directory), loads_ns=loads_of_run(directory))
    outcome = simulate_calls(replay_spec(recorded, workers=1, slots=slots))
    out.mkdir()
    write_calls(out, outcome.calls, outcome.parts)
    return graph_of_run(out)


def shape(call: RecordedCall) -> tuple[object, ...]:
    """What a call did, whenever it did it."""
    return (
        call.function,
        call.code,
        call.exec_ns,
        call.asked_ns,
        call.out_bytes,
        [part.ran_ns for part in call.parts],
        [call.children[number].function for number in sorted(call.children)],
    )


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_a_recorded_graph_does_the_same_again(tmp_path: Path, slots: int) -> None:
    (tmp_path / "first").mkdir()
    outcome = recorded_run(tmp_path / "first", slots=3)
    assert {answer.code for answer in outcome.answers} == {0}
    first = graph_of_run(tmp_path / "first")
    second = again(tmp_path / "first", slots=slots, out=tmp_path / "second")
    for one, other in zip(first.roots, second.roots, strict=True):
        assert [shape(call) for call in first.below(one)] == [
            shape(call) for call in second.below(other)
        ]
        assert facts_of(first, one).calls == 21
        assert facts_of(second, other).critical_ns == facts_of(first, one).critical_ns
        # On any number of slots it takes longer than its critical path, by messages and waits.
        assert facts_of(second, other).makespan_ns > facts_of(second, other).critical_ns


def test_the_log_of_requests_has_the_calls_of_clients_alone(tmp_path: Path) -> None:
    outcome = recorded_run(tmp_path, slots=2)
    roots = [call.key for call in outcome.calls if call.parent < 0]
    assert len(outcome.calls) == 2 * 21
    assert [request.key for request in outcome.requests] == roots
    assert len(roots) == 2


def test_more_slots_shorten_a_graph_down_to_its_critical_path(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    recorded_run(tmp_path / "first", slots=1, calls=1)
    spans = []
    for slots in (1, 2, 4, 64):
        graph = again(tmp_path / "first", slots=slots, out=tmp_path / str(slots))
        spans.append(facts_of(graph, graph.roots[0]).makespan_ns)
    assert spans == sorted(spans, reverse=True)
    facts = facts_of(graph, graph.roots[0])
    assert spans[0] > facts.ran_ns  # one slot runs one call after the other
    assert facts.critical_ns < spans[-1] < facts.critical_ns + 10 * MS


def test_a_cold_start_is_that_of_the_recorded_run(tmp_path: Path) -> None:
    recorded_run(tmp_path, slots=2)
    recorded = recorded_calls(graph_of_run(tmp_path), loads_ns=loads_of_run(tmp_path))
    assert {f.name: f.cold_ns for f in recorded.functions} == {f.name: f.cold_ns for f in FUNCTIONS}


def test_an_slo_of_its_own_replaces_the_recorded_ones(tmp_path: Path) -> None:
    recorded_run(tmp_path, slots=2)
    recorded = recorded_calls(graph_of_run(tmp_path))
    spec = replay_spec(recorded, workers=2, slots=2, slo_ns=77 * MS)
    assert {arrival.slo_ns for arrival in spec.arrivals} == {77 * MS}
    chains = [
        step
        for function in spec.hosts[0].functions
        for script in function.scripts
        for step in script.steps
        if isinstance(step, Chain)
    ]
    assert chains and {chain.slo_ns for chain in chains} == {0}
    assert len(spec.hosts) == 2


def test_the_record_has_what_was_predicted_of_the_whole_call(tmp_path: Path) -> None:
    outcome = recorded_run(tmp_path, slots=2, calls=1)
    predicted = {call.function: call.predicted_exec_ns for call in outcome.calls}
    assert predicted["top"] == TOP.expected_ns  # it was suspended, and its rest was predicted anew
    assert predicted["middle"] == MIDDLE.expected_ns


def test_a_function_of_gpus_runs_on_gpus_again(tmp_path: Path) -> None:
    kernel = EmulatedFunction(
        name="kernel",
        scripts=(Script((Run(4 * MS),)),),
        info=FunctionInfo(gpu=True),
        expected_ns=4 * MS,
    )
    fan = EmulatedFunction(
        name="fan", scripts=(Script((Chain("kernel", 6), AwaitAll(), Return(1))),)
    )
    outcome = simulate_calls(
        CallSpec(
            hosts=(HostPlan((fan, kernel), slots=1),),
            arrivals=(CallArrival(at_ns=0, function="fan", slo_ns=900 * MS),),
            gpus=1,
        )
    )
    assert {call.function for call in outcome.calls if call.gpu} == {"kernel"}
    write_calls(tmp_path, outcome.calls, outcome.parts)
    spans = []
    for gpus in (1, 3):
        recorded = recorded_calls(graph_of_run(tmp_path))
        assert recorded.for_gpus
        again = simulate_calls(replay_spec(recorded, workers=1, slots=1, gpus=gpus))
        devices = {call.gpu_id for call in again.calls if call.function == "kernel"}
        assert devices == set(range(gpus))
        spans.append(again.end_ns)
    assert spans[0] > 6 * 4 * MS > spans[1] > 2 * 4 * MS
    args = ["functions", "simulate", str(tmp_path), "--slots", "1", "--gpus", "3", "--json"]
    document = json.loads(CliRunner().invoke(app, args).output)
    assert document["runs"][1]["duration_ns"] == spans[1]
    assert document["runs"][1]["ran_ns"] < MS  # in slots: the calls on GPUs do not count


# ------------------------------------------------------------------------------ the command


def test_the_command_prints_each_number_of_slots(tmp_path: Path) -> None:
    recorded_run(tmp_path, slots=2)
    result = CliRunner().invoke(
        app,
        ["functions", "simulate", str(tmp_path), "--slots", "1,4", "--out", str(tmp_path / "out")],
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["recorded", "1 slot", "4 slots"]
    assert "34 ok, 8 call raised" in lines[1] and "34 ok, 8 call raised" in lines[3]
    assert "no number of slots makes the longest call shorter than" in result.output
    traced = CliRunner().invoke(app, ["trace", str(tmp_path / "out" / "slots-4")])
    assert traced.exit_code == 0 and "42 calls of functions" in traced.output, traced.output


def test_the_command_takes_one_call_with_what_is_below_it(tmp_path: Path) -> None:
    recorded_run(tmp_path, slots=2)
    graph = graph_of_run(tmp_path)
    middle = next(call for call in graph.calls.values() if call.function == "middle")
    args = [
        "functions",
        "simulate",
        str(tmp_path),
        "--slots",
        "2",
        "--call",
        str(middle.call_id),
        "--json",
    ]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert [run["calls"] for run in document["runs"]] == [5, 5]
    assert document["critical_ns"] == facts_of(graph, middle).critical_ns
    missing = CliRunner().invoke(app, ["functions", "simulate", str(tmp_path), "--call", "999"])
    assert missing.exit_code == 2 and "has no call 999" in missing.output


@pytest.mark.parametrize(
    ("slots", "words"), [("0", "slots"), ("1,x", "x"), ("", "--slots"), ("-3", "slots")]
)
def test_wrong_slots_are_refused(tmp_path: Path, slots: str, words: str) -> None:
    recorded_run(tmp_path, slots=2)
    result = CliRunner().invoke(app, ["functions", "simulate", str(tmp_path), "--slots", slots])
    assert result.exit_code == 2 and words in result.output


def test_a_run_without_calls_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["functions", "simulate", str(tmp_path)])
    assert result.exit_code == 2 and "has no calls.tsv" in result.output
    result = CliRunner().invoke(app, ["functions", "simulate", str(tmp_path / "none")])
    assert result.exit_code == 2 and "does not exist" in result.output
    with pytest.raises(InvalidConfig, match="holds no calls yet"):
        write_calls(tmp_path, [], [])
        graph_of_run(tmp_path)


def test_orphans_are_left_out_and_told(tmp_path: Path) -> None:
    calls, parts = family()
    write_calls(tmp_path, [*calls[:-1], a_call(90, 0, 5, start=0, exec=4)], parts)
    result = CliRunner().invoke(app, ["functions", "simulate", str(tmp_path), "--slots", "1"])
    assert result.exit_code == 0, result.output
    assert "3 calls are left out" in result.output
