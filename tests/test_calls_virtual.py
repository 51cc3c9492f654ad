"""Graphs of calls in virtual time: every call ends once, no body runs twice, and no graph stands still."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from slosched.codes import Code
from slosched.config import EmulationNoise, GpuProfile, ModelProfile
from slosched.core.invariants import InvariantViolated
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    EmulatedFunction,
    Exit,
    Raise,
    Run,
    Script,
    Step,
)
from slosched.errors import InvalidConfig
from slosched.messages import FunctionInfo
from slosched.sim.calls import CallArrival, CallOutcome, CallsFailed, CallSpec, simulate_calls
from slosched.sim.calls_case import LONG_NS, Graph, calm_case, hard_case
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.fuzz_calls import CallsOutcome, check_calm, run_calls_seed, shrink_calls
from slosched.sim.hosts import HostPlan
from slosched.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS
ALL = AwaitAll()


def function(name: str, *steps: Step, **info: object) -> EmulatedFunction:
    fields = {"slo_ns": LONG_NS} | info
    return EmulatedFunction(name=name, scripts=(Script(steps),), info=FunctionInfo(**fields))  # type: ignore[arg-type]


def run(
    *functions: EmulatedFunction,
    slots: int = 1,
    workers: int = 1,
    calls: int = 1,
    most_calls: int = 256,
    **more: object,
) -> CallOutcome:
    """Call the first function; the others are what it may call."""
    host = HostPlan(functions, slots=slots, most_calls=most_calls)
    arrival = CallArrival(at_ns=0, function=functions[0].name)
    spec = CallSpec(hosts=(host,) * workers, arrivals=(arrival,) * calls, **more)  # type: ignore[arg-type]
    return simulate_calls(spec)


# -------------------------------------------------------------------------- single graphs


def test_a_parent_and_its_children_share_one_slot() -> None:
    outcome = run(function("f", Run(MS), Chain("g", 5), ALL, Run(MS)), function("g", Run(2 * MS)))
    assert [each.code for each in outcome.answers] == [0]
    assert len(outcome.bodies) == len(outcome.calls) == 6
    assert 12 * MS < outcome.end_ns < 12 * MS + 6 * 2 * MS
    root = next(each for each in outcome.calls if each.function == "f")
    assert (root.exec_ns, root.children) == (2 * MS, 5)
    assert root.suspended_ns >= 10 * MS


def test_one_slot_is_enough_for_1_8_64() -> None:
    """1 -> 8 -> 64 nested calls end with one slot, as f.chain in a call that awaits gives its slot away."""
    outcome = run(
        function("f", Chain("g", 8), ALL),
        function("g", Chain("h", 8), ALL),
        function("h", Run(MS)),
    )
    assert [each.code for each in outcome.answers] == [0]
    assert len(outcome.bodies) == 1 + 8 + 64


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_more_slots_take_less_time(slots: int) -> None:
    outcome = run(function("f", Chain("g", 40), ALL), function("g", Run(10 * MS)), slots=slots)
    work_ns = 40 * 10 * MS // slots
    assert work_ns < outcome.end_ns < 1.25 * work_ns + 10 * MS


def test_children_run_on_every_worker() -> None:
    outcome = run(function("f", Chain("g", 20), ALL), function("g", Run(10 * MS)), workers=3)
    assert {each.worker_id for each in outcome.calls} == {0, 1, 2}


def test_what_a_child_raises_reaches_its_client_through_two_parents() -> None:
    outcome = run(
        function("f", Chain("g"), ALL),
        function("g", Chain("h"), ALL),
        function("h", Run(MS), Raise("ValueError: the deepest")),
    )
    (answered,) = outcome.answers
    assert answered.code == Code.CALL_RAISED
    assert "ValueError: the deepest" in answered.replies[0].reason


def test_a_child_that_dies_costs_neither_its_parent_nor_its_siblings() -> None:
    outcome = run(
        function("f", Chain("g"), Chain("h", 3), AwaitAll(catch=True), Run(MS)),
        function("g", Run(MS), Exit()),
        function("h", Run(MS)),
    )
    assert [each.code for each in outcome.answers] == [0]
    ends = {each.function: each.code for each in outcome.calls}
    assert ends == {"f": 0, "g": Code.MODEL_PROCESS_ENDED, "h": 0}


def test_a_call_that_ends_takes_its_children_back() -> None:
    outcome = run(function("f", Chain("g", 6), Run(MS)), function("g", Run(200 * MS)), slots=2)
    assert [each.code for each in outcome.answers] == [0]
    assert {each.code for each in outcome.calls if each.function == "g"} == {Code.CANCELLED}


def test_an_idempotent_call_runs_once_more_after_its_process_ended() -> None:
    once = run(function("f", Run(MS), Exit()))
    again = run(function("f", Run(MS), Exit(), idempotent=True))
    assert list(once.bodies.values()) == [1]
    assert list(again.bodies.values()) == [2]
    assert [each.answers[0].code for each in (once, again)] == [Code.MODEL_PROCESS_ENDED] * 2


def test_a_child_of_no_function_is_answered_in_words() -> None:
    outcome = run(function("f", Chain("nothing"), ALL))
    (answered,) = outcome.answers
    assert answered.code == Code.CALL_RAISED
    assert "nothing" in answered.replies[0].reason


def test_calls_nest_a_thousand_deep_and_no_deeper() -> None:
    """In one slot: each gives it to the next."""
    outcome = run(function("f", Chain("f"), ALL), most_calls=2000)
    (answered,) = outcome.answers
    assert answered.code == Code.CALL_RAISED
    assert "1000 calls above it" in answered.replies[0].reason
    assert len(outcome.bodies) == 1001


def test_a_call_has_ten_thousand_children_at_a_time_and_no_more() -> None:
    outcome = run(function("f", Chain("g", 10_001), ALL), function("g"), slots=8)
    (answered,) = outcome.answers
    assert answered.code == Code.CALL_RAISED
    assert "child 10000" in answered.replies[0].reason
    assert "10000 children of the call have no answer" in answered.replies[0].reason
    assert len(outcome.bodies) == 1 + 10_000


@pytest.mark.parametrize(
    ("widths", "slots"), [((63, 63), 1), ((2,) * 11, 8), ((1000, 3), 2), ((16, 16, 16), 1)]
)
def test_a_tree_of_4000_calls_ends_on_a_worker_with_256_unfinished_calls(
    widths: tuple[int, ...], slots: int
) -> None:
    """Deeper calls go first, so at most 256 have begun at a time. All levels are one function."""
    scripts = [
        Script((Run(MS // 4), Chain("f", width, numbers=(level,)), ALL))
        for level, width in enumerate(widths, 1)
    ]
    leaf = Script((Run(MS),))
    tree = EmulatedFunction(name="f", scripts=(*scripts, leaf), info=FunctionInfo(slo_ns=LONG_NS))
    outcome = run(tree, slots=slots)
    assert [each.code for each in outcome.answers] == [0]
    assert len(outcome.bodies) > 4000


def test_calls_that_are_suspended_for_another_worker_wait_for_one_another() -> None:
    """Their own host is idle, and would begin them all: more than it may have."""
    parents = (function("f", Chain("g", 40), ALL), function("g", Run(MS), Chain("h", 3), ALL))
    hosts = (HostPlan(parents, slots=2, most_calls=16), HostPlan((function("h", Run(MS)),)))
    outcome = simulate_calls(CallSpec(hosts=hosts, arrivals=(CallArrival(at_ns=0, function="f"),)))
    assert [each.code for each in outcome.answers] == [0]
    assert len(outcome.bodies) == 1 + 40 + 120


def test_calls_nest_over_all_workers_when_one_is_full() -> None:
    outcome = run(function("f", Chain("f"), ALL), most_calls=20, workers=3)
    (answered,) = outcome.answers
    assert "this worker has 20 unfinished calls" in answered.replies[0].reason
    assert len(outcome.bodies) == 60


def test_of_calls_that_block_one_another_few_are_answered_with_an_error() -> None:
    """Each awaits a child that needs the same host, and all that may begin have."""
    outcome = run(
        function("f", Chain("g"), ALL), function("g", Run(MS)), most_calls=4, calls=50, slots=3
    )
    failed = [each for each in outcome.answers if each.code]
    assert len(failed) <= 10
    assert all("no call can go on" in each.replies[0].reason for each in failed)


def test_children_run_on_the_worker_that_has_their_function() -> None:
    hosts = (
        HostPlan((function("f", Chain("g", 3), ALL),)),
        HostPlan((function("g", Chain("h", 2), ALL),)),
        HostPlan((function("h", Run(MS)),)),
    )
    outcome = simulate_calls(CallSpec(hosts=hosts, arrivals=(CallArrival(at_ns=0, function="f"),)))
    assert outcome.answers[0].code == 0
    assert {(each.function, each.worker_id) for each in outcome.calls} == {
        ("f", 0),
        ("g", 1),
        ("h", 2),
    }


@pytest.mark.parametrize("near", range(4))
def test_a_child_runs_where_the_one_ran_that_it_is_near_to(near: int) -> None:
    again = Chain("g", near_child=near)
    outcome = run(
        function("f", Chain("g", 4), ALL, again, ALL), function("g", Run(10 * MS)), workers=4
    )
    places = {each.child: each.worker_id for each in outcome.calls if each.function == "g"}
    assert sorted(places[child] for child in range(4)) == [0, 1, 2, 3]
    assert places[4] == places[near]


def test_what_calls_really_take_is_learnt_and_a_hopeless_one_is_refused_at_once() -> None:
    """The function says that it takes 1 ms. It takes about 40, so a call with 20 ms has no chance."""
    slow = function("f", Run(40 * MS))
    arrivals = [CallArrival(at_ns=i * 100 * MS, function="f", slo_ns=NS_PER_S) for i in range(20)]
    hopeless = CallArrival(at_ns=20 * 100 * MS, function="f", slo_ns=20 * MS)
    noise = EmulationNoise(exec_sigma=0.1)
    outcome = simulate_calls(
        CallSpec(hosts=(HostPlan((slow,)),), arrivals=(*arrivals, hopeless), noise=noise)
    )
    assert [each.code for each in outcome.answers[:-1]] == [0] * 20
    took = {each.exec_ns for each in outcome.calls}
    assert len(took) > 10 and 25 * MS < min(took - {0}) < 40 * MS < max(took) < 60 * MS
    last = outcome.answers[-1]
    assert last.code == Code.COULD_NOT_START_IN_TIME
    assert last.answered_ns - last.sent_ns < MS
    assert len(outcome.bodies) == 20


def test_a_worker_with_too_many_unfinished_calls_says_so() -> None:
    functions = [
        *(function(f"f{i}", Chain(f"f{i + 1}"), ALL) for i in range(9)),
        function("f9", Run(MS)),
    ]
    outcome = run(*functions, most_calls=4)
    (answered,) = outcome.answers
    assert answered.code == Code.CALL_RAISED
    assert "4 unfinished calls" in answered.replies[0].reason
    assert len(outcome.bodies) == 4


def test_a_lost_worker_costs_its_calls_and_their_parents_go_on() -> None:
    """The parent is on the other worker, or dies with its own; nothing waits for ever."""
    plan = FaultPlan((Fault("crash", "worker 0", 20 * MS, for_ns=NS_PER_S),))
    outcome = run(
        function("f", Run(MS), Chain("g", 4), AwaitAll(catch=True)),
        function("g", Run(100 * MS)),
        workers=2,
        slots=2,
        calls=2,
        faults=plan,
    )
    lost = [each for each in outcome.calls if each.code in (Code.PROCESS_ENDED, Code.CANCELLED)]
    assert lost
    assert set(outcome.bodies.values()) == {1}


def test_a_call_that_was_lost_on_the_way_is_answered() -> None:
    """It has no limit, so nothing else would end it."""
    plan = FaultPlan((Fault("lose", "to worker 0", 0, for_ns=400 * MS, probability=1.0),))
    outcome = run(function("f", Run(MS)), faults=plan, settle_ns=20 * NS_PER_S)
    assert outcome.answers[0].code != 0
    assert outcome.bodies == {}


def test_a_client_that_leaves_takes_its_graph_along() -> None:
    """CallSimulation checks that no process, frame and request of it is left."""
    outcome = run(
        function("f", Chain("g", 8), ALL),
        function("g", Chain("h", 8), ALL),
        function("h", Run(50 * MS)),
        slots=2,
        leave_ns=60 * MS,
    )
    assert outcome.answers[0].lost
    assert len(outcome.bodies) < 20
    ends = [each.code for each in outcome.calls]
    assert len(ends) > len(outcome.bodies) and set(ends) <= {Code.OK, Code.CANCELLED}


@pytest.mark.parametrize("cluster_id", ["", "cluster"])
def test_a_new_controller_finds_no_call_of_the_old_one(cluster_id: str) -> None:
    plan = FaultPlan((Fault("restart", "controller", 20 * MS, for_ns=200 * MS),))
    host = HostPlan((function("f", Chain("g", 4), ALL), function("g", Run(100 * MS))), slots=2)
    arrivals = [CallArrival(at_ns=at_ns, function="f") for at_ns in (0, 5 * NS_PER_S)]
    outcome = simulate_calls(
        CallSpec(hosts=(host,), arrivals=tuple(arrivals), faults=plan, cluster_id=cluster_id)
    )
    first, second = outcome.answers
    assert (first.lost, second.code) == (True, 0)
    assert set(outcome.bodies.values()) == {1}


def test_a_suspended_call_whose_process_ends_is_answered_and_its_children_are_taken_back() -> None:
    plan = FaultPlan((Fault("end", "worker 0 GPU 0", 0, for_ns=2 * MS, probability=1.0),))
    outcome = run(
        function("f", Chain("g", 4), ALL), function("g", Run(100 * MS)), slots=2, faults=plan
    )
    assert outcome.answers[0].code == Code.MODEL_PROCESS_ENDED
    assert "while it was suspended" in outcome.answers[0].replies[0].reason
    assert {each.code for each in outcome.calls if each.function == "g"} <= {
        Code.CANCELLED,
        Code.MODEL_PROCESS_ENDED,
    }


def test_functions_of_gpus_run_beside_models_on_the_gpus_and_their_children_on_the_host() -> None:
    profile = ModelProfile(
        name="net", exec_ns={1: 2 * MS}, weights_ns=MS, weights_bytes=1, input_shape=(1,)
    )
    functions = (function("f", Run(2 * MS), Chain("g"), ALL, gpu=True), function("g", Run(MS)))
    names = ("f", "net", "f", "net", "f")
    outcome = simulate_calls(
        CallSpec(
            hosts=(HostPlan(functions),),
            arrivals=tuple(CallArrival(at_ns=0, function=name, slo_ns=NS_PER_S) for name in names),
            gpus=1,
            profile=GpuProfile("small", {"net": profile}, weights_cache_bytes=9, page_bytes=1),
        )
    )
    assert [each.code for each in outcome.answers] == [0] * 5
    assert {(each.function, each.gpu_id) for each in outcome.calls} == {("f", 0), ("g", 1)}


# ----------------------------------------------------------------------- graphs by chance


def test_what_a_graph_comes_to() -> None:
    graph = Graph(
        (
            function("f", Run(5), Chain("g", 3), AwaitAll(catch=True), Chain("h"), ALL, Run(9)),
            function("g", Run(2), Chain("h"), AwaitAll(catch=True)),
            function("h", Run(1), Raise("no"), Run(100)),
        )
    )
    assert [graph.calls(name, 0) for name in "hgf"] == [1, 2, 8]
    assert [graph.code(name, 0) for name in "hgf"] == [104, 0, 104]
    assert graph.run_ns("f", 0) == 5 + 3 * (2 + 1) + 1
    assert graph.depth("f", 0) == 3


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_every_call_of_a_graph_ends_as_its_script_says_with_any_number_of_slots(
    draw: Random,
) -> None:
    spec = calm_case(draw)
    note(str(spec))
    check_calm(spec, simulate_calls(spec))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(0, 2**32))
def test_every_call_is_answered_once_whatever_fails(draw: Random, seed: int) -> None:
    spec = hard_case(draw, seed)
    note(str(spec))
    simulate_calls(spec)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_seed_fails(first: int) -> None:
    """A seed that fails is told with its story, as small as it gets, and the command that repeats it."""
    for seed in range(first, first + 50):
        outcome = run_calls_seed(seed)
        if outcome.failure:
            small = shrink_calls(outcome)
            pytest.fail(f"{small.failure}\n{small.text()}\nagain: {small.command}")


def test_the_same_seed_gives_the_same_run() -> None:
    assert run_calls_seed(7) == run_calls_seed(7)
    assert run_calls_seed(7).events != run_calls_seed(8).events


def test_seeds_reach_what_matters() -> None:
    """Every way in which a call ends is among the first seeds."""
    outcomes = [run_calls_seed(seed) for seed in range(120)]
    codes = {code for outcome in outcomes for code in outcome.codes}
    assert {
        Code.OK,
        Code.CANCELLED,
        Code.TIMED_OUT,
        Code.COULD_NOT_START_IN_TIME,
        Code.MODEL_PROCESS_ENDED,
        Code.CALL_RAISED,
        Code.CALL_OVER_LIMIT,
    } <= codes
    kinds = {
        fault.kind
        for outcome in outcomes
        if outcome.spec.faults is not None
        for fault in outcome.spec.faults.faults
    }
    assert {"crash", "leave", "end", "partition", "lose", "twice"} <= kinds


# --------------------------------------------------------------- what the checks must see


SPEC = CallSpec(
    hosts=(HostPlan((function("f", Chain("g", 2), ALL), function("g", Run(MS)))),),
    arrivals=(CallArrival(at_ns=0, function="f"),),
)


def test_a_body_that_begins_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from slosched.core.worker.emulated_calls import EmulatedHost

    launch = EmulatedHost.launch

    def twice(self: EmulatedHost, op: object, *, now_ns: int) -> object:
        if op.kind.name == "CALL":  # type: ignore[attr-defined]
            self._on_begin(op.model_name, self._inputs[op.action_id])  # type: ignore[misc, attr-defined]
        return launch(self, op, now_ns=now_ns)  # type: ignore[arg-type]

    monkeypatch.setattr(EmulatedHost, "launch", twice)
    with pytest.raises(InvariantViolated, match="a second time"):
        simulate_calls(SPEC)


def test_a_result_of_another_child_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from slosched.core.worker.emulated_calls import EmulatedHost

    monkeypatch.setattr(EmulatedHost, "take_result", lambda self, key: b"x" * 16)
    with pytest.raises(ValueError, match="not"):
        simulate_calls(SPEC)


def test_a_brain_that_never_lets_calls_go_on_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from slosched.core.worker.kinds.call import CallKind

    monkeypatch.setattr(CallKind, "_ready", lambda self, action, state: None)
    with pytest.raises(InvariantViolated, match="no answer"):
        simulate_calls(replace(SPEC, settle_ns=NS_PER_S))


def test_a_slot_that_a_suspended_call_keeps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph stands still until its deadline, and then does not end as it should."""
    from slosched.core.worker.pipeline import Pipeline

    def keeps(self: Pipeline, op_id: int) -> object:
        lane, action = self._ops.pop(op_id)
        if not action.call or len(lane.started) > 1:
            lane.started.remove(action)
        return action

    monkeypatch.setattr(Pipeline, "op_over", keeps)
    with pytest.raises((InvariantViolated, AssertionError)):
        check_calm(SPEC, simulate_calls(replace(SPEC, settle_ns=NS_PER_S)))


# ---------------------------------------------------------------------------------- misuse


def test_specs_that_cannot_be_are_refused() -> None:
    host = HostPlan((function("f"),))
    with pytest.raises(InvalidConfig, match="a worker"):
        CallSpec(hosts=(), arrivals=())
    with pytest.raises(InvalidConfig, match="'g'"):
        CallSpec(hosts=(host,), arrivals=(CallArrival(at_ns=0, function="g"),))
    with pytest.raises(InvalidConfig, match="0 or later"):
        CallSpec(hosts=(host,), arrivals=(CallArrival(at_ns=-1, function="f"),))
    with pytest.raises(InvalidConfig, match="one name"):
        HostPlan((function("f"), function("f")))
    with pytest.raises(InvalidConfig, match="one slot"):
        HostPlan((function("f"),), slots=0)


def test_a_policy_that_serves_no_functions_says_so() -> None:
    from slosched.config import SchedulerConfig

    with pytest.raises(CallsFailed, match="FIFO"):
        simulate_calls(replace(SPEC, scheduler=SchedulerConfig(policy="FIFO")))


def test_a_failed_seed_tells_how_to_repeat_it() -> None:
    outcome = run_calls_seed(3)
    assert isinstance(outcome, CallsOutcome)
    assert outcome.command == "slosched fuzz --calls --seeds 1 --first 3 --verbose"
    assert "seed 3" in outcome.text() and "f0" in outcome.text()
